"""Which open images each step may use. Labels are dropped here: no later step can read one."""

import numpy as np

from mllmfl_lite.data.images import UNLABELLED, ImageSet
from mllmfl_lite.data.reserved import reserved_pool

STAGE1, READER, HELD_OUT = 6144, 5000, 1000


def open_pools(stage1: int = STAGE1, reader: int = READER, held_out: int = HELD_OUT) -> dict[str, ImageSet]:
    """Images of CIFAR-100's training part for ``stage1``, ``reader`` and ``held_out``: disjoint, without labels.

    They keep the order of `reserved_pool`, less its CIFAR-10 images: clients of the laptop world may hold those.
    """
    return split_pool(reserved_pool(), {"stage1": stage1, "reader": reader, "held_out": held_out})


def split_pool(pool: ImageSet, sizes: dict[str, int]) -> dict[str, ImageSet]:
    """Disjoint parts of a pool's images that are not of the first ten classes; the first part from the front."""
    rows = np.flatnonzero(pool.labels >= 10)
    if sum(sizes.values()) > len(rows):
        raise ValueError(
            f"{sum(sizes.values())} images are asked for, the pool has {len(rows)} of other classes; ask for fewer"
        )
    (first, front), *others = sizes.items()
    cuts = {first: rows[:front]}
    end = len(rows)
    for name, size in others[::-1]:
        cuts[name] = rows[end - size : end]
        end -= size
    return {name: without_labels(pool, cuts[name], name) for name in sizes}


def without_labels(pool: ImageSet, rows: np.ndarray, name: str) -> ImageSet:
    """The images at `rows`, all of one class, ``unlabelled``."""
    return ImageSet(pool.images[rows], np.zeros(len(rows), np.int64), UNLABELLED, f"real/{name}")
