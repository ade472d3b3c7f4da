"""Alignment of the mean in each round, in place of one alignment after the last: an option of our reading."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass

import torch

from mllmfl_lite.federated.aggregate import State
from mllmfl_lite.federated.methods import FedAvg
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import sha256_arrays
from mllmfl_lite.stages.align import AlignSettings, align
from mllmfl_lite.stages.server_set import ServerSet


@dataclass(frozen=True)
class AlignEachRound(FedAvg):
    """FedAvg whose mean is aligned on the server set before it goes on."""

    server_set: ServerSet  #: class-balanced
    settings: AlignSettings  #: of each alignment
    model: CompactModel  #: any of the right shape

    def identity(self) -> dict:
        """The set's checksums and the settings."""
        checksums = [self.server_set.images.checksum(), sha256_arrays([self.server_set.probabilities.numpy()])]
        return {"name": type(self).__name__, "server_set": checksums, **asdict(self.settings)}

    def server_update(
        self, state: State, mean: State, server_state: State, uploads: list[State], generator: torch.Generator
    ) -> tuple[State, State]:
        """Return the aligned mean."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(mean)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        aligned = align(model, self.server_set, self.settings, seed, next(iter(mean.values())).device)
        return dict(aligned.model.state_dict()), server_state
