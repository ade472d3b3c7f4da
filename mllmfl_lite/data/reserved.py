"""A world without overlap at CIFAR-10's full size: the server's pool and the clients' images share none."""

from __future__ import annotations

import numpy as np

from mllmfl_lite.data.cifar import load_cifar
from mllmfl_lite.data.images import ImageFiles, ImageSet
from mllmfl_lite.data.longtail import balanced_subset
from mllmfl_lite.repro import numpy_generator

RESERVED_POOL = "reserved"  # the name of this pool in a configuration
RESERVED = 500  # training images of each CIFAR-10 class that the server keeps, the same for every seed


def for_clients(train: ImageSet) -> np.ndarray:
    """Rows of CIFAR-10's training part that clients may hold, rising: all that are not reserved."""
    return np.setdiff1d(np.arange(len(train)), _reserved(train))


def _reserved(train: ImageSet) -> np.ndarray:
    return balanced_subset(train.labels, train.num_classes, RESERVED * train.num_classes, seed=0)


def reserved_pool() -> ImageSet:
    """The reserved images and CIFAR-100's training images, less those that are also in CIFAR-10's test part.

    Of the first 10,000, every second one is reserved; the others follow. Labels (0-9, 10-109) are for measuring only.
    """
    train, other, test = load_cifar("cifar10", "train"), load_cifar("cifar100", "train"), load_cifar("cifar10", "test")
    rng, known = numpy_generator(0, "reserved pool"), set(fingerprints(test))
    rows = rng.permutation(_reserved(train))
    others = rng.permutation([i for i, pixels in enumerate(fingerprints(other)) if pixels not in known])
    mixed = np.stack([np.arange(len(rows)), len(rows) + np.arange(len(rows))], 1).ravel()
    order = np.concatenate([mixed, np.arange(2 * len(rows), len(rows) + len(others))])
    images = np.concatenate([train.images[rows], other.images[others]])[order]
    labels = np.concatenate([train.labels[rows], other.labels[others] + train.num_classes])[order]
    return ImageSet(images, labels, train.names + other.names, "cifar10/reserved + cifar100/train")


def fingerprints(data: ImageSet) -> list[bytes]:
    """Each image's pixels; equal for equal images only. Images in files have none."""
    return [] if isinstance(data.images, ImageFiles) else [image.tobytes() for image in data.images]


def overlap(**sets: ImageSet) -> dict[str, int]:
    """How many images two sets share, for each pair of named sets; images in files are not compared."""
    prints = {name: set(fingerprints(data)) for name, data in sets.items()}
    names = list(sets)
    return {f"{a} and {b}": len(prints[a] & prints[b]) for i, a in enumerate(names) for b in names[i + 1 :]}
