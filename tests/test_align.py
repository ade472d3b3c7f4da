import math
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, softmax

from mllmfl_lite.data import partition
from mllmfl_lite.data import load_images
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.metrics import evaluate_model
from mllmfl_lite.federated.each_round import AlignEachRound, ServerOnly
from mllmfl_lite.federated.methods import FedSettings
from mllmfl_lite.federated.rounds import run_federated
from mllmfl_lite.models import build_model, load_model
from mllmfl_lite.repro import torch_generator
from mllmfl_lite.runs.experiment import Experiment, run_experiment
from mllmfl_lite.stages.align import AlignSettings, align, alignment_loss
from mllmfl_lite.stages.server_set import AlignError, ServerSet, describe, draw_server_set, evened
from mllmfl_lite.teachers.answers import ask_teacher
from mllmfl_lite.teachers.labels import PoolLabels

NAMES = ("red", "green", "blue")
QUICK = AlignSettings(per_class=4, epochs=2, batch_size=8)


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def told(images):
    torch.manual_seed(0)
    return softmax(torch.randn(len(images), 3), 1)


@pytest.fixture
def chosen(images, told):
    return draw_server_set(images, told, NAMES, 4)


# ------------------------------------------------------------------------------------------------ the loss

rows = st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=2, max_size=2)


@given(rows, rows, st.floats(0, 5), st.floats(0.5, 4))
def test_the_loss_by_hand(out, teacher, beta, temperature):
    """CE + beta T^2 sum q_T log(q_T / p_T), in float64 and without torch."""
    z, q = np.array(out), np.exp(np.array(teacher))
    q /= q.sum(1, keepdims=True)
    labels = np.array([2, 0])
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    p_t = np.exp(z / temperature) / np.exp(z / temperature).sum(1, keepdims=True)
    q_t = q ** (1 / temperature) / (q ** (1 / temperature)).sum(1, keepdims=True)
    ce = -np.mean(np.log(p[[0, 1], labels]))
    kl = np.mean((q_t * np.log(q_t / p_t)).sum(1))
    found = alignment_loss(torch.tensor(z), torch.tensor(labels), torch.tensor(q), beta, temperature)
    assert found.item() == pytest.approx(ce + beta * temperature**2 * kl, rel=1e-6, abs=1e-9)


def test_the_two_terms_alone():
    logits, labels, q = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), softmax(torch.randn(4, 3), 1)
    torch.testing.assert_close(alignment_loss(logits, labels, q, 0.0), cross_entropy(logits, labels))
    same = alignment_loss(q.log(), labels, q, 3.0)
    torch.testing.assert_close(same, cross_entropy(q.log(), labels))  # KL(q || q) = 0


def test_a_teacher_without_doubt_makes_the_kl_term_a_second_cross_entropy():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    sure = torch.eye(3)[labels]
    torch.testing.assert_close(alignment_loss(logits, labels, sure, 2.0), 3 * cross_entropy(logits, labels))


