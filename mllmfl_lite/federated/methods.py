"""Federated rounds: local training, the weighted mean, and the loop around them::

    result = run_federated(model, train, split, test, FedAvg(), FedSettings(rounds=20))

A method is a client step, what travels beside the weights, and a server step: `FedAvg` is the plainest, and whoever
inherits from it changes what differs (`FedProx` and `FedAvgM` here, others in `baselines` and `align`). Everything else
is shared: the same clients are drawn and the same batches shown to every method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import PRECISIONS, sha256_arrays
from mllmfl_lite.runs.settings import check_choice, check_whole

State = dict[str, Tensor]


class ClientDiverged(RuntimeError):
    """A client's loss or weights are no longer finite. Its round is not aggregated.

    Attributes:
        client: the client's number.
        round: the round, counted from 1.
    """

    def __init__(self, client: int, round: int):
        super().__init__(
            f"client {client} diverged in round {round}: its loss or weights are no longer finite. The round was not "
            "aggregated and the checkpoint before it is good; lower the learning rate, or look at this client's images"
        )
        self.client, self.round = client, round


class ServerDiverged(RuntimeError):
    """The server's own step gave numbers that are no longer finite; they are not kept."""

    def __init__(self, round: int):
        super().__init__(
            f"the server's step of round {round} gave numbers that are not finite, though all clients' were; the "
            "checkpoint before it is good. Lower the method's own step size (server_lr, match_lr, alignment's lr)"
        )


@dataclass(frozen=True)
class FedSettings:
    """The numbers of a federated run. Defaults are the benchmarks' protocol at full scale.

    Attributes:
        rounds: T, communication rounds.
        clients_per_round: clients drawn each round, without replacement.
        local_epochs: E, passes over its images that a drawn client makes.
        batch_size: images a step.
        lr: step size of the clients' SGD (no momentum, no weight decay, no schedule, a fresh optimiser each round).
        eval_every: test every so many rounds; the last `report_rounds` are always tested.
        report_rounds: the figure a run reports is its mean over this many last rounds.
        seed: decides which clients are drawn, and their batches and augmentations.
        precision: of the clients' forward and backward pass. ``"bfloat16"`` (autocast, weights stay float32) is faster
            where the processor has it; ``"tf32"`` lets a GPU round the factors of products, for the whole run, and is
            ``"float32"`` on a CPU.
    """

    rounds: int = 200
    clients_per_round: int = 8
    local_epochs: int = 10
    batch_size: int = 32
    lr: float = 0.1
    eval_every: int = 1
    report_rounds: int = 10
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_whole(self, "rounds", "clients_per_round", "local_epochs", "batch_size", "eval_every", "report_rounds")
        check_choice(self, precision=(*PRECISIONS, "tf32"))
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite; got {self.lr}")

    def evaluates(self, round_: int) -> bool:
        """Whether round `round_`, counted from 1, ends with a test."""
        return round_ % self.eval_every == 0 or round_ > self.rounds - self.report_rounds


