"""Labelled image sets: one uint8 array (N, H, W, C), its labels and its class names, behind one small function::

    train = load_images("cifar10_mini", "train")      # bundled: works offline, 5,000 real images
    train = load_images("cifar10", "train")           # all 50,000, from $MLLMFL_DATA or downloaded
    train = load_images("imagenet_lt", "train")       # 115,846 files of your own ImageNet folder, read when needed

CIFAR is compared with a checksum, and every file of ImageNet-LT opened once, before images are handed out.
"""

from __future__ import annotations

from mllmfl_lite.data.folders import check_files, data_folder, read_list
from mllmfl_lite.data.images import ImageFiles, ImageSet
from mllmfl_lite.data.pictures import DataError

IMAGENET_LT = {"train": 115_846, "val": 20_000, "test": 50_000}
"""Images in each official list of ImageNet-LT (Liu et al., 2019).

``$MLLMFL_DATA/imagenet`` is the ImageNet folder (``train/n01440764/n01440764_762.JPEG``, ...), and
``$MLLMFL_DATA/imagenet_lt`` holds the lists ``ImageNet_LT_train.txt``, ``..._val.txt``, ``..._test.txt``. A smaller set
of the same form has its class names in ``imagenet_lt/classes.txt``, a line each.
"""


def _load_imagenet_lt(part: str, size: int) -> ImageSet:
    folder = data_folder()
    listed = folder / "imagenet_lt" / f"ImageNet_LT_{part}.txt"
    paths, labels = read_list(listed)
    own = folder / "imagenet_lt" / "classes.txt"
    names = tuple(own.read_text().splitlines()) if own.exists() else _imagenet_names()
    if not own.exists() and len(paths) != IMAGENET_LT[part]:
        raise DataError(
            f"{listed} has {len(paths):,} lines, the official list {IMAGENET_LT[part]:,}; fetch it again, or name the "
            f"classes of a set of your own in {own}, a line each"
        )
    if labels.max() >= len(names):
        raise DataError(f"{listed} has the class number {labels.max()}, but there are {len(names)} class names")
    files = ImageFiles(folder / "imagenet", paths, size)
    check_files(files)
    return ImageSet(files, labels, names, f"imagenet_lt/{part}")


def _imagenet_names() -> tuple[str, ...]:
    from torchvision.models import ResNet50_Weights  # slow to import

    return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