def test_the_gradient_of_the_kl_term_is_p_minus_q():
    logits, q = torch.randn(1, 3, requires_grad=True), softmax(torch.randn(1, 3), 1)
    loss = alignment_loss(logits, torch.tensor([0]), q, 1.0) - cross_entropy(logits, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, softmax(logits.detach(), 1) - q, atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ the server set


@given(st.integers(1, 30), st.integers(0, 5))
def test_the_set_is_the_most_confident_of_each_class(per_class, seed):
    rng = np.random.default_rng(seed)
    told = torch.from_numpy(rng.dirichlet([1, 1, 1], 40)).float()
    pool = ImageSet(np.zeros((40, 2, 2, 3), np.uint8), rng.integers(0, 2, 40), ("a", "b"), "pool")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = draw_server_set(pool, told, NAMES, per_class)
    for c in range(3):
        mine = np.flatnonzero(told.argmax(1).numpy() == c)
        kept = set(chosen.rows[chosen.images.labels == c].tolist())
        expected = sorted(mine.tolist(), key=lambda i: -told[i, c].item())[:per_class]
        assert kept == set(expected)
    assert len(set(chosen.rows.tolist())) == len(chosen) and chosen.images.names == NAMES
    assert torch.equal(chosen.told, told[torch.from_numpy(chosen.rows)])


def test_the_pools_labels_are_not_looked_at(images, told):
    other = ImageSet(images.images, 2 - images.labels, images.names, images.origin)
    one, two = (draw_server_set(pool, told, NAMES, 4) for pool in (images, other))
    assert np.array_equal(one.rows, two.rows) and np.array_equal(one.images.labels, two.images.labels)


def test_classes_that_the_pool_lacks_are_named(images, told):
    told = told.clone()
    told[:, 1] = 0
    told = told / told.sum(1, keepdim=True)
    with pytest.warns(UserWarning, match=r"fewer than 4 images of 1 of 3 classes: green \(0\)"):
        chosen = draw_server_set(images, told, NAMES, 4)
    assert chosen.short == {"green": 0} and chosen.images.class_counts().tolist() == [4, 0, 4]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q: q[:, :2], r"must be \(images, classes\)"),
        (lambda q: q[:5], r"must be \(images, classes\)"),
        (lambda q: q * 2, "must be a distribution"),
        (lambda q: q - 0.5, "must be a distribution"),
        (lambda q: q * float("nan"), "must be a distribution"),
    ],
)
def test_answers_that_do_not_fit_are_refused(images, told, change, says):
    with pytest.raises(AlignError, match=says):
        draw_server_set(images, change(told), NAMES, 4)


def test_classes_can_be_left_out(images, told):
    with pytest.warns(UserWarning, match=r"1 of 3 classes: blue \(0\)"):
        chosen = draw_server_set(images, told, NAMES, 4, ["blue"])
    full = draw_server_set(images, told, NAMES, 4)
    assert np.array_equal(chosen.rows, full.rows[full.images.labels != 2]) and chosen.short == {"blue": 0}
    with pytest.raises(AlignError, match="no class 'pink' to leave out; there are red, green, blue"):
        draw_server_set(images, told, NAMES, 4, ["pink"])


def test_the_control_that_reads_labels(images):
    told = PoolLabels(images).class_probabilities(images.images, (*images.names[:2], "other"))
    assert torch.equal(told.argmax(1)[images.labels < 2], torch.from_numpy(images.labels[images.labels < 2]))
    torch.testing.assert_close(told[images.labels == 2], torch.full((20, 3), 1 / 3))
    assert told.max(1).values[images.labels == 2].max() < 1 / 2, "never among the most confident"


def test_an_empty_set_and_a_head_of_the_wrong_size_are_refused(model, chosen):
    empty = ServerSet(chosen.images.subset(np.empty(0, int)), chosen.told[:0], chosen.rows[:0])
    with pytest.raises(AlignError, match="recognised none of the classes"):
        align(model, empty, QUICK)
    with pytest.raises(AlignError, match="has 3 classes, the model's head 5"):
        align(build_model("resnet8", 5, width=4), chosen, QUICK)


def test_how_often_the_teacher_is_right(images):
    told = torch.eye(3)[torch.from_numpy(images.labels)]
    assert describe(draw_server_set(images, told, images.names, 4), images)["labels_right"] == 1.0
    turned = describe(draw_server_set(images, told.roll(1, 1), images.names, 4), images)
    assert turned["labels_right"] == 0.0 and turned["images"] == 12 and turned["per_class"] == [4, 4, 4]


class Oracle:
    """Counts how often it is asked."""

    asked, identity = 0, "oracle-1"

    def class_probabilities(self, images, names):
        Oracle.asked += 1
        return torch.full((len(images), len(names)), 1 / len(names))

    def class_logits(self, images, names):
        return torch.full((len(images), len(names)), 7.0)