@dataclass(frozen=True)
class FedAvg:
    """Federated averaging (McMahan et al., 2017): clients minimise cross-entropy, the server takes the mean.

    Every other method inherits from this one. In a round, in this order: the server sends the weights and `broadcast`;
    each drawn client sends `upload`, trains on `local_loss` and sends its weights; the server takes their mean and
    calls `server_update`. What is tested is `deployed`.
    """

    clip_flops: ClassVar[int] = 0  # of a CLIP's look at one image, where the client asks one
    clip_bytes: ClassVar[int] = 0  # of its weights

    @classmethod
    def for_clients(cls, train: ImageSet, clip: str = "", folder: str | Path = "", **options: float) -> FedAvg:
        """The method with its options, for these clients' images.

        A method that asks a CLIP on the client loads the one of that name, and keeps its answers in the folder.
        """
        return cls(**options)

    def to(self, device: torch.device | str) -> FedAvg:
        """The same method with its tensors on the device."""
        tensors = {f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **tensors) if tensors else self

    def identity(self) -> dict:
        """Name and numbers, plain JSON: two methods with the same identity are the same method."""
        numbers = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"name": type(self).__name__} | {
            key: sha256_arrays([value.cpu().numpy()]) if isinstance(value, Tensor) else value
            for key, value in numbers.items()
        }

    def broadcast(self, memory: State) -> State:
        """What the server sends to a drawn client beside the weights."""
        return {}

    def upload(self, model: CompactModel, batches: Batches, own: Tensor, received: State, generator) -> State:
        """What a client sends beside its weights, from the global model as it arrived.

        Args:
            model: holds the global weights of this round.
            batches: all training images.
            own: the client's indices into them, int64 (n_k,).
            received: the server's `broadcast`.
            generator: the only source of chance.
        """
        return {}

    def check_upload(self, beside: State, state: State) -> None:
        """Raise `ValueError` unless what a client sent beside its weights is sound: it may come from outside.

        Here nothing is expected; a method with an `upload` of its own should say here what it takes.

        Args:
            beside: as `upload` would give it; that its numbers are finite is not asked here.
            state: the global weights.
        """
        if beside and type(self).upload is FedAvg.upload:
            raise ValueError(f"{type(self).__name__} has nothing beside the weights; it sent {sorted(beside)[:3]}")

    def local_loss(self, model: CompactModel, x: Tensor, y: Tensor, rows: Tensor, anchor: State) -> Tensor:
        """What a client minimises on a batch.

        Args:
            model: in training.
            x: images (B, 3, H, W), augmented.
            y: labels (B,).
            rows: the images' indices into all training images (B,).
            anchor: the weights the client started from.
        """
        return cross_entropy(model(x), y)

    def init_memory(self, parameters: State, generator: torch.Generator) -> State:
        """What the server keeps from round to round beside the weights; nothing here."""
        return {}

    def server_update(
        self, state: State, mean: State, memory: State, uploads: list[State], generator: torch.Generator
    ) -> tuple[State, State]:
        """The new global state and memory.

        Args:
            state: the global state that this round started from.
            mean: the clients' weighted mean.
            memory: what was kept.
            uploads: each drawn client's `upload`, in rising order of clients.
            generator: the only source of chance.
        """
        return mean, memory

    def deployed(self, state: State, memory: State) -> State:
        """The weights that are tested and used, where they are not the ones that go on to the next round."""
        return state


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedProx (Li et al., 2020): the client's loss gains ``mu / 2 * ||w - w_global||^2`` over its parameters."""

    mu: float = 0.01

    def local_loss(self, model: CompactModel, x: Tensor, y: Tensor, rows: Tensor, anchor: State) -> Tensor:
        """Cross-entropy plus the proximal term."""
        distance = sum((p - anchor[name]).square().sum() for name, p in model.named_parameters())
        return super().local_loss(model, x, y, rows, anchor) + self.mu / 2 * distance


@dataclass(frozen=True)
class FedAvgM(FedAvg):
    """FedAvg with server momentum (Hsu et al., 2019): ``v <- momentum * v + (w - mean)``, ``w <- w - server_lr * v``.

    BatchNorm statistics are no parameters: they take the clients' mean, since momentum could drive a variance
    below zero.
    """

    momentum: float = 0.9
    server_lr: float = 1.0

    def init_memory(self, parameters: State, generator: torch.Generator) -> State:
        """The velocity, zero for each parameter."""
        return {name: torch.zeros_like(p) for name, p in parameters.items()}

    def server_update(
        self, state: State, mean: State, memory: State, uploads: list[State], generator: torch.Generator
    ) -> tuple[State, State]:
        """One step of momentum against the pseudo-gradient ``state - mean``."""
        velocity = {name: self.momentum * v + (state[name] - mean[name]) for name, v in memory.items()}
        return {**mean, **{name: state[name] - self.server_lr * v for name, v in velocity.items()}}, velocity


def weighted_mean(states: list[State], weights: list[float]) -> State:
    """The mean of states, entry by entry, weighted (McMahan et al., 2017, Algorithm 1: weights are sample counts n_k).

    The whole state is averaged, BatchNorm statistics included. Sums run in float64 and in list order; integer entries
    (BatchNorm's step counter) are rounded and stay integers.

    Raises:
        ValueError: no states, weights that do not fit or do not sum to a positive number, states of other shapes.
    """
    if not states or len(states) != len(weights) or not sum(weights) > 0 or min(weights) < 0:
        raise ValueError(
            f"a weighted mean needs states and one weight each, none negative, not all zero; "
            f"got {len(states)} states and weights {list(weights)[:10]}"
        )
    shapes = [{name: t.shape for name, t in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("states to be averaged must have the same names and shapes; they come from different models")
    total = sum(weights)
    return {name: _mean_entry([s[name] for s in states], [w / total for w in weights]) for name in states[0]}


def _mean_entry(tensors: list[Tensor], shares: list[float]) -> Tensor:
    mean = sum(t.double() * share for t, share in zip(tensors, shares, strict=True))
    return (mean if tensors[0].is_floating_point() else mean.round()).to(tensors[0].dtype)
