"""The class-balanced server set of stage 3, drawn from the pool by a teacher's confidence."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from mllmfl_lite.data.images import UNLABELLED, ImageSet


@dataclass(frozen=True)
class ServerSet:
    """The balanced set."""

    images: ImageSet  #: the chosen images; their labels are the teacher's first choice
    probabilities: Tensor  #: the teacher's distribution q for each, float32 (n, C)
    rows: np.ndarray  #: their indices in the pool, int64 (n,)
    short: dict[str, int] = field(default_factory=dict)  #: how many images there are, for each class with too few

    def __len__(self) -> int:
        return len(self.rows)


def draw_server_set(pool: ImageSet, probabilities: Tensor, names: Sequence[str], per_class: int) -> ServerSet:
    """Take the teacher's `per_class` most confident images of each class; the pool's own labels are not used.

    An image stands for one class, the teacher's first choice; for none if classes share the first place. That the set
    is drawn so is our reading of the paper. `probabilities` (N, C) are the teacher's over the clients' class names.

    Raises:
        ValueError: shapes that do not fit, rows that are no distributions, or no image that stands for a class.
    """
    probabilities = torch.as_tensor(probabilities).detach().float().cpu()
    if per_class < 1:
        raise ValueError(f"per_class is the images of each class, at least 1; got {per_class}")
    if probabilities.shape != (len(pool), len(names)) or not len(pool):
        wanted = f"({len(pool)}, {len(names)}), with at least one image"
        raise ValueError(f"probabilities must be (images, classes) = {wanted}; they are {tuple(probabilities.shape)}")
    if not ((probabilities >= 0).all() and ((probabilities.sum(1) - 1).abs() < 1e-3).all()):  # NaN is neither
        raise ValueError("each row of probabilities must be a distribution; take them from class_probabilities")
    confidence, label = (values.numpy() for values in probabilities.max(1))
    decided = (probabilities == probabilities.amax(1, keepdim=True)).sum(1).numpy() == 1
    if not decided.any():
        wanted = ", ".join(names)[:200]
        raise ValueError(f"the teacher prefers no class for any of the {len(pool)} images; find images of {wanted}")
    order = np.argsort(-confidence, kind="stable")
    by_class = [order[(label[order] == c) & decided[order]][:per_class] for c in range(len(names))]
    short = {name: len(rows) for name, rows in zip(names, by_class, strict=True) if len(rows) < per_class}
    if short:
        listed = ", ".join(f"{name} ({count})" for name, count in short.items())
        few = f"fewer than {per_class} images of {len(short)} of {len(names)} classes"
        warnings.warn(f"the pool has {few}: {listed}; use a larger pool or fewer images a class", stacklevel=2)
    rows = np.sort(np.concatenate(by_class))
    origin = f"{pool.origin}, chosen"
    images = replace(pool.subset(rows), labels=label[rows], names=names, origin=origin)  # type: ignore[arg-type]
    return ServerSet(images, probabilities[torch.from_numpy(rows)], rows, short)


def describe(server_set: ServerSet, pool: ImageSet) -> dict:
    """Images a class, classes that are short, and how often the teacher's label is the pool's own.

    An image of a class that the pool does not name counts as wrong. `labels_right` is None for an unlabelled pool.
    """
    names, labels = server_set.images.names, server_set.images.labels
    right = [pool.names[pool.labels[row]] == names[c] for row, c in zip(server_set.rows, labels, strict=True)]
    return {
        "images": len(server_set),
        "per_class": server_set.images.class_counts().tolist(),
        "short": server_set.short,
        "labels_right": None if pool.names == UNLABELLED else sum(right) / max(1, len(right)),
    }
