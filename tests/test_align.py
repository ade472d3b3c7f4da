"""Alignment against closed forms, and stage 3 of whole experiments."""

import copy
import itertools
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_images
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, softmax

from mllmfl_lite.data import load_images, partition
from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.metrics import evaluate_model
from mllmfl_lite.federated import AlignEachRound, Federation, FedResult, FedSettings, run_federated
from mllmfl_lite.models import CompactModel, build_model, load_model
from mllmfl_lite.repro import torch_generator
from mllmfl_lite.runs import Experiment, load_federation, run_experiment
from mllmfl_lite.runs.run import rounds_key
from mllmfl_lite.stages.align import AlignSettings, align, alignment_loss
from mllmfl_lite.stages.server_set import describe, draw_server_set
from mllmfl_lite.teachers.answers import PoolLabels

NAMES = ("red", "green", "blue")
QUICK = AlignSettings(per_class=4, epochs=2, batch_size=8)


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def answers(images):
    torch.manual_seed(0)
    return softmax(torch.randn(len(images), 3), 1)


@pytest.fixture
def chosen(images, answers):
    return draw_server_set(images, answers, NAMES, 4)


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
    answers = torch.from_numpy(rng.dirichlet([1, 1, 1], 40)).float()
    pool = ImageSet(np.zeros((40, 2, 2, 3), np.uint8), rng.integers(0, 2, 40), ("a", "b"), "pool")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = draw_server_set(pool, answers, NAMES, per_class)
    for c in range(3):
        mine = np.flatnonzero(answers.argmax(1).numpy() == c)
        kept = set(chosen.rows[chosen.images.labels == c].tolist())
        expected = sorted(mine.tolist(), key=lambda i: -answers[i, c].item())[:per_class]
        assert kept == set(expected)
    assert len(set(chosen.rows.tolist())) == len(chosen) and chosen.images.names == NAMES
    assert torch.equal(chosen.probabilities, answers[torch.from_numpy(chosen.rows)])


def test_the_pools_labels_are_not_looked_at(images, answers):
    other = ImageSet(images.images, 2 - images.labels, images.names, images.origin)
    one, two = (draw_server_set(pool, answers, NAMES, 4) for pool in (images, other))
    assert np.array_equal(one.rows, two.rows) and np.array_equal(one.images.labels, two.images.labels)


def test_classes_that_the_pool_lacks_are_named(images, answers):
    answers = answers.clone()
    answers[:, 1] = 0
    answers = answers / answers.sum(1, keepdim=True)
    with pytest.warns(UserWarning, match=r"fewer than 4 images of 1 of 3 classes: green \(0\)"):
        chosen = draw_server_set(images, answers, NAMES, 4)
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
def test_answers_that_do_not_fit_are_refused(images, answers, change, says):
    with pytest.raises(ValueError, match=says):
        draw_server_set(images, change(answers), NAMES, 4)


def test_the_control_that_reads_labels(images):
    answers = PoolLabels(images).class_probabilities(images.images, (*images.names[:2], "other"))
    assert torch.equal(answers.argmax(1)[images.labels < 2], torch.from_numpy(images.labels[images.labels < 2]))
    torch.testing.assert_close(answers[images.labels == 2], torch.full((20, 3), 1 / 3))


def test_an_image_without_a_preferred_class_stands_for_none(images, answers):
    undecided = answers.clone()
    undecided[::2] = torch.tensor([0.4, 0.2, 0.4])
    with pytest.warns(UserWarning, match="fewer than 60 images of 3 of 3 classes"):
        chosen = draw_server_set(images, undecided, NAMES, 60)
    assert chosen.rows.tolist() == list(range(1, 60, 2))
    with pytest.raises(ValueError, match=r"prefers no class for any of the 60 images.* images of red, green"):
        draw_server_set(images, torch.full((60, 3), 1 / 3), NAMES, 4)
    with pytest.raises(ValueError, match="prefers no class"):  # a pool without labels of these classes
        draw_server_set(images, PoolLabels(images).class_probabilities(images.images, NAMES), NAMES, 4)


