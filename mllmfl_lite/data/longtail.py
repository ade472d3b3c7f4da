"""Long tails, balanced subsets and class groups: pure functions of labels and a seed."""

import numpy as np

from mllmfl_lite.repro import numpy_generator


def long_tail_counts(num_classes: int, max_per_class: int, imbalance_factor: float) -> list[int]:
    """Images a class in a long tail: ``int(max_per_class * (1 / imbalance_factor) ** (c / (num_classes - 1)))``.

    The exponential profile of the CIFAR-LT benchmarks (Cao et al., 2019): class 0 has the most images, the last class
    the fewest; their ratio is the imbalance factor.
    """
    if num_classes < 1 or max_per_class < 1:
        raise ValueError(f"a long tail needs a class and an image; got {num_classes} classes of {max_per_class} images")
    if not imbalance_factor >= 1:
        hint = f". Did you mean {1 / imbalance_factor:g}?" if imbalance_factor > 0 else ""
        raise ValueError(f"imbalance_factor is largest over smallest class, at least 1; got {imbalance_factor}{hint}")
    steps = max(num_classes - 1, 1)
    return [int(max_per_class * (1 / imbalance_factor) ** (c / steps)) for c in range(num_classes)]


def long_tail_subset(labels: np.ndarray, num_classes: int, imbalance_factor: float, seed: int) -> np.ndarray:
    """Indices, rising, of a random subset with `long_tail_counts` images of each class: int64 (n,).

    Class 0 keeps as many images as the smallest class has, so a balanced set keeps all of it.
    """
    available = np.bincount(labels, minlength=num_classes)
    if available.min() == 0:
        empty = np.flatnonzero(available == 0)[:10].tolist()
        raise ValueError(f"every class needs an image; num_classes is {num_classes}, and classes {empty} have none")
    counts = long_tail_counts(num_classes, int(available.min()), imbalance_factor)
    if counts[-1] == 0:
        problem = f"imbalance_factor {imbalance_factor} leaves the last class without an image"
        raise ValueError(f"{problem}: the first has {counts[0]}; use at most {counts[0]}")
    return _draw(labels, counts, numpy_generator(seed, "long tail"))


def balanced_subset(labels: np.ndarray, num_classes: int, total: int, seed: int) -> np.ndarray:
    """Indices, rising, of `total` random images, as many of each class (one more of the first): int64 (n,)."""
    counts = [total // num_classes + (c < total % num_classes) for c in range(num_classes)]
    smallest = np.bincount(labels, minlength=num_classes).min()
    if smallest < max(counts):
        raise ValueError(f"{total} images need {max(counts)} of each class; the smallest class has {smallest}")
    return _draw(labels, counts, numpy_generator(seed, "balanced"))


def few_labels(labels: np.ndarray, num_classes: int, share: float, seed: int) -> np.ndarray:
    """Indices, rising, of a share in (0, 1] of all images, as many of each class, at least one: int64 (n,)."""
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1]; got {share}")
    total = round(share * len(labels))
    if total < num_classes:
        raise ValueError(f"a share of {share} is {total}, less than one for each of {num_classes} classes")
    return balanced_subset(labels, num_classes, total, seed)


def _draw(labels: np.ndarray, counts: list[int], rng: np.random.Generator) -> np.ndarray:
    kept = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in enumerate(counts)]
    return np.sort(np.concatenate(kept))


def shot_groups(counts: np.ndarray) -> dict[str, list[int]]:
    """Classes of more than 100 training images ("many"), of 20 to 100 ("medium") and of fewer ("few").

    The groups of ImageNet-LT (Liu et al., 2019). A group may be empty.
    """
    counts = np.asarray(counts)
    groups = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
    return {name: np.flatnonzero(members).tolist() for name, members in groups.items()}


def rank_thirds(counts: np.ndarray) -> dict[str, list[int]]:
    """Classes in three groups by rank, most training images first ("head", "middle", "tail"); ties keep class order.

    If C is no multiple of three, the first groups take one class more (10 classes: 4, 3, 3).
    """
    thirds = np.array_split(np.argsort(-np.asarray(counts), kind="stable"), 3)
    return {name: sorted(third.tolist()) for name, third in zip(("head", "middle", "tail"), thirds, strict=True)}


def class_groups(train_counts: np.ndarray) -> dict[str, list[int]]:
    """Every group that is reported, from the training images a class: `shot_groups` and `rank_thirds`."""
    return {**shot_groups(train_counts), **rank_thirds(train_counts)}
