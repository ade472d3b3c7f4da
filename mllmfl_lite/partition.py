"""Long tails, client splits and class groups: pure functions of labels and a seed.

A split is a list with one int64 array of indices a client. Nothing here looks at a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mllmfl_lite.repro import numpy_generator

Split = list[np.ndarray]

# ---------------------------------------------------------------------------------------------------- the long tail


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


# ---------------------------------------------------------------------------------------------------- client splits


def iid(labels: np.ndarray, num_clients: int, seed: int) -> Split:
    """Every client a random share of all images: equal sizes, the global class mix."""
    _check_clients(labels, num_clients)
    return _sorted(np.array_split(numpy_generator(seed, "iid").permutation(len(labels)), num_clients))


def one_class_per_client(labels: np.ndarray, num_clients: int, seed: int) -> Split:
    """The extreme of skew, for teaching: client k holds images of class ``k % C`` only; clients of a class share it.

    Raises:
        ValueError: fewer clients than classes (images would be lost), or more clients on a class than it has images.
    """
    classes = np.unique(labels)
    if num_clients < len(classes):
        raise ValueError(
            f"one class a client needs a client for each of the {len(classes)} classes; got {num_clients} clients"
        )
    rng = numpy_generator(seed, "one class")
    split: Split = [np.empty(0, np.int64)] * num_clients
    for position, c in enumerate(classes):
        holders = range(position, num_clients, len(classes))
        own = rng.permutation(np.flatnonzero(labels == c))
        for client, share in zip(holders, np.array_split(own, len(holders)), strict=True):
            split[client] = share
    check_split(split)
    return _sorted(split)


def dirichlet(
    labels: np.ndarray, num_clients: int, alpha: float, seed: int, min_per_client: int = 1, max_draws: int = 1000
) -> Split:
    """Each class is dealt to the clients in proportions drawn from Dirichlet(alpha) (Yurochkin et al., 2019).

    Small `alpha`: a client sees few classes, and clients differ in size. Large `alpha`: close to IID. The whole draw
    is repeated until every client holds `min_per_client` images.

    Raises:
        ValueError: `alpha` not positive, more clients than images, or no draw that fills every client.
    """
    _check_clients(labels, num_clients, min_per_client)
    rng = numpy_generator(seed, "dirichlet")
    for _ in range(max_draws):
        split = _deal(labels, num_clients, alpha, rng)
        if min(map(len, split)) >= min_per_client:
            return _sorted(split)
    raise ValueError(
        f"{max_draws} draws of Dirichlet({alpha}) never gave each of {num_clients} clients {min_per_client} of the "
        f"{len(labels)} images; use a larger alpha, fewer clients, or dirichlet_equal"
    )


def dirichlet_equal(labels: np.ndarray, num_clients: int, alpha: float, seed: int, capped: bool = True) -> Split:
    """The baselines' split: a capped Dirichlet draw whose lists are joined and cut again into equal runs.

    Capped: classes are dealt in order, head first, and a client that has reached the mean size takes no more. Then
    all lists are joined and cut into runs of equal length, give or take one. Sizes are equal, and the tail, dealt
    last, falls to few clients. CReFF and CLIP2FL partition so; the chapter on long-tailed clients measures what each
    of the two steps does, with ``capped=False`` for the second alone.

    Raises:
        ValueError: `alpha` not positive, or more clients than images.
    """
    _check_clients(labels, num_clients)
    joined = np.concatenate(_deal(labels, num_clients, alpha, numpy_generator(seed, "dirichlet"), capped))
    return _sorted(np.array_split(joined, num_clients))


def _deal(labels: np.ndarray, num_clients: int, alpha: float, rng: np.random.Generator, capped: bool = False) -> Split:
    """One Dirichlet draw: client lists in class order, empty ones included."""
    if not alpha > 0:
        raise ValueError(f"alpha, the concentration of the Dirichlet, must be positive; got {alpha}")
    hands: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    sizes = np.zeros(num_clients, np.int64)
    for c in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == c))
        shares = rng.dirichlet(np.full(num_clients, float(alpha)))
        if capped:
            shares = _share_among(sizes < len(labels) / num_clients, shares)
        cuts = (np.cumsum(shares)[:-1] * len(own)).astype(np.int64)
        for k, share in enumerate(np.split(own, cuts)):
            hands[k].append(share)
            sizes[k] += len(share)
    return [np.concatenate(hand) for hand in hands]


def _share_among(open_: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """`shares` restricted to the clients still open, summing to 1; even shares where the draw left them nothing."""
    kept = np.where(open_, shares, 0.0)
    return kept / kept.sum() if kept.sum() > 0 else open_ / open_.sum()


SPLITS = ("iid", "dirichlet", "dirichlet_equal", "one_class_per_client")


def split_clients(kind: str, labels: np.ndarray, num_clients: int, alpha: float, seed: int) -> Split:
    """The split named `kind`, one of `SPLITS`; `alpha` is used by the Dirichlet kinds only."""
    if kind not in SPLITS:
        raise ValueError(f"no split named {kind!r}; there are {', '.join(SPLITS)}")
    if kind.startswith("dirichlet"):
        return {"dirichlet": dirichlet, "dirichlet_equal": dirichlet_equal}[kind](labels, num_clients, alpha, seed)
    return {"iid": iid, "one_class_per_client": one_class_per_client}[kind](labels, num_clients, seed)


def check_split(split: Split) -> None:
    """Raise `ValueError` if there is no client, or a client without an image (named)."""
    empty = [k for k, own in enumerate(split) if len(own) == 0]
    if empty or not split:
        raise ValueError(
            f"every client needs at least one image; clients {empty} of {len(split)} have none. "
            "Use fewer clients or a larger alpha, or drop them before the run"
        )


def _check_clients(labels: np.ndarray, num_clients: int, min_per_client: int = 1) -> None:
    if not 1 <= num_clients * max(min_per_client, 1) <= len(labels):
        raise ValueError(
            f"{num_clients} clients with at least {min_per_client} images each cannot share {len(labels)} images; "
            f"use 1 to {len(labels) // max(min_per_client, 1)} clients"
        )


def _count_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(f"labels must lie in 0..{num_classes - 1}; these run from {labels.min()} to {labels.max()}")
    return np.bincount(labels, minlength=num_classes)


def _sorted(split: Split) -> Split:
    return [np.sort(own) for own in split]


# ---------------------------------------------------------------------------------------------------- class groups


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


# ---------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class SplitFigures:
    """The figures that describe a split.

    Attributes:
        counts: images of each class at each client, int64, shape (K, C).
        sizes: images at each client, shape (K,).
        classes_per_client: classes of which a client holds an image, shape (K,).
        clients_per_class: clients that hold an image of the class, shape (C,).
        skew: total-variation distance between each client's class mix and the mix of all images, shape (K,);
            0 = the same mix, towards 1 = nothing in common.
        effective_classes: exponential of the entropy of each client's class mix, shape (K,): 1 = one class only.
    """

    counts: np.ndarray
    sizes: np.ndarray
    classes_per_client: np.ndarray
    clients_per_class: np.ndarray
    skew: np.ndarray
    effective_classes: np.ndarray


def describe_split(labels: np.ndarray, split: Split, num_classes: int) -> SplitFigures:
    """Count and measure a split; see `SplitFigures`.

    Raises:
        ValueError: an empty client, or labels outside the classes.
    """
    check_split(split)
    counts = np.stack([_count_labels(labels[own], num_classes) for own in split])
    mix = counts / counts.sum(1, keepdims=True)
    overall = counts.sum(0) / counts.sum()
    entropy = -(mix * np.log(mix, where=mix > 0, out=np.zeros_like(mix))).sum(1)
    return SplitFigures(
        counts=counts,
        sizes=counts.sum(1),
        classes_per_client=(counts > 0).sum(1),
        clients_per_class=(counts > 0).sum(0),
        skew=np.abs(mix - overall).sum(1) / 2,
        effective_classes=np.exp(entropy),
    )
