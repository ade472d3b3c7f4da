"""Federated rounds: local training, the weighted mean, and the loop around them::

    result = run_federated(model, train, split, test, FedAvg(), FedSettings(rounds=20))

A method is a client step, what travels beside the weights, and a server step: `FedAvg` is the plainest, and whoever
inherits from it changes what differs (`FedProx` and `FedAvgM` here, others in `baselines` and `align`). Everything else
is shared: the same clients are drawn and the same batches shown to every method.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllmfl_lite.batches import Batches, open_batches
from mllmfl_lite.checkpoint import CheckpointError, RunFolder
from mllmfl_lite.data import ImageSet
from mllmfl_lite.evaluate import class_groups, confusion_matrix, metrics_from_confusion, predict
from mllmfl_lite.models import CompactModel
from mllmfl_lite.partition import Split, check_split
from mllmfl_lite.repro import count_cores, numpy_generator, progress_bar, sha256_arrays, tf32, torch_generator
from mllmfl_lite.settings import PRECISIONS, check_choice, check_whole

if TYPE_CHECKING:  # it is built on this module
    from mllmfl_lite.together import Together

log = logging.getLogger(__name__)
State = dict[str, Tensor]
EVAL_PART = 1000  # images a worker tests at a time


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


# ---------------------------------------------------------------------------------------------------- methods


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


METHODS: dict[str, type[FedAvg]] = {"fedavg": FedAvg, "fedprox": FedProx, "fedavgm": FedAvgM}

# ---------------------------------------------------------------------------------------------------- the two halves


def train_client(
    model: CompactModel,
    batches: Batches,
    own: Tensor,
    method: FedAvg,
    settings: FedSettings,
    anchor: State,
    round_: int,
    client: int,
) -> float:
    """Local training, in place: E epochs of plain SGD on one client's images, from `anchor`.

    Every random draw is a function of (seed, round, client, epoch), so who computes it, and when, changes nothing.

    Args:
        model: any model of the right shape; it is overwritten with `anchor`, then trained.
        batches: all training images.
        own: the client's indices into `batches`, int64, shape (n_k,).
        method: supplies the loss.
        settings: E, batch size and step size.
        anchor: the global state the round starts from; not changed.
        round_: counted from 1.
        client: the client's number.

    Returns:
        The mean loss over all its steps' images.

    Raises:
        ClientDiverged: the loss or a weight is no longer finite.
    """
    model.load_state_dict(anchor)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
    total = torch.zeros((), dtype=torch.float64, device=own.device)  # there: a GPU is waited for once an epoch
    for epoch in range(settings.local_epochs):
        generator = torch_generator(settings.seed, "batches", round_, client, epoch)
        order = own[torch.randperm(len(own), generator=generator).to(own.device)]
        parts = order.split(settings.batch_size)
        for part, x in zip(parts, batches.stream(parts, generator), strict=True):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                loss = method.local_loss(model, x, batches.labels[part], part, anchor)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach().double() * len(part)
        if not torch.isfinite(total):
            raise ClientDiverged(client, round_)
    if not all_finite(model.parameters()):
        raise ClientDiverged(client, round_)
    return total.item() / (settings.local_epochs * len(own))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number in any of them is infinite or NaN."""
    return all(tensor.isfinite().all() for tensor in tensors)


@dataclass(frozen=True)
class ClientResult:
    """What a client sends back.

    Attributes:
        state: its weights after local training, BatchNorm statistics included.
        beside: the method's `upload`.
        loss: its mean training loss.
    """

    state: State
    beside: State
    loss: float


def client_step(
    model: CompactModel,
    batches: Batches,
    own: Tensor,
    method: FedAvg,
    settings: FedSettings,
    anchor: State,
    received: State,
    round_: int,
    client: int,
) -> ClientResult:
    """A client's whole part in a round: `upload` from the weights as they arrived, then local training.

    Arguments and errors are `train_client`'s; `received` is what came beside the weights.
    """
    model.load_state_dict(anchor)
    generator = torch_generator(settings.seed, "upload", round_, client)
    beside = method.upload(model, batches, own, received, generator)
    loss = train_client(model, batches, own, method, settings, anchor, round_, client)
    return ClientResult({name: t.clone() for name, t in model.state_dict().items()}, beside, loss)


