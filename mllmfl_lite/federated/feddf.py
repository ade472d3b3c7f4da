"""FedDF: the server distils the clients' models into their mean, on open images without labels."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.federated.aggregate import State, weighted_mean
from mllmfl_lite.federated.methods import FedAvg
from mllmfl_lite.models import CompactModel, distillation


@dataclass(frozen=True, kw_only=True)
class FedDF(FedAvg):
    """Ensemble distillation (Lin et al., 2020): the nearest relative of stage 3, with clients as teachers.

    After the mean is taken it learns, by Adam with a step size along half a cosine, the mean of the clients' logits on
    augmented images of the server's pool. Our reading: a fixed number of steps, no early stop.
    """

    needs_pool = True
    pool: ImageSet  #: the server's open images; labels are not used
    model: CompactModel  #: any of the right shape
    steps: int = 50  #: a round
    batch: int = 64
    lr: float = 0.001
    temperature: float = 1.0

    def identity(self) -> dict:
        """Numbers, and the pool's checksum."""
        numbers = {name: getattr(self, name) for name in ("steps", "batch", "lr", "temperature")}
        return {"name": "FedDF", "pool": self.pool.checksum(), **numbers}

    def aggregate(self, states: list[State], sizes: list[int], generator: torch.Generator) -> State:
        """The mean, after it has learned from the clients' models."""
        mean = weighted_mean(states, sizes)
        device = next(iter(mean.values())).device
        student = copy.deepcopy(self.model).to(device).to(memory_format=torch.channels_last)
        student.load_state_dict(mean)
        teacher, batches = copy.deepcopy(student).eval(), open_batches(self.pool, device)
        optimizer = torch.optim.Adam(student.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        student.train()
        for _ in range(self.steps):
            x = batches.augmented(torch.randint(len(batches), (self.batch,), generator=generator).to(device), generator)
            loss = distillation(student(x), ensemble(teacher, states, x), self.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return {name: t.clone() for name, t in student.state_dict().items()}


@torch.no_grad()
def ensemble(model: CompactModel, states: list[State], x: Tensor) -> Tensor:
    """The mean of the logits (B, C) that a model in evaluation mode gives with each of the states."""
    return torch.stack([functional_call(model, state, (x,)) for state in states]).mean(0)
