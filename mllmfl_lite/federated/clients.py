"""The client's half of a round: local training, and the threads that run several clients at once."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.federated.aggregate import ClientResult, State
from mllmfl_lite.federated.methods import FedAvg, FedSettings
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import all_finite, torch_generator


class ClientDiverged(RuntimeError):
    """The loss or weights of `client` are no longer finite in `round`, counted from 1. The round is not aggregated."""

    def __init__(self, client: int, round: int):
        super().__init__(
            f"client {client} diverged in round {round}: its loss or weights are no longer finite. The checkpoint "
            "before this round is good; lower the learning rate, or look at this client's images"
        )
        self.client, self.round = client, round


@dataclass(frozen=True)
class Task:
    """What the server gives to one client in one round."""

    state: State  #: the global weights
    received: State  #: the method's `broadcast`
    round: int  #: counted from 1
    client: int  #: the client's number
    seed: int = 0  #: of the run

    def generator(self, name: str, *more: int) -> torch.Generator:
        """A generator for this seed, round and client."""
        return torch_generator(self.seed, name, self.round, self.client, *more)


def train_client(
    model: CompactModel, batches: Batches, indices: Tensor, method: FedAvg, settings: FedSettings, task: Task
) -> float:
    """Train locally, in place: E epochs of plain SGD on one client's images, from the global weights.

    `model` is any of the right shape; `batches` has all training images, `indices` (n_k,) are the client's. Draws
    depend on (seed, round, client, epoch) alone. Returns the mean loss over all images of all steps; a loss or weight
    that is not finite is a `ClientDiverged`.
    """
    model.load_state_dict(task.state)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
    client = method.for_client(batches, indices, task.received, task.round)
    total = torch.zeros((), dtype=torch.float64, device=indices.device)  # on the device: a GPU is synchronised once
    for epoch in range(settings.local_epochs):
        generator = task.generator("batches", epoch)
        order = indices[torch.randperm(len(indices), generator=generator).to(indices.device)]
        parts = order.split(settings.batch_size)
        for part, x in zip(parts, client.views(batches, parts, generator, settings.augment), strict=True):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                loss = client.local_loss(model, x, batches.labels[part], part, task.state)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach().double() * len(part)
    if not all_finite((total, *model.parameters())):
        raise ClientDiverged(task.client, task.round)
    return total.item() / (settings.local_epochs * len(indices))


def client_step(
    model: CompactModel, batches: Batches, indices: Tensor, method: FedAvg, settings: FedSettings, task: Task
) -> ClientResult:
    """A client's whole round: `upload` from the global weights, then local training. Arguments as `train_client`."""
    model.load_state_dict(task.state)
    extra = method.upload(model, batches, indices, task.received, task.generator("upload"))
    loss = train_client(model, batches, indices, method, settings, task)
    return ClientResult({name: t.clone() for name, t in model.state_dict().items()}, extra, loss)


class Workers(ThreadPoolExecutor):
    """Threads with one model and one torch thread each, so that results are bit-equal for any number of workers.

    Torch 2.15's backward pass of a strided 1x1 convolution may crash on CPUs with two threads.
    """

    def __init__(self, model: CompactModel, count: int):
        self._model, self._local = model, threading.local()
        super().__init__(count, initializer=self._start)

    def _start(self) -> None:
        torch.set_num_threads(1)
        self._local.model = copy.deepcopy(self._model).to(memory_format=torch.channels_last)

    def start(self, task: Callable, *args: object) -> Future:
        """Run ``task(model, *args)`` on a worker, with that worker's model."""
        return self.submit(lambda: task(self._local.model, *args))

    def __exit__(self, *_: object) -> None:
        self.shutdown(cancel_futures=True)
