"""Labelled image sets: one uint8 array (N, H, W, C), its labels and its class names, behind one small function::

    train = load_images("cifar10_mini", "train")      # bundled: works offline, 5,000 real images
    train = load_images("cifar10", "train")           # all 50,000, from $MLLMFL_DATA or downloaded
    train = load_images("imagenet_lt", "train")       # 115,846 files of your own ImageNet folder, read when needed

CIFAR is compared with a checksum, and every file of ImageNet-LT opened once, before images are handed out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mllmfl_lite.data.pictures import open_picture

UNLABELLED = ("unlabelled",)  # class names of a set whose labels mean nothing


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


def _sha256_arrays(images: np.ndarray | ImageFiles, labels: np.ndarray) -> str:
    digest = hashlib.sha256(images.digest() if isinstance(images, ImageFiles) else np.ascontiguousarray(images))
    digest.update(np.ascontiguousarray(labels, dtype="<i8"))
    return digest.hexdigest()


@dataclass(frozen=True)
class ImageFiles:
    """Pictures in files below one folder.

    Attributes:
        root: the folder.
        paths: of the files below it, str (N,).
        size: pixels a side of the squares that training and testing see.
    """

    root: Path
    paths: np.ndarray
    size: int = 224

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel; got {self.size}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, chosen: int | slice | np.ndarray) -> Image.Image | ImageFiles:
        """The picture at a number, RGB, or the files at a slice or an index array.

        Raises:
            BadPictureError: the picture is gone or damaged.
        """
        if isinstance(chosen, (int, np.integer)):
            return open_picture(Path(self.root) / self.paths[chosen], self.paths[chosen])
        return ImageFiles(self.root, self.paths[chosen], self.size)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[i] for i in range(len(self)))

    def digest(self) -> bytes:
        """What tells two sets of files apart: names and the size they are looked at. Contents are not read."""
        return f"{self.size}\n".encode() + "\n".join(self.paths.tolist()).encode()
