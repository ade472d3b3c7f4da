"""What one round costs one client, by the same meter for every method::

    cost = client_cost(method, model, train, own, settings)
    cost.bytes_up, cost.bytes_down, cost.flops, cost.memory

Nothing is estimated from formulas: the client's own step is run, torch counts its operations, and every tensor that it
makes is watched until it is freed.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.federated.clients import train_client
from mllmfl_lite.federated.methods import FedAvg, FedSettings, State
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import torch_generator


@dataclass(frozen=True)
class ClientCost:
    """What a drawn client spends in one round.

    Attributes:
        bytes_up: sent to the server: weights, and what the method sends beside them.
        bytes_down: received.
        flops: floating-point operations of its whole step, multiplications and additions counted as two.
        memory: bytes held at the peak: the model's weights as received and as trained, what training holds beside
            them, and CLIP's weights where a method needs CLIP. The images are not counted.
    """

    bytes_up: int
    bytes_down: int
    flops: int
    memory: int


def client_cost(
    method: FedAvg, model: CompactModel, train: ImageSet, own: np.ndarray, settings: FedSettings
) -> ClientCost:
    """Run one client's step under the meter.

    Training is run for one epoch, and its operations are taken `local_epochs` times. CLIP, where a method asks it, is
    counted once for each of the client's images: a client that keeps its answers from earlier rounds pays less.

    Args:
        method: whose costs.
        model: the global model.
        train: all clients' images.
        own: the client's indices into `train`.
        settings: local training.
    """
    model, batches = copy.deepcopy(model), open_batches(train)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    received = method.broadcast(method.init_memory(parameters, torch_generator(settings.seed, "memory")))
    rows, once = torch.from_numpy(np.ascontiguousarray(own)), replace(settings, local_epochs=1)
    with PeakMemory() as memory:
        with FlopCounterMode(display=False) as before:
            beside = method.upload(model, batches, rows, received, torch_generator(settings.seed, "upload", 1, 0))
        with FlopCounterMode(display=False) as epoch:
            train_client(model, batches, rows, method, once, state, 1, 0)
    return ClientCost(
        bytes_up=size(state) + size(beside),
        bytes_down=size(state) + size(received),
        flops=before.get_total_flops() + settings.local_epochs * epoch.get_total_flops() + method.clip_flops * len(own),
        memory=2 * size(state) + size(received) + memory.peak + method.clip_bytes,
    )


def size(tensors: State) -> int:
    """Bytes of all tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


class PeakMemory(TorchDispatchMode):
    """While entered, watches what torch allocates in this thread.

    Attributes:
        peak: the most bytes held at once of tensors made since it was entered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._seen | given:
                self._watch(leaf.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, length = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self._held += length
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._freed, key, length)

    def _freed(self, key: int, length: int) -> None:
        self._seen.discard(key)
        self._held -= length
