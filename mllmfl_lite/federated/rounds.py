"""The server's loop over federated rounds: draw clients, collect their results, update, test, save."""

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mllmfl_lite.checkpoint import CheckpointError, RunFolder, within
from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.data.longtail import class_groups
from mllmfl_lite.data.metrics import confusion_matrix, metrics_from_confusion, predict
from mllmfl_lite.federated.aggregate import Answers, ClientResult, State, accept
from mllmfl_lite.federated.clients import Task, Workers, client_step
from mllmfl_lite.federated.federation import Federation, check_run, choose_clients, identity_of
from mllmfl_lite.federated.methods import FedAvg, FedSettings
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import Execution, all_finite, count_cores, pick_device, progress_bar, tf32, torch_generator

log = logging.getLogger(__name__)
EVAL_PART = 1000  # images that a worker tests at a time

# Client transport: (weights, broadcast, round, clients) -> results and reasons.
Ask = Callable[[State, State, int, list[int]], Answers]


@dataclass(frozen=True)
class FedResult:
    """What a run returns."""

    state: State  #: the final global weights
    deployed: State  #: the weights that are tested and used; equal to `state` for most methods
    history: list[dict]  #: a record a round, with round, clients, left_out, train_loss, metrics or None, seconds


def run_federated(
    model: CompactModel,
    federation: Federation,
    method: FedAvg | None = None,
    settings: FedSettings | None = None,
    seed: int = 0,
    execution: Execution | None = None,
    ask: Ask | None = None,
) -> FedResult:
    """Run federated rounds from the weights of `model`, which is not changed.

    Args:
        model: the initial global model.
        federation: images, split and test images. Class groups come from the clients' class counts together.
        method: `FedAvg` by default.
        settings: rounds, participation, local training; the protocol at full scale by default.
        seed: of client draws, batches and augmentation.
        execution: with a folder, a checkpoint is saved after each round, and the run resumes from it.
        ask: reaches clients that are not threads of this process. Who does not answer, or sends what is not sound, is
            left out of the mean and named in the round's record.

    Raises:
        ValueError: parts that do not fit, a round without a sound result, or a server step that diverged.
        ClientDiverged: names client and round.
        CheckpointError: the folder belongs to another run, is damaged, in use or not writable.
    """
    method, settings, execution = method or FedAvg(), settings or FedSettings(), execution or Execution(device="cpu")
    check_run(model, federation, settings, method)
    rounds = _Rounds(model, federation, method, settings, seed, execution)
    if not execution.folder:
        return rounds.run(None, ask)
    with RunFolder(execution.folder, identity_of(model, federation, method, settings, seed)) as folder:
        return rounds.run(folder, ask)


