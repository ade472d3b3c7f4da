"""Labelled image sets, in memory or in files."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllmfl_lite.data.pictures import as_pil, open_picture

UNLABELLED = ("unlabelled",)  # the class names of a set without labels


@dataclass(frozen=True)
class ImageFiles:
    """Images in files at `paths` (N,) below the folder `root`, opened when they are needed.

    Training and testing see them at `size` pixels a side.
    """

    root: str | Path
    paths: np.ndarray
    size: int = 224

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", np.asarray(self.paths, dtype=object))  # no padding to the longest name
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel; got {self.size}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, chosen: int | slice | np.ndarray) -> Any:
        """The image at a number (PIL, RGB), or the `ImageFiles` at a slice or an index array."""
        if isinstance(chosen, (int, np.integer)):
            return open_picture(Path(self.root) / self.paths[chosen], self.paths[chosen])
        return ImageFiles(self.root, self.paths[chosen], self.size)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class ImageSet:
    """Images with labels. What enters is checked and converted here, once."""

    images: np.ndarray | ImageFiles  #: uint8 (N, H, W, 3), RGB, contiguous; one channel is repeated
    labels: np.ndarray  #: whole numbers (N,), indices into `names`; kept as int64
    names: tuple[str, ...]  #: the class names, not empty, each once; blanks around them are removed
    origin: str  #: where the images come from, e.g. ``"cifar10_mini/train"``

    def __post_init__(self) -> None:
        if not isinstance(self.images, ImageFiles):
            object.__setattr__(self, "images", _three_channels(np.asarray(self.images)))
        object.__setattr__(self, "names", _distinct(self.names))
        object.__setattr__(self, "labels", _class_numbers(np.asarray(self.labels), len(self.names)))
        if self.labels.shape != (len(self.images),):
            raise ValueError(f"one label an image: {len(self.images)} images, labels of shape {self.labels.shape}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """The number of classes, with or without images."""
        return len(self.names)

    @property
    def ids(self) -> list[str]:
        """A name for each image, its path or its number with as many digits as the longest."""
        if isinstance(self.images, ImageFiles):
            return self.images.paths.tolist()
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
        content: Any = self.images
        if isinstance(content, ImageFiles):
            content = "\n".join([str(content.size), *content.paths]).encode(errors="surrogateescape")
        digest = hashlib.sha256(content)
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        return digest.hexdigest()

    def require_same_classes(self, other: object) -> None:
        """Raise `ValueError` unless the other set or model has the same class names in the same order.

        A model that does not know its class names passes.
        """
        names, owner = tuple(getattr(other, "names", ())), getattr(other, "origin", "the model")
        if names and names != self.names:
            mine, theirs = next(pair for pair in zip_longest(self.names, names) if pair[0] != pair[1])
            rule = f"{self.origin} and {owner} must have the same class names in the same order"
            raise ValueError(f"{rule}; the first difference is {mine!r} and {theirs!r}")


def _three_channels(images: np.ndarray) -> np.ndarray:
    shaped = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or shaped.ndim != 4 or shaped.shape[3] not in (1, 3) or 0 in shaped.shape[1:]:
        rule = "images must be uint8 of shape (N, H, W, 3) or (N, H, W): move channels to the end, scale to 0..255"
        raise ValueError(f"{rule}; these are {images.dtype} of shape {images.shape}")
    return np.ascontiguousarray(np.repeat(shaped, 3, axis=3) if shaped.shape[3] == 1 else shaped)


def _class_numbers(labels: np.ndarray, num_classes: int) -> np.ndarray:
    if labels.size and labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be whole numbers; these are {labels.dtype}, the first is {labels.flat[0]!r}")
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        rule = f"labels must lie in 0..{num_classes - 1}, one class name each"
        raise ValueError(f"{rule}; these run from {labels.min()} to {labels.max()}")
    return labels.astype(np.int64, copy=False)


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class names must be a sequence of strings; got {names!r:.100}")
    cleaned = [" ".join(unicodedata.normalize("NFC", name).split()) for name in names]
    if "" in cleaned:
        raise ValueError(f"class names must not be empty; number {cleaned.index('')} of {len(cleaned)} is")
    if len(set(cleaned)) < len(cleaned):
        twice = next(name for i, name in enumerate(cleaned) if name in cleaned[:i])
        raise ValueError(f"each class name must stand once; {twice!r} stands {cleaned.count(twice)} times")
    return tuple(cleaned)
