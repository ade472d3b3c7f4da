"""Aggregation that bears liars: against numpy, closed forms, invariants, and lies up to and beyond the bound."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_images
from controls import corner, poisoned, send

from mllmfl_lite.federated import (
    METHODS,
    ClippedNorm,
    CoordinateMedian,
    FedAvg,
    Federation,
    FedSettings,
    TrimmedMean,
    run_federated,
)
from mllmfl_lite.federated.aggregate import weighted_mean
from mllmfl_lite.federated.robust import clipped_mean, most_liars, trimmed_mean
from mllmfl_lite.models import build_model
from mllmfl_lite.repro import Execution, torch_generator
from mllmfl_lite.runs import Experiment
from mllmfl_lite.runs.parts import make_method

QUICK = FedSettings(rounds=2, clients_per_round=4, local_epochs=1, batch_size=16, lr=0.05)
RULES = {"clipped_norm": ClippedNorm(), "median": CoordinateMedian(), "trimmed_mean": TrimmedMean(1)}
every_rule = pytest.mark.parametrize("rule", RULES)


def states_of(count, seed=0):
    """States as a model has them: weights, BatchNorm statistics, a counter."""
    rng = np.random.default_rng(seed)
    return [
        {
            "conv.weight": torch.from_numpy(rng.normal(size=(4, 3)).astype(np.float32)),
            "bn.running_mean": torch.from_numpy(rng.normal(size=4).astype(np.float32)),
            "bn.running_var": torch.from_numpy(rng.gamma(2, size=4).astype(np.float32)),
            "bn.num_batches_tracked": torch.tensor(int(rng.integers(1, 50))),
        }
        for _ in range(count)
    ]


def combine(rule, states, start, sizes=None):
    """What the server makes of the clients' states."""
    method, generator = RULES[rule], torch_generator(0, "server")
    mean = method.aggregate(start, states, sizes or [1] * len(states), generator)
    return method.server_update(start, mean, {}, [], generator)[0]


def stacked(states, name):
    return np.stack([state[name].numpy() for state in states]).astype(np.float64)


# ------------------------------------------------------------------------------------------------ references


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_median_is_numpys(count):
    states = states_of(count)
    found = combine("median", states, states[0])
    for name in ("conv.weight", "bn.running_mean", "bn.running_var"):
        np.testing.assert_allclose(found[name], np.median(stacked(states, name), axis=0), rtol=1e-6)


@pytest.mark.parametrize(("count", "cut"), [(3, 1), (8, 0), (8, 2), (8, 3)])
def test_the_trimmed_mean_is_numpys(count, cut):
    states = states_of(count)
    found = trimmed_mean(states, cut)
    for name in ("conv.weight", "bn.running_mean"):
        kept = np.sort(stacked(states, name), axis=0)[cut : count - cut]
        np.testing.assert_allclose(found[name], kept.mean(0), rtol=1e-6, atol=1e-7)


def test_clipping_in_closed_form():
    """Updates of length 5, 10 and 50 along (3, 4): the median is 10, so the last one counts as 10."""
    start = {"w": torch.tensor([1.0, -1.0])}
    states = [{"w": start["w"] + factor * torch.tensor([3.0, 4.0])} for factor in (1, 2, 10)]
    expected = start["w"] + torch.tensor([3.0, 4.0]) * (1 + 2 + 2) / 3
    torch.testing.assert_close(clipped_mean(states, [1, 1, 1], start, 1.0)["w"], expected)
    expected = start["w"] + torch.tensor([3.0, 4.0]) * (1 * 1 + 1 * 1 + 2 * 1) / 4
    torch.testing.assert_close(clipped_mean(states, [1, 1, 2], start, 0.5)["w"], expected)


def test_clipping_far_away_is_the_weighted_mean():
    start, states = states_of(1, seed=9)[0], states_of(5)
    found, plain = clipped_mean(states, [3, 1, 4, 1, 5], start, 1e6), weighted_mean(states, [3, 1, 4, 1, 5])
    torch.testing.assert_close(found, plain)


def test_clients_that_do_not_move_leave_the_weights_as_they_are():
    start = states_of(1)[0]
    assert all(torch.equal(t, start[name]) for name, t in clipped_mean([dict(start)] * 3, [1] * 3, start, 1.0).items())


# ------------------------------------------------------------------------------------------------ invariants


@every_rule
def test_the_order_of_clients_changes_nothing(rule):
    start, states = states_of(1, seed=9)[0], states_of(7)
    forward, back = combine(rule, states, start), combine(rule, states[::-1], start)
    for name, tensor in forward.items():
        torch.testing.assert_close(tensor, back[name], rtol=1e-6, atol=1e-7)
        assert rule == "clipped_norm" or torch.equal(tensor, back[name])


@every_rule
def test_moving_all_moves_the_result(rule):
    start, states = states_of(1, seed=9)[0], states_of(6)
    by = {name: t + 2.5 if t.is_floating_point() else t for name, t in start.items()}
    moved = [{name: t + 2.5 if t.is_floating_point() else t for name, t in state.items()} for state in states]
    found, shifted = combine(rule, states, start), combine(rule, moved, by)
    for name in ("conv.weight", "bn.running_mean"):
        torch.testing.assert_close(found[name] + 2.5, shifted[name], rtol=1e-5, atol=1e-5)


@every_rule
def test_statistics_stay_possible_and_counters_whole(rule):
    start, states = states_of(1, seed=9)[0], states_of(8)
    found = combine(rule, states, start)
    assert found.keys() == start.keys()
    assert all(t.dtype == start[name].dtype and t.shape == start[name].shape for name, t in found.items())
    assert (found["bn.running_var"] >= 0).all()
    counts = [state["bn.num_batches_tracked"].item() for state in states]
    assert min(counts) <= found["bn.num_batches_tracked"] <= max(counts)


