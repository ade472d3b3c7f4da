"""Client splits: pure functions of labels and a seed. A split is a list with one array of indices a client."""

from collections.abc import Callable

import numpy as np

from mllmfl_lite.repro import numpy_generator

Split = list[np.ndarray]


def split_clients(kind: str, labels: np.ndarray, num_clients: int, alpha: float, seed: int) -> Split:
    """The split of that name, one of `SPLITS`; `alpha` is for the Dirichlet kinds."""
    if kind not in SPLITS:
        raise ValueError(f"no split named {kind!r}; there are {', '.join(SPLITS)}")
    concentration = {"alpha": alpha} if kind.startswith("dirichlet") else {}
    return SPLITS[kind](labels, num_clients, seed=seed, **concentration)


def iid(labels: np.ndarray, num_clients: int, seed: int) -> Split:
    """Give every client a random share of all images, of equal size give or take one."""
    _check_clients(labels, num_clients)
    order = numpy_generator(seed, "iid").permutation(len(labels))
    return [np.sort(own) for own in np.array_split(order, num_clients)]


def one_class_per_client(labels: np.ndarray, num_clients: int, seed: int) -> Split:
    """Give client k images of class ``k % C`` only; clients of a class share it. For teaching.

    Fewer clients than classes, or more clients on a class than it has images, are a `ValueError`.
    """
    classes = np.unique(labels)
    if num_clients < len(classes):
        raise ValueError(f"one class a client needs a client for each of the {len(classes)} classes; got {num_clients}")
    rng = numpy_generator(seed, "one class")
    split: Split = [np.empty(0, np.int64)] * num_clients
    for position, c in enumerate(classes):
        indices, holders = rng.permutation(np.flatnonzero(labels == c)), split[position :: len(classes)]
        split[position :: len(classes)] = [np.sort(own) for own in np.array_split(indices, len(holders))]
    check_split(split)
    return split


def dirichlet(
    labels: np.ndarray, num_clients: int, alpha: float, seed: int, min_per_client: int = 1, max_draws: int = 1000
) -> Split:
    """Deal each class to the clients in proportions drawn from Dirichlet(alpha) (Yurochkin et al., 2019).

    Small `alpha`: a client sees few classes, and clients differ in size. Large `alpha`: close to IID. The whole draw
    is repeated until every client holds `min_per_client` images; after `max_draws` that is a `ValueError`.
    """
    _check_clients(labels, num_clients, min_per_client)
    rng = numpy_generator(seed, "dirichlet")
    for _ in range(max_draws):
        split = _deal(labels, num_clients, alpha, rng)
        if min(map(len, split)) >= min_per_client:
            return [np.sort(own) for own in split]
    raise ValueError(
        f"{max_draws} draws of Dirichlet({alpha}) never gave each of {num_clients} clients {min_per_client} of the "
        f"{len(labels)} images; use a larger alpha, fewer clients, or dirichlet_equal"
    )


def dirichlet_equal(labels: np.ndarray, num_clients: int, alpha: float, seed: int, capped: bool = True) -> Split:
    """The split of CReFF and CLIP2FL: a capped Dirichlet draw whose lists are joined and cut into equal runs.

    Capped: classes are dealt in order, and a client that has reached the mean size takes no more. So the last classes
    fall to few clients. ``capped=False`` cuts only.
    """
    _check_clients(labels, num_clients)
    joined = np.concatenate(_deal(labels, num_clients, alpha, numpy_generator(seed, "dirichlet"), capped))
    return [np.sort(own) for own in np.array_split(joined, num_clients)]


def _deal(labels: np.ndarray, num_clients: int, alpha: float, rng: np.random.Generator, capped: bool = False) -> Split:
    """One Dirichlet draw: client lists in class order, empty ones included."""
    if not 0 < alpha <= 1e300:  # above, draws overflow
        raise ValueError(f"alpha, the concentration of the Dirichlet, must be positive, at most 1e300; got {alpha}")
    hands: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    sizes = np.zeros(num_clients, np.int64)
    for c in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == c))
        shares = rng.dirichlet(np.full(num_clients, float(alpha)))
        if capped:
            still_open = sizes < len(labels) / num_clients
            kept = np.where(still_open, shares, 0.0)
            shares = kept / kept.sum() if kept.sum() > 0 else still_open / still_open.sum()
        cuts = (np.cumsum(shares)[:-1] * len(indices)).astype(np.int64)
        for k, share in enumerate(np.split(indices, cuts)):
            hands[k].append(share)
            sizes[k] += len(share)
    return [np.concatenate(hand) for hand in hands]


def check_split(split: Split) -> None:
    """Raise `ValueError` if there is no client, or a client without an image (named)."""
    empty = [k for k, indices in enumerate(split) if len(indices) == 0]
    if empty or not split:
        raise ValueError(
            f"every client needs at least one image; clients {empty} of {len(split)} have none. "
            "Use fewer clients or a larger alpha, or drop them before the run"
        )


def _check_clients(labels: np.ndarray, num_clients: int, min_per_client: int = 1) -> None:
    most = len(labels) // max(min_per_client, 1)
    if not 1 <= num_clients <= most:
        raise ValueError(
            f"{num_clients} clients with at least {min_per_client} images each cannot share {len(labels)} images; "
            f"use 1 to {most} clients"
        )


SPLITS: dict[str, Callable[..., Split]] = {
    split.__name__: split for split in (iid, dirichlet, dirichlet_equal, one_class_per_client)
}
