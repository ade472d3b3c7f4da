"""Stage 3, global alignment: a class-balanced server set chosen by the teacher, and finetuning on it::

    told    = teacher.class_probabilities(web.images, names)
    chosen  = draw_server_set(web, told, names, per_class=100)
    aligned = align(model, chosen, AlignSettings())

The loss is ``CE(y, p) + beta * KL(q || p)`` (the paper's): p is the model's softmax, q the teacher's distribution over
the class names, y the teacher's own first choice. No client's image and no human label enters. That the set is drawn
from open web images by the teacher's confidence is our reading.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.repro import torch_generator


class PoolLabels:
    """The control of `AlignSettings.teacher`: it reads the pool's own labels, and errs as often as it is told to.

    Args:
        pool: open images with labels.
        wrong: how often it names another class, drawn evenly from the others, in [0, 1].
        seed: decides where.
    """

    def __init__(self, pool: ImageSet, wrong: float = 0.0, seed: int = 0):
        self.pool, self.wrong, self.seed = pool, wrong, seed
        self.identity = f"labels-wrong{wrong:g}-seed{seed}" if wrong else "labels"

    def class_probabilities(self, images: np.ndarray, names: Sequence[str]) -> Tensor:
        """One for the class that it names; the same for all where the label is none of the names, float32 (N, C)."""
        label = torch.tensor([names.index(n) if n in names else -1 for n in np.take(self.pool.names, self.pool.labels)])
        generator = torch_generator(self.seed, "wrong labels")
        errs = torch.rand(len(label), generator=generator) < self.wrong
        other = (label + torch.randint(1, len(names), label.shape, generator=generator)) % len(names)
        named = torch.where(errs, other, label).clamp(min=0)
        return torch.where(label[:, None] < 0, 1 / len(names), one_hot(named, len(names)).float())
