"""Stage 3, global alignment: a class-balanced server set chosen by the teacher, and finetuning on it::

    told    = teacher.class_probabilities(web.images, names)
    chosen  = draw_server_set(web, told, names, per_class=100)
    aligned = align(model, chosen, AlignSettings())

The loss is ``CE(y, p) + beta * KL(q || p)`` (the paper's): p is the model's softmax, q the teacher's distribution over
the class names, y the teacher's own first choice. No client's image and no human label enters. That the set is drawn
from open web images by the teacher's confidence is our reading.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mllmfl_lite.data.images import UNLABELLED, ImageSet


class AlignError(ValueError):
    """Alignment cannot start: no image was chosen, or teacher and images do not fit; the message says how."""


@dataclass(frozen=True)
class ServerSet:
    """The balanced set.

    Attributes:
        images: the chosen images; their labels are the teacher's first choice.
        told: the teacher's distribution q for each, float32 (n, C).
        rows: which images of the pool they are, int64 (n,).
        short: for each class with fewer images than were asked for, how many there are.
    """

    images: ImageSet
    told: Tensor
    rows: np.ndarray
    short: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


def draw_server_set(
    pool: ImageSet, told: Tensor, names: Sequence[str], per_class: int, without: Sequence[str] = ()
) -> ServerSet:
    """The teacher's `per_class` most confident images of each class. The pool's own labels are not looked at.

    An image can stand for one class only, the teacher's first choice. Classes for which the pool has too few are named
    in a warning and in `ServerSet.short`.

    Args:
        pool: open images on the server.
        told: the teacher's distribution over `names` for each, float (N, C), rows summing to 1.
        names: the clients' class names.
        per_class: images a class, n.
        without: classes to leave out.

    Raises:
        AlignError: shapes that do not fit, rows that are no distributions, n under 1, or an unknown class to leave out.
    """
    if told.shape != (len(pool), len(names)) or not len(pool):
        raise AlignError(f"told must be (images, classes) = ({len(pool)}, {len(names)}); it is {tuple(told.shape)}")
    if not (torch.isfinite(told).all() and (told >= 0).all() and (told.sum(1) - 1).abs().max() < 1e-3):
        raise AlignError("each row of told must be a distribution; take them from a teacher's class_probabilities")
    if per_class < 1:
        raise AlignError(f"per_class must be at least 1; got {per_class}")
    if unknown := [name for name in without if name not in names]:
        raise AlignError(f"there is no class {unknown[0]!r} to leave out; there are {', '.join(names)}")
    sure, label = (values.numpy() for values in told.max(1))
    order = np.argsort(-sure, kind="stable")
    wanted = [0 if name in without else per_class for name in names]
    by_class = [order[label[order] == c][:n] for c, n in enumerate(wanted)]
    short = {name: len(own) for name, own in zip(names, by_class, strict=True) if len(own) < per_class}
    if short:
        listed = ", ".join(f"{name} ({count})" for name, count in short.items())
        warnings.warn(
            f"the pool has fewer than {per_class} images of {len(short)} of {len(names)} classes: {listed}; the set is "
            "not balanced there. Take a larger pool or fewer images a class",
            stacklevel=2,
        )
    rows = np.sort(np.concatenate(by_class))
    images = ImageSet(pool.images[rows], label[rows].astype(np.int64), tuple(names), f"{pool.origin}, chosen")
    return ServerSet(images, told[torch.from_numpy(rows)], rows, short)


def evened(told: Tensor, over: Tensor) -> Tensor:
    """Answers divided by the mean answer and normalised: what is left when no class is favoured on the whole.

    Args:
        told: distributions (n, C).
        over: the distributions to take the mean of (N, C), e.g. those on the whole pool.
    """
    even = told / over.mean(0).clamp(min=1e-12)
    return even / even.sum(1, keepdim=True)


def describe(chosen: ServerSet, pool: ImageSet) -> dict:
    """Images a class, classes that came short, and how often the teacher's choice is the pool's own label.

    Those labels measure only; a class that the pool has no label for counts as wrong. None for an unlabelled pool.
    """
    names = chosen.images.names
    right = [
        pool.names[pool.labels[row]] == names[label]
        for row, label in zip(chosen.rows, chosen.images.labels, strict=True)
    ]
    return {
        "images": len(chosen),
        "per_class": chosen.images.class_counts().tolist(),
        "short": chosen.short,
        "labels_right": None if pool.names == UNLABELLED else sum(right) / max(1, len(right)),
    }
