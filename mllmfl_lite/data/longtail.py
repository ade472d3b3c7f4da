"""Long tails, client splits and class groups: pure functions of labels and a seed.

A split is a list with one int64 array of indices a client. Nothing here looks at a pixel.
"""

from __future__ import annotations

import numpy as np

from mllmfl_lite.repro import numpy_generator


def long_tail_counts(num_classes: int, max_per_class: int, imbalance_factor: float) -> list[int]:
    """Images a class in a long tail: ``int(max_per_class * (1 / imbalance_factor) ** (c / (num_classes - 1)))``.

    Class 0 is the head, the last class the end of the tail; their ratio is the imbalance factor. This is the
    exponential profile of the CIFAR-LT benchmarks (Cao et al., 2019).

    Raises:
        ValueError: fewer than one class or image, or an imbalance factor under 1.
    """
    if num_classes < 1 or max_per_class < 1:
        raise ValueError(f"a long tail needs a class and an image; got {num_classes} classes of {max_per_class} images")
    if not imbalance_factor >= 1:
        raise ValueError(
            f"imbalance_factor is head over tail, so at least 1 (1 = balanced); got {imbalance_factor}. "
            f"Did you mean {1 / imbalance_factor:g}?"
            if imbalance_factor > 0
            else f"imbalance_factor is head over tail, so at least 1 (1 = balanced); got {imbalance_factor}"
        )
    steps = max(num_classes - 1, 1)
    return [int(max_per_class * (1 / imbalance_factor) ** (c / steps)) for c in range(num_classes)]


def long_tail_subset(labels: np.ndarray, num_classes: int, imbalance_factor: float, seed: int) -> np.ndarray:
    """Indices of a long-tailed subset: `long_tail_counts` images of each class, drawn at random, in rising order.

    The head keeps as many images as the smallest class has, so a balanced set keeps its whole head.

    Args:
        labels: integers, shape (N,).
        num_classes: C; labels run from 0 to C - 1.
        imbalance_factor: head over tail, at least 1.
        seed: decides which images stay.

    Raises:
        ValueError: a class without labels, labels outside the classes, or a tail that rounds down to no image.
    """
    available = _count_labels(labels, num_classes)
    if available.min() == 0:
        raise ValueError(
            f"every class needs an image; num_classes is {num_classes}, and classes "
            f"{np.flatnonzero(available == 0).tolist()[:10]} have none in these {len(labels)} labels"
        )
    counts = long_tail_counts(num_classes, int(available.min()), imbalance_factor)
    if counts[-1] == 0:
        raise ValueError(
            f"imbalance_factor {imbalance_factor} leaves the last class without an image: the head has "
            f"{counts[0]}; use at most {counts[0]}"
        )
    return _draw(labels, counts, numpy_generator(seed, "long tail"))


def balanced_subset(labels: np.ndarray, num_classes: int, total: int, seed: int) -> np.ndarray:
    """Indices of a class-balanced subset of `total` images (give or take a rounding: the first classes take one more).

    The control of every long-tail experiment: as many images as the long-tailed subset, but the same of each class.

    Raises:
        ValueError: a class has too few images.
    """
    counts = [total // num_classes + (c < total % num_classes) for c in range(num_classes)]
    available = _count_labels(labels, num_classes)
    if (available < counts).any():
        raise ValueError(
            f"{total} images over {num_classes} classes are up to {max(counts)} of each; the smallest class has "
            f"{available.min()}"
        )
    return _draw(labels, counts, numpy_generator(seed, "balanced"))


def _draw(labels: np.ndarray, counts: list[int], rng: np.random.Generator) -> np.ndarray:
    kept = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in enumerate(counts)]
    return np.sort(np.concatenate(kept))


def _count_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(f"labels must lie in 0..{num_classes - 1}; these run from {labels.min()} to {labels.max()}")
    return np.bincount(labels, minlength=num_classes)


def shot_groups(counts: np.ndarray, many: int = 100, few: int = 20) -> dict[str, list[int]]:
    """Class groups by training images: Many (over `many`), Medium (`few` to `many`, both included), Few (under `few`).

    The convention of ImageNet-LT (Liu et al., 2019). A group may be empty: CIFAR-10-LT at imbalance factor 100 has no
    class under 20 images, which is why `rank_thirds` stands beside it.
    """
    counts = np.asarray(counts)
    return {
        "many": np.flatnonzero(counts > many).tolist(),
        "medium": np.flatnonzero((counts >= few) & (counts <= many)).tolist(),
        "few": np.flatnonzero(counts < few).tolist(),
    }


def rank_thirds(counts: np.ndarray) -> dict[str, list[int]]:
    """Class groups by rank: head, middle and tail thirds of the classes, most images first; ties keep class order.

    Where C is no multiple of three the head, then the middle, takes the extra class (10 classes: 4, 3, 3).
    """
    order = np.argsort(-np.asarray(counts), kind="stable")
    head, middle, tail = np.array_split(order, 3)
    return {"head": sorted(head.tolist()), "middle": sorted(middle.tolist()), "tail": sorted(tail.tolist())}


def few_labels(labels: np.ndarray, num_classes: int, share: float, seed: int) -> np.ndarray:
    """The images whose labels may be used: a share of all, as many of each class, int64 (n,).

    Raises:
        ValueError: the share is not in (0, 1], or leaves a class without an image.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1]; got {share}")
    total = round(share * len(labels))
    if total < num_classes:
        raise ValueError(
            f"a share of {share} of {len(labels)} images is {total}, less than one for each of {num_classes} classes"
        )
    return balanced_subset(labels, num_classes, total, seed)


def class_groups(train_counts: np.ndarray) -> dict[str, list[int]]:
    """All the groups we report, from the training images a class: Many, Medium, Few, and head, middle, tail thirds."""
    return {**shot_groups(train_counts), **rank_thirds(train_counts)}
