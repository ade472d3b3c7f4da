"""Images: sets, long tails, client splits, batches, accuracy."""

from mllmfl_lite.data.cifar import load_cifar, load_mini
from mllmfl_lite.data.imagenet_lt import load_imagenet_lt
from mllmfl_lite.data.images import ImageSet

PARTS = {
    "cifar10_mini": ("train", "web", "test"),
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "imagenet_lt": ("train", "val", "test"),
}


def load_images(dataset: str, part: str = "train", size: int = 224) -> ImageSet:
    """Load one part of a data set.

    Args:
        dataset: ``"cifar10_mini"`` (bundled), ``"cifar10"`` or ``"cifar100"`` (in ``$MLLMFL_DATA``, downloaded if
            absent), ``"imagenet_lt"`` (your own ImageNet folder, see `data.imagenet_lt`).
        part: one of `PARTS`; ``"web"`` are the server's open images, whose labels are for measuring only.
        size: pixels a side at which files are read.
    """
    if dataset not in PARTS:
        raise ValueError(f"no data set named {dataset!r}; there are {', '.join(PARTS)}")
    if part not in PARTS[dataset]:
        raise ValueError(f"{dataset} has no part {part!r}; it has {', '.join(PARTS[dataset])}")
    if dataset == "imagenet_lt":
        return load_imagenet_lt(part, size)
    return load_mini(part) if dataset == "cifar10_mini" else load_cifar(dataset, part)