def test_answers_of_any_float_type_are_taken(images, answers, chosen):
    for other in (answers.numpy(), answers.double(), answers.clone().requires_grad_()):
        drawn = draw_server_set(images, other, list(NAMES), np.int64(4))
        assert drawn.probabilities.dtype == torch.float32 and not drawn.probabilities.requires_grad
        assert np.array_equal(drawn.rows, chosen.rows) and torch.equal(drawn.probabilities, chosen.probabilities)
    with pytest.raises(ValueError, match="class names must be a sequence of strings"):
        draw_server_set(images, answers, "rgb", 4)


def test_a_set_needs_an_image_of_each_class(images, answers):
    with pytest.raises(ValueError, match="per_class is the images of each class, at least 1; got 0"):
        draw_server_set(images, answers, NAMES, 0)


def test_of_equally_confident_images_the_first_are_taken():
    images = make_images(300)
    sure = torch.eye(3)[torch.from_numpy(images.labels)]
    assert draw_server_set(images, sure, NAMES, 5).rows.tolist() == list(range(15))


def test_a_pool_without_an_image_is_refused(images, answers):
    with pytest.raises(ValueError, match=r"\(0, 3\), with at least one image"):
        draw_server_set(images.subset(np.empty(0, int)), answers[:0], NAMES, 4)


def test_a_server_set_that_does_not_fit_the_model_is_refused(model, chosen):
    with pytest.raises(ValueError, match="has 3 classes, the model's head 5"):
        align(build_model("resnet8", 5, width=4), chosen, QUICK)
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or 'cuda'; got 'mps'"):
        align(model, chosen, QUICK, device="mps")


def test_class_names_are_compared_in_order(model, chosen):
    model.names = NAMES
    align(model, chosen, replace(QUICK, epochs=1))
    model.names = ("red", "blue", "green")
    with pytest.raises(
        ValueError, match="same class names in the same order; the first difference is 'green' and 'blue'"
    ):
        align(model, chosen, QUICK)


def test_a_last_batch_of_one_image_that_batchnorm_refuses(chosen):
    body = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4))  # to one pixel
    with pytest.raises(ValueError, match=r"a batch of 1 images is too small \(.*\); change batch_size"):
        align(CompactModel(body, 4, 3), chosen, replace(QUICK, batch_size=11))
    align(CompactModel(body, 4, 3), chosen, replace(QUICK, batch_size=11, part="head"))


def test_how_often_the_teacher_is_right(images):
    answers = torch.eye(3)[torch.from_numpy(images.labels)]
    assert describe(draw_server_set(images, answers, images.names, 4), images)["labels_right"] == 1.0
    turned = describe(draw_server_set(images, answers.roll(1, 1), images.names, 4), images)
    assert turned["labels_right"] == 0.0 and turned["images"] == 12 and turned["per_class"] == [4, 4, 4]


# ------------------------------------------------------------------------------------------------ training


def test_alignment_is_repeatable_and_leaves_the_given_model_alone(model, chosen):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    one, two = (align(model, chosen, QUICK).model.state_dict() for _ in range(2))
    other = align(model, chosen, QUICK, seed=1).model.state_dict()
    assert equal(before, model.state_dict()) and equal(one, two) and not equal(one, other)


def test_two_epochs_in_plain_words(model, chosen):
    settings = AlignSettings(epochs=2, batch_size=5, lr=0.05, momentum=0.5, beta=2.0)
    mine, batches, draws = copy.deepcopy(model).train(), Batches(chosen.images), torch_generator(3, "alignment")
    speed = {name: torch.zeros_like(p) for name, p in mine.named_parameters()}
    for lr in (0.05, 0.025):
        parts = torch.randperm(12, generator=draws).split(5)
        for part, x in zip(parts, list(batches.stream(parts, draws)), strict=True):
            loss = alignment_loss(mine(x), batches.labels[part], chosen.probabilities[part], 2.0, 2.0)
            gradients = torch.autograd.grad(loss, list(mine.parameters()))
            with torch.no_grad():
                for (name, p), gradient in zip(mine.named_parameters(), gradients, strict=True):
                    speed[name].mul_(0.5).add_(gradient)
                    p.sub_(lr * speed[name])
    found = align(model, chosen, settings, 3).model
    torch.testing.assert_close(dict(found.state_dict()), dict(mine.state_dict()), rtol=1e-3, atol=1e-4)


