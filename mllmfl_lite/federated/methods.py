"""Federated methods: FedAvg, the hooks by which others differ from it, and those that change one line of it.

A method is a loss on the client, an upload beside the weights, and an update on the server. Other methods inherit from
`FedAvg` and override what differs. The drawn clients and their batches are the same for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.strong import strong_views
from mllmfl_lite.federated.aggregate import State, weighted_mean
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import settings_class, sha256_arrays

Count = Annotated[int, Field(ge=1, le=1_000_000)]


@settings_class
class FedSettings:
    """Numbers of a federated run. Defaults: the benchmarks' protocol at full scale.

    Clients' SGD has no momentum, weight decay or schedule, and a fresh optimiser each round.
    """

    rounds: Annotated[int, Field(ge=0, le=1_000_000)] = 200  #: T, communication rounds; 0 leaves the clients out
    clients_per_round: Count = 8  #: clients drawn each round, without replacement
    local_epochs: Count = 10  #: E, passes over its images that a drawn client makes
    batch_size: Count = 32  #: images a step
    lr: Annotated[float, Field(gt=0)] = 0.1  #: step size of the clients' SGD
    eval_every: Count = 1  #: test every so many rounds; the last `report_rounds` are always tested
    report_rounds: Count = 10  #: a run reports the mean over so many last rounds
    #: of clients' passes; bfloat16 is autocast, weights stay float32; tf32 is for GPUs and the whole run
    precision: Literal["float32", "bfloat16", "tf32"] = "float32"
    #: of clients' images, drawn for each image; "weak" is crop and flip, "strong" adds AutoAugment and Cutout
    augment: Literal["weak", "strong"] = "weak"

    def evaluates(self, round_: int) -> bool:
        """Return True if round `round_`, counted from 1, ends with a test."""
        return round_ % self.eval_every == 0 or round_ > self.rounds - self.report_rounds


@dataclass(frozen=True)
class FedAvg:
    """Federated averaging (McMahan et al., 2017): clients minimise cross-entropy, the server takes the mean.

    A round: the server sends the weights and `broadcast`; each drawn client computes `upload`, trains on `local_loss`
    and sends its weights; the server calls `check_upload`, `aggregate` and `server_update`. `deployed` is tested. A
    hook's `generator` is its only source of chance. What comes from several clients is in order of client number.
    """

    clip_flops = 0  # operations of a CLIP on one image, if clients run one
    clip_bytes = 0  # of its weights
    needs_pool = False  # whether the server's step uses open images
    strong_views = False  # whether clients augment strongly, whatever the settings

    @classmethod
    def for_clients(cls, train: ImageSet, clip: str = "", folder: str | Path = "", **options: Any) -> FedAvg:
        """Build the method for these clients' images; `clip` names the CLIP of methods that ask one, into `folder`."""
        return cls(**options)

    def to(self, device: torch.device | str) -> FedAvg:
        """Return the same method with its tensors on the device."""
        tensors = {f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **tensors) if tensors else self

    def identity(self) -> dict:
        """Name, numbers and checksums of images and tensors as plain JSON; equal for equal methods."""
        plain: dict[str, Any] = {"name": type(self).__name__}
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if isinstance(value, Tensor):
                plain[name] = sha256_arrays([value.cpu().numpy()])
            elif not isinstance(value, CompactModel):  # its weights are loaded before each use
                plain[name] = value.checksum() if isinstance(value, ImageSet) else value
        return plain

    def broadcast(self, server_state: State) -> State:
        """What the server sends beside the weights."""
        return {}

    def upload(
        self, model: CompactModel, batches: Batches, indices: Tensor, received: State, generator: Generator
    ) -> State:
        """What a client sends beside its weights, computed before it trains.

        `model` has the global weights, `batches` all training images; `indices` are the client's, int64 (n_k,).
        """
        return {}

    def check_upload(self, extra: State, state: State) -> None:
        """Raise `ValueError` unless a client's upload is sound; its numbers are finite. Override it with `upload`."""
        if extra and type(self).upload is FedAvg.upload:
            raise ValueError(f"{type(self).__name__} takes nothing beside the weights; it sent {sorted(extra)[:3]}")

    def for_client(self, batches: Batches, indices: Tensor, received: State, round_: int) -> FedAvg:
        """What trains one client in one round (its `views` and `local_loss`); arguments as for `upload`."""
        return self

    def views(self, batches: Batches, parts: list[Tensor], generator: Generator, augment: str) -> Iterator[Tensor]:
        """The images x of `local_loss` for each run of indices."""
        if augment == "weak":
            return batches.stream(parts, generator)
        return (strong_views(batches, part, generator) for part in parts)

    def local_loss(self, model: CompactModel, x: Tensor, y: Tensor, rows: Tensor, anchor: State) -> Tensor:
        """The client's loss on a batch of augmented images x (B, 3, H, W) with labels y (B,).

        `rows` (B,) are their indices into all training images, `anchor` the weights that the client started from.
        """
        return cross_entropy(model(x), y)

    def aggregate(self, start: State, states: list[State], sizes: list[int], generator: Generator) -> State:
        """Combine the clients' weights, trained from `start`; `sizes` are their numbers of images."""
        return weighted_mean(states, sizes)

    def init_server_state(self, parameters: State, generator: Generator) -> State:
        """Tensors that the server keeps from round to round beside the weights."""
        return {}

    def server_update(
        self, state: State, mean: State, server_state: State, uploads: list[State], generator: Generator
    ) -> tuple[State, State]:
        """New global weights and server state, from the round's first weights `state` and the `mean` of `aggregate`."""
        return mean, server_state

    def deployed(self, state: State, server_state: State) -> State:
        """The weights that are tested and used."""
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

    BatchNorm statistics take the clients' mean: momentum could make a variance negative.
    """

    momentum: float = 0.9
    server_lr: float = 1.0

    def init_server_state(self, parameters: State, generator: Generator) -> State:
        """The velocity: zero for each parameter."""
        return {name: torch.zeros_like(p) for name, p in parameters.items()}

    def server_update(
        self, state: State, mean: State, server_state: State, uploads: list[State], generator: Generator
    ) -> tuple[State, State]:
        """One step of momentum along ``state - mean``."""
        velocity = {name: self.momentum * v + (state[name] - mean[name]) for name, v in server_state.items()}
        return {**mean, **{name: state[name] - self.server_lr * v for name, v in velocity.items()}}, velocity


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
