import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from mllmfl_lite.checkpoint import CheckpointError
from mllmfl_lite.data import partition
from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.metrics import summarise
from mllmfl_lite.federated import (
    ClientDiverged,
    ClientResult,
    FedAvg,
    FedAvgM,
    Federation,
    FedProx,
    FedSettings,
    Task,
    choose_clients,
    client_step,
    weighted_mean,
)
from mllmfl_lite.federated import run_federated as run_on
from mllmfl_lite.models import build_model
from mllmfl_lite.repro import Execution, torch_generator
from mllmfl_lite.runs import Experiment, run_experiment

QUICK = FedSettings(rounds=3, clients_per_round=2, local_epochs=2, batch_size=8, lr=0.05)


def run_federated(model, images, split, method=None, settings=QUICK, seed=0, ask=None, test=None, **execution):
    federation = Federation(images, split, images if test is None else test)
    return run_on(model, federation, method, settings, seed, Execution(device="cpu", **execution), ask)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def in_float64(model):
    """The same model in float64, fed with float32 images."""
    model.double().register_forward_pre_hook(lambda _, inputs: inputs[0].double())
    return model


# ------------------------------------------------------------------------------------------------ the weighted mean

numbers = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=2)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, st.integers(1, 50)), min_size=1, max_size=5))
def test_weighted_mean_is_numpys(pairs):
    states = [{"w": torch.tensor(values, dtype=torch.float32)} for values, _ in pairs]
    weights = [weight for _, weight in pairs]
    expected = np.average([values for values, _ in pairs], axis=0, weights=weights)
    assert weighted_mean(states, weights)["w"].numpy() == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_weighted_mean_keeps_types_and_covers_buffers(model):
    twice = {name: t * 2 for name, t in model.state_dict().items()}
    mean = weighted_mean([model.state_dict(), twice], [1, 3])
    assert mean.keys() == model.state_dict().keys()
    assert mean["body.1.num_batches_tracked"].dtype == torch.int64
    torch.testing.assert_close(mean["body.1.running_var"], torch.full((4,), 1.75))


@pytest.mark.parametrize("weights", [[], [0.0], [-1.0], [1.0, 1.0]])
def test_weights_that_make_no_mean_are_refused(weights):
    with pytest.raises(ValueError, match="a weighted mean needs"):
        weighted_mean([{"w": torch.ones(1)}], weights)


def test_states_of_different_models_are_refused():
    with pytest.raises(ValueError, match="same names and shapes"):
        weighted_mean([{"w": torch.ones(1)}, {"w": torch.ones(2)}], [1, 1])


# ------------------------------------------------------------------------------------------------ methods


def train_by_hand(model, images, indices, settings, round_, client, mu=0.0):
    """Local training with torch's own autograd on the written-out loss, and no optimiser."""
    model.train()
    anchor = [p.detach().clone() for p in model.parameters()]
    batches = Batches(images)
    for epoch in range(settings.local_epochs):
        generator = torch_generator(0, "batches", round_, client, epoch)
        order = torch.as_tensor(indices)[torch.randperm(len(indices), generator=generator)]
        for part in order.split(settings.batch_size):
            loss = cross_entropy(model(batches.augmented(part, generator)), batches.labels[part])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g, a in zip(model.parameters(), gradients, anchor, strict=True):
                    p.sub_(settings.lr * (g + mu * (p - a)))  # the proximal term's gradient in closed form
    return model.state_dict()


@pytest.mark.parametrize("method", [FedAvg(), FedProx(mu=0.7)])
def test_a_round_is_local_sgd_and_a_weighted_mean(images, model, method):
    """In float64: in float32 training amplifies last bits, which a processor decides."""
    split = partition.dirichlet(images.labels, 3, 1.0, seed=1)
    one = replace(QUICK, rounds=1, clients_per_round=3)
    result = run_federated(in_float64(model), images, split, method, one)
    trained = [
        train_by_hand(
            in_float64(build_model("resnet8", 3, width=4)), images, indices, one, 1, k, getattr(method, "mu", 0)
        )
        for k, indices in enumerate(split)
    ]
    sizes = [len(indices) for indices in split]
    for name, value in result.state.items():
        mean = sum(n * s[name].double() for n, s in zip(sizes, trained, strict=True)) / sum(sizes)
        torch.testing.assert_close(value.double(), mean.round() if "tracked" in name else mean, rtol=1e-8, atol=1e-10)