def test_the_head_alone(model, chosen):
    start, after = model.state_dict(), align(model, chosen, replace(QUICK, part="head")).model.state_dict()
    assert {n for n in after if not torch.equal(start[n], after[n])} == {"head.weight", "head.bias"}


def test_alignment_learns_what_the_teacher_says(images, model):
    answers = torch.eye(3)[torch.from_numpy(images.labels)]
    chosen = draw_server_set(images, answers, NAMES, 10)
    done = align(model, chosen, AlignSettings(per_class=10, epochs=15, batch_size=8, lr=0.05))
    assert done.history[-1]["loss"] < done.history[0]["loss"] / 2


def test_weights_lost_in_the_very_last_step_are_said(chosen):
    class Large(nn.Module):
        def forward(self, x):
            return 1e37 * x[:, :, :1, :1]

    model = CompactModel(Large(), 3, 3)
    nn.init.zeros_(model.head.weight)
    huge = replace(QUICK, epochs=1, batch_size=len(chosen), lr=100.0, beta=0.0)
    with pytest.raises(ValueError, match=r"weights after epoch 1 are not finite; lower lr \(it is 100\.0\)"):
        align(model, chosen, huge)


def test_a_loss_that_is_lost_is_said(model, chosen, monkeypatch):
    steps = itertools.count()
    monkeypatch.setattr(
        "mllmfl_lite.stages.align.alignment_loss",
        lambda z, *more: cross_entropy(z, more[0]) * (math.nan if next(steps) == 3 else 1),
    )
    with pytest.raises(ValueError, match=r"the loss of step 2 in epoch 2 is not finite; lower lr"):
        align(model, chosen, QUICK)


def test_numbers_of_numpy_are_numbers(model, chosen):
    given = AlignSettings(np.int64(4), epochs=np.int32(2), batch_size=np.uint8(8), lr=np.float32(0.5))
    assert given == AlignSettings(4, epochs=2, batch_size=8, lr=0.5)
    assert equal(*(align(model, chosen, QUICK, seed=seed).model.state_dict() for seed in (3, np.int64(3))))


