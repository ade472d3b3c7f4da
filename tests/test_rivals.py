"""Balanced softmax, FedYoYo, FedNPC, FedDF: against independent references, closed forms and invariants."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_images
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.strong import strong_views
from mllmfl_lite.federated import (
    BalancedSoftmax,
    FedAvg,
    FedDF,
    Federation,
    FedNPC,
    FedSettings,
    FedYoYo,
    run_federated,
)
from mllmfl_lite.federated.aggregate import weighted_mean
from mllmfl_lite.federated.clients import Task, train_client
from mllmfl_lite.federated.fedyoyo import effective_numbers, self_distillation
from mllmfl_lite.federated.server_steps import ensemble
from mllmfl_lite.models import build_model
from mllmfl_lite.repro import Execution, torch_generator

QUICK = FedSettings(rounds=2, clients_per_round=2, local_epochs=1, batch_size=16, lr=0.05)
WEB = make_images(50, seed=9)


def method_of(name, images):
    if name == "feddf":
        return FedDF(pool=WEB, model=build_model("resnet8", 3, width=4), steps=2, batch=8)
    return {
        "balanced_softmax": BalancedSoftmax.for_clients(images),
        "fedyoyo": FedYoYo(rising=2),
        "fednpc": FedNPC(vectors=100),
        "fedavg": FedAvg(),
    }[name]


def run(images, model, split, method, settings=QUICK, **execution):
    federation = Federation(images, split, make_images(30, seed=1))
    return run_federated(model, federation, method, settings, 0, Execution(device="cpu", **execution))


@pytest.mark.parametrize("name", ["balanced_softmax", "fedyoyo", "fednpc", "feddf"])
def test_neither_workers_nor_an_interruption_change_a_bit(name, images, model, split, tmp_path):
    whole = run(images, model, split, method_of(name, images), workers=1)
    run(images, model, split, method_of(name, images), replace(QUICK, rounds=1), folder=tmp_path)
    resumed = run(images, model, split, method_of(name, images), folder=tmp_path, workers=2)
    plain = run(images, model, split, FedAvg(), workers=1)
    assert all(torch.equal(t, resumed.deployed[key]) for key, t in whole.deployed.items())
    assert not all(torch.equal(t, plain.deployed[key]) for key, t in whole.deployed.items())


@pytest.mark.parametrize("name", ["fedavg", "fedyoyo"])
def test_strong_images_train_another_model(name, images, model, split):
    weak, strong = (
        run(images, model, split, method_of(name, images), replace(QUICK, augment=augment))
        for augment in ("weak", "strong")
    )
    same = all(torch.equal(t, strong.state[key]) for key, t in weak.state.items())
    assert same == (name == "fedyoyo"), "FedYoYo has both views always"


# ------------------------------------------------------------------------------------------------ balanced softmax


def test_balanced_softmax_is_a_softmax_weighted_by_counts(model, images):
    counts = torch.tensor([50.0, 8.0, 2.0])
    method = BalancedSoftmax(shares=counts / counts.sum())
    x, y = Batches(images).plain(torch.arange(12)), torch.from_numpy(images.labels[:12])
    odds = model(x).exp() * counts
    wanted = -(odds[range(12), y] / odds.sum(1)).log().mean()
    torch.testing.assert_close(method.local_loss(model, x, y, torch.arange(12), {}), wanted)


def test_equal_shares_change_nothing_and_empty_classes_are_finite(model, images):
    x, y = Batches(images).plain(torch.arange(12)), torch.from_numpy(images.labels[:12])
    even = BalancedSoftmax.for_clients(images)
    torch.testing.assert_close(even.local_loss(model, x, y, y, {}), cross_entropy(model(x), y))
    first = images.subset(np.flatnonzero(images.labels == 0))
    assert BalancedSoftmax.for_clients(first).shares.log().isfinite().all()
    with pytest.raises(TypeError, match="shares"):
        BalancedSoftmax()


# ------------------------------------------------------------------------------------------------ FedYoYo


def test_effective_numbers_count_directions():
    equal, others = torch.tensor([[1.0, 0, 0, 0]]).repeat(4, 1), torch.tensor([[-1.0, 0, 0, 0]]).repeat(4, 1)
    labels = torch.tensor([0] * 4 + [1] * 4)
    torch.testing.assert_close(effective_numbers(torch.cat([equal, others]), labels, 3), torch.tensor([1.0, 1.0, 0.0]))
    square = torch.tensor([[1.0, 0], [0, 1.0], [-1.0, 0], [0, -1.0]])  # mean zero: pairs at right angles or opposite
    assert effective_numbers(square, torch.tensor([0, 0, 1, 1]), 2).tolist() == pytest.approx([2.0, 2.0])
    assert effective_numbers(square, torch.zeros(4, dtype=torch.int64), 1).tolist() == [4.0], "at most their number"


def test_effective_numbers_are_one_over_the_mean_cosine():
    torch.manual_seed(0)
    features, labels = torch.randn(20, 6) + 2, torch.arange(20) % 2
    centred = features - features.mean(0)
    for c, found in enumerate(effective_numbers(features, labels, 2)):
        own = centred[labels == c]
        cosines = cosine_similarity(own[:, None], own[None], dim=2)
        assert found.item() == pytest.approx(min(10.0, max(1.0, 1 / cosines.mean().item())), rel=1e-4)


def test_the_prior_moves_to_the_clients_own_shares_and_the_weight_rises(images, model):
    batches, method = Batches(images), FedYoYo(rising=4)
    rows, start = torch.arange(9), torch.tensor([0.7, 0.2, 0.1])
    client = method.for_client(batches, rows[images.labels[:9] < 2], {"prior": start}, 2)
    assert client.weight == 2.0 and method.for_client(batches, rows, {"prior": start}, 40).weight == 4.0
    views = torch.stack([batches.plain(rows)] * 2)
    for _ in range(7):
        client.local_loss(model, views, batches.labels[rows], rows, {})
    own = torch.tensor([0.5, 0.5, 0.0])
    torch.testing.assert_close(client.prior, 0.9**7 * start + (1 - 0.9**7) * own)


def test_the_servers_prior_moves_to_the_sum_of_what_was_seen():
    uploads = [{"effective": torch.tensor([3.0, 1.0])}, {"effective": torch.tensor([3.0, 3.0])}]
    _, server = FedYoYo().server_update({}, {}, {"prior": torch.tensor([0.5, 0.5])}, uploads, None)
    torch.testing.assert_close(server["prior"], torch.tensor([0.51, 0.49]))


@pytest.mark.parametrize(
    "sent", [{}, {"effective": torch.ones(2)}, {"effective": -torch.ones(3)}, {"effective": torch.zeros(3)}]
)
def test_impossible_effective_numbers_are_refused(sent, model):
    with pytest.raises(ValueError, match="effective"):
        FedYoYo().check_upload(sent, model.state_dict())


def test_a_client_has_a_weak_and_a_strong_view(images):
    batches, parts = Batches(images), list(torch.arange(8).split(4))
    client = FedYoYo().for_client(batches, torch.arange(8), {"prior": torch.ones(3) / 3}, 1)
    generator = torch_generator(0, "x")
    for part, both in zip(parts, client.views(batches, parts, torch_generator(0, "x"), "weak"), strict=True):
        assert torch.equal(both[0], batches.augmented(part, generator))
        assert torch.equal(both[1], strong_views(batches, part, generator))


def test_the_weak_view_teaches_where_it_is_right_and_learns_nothing():
    torch.manual_seed(0)
    weak, strong = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    y = weak.argmax(1).clone()
    y[3:] = (y[3:] + 1) % 4
    loss = self_distillation(weak, strong, y, 1.5)
    q, p = ((t[:3].detach() / 1.5).softmax(1).numpy() for t in (weak, strong))
    assert loss.item() == pytest.approx(float((q * np.log(q / p)).sum(1).mean()), rel=1e-5)
    loss.backward()
    assert weak.grad is None and strong.grad[3:].abs().max() == 0 < strong.grad[:3].abs().max()
    assert self_distillation(weak, strong, (weak.argmax(1) + 1) % 4, 1.5).item() == 0


# ------------------------------------------------------------------------------------------------ FedNPC


def test_the_head_learns_noise_as_sgd_would(model):
    """torch's own layer, loss and optimiser, on the same vectors."""
    method, state = FedNPC(vectors=64, steps=5), model.state_dict()
    found = method.deployed(state, {})
    layer, generator = copy.deepcopy(model.head), torch_generator(0, "noise features")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        noise = torch.randn(64, layer.in_features, generator=generator)
        labels = torch.randint(3, (64,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(layer(noise), labels).backward()
        optimizer.step()
    torch.testing.assert_close(found["head.weight"], layer.weight.detach())
    torch.testing.assert_close(found["head.bias"], layer.bias.detach())
    assert all(torch.equal(found[name], t) for name, t in state.items() if not name.startswith("head."))


def test_noise_evens_a_bent_head(model):
    state = dict(model.state_dict())
    state["head.bias"] = torch.tensor([3.0, 0.0, -3.0])
    bias = FedNPC(vectors=2000, steps=60).deployed(state, {})["head.bias"]
    assert bias.max() - bias.min() < 2
    bias = FedNPC(vectors=2000).deployed(state, {})["head.bias"]
    assert bias[0] > bias[1] > bias[2] and bias.max() - bias.min() < 4


def test_too_many_steps_on_noise_turn_the_heads_signs():
    """A small head of ten classes is a damped spring: at 27 steps, momentum has carried it to the other side."""
    weight = 0.1 * torch.eye(10, 64)
    weight -= weight.mean(0)
    state = {"head.weight": weight, "head.bias": torch.zeros(10)}
    left = {}
    for steps in (9, 27):
        found = FedNPC(steps=steps).deployed(state, {})["head.weight"]
        left[steps] = ((found * weight).sum() / weight.square().sum()).item()
    assert left[9] > 0.5 and left[27] < 0, left


# ------------------------------------------------------------------------------------------------ FedDF


def states_of(count):
    """Models of clients that each lack a class, from one start."""
    network, images = build_model("resnet8", 3, width=4), make_images()
    batches, start, found = Batches(images), {n: t.clone() for n, t in network.state_dict().items()}, []
    for c in range(count):
        rows = torch.from_numpy(np.flatnonzero(images.labels != c))
        train_client(network, batches, rows, FedAvg(), replace(QUICK, local_epochs=40), Task(start, {}, 1, c))
        found.append({name: t.clone() for name, t in network.state_dict().items()})
    return found


def test_the_ensemble_is_the_mean_of_each_models_logits():
    states, x = states_of(3), Batches(WEB).plain(torch.arange(6))
    one_by_one = []
    for state in states:
        network = build_model("resnet8", 3, width=4).eval()
        network.load_state_dict(state)
        one_by_one.append(network(x).detach())
    wanted = sum(one_by_one) / 3
    torch.testing.assert_close(ensemble(build_model("resnet8", 3, width=4).eval(), states, x), wanted)


def test_distillation_brings_the_mean_nearer_to_the_ensemble():
    states, x = states_of(3), Batches(WEB).plain(torch.arange(50))
    method = FedDF(pool=WEB, model=build_model("resnet8", 3, width=4), steps=60, batch=16, lr=0.01)
    mean, distilled = weighted_mean(states, [1, 1, 1]), method.aggregate({}, states, [1, 1, 1], torch_generator(0, "x"))
    network = build_model("resnet8", 3, width=4)
    target = ensemble(copy.deepcopy(network).eval(), states, x).softmax(1)

    def distance(state):
        network.load_state_dict(state)
        network.eval()
        return nn.functional.kl_div(network(x).log_softmax(1), target, reduction="batchmean").item()

    assert distance(distilled) < 0.5 * distance(mean)


def test_the_pools_labels_are_not_used():
    states = states_of(2)
    other = replace(WEB, labels=np.zeros_like(WEB.labels))
    first, second = (
        FedDF(pool=pool, model=build_model("resnet8", 3, width=4), steps=2, batch=8).aggregate(
            {}, states, [1, 2], torch_generator(0, "x")
        )
        for pool in (WEB, other)
    )
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    with pytest.raises(TypeError, match="pool"):
        FedDF.for_clients(WEB)
