"""One client in eight lies. Either the record names it with the reason, and the run is the one without it, bit for bit;
or the lie does no harm; or the test says that it is not caught: what is no larger than an honest update needs another
`aggregate` than the mean."""

import functools
import re
from dataclasses import replace

import pytest
import torch
from conftest import make_images

from mllmfl_lite.data import partition
from mllmfl_lite.data.batches import Batches
from mllmfl_lite.federated import CReFF, FedAvg, Federation, FedSettings, Task, client_step, run_federated
from mllmfl_lite.federated.aggregate import NORM_FACTOR, outliers
from mllmfl_lite.models import build_model
from mllmfl_lite.repro import sha256_arrays

LIAR, CLIENTS = 3, 8
SETTINGS = FedSettings(rounds=3, clients_per_round=CLIENTS, local_epochs=4, batch_size=8, lr=0.05, report_rounds=1)
FEDAVG, CREFF = FedAvg(), CReFF(per_class=5, match_steps=5, head_epochs=3, repeats=1)


@functools.cache
def world():
    train = make_images(320)
    split = partition.dirichlet_equal(train.labels, CLIENTS, 1.0, seed=0)
    model = build_model("resnet8", 3, width=8).to(memory_format=torch.channels_last)
    return Federation(train, split, make_images(300, seed=1)), model, Batches(train)


RESULTS = {}  # most lies lead to the same weights, so to the same honest results


def honest(method, state, received, round_, client):
    key = (method, round_, client, sha256_arrays(t.numpy() for t in (*state.values(), *received.values())))
    if key not in RESULTS:
        federation, model, batches = world()
        indices, task = torch.from_numpy(federation.split[client]), Task(state, received, round_, client)
        RESULTS[key] = client_step(model, batches, indices, method, SETTINGS, task)
    return RESULTS[key]


def play(lie, method=FEDAVG):
    """A run in which `lie(results, state)` changes what has arrived."""

    def ask(state, received, round_, chosen):
        results = {client: honest(method, state, received, round_, client) for client in chosen}
        lie(results, state)
        return results, {}

    return run_federated(build_model("resnet8", 3, width=8), world()[0], method, SETTINGS, ask=ask)


@functools.cache
def run_without_liar(method):
    return play(lambda results, state: results.pop(LIAR), method)


@functools.cache
def honest_run():
    return play(lambda results, state: None)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------ lies


def weights(change):
    """Change the liar's weights: (dictionary, the global one) -> dictionary."""

    def lie(results, state):
        results[LIAR] = replace(results[LIAR], state=change(dict(results[LIAR].state), state))

    return lie


def each(change, part=""):
    """Change its tensors of floats whose name ends in `part`: (tensor, the global one) -> tensor."""
    return weights(
        lambda sent, state: {
            n: change(t, state[n]) if t.is_floating_point() and n.endswith(part) else t for n, t in sent.items()
        }
    )


def trained(change):
    """As `each`, without BatchNorm's statistics."""
    return weights(
        lambda sent, state: {
            n: change(t, state[n]) if t.is_floating_point() and "running" not in n else t for n, t in sent.items()
        }
    )


def counters(number):
    return weights(
        lambda sent, _: {n: t if t.is_floating_point() else torch.full_like(t, number) for n, t in sent.items()}
    )


def upload(change):
    def lie(results, state):
        sent = {name: t.clone() for name, t in results[LIAR].extra.items()}
        change(sent)
        results[LIAR] = replace(results[LIAR], extra=sent)

    return lie


def loss(value):
    def lie(results, state):
        results[LIAR] = replace(results[LIAR], loss=value)

    return lie


def noise(sent, old):
    return old + torch.randn(old.shape, generator=torch.Generator().manual_seed(0))


def without_bias(sent, _):
    return {name: t for name, t in sent.items() if name != "head.bias"}


FAR = r"its (weights|BatchNorm statistics) moved .* as the round's median; at most 10 times is accepted"
NAMED = {
    "weights x 1e6": (FEDAVG, each(lambda t, _: t * 1e6), FAR),
    "weights x 1e30": (FEDAVG, each(lambda t, _: t * 1e30), FAR),
    "a bias of 1e9": (FEDAVG, each(lambda t, _: t + 1e9, "head.bias"), "its weights moved"),
    "a negative variance": (FEDAVG, each(lambda t, _: t * 0 - 1e-6, "1.running_var"), "a variance, and it is negative"),
    "a huge variance": (FEDAVG, each(lambda t, _: t + 1e12, "running_var"), "its BatchNorm statistics moved"),
    "zeros": (FEDAVG, each(lambda t, _: 0 * t), "its weights moved"),
    "the weights' sign": (FEDAVG, trained(lambda t, _: -t), "its weights moved"),
    "noise": (FEDAVG, trained(noise), "its weights moved"),
    "boosted update": (FEDAVG, trained(lambda t, old: old + 100 * (t - old)), "its weights moved"),
    "NaN": (FEDAVG, each(lambda t, _: t * torch.nan, "head.bias"), "head.bias has a number that is not finite"),
    "infinity": (FEDAVG, each(lambda t, _: t / 0, "head.bias"), "head.bias has a number that is not finite"),
    "another shape": (FEDAVG, each(lambda t, _: t[:2], "head.bias"), r"head.bias is torch.float32 \(2,\), not \(3,\)"),
    "another type": (FEDAVG, each(lambda t, _: t.double(), "head.bias"), "head.bias is torch.float64"),
    "a missing key": (FEDAVG, weights(without_bias), "other names: .'head.bias'"),
    "an extra key": (FEDAVG, weights(lambda sent, _: sent | {"w": torch.ones(1)}), "other names: .'w'"),
    "nothing": (FEDAVG, weights(lambda sent, _: {}), "its weights have other names"),
    "a huge loss": (FEDAVG, loss(1e308), r"its loss is 1e\+308; at most 1e\+06 is accepted"),
    "a loss that is no number": (FEDAVG, loss(float("nan")), "its loss is nan"),
    "an upload": (FEDAVG, upload(lambda sent: sent.update(w=torch.ones(1))), "FedAvg takes nothing beside the weights"),
    "gradients of 1e30": (CREFF, upload(lambda sent: sent["gradients"].fill_(1e30)), "impossibly large"),
    "gradients that are no numbers": (
        CREFF, upload(lambda sent: sent["gradients"].fill_(torch.nan)), "its upload has a number that is not finite",
    ),
    "a class out of range": (CREFF, upload(lambda sent: sent["classes"].fill_(3)), "classes must be whole numbers"),
    "gradients of another kind": (CREFF, upload(lambda sent: sent.update(classes=3)), "AttributeError"),
}  # fmt: skip