def test_wild_statistics_do_not_shorten_honest_weights():
    """Weights and statistics have lengths of their own."""
    start, states = states_of(1, seed=9)[0], states_of(5)
    wild = [*states[:4], {**states[4], "bn.running_mean": states[4]["bn.running_mean"] + 1e6}]
    ours, theirs = clipped_mean(states, [1] * 5, start, 1.0), clipped_mean(wild, [1] * 5, start, 1.0)
    assert torch.equal(ours["conv.weight"], theirs["conv.weight"])
    assert (theirs["bn.running_mean"] - start["bn.running_mean"]).norm() < 10


@every_rule
def test_neither_workers_nor_an_interruption_change_a_bit(rule, images, model, split, tmp_path):
    def run(method, settings=QUICK, **execution):
        federation = Federation(images, split, make_images(30, seed=1))
        return run_federated(model, federation, method, settings, 0, Execution(device="cpu", **execution)).state

    whole = run(RULES[rule], workers=1)
    run(RULES[rule], replace(QUICK, rounds=1), folder=tmp_path)
    resumed, plain = run(RULES[rule], workers=3, folder=tmp_path), run(FedAvg(), workers=1)
    assert all(torch.equal(t, resumed[name]) for name, t in whole.items())
    assert not all(torch.equal(t, plain[name]) for name, t in whole.items())


# ------------------------------------------------------------------------------------------------ liars


@pytest.mark.parametrize("clients", [3, 4, 7, 8])
def test_up_to_the_bound_a_lie_stays_among_the_honest_and_beyond_it_wins(clients):
    honest, lie = [{"w": torch.tensor([float(k)])} for k in range(clients)], {"w": torch.tensor([1e6])}
    bound = most_liars(clients)
    assert 2 * bound < clients <= 2 * bound + 2
    for cut in range(bound + 1):
        borne = trimmed_mean([*honest[cut:], *[lie] * cut], cut)["w"]
        assert cut <= borne <= clients - 1
    median = CoordinateMedian().aggregate({}, [*honest[bound:], *[lie] * bound], [1] * clients, torch.Generator())["w"]
    assert bound <= median <= clients - 1
    broken = CoordinateMedian().aggregate(
        {}, [*honest[bound + 1 :], *[lie] * (bound + 1)], [1] * clients, torch.Generator()
    )
    assert broken["w"] > 1e5


def test_a_long_lie_is_no_longer_than_an_honest_update():
    start, states = {"w": torch.zeros(4)}, [{"w": torch.ones(4)}] * 5
    found = clipped_mean([*states, {"w": torch.full((4,), -1e6)}, {"w": torch.full((4,), -1e6)}], [1] * 7, start, 1.0)
    torch.testing.assert_close(found["w"], torch.full((4,), 3 / 7))


@pytest.mark.parametrize(
    ("clients", "liars", "says"),
    [
        (8, 4, "among 8 clients at most 3 may lie, fewer than half; the rule is asked to bear 4"),
        (2, 1, "among 2 clients at most 0 may lie"),
    ],
)
def test_more_liars_than_the_rule_bears_are_refused_with_the_bound(clients, liars, says):
    with pytest.raises(ValueError, match=says):
        TrimmedMean(liars).aggregate({}, states_of(clients), [1] * clients, torch.Generator())


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf")])
def test_clipping_at_zero_is_refused(factor):
    with pytest.raises(ValueError, match=r"above 0; got .* At 0 no client would move the model"):
        ClippedNorm(factor)


@pytest.mark.parametrize("liars", [-1, 1.5, True])
def test_a_number_of_liars_is_whole(liars):
    with pytest.raises(ValueError, match="liars is a whole number of clients, at least 0"):
        TrimmedMean(liars)


@every_rule
def test_an_experiment_can_name_the_rule(rule, images):
    options = {"trimmed_mean": {"liars": 2}, "clipped_norm": {"factor": 2.0}}.get(rule, {})
    experiment = Experiment("cifar10_mini", method=rule, method_options=options)
    assert make_method(experiment, images) == METHODS[rule](**options)
    assert METHODS[rule]().identity()["name"] == type(RULES[rule]).__name__


# ------------------------------------------------------------------------------------------------ the chapter's lies


def test_what_liars_send():
    model = build_model("resnet8", 3, width=4).state_dict()
    start = {name: t.clone() for name, t in model.items()}
    trained = {name: t + 1 for name, t in model.items()}
    for lie, moved in (("", 1), ("flip", 1), ("sign", -1), ("boost", -5), ("door", 4)):
        sent = send(lie, trained, start)
        torch.testing.assert_close(sent["head.bias"] - start["head.bias"], torch.full((3,), float(moved)))
        statistics = next(name for name in start if "running_var" in name)
        expected = start[statistics] + 4 if lie == "door" else trained[statistics]
        assert torch.equal(sent[statistics], expected)
    assert all(torch.equal(t, start[name]) for name, t in send("silent", trained, start).items())


def test_what_liars_learn_from():
    images = replace(make_images(12), names=("ship", "cat", "dog"))
    assert (poisoned(images, "flip").labels == 2 - images.labels).all() and poisoned(images, "sign") is images
    marked = poisoned(images, "door")
    assert (marked.labels[12:] == 0).all() and (marked.labels[:12] == images.labels).all()
    assert (marked.images[12:] == corner(images.images)).all() and (marked.images[12:, -6:, -6:] == 255).all()
    assert (marked.images[:12] == images.images).all() and not (images.images[:, -6:, -6:] == 255).all()
    assert (marked.images[12:, :-6] == images.images[:, :-6]).all()
