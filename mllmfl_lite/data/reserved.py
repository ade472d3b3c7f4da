"""A world without overlap at CIFAR-10's full size: the server's pool and the clients' images share none."""

import itertools

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from mllmfl_lite.data.cifar import load_cifar
from mllmfl_lite.data.images import ImageFiles, ImageSet
from mllmfl_lite.data.longtail import balanced_subset
from mllmfl_lite.repro import numpy_generator

RESERVED_POOL = "reserved"  # the name of this pool in a configuration
SAME = 2.5  # grey levels, root mean square
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
    """Each image's pixels."""
    return [image.tobytes() for image in data.images]


def overlap(**sets: ImageSet) -> dict[str, int]:
    """For each pair of named sets, how many images of the first are also in the second; files are not compared.

    Two images are one if the means of their 4 x 4 blocks differ by less than `SAME`: the bundled images were encoded
    with loss. On CIFAR such copies differ by at most 1.3, other pairs by at least 4.3.
    """
    means = {name: _block_means(data) for name, data in sets.items() if not isinstance(data.images, ImageFiles)}
    return {f"{a} and {b}": _near(means[a], means[b]) for a, b in itertools.combinations(means, 2)}


def _block_means(data: ImageSet) -> torch.Tensor:
    pixels = torch.tensor(data.images).permute(0, 3, 1, 2).float()
    return avg_pool2d(pixels, 4).flatten(1)


def _near(first: torch.Tensor, second: torch.Tensor) -> int:
    if first.shape[1] != second.shape[1]:
        return 0
    distances = [torch.cdist(part, second).min(1).values for part in first.split(1000)]
    return int((torch.cat(distances) < SAME * first.shape[1] ** 0.5).sum())