@pytest.mark.parametrize("lie", NAMED)
def test_the_record_names_the_liar_and_the_run_is_the_one_without_it(lie):
    """After the lie every honest client is accepted still."""
    method, change, reason = NAMED[lie]
    run, without = play(change, method), run_without_liar(method)
    for record in run.history:
        assert record["clients"] == [client for client in range(CLIENTS) if client != LIAR]
        assert list(record["left_out"]) == [str(LIAR)]
        assert re.search(reason, record["left_out"][str(LIAR)]), record["left_out"]
    assert equal(run.state, without.state) and equal(run.deployed, without.deployed)


def test_a_client_under_another_number_is_named():
    """Its own number does not answer, the other one was not asked."""

    def lie(results, state):
        results[CLIENTS] = results.pop(LIAR)

    run = play(lie)
    expected = {str(LIAR): "it did not answer", str(CLIENTS): "it was not asked in this round"}
    assert all(record["left_out"] == expected for record in run.history)
    assert equal(run.state, run_without_liar(FEDAVG).state)


@pytest.mark.parametrize("number", [2**62, -(2**63)])
def test_absurd_counters_change_no_accuracy(number):
    """BatchNorm's counters enter no computation; all other weights are those of the honest run."""
    run = play(counters(number))
    assert all(torch.equal(t, run.state[n]) for n, t in honest_run().state.items() if t.is_floating_point())
    assert [r["metrics"] for r in run.history] == [r["metrics"] for r in honest_run().history]


def copy_another(results, state):
    results[LIAR] = results[LIAR + 1]


def send_the_first_again():
    first = []

    def lie(results, state):
        first.append(results[LIAR])
        results[LIAR] = first[0]

    return lie


def send_what_it_got(results, state):
    results[LIAR] = replace(results[LIAR], state=dict(state))


HARMLESS = {
    "a copy of another's": copy_another,
    "its first weights again": send_the_first_again(),
    "the weights as it got them": send_what_it_got,
    "a head of zeros": each(lambda t, _: 0 * t, "head.weight"),
}


@pytest.mark.parametrize("lie", HARMLESS)
def test_a_lie_that_does_no_harm(lie):
    run = play(HARMLESS[lie])
    assert not any("left_out" in record for record in run.history)
    assert run.history[-1]["metrics"]["top1"] >= honest_run().history[-1]["metrics"]["top1"] - 0.02 > 0.9


NOT_CAUGHT = {
    "the update's sign": trained(lambda t, old: 2 * old - t),
    "five times the update, backwards": trained(lambda t, old: old - 5 * (t - old)),
}


@pytest.mark.parametrize("lie", NOT_CAUGHT)
def test_a_lie_as_small_as_an_honest_update_is_not_caught(lie):
    """The second one keeps this run at chance: one client in eight is enough."""
    run = play(NOT_CAUGHT[lie])
    assert not any("left_out" in record for record in run.history)
    assert not equal(run.state, honest_run().state)


# ------------------------------------------------------------------------------------------------ the bound


def moved(factors, name="w"):
    """Clients whose update is so many times (1, 1, 1, 1)."""
    return {client: {name: torch.full((4,), float(factor))} for client, factor in enumerate(factors)}


@pytest.mark.parametrize("name", ["w", "bn.running_mean"])
def test_the_bound_is_ten_times_the_lower_median(name):
    state, steps = {name: torch.zeros(4)}, dict.fromkeys(range(4), 3)
    assert NORM_FACTOR == 10
    assert not outliers(moved([1, 1, 9.99, 9.99], name), steps, state)
    assert list(outliers(moved([1, 1, 10.01, 1e30], name), steps, state)) == [2, 3]
    assert "moved 10.1 times" in outliers(moved([1, 1, 1, 10.1], name), steps, state)[3]


def test_more_local_steps_may_move_further():
    """As a random walk: a hundred times the steps, ten times the way."""
    state, steps = {"w": torch.zeros(4)}, {0: 1, 1: 1, 2: 100}
    assert not outliers(moved([1, 1, 99]), steps, state) and list(outliers(moved([1, 1, 101]), steps, state)) == [2]


def test_one_client_or_a_median_of_zero_has_nothing_to_be_compared_with():
    state = {"w": torch.zeros(4), "n": torch.tensor(3)}
    assert not outliers(moved([1e9]), {0: 1}, state) and not outliers(moved([0, 0, 5]), {0: 1, 1: 1, 2: 1}, state)
    assert not outliers({}, {}, state)