def test_the_teacher_is_asked_once_for_each_pool_and_list_of_names(images, tmp_path):
    Oracle.asked = 0
    for names in (NAMES, NAMES, NAMES[::-1]):
        assert ask_teacher(Oracle(), images, names, tmp_path).shape == (len(images), 3)
    assert Oracle.asked == 2
    ask_teacher(Oracle(), images.subset(np.arange(5)), NAMES, tmp_path)
    assert Oracle.asked == 3
    assert ask_teacher(Oracle(), images, NAMES, tmp_path, "class_logits").eq(7).all()  # kept apart from probabilities
    assert ask_teacher(Oracle(), images, NAMES, tmp_path).eq(1 / len(NAMES)).all() and Oracle.asked == 3


def test_of_two_runs_one_asks_and_the_other_waits(images, tmp_path):
    class Slow(Oracle):
        def class_probabilities(self, images, names):
            time.sleep(0.3)
            return super().class_probabilities(images, names)

    Oracle.asked = 0
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(ask_teacher, Slow(), images, NAMES, tmp_path / "new") for _ in range(4)]
    assert len({job.result().shape for job in jobs}) == 1 and Oracle.asked == 1


def test_a_place_that_cannot_be_written_costs_no_answers_and_damaged_answers_are_named(images, tmp_path):
    Oracle.asked = 0
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        ask_teacher(Oracle(), images, NAMES, tmp_path / "file" / "told")
    assert Oracle.asked == 0
    ask_teacher(Oracle(), images, NAMES, tmp_path)
    (kept,) = tmp_path.glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"is damaged .*; remove it, and the teacher is asked again"):
        ask_teacher(Oracle(), images, NAMES, tmp_path)


# ------------------------------------------------------------------------------------------------ training


def test_alignment_is_repeatable_and_leaves_the_given_model_alone(model, chosen):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    one, two = (align(model, chosen, QUICK).model.state_dict() for _ in range(2))
    other = align(model, chosen, replace(QUICK, seed=1)).model.state_dict()
    assert equal(before, model.state_dict()) and equal(one, two) and not equal(one, other)


def test_the_head_alone(model, chosen):
    start, after = model.state_dict(), align(model, chosen, replace(QUICK, part="head")).model.state_dict()
    assert {n for n in after if not torch.equal(start[n], after[n])} == {"head.weight", "head.bias"}


def test_alignment_learns_what_the_teacher_says(images, model):
    told = torch.eye(3)[torch.from_numpy(images.labels)]
    chosen = draw_server_set(images, told, NAMES, 10)
    done = align(model, chosen, AlignSettings(per_class=10, epochs=15, batch_size=8, lr=0.05))
    assert done.history[-1]["loss"] < done.history[0]["loss"] / 2


def test_weights_lost_in_the_very_last_step_are_said(model, chosen):
    once = replace(QUICK, epochs=1, batch_size=len(chosen), lr=1e38)
    with pytest.raises(AlignError, match="the last step gave weights that are not finite; lower lr"):
        align(model, chosen, replace(once, beta=1e6))


def test_a_loss_that_is_lost_is_said(model, chosen):
    with torch.no_grad():
        model.head.weight.fill_(math.inf)
    with pytest.raises(AlignError, match="loss of epoch 1 is not finite; lower lr"):
        align(model, chosen, QUICK)


