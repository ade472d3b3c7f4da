"""Balanced softmax: the client's loss knows how long the tail is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.federated.aggregate import State
from mllmfl_lite.federated.methods import FedAvg
from mllmfl_lite.models import CompactModel


@dataclass(frozen=True, kw_only=True)
class BalancedSoftmax(FedAvg):
    """FedAvg whose clients minimise ``CE(logits + tau * log(shares), y)`` (Ren et al., 2020; Menon et al., 2021).

    `shares` are the classes' shares of all clients' images together: each client must tell its class counts once.
    `for_clients` counts them. The plain logits are tested.
    """

    shares: Tensor  #: (C,), sum 1
    tau: float = 1.0

    @classmethod
    def for_clients(cls, train: ImageSet, clip: str = "", folder: str | Path = "", **options: Any) -> BalancedSoftmax:
        """Count the clients' classes; none of them counts as empty, so that its logit stays finite."""
        counts = torch.from_numpy(train.class_counts()).float().clamp(min=1)
        return cls(shares=counts / counts.sum(), **options)

    def local_loss(self, model: CompactModel, x: Tensor, y: Tensor, rows: Tensor, anchor: State) -> Tensor:
        """Cross-entropy of the adjusted logits."""
        return cross_entropy(model(x) + self.tau * self.shares.log(), y)
