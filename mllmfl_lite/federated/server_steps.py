"""Methods that differ from FedAvg in what the server does with the mean: FedDF, FedNPC, alignment in each round."""

import copy
from dataclasses import asdict, dataclass

import torch
from torch import Generator, Tensor
from torch.func import functional_call

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.federated.aggregate import State, weighted_mean
from mllmfl_lite.federated.creff import HEAD, head_gradients
from mllmfl_lite.federated.methods import FedAvg
from mllmfl_lite.models import CompactModel, distillation
from mllmfl_lite.repro import sha256_arrays, torch_generator
from mllmfl_lite.stages.align import AlignSettings, align
from mllmfl_lite.stages.server_set import ServerSet


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

    def aggregate(self, start: State, states: list[State], sizes: list[int], generator: Generator) -> State:
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


@dataclass(frozen=True)
class FedNPC(FedAvg):
    """FedAvg whose tested model has a head that was trained further on Gaussian noise with random labels (2026).

    The server uses no image. Rounds go on with the averaged head. The public code keeps the best of 27 steps by test
    images; here their number is fixed beforehand. Momentum turns the signs of a head that takes too many.
    """

    steps: int = 9  #: of SGD, each on new vectors
    vectors: int = 10_000
    lr: float = 0.1
    momentum: float = 0.9

    def deployed(self, state: State, server_state: State) -> State:
        """The averaged model with the repaired head."""
        head, generator = torch.cat([state[HEAD[0]], state[HEAD[1]][:, None]], 1), torch_generator(0, "noise features")
        velocity = torch.zeros_like(head)
        for _ in range(self.steps):
            noise = torch.randn(self.vectors, head.shape[1] - 1, generator=generator).to(head)
            labels = torch.randint(len(head), (self.vectors,), generator=generator).to(head.device)
            velocity = self.momentum * velocity + head_gradients(noise, labels, head[:, :-1], head[:, -1])
            head = head - self.lr * velocity
        return {**state, HEAD[0]: head[:, :-1].clone(), HEAD[1]: head[:, -1].clone()}


@dataclass(frozen=True)
class AlignEachRound(FedAvg):
    """FedAvg whose mean is aligned on the server set before it goes on, in place of one alignment after the rounds."""

    server_set: ServerSet  #: class-balanced
    settings: AlignSettings  #: of each alignment
    model: CompactModel  #: any of the right shape

    def identity(self) -> dict:
        """The set's checksums and the settings."""
        checksums = [self.server_set.images.checksum(), sha256_arrays([self.server_set.probabilities.numpy()])]
        return {"name": type(self).__name__, "server_set": checksums, **asdict(self.settings)}

    def server_update(
        self, state: State, mean: State, server_state: State, uploads: list[State], generator: Generator
    ) -> tuple[State, State]:
        """Return the aligned mean."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(mean)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        aligned = align(model, self.server_set, self.settings, seed, next(iter(mean.values())).device)
        return dict(aligned.model.state_dict()), server_state
