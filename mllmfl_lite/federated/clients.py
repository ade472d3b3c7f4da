"""Federated rounds: local training, the weighted mean, and the loop around them::

    result = run_federated(model, train, split, test, FedAvg(), FedSettings(rounds=20))

A method is a client step, what travels beside the weights, and a server step: `FedAvg` is the plainest, and whoever
inherits from it changes what differs (`FedProx` and `FedAvgM` here, others in `baselines` and `align`). Everything else
is shared: the same clients are drawn and the same batches shown to every method.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.federated.methods import ClientDiverged, FedAvg, FedSettings, State
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import all_finite, torch_generator


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
