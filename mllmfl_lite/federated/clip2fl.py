"""CLIP2FL: CReFF with a CLIP as teacher on clients and server, a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.federated.creff import CReFF
from mllmfl_lite.federated.methods import State
from mllmfl_lite.models import CompactModel, distillation
from mllmfl_lite.teachers import load_zero_shot
from mllmfl_lite.teachers.answers import ask_teacher


@dataclass(frozen=True, kw_only=True)
class CLIP2FL(CReFF):
    """CLIP-guided federated learning (Shi et al., 2024): CReFF, with CLIP as a teacher on both sides.

    A client minimises ``CE + distill * T^2 * KL(softmax(clip / T) || softmax(out / T))``. On the server a contrastive
    loss on class means, after a linear map, draws the synthetic features of each class to CLIP's text feature of its
    name. `for_clients` asks CLIP.

    Our reading: CLIP sees each image once, whole, before the first round; the linear map is optimised with the
    features, at the same step size.
    """

    clip_logits: Tensor  #: CLIP's, on all clients' images (N, C)
    text_features: Tensor  #: CLIP's, of the class names, of unit length (C, D_text)
    clip_flops: int = 0  #: operations of CLIP's image encoder on one image
    clip_bytes: int = 0  #: of its weights
    distill: float = 1.0  #: weight of the client's distillation
    temperature: float = 3.0  #: T
    contrast: float = 0.001  #: weight of the server's contrastive term
    contrast_temperature: float = 0.1

    def __post_init__(self) -> None:
        if (columns := self.clip_logits.shape[1]) != (rows := len(self.text_features)):
            raise ValueError(f"clip_logits needs a column a class, text_features a row; there are {columns} and {rows}")

    @classmethod
    def for_clients(cls, train: ImageSet, clip: str = "", folder: str | Path = "", **options: Any) -> CLIP2FL:
        """Ask that teacher (default: the bundled one) about images and class names; the folder caches its answers."""
        teacher = load_zero_shot(clip or "tiny_clip")
        logits = ask_teacher(teacher, train, train.names, folder, "class_logits")
        words, (flops, size) = teacher.class_features(train.names), teacher.image_cost()
        return cls(clip_logits=logits, text_features=words, clip_flops=flops, clip_bytes=size, **options)

    def local_loss(self, model: CompactModel, x: Tensor, y: Tensor, rows: Tensor, anchor: State) -> Tensor:
        """Cross-entropy and the distillation of CLIP's answer."""
        logits = model(x)
        return cross_entropy(logits, y) + self.distill * distillation(logits, self.clip_logits[rows], self.temperature)

    def init_server_state(self, parameters: State, generator: torch.Generator) -> State:
        """CReFF's, and the linear map (D_text, D)."""
        server_state = super().init_server_state(parameters, generator)
        width = server_state["features"].shape[2]
        shape = (self.text_features.shape[1], width)
        start = (torch.rand(shape, generator=generator) * 2 - 1) * width**-0.5
        return {**server_state, "map": start.to(server_state["features"])}

    def other_loss(self, features: Tensor, classes: Tensor, trained: State) -> Tensor:
        """The prototypes' contrastive loss, weighted."""
        prototypes = features.mean(1) @ trained["map"].T
        logits = cosine_similarity(prototypes[:, None], self.text_features.to(features)[None], dim=-1)
        return self.contrast * cross_entropy(logits / self.contrast_temperature, classes)