def test_fedprox_with_no_spring_is_fedavg_to_the_bit(images, model, split):
    runs = [run_federated(model, images, split, m, QUICK).state for m in (FedAvg(), FedProx(mu=0.0))]
    assert equal(*runs)


def test_server_momentum_in_closed_form():
    """A constant pseudo-gradient g: after t steps w has moved by -g (t - b (1 - b^t) / (1 - b)) / (1 - b)."""
    method, b, g = FedAvgM(momentum=0.9), 0.9, 0.5
    state, kept = {"w": torch.zeros(1), "stat": torch.ones(1)}, method.init_server_state({"w": torch.zeros(1)}, None)
    for t in range(1, 8):
        mean = {"w": state["w"] - g, "stat": torch.full((1,), float(t))}
        state, kept = method.server_update(state, mean, kept, [], None)
        assert state["w"].item() == pytest.approx(-g * (t - b * (1 - b**t) / (1 - b)) / (1 - b), rel=1e-4)
        assert state["stat"].item() == t  # BatchNorm statistics take the mean, without momentum


def test_server_momentum_steps_from_the_state_that_the_round_began_with(model):
    """Half a step of FedAvgM from w towards the weighted mean of two clients."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sent = [{n: t + k if t.is_floating_point() else t for n, t in state.items()} for k in (1, 5)]
    parameters, method = {name: p.detach() for name, p in model.named_parameters()}, FedAvgM(server_lr=0.5)
    kept = method.init_server_state(parameters, torch_generator(0))
    moved, velocity = method.server_update(state, weighted_mean(sent, [3, 1]), kept, [], None)
    for name in parameters:  # the mean is w + 2
        torch.testing.assert_close(moved[name].double(), state[name].double() + 1, rtol=0, atol=1e-5)
        torch.testing.assert_close(velocity[name], torch.full_like(velocity[name], -2.0), rtol=0, atol=1e-5)


def test_training_learns_something(images, model, split):
    result = run_federated(model, images, split, FedAvg(), replace(QUICK, rounds=12, lr=0.1))
    assert summarise(result.history, 3)["top1"] > 0.8
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"] / 2


# ------------------------------------------------------------------------------------------------ the engine


@pytest.mark.parametrize("method", [FedAvg(), FedProx(), FedAvgM()])
def test_the_number_of_workers_changes_no_bit(images, model, split, method):
    runs = [run_federated(model, images, split, method, QUICK, workers=n) for n in (1, 2, 3)]
    assert all(equal(runs[0].state, other.state) for other in runs[1:])
    without_time = [[{**r, "seconds": 0} for r in run.history] for run in runs]
    assert without_time[0] == without_time[1] == without_time[2]


def test_the_global_generator_and_the_given_model_are_left_alone(images, model, split):
    before, weights = torch.random.get_rng_state(), {n: t.clone() for n, t in model.state_dict().items()}
    torch.manual_seed(3)
    first = run_federated(model, images, split).state
    torch.manual_seed(4)
    assert equal(first, run_federated(model, images, split).state)
    assert equal(weights, model.state_dict())
    torch.random.set_rng_state(before)


def remote(images, split, missing=()):
    """Clients that are asked elsewhere; those of `missing`, pairs (round, client), are left out."""
    worker = build_model("resnet8", 3, width=4).to(memory_format=torch.channels_last)

    def ask(state, received, round_, chosen):
        present = [client for client in chosen if (round_, client) not in missing]
        rows = {client: torch.from_numpy(split[client]) for client in present}
        part = (worker, Batches(images))
        tasks = {c: Task(state, received, round_, c) for c in present[::-1]}
        results = {c: client_step(*part, rows[c], FedAvg(), QUICK, task) for c, task in tasks.items()}
        return results, {client: "asleep" for client in chosen if client not in present}

    return ask


def test_clients_that_are_asked_elsewhere_give_the_same_bits(images, model, split):
    here = run_federated(model, images, split, workers=1)
    there = run_federated(model, images, split, ask=remote(images, split))
    assert equal(here.state, there.state)
    assert [r["clients"] for r in here.history] == [r["clients"] for r in there.history]
    assert not any("left_out" in record for record in there.history)


def test_a_client_that_is_left_out_is_named_and_not_in_the_mean(images, model, split):
    drawn = choose_clients(4, QUICK, 1, 0)
    (only,) = drawn[1:]
    settings = replace(QUICK, rounds=1)
    run = run_federated(model, images, split, settings=settings, ask=remote(images, split, {(1, drawn[0])}))
    (record,) = run.history
    assert record["clients"] == [only] and record["left_out"] == {str(drawn[0]): "asleep"}
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sent, _ = remote(images, split)(start, {}, 1, [only])
    assert equal(run.state, sent[only].state), "the mean of one is that one"


def test_a_round_in_which_nobody_answers_is_an_error_and_no_progress(images, model, split, tmp_path):
    nobody = {(2, client) for client in range(4)}
    with pytest.raises(ValueError, match=r"no client sent a sound result in round 2: .*asleep"):
        run_federated(model, images, split, ask=remote(images, split, nobody), folder=tmp_path)
    whole = run_federated(model, images, split)
    resumed = run_federated(model, images, split, ask=remote(images, split), folder=tmp_path)
    assert equal(whole.state, resumed.state) and [r["round"] for r in resumed.history] == [1, 2, 3]


def test_who_was_not_asked_or_says_nothing_is_named(images, model, split):
    """One client that was drawn is silent; two others that nobody asked answer."""
    drawn = choose_clients(4, QUICK, 1, 0)
    other = next(client for client in range(4) if client not in drawn)

    def ask(state, received, round_, chosen):
        results, _ = remote(images, split)(state, received, round_, chosen[1:])
        return results | dict.fromkeys((other, 99), results[chosen[1]]), {}

    (record,) = run_federated(model, images, split, settings=replace(QUICK, rounds=1), ask=ask).history
    assert record["clients"] == drawn[1:] and record["left_out"] == {
        str(drawn[0]): "it did not answer", **dict.fromkeys((str(other), "99"), "it was not asked in this round"),
    }  # fmt: skip


def test_a_method_may_aggregate_in_its_own_way(images, model, split):
    @dataclass(frozen=True)
    class First(FedAvg):
        def aggregate(self, start, states, sizes, generator):
            assert sizes == [len(split[client]) for client in drawn] and equal(start, model.state_dict())
            return states[0]

    drawn, one = choose_clients(4, QUICK, 1, 0), replace(QUICK, rounds=1)
    run = run_federated(model, images, split, First(), one)
    first, _ = remote(images, split)(model.state_dict(), {}, 1, drawn[:1])
    assert equal(run.state, first[drawn[0]].state)


def test_seeds_change_the_run(images, model, split):
    runs = [run_federated(model, images, split, seed=s).state for s in (0, 1)]
    assert not equal(*runs)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 3), st.integers(1, 9))
def test_chosen_clients_are_distinct_and_in_range(clients, wanted, seed, round_):
    wanted = min(wanted, clients)
    chosen = choose_clients(clients, FedSettings(clients_per_round=wanted), round_, seed)
    assert len(set(chosen)) == wanted and all(0 <= k < clients for k in chosen)
    assert chosen == choose_clients(clients, FedSettings(clients_per_round=wanted), round_, seed)


def test_every_client_takes_part_sooner_or_later():
    drawn = [k for t in range(1, 101) for k in choose_clients(20, FedSettings(), t, 0)]
    counts = np.bincount(drawn, minlength=20)
    assert counts.sum() == 800 and counts.min() >= 20 and counts.max() <= 60


def test_tests_are_run_every_so_often_and_at_the_end(images, model, split):
    run = run_federated(model, images, split, settings=replace(QUICK, rounds=7, eval_every=3, report_rounds=3))
    assert [r["round"] for r in run.history if r["metrics"]] == [3, 5, 6, 7]


def test_the_summary_averages_the_last_rounds():
    def record(top1, group):
        return {"metrics": {"top1": top1, "per_class": [top1, None], "groups": {"head": group, "few": None}}}

    history = [record(0.9, 0.9), {"metrics": None}, record(0.2, 0.4), record(0.4, 0.8)]
    summary = summarise(history, last=2)
    assert summary["top1"] == pytest.approx(0.3) and summary["per_class"] == [pytest.approx(0.3), None]
    assert summary["groups"] == {"head": pytest.approx(0.6), "few": None}
    assert summary["best_top1"] == 0.9 and summary["rounds_averaged"] == 2


def test_a_run_reports_the_window_of_its_last_rounds(tmp_path):
    settings = replace(QUICK, rounds=4, report_rounds=2, local_epochs=1)
    experiment = Experiment("cifar10_mini", num_clients=4, width=2, federated=settings)
    result = run_experiment(experiment, tmp_path, "cpu")
    accuracies = [record["metrics"]["top1"] for record in result["history"]]
    assert result["summary"]["top1"] == pytest.approx(np.mean(accuracies[2:])) and len(accuracies) == 4
    assert result["summary"]["rounds_averaged"] == 2 and result["summary"]["best_top1"] == max(accuracies)


def test_a_run_without_one_answer_writes_nothing(tmp_path):
    """Started again with clients, it trains."""
    settings = replace(QUICK, rounds=1, report_rounds=1, local_epochs=1)
    experiment = Experiment("cifar10_mini", num_clients=4, width=2, federated=settings)
    with pytest.raises(ValueError, match=r"no client sent a sound result in round 1: .*gone"):
        run_experiment(experiment, tmp_path, "cpu", ask=lambda s, r, n, chosen: ({}, dict.fromkeys(chosen, "gone")))
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.rglob("run.json"))
    assert run_experiment(experiment, tmp_path, "cpu")["history"][0]["clients"]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("name", "value"),
    [("rounds", -1), ("rounds", 10**9), ("clients_per_round", 0), ("local_epochs", -1), ("batch_size", 0),
     ("eval_every", 0),
     ("rounds", 2.5), ("rounds", True), ("lr", 0.0), ("lr", float("inf")), ("lr", float("nan"))],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: must be"):
        FedSettings(**{name: value})


def test_more_participants_than_clients_is_refused(images, model, split):
    with pytest.raises(ValueError, match="clients_per_round is 5, but there are only 4 clients"):
        run_federated(model, images, split, settings=replace(QUICK, clients_per_round=5))


@pytest.mark.parametrize("index", [-1, 60])
def test_an_index_outside_the_images_is_refused(images, model, split, index):
    with pytest.raises(ValueError, match=rf"the split's indices must lie in 0..59; they run from .*{index}"):
        run_federated(model, images, [*split[1:], np.array([0, index])], settings=QUICK)


def test_an_empty_client_is_refused(images, model, split):
    with pytest.raises(ValueError, match=r"clients \[4\] of 5 have none"):
        run_federated(model, images, [*split, np.empty(0, np.int64)])


def test_a_head_of_the_wrong_size_is_refused(images, split):
    with pytest.raises(ValueError, match="has 3 classes, the model's head 4"):
        run_federated(build_model("resnet8", 4, width=4), images, split)


def test_no_test_images_is_refused(images, model, split):
    with pytest.raises(ValueError, match="test set has no images"):
        run_federated(model, images, split, test=images.subset(np.empty(0, int)))


def test_test_images_with_classes_in_another_order_are_refused(images, model, split):
    other = replace(images, names=images.names[::-1])
    with pytest.raises(ValueError, match=r"must have the same class names in the same order.*.class 0. and .class 2."):
        run_federated(model, images, split, test=other)


def test_a_model_of_other_classes_is_refused(images, model, split):
    model.names = images.names[::-1]
    with pytest.raises(ValueError, match="made/train and the model must have the same class names in the same order"):
        run_federated(model, images, split)


def test_a_class_without_test_images_has_no_accuracy(images, model, split):
    run = run_federated(model, images, split, test=images.subset(np.flatnonzero(images.labels != 1)))
    summary = summarise(run.history, 2)
    assert summary["per_class"][1] is None and 0 <= summary["per_class"][0] <= 1 and 0 <= summary["top1"] <= 1


def test_a_last_batch_of_one_image_is_refused_before_the_rounds_if_the_model_cannot_train_on_it(images, model):
    """ResNet-50 shrinks images of up to 32 pixels to one pixel; ResNet-8 does not."""
    split, settings = [np.arange(17), np.arange(17, 60)], replace(QUICK, rounds=1)
    with pytest.raises(ValueError, match=r"client 0 has 17 images, .* single one.*change batch_size \(8"):
        run_federated(build_model("resnet50", 3), images, split, settings=settings)
    with pytest.raises(ValueError, match=r"client 0 has 17 images, .* single one.*change batch_size \(1"):
        run_federated(build_model("resnet50", 3), images, split, settings=replace(settings, batch_size=1))
    run_federated(model, images, split, settings=settings)


def test_a_device_without_float64_is_refused_in_one_sentence(images, model, split):
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or 'cuda'; got 'mps'"):
        run_on(model, Federation(images, split, images), settings=QUICK, execution=Execution(device="mps"))


@dataclass(frozen=True)
class Poisoned(FedAvg):
    """FedAvg until the weights have left their start: then every loss is not a number."""

    start: float = 0.0

    def local_loss(self, model, x, y, rows, anchor):
        poison = 0.0 if anchor["head.bias"][0].item() == self.start else float("nan")
        return super().local_loss(model, x, y, rows, anchor) + poison


def test_a_diverged_client_is_named_and_its_round_not_aggregated(images, model, split, tmp_path):
    method = Poisoned(start=model.head.bias[0].item())
    with pytest.raises(ClientDiverged, match=r"client \d diverged in round 2") as caught:
        run_federated(model, images, split, method, QUICK, folder=tmp_path)
    assert caught.value.round == 2 and caught.value.client in choose_clients(4, QUICK, 2, 0)
    after_one = run_federated(model, images, split, method, replace(QUICK, rounds=1)).state
    resumed = run_federated(model, images, split, method, replace(QUICK, rounds=1), folder=tmp_path)
    assert equal(resumed.state, after_one) and len(resumed.history) == 1


class Cliff(FedAvg):
    """A finite loss whose gradient is not a number."""

    def local_loss(self, model, x, y, rows, anchor):
        bias = model.head.bias
        return super().local_loss(model, x, y, rows, anchor) + (bias - bias.detach()).abs().sqrt().sum()


def test_a_server_step_that_diverges_is_the_servers_and_is_not_kept(images, model, split, tmp_path):
    settings = replace(QUICK, rounds=3)
    with pytest.raises(ValueError, match=r"the server's step of round 1 .* Lower the method's step size"):
        run_federated(model, images, split, FedAvgM(server_lr=1e300), settings, folder=tmp_path)
    assert not list(tmp_path.glob("weights-*"))


def test_server_state_that_shares_tensors_with_the_weights_is_kept(images, model, split, tmp_path):
    @dataclass(frozen=True)
    class Keeps(FedAvg):
        def server_update(self, state, mean, server_state, uploads, generator):
            return mean, {"bias": mean["head.bias"]}

    again = [run_federated(model, images, split, Keeps(), replace(QUICK, rounds=n), folder=tmp_path) for n in (1, 3)]
    assert equal(again[1].state, run_federated(model, images, split, FedAvg(), QUICK).state)


def test_weights_lost_in_the_very_last_step_are_noticed(images, model, split):
    one_step = replace(QUICK, rounds=1, local_epochs=1, batch_size=1000)
    with pytest.raises(ClientDiverged, match="round 1"):
        run_federated(model, images, split, Cliff(), one_step)


# ------------------------------------------------------------------------------------------------ stop and resume


def test_what_is_sent_beside_the_weights_must_be_the_methods(images, model, split, caplog):
    def ask(state, received, round_, chosen):
        sound = ClientResult(dict(state), {}, 1.0)
        return {chosen[0]: sound, chosen[1]: replace(sound, extra={"more": torch.zeros(1)})}, {}

    (record,) = run_federated(model, images, split, settings=replace(QUICK, rounds=1), ask=ask).history
    (other,) = record["left_out"]
    assert len(record["clients"]) == 1 and "FedAvg takes nothing beside the weights" in record["left_out"][other]
    assert f"client {other} is left out" in caplog.text


def test_a_method_of_ones_own_may_send_what_it_likes(images, model, split):
    @dataclass(frozen=True)
    class Sends(FedAvg):
        def upload(self, model, batches, indices, received, generator):
            return {"count": torch.tensor(len(indices))}

        def check_upload(self, extra, state):
            assert set(extra) == {"count"}

    history = run_federated(model, images, split, Sends(), QUICK).history
    assert not any("left_out" in record for record in history)


def test_fewer_rounds_than_there_are_is_refused(images, model, split, tmp_path):
    run_federated(model, images, split, settings=replace(QUICK, rounds=3), folder=tmp_path)
    with pytest.raises(CheckpointError, match="holds 3 rounds already; ask for at least as many, not for 2"):
        run_federated(model, images, split, settings=replace(QUICK, rounds=2), folder=tmp_path)


class Killed(BaseException):
    """What no code of a run catches."""


@pytest.mark.parametrize("writes", range(6))
def test_a_run_stopped_at_any_write_resumes_to_the_same_bits(images, model, split, tmp_path, monkeypatch, writes):
    """Three rounds rename six files into place; the run ends after `writes` of them."""
    whole, real = run_federated(model, images, split, FedAvgM()), os.replace
    left = iter([True] * writes)

    def replace_or_stop(*paths):
        if not next(left, False):
            raise Killed
        real(*paths)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(os, "replace", replace_or_stop)
        run_federated(model, images, split, FedAvgM(), folder=tmp_path)
    resumed = run_federated(model, images, split, FedAvgM(), folder=tmp_path)
    assert equal(whole.state, resumed.state)
    assert [r["metrics"] for r in whole.history] == [r["metrics"] for r in resumed.history]


KILLED_RUN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_federated
real, count = os.replace, [0]
def replace_then_die(*paths):
    real(*paths)
    count[0] += 1
    if count[0] == 3:  # the second round's weights are there, run.json still names the first's
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_then_die
test_federated.small_run({folder!r})
"""


