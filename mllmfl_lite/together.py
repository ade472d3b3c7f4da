"""A round's clients trained side by side: their models are one stack, and a step is one call for all of them::

    run_federated(model, train, split, test, FedAvg(), settings, device="cuda", together=Together())

A GPU is done with a small client's step before Python has asked for the next, so one client at a time leaves it idle.
Here `torch.func.vmap` runs the same step for K clients at once, each with its own weights, BatchNorm statistics and
batch. Every client sees the batches and augmentations of `federated.train_client`, drawn in the same way, so the result
is the same but for the order in which floats are added.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from mllmfl_lite.batches import Batches
from mllmfl_lite.data import ImageSet
from mllmfl_lite.federated import Ask, ClientDiverged, ClientResult, FedAvg, FedSettings, State
from mllmfl_lite.files import ImageFiles
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import torch_generator
from mllmfl_lite.settings import check_whole


@dataclass(frozen=True)
class Together:
    """How clients are trained side by side. It decides the speed and the last bits only.

    Attributes:
        at_once: most clients in a stack, whose memory grows with it; None takes all that a round draws. With 1 and
            `compile`, clients are trained one by one, and each step is compiled.
        compile: keywords for `torch.compile`, e.g. ``{"mode": "reduce-overhead"}``, which on a GPU records a step once
            and replays it (CUDA graphs); None leaves it out. Only steps of a whole stack on whole batches are compiled:
            there is one shape, so it is done once a run, in a minute or so.
    """

    at_once: int | None = None
    compile: dict | None = None

    def __post_init__(self) -> None:
        if self.at_once is not None:
            check_whole(self, "at_once")


def settle(wanted: bool | Together, train: ImageSet, ask: Ask | None = None) -> Together | None:
    """How the clients of a run are trained side by side; None where they are not.

    Args:
        wanted: True, False, or the details.
        train: the clients' images.
        ask: how clients are asked elsewhere, if they are.

    Raises:
        ValueError: another value, or it is asked for and cannot be.
    """
    if wanted is False:
        return None
    if wanted is not True and not isinstance(wanted, Together):
        raise ValueError(f"together must be True, False or a Together(...); got {wanted!r}")
    in_files = isinstance(train.images, ImageFiles)
    if in_files or ask is not None:
        where = "holding pictures in files" if in_files else "asked elsewhere"
        raise ValueError(f"clients {where} cannot be trained together; set together to False")
    return Together() if wanted is True else wanted


class ClientStack(nn.Module):
    """The models of K clients as one, with a dimension K before each weight, and the rounds' way to ask them.

    It is a module so that torch.compile knows its tensors to stay where they are: a recorded step writes into them.
    CUDA graphs may belong to a thread, so it works in the caller's.

    Args:
        model: any model of the right shape, on the device; not changed.
        batches: all training images, in memory.
        split: each client's indices into them.
        method: its `local_loss` must be plain torch on the model that it is given: no `item`, no branch on a value.
        settings: E, batch size, step size, precision, seed; and the clients a round, where `how` does not limit them.
        how: the details.
    """

    def __init__(
        self,
        model: CompactModel,
        batches: Batches,
        split: list[Tensor],
        method: FedAvg,
        settings: FedSettings,
        how: Together,
    ):
        super().__init__()
        self.batches, self.split, self.settings = batches, [own.cpu() for own in split], settings
        self.size = min(how.at_once or settings.clients_per_round, settings.clients_per_round)
        self.one = _LocalLoss(copy.deepcopy(model).to(memory_format=torch.channels_last), method)
        self.anchor = self.one.model.state_dict()  # the same tensors, whatever is loaded into them
        self.stack = copy.deepcopy(self.one.model).requires_grad_(False)
        for tensor in (*self.stack.parameters(), *self.stack.buffers()):
            many = tensor.data.expand(self.size, *tensor.shape)
            tensor.data = many.clone(memory_format=torch.contiguous_format)
        if settings.precision == "bfloat16":
            _keep_norms_in_float32(self.one.model)
        device = batches.labels.device
        self.register_buffer("total", torch.zeros(self.size, dtype=torch.float64, device=device))  # of losses
        self._whole_step = self._step
        if how.compile is not None:
            torch.compiler.reset()  # stacks share this code, of which torch would compile the first eight only
            self._whole_step = torch.compile(self._step, dynamic=False, **how.compile)

    def ask(
        self, state: State, received: State, round_: int, chosen: list[int]
    ) -> tuple[dict[int, ClientResult], dict[int, str]]:
        """`run_federated`'s `ask`: as `federated.client_step` for each, what is trained is trained together.

        Raises:
            ClientDiverged: names the smallest of the clients in the stack that were found so at the end of an epoch.
        """
        beside = {client: self._upload(state, received, round_, client) for client in chosen}
        largest_first = sorted(chosen, key=lambda client: -len(self.split[client]))
        results = {}
        for first in range(0, len(chosen), self.size):
            clients = largest_first[first : first + self.size]
            for client, trained, loss in zip(clients, *self._train(state, round_, clients), strict=True):
                results[client] = ClientResult(trained, beside[client], loss)
        return results, {}

    def _upload(self, state: State, received: State, round_: int, client: int) -> State:
        self.one.model.load_state_dict(state)
        generator = torch_generator(self.settings.seed, "upload", round_, client)
        own = self.split[client].to(self.total.device)
        return self.one.method.upload(self.one.model, self.batches, own, received, generator)

    def _train(self, state: State, round_: int, clients: list[int]) -> tuple[list[State], list[float]]:
        """Local training of clients in falling order of size: their weights and mean losses."""
        self.one.model.load_state_dict(state)
        self.one.train()
        self.total.zero_()
        for name, tensor in self.stack.state_dict().items():
            tensor.copy_(self.anchor[name])
        epochs, sizes = self.settings.local_epochs, [len(self.split[client]) for client in clients]
        for epoch in range(epochs):
            drawn = self._draw(round_, clients, epoch)
            for start in range(0, sizes[0], self.settings.batch_size):
                for first, last, length in equal_lengths(sizes, start, self.settings.batch_size):
                    part = drawn[:, first:last, start : start + length]
                    self._pick_step(first, last, length)(first, last, *self._look_up(part))
            self._check(self.total.isfinite(), round_, clients)
        finite = [p.flatten(1).isfinite().all(1) for p in self.stack.parameters()]
        self._check(torch.stack(finite).all(0), round_, clients)
        apart = {name: tensor.clone().unbind() for name, tensor in self.stack.state_dict().items()}
        states = [{name: tensors[place] for name, tensors in apart.items()} for place in range(len(clients))]
        return states, [total / (epochs * size) for total, size in zip(self.total.tolist(), sizes, strict=False)]

    def _draw(self, round_: int, clients: list[int], epoch: int) -> Tensor:
        """An epoch's images and their chances, int64 (4, k, n) for the largest client's n; the others end in zeros."""
        drawn = torch.zeros(4, len(clients), len(self.split[clients[0]]), dtype=torch.int64)
        for place, client in enumerate(clients):
            own = self.split[client]
            generator = torch_generator(self.settings.seed, "batches", round_, client, epoch)
            drawn[0, place, : len(own)] = own[torch.randperm(len(own), generator=generator)]
            lengths = [len(part) for part in own.split(self.settings.batch_size)]
            drawn[1:, place, : len(own)] = self.batches.chances(lengths, generator)
        return drawn.to(self.total.device)  # all at once: a GPU is waited for once an epoch

    def _look_up(self, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What was drawn for a step (4, k, B) -> images (k, B, 3, H, W), labels (k, B) and indices (k, B)."""
        rows = drawn[0].contiguous()  # one layout, whatever the round's largest client
        return self.batches.cut(rows, drawn[1:]), self.batches.labels[rows], rows

    def _pick_step(self, first: int, last: int, length: int) -> Callable[..., None]:
        whole = (last - first, length) == (self.size, self.settings.batch_size)
        return self._whole_step if whole else self._step

    def _step(self, first: int, last: int, x: Tensor, y: Tensor, rows: Tensor) -> None:
        """One step of plain SGD, in place, for the clients at `first` to `last` of the stack; adds to their losses."""
        weights = {name: p[first:last] for name, p in self.stack.named_parameters()}
        statistics = {name: b[first:last] for name, b in self.stack.named_buffers()}
        gradients, losses = vmap(grad_and_value(self._loss))(weights, statistics, x, y, rows)
        torch._foreach_add_(list(weights.values()), [gradients[name] for name in weights], alpha=-self.settings.lr)
        self.total[first:last] += losses.double() * x.shape[1]

    def _loss(self, weights: State, statistics: State, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """One client's loss; its `statistics` are brought up to date in place."""
        own = {f"model.{name}": tensor for name, tensor in {**weights, **statistics}.items()}
        rough = self.settings.precision == "bfloat16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=rough, cache_enabled=False):
            return functional_call(self.one, own, (x, y, rows, self.anchor))

    def _check(self, finite: Tensor, round_: int, clients: list[int]) -> None:
        lost = [client for client, fine in zip(clients, finite.tolist(), strict=False) if not fine]
        if lost:
            raise ClientDiverged(min(lost), round_)


def equal_lengths(sizes: list[int], start: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Neighbours whose batches that begin at image `start` are equally long: (first, last, length) for each such run.

    Args:
        sizes: the clients' numbers of images, falling: so that those who are done come last, and no run is torn.
        start: images that an epoch has seen of each.
        most: the batch size.
    """
    first = 0
    for length, run in groupby(min(most, size - start) for size in sizes if size > start):
        last = first + len(list(run))
        yield first, last, length
        first = last


class _LocalLoss(nn.Module):
    """A method's loss as a module's forward pass, so that `functional_call` can lend it any weights."""

    def __init__(self, model: CompactModel, method: FedAvg):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor, y: Tensor, rows: Tensor, anchor: State) -> Tensor:
        return self.method.local_loss(self.model, x, y, rows, anchor)


def _keep_norms_in_float32(model: nn.Module) -> None:
    """Give BatchNorm float32 and round what it gives to what it was given, as it does by itself outside of vmap.

    vmap's BatchNorm does not take numbers of one type and statistics of another (torch 2.14).
    """
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.forward = lambda x, forward=norm.forward: forward(x.float()).to(x.dtype)
