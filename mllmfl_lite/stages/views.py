"""Stage 1b, Dynamic Weighted Pretraining: a compact model takes a frozen CLIP's place in front of a frozen LLM::

    mllm  = load_mllm()
    texts = read_texts(bundled_annotations(), array_source(web).ids, mllm)
    views = ArrayViews(web, mllm, folder="runs/features")
    done  = pretrain(build_model("resnet8", 10, width=16), mllm, views, texts, PretrainSettings(epochs=8))
    done.model                                     # what goes to the clients

The language model sees ``H(x) = (1 - alpha) * P_clip(f_clip(x)) + alpha * P_s(g(x))`` in the places of the picture,
with alpha rising from 0 to 1, and its loss on the annotation's tokens trains g and P_s alone. The mixture is the
paper's; this equation, the schedules and the start of P_s are our reading of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mllmfl_lite.data.batches import Batches, channel_statistics
from mllmfl_lite.data.folders import PictureSource
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.teachers.answers import StoredFeatures
from mllmfl_lite.teachers.llava import MllmTeacher


class Views(Protocol):
    """What both encoders are shown of picture number i.

    Attributes:
        identity: a name that differs wherever the pictures differ.
    """

    identity: str

    def __len__(self) -> int:
        """How many pictures there are."""

    def compact(self, indices: np.ndarray, generator: torch.Generator | None) -> Tensor:
        """For the compact model: float (B, 3, H, W); augmented if there is a generator."""

    def tokens(self, indices: np.ndarray) -> Tensor:
        """What the MLLM's projector is given: (B, P, D)."""


class ArrayViews:
    """Views of an image set in memory.

    Args:
        data: the images.
        mllm: whose tower makes the tokens.
        folder: keep the tokens here, computed once (see `StoredFeatures`); "" computes them each time anew.
        device: where the compact model trains.
    """

    def __init__(self, data: ImageSet, mllm: MllmTeacher, folder: str | Path = "", device: str = "cpu"):
        self.identity = data.checksum()
        self.data, self.mllm = data, mllm
        self._batches = Batches(data, device)
        self._stored = StoredFeatures(mllm, "tokens", data, folder) if folder else None

    def __len__(self) -> int:
        return len(self.data)

    def compact(self, indices: np.ndarray, generator: torch.Generator | None) -> Tensor:
        """Float (B, 3, H, W), normalised; cropped and flipped if there is a generator."""
        where = torch.from_numpy(indices).to(self._batches.labels.device)
        return self._batches.augmented(where, generator) if generator else self._batches.plain(where)

    def tokens(self, indices: np.ndarray) -> Tensor:
        """Float (B, P, D), read or computed."""
        if self._stored:
            return torch.from_numpy(self._stored[indices])
        return self.mllm.tokens(self.data.images[indices])


class PictureViews:
    """Views of pictures on the disk, opened and cut by threads as they are needed; CLIP's tokens are computed live.

    Storing them would not pay: 595,000 pictures of LLaVA-1.5's tokens are 700 GB, and one epoch reads each picture
    once for each kind of text.

    Args:
        source: the pictures.
        mllm: whose tower makes the tokens.
        size: the compact model's side in pixels. Its feature map must fit the token grid: ResNet-50 at 384 has 12 x 12.
        device: where the compact model trains.
        threads: that open pictures.
    """

    def __init__(self, source: PictureSource, mllm: MllmTeacher, size: int, device: str = "cpu", threads: int = 8):
        from torchvision.transforms import v2

        self.source, self.mllm, self.size, self.device = source, mllm, size, device
        self.identity = f"{len(source)} pictures, {source.ids[0]} to {source.ids[-1]}"
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*channel_statistics(size))]
        self._whole = v2.Compose([v2.Resize(size), v2.CenterCrop(size), *finish])
        self._finish = v2.Compose(finish)
        self._pool = ThreadPoolExecutor(threads)

    def __len__(self) -> int:
        return len(self.source)

    def compact(self, indices: np.ndarray, generator: torch.Generator | None) -> Tensor:
        """Float (B, 3, size, size), normalised; a random part, flipped or not, if there is a generator."""
        chances = torch.rand(len(indices), 5, generator=generator).tolist() if generator else [None] * len(indices)
        return torch.stack(list(self._pool.map(self._view, indices, chances))).to(self.device)

    def _view(self, index: int, chances: list[float] | None) -> Tensor:
        picture = self.source.open(self.source.ids[index])
        return self._whole(picture) if chances is None else self._finish(random_part(picture, self.size, chances))

    def tokens(self, indices: np.ndarray) -> Tensor:
        """Float (B, P, D), computed."""
        return self.mllm.tokens(list(self._pool.map(lambda i: self.source.open(self.source.ids[i]), indices)))


def random_part(picture, size: int, chances: Sequence[float]):
    """A part of a PIL image at `size` x `size`: 20 to 100 % of the area, 3:4 to 4:3, flipped or not.

    As torchvision's RandomResizedCrop, with the five numbers in [0, 1) given, so that threads cannot change them.
    """
    width, height = picture.size
    area = (0.2 + 0.8 * chances[0]) * width * height
    ratio = math.exp((2 * chances[1] - 1) * math.log(4 / 3))
    w, h = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
    left, top = chances[2] * (width - w), chances[3] * (height - h)
    part = picture.resize((size, size), resample=2, box=(left, top, left + w, top + h))
    return part.transpose(0) if chances[4] < 0.5 else part
