"""Labelled image sets: one uint8 array (N, H, W, C), its labels and its class names, behind one small function::

    train = load_images("cifar10_mini", "train")      # bundled: works offline, 5,000 real images
    train = load_images("cifar10", "train")           # all 50,000, from $MLLMFL_DATA or downloaded
    train = load_images("imagenet_lt", "train")       # 115,846 files of your own ImageNet folder, read when needed

CIFAR is compared with a checksum, and every file of ImageNet-LT opened once, before images are handed out.
"""

from __future__ import annotations

from mllmfl_lite.data.cifar import _load_cifar, _load_mini
from mllmfl_lite.data.imagenet_lt import _load_imagenet_lt
from mllmfl_lite.data.images import ImageSet

PARTS = {
    "cifar10_mini": ("train", "web", "test"),
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "imagenet_lt": ("train", "val", "test"),
}


def load_images(dataset: str, part: str = "train", size: int = 224) -> ImageSet:
    """The images of one part of a data set.

    Args:
        dataset: ``"cifar10_mini"`` (bundled), ``"cifar10"`` or ``"cifar100"`` (in full, from the folder that the
            environment variable ``MLLMFL_DATA`` names, downloaded into it where absent), or ``"imagenet_lt"`` (your own
            ImageNet folder there, see `IMAGENET_LT`).
        part: ``"train"`` or ``"test"``; ``cifar10_mini`` also has ``"web"``, the server's pool of open images, whose
            labels are for measuring only: no method may train on them. ``imagenet_lt`` also has ``"val"``.
        size: pixels a side at which pictures from files are looked at.

    Raises:
        ValueError: no such data set or part.
        DataError: the files are absent, damaged, or in the wrong place.
    """
    if dataset not in PARTS:
        raise ValueError(f"no data set named {dataset!r}; there are {', '.join(PARTS)}")
    if part not in PARTS[dataset]:
        raise ValueError(f"{dataset} has no part {part!r}; it has {', '.join(PARTS[dataset])}")
    if dataset == "imagenet_lt":
        return _load_imagenet_lt(part, size)
    return _load_mini(part) if dataset == "cifar10_mini" else _load_cifar(dataset, part)
