"""Balanced softmax: the client's loss knows how long the tail is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.federated.aggregate import State
from mllmfl_lite.federated.methods import FedAvg
from mllmfl_lite.models import CompactModel


@dataclass(frozen=True)
class BalancedSoftmax(FedAvg):
    """FedAvg whose clients minimise ``CE(logits + tau * log(shares), y)`` (Ren et al., 2020; Menon et al., 2021).

    `shares` are the classes' shares of all clients' images together: each client must tell its class counts once. The
    plain logits are tested.
    """

    shares: Tensor = None  #: (C,), sum 1
    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.shares is None or not (self.shares >= 0).all():
            raise ValueError(
                "BalancedSoftmax needs the classes' shares; make it with BalancedSoftmax.for_clients(train)"
            )

    @classmethod
    def for_clients(cls, train: ImageSet, clip: str = "", folder: str | Path = "", **options: float) -> BalancedSoftmax:
        """Count the clients' classes; none of them counts as empty, so that its logit stays finite."""
        counts = torch.from_numpy(train.class_counts()).float().clamp(min=1)
        return cls(shares=counts / counts.sum(), **options)

    def local_loss(self, model: CompactModel, x: Tensor, y: Tensor, rows: Tensor, anchor: State) -> Tensor:
        """Cross-entropy of the adjusted logits."""
        return cross_entropy(model(x) + self.tau * self.shares.log(), y)
