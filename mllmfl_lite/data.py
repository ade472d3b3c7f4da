"""Labelled image sets: one uint8 array (N, H, W, C), its labels and its class names, behind one small function::

    train = load_images("cifar10_mini", "train")      # bundled: works offline, 5,000 real images
    train = load_images("cifar10", "train")           # all 50,000, from $MLLMFL_DATA or downloaded
    train = load_images("imagenet_lt", "train")       # 115,846 files of your own ImageNet folder, read when needed

CIFAR is compared with a checksum, and every file of ImageNet-LT opened once, before images are handed out.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mllmfl_lite.files import DataError, ImageFiles, check_files, read_list

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PARTS = {
    "cifar10_mini": ("train", "web", "test"),
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "imagenet_lt": ("train", "val", "test"),
}
UNLABELLED = ("unlabelled",)  # class names of a set whose labels mean nothing
FOLDER_VARIABLE = "MLLMFL_DATA"
MINI_FOLDER = Path(__file__).parent / "assets" / "cifar10_mini"

# sha256 of the uint8 pixels (N, 32, 32, 3) followed by the int64 labels, both little-endian, in the original order
PIXELS_SHA256 = {
    ("cifar10", "train"): "67e12c2a5906880a4fe5595fe6d768185ad7ca587f35d3a7ece3c3b8b85035d2",
    ("cifar10", "test"): "e54a434ec35094516eacbaac0f2f9550358d985e9d1f71b47d41d333c15ba304",
    ("cifar100", "train"): "f062ca493c4d44a3d0921f223fbc3b1e88b46fd03322e97c635a0ac2a5f8baab",
    ("cifar100", "test"): "bd251483addf0530bc3e831455074dfa75f7657056fc2639e6b6aced382c06a9",
}


@dataclass(frozen=True)
class ImageSet:
    """Images with labels.

    Attributes:
        images: uint8, shape (N, H, W, C), RGB; or N files, read when they are looked at.
        labels: int64, shape (N,), indices into `names`.
        names: the class names.
        origin: where the images come from, e.g. ``"cifar10_mini/train"``.
    """

    images: np.ndarray | ImageFiles
    labels: np.ndarray
    names: tuple[str, ...]
    origin: str

    def __post_init__(self) -> None:
        if isinstance(self.images, np.ndarray) and (self.images.dtype != np.uint8 or self.images.ndim != 4):
            raise ValueError(
                f"images must be uint8 (N, H, W, C); these are {self.images.dtype} of shape {self.images.shape}"
            )
        if self.labels.shape != (len(self.images),):
            raise ValueError(f"one label an image: {len(self.images)} images, labels of shape {self.labels.shape}")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.names):
            raise ValueError(
                f"labels must lie in 0..{len(self.names) - 1}, one class name each; "
                f"these run from {self.labels.min()} to {self.labels.max()}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """The number of classes, whether or not each has an image."""
        return len(self.names)

    def class_counts(self) -> np.ndarray:
        """Images a class: int64, shape (C,)."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def subset(self, indices: np.ndarray) -> ImageSet:
        """The images at `indices`, in that order."""
        return ImageSet(self.images[indices], self.labels[indices], self.names, self.origin)

    def checksum(self) -> str:
        """sha256 of pixels (of file names, where images are files) and labels: the same for the same set."""
        return _sha256_arrays(self.images, self.labels)


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


def _sha256_arrays(images: np.ndarray | ImageFiles, labels: np.ndarray) -> str:
    digest = hashlib.sha256(images.digest() if isinstance(images, ImageFiles) else np.ascontiguousarray(images))
    digest.update(np.ascontiguousarray(labels, dtype="<i8"))
    return digest.hexdigest()


