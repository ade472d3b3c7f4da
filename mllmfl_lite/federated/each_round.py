"""Stage 3, global alignment: a class-balanced server set chosen by the teacher, and finetuning on it::

    told    = teacher.class_probabilities(web.images, names)
    chosen  = draw_server_set(web, told, names, per_class=100)
    aligned = align(model, chosen, AlignSettings())

The loss is ``CE(y, p) + beta * KL(q || p)`` (the paper's): p is the model's softmax, q the teacher's distribution over
the class names, y the teacher's own first choice. No client's image and no human label enters. That the set is drawn
from open web images by the teacher's confidence is our reading.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace

import torch

from mllmfl_lite.federated.methods import FedAvg, State
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import sha256_arrays
from mllmfl_lite.stages.align import AlignSettings, align
from mllmfl_lite.stages.server_set import ServerSet


@dataclass(frozen=True)
class AlignEachRound(FedAvg):
    """FedAvg with an alignment of the mean after each round, in place of one at the end (our reading's option).

    Attributes:
        chosen: the server set.
        settings: of each alignment.
        model: any model of the right shape.
    """

    chosen: ServerSet = None
    settings: AlignSettings = field(default_factory=AlignSettings)
    model: CompactModel = None

    def identity(self) -> dict:
        """The set's checksum and the settings."""
        drawn = [self.chosen.images.checksum(), sha256_arrays([self.chosen.told.numpy()])]
        return {"name": type(self).__name__, "chosen": drawn, **asdict(self.settings)}

    def server_update(
        self, state: State, mean: State, memory: State, uploads: list[State], generator: torch.Generator
    ) -> tuple[State, State]:
        """The aligned mean."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(mean)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        aligned = align(model, self.chosen, replace(self.settings, seed=seed), next(iter(mean.values())).device)
        return dict(aligned.model.state_dict()), memory


@dataclass(frozen=True)
class ServerOnly(FedAvg):
    """The control without clients: whatever they send is dropped, and the server's weights stay as they were."""

    def server_update(
        self, state: State, mean: State, memory: State, uploads: list[State], generator: torch.Generator
    ) -> tuple[State, State]:
        """The state before."""
        return state, memory