def small_run(folder=None):
    data = make_images(48)
    return run_federated(
        build_model("resnet8", 3, width=4), data, partition.iid(data.labels, 4, 0), FedAvgM(), folder=folder
    )


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_kill_9_between_two_files_changes_no_bit(tmp_path):
    code = KILLED_RUN.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.glob("weights-*"))) == 2
    assert equal(small_run(tmp_path).state, small_run().state)


def test_the_second_run_in_a_folder_is_refused(images, model, split, tmp_path):
    code = (
        "import filelock, time, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(CheckpointError, match="in use by another run"):
            run_federated(model, images, split, folder=tmp_path)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    run_federated(model, images, split, folder=tmp_path)  # a killed run leaves no lock


@pytest.mark.parametrize(
    "change", [{"lr": 0.01}, {"seed": 5}, {"clients_per_round": 3}, {"method": FedProx()}, {"split": 9}]
)
def test_another_runs_folder_is_refused(images, model, split, tmp_path, change):
    run_federated(model, images, split, settings=replace(QUICK, rounds=1), folder=tmp_path)
    content = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    method, seed = change.pop("method", FedAvg()), change.pop("seed", 0)
    other = partition.iid(images.labels, 4, change.pop("split", 0))
    with pytest.raises(CheckpointError, match="holds another run"):
        run_federated(model, images, other, method, replace(QUICK, **change), seed, folder=tmp_path)
    assert content == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_read_only_folder_is_refused_before_training(images, model, split):
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    am_root = os.geteuid() == 0  # root may write anywhere: be nobody for a moment
    if am_root:
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            run_federated(model, images, split, folder=folder)
    finally:
        if am_root:
            os.seteuid(0)
        folder.chmod(0o755)
    assert list(folder.iterdir()) == []
    folder.rmdir()
