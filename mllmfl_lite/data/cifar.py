"""CIFAR: the bundled small set, and the full sets from disk."""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from mllmfl_lite.data.folders import FOLDER_VARIABLE, data_folder
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.names import CIFAR10_CLASSES, CIFAR100_CLASSES
from mllmfl_lite.repro import ASSETS

MINI_FOLDER = ASSETS / "cifar10_mini"
NAMES = {"cifar10": CIFAR10_CLASSES, "cifar100": CIFAR100_CLASSES}

# sha256 of the uint8 pixels (N, 32, 32, 3) followed by the int64 labels, both little-endian, in the original order
PIXELS_SHA256 = {
    ("cifar10", "train"): "67e12c2a5906880a4fe5595fe6d768185ad7ca587f35d3a7ece3c3b8b85035d2",
    ("cifar10", "test"): "e54a434ec35094516eacbaac0f2f9550358d985e9d1f71b47d41d333c15ba304",
    ("cifar100", "train"): "f062ca493c4d44a3d0921f223fbc3b1e88b46fd03322e97c635a0ac2a5f8baab",
    ("cifar100", "test"): "bd251483addf0530bc3e831455074dfa75f7657056fc2639e6b6aced382c06a9",
}


def check_pixels(dataset: str, part: str, images: np.ndarray, labels: np.ndarray) -> ImageSet:
    """That part as a set; `ValueError` unless these are the original images and labels, in the original order."""
    checked = ImageSet(images, labels, NAMES[dataset], f"{dataset}/{part}")
    if checked.checksum() != PIXELS_SHA256[dataset, part]:
        raise ValueError(f"images or labels of {checked.origin} differ from the originals; fetch the file again")
    return checked


def mini_index() -> dict:
    """The index of `cifar10_mini`: for each part its sheet, checksum, labels and the places in the full sets."""
    return json.loads((MINI_FOLDER / "index.json").read_text(encoding="utf-8"))


def cut_sheet(sheet: np.ndarray, columns: int, size: int = 32) -> np.ndarray:
    """Cut a contact sheet (rows * size, columns * size, 3) into images (rows * columns, size, size, 3)."""
    tiles = sheet.reshape(-1, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(-1, size, size, 3))


@functools.lru_cache(maxsize=3)
def load_mini(part: str) -> ImageSet:
    """A part of the bundled set; its checksum is verified."""
    entry = mini_index()["parts"][part]
    path = MINI_FOLDER / entry["sheet"]
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ValueError(f"{path} is damaged or missing; install the package again (git checkout -- {path.name})")
    with Image.open(path) as sheet:
        images = cut_sheet(np.asarray(sheet.convert("RGB")), entry["columns"])
    labels = np.asarray(entry["labels"], dtype=np.int64)
    images.flags.writeable = labels.flags.writeable = False  # every caller gets the same arrays
    return ImageSet(images, labels, tuple(entry["names"]), f"cifar10_mini/{part}")


def load_cifar(dataset: str, part: str) -> ImageSet:
    """A part of a full set, compared with the checksum of the originals; downloaded if absent."""
    folder = data_folder()
    packed = folder / f"{dataset}.npz"
    images, labels = _read_npz(packed, part) if packed.exists() else _torchvision(folder, dataset, part)
    return check_pixels(dataset, part, images, labels)


def _read_npz(path: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return arrays[f"x_{part}"], arrays[f"y_{part}"]
    except Exception as error:  # of zip, zlib and numpy
        raise ValueError(f"{path} cannot be read ({error}); remove it and make it again") from error


def _torchvision(folder: Path, dataset: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    from torchvision.datasets import CIFAR10, CIFAR100  # slow
    from torchvision.datasets.utils import check_integrity

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    if folder.name == source.base_folder:
        raise ValueError(f"{FOLDER_VARIABLE}={folder} is the data set; name the folder above it: {folder.parent}")
    archive = folder / source.filename
    if archive.exists() and not check_integrity(str(archive), source.tgz_md5):
        raise ValueError(f"{archive} is corrupt: its md5 is not {source.tgz_md5}; remove it and fetch it again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        loaded = source(folder, train=part == "train", download=True)
    except (OSError, RuntimeError) as error:
        problem = f"{dataset} is not in {folder} and cannot be downloaded ({error})"
        advice = f"Put {source.filename} (from {source.url}) into a folder and set {FOLDER_VARIABLE} to it"
        raise ValueError(f"{problem}. {advice}") from error
    return loaded.data, np.asarray(loaded.targets, dtype=np.int64)
