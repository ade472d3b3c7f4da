"""What the compact model and the frozen vision tower are shown of each image in stage 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.data.images import ImageFiles, ImageSet
from mllmfl_lite.repro import pick_device
from mllmfl_lite.teachers.answers import StoredAnswers
from mllmfl_lite.teachers.llava import MllmTeacher


class Views:
    """Views of a pool's images, in memory or in files.

    `folder` caches the tokens of the MLLM's vision tower; "" computes them each time. Those of images in files are not
    stored: LLaVA-1.5's tokens of 595,000 images are 700 GB. `device`: where the compact model trains.
    """

    def __init__(self, pool: ImageSet, mllm: MllmTeacher, folder: str | Path = "", device: torch.device | str = "cpu"):
        self.pool, self.mllm, self.device = pool, mllm, pick_device(device)
        self._batches = open_batches(pool, self.device)
        stored = folder and not isinstance(pool.images, ImageFiles)
        self._stored = StoredAnswers(mllm, "tokens", pool, folder) if stored else None

    def __len__(self) -> int:
        return len(self.pool)

    def compact(self, indices: np.ndarray, generator: torch.Generator | None) -> Tensor:
        """For the compact model: float (B, 3, H, W), normalised; cropped and flipped if there is a generator."""
        rows = torch.from_numpy(indices).to(self.device)
        return self._batches.augmented(rows, generator) if generator else self._batches.plain(rows)

    def tokens(self, indices: np.ndarray) -> Tensor:
        """For the MLLM's projector: float (B, P, D)."""
        if self._stored:
            return torch.from_numpy(self._stored[indices])
        return self.mllm.tokens(cast(Sequence, self.pool.subset(indices).images))
