"""ImageNet-LT from the user's own ImageNet folder and the official lists (Liu et al., 2019).

``$MLLMFL_DATA/imagenet`` is the ImageNet folder (``train/n01440764/n01440764_762.JPEG``, ...).
``$MLLMFL_DATA/imagenet_lt`` holds ``ImageNet_LT_train.txt``, ``..._val.txt`` and ``..._test.txt``. A smaller set of the
same form has its class names in ``imagenet_lt/classes.txt``, a line each.
"""

import numpy as np

from mllmfl_lite.data.folders import data_folder, read_lines, read_list, require_files
from mllmfl_lite.data.images import ImageFiles, ImageSet

IMAGENET_LT = {"train": 115_846, "val": 20_000, "test": 50_000}  # images in each official list


def load_imagenet_lt(part: str, size: int) -> ImageSet:
    """One part, as files that are opened when needed; `folders.find_unreadable` opens them all."""
    folder = data_folder()
    listed, classes = folder / "imagenet_lt" / f"ImageNet_LT_{part}.txt", folder / "imagenet_lt" / "classes.txt"
    paths, labels = read_list(listed)
    names = tuple(line for _, line in read_lines(classes)) if classes.exists() else _imagenet_names()
    if not classes.exists() and len(paths) != IMAGENET_LT[part]:
        raise ValueError(
            f"{listed} has {len(paths):,} lines, the official list {IMAGENET_LT[part]:,}; fetch it again, or name the "
            f"classes of a set of your own in {classes}, a line each"
        )
    if labels.max() >= len(names):
        raise ValueError(f"{listed} has the class number {labels.max()}, but there are {len(names)} class names")
    files = ImageFiles(folder / "imagenet", np.array(paths, dtype=object), size)
    own = "" if classes.exists() else f" and name the classes in {classes}, since the list is then one of your own"
    require_files(files, f"Put them there; or take their lines out of {listed}{own}")
    return ImageSet(files, labels, names, f"imagenet_lt/{part}")


def _imagenet_names() -> tuple[str, ...]:
    from torchvision.models import ResNet50_Weights  # slow

    names = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return tuple(f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names))