@pytest.mark.parametrize(
    ("name", "value"),
    [("per_class", 0), ("epochs", 0), ("batch_size", 1.5), ("lr", 0.0), ("lr", math.nan), ("temperature", 0.0),
     ("temperature", 1e-9), ("beta", -1.0), ("beta", math.inf), ("momentum", 1.0), ("part", "body"), ("epochs", 10**9),
     ("lr", 1e30), ("teacher", "oracle"), ("when", "never")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: must be [^\n]*$"):
        AlignSettings(**{name: value})


# ------------------------------------------------------------------------------------------------ with the rounds


def test_every_teacher_that_is_named_can_be_chosen():
    for teacher in ("mllm", "clip", "imagenet", "labels"):
        assert AlignSettings(teacher=teacher).teacher == teacher


ROUNDS = FedSettings(rounds=2, clients_per_round=2, local_epochs=1, batch_size=16, report_rounds=1)


def test_each_round_is_the_mean_aligned(images, model, chosen):
    split, one = partition.iid(images.labels, 4, 0), replace(ROUNDS, rounds=1)
    plain = run_federated(model, Federation(images, split, images), None, one)
    method = AlignEachRound(chosen, QUICK, model)
    aligned = run_federated(model, Federation(images, split, images), method, one)
    assert not equal(plain.state, aligned.state)
    model.load_state_dict(plain.state)
    seed = int(torch.randint(2**31, (1,), generator=torch_generator(0, "server", 1)))
    assert equal(aligned.state, align(model, chosen, QUICK, seed).model.state_dict())


WITH_CLIP = replace(QUICK, teacher="clip")
TINY = Experiment(
    "cifar10_mini", num_clients=4, width=2, stages=(2, 3), pool_images=300, federated=ROUNDS, align=WITH_CLIP
)
ROUNDS_ALONE = replace(TINY, stages=(2,), align=AlignSettings())


def test_stage_3_shares_the_rounds_and_reports_the_aligned_model(tmp_path):
    plain = run_experiment(ROUNDS_ALONE, tmp_path, "cpu", label="plain")
    result = run_experiment(TINY, tmp_path, "cpu", label="aligned")
    assert result["history"] == plain["history"], "the rounds were not run again: even their seconds are the same"
    assert len(list(tmp_path.glob("checkpoints/*/run.json"))) == 1
    assert result["summary"]["top1"] == result["aligned"]["metrics"]["top1"] != plain["summary"]["top1"]
    assert result["aligned"]["server_set"]["per_class"] == [4] * 10
    kept = {path.stem: load_model(path) for path in (tmp_path / "models").iterdir()}
    assert kept.keys() == {"plain_seed0-federated", "aligned_seed0-federated", "aligned_seed0-aligned"}
    counts, test = load_federation(TINY).train.class_counts(), load_images("cifar10_mini", "test")
    assert evaluate_model(kept["aligned_seed0-aligned"], test, counts) == result["aligned"]["metrics"]
    assert evaluate_model(kept["plain_seed0-federated"], test, counts) == plain["history"][-1]["metrics"]
    assert run_experiment(TINY, tmp_path, "cpu", label="aligned")["aligned"] == result["aligned"], "read back"


@pytest.mark.parametrize("method", ["fedprox", "creff"])
def test_each_round_is_fedavgs_alone(method):
    with pytest.raises(ValueError, match="is a server step of 'fedavg' in stage 2"):
        Experiment(method=method, stages=(2, 3), align=AlignSettings(when="each round"))


def test_runs_with_another_teacher_in_each_round_are_other_runs():
    each = Experiment(stages=(2, 3), align=AlignSettings(when="each round"))
    assert rounds_key(each) != rounds_key(replace(each, pool_images=7))
    at_end = Experiment(stages=(2, 3))
    assert rounds_key(at_end) == rounds_key(replace(at_end, pool_images=7)) == rounds_key(Experiment())


def test_stage_3_in_each_round(tmp_path):
    each = replace(TINY, align=replace(TINY.align, when="each round"))
    result, end = (run_experiment(e, tmp_path, "cpu", label=f"{e.align.when[:3]}") for e in (each, TINY))
    assert result["summary"]["top1"] == result["history"][-1]["metrics"]["top1"] and "metrics" not in result["aligned"]
    assert result["history"][0]["metrics"] != end["history"][0]["metrics"], "the first round is aligned already"


def test_alignment_never_touches_a_client(tmp_path, monkeypatch):
    """After the rounds, every client image and label is overwritten with noise: stage 3 ends with the same bits."""
    clean = run_experiment(TINY, tmp_path / "clean", "cpu")
    run_experiment(ROUNDS_ALONE, tmp_path / "poisoned", "cpu")
    there = load_federation(TINY)
    noise = np.random.default_rng(0).integers(0, 256, there.train.images.shape, np.uint8)
    poisoned = ImageSet(noise, there.train.labels, there.train.names, there.train.origin)
    state = load_model(tmp_path / "poisoned" / "models" / "fedavg_seed0-federated.safetensors").state_dict()
    history = json.loads((tmp_path / "poisoned" / "fedavg_seed0.json").read_text())["history"]
    seen = []

    def watched(model, chosen, *more):
        seen.append(chosen)
        return align(model, chosen, *more)

    monkeypatch.setattr("mllmfl_lite.runs.run.align", watched)
    monkeypatch.setattr("mllmfl_lite.runs.run.load_federation", lambda _: there._replace(train=poisoned))
    monkeypatch.setattr("mllmfl_lite.runs.run.run_federated", lambda *_: FedResult(state, state, history))
    after = run_experiment(TINY, tmp_path / "after", "cpu")
    assert after["aligned"]["metrics"] == clean["aligned"]["metrics"] and after["aligned"]["history"]
    assert after["aligned"]["history"] == clean["aligned"]["history"] and len(seen) == 1
    clients = {image.tobytes() for image in there.train.images} | {image.tobytes() for image in noise}
    assert not clients & {image.tobytes() for image in seen[0].images.images}


def test_the_step_size_falls_along_half_a_cosine(model, chosen, monkeypatch):
    """Its value in each epoch, in closed form, as the optimiser was given it."""
    used, real = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (used.append(self.param_groups[0]["lr"]), real(self))[1])
    align(model, chosen, replace(QUICK, epochs=5, batch_size=len(chosen), lr=0.1))
    np.testing.assert_allclose(used, [0.05 * (1 + math.cos(math.pi * epoch / 5)) for epoch in range(5)], rtol=1e-6)