def server_step(
    state: State,
    memory: State,
    arrived: list[ClientResult],
    sizes: list[int],
    method: FedAvg,
    settings: FedSettings,
    round_: int,
) -> tuple[State, State]:
    """The server's whole part in a round: the weighted mean, then the method's `server_update`.

    Args:
        state: the global state that the round started from.
        memory: what the server keeps beside it.
        arrived: what clients sent, in rising order of clients, at least one.
        sizes: their numbers of images, n_k.
        method: supplies the update.
        settings: the seed.
        round_: counted from 1.

    Returns:
        The new global state and memory.
    """
    mean = weighted_mean([client.state for client in arrived], sizes)
    generator = torch_generator(settings.seed, "server", round_)
    return method.server_update(state, mean, memory, [client.beside for client in arrived], generator)


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


def choose_clients(num_clients: int, settings: FedSettings, round_: int) -> list[int]:
    """The clients of a round, drawn without replacement, in rising order."""
    rng = numpy_generator(settings.seed, "clients", round_)
    return sorted(rng.choice(num_clients, settings.clients_per_round, replace=False).tolist())


# ---------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class FedResult:
    """What a run leaves.

    Attributes:
        state: the final global state.
        deployed: what is tested and used; the same, but for methods that say otherwise.
        history: one record a round: round, clients, train_loss, seconds, and metrics (None where not tested).
    """

    state: State
    deployed: State
    history: list[dict]


def summarise(history: list[dict], last: int = 10) -> dict:
    """The reported figures: every metric as its mean over the last `last` rounds.

    One round's accuracy swings by several points, and the best of many rounds flatters: `best_top1` is given only
    to compare with reports that use it.
    """
    tested = [record["metrics"] for record in history if record["metrics"]]
    final = [record["metrics"] for record in history[-last:] if record["metrics"]]
    return {
        "top1": _mean_of([m["top1"] for m in final]),
        "per_class": [_mean_of(column) for column in zip(*(m["per_class"] for m in final), strict=True)],
        "groups": {group: _mean_of([m["groups"][group] for m in final]) for group in final[0]["groups"]},
        "best_top1": max(m["top1"] for m in tested),
        "rounds_averaged": len(final),
    }


def _mean_of(values: list[float | None] | tuple[float | None, ...]) -> float | None:
    return None if None in values else float(np.mean(values))


# How a server asks clients: global state, `broadcast`, round and clients -> results, and reasons of those left out.
Ask = Callable[[State, State, int, list[int]], tuple[dict[int, ClientResult], dict[int, str]]]


class Workers:
    """Threads with one torch thread and one model each.

    torch releases Python's lock inside its kernels, so clients train side by side without processes or pickling. One
    torch thread a worker makes the result the same to the bit for any number of workers. It also keeps clear of a
    crash seen with torch 2.15 on a CPU: the backward pass of a strided 1x1 convolution from 8 channels, channels last,
    batch of 3 or 5, two torch threads.
    """

    def __init__(self, model: CompactModel, count: int):
        self._model = model
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(count, initializer=self._start)

    def _start(self) -> None:
        torch.set_num_threads(1)
        self._own.model = copy.deepcopy(self._model).to(memory_format=torch.channels_last)

    def submit(self, task: Callable, *args: object) -> Future:
        """Run ``task(model, *args)`` on some worker with that worker's model."""
        return self._pool.submit(lambda: task(self._own.model, *args))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def run_federated(
    model: CompactModel,
    train: ImageSet,
    split: Split,
    test: ImageSet,
    method: FedAvg | None = None,
    settings: FedSettings | None = None,
    *,
    folder: str | Path | None = None,
    workers: int | None = None,
    device: torch.device | str = "cpu",
    label: str = "",
    ask: Ask | None = None,
    together: bool | Together = False,
) -> FedResult:
    """Run federated rounds from the weights of `model`, which is not changed.

    Args:
        model: the initial global model.
        train: the clients' images.
        split: each client's indices into `train`.
        test: the images to test on; class groups come from the class counts of the clients' images together.
        method: `FedAvg` (default), or another that inherits from it.
        settings: rounds, participation, local training; the protocol's full scale by default.
        folder: keep a checkpoint here after each round, and go on from it if it is there. Without a folder nothing
            is written.
        workers: client threads; default one a core (one on a GPU). Changes the speed only.
        device: where to train.
        label: a name for the progress bar.
        ask: how clients are asked, where they are not threads of this process (see `flower_app`). Those that it
            leaves out are left out of the round's mean, and stand in the round's record with the reason; a round
            without any client keeps the weights.
        together: whether a round's clients are trained side by side as one stack of models, or one by one in threads;
            a `together.Together` says how, and its module what a method's `local_loss` must be. Made for GPUs, and not
            for pictures in files. Changes the speed and the last bits only.

    Raises:
        ValueError: an empty client, more participants than clients, no test images, a head of the wrong size.
        ClientDiverged: names client and round; the checkpoint before stays good.
        ServerDiverged: names the round; the checkpoint before stays good.
        CheckpointError: the folder is another run's, damaged, in use or not writable.
    """
    method, settings = method or FedAvg(), settings or FedSettings()
    _check_run(model, train, split, test, settings)
    parts = (model, train, split, test, method, settings)
    how = (workers, device, label, ask, together)
    if folder is None:
        return _Rounds(*parts, *how).run(None)
    with RunFolder(folder, _identity(*parts)) as run_folder:
        return _Rounds(*parts, *how).run(run_folder)


