"""Compact image models behind one interface: feature map, features, token grid, head."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, kl_div, log_softmax, softmax

from mllmfl_lite.repro import sha256_arrays, stable_seed, write_atomically


class CompactModel(nn.Module):
    """A convolutional body, images (B, 3, H, W) -> feature map (B, D, h, w), and a linear head, D -> C."""

    names: tuple[str, ...] = ()  #: the C class names, if they are known

    def __init__(self, body: nn.Module, num_features: int, num_classes: int):
        super().__init__()
        self.body = body
        self.num_features = num_features
        self.head = nn.Linear(num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> features (B, D), the mean over the feature map."""
        return self.body(x).mean((2, 3))

    def tokens(self, x: Tensor, grid: int) -> Tensor:
        """Images (B, 3, H, W) -> visual tokens (B, grid * grid, D), row by row.

        A larger feature map is pooled to the grid, a smaller one is repeated. One must divide the other.
        """
        maps = self.body(x)
        height, width = maps.shape[2:]
        if grid < 1 or any(side % grid and grid % side for side in (height, width)):
            sides = f"the map is {height} x {width}, the grid {grid} x {grid}"
            raise ValueError(f"feature map and token grid must divide one another; {sides}; choose another image size")
        for axis, side in ((2, height), (3, width)):
            if side < grid:
                maps = maps.repeat_interleave(grid // side, axis)
        return adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, C)."""
        return self.head(self.features(x))


class _Shortcut(nn.Sequential):
    """A strided 1x1 convolution and BatchNorm, the stride taken first.

    torch 2.15's backward pass of a strided 1x1 convolution ends the process on some CPUs.
    """

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__(nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :: self.stride, :: self.stride])


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut, 1x1 where the shape changes (He et al., 2016)."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        same = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if same else _Shortcut(inside, outside, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(self.conv1(x)).relu_()
        return self.norm2(self.conv2(out)).add_(self.shortcut(x)).relu_()


def resnet8(num_classes: int, width: int = 64) -> CompactModel:
    """ResNet-8 for 32 x 32 images: a 3x3 stem and one basic block each at `width`, 2 `width` and 4 `width` channels.

    The feature map is 8 x 8. The benchmarks' width is 64: 1,227,594 parameters with 10 classes.
    """
    body = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        _BasicBlock(width, width, 1),
        _BasicBlock(width, 2 * width, 2),
        _BasicBlock(2 * width, 4 * width, 2),
    )
    return CompactModel(body, 4 * width, num_classes)


def resnet50(num_classes: int) -> CompactModel:
    """torchvision's ResNet-50, untrained, for 224 x 224 images: features of 2,048 numbers, a 7 x 7 feature map."""
    from torchvision.models import resnet50 as torchvision_resnet50  # slow

    body = nn.Sequential(*list(torchvision_resnet50(weights=None).children())[:-2])
    return CompactModel(body, 2048, num_classes)


def build_model(name: str, num_classes: int, width: int = 64, seed: int = 0) -> CompactModel:
    """The model of that name with weights that depend on `seed` alone; `width` is for ResNet-8."""
    if name not in ("resnet8", "resnet50"):
        raise ValueError(f"no model named {name!r}; there are resnet8, resnet50")
    if min(num_classes, width) < 1:
        raise ValueError(f"num_classes and width must be at least 1; got {num_classes} and {width}")
    with torch.random.fork_rng(devices=[]):  # torch's initialisers draw from the global generator
        torch.manual_seed(stable_seed(seed, "initial weights"))
        return resnet8(num_classes, width) if name == "resnet8" else resnet50(num_classes)


def save_model(path: str | Path, model: CompactModel, name: str, width: int = 64, names: Sequence[str] = ()) -> None:
    """Write a model as safetensors, the same bytes each time.

    `name` and `width` are those of `build_model`. `names` are the class names, by default the model's own.
    """
    names, num_classes = list(names or model.names), model.head.out_features
    if names and len(names) != num_classes:
        raise ValueError(f"a model of {num_classes} classes needs {num_classes} class names, {len(names)} given")
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    about = {"name": name, "width": width, "num_classes": num_classes, "names": names}
    about["sha256"] = _checksum(about, state)
    write_atomically(path, safetensors.torch.save(state, {"model": json.dumps(about)}))  # one entry: no order


def load_model(path: str | Path) -> CompactModel:
    """Read a model that `save_model` wrote; any other file, or a damaged one, is a `ValueError`."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about, state = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = json.loads(about["model"]) if "model" in about else about  # committed weights have no checksum
        model = build_model(about["name"], int(about["num_classes"]), int(about["width"]))
        model.load_state_dict(state)
        model.names = tuple(about.get("names", ()))
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} holds no model written by save_model ({error}); remove it, make it again") from error
    if about.pop("sha256", None) not in (None, _checksum(about, state)):
        raise ValueError(f"{path} is damaged: its content does not fit its checksum; remove it, make it again")
    return model


def _checksum(about: dict, state: dict[str, Tensor]) -> str:
    words = json.dumps([about, sorted(state)], sort_keys=True).encode()
    return sha256_arrays([np.frombuffer(words, np.uint8), *(state[name].cpu().numpy() for name in sorted(state))])


def count_parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(p.numel() for p in model.parameters())


def with_head(model: CompactModel, num_classes: int, seed: int = 0) -> CompactModel:
    """A copy with a new linear head for `num_classes` classes, which depends on the seed alone."""
    fresh = copy.deepcopy(model)
    fresh.names = ()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "head"))
        fresh.head = nn.Linear(model.num_features, num_classes)
    return fresh


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(logits / T))``, both logits (B, C); mean over the batch.

    T is the temperature (Hinton et al., 2015).
    """
    student = log_softmax(logits / temperature, 1)
    return temperature**2 * kl_div(student, softmax(teacher / temperature, 1), reduction="batchmean")
