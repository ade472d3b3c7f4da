from dataclasses import replace

import numpy as np
import torch

from mllmfl_lite.federated.clip2fl import CLIP2FL
from mllmfl_lite.federated.creff import CReFF
from mllmfl_lite.federated.methods import FedAvg, FedAvgM, FedProx, FedSettings
from mllmfl_lite.measure.cost import PeakMemory, client_cost, size

SETTINGS = FedSettings(rounds=1, clients_per_round=1, local_epochs=2, batch_size=8)
OWN = np.arange(16)


def test_the_peak_is_what_is_held_at_once():
    with PeakMemory() as memory:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        del a
        c = b * 2  # 8,000 again
        c.add_(1).view(10, 100)  # in place and views: nothing new
    assert memory.peak == 8000 and float(c[0]) == 3.0
    with PeakMemory() as memory:
        [torch.zeros(1000) for _ in range(5)]
    assert memory.peak == 20000


def test_what_autograd_keeps_is_held():
    x = torch.ones(1000, requires_grad=True)
    with PeakMemory() as memory:
        x.exp().sin().sum().backward()
    assert 3 * 4000 <= memory.peak <= 6 * 4000


def test_fedavg_by_hand(images, model):
    """Up and down the whole state; operations of a convolution: 2 x outputs x inputs a output, three times to train."""
    cost = client_cost(FedAvg(), model, images, OWN, SETTINGS)
    state = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert cost.bytes_up == cost.bytes_down == state
    pixels = images.images.shape[1] ** 2
    places = {"body.0": pixels, "body.3": pixels, "body.4": pixels // 4, "body.5": pixels // 16}
    forward = (
        sum(
            2 * m.weight.numel() * next(n for layer, n in places.items() if name.startswith(layer))
            for name, m in model.named_modules()
            if isinstance(m, torch.nn.Conv2d)
        )
        + 2 * model.head.weight.numel()
    )
    first = 2 * model.body[0].weight.numel() * pixels  # no gradient goes into the picture
    assert cost.flops == 2 * 16 * (3 * forward - first)
    assert cost.memory > 2 * state


def test_operations_go_with_epochs_and_images(images, model):
    one = client_cost(FedAvg(), model, images, OWN, replace(SETTINGS, local_epochs=1)).flops
    assert client_cost(FedAvg(), model, images, OWN, replace(SETTINGS, local_epochs=10)).flops == 10 * one
    assert client_cost(FedAvg(), model, images, OWN[:8], replace(SETTINGS, local_epochs=1)).flops == one / 2


def test_what_the_methods_add(images, model):
    plain, prox, momentum, creff = (
        client_cost(m, model, images, OWN, SETTINGS) for m in (FedAvg(), FedProx(), FedAvgM(), CReFF(repeats=2))
    )
    assert (prox.bytes_up, momentum) == (plain.bytes_up, plain)
    classes, head = len(set(images.labels[OWN])), 3 * (model.num_features + 1)
    assert creff.bytes_up - plain.bytes_up == classes * head * 4 + classes * 8  # gradients, and which classes
    assert creff.bytes_down - plain.bytes_down == head * 4
    assert creff.flops > plain.flops

    words = torch.eye(3, 5)
    numbers = {"clip_flops": 1000, "clip_bytes": 10**7, "repeats": 2}
    clip = CLIP2FL(clip_logits=torch.zeros(len(images), 3), text_features=words, **numbers)
    asked = client_cost(clip, model, images, OWN, SETTINGS)
    assert asked.flops - creff.flops == 16 * 1000 and asked.bytes_up == creff.bytes_up
    assert asked.memory - creff.memory >= 10**7


def test_the_model_is_left_alone(images, model):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    client_cost(CReFF(repeats=1), model, images, OWN, SETTINGS)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items()) and size({}) == 0
