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
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mllmfl_lite.checkpoint import CheckpointError, RunFolder
from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.longtail import class_groups
from mllmfl_lite.data.metrics import confusion_matrix, metrics_from_confusion, predict
from mllmfl_lite.data.partition import Split, check_split
from mllmfl_lite.federated.clients import ClientResult, Workers, client_step
from mllmfl_lite.federated.methods import FedAvg, FedAvgM, FedProx, FedSettings, ServerDiverged, State, weighted_mean
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import (
    all_finite,
    count_cores,
    numpy_generator,
    progress_bar,
    sha256_arrays,
    tf32,
    torch_generator,
)

log = logging.getLogger(__name__)


EVAL_PART = 1000  # images a worker tests at a time


METHODS: dict[str, type[FedAvg]] = {"fedavg": FedAvg, "fedprox": FedProx, "fedavgm": FedAvgM}


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


def choose_clients(num_clients: int, settings: FedSettings, round_: int) -> list[int]:
    """The clients of a round, drawn without replacement, in rising order."""
    rng = numpy_generator(settings.seed, "clients", round_)
    return sorted(rng.choice(num_clients, settings.clients_per_round, replace=False).tolist())


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


# How a server asks clients: global state, `broadcast`, round and clients -> results, and reasons of those left out.
Ask = Callable[[State, State, int, list[int]], tuple[dict[int, ClientResult], dict[int, str]]]


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