class _Rounds:
    """One run of `run_federated`: what stays the same from round to round, and the loop."""

    def __init__(self, model, train, split, test, method, settings, workers, device, label, ask, together):
        from mllmfl_lite.together import ClientStack, settle  # built on this module

        self.method, self.settings, self.label, self.ask = method.to(device), settings, label, ask
        self.model = copy.deepcopy(model).to(device)
        self.train, self.test = open_batches(train, device), open_batches(test, device)
        self.split = [torch.from_numpy(np.ascontiguousarray(own)).to(device) for own in split]
        self.test_labels, self.num_classes = test.labels, test.num_classes
        self.groups = class_groups(train.subset(np.concatenate(split)).class_counts())
        default = 1 if torch.device(device).type == "cuda" else count_cores()
        self.worker_count = max(1, min(workers or default, settings.clients_per_round))
        if side_by_side := settle(together, train, ask):
            self.ask = ClientStack(self.model, self.train, self.split, self.method, settings, side_by_side).ask

    def run(self, folder: RunFolder | None) -> FedResult:
        done, state, memory, history = self._start(folder)
        total = self.settings.rounds
        with (
            tf32(self.settings.precision == "tf32"),
            Workers(self.model, self.worker_count) as workers,
            progress_bar(total * self.settings.clients_per_round, "client", self.label or "rounds", done) as bar,
        ):
            bar.update(done * (self.settings.clients_per_round - 1))
            for round_ in range(done + 1, total + 1):
                state, memory, record = self._round(workers, state, memory, round_, bar)
                history.append(record)
                if folder:
                    folder.save(round_, _pack(state, memory), history)
                if record["metrics"]:
                    bar.set_postfix_str(f"top-1 {record['metrics']['top1']:.1%}", refresh=False)
        return FedResult(state, self.method.deployed(state, memory), history)

    def _start(self, folder: RunFolder | None) -> tuple[int, State, State, list[dict]]:
        found = folder.load() if folder else None
        if found is None:
            state = {name: t.clone() for name, t in self.model.state_dict().items()}
            parameters = {name: p.detach() for name, p in self.model.named_parameters()}
            return 0, state, self.method.init_memory(parameters, torch_generator(self.settings.seed, "memory")), []
        done, tensors, history = found
        if done > self.settings.rounds:
            raise CheckpointError(
                f"{folder.path} holds a run of {done} rounds already; ask for at least as many, not for "
                f"{self.settings.rounds}, or choose another folder"
            )
        tensors = {name: t.to(self.train.labels.device) for name, t in tensors.items()}
        return done, _unpack(tensors, "model."), _unpack(tensors, "memory."), history

    def _round(self, workers, state, memory, round_, bar) -> tuple[State, State, dict]:
        started = time.perf_counter()
        chosen, received = choose_clients(len(self.split), self.settings, round_), self.method.broadcast(memory)
        ask = self.ask or functools.partial(self._ask_threads, workers, bar)
        results, left_out = self._sound(*ask(state, received, round_, chosen), state, round_)
        bar.update(round_ * len(chosen) - bar.n)  # threads have been counted one by one
        present = sorted(results)
        arrived, sizes = [results[client] for client in present], [len(self.split[client]) for client in present]
        if present:
            state, memory = workers.submit(self._server, state, memory, arrived, sizes, round_).result()
            if not all_finite((*state.values(), *memory.values())):
                raise ServerDiverged(round_)
        used = self.method.deployed(state, memory)
        record = {
            "round": round_,
            "clients": present,
            **({"left_out": {str(client): reason for client, reason in left_out.items()}} if left_out else {}),
            "train_loss": float(np.average([client.loss for client in arrived], weights=sizes)) if present else None,
            "metrics": self._evaluate(workers, used) if self.settings.evaluates(round_) else None,
        }
        return state, memory, {**record, "seconds": round(time.perf_counter() - started, 3)}

    def _sound(self, results, left_out, state, round_) -> tuple[dict[int, ClientResult], dict[int, str]]:
        """Results on the server's device, without those whose part beside the weights the method refuses."""
        device, kept, left_out = self.train.labels.device, {}, dict(left_out)
        for client, result in results.items():
            try:
                self.method.check_upload(result.beside, state)
            except ValueError as error:
                left_out[client] = f"beside its weights: {error}"
                log.warning("round %d: client %d is left out: %s", round_, client, left_out[client])
                continue
            there, beside = ({n: t.to(device) for n, t in of.items()} for of in (result.state, result.beside))
            kept[client] = ClientResult(there, beside, result.loss)
        return kept, left_out

    def _ask_threads(self, workers, bar, state, received, round_, chosen) -> tuple[dict[int, ClientResult], dict]:
        longest_first = sorted(chosen, key=lambda client: -len(self.split[client]))
        jobs = {client: workers.submit(self._client, state, received, round_, client) for client in longest_first}
        for job in jobs.values():
            job.add_done_callback(lambda _: bar.update())
        return {client: jobs[client].result() for client in chosen}, {}

    def _client(self, model: CompactModel, state: State, received: State, round_: int, client: int) -> ClientResult:
        own = self.split[client]
        return client_step(model, self.train, own, self.method, self.settings, state, received, round_, client)

    def _server(self, model, state, memory, arrived, sizes, round_) -> tuple[State, State]:
        return server_step(state, memory, arrived, sizes, self.method, self.settings, round_)

    def _evaluate(self, workers: Workers, state: State) -> dict:
        def test_part(model: CompactModel, part: Tensor) -> Tensor:
            model.load_state_dict(state)
            return predict(model, self.test, part)

        parts = torch.arange(len(self.test), device=self.test.labels.device).split(EVAL_PART)
        jobs = [workers.submit(test_part, part) for part in parts]
        predictions = torch.cat([job.result() for job in jobs]).cpu().numpy()
        confusion = confusion_matrix(self.test_labels, predictions, self.num_classes)
        return metrics_from_confusion(confusion, self.groups).as_dict()


def _check_run(model, train, split, test, settings) -> None:
    check_split(split)
    if settings.clients_per_round > len(split):
        raise ValueError(f"clients_per_round is {settings.clients_per_round}, but there are only {len(split)} clients")
    if len(test) == 0:
        raise ValueError("the test set has no images")
    for data in (train, test):
        if data.num_classes != model.head.out_features:
            raise ValueError(
                f"{data.origin} has {data.num_classes} classes, the model's head has {model.head.out_features}; "
                "build the model with num_classes of the data"
            )


def _identity(model, train, split, test, method, settings) -> dict:
    """What makes two runs the same run. `rounds` is left out: a finished run may be continued."""
    numbers = {k: v for k, v in asdict(settings).items() if k not in ("rounds", "eval_every", "report_rounds")}
    return {
        **numbers,
        "method": method.identity(),
        "train": train.checksum(),
        "test": test.checksum(),
        "split": sha256_arrays(split),
        "initial_weights": sha256_arrays(t.cpu().numpy() for t in model.state_dict().values()),
    }


def _pack(state: State, memory: State) -> State:
    return {**{f"model.{n}": t for n, t in state.items()}, **{f"memory.{n}": t for n, t in memory.items()}}


def _unpack(tensors: State, prefix: str) -> State:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