@pytest.mark.parametrize(
    ("name", "value"),
    [("per_class", 0), ("epochs", 0), ("batch_size", 1.5), ("lr", 0.0), ("lr", math.nan), ("temperature", 0.0),
     ("beta", -1.0), ("momentum", 1.0), ("part", "body"), ("teacher", "oracle"), ("when", "never")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        AlignSettings(**{name: value})


# ------------------------------------------------------------------------------------------------ with the rounds


def test_evened_answers_favour_no_class():
    """By hand; and where answers are a common factor times something without preference, that something is left."""
    over = torch.tensor([[0.8, 0.2], [0.6, 0.4]])  # mean 0.7, 0.3
    left = torch.tensor([0.8 / 0.7, 0.2 / 0.3])
    torch.testing.assert_close(evened(over[:1], over)[0], left / left.sum())
    fair = softmax(torch.randn(5000, 4, generator=torch_generator(0)), 1)
    bent = fair * torch.tensor([1.0, 2.0, 4.0, 0.5])
    bent /= bent.sum(1, keepdim=True)
    assert evened(bent, bent).mean(0).std() < 0.2 * bent.mean(0).std()
    assert equal({"q": evened(fair, torch.ones(1, 4)).argmax(1)}, {"q": fair.argmax(1)})


def test_even_answers_change_the_doubts_and_not_the_set(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "mllmfl_lite.experiment.align", lambda m, chosen, *a: seen.append(chosen) or align(m, chosen, *a)
    )
    for even in (False, True):
        run_experiment(replace(TINY, align=replace(TINY.align, even=even)), tmp_path, "cpu", label=f"even{even}")
    plain, even = seen
    assert (plain.rows == even.rows).all() and (plain.images.labels == even.images.labels).all()
    assert not torch.equal(plain.told, even.told) and (even.told.sum(1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("wrong", [{"wrong": -0.1}, {"wrong": 1.1}, {"wrong": math.nan}])
def test_wrong_labels_are_the_controls_alone(wrong):
    with pytest.raises(ValueError, match=r"wrong must be in \[0, 1\]"):
        AlignSettings(teacher="labels", **wrong)
    with pytest.raises(ValueError, match=r"0 unless teacher is 'labels'; got 0\.2"):
        AlignSettings(teacher="mllm", wrong=0.2)


def test_the_control_errs_as_often_as_it_is_told_to():
    names = ("a", "b", "c", "d")
    labels = np.repeat([0, 1, 2, 3, 4], 1000)  # the last is none of the names
    pool = ImageSet(np.zeros((5000, 2, 2, 3), np.uint8), labels, (*names, "lobster"), "made here")
    told = PoolLabels(pool, 0.3, seed=1).class_probabilities(pool.images, names)
    assert equal({"told": told}, {"told": PoolLabels(pool, 0.3, 1).class_probabilities(pool.images, names)})
    assert not equal({"told": told}, {"told": PoolLabels(pool, 0.3, 2).class_probabilities(pool.images, names)})
    torch.testing.assert_close(told[4000:], torch.full((1000, 4), 0.25))
    confusion = told[:4000].view(4, 1000, 4).mean(1)
    torch.testing.assert_close(confusion, 0.1 + 0.6 * torch.eye(4), atol=0.04, rtol=0)
    always = PoolLabels(pool, 1.0).class_probabilities(pool.images, names)[:4000]
    assert not always[range(4000), labels[:4000]].any() and (always.max(1).values == 1).all()
    never = PoolLabels(pool).class_probabilities(pool.images, names)[:4000]
    assert never[range(4000), labels[:4000]].all()
    assert len({PoolLabels(pool, w, s).identity for w, s in ((0, 0), (0, 1), (0.3, 0), (0.3, 1), (0.5, 0))}) == 4


def test_every_teacher_that_is_named_can_be_chosen():
    for teacher in ("mllm", "clip", "imagenet", "labels"):
        assert AlignSettings(teacher=teacher).teacher == teacher


ROUNDS = FedSettings(rounds=2, clients_per_round=2, local_epochs=1, batch_size=16, report_rounds=1)


def test_each_round_is_the_mean_aligned(images, model, chosen):
    split, one = partition.iid(images.labels, 4, 0), replace(ROUNDS, rounds=1)
    plain = run_federated(model, images, split, images, settings=one)
    method = AlignEachRound(chosen, QUICK, model)
    aligned = run_federated(model, images, split, images, method, one)
    assert not equal(plain.state, aligned.state)
    model.load_state_dict(plain.state)
    seed = int(torch.randint(2**31, (1,), generator=torch_generator(0, "server", 1)))
    assert equal(aligned.state, align(model, chosen, replace(QUICK, seed=seed)).model.state_dict())


def test_without_clients_nothing_moves(images, model):
    split = partition.iid(images.labels, 4, 0)
    assert equal(model.state_dict(), run_federated(model, images, split, images, ServerOnly(), ROUNDS).state)


TINY = Experiment("cifar10_mini", num_clients=4, width=2, settings=ROUNDS, align=replace(QUICK, teacher="clip"))


def test_stage_3_shares_the_rounds_and_reports_the_aligned_model(tmp_path):
    plain = run_experiment(replace(TINY, align=None), tmp_path, "cpu", label="plain")
    result = run_experiment(TINY, tmp_path, "cpu", label="aligned")
    assert result["history"] == plain["history"], "the rounds were not run again: even their seconds are the same"
    assert len([f for f in (tmp_path / "checkpoints").iterdir()]) == 1
    assert result["summary"]["top1"] == result["aligned"]["metrics"]["top1"] != plain["summary"]["top1"]
    assert result["aligned"]["server_set"]["per_class"] == [4] * 10
    kept = {path.stem: load_model(path) for path in (tmp_path / "models").iterdir()}
    assert kept.keys() == {"plain_seed0-federated", "aligned_seed0-federated", "aligned_seed0-aligned"}
    counts, test = TINY.clients()[0].class_counts(), load_images("cifar10_mini", "test")
    assert evaluate_model(kept["aligned_seed0-aligned"], test, counts) == result["aligned"]["metrics"]
    assert evaluate_model(kept["plain_seed0-federated"], test, counts) == plain["history"][-1]["metrics"]
    assert run_experiment(TINY, tmp_path, "cpu", label="aligned")["aligned"] == result["aligned"], "read back"


@pytest.mark.parametrize("method", ["fedprox", "creff", "server_only"])
def test_each_round_is_fedavgs_alone(method):
    with pytest.raises(ValueError, match=f"is a server step of FedAvg's; got method '{method}'"):
        Experiment(method=method, align=AlignSettings(when="each round"))


def test_runs_with_another_teacher_in_each_round_are_other_runs():
    each = Experiment(align=AlignSettings(when="each round"))
    assert each.rounds_key() != replace(each, pool_images=7).rounds_key()
    at_end = Experiment(align=AlignSettings())
    assert at_end.rounds_key() == replace(at_end, pool_images=7).rounds_key() == Experiment().rounds_key()


def test_stage_3_in_each_round(tmp_path):
    each = replace(TINY, align=replace(TINY.align, when="each round"))
    result, end = (run_experiment(e, tmp_path, "cpu", label=f"{e.align.when[:3]}") for e in (each, TINY))
    assert result["summary"]["top1"] == result["history"][-1]["metrics"]["top1"] and "metrics" not in result["aligned"]
    assert result["history"][0]["metrics"] != end["history"][0]["metrics"], "the first round is aligned already"


def test_alignment_never_touches_a_client(tmp_path, monkeypatch):
    """After the rounds, every client image and label is overwritten with noise: stage 3 ends with the same bits."""
    clean = run_experiment(TINY, tmp_path / "clean", "cpu")
    run_experiment(replace(TINY, align=None), tmp_path / "poisoned", "cpu")
    train, split = TINY.clients()
    noise = np.random.default_rng(0).integers(0, 256, train.images.shape, np.uint8)
    poisoned = ImageSet(noise, train.labels, train.names, train.origin)
    rounds = next((tmp_path / "poisoned" / "checkpoints").iterdir())
    seen = []

    def watched(model, chosen, settings, device):
        seen.append(chosen)
        return align(model, chosen, settings, device)

    monkeypatch.setattr("mllmfl_lite.experiment.align", watched)
    monkeypatch.setattr(Experiment, "clients", lambda self: (poisoned, split))
    monkeypatch.setattr("mllmfl_lite.experiment.run_federated", lambda *a, **k: finished(rounds, TINY, train, split))
    after = run_experiment(TINY, tmp_path / "after", "cpu")
    assert after["aligned"]["metrics"] == clean["aligned"]["metrics"] and after["aligned"]["history"]
    assert after["aligned"]["history"] == clean["aligned"]["history"] and len(seen) == 1
    clients = {image.tobytes() for image in train.images} | {image.tobytes() for image in noise}
    assert not clients & {image.tobytes() for image in seen[0].images.images}


def finished(folder, experiment, train, split):
    """The run of the rounds as its checkpoint has it."""
    test = load_images("cifar10_mini", "test")
    model = experiment.build_model(train.num_classes)
    return run_federated(model, train, split, test, settings=experiment.settings, folder=folder)