class _Rounds:
    """One run: what stays the same from round to round, and the loop."""

    def __init__(
        self, model: CompactModel, federation: Federation, method: FedAvg, settings: FedSettings, seed: int,
        execution: Execution,
    ):  # fmt: skip
        self.device = pick_device(execution.device)
        self.model, self.method = copy.deepcopy(model).to(self.device), method.to(self.device)
        self.settings, self.seed = settings, seed
        self.train, self.test = (open_batches(data, self.device) for data in (federation.train, federation.test))
        self.split = [torch.from_numpy(np.ascontiguousarray(indices)).to(self.device) for indices in federation.split]
        self.truth, self.num_classes = federation.test.labels, federation.test.num_classes
        self.groups = class_groups(federation.train.subset(np.concatenate(federation.split)).class_counts())
        default = 1 if self.device.type == "cuda" else count_cores()
        self.worker_count = max(1, min(execution.workers or default, settings.clients_per_round))
        self.label = execution.label or "rounds"

    def run(self, folder: RunFolder | None, ask: Ask | None) -> FedResult:
        done, state, server_state, history = self._start(folder)
        total, drawn = self.settings.rounds, self.settings.clients_per_round
        with (
            tf32(self.settings.precision == "tf32"),
            Workers(self.model, self.worker_count) as self.workers,
            progress_bar(total * drawn, "client", self.label, done * drawn) as self.bar,
        ):
            for round_ in range(done + 1, total + 1):
                state, server_state, record = self._round(ask or self._ask_threads, state, server_state, round_)
                history.append(record)
                if folder:
                    tensors = {f"model.{name}": t for name, t in state.items()}
                    tensors |= {f"server.{name}": t for name, t in server_state.items()}
                    folder.save(round_, tensors, history)
        return FedResult(state, self.method.deployed(state, server_state), history)

    def _start(self, folder: RunFolder | None) -> tuple[int, State, State, list[dict]]:
        """Rounds done, weights, server state and history: from the checkpoint, or the beginning."""
        if folder is None or (found := folder.load()) is None:
            state = {name: t.clone() for name, t in self.model.state_dict().items()}
            parameters = {name: p.detach() for name, p in self.model.named_parameters()}
            return 0, state, self.method.init_server_state(parameters, torch_generator(self.seed, "memory")), []
        done, tensors, history = found
        if done > self.settings.rounds:
            raise CheckpointError(
                f"{folder.path} holds {done} rounds already; ask for at least as many, not for "
                f"{self.settings.rounds}, or choose another folder"
            )
        tensors = {name: t.to(self.device) for name, t in tensors.items()}
        return done, within(tensors, "model."), within(tensors, "server."), history

    def _round(self, ask: Ask, state: State, server_state: State, round_: int) -> tuple[State, State, dict]:
        """Weights, server state and record after the round."""
        started = time.perf_counter()
        chosen = choose_clients(len(self.split), self.settings, round_, self.seed)
        epochs, batch = self.settings.local_epochs, self.settings.batch_size
        steps = {client: epochs * math.ceil(len(self.split[client]) / batch) for client in chosen}
        answers = ask(state, self.method.broadcast(server_state), round_, chosen)
        results, left_out = accept(answers, steps, state, self.method.check_upload)
        for client, reason in left_out.items():
            log.warning("round %d: client %d is left out: %s", round_, client, reason)
        self.bar.update(round_ * len(chosen) - self.bar.n)  # threads were counted one by one
        if not results:
            raise ValueError(
                f"no client sent a sound result in round {round_}: {left_out}. Nothing was trained in this round and "
                "nothing is saved; see that clients are connected and numbered from 0, then start again"
            )
        state, server_state = self.workers.submit(self._update, state, server_state, results, round_).result()
        sizes = [len(self.split[client]) for client in results]
        record = {
            "round": round_,
            "clients": list(results),
            **({"left_out": {str(client): reason for client, reason in left_out.items()}} if left_out else {}),
            "train_loss": float(np.average([result.loss for result in results.values()], weights=sizes)),
            "metrics": self._evaluate(state, server_state) if self.settings.evaluates(round_) else None,
        }
        return state, server_state, {**record, "seconds": round(time.perf_counter() - started, 3)}

    def _ask_threads(self, state: State, received: State, round_: int, chosen: list[int]) -> Answers:
        jobs = {}
        for client in sorted(chosen, key=lambda client: -len(self.split[client])):  # longest first
            parts = (self.train, self.split[client], self.method, self.settings)
            jobs[client] = self.workers.start(client_step, *parts, Task(state, received, round_, client, self.seed))
            jobs[client].add_done_callback(lambda _: self.bar.update())
        return {client: jobs[client].result() for client in chosen}, {}

    def _update(
        self, state: State, server_state: State, results: dict[int, ClientResult], round_: int
    ) -> tuple[State, State]:
        generator, sizes = torch_generator(self.seed, "server", round_), [len(self.split[client]) for client in results]
        mean = self.method.aggregate(state, [result.state for result in results.values()], sizes, generator)
        uploads = [result.extra for result in results.values()]
        state, server_state = self.method.server_update(state, mean, server_state, uploads, generator)
        if not all_finite((*state.values(), *server_state.values())):
            raise ValueError(
                f"the server's step of round {round_} gave numbers that are not finite, though all clients' were; the "
                "checkpoint before it is good. Lower the method's step size (server_lr, match_lr or align.lr)"
            )
        return state, server_state

    def _evaluate(self, state: State, server_state: State) -> dict:
        weights = self.method.deployed(state, server_state)

        def test_part(model: CompactModel, part: Tensor) -> Tensor:
            model.load_state_dict(weights)
            return predict(model, self.test, part)

        parts = torch.arange(len(self.test), device=self.device).split(EVAL_PART)
        predictions = torch.cat([job.result() for job in [self.workers.start(test_part, part) for part in parts]])
        confusion = confusion_matrix(self.truth, predictions.cpu().numpy(), self.num_classes)
        metrics = metrics_from_confusion(confusion, self.groups)
        self.bar.set_postfix_str(f"top-1 {metrics['top1']:.1%}", refresh=False)
        return metrics
