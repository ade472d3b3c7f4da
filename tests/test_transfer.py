"""Probes against calculus and toy data; finetuning against the rounds that it is made of."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from mllmfl_lite.data import load_images
from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.longtail import few_labels
from mllmfl_lite.federated import FedAvg, Federation, FedSettings, run_federated
from mllmfl_lite.measure.transfer import FINETUNING, best, embed, epochs_to, finetune, linear_probe
from mllmfl_lite.models import build_model, with_head


def clouds(n=90, spread=0.3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    return torch.tensor(np.eye(3)[labels] * 4 + spread * rng.normal(size=(n, 3)), dtype=torch.float32), labels


def test_a_probe_separates_what_a_plane_can_separate():
    (known, labels), (asked, truth) = clouds(seed=0), clouds(seed=1)
    guess = linear_probe(known, torch.from_numpy(labels), asked, 3)
    assert (guess.numpy() == truth).all()
    ring = torch.stack([torch.cos(torch.arange(60) * 0.1), torch.sin(torch.arange(60) * 0.1)], 1)
    radius = torch.arange(60) % 2
    both = ring * (1 + radius[:, None])  # a circle in a circle: no plane can
    assert (linear_probe(both, radius, both, 2) == radius).float().mean() < 0.8


def test_a_probe_does_not_care_for_the_features_scale():
    (known, labels), (asked, _) = clouds(spread=3.0), clouds(spread=3.0, seed=1)
    labels = torch.from_numpy(labels)
    scale, shift = torch.tensor([100.0, 0.01, 1.0]), torch.tensor([5.0, -3.0, 0.0])
    first = linear_probe(known, labels, asked, 3)
    assert torch.equal(first, linear_probe(known * scale + shift, labels, asked * scale + shift, 3))


def test_a_probe_is_the_minimum_of_its_loss():
    """Gradient descent in float64, written independently, ends with the same answers."""
    (known, labels), (asked, _) = clouds(30, 2.0), clouds(30, 2.0, 1)
    labels = torch.from_numpy(labels)
    x = ((known - known.mean(0)) / known.std(0)).double()
    w = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    for _ in range(3000):
        loss = cross_entropy(torch.cat([x, ones], 1) @ w, labels) + 1e-3 * w[:3].square().sum()
        (gradient,) = torch.autograd.grad(loss, w)
        w = (w - 0.5 * gradient).detach().requires_grad_(True)
    y = ((asked - known.mean(0)) / known.std(0)).double()
    expected = (torch.cat([y, ones], 1) @ w).argmax(1)
    assert torch.equal(linear_probe(known, labels, asked, 3), expected)


def test_a_heavy_decay_leaves_the_most_frequent_class():
    known, labels = clouds(30)
    labels = torch.from_numpy(np.where(np.arange(30) < 25, 1, labels))
    assert (linear_probe(known, labels, known, 3, decay=1e6) == 1).all()
    assert (linear_probe(known, labels, known, 3, decay=1e-6) != 1).any()


def test_a_probe_needs_a_label_each():
    with pytest.raises(ValueError, match="3 features, 2 labels"):
        linear_probe(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), torch.zeros(1, 2), 2)


def test_few_labels_are_as_many_of_each_class():
    labels = np.repeat(np.arange(10), 100)
    chosen = few_labels(labels, 10, 0.02, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [2] * 10
    assert not np.array_equal(chosen, few_labels(labels, 10, 0.02, seed=1))
    for share in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
            few_labels(labels, 10, share, 0)
    with pytest.raises(ValueError, match="is 5, less than one for each of 10 classes"):
        few_labels(labels, 10, 0.005, 0)


def test_a_new_head_leaves_the_body_alone():
    model = build_model("resnet8", 10, width=2)
    fresh = with_head(model, 100, seed=3)
    assert fresh.head.out_features == 100 and model.head.out_features == 10
    pairs = zip(model.body.parameters(), fresh.body.parameters(), strict=True)
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)
    assert torch.equal(fresh.head.weight, with_head(model, 100, seed=3).head.weight)
    assert not torch.equal(fresh.head.weight, with_head(model, 100, seed=4).head.weight)


def test_features_are_the_models_own():
    model, data = build_model("resnet8", 10, width=2).eval(), load_images("cifar10_mini", "test").subset(np.arange(300))
    x = Batches(data).plain(torch.arange(300))
    torch.testing.assert_close(embed(model, data), model.features(x), atol=1e-5, rtol=1e-5)


def test_finetuning_is_one_client_and_its_epochs():
    train = load_images("cifar10_mini", "train")
    test = load_images("cifar10_mini", "test").subset(np.arange(0, 2000, 40))
    own, model = few_labels(train.labels, 10, 0.01, 0), build_model("resnet8", 10, width=2)
    run = finetune(model, train, own, test, replace(FINETUNING, rounds=3, lr=0.1, batch_size=16, eval_every=2), 4)
    settings = FedSettings(3, 1, 1, 16, 0.1, 2, 1)
    rounds = run_federated(model, Federation(train, [own], test), FedAvg(), settings, 4)
    assert all(torch.equal(run.state[name], rounds.state[name]) for name in run.state)
    assert [record["round"] for record in run.history if record["metrics"]] == [2, 3]


def test_best_and_epochs_to_a_target():
    history = [
        {"round": i, "metrics": None if top1 is None else {"top1": top1}}
        for i, top1 in enumerate([0.1, None, 0.4, 0.3], 1)
    ]
    assert best(history) == 0.4
    assert [epochs_to(history, target) for target in (0.05, 0.2, 0.4, 0.41)] == [1, 3, 3, None]