def check_pixels(dataset: str, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise `DataError` unless these are the original images and labels of that part, in the original order."""
    found = _sha256_arrays(images, labels)
    if found != PIXELS_SHA256[dataset, part]:
        raise DataError(
            f"the {part} images of {dataset} differ from the originals: sha256 of pixels and labels is {found[:16]}…, "
            f"it must be {PIXELS_SHA256[dataset, part][:16]}…; remove the file and fetch it again"
        )


# ---------------------------------------------------------------------------------------------------- cifar10_mini


def mini_index() -> dict:
    """The index of `cifar10_mini`: for each part its sheet, checksum, labels and the places in the full sets."""
    return json.loads((MINI_FOLDER / "index.json").read_text())


def cut_sheet(sheet: np.ndarray, columns: int, size: int = 32) -> np.ndarray:
    """Cut a contact sheet (rows * size, columns * size, 3) into images (rows * columns, size, size, 3)."""
    tiles = sheet.reshape(-1, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(-1, size, size, 3))


@functools.lru_cache(maxsize=3)
def _load_mini(part: str) -> ImageSet:
    index = mini_index()
    entry = index["parts"][part]
    path = MINI_FOLDER / entry["sheet"]
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise DataError(
            f"{path} is damaged or missing; take it again from the repository (git checkout -- {path.name})"
        )
    with Image.open(path) as sheet:
        images = cut_sheet(np.asarray(sheet.convert("RGB")), entry["columns"])
    labels = np.asarray(entry["labels"], dtype=np.int64)
    images.flags.writeable = labels.flags.writeable = False  # every caller gets the same arrays
    return ImageSet(images, labels, tuple(entry["names"]), f"cifar10_mini/{part}")


# ---------------------------------------------------------------------------------------------------- full sets


def data_folder() -> Path:
    """Where the full data sets are kept: ``$MLLMFL_DATA``, or a folder in the user's cache."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if not chosen:
        return Path.home() / ".cache" / "mllmfl_lite"
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        raise DataError(f"{FOLDER_VARIABLE}={chosen} is not a folder; create it, or unset the variable")
    return folder


def find_folder(name: str) -> Path:
    """A folder of pictures by its path, or by its name in `data_folder`; whether it is there, its reader checks."""
    return Path(name) if Path(name).is_dir() else data_folder() / name


def _load_cifar(dataset: str, part: str) -> ImageSet:
    folder = data_folder()
    packed = folder / f"{dataset}.npz"
    images, labels, names = _read_npz(packed, part) if packed.exists() else _torchvision(folder, dataset, part)
    check_pixels(dataset, part, images, labels)
    return ImageSet(images, labels, names, f"{dataset}/{part}")


def _read_npz(path: Path, part: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return arrays[f"x_{part}"], arrays[f"y_{part}"], tuple(arrays["names"].tolist())
    except Exception as error:
        raise DataError(f"{path} cannot be read ({error}); remove it and make it again") from error


def _torchvision(folder: Path, dataset: str, part: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    from torchvision.datasets import CIFAR10, CIFAR100  # slow to import, and the bundled images do not need it
    from torchvision.datasets.utils import check_integrity

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    if folder.name == source.base_folder:
        raise DataError(f"{FOLDER_VARIABLE}={folder} is the data set itself; name the folder above it: {folder.parent}")
    archive = folder / source.filename
    if archive.exists() and not check_integrity(str(archive), source.tgz_md5):
        raise DataError(f"{archive} is corrupt: its md5 is not {source.tgz_md5}; remove it and fetch it again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = source(folder, train=part == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{dataset} is not in {folder} and cannot be downloaded ({error}). Put {source.filename} "
            f"(from {source.url}), unpacked or not, into a folder and set {FOLDER_VARIABLE} to it"
            + (", or make cifar10.npz with scripts/cifar10_from_npm.py" if dataset == "cifar10" else "")
        ) from error
    return there.data, np.asarray(there.targets, dtype=np.int64), tuple(there.classes)


# ---------------------------------------------------------------------------------------------------- ImageNet-LT

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
