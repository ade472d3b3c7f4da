"""Labelled image sets, in memory or in files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mllmfl_lite.data.pictures import as_pil, open_picture

UNLABELLED = ("unlabelled",)  # the class names of a set without labels


@dataclass(frozen=True)
class ImageFiles:
    """Images in files below one folder, opened when they are needed.

    Attributes:
        root: the folder.
        paths: of the files below it, str (N,).
        size: pixels a side at which training and testing see them.
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
        """The image at a number (RGB), or the files at a slice or an index array."""
        if isinstance(chosen, (int, np.integer)):
            return open_picture(Path(self.root) / self.paths[chosen], self.paths[chosen])
        return ImageFiles(self.root, self.paths[chosen], self.size)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class ImageSet:
    """Images with labels. What enters is checked and converted here, once.

    Attributes:
        images: uint8 (N, H, W, 3), RGB; one channel is repeated. Or `ImageFiles`.
        labels: whole numbers (N,), indices into `names`; kept as int64.
        names: the class names, not empty, each once.
        origin: where the images come from, e.g. ``"cifar10_mini/train"``.
    """

    images: np.ndarray | ImageFiles
    labels: np.ndarray
    names: tuple[str, ...]
    origin: str

    def __post_init__(self) -> None:
        if not isinstance(self.images, ImageFiles):
            object.__setattr__(self, "images", _three_channels(np.asarray(self.images)))
        object.__setattr__(self, "labels", _whole_numbers(np.asarray(self.labels)))
        object.__setattr__(self, "names", _distinct(self.names))
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
        """The number of classes, with or without images."""
        return len(self.names)

    @property
    def ids(self) -> list[str]:
        """A name for each image: its path, or its number with as many digits as the longest."""
        if isinstance(self.images, ImageFiles):
            return [str(path) for path in self.images.paths]
        digits = len(str(max(0, len(self) - 1)))
        return [f"{i:0{digits}d}" for i in range(len(self))]

    def open(self, i: int) -> Image.Image:
        """Image `i` as RGB PIL image; a file that cannot be used is a `ValueError`."""
        return as_pil(self.images[i])

    def class_counts(self) -> np.ndarray:
        """Images a class: int64 (C,)."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def subset(self, indices: np.ndarray) -> ImageSet:
        """The images at `indices`, in that order."""
        return ImageSet(self.images[indices], self.labels[indices], self.names, self.origin)

    def checksum(self) -> str:
        """sha256 of pixels (for files: of size and names) and labels."""
        return checksum(self.images, self.labels)

    def require_same_classes(self, other: ImageSet) -> None:
        """Raise `ValueError` unless both sets have the same class names in the same order."""
        if self.names != other.names:
            differing = [pair for pair in zip(self.names, other.names, strict=False) if pair[0] != pair[1]]
            first = f"class {self.names.index(differing[0][0])} is {differing[0]}" if differing else "one has more"
            raise ValueError(
                f"{self.origin} and {other.origin} must have the same class names in the same order: {first}"
            )


def checksum(images: np.ndarray | ImageFiles, labels: np.ndarray) -> str:
    """sha256 of pixels (for files: of size and names) and labels."""
    if isinstance(images, ImageFiles):
        content = "\n".join([str(images.size), *images.paths.tolist()]).encode(errors="surrogateescape")
        digest = hashlib.sha256(content)
    else:
        digest = hashlib.sha256(np.ascontiguousarray(images))
    digest.update(np.ascontiguousarray(labels, dtype="<i8"))
    return digest.hexdigest()


def _three_channels(images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8 and images.ndim == 3:
        images = images[..., None]
    if images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 1:
        return np.repeat(images, 3, axis=3)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 (N, H, W, 3); these are {images.dtype} of shape {images.shape}")
    return images


def _whole_numbers(labels: np.ndarray) -> np.ndarray:
    if labels.dtype.kind not in "iu" and len(labels):
        raise ValueError(f"labels must be whole numbers; these are {labels.dtype}, such as {labels.flat[0]!r}")
    if len(labels) and labels.max() > 2**62:
        raise ValueError(f"labels must be small whole numbers; the largest is {labels.max()}")
    return labels.astype(np.int64, copy=False)


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    cleaned = tuple(" ".join(str(name).split()) for name in names)
    if (
        repeated := sorted({name for name in cleaned if cleaned.count(name) > 1})
        if len(set(cleaned)) < len(cleaned)
        else []
    ):
        raise ValueError(f"each class name must stand once; {repeated[0]!r} stands {cleaned.count(repeated[0])} times")
    if "" in cleaned:
        raise ValueError(f"class names must not be empty; number {cleaned.index('')} of {len(cleaned)} is")
    return cleaned
