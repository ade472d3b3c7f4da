"""A control in a teacher's place: the pool's own labels, which no server has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mllmfl_lite.data.images import ImageSet


class PoolLabels:
    """Answers with the labels of a pool.

    Args:
        pool: open images with labels.
    """

    identity = "labels"

    def __init__(self, pool: ImageSet):
        self.pool = pool

    def images_at_once(self, names: Sequence[str]) -> int:
        """All of them."""
        return len(self.pool)

    def class_probabilities(self, images: np.ndarray, names: Sequence[str]) -> Tensor:
        """One for the label's name, the same for all names if it is none of them: float32 (N, C)."""
        label = torch.tensor([names.index(n) if n in names else -1 for n in np.take(self.pool.names, self.pool.labels)])
        return torch.where(label[:, None] < 0, 1 / len(names), one_hot(label.clamp(min=0), len(names)).float())
