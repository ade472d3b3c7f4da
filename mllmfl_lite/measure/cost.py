"""What one round costs one client, measured on its own step: bytes, operations, memory."""

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mllmfl_lite.data.batches import Batches, open_batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.federated import FedAvg, FedSettings, State, Task, train_client
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import torch_generator


@dataclass(frozen=True)
class ClientCost:
    """What a drawn client spends in one round."""

    bytes_up: int  #: sent, weights and the method's upload
    bytes_down: int  #: received
    flops: int  #: floating-point operations; a multiplication and an addition are two
    #: bytes at the peak, weights received and trained, what training allocates, and CLIP's weights if the method needs
    #: CLIP; images are not counted
    memory: int


def client_cost(
    method: FedAvg, model: CompactModel, train: ImageSet, indices: np.ndarray, settings: FedSettings
) -> ClientCost:
    """Run one client's step and count (torch's counter). One epoch is run and counted `local_epochs` times.

    A CLIP is counted once for each of the client's images; a client that caches its answers pays less later.
    """
    model, batches = copy.deepcopy(model), cast(Batches, open_batches(train))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    received = method.broadcast(method.init_server_state(parameters, torch_generator(0, "memory")))
    rows, once = torch.from_numpy(np.ascontiguousarray(indices)), replace(settings, local_epochs=1)
    task = Task(state, received, round=1, client=0)
    with PeakMemory() as memory:
        with FlopCounterMode(display=False) as before:
            extra = method.upload(model, batches, rows, received, task.generator("upload"))
        with FlopCounterMode(display=False) as epoch:
            train_client(model, batches, rows, method, once, task)
    flops = before.get_total_flops() + settings.local_epochs * epoch.get_total_flops()
    return ClientCost(
        bytes_up=size(state) + size(extra),
        bytes_down=size(state) + size(received),
        flops=flops + method.clip_flops * len(indices),
        memory=2 * size(state) + size(received) + memory.peak + method.clip_bytes,
    )


def size(tensors: State) -> int:
    """Bytes of all tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


class PeakMemory(TorchDispatchMode):
    """Context that follows what torch allocates in this thread; `peak` is the most bytes held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[int, int] = {}  # bytes by storage

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if storage is not None and storage._cdata not in given | self._held.keys():
                self._held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._held.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._held.values()))
        return out
