"""FedNPC: a head that the long tail bent is repaired with noise alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mllmfl_lite.federated.aggregate import State
from mllmfl_lite.federated.creff import HEAD, head_gradients
from mllmfl_lite.federated.methods import FedAvg
from mllmfl_lite.repro import torch_generator


@dataclass(frozen=True)
class FedNPC(FedAvg):
    """FedAvg whose tested model has a head that was trained further on Gaussian noise with random labels (2026).

    The server uses no image. Rounds go on with the averaged head. Our reading: a step is one pass over all vectors;
    the number of steps is fixed beforehand, not chosen on test images.
    """

    steps: int = 27  #: of SGD; 49 for CIFAR-100
    vectors: int = 10_000
    lr: float = 0.1
    momentum: float = 0.9

    def deployed(self, state: State, server_state: State) -> State:
        """The averaged model with the repaired head."""
        head = torch.cat([state[HEAD[0]], state[HEAD[1]][:, None]], 1)
        classes, generator = len(head), torch_generator(0, "noise features")
        noise = torch.randn(self.vectors, head.shape[1] - 1, generator=generator).to(head)
        labels = torch.randint(classes, (self.vectors,), generator=generator).to(head.device)
        velocity = torch.zeros_like(head)
        for _ in range(self.steps):
            velocity = self.momentum * velocity + head_gradients(noise, labels, head[:, :-1], head[:, -1])
            head = head - self.lr * velocity
        return {**state, HEAD[0]: head[:, :-1].clone(), HEAD[1]: head[:, -1].clone()}
