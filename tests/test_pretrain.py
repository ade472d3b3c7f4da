"""Pretraining against the MLLM's own forward pass, closed forms, kills and bad input."""

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mllmfl_lite import checkpoint
from mllmfl_lite.checkpoint import CheckpointError
from mllmfl_lite.data import load_images
from mllmfl_lite.data.folders import folder_images
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.models import build_model
from mllmfl_lite.repro import Execution, torch_generator
from mllmfl_lite.stages import pretrain as module
from mllmfl_lite.stages.filters import filter_records
from mllmfl_lite.stages.mixture import (
    SCHEDULES,
    CompactEncoder,
    FrozenReader,
    TextBatch,
    alpha_at,
    mixed_loss,
    new_encoder,
)
from mllmfl_lite.stages.pretrain import PretrainSettings
from mllmfl_lite.stages.pretrain import pretrain as run_pretraining
from mllmfl_lite.stages.records import bundled_annotations, read_records
from mllmfl_lite.stages.texts import Views, read_texts
from mllmfl_lite.teachers.llava import load_mllm
from mllmfl_lite.teachers.prompts import load_prompts

COUNT = 12


@pytest.fixture(scope="module")
def mllm():
    return load_mllm(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def web():
    return load_images("cifar10_mini", "web").subset(np.arange(COUNT))


@pytest.fixture(scope="module")
def records():
    return [record for record in bundled_annotations() if int(record.id) < COUNT]


@pytest.fixture(scope="module")
def ids():
    return load_images("cifar10_mini", "web").ids[:COUNT]


@pytest.fixture
def texts(records, ids, mllm):
    return read_texts(records, ids, mllm)


def pretrain(model, mllm, views, texts, settings, seed=0, folder=None):
    return run_pretraining(model, mllm, views, texts, settings, seed, Execution(folder, "cpu"))


def small(**changes):
    return PretrainSettings(**{"epochs": 2, "batch_size": 4, "checkpoint_every": 1, **changes})


def compact():
    return build_model("resnet8", 10, width=4)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


# ------------------------------------------------------------------------------------------------------- schedules


@given(
    st.sampled_from(sorted(set(SCHEDULES) - {"constant"})),
    st.integers(2, 60),
    st.floats(0.05, 1),
    st.floats(0.1, 1),
)
def test_alpha_rises_from_0_to_its_end(schedule, steps, ramp, end):
    alphas = [alpha_at(step, steps, schedule, ramp, end) for step in range(steps)]
    assert alphas[0] == 0 and alphas[-1] == pytest.approx(end)
    assert all(a <= b for a, b in itertools.pairwise(alphas))


def test_alpha_in_closed_form():
    assert [alpha_at(s, 5) for s in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [alpha_at(s, 5, "constant") for s in range(5)] == [1] * 5
    assert alpha_at(2, 5, "cosine") == pytest.approx(0.5) and alpha_at(1, 5, "cosine") < 0.25
    assert sorted({alpha_at(s, 100, "step") for s in range(100)}) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [alpha_at(s, 5, ramp=0.5) for s in range(5)] == [0, 0.5, 1, 1, 1]


def test_the_learning_rate_rises_and_falls():
    rates = [PretrainSettings(lr=1.0, warmup=0.1).rate(step, 100) for step in range(100)]
    assert np.argmax(rates) in (9, 10) and max(rates) == 1 and rates[0] == pytest.approx(0.1) and rates[-1] < 0.001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: must be greater than or equal to 1"),
        ({"batch_size": 2.5}, "batch_size: must be a valid integer"),
        ({"schedule": "quadratic"}, "schedule: must be 'linear', 'cosine'"),
        ({"precision": "int8"}, "precision: must be"),
        ({"lr": 0.0}, "lr: must be greater than 0"),
        ({"ramp": 1.5}, "ramp: must be less than or equal to 1"),
        ({"alpha_end": 1.2}, "alpha_end: must be less than"),
        ({"feature_weight": -1.0}, "feature_weight: must be greater than or equal to 0"),
        ({"language_weight": 0.0}, "nothing to learn from"),
        ({"lr": math.nan}, "lr: must be a finite number"),
        ({"feature_weight": math.inf}, "feature_weight: must be a finite number"),
        ({"epochs": 10**9}, "epochs: must be less than or equal to 1000000"),
        ({"weight_decay": 1e30}, "weight_decay: must be less than"),
        ({"max_answer_tokens": -1}, "max_answer_tokens: must be greater"),
        ({"augment": "false"}, "augment: must be a valid boolean"),
        ({"seed": 3}, "seed: there is no such setting"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        PretrainSettings(**changes)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers():
    given = PretrainSettings(epochs=np.int64(3), lr=np.float32(0.5), ramp=np.float64(0.25), augment=np.bool_(False))
    assert given == PretrainSettings(epochs=3, lr=0.5, ramp=0.25, augment=False)
    json.dumps(asdict(given))


@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
def test_the_learning_rate_in_closed_form(warmup):
    settings, steps = PretrainSettings(lr=0.5, warmup=warmup), 40
    warm = max(1, int(warmup * steps))
    rising = [0.5 * (step + 1) / warm for step in range(warm)]
    falling = [0.25 * (1 + math.cos(math.pi * i / max(1, steps - warm))) for i in range(steps - warm)]
    np.testing.assert_allclose([settings.rate(step, steps) for step in range(steps)], rising + falling)


def test_a_schedule_that_does_not_end_at_1_is_warned_of():
    with pytest.warns(UserWarning, match=r"alpha ends at 0.8, not 1: the compact model never stands alone") as said:
        PretrainSettings(alpha_end=0.8)
    assert said[0].filename == __file__


# ----------------------------------------------------------------------------------------------------------- texts


def test_texts_do_not_depend_on_the_order_of_the_file(records, ids, mllm, texts):
    turned = read_texts(list(reversed(records)), ids, mllm)
    assert turned.answers == texts.answers and np.array_equal(turned.image, texts.image)
    assert len(texts) == 3 * COUNT and sorted(set(texts.image)) == list(range(COUNT))


def test_a_text_is_question_picture_and_answer(records, texts, mllm):
    decode = mllm.processor.tokenizer.decode
    first = next(r for r in records if int(r.id) == texts.image[0] and r.kind == "complex_reasoning")
    assert decode(texts.answers[0]).strip() == first.text + "</s>"
    image = mllm.model.config.image_token_index
    for question in texts.questions:
        assert question.count(image) == 64 and "USER: " in decode(question) and decode(question).endswith("ASSISTANT:")


def test_only_the_answer_is_learned(texts):
    rows = texts.batches(4, 0, 0)[0]
    inputs, labels = texts.tokens(rows, 128)
    question = len(texts.questions[texts.kind[rows[0]]])
    assert (labels[:, :question] == -100).all()
    for i, row in enumerate(rows):
        learned = labels[i] != -100
        assert labels[i][learned].tolist() == texts.answers[row] == inputs[i][learned].tolist()
    assert texts.tokens(rows, 3)[1].ne(-100).sum() == 12  # cut


def test_an_epoch_shows_each_text_once_and_differs_from_the_next(texts):
    epoch = texts.batches(4, seed=0, epoch=0)
    rows = np.concatenate(epoch)
    assert len(set(rows.tolist())) == len(rows) == 36
    assert all(len(set(texts.kind[batch])) == 1 and len(batch) == 4 for batch in epoch)
    again, other = texts.batches(4, 0, 0), texts.batches(4, 0, 1)
    assert all(np.array_equal(a, b) for a, b in zip(epoch, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(epoch, other, strict=True))


@given(st.integers(0, 1000))
def test_shuffled_texts_never_stay_with_their_picture(seed):
    texts = module.Texts(np.repeat(np.arange(5), 3), np.tile(np.arange(3), 5), [[1]] * 3, [[2]] * 15, list("abcde"))
    shuffled = texts.shuffled(seed)
    assert not (shuffled.image == texts.image).any()
    assert sorted(shuffled.image) == sorted(texts.image)
    assert all(len(set(shuffled.image[texts.image == i])) == 1 for i in range(5))  # a picture's texts stay together


def test_texts_that_cannot_be_used(records, ids, mllm, tmp_path):
    with pytest.raises(ValueError, match="no text to learn from"):
        read_texts([], ids, mllm)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no text to learn from"):
        read_texts(read_records(tmp_path / "empty.jsonl"), ids, mllm)
    nothing = filter_records([replace(record, text="") for record in records]).kept
    with pytest.raises(ValueError, match="filters took every record"):
        read_texts(nothing, ids, mllm)
    with pytest.raises(ValueError, match=r"3 of 36 records are about images that are not in the pool, such as '0011'"):
        read_texts(records, ids[:-1], mllm)
    with pytest.raises(ValueError, match="no prompt for records of kind 'poem'"):
        read_texts([replace(records[0], kind="poem")], ids, mllm)
    with pytest.raises(ValueError, match="is not a file"):
        read_records(tmp_path / "absent.jsonl")


def test_texts_that_answered_another_prompt_are_said(records, ids, mllm):
    with pytest.warns(UserWarning, match="12 of 36 texts answered another prompt"):
        read_texts(records, ids, mllm, {**load_prompts(), "conversation": "Describe a talk."})


# -------------------------------------------------------------------------------------------------------- the mixture


def batch_of(texts, web, mllm):
    rows = texts.batches(4, 0, 0)[0]
    images = texts.image[rows]
    return images, *texts.tokens(rows, 128)


def test_at_alpha_0_it_is_the_mllms_own_loss(texts, web, mllm):
    images, inputs, labels = batch_of(texts, web, mllm)
    views = Views(web, mllm)
    encoder = CompactEncoder(compact(), 8, 128)
    loss, parts = mixed_loss(
        encoder, FrozenReader(mllm), 0.0, TextBatch(views.compact(images, None), views.tokens(images), inputs, labels)
    )
    public = mllm.model(input_ids=inputs, labels=labels, pixel_values=mllm.pixels(web.images[images])).loss
    torch.testing.assert_close(loss, public)
    assert parts["language"] == pytest.approx(public.item())
    loss.backward()
    assert max(p.grad.abs().max() for p in encoder.model.body.parameters()) == 0  # nothing to learn at 0


def test_at_alpha_1_clip_is_out_of_the_path(texts, web, mllm):
    images, inputs, labels = batch_of(texts, web, mllm)
    encoder = CompactEncoder(compact(), 8, 128).eval()
    broken = copy.copy(mllm)
    broken.model = copy.deepcopy(mllm.model)
    for part in (broken.model.model.vision_tower, broken.model.model.multi_modal_projector):
        for weight in part.parameters():
            weight.data.copy_(torch.randn(weight.shape))
    worse = copy.copy(broken)
    worse.model = copy.deepcopy(broken.model)
    worse.model.model.multi_modal_projector.linear_1.weight.data.fill_(math.nan)  # zero times this is no zero
    losses = []
    for teacher in (mllm, broken, worse):
        views = Views(web, teacher)
        x, tokens = views.compact(images, None), views.tokens(images)
        losses += [mixed_loss(encoder, FrozenReader(teacher), 1.0, TextBatch(x, tokens, inputs, labels))[0].item()]
        half = mixed_loss(encoder, FrozenReader(teacher), 0.5, TextBatch(x, tokens, inputs, labels))[0].item()
        assert half != losses[-1]
    assert losses[0] == losses[1] == losses[2]
    without = TextBatch(x, None, inputs, labels)
    assert mixed_loss(encoder, FrozenReader(mllm), 1.0, without)[0].item() == losses[0]
    with pytest.raises(ValueError, match=r"alpha 0\.9 and feature_weight 0\.0 need CLIP's tokens"):
        mixed_loss(encoder, FrozenReader(mllm), 0.9, without)
    with pytest.raises(ValueError, match=r"feature_weight 0\.5 need CLIP's tokens"):
        mixed_loss(encoder, FrozenReader(mllm), 1.0, without, 1.0, 0.5)


def test_the_mixture_in_between_by_hand(texts, web, mllm):
    images, inputs, labels = batch_of(texts, web, mllm)
    views, reader = Views(web, mllm), FrozenReader(mllm)
    encoder = CompactEncoder(compact(), 8, 128).eval()
    x, tokens = views.compact(images, None), views.tokens(images)
    loss, _ = mixed_loss(encoder, reader, 0.3, TextBatch(x, tokens, inputs, labels), 2.0, 0.5)
    clip, own = mllm.model.model.multi_modal_projector(tokens), encoder(x)
    words = mllm.model.get_input_embeddings()(inputs).clone()
    for i in range(len(images)):
        words[i, inputs[i] == mllm.model.config.image_token_index] = 0.7 * clip[i] + 0.3 * own[i]
    scores = mllm.model(inputs_embeds=words).logits.log_softmax(-1)
    chosen = [(i, t) for i, t in zip(*torch.nonzero(labels != -100, as_tuple=True), strict=True)]
    language = -sum(scores[i, t - 1, labels[i, t]] for i, t in chosen) / len(chosen)
    cosine = (clip * own).sum(-1) / clip.norm(dim=-1) / own.norm(dim=-1)
    torch.testing.assert_close(loss, 2 * language + 0.5 * (1 - cosine).mean(), atol=1e-5, rtol=1e-5)


def test_feature_distillation_needs_no_words(texts, web, mllm):
    images, inputs, labels = batch_of(texts, web, mllm)
    views, encoder = Views(web, mllm), CompactEncoder(compact(), 8, 128)
    reader = FrozenReader(mllm)
    reader.loss = None  # would raise if it were called
    batch = TextBatch(views.compact(images, None), views.tokens(images), inputs, labels)
    assert set(mixed_loss(encoder, reader, 1.0, batch, 0.0, 1.0)[1]) == {"feature"}


def test_the_projection_starts_where_the_mllms_own_puts_its_tokens(web, mllm):
    visual = FrozenReader(mllm).project(mllm.tokens(web.images))
    encoder = CompactEncoder(compact(), 8, 128)
    x = Views(web, mllm).compact(np.arange(COUNT), None)
    before = copy.deepcopy(encoder.model.state_dict())
    encoder.start_like(x, visual)
    assert same(before, encoder.model.state_dict()), "looking moved the compact model"
    own = encoder.train()(x)
    middle = own.mean((0, 1))
    spread = (own - middle).std() / (visual - visual.mean((0, 1))).std()
    assert spread.item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(middle, visual.mean((0, 1)), atol=1e-3, rtol=1e-3)


# ----------------------------------------------------------------------------------------------------------- the loop


def test_two_epochs_in_plain_words(texts, web, mllm):
    views, reader, seed = Views(web, mllm), FrozenReader(mllm), 5
    settings = small(weight_decay=0.5, lr=0.01, feature_weight=0.5)
    encoder = new_encoder(compact(), mllm, views, texts, seed).train()
    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.5)
    losses = []
    for epoch in range(2):
        for rows in texts.batches(4, seed, epoch):
            step, images = len(losses), texts.image[rows]
            x = views.compact(images, torch_generator(seed, "views", step, 0, 0))
            batch = TextBatch(x, views.tokens(images), *texts.tokens(rows, 128))
            loss, _ = mixed_loss(encoder, reader, settings.alpha(step, 18), batch, 1.0, 0.5)
            optimizer.param_groups[0]["lr"] = settings.rate(step, 18)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            losses.append(loss.item())
    done = pretrain(compact(), mllm, views, texts, settings, seed)
    np.testing.assert_allclose([record["loss"] for record in done.history], losses, rtol=1e-3)
    torch.testing.assert_close(done.projection, dict(encoder.projection.state_dict()), rtol=1e-2, atol=1e-3)


def test_the_projection_depends_on_its_seed_alone(texts, web, mllm):
    views, before = Views(web, mllm), torch.get_rng_state()
    one, two, other = (new_encoder(compact(), mllm, views, texts, seed).projection.state_dict() for seed in (0, 0, 1))
    assert same(one, two) and not same(one, other) and torch.equal(before, torch.get_rng_state())


def test_it_learns_and_changes_nothing_it_was_given(texts, web, mllm):
    model, before = compact(), mllm.identity
    given = copy.deepcopy(model.state_dict())
    done = pretrain(model, mllm, Views(web, mllm), texts, small(epochs=6, schedule="constant", augment=False))
    losses = [record["loss"] for record in done.history]
    assert np.mean(losses[-9:]) < 0.8 * np.mean(losses[:9])
    assert same(given, model.state_dict()) and not same(given, done.model.state_dict())
    fresh = copy.copy(mllm)
    fresh.__dict__.pop("identity", None)
    assert fresh.identity == before and not any(p.requires_grad for p in mllm.model.parameters())
    assert [record["alpha"] for record in done.history] == [1.0] * len(done.history)
    assert not done.model.training and all(p.requires_grad for p in done.model.parameters())


def end(run):
    return {**run.model.state_dict(), **run.projection}


@pytest.mark.parametrize("place", ["in a step", "in the middle of a checkpoint", "after a checkpoint's weights"])
@pytest.mark.parametrize("number", [0, 3])
def test_killed_anywhere_it_ends_with_the_same_bits(texts, web, mllm, tmp_path, monkeypatch, place, number):
    views, settings = Views(web, mllm, tmp_path / "features"), small(checkpoint_every=2)
    whole = pretrain(compact(), mllm, views, texts, settings)
    where, name = {"in a step": (torch.optim.AdamW, "step"), "in the middle of a checkpoint": (os, "fsync")}.get(
        place, (checkpoint, "write_json")
    )
    real, calls = getattr(where, name), itertools.count()

    def dies(*args, **more):
        if next(calls) == number:
            raise KeyboardInterrupt
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, dies)
        with pytest.raises(KeyboardInterrupt):
            pretrain(compact(), mllm, views, texts, settings, folder=tmp_path / "run")
    resumed = pretrain(compact(), mllm, views, texts, settings, folder=tmp_path / "run")
    assert same(end(whole), end(resumed)) and whole.history == resumed.history
    monkeypatch.setattr(module._Run, "_step", None)  # a finished run is read back: no further step
    again = pretrain(compact(), mllm, views, texts, settings, folder=tmp_path / "run")
    assert same(end(whole), end(again)) and again.history == whole.history
    assert again.seconds == pytest.approx(resumed.seconds, abs=1e-3)


def test_a_damaged_checkpoint_is_named(texts, web, mllm, tmp_path):
    views = Views(web, mllm)
    pretrain(compact(), mllm, views, texts, small(epochs=1), folder=tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{weights.name} is damaged"):
        pretrain(compact(), mllm, views, texts, small(epochs=1), folder=tmp_path)


def test_each_step_has_the_alpha_and_learning_rate_of_its_schedule(texts, web, mllm, monkeypatch):
    used, real = [], torch.optim.AdamW.step

    def step(self, *more):
        used.append(self.param_groups[0]["lr"])
        return real(self, *more)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    settings = small(ramp=0.5, warmup=0.3, checkpoint_every=7)
    alphas = [record["alpha"] for record in pretrain(compact(), mllm, Views(web, mllm), texts, settings).history]
    assert alphas[0] == 0 and alphas[-1] == 1 and alphas[9:] == [1] * 9 and alphas[:10] == sorted(set(alphas))
    assert used == [settings.rate(step, 18) for step in range(18)] and np.argmax(used) == 4


def test_a_constant_alpha_below_1_mixes_to_the_end(texts, web, mllm):
    with pytest.warns(UserWarning, match="alpha ends at 0.5"):
        half = small(epochs=1, schedule="constant", alpha_end=0.5)
    views = Views(web, mllm)
    mixed = pretrain(compact(), mllm, views, texts, half).history
    alone = pretrain(compact(), mllm, views, texts, small(epochs=1, schedule="constant")).history
    assert [record["alpha"] for record in mixed] == [0.5] * 9 and mixed[0]["loss"] != alone[0]["loss"]


def test_seed_order_and_augmentation_decide_the_run(texts, web, mllm):
    views = Views(web, mllm)

    def losses(seed=0, **changes):
        history = pretrain(compact(), mllm, views, texts, small(epochs=1, schedule="constant", **changes), seed).history
        return [record["loss"] for record in history]

    first = losses()
    assert first == losses(np.int64(0))
    assert len({tuple(first), tuple(losses(1)), tuple(losses(order="random")), tuple(losses(augment=False))}) == 4


def test_another_runs_folder_is_refused(texts, web, mllm, tmp_path):
    views = Views(web, mllm)
    pretrain(compact(), mllm, views, texts, small(epochs=1), folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"schedule: there 'linear', now 'cosine'"):
        pretrain(compact(), mllm, views, texts, small(epochs=1, schedule="cosine"), folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"texts: there"):
        pretrain(compact(), mllm, views, texts.shuffled(0), small(epochs=1), folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"seed: there 0, now 1"):
        pretrain(compact(), mllm, views, texts, small(epochs=1), 1, folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"initial_weights: there"):
        pretrain(build_model("resnet8", 10, 4, seed=1), mllm, views, texts, small(epochs=1), folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"images: there"):
        pretrain(compact(), mllm, Views(web.subset(np.r_[1, :COUNT]), mllm), texts, small(epochs=1), folder=tmp_path)
    other = copy.copy(mllm)
    other.__dict__["identity"] = "llava-other"
    with pytest.raises(CheckpointError, match=r"mllm: there .* now 'llava-other'"):
        pretrain(compact(), other, views, texts, small(epochs=1), folder=tmp_path)


def test_a_loss_that_is_not_a_number_stops_it_and_names_the_batch(texts, web, mllm):
    class Poisoned(Views):
        def compact(self, indices, generator):
            x = super().compact(indices, generator)
            return x * math.nan if 7 in indices and generator is not None else x

    with pytest.raises(ValueError, match=r"its images: (\d{4}, ){0,3}0007(, \d{4}){0,3}\."):
        pretrain(compact(), mllm, Poisoned(web, mllm), texts, small())


def test_a_gradient_that_is_not_a_number_changes_no_weight(texts, web, mllm, tmp_path, monkeypatch):
    real, steps = module.mixed_loss, itertools.count()

    def poisoned(encoder, *more):
        loss, parts = real(encoder, *more)
        if next(steps) == 2:  # finite, with an infinite derivative
            loss = loss + (0 * encoder.projection[0].bias.sum()).sqrt()
        return loss, parts

    views, settings = Views(web, mllm), small()
    with monkeypatch.context() as patch:
        patch.setattr(module, "mixed_loss", poisoned)
        with pytest.raises(ValueError, match="the loss or gradient of step 2 is not finite"):
            pretrain(compact(), mllm, views, texts, settings, folder=tmp_path)
    whole, resumed = (pretrain(compact(), mllm, views, texts, settings, folder=f) for f in (None, tmp_path))
    assert same(end(whole), end(resumed))


def test_what_does_not_fit_together_is_said_before_the_start(texts, web, mllm):
    views = Views(web, mllm)
    with pytest.raises(ValueError, match="do not fill one batch of 64; lower batch_size"):
        pretrain(compact(), mllm, views, texts, small(batch_size=64))
    with pytest.raises(ValueError, match="about image 11, but there are only 5 images"):
        pretrain(compact(), mllm, Views(web.subset(np.arange(5)), mllm), texts, small())
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or 'cuda'; got 'mps'"):
        Views(web, mllm, device="mps")
    elsewhere = Views(web, mllm)
    elsewhere.device = torch.device("cuda")
    with pytest.raises(ValueError, match="the views are on cuda; give all three the same device"):
        pretrain(compact(), mllm, elsewhere, texts, small())
    odd = ImageSet(np.zeros((COUNT, 24, 24, 3), np.uint8), web.labels, web.names, "odd")
    with pytest.raises(ValueError, match=r"the map is 6 x 6, the grid 8 x 8; choose another image size"):
        pretrain(compact(), mllm, Views(odd, mllm), texts, small())


def test_texts_that_fill_no_batch_are_said(records, ids, web, mllm):
    few = read_texts([r for r in records if r.kind != "conversation" or int(r.id) < 3], ids, mllm)
    with pytest.warns(UserWarning, match="3 texts are never used: their kind does not fill a batch of 4") as said:
        pretrain(compact(), mllm, Views(web, mllm), few, small(epochs=1))
    assert len(said) == 1


def test_stored_features_change_nothing_beyond_their_precision(texts, web, mllm, tmp_path):
    images = np.array([3, 1, 3])
    stored, live = Views(web, mllm, tmp_path), Views(web, mllm)
    torch.testing.assert_close(stored.tokens(images).float(), live.tokens(images), atol=2e-3, rtol=2e-3)


def test_options_that_must_not_change_the_sum(texts, web, mllm):
    views = Views(web, mllm)
    plain = pretrain(compact(), mllm, views, texts, small(epochs=1, schedule="constant"))
    lean = pretrain(compact(), mllm, views, texts, small(epochs=1, schedule="constant", gradient_checkpointing=True))
    assert plain.history[-1]["loss"] == pytest.approx(lean.history[-1]["loss"], rel=1e-3)
    rough = pretrain(compact(), mllm, views, texts, small(epochs=1, schedule="constant", precision="bfloat16"))
    assert rough.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=0.05)


def test_gradients_are_clipped_to_a_norm_of_one(texts, web, mllm, monkeypatch):
    seen, real = [], torch.optim.AdamW.step

    def step(self, *more):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return real(self, *more)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    done = pretrain(
        compact(), mllm, Views(web, mllm), texts, small(epochs=1, schedule="constant", language_weight=50.0)
    )
    assert max(record["gradient"] for record in done.history) > 1.1 and max(seen) == pytest.approx(1.0, abs=1e-3)


def test_random_batches_mix_lengths(texts):
    """As many rows of each text, in another grouping: sorted batches hold answers of similar length."""

    def spread(by_length):
        lengths = [[len(texts.answers[row]) for row in rows] for rows in texts.batches(4, 0, 0, by_length)]
        return np.mean([np.ptp(own) for own in lengths])

    assert spread(False) > spread(True)


TWO_PROCESSES = """
import os, sys

import numpy as np
import torch
from accelerate import PartialState
from mllmfl_lite.data import load_images
from mllmfl_lite.models import build_model
from mllmfl_lite.repro import Execution
from mllmfl_lite.stages.pretrain import PretrainSettings, pretrain
from mllmfl_lite.stages.records import bundled_annotations
from mllmfl_lite.stages.texts import Views, read_texts
from mllmfl_lite.teachers.llava import load_mllm

torch.set_num_threads(1)
web, mllm = load_images("cifar10_mini", "web"), load_mllm(device="cpu", dtype="float32")
texts = read_texts([r for r in bundled_annotations() if int(r.id) < 12], web.ids[:12], mllm)
parts = build_model("resnet8", 10, 4), mllm, Views(web.subset(np.arange(12)), mllm), texts
settings = PretrainSettings(epochs=1, batch_size=4, checkpoint_every=2, augment=False)
rank = os.environ["RANK"]
for launch in range(2):  # the second one finds the finished run
    done = pretrain(*parts, settings, 0, Execution(sys.argv[1], "cpu"))
    weights = {n: p.detach() for n, p in done.model.named_parameters()}
    losses = [record["loss"] for record in done.history]
    torch.save({"weights": weights, "losses": losses}, f"{sys.argv[1]}/launch{launch}-rank{rank}.pt")
    PartialState().wait_for_everyone()
"""


def test_two_processes_share_a_batch_and_stay_equal(texts, web, mllm, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    job = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert job.returncode == 0, job.stderr[-3000:]
    (one, two), again = ([torch.load(tmp_path / f"launch{n}-rank{rank}.pt") for rank in (0, 1)] for n in (0, 1))
    assert len(one["losses"]) == 3 and same(one["weights"], two["weights"])
    assert all(a != b for a, b in zip(one["losses"], two["losses"], strict=True)), "each sees its half of the batch"
    assert all(same(one["weights"], other["weights"]) and other["losses"] == one["losses"] for other in again)
    with pytest.raises(CheckpointError, match=r"holds another run \(processes: there 2, now 1\)"):
        pretrain(compact(), mllm, Views(web, mllm), texts, small(epochs=1, augment=False), folder=tmp_path)


# ------------------------------------------------------------------------------------------------ pictures on the disk


def test_pictures_of_any_size_from_a_folder(tmp_path, mllm):
    rng = np.random.default_rng(0)
    for i, size in enumerate([(40, 60), (100, 30), (64, 64), (33, 47)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    views = Views(folder_images(tmp_path, 32), mllm)
    assert len(views) == 4 and views.tokens(np.array([2, 0])).shape == (2, 64, 160)
    generator = torch.Generator
    one = views.compact(np.arange(4), generator().manual_seed(1))
    two = Views(folder_images(tmp_path, 32), mllm).compact(np.arange(4), generator().manual_seed(1))
    assert one.shape == (4, 3, 32, 32) and torch.equal(one, two)
    assert not torch.equal(one, views.compact(np.arange(4), generator().manual_seed(2)))
    assert torch.equal(views.compact(np.arange(4), None), views.compact(np.arange(4), None))
    described = [record for record in bundled_annotations() if record.kind == "detailed_description"][:4]
    texts = read_texts([replace(r, id=f"{i}.png") for i, r in enumerate(described)], views.pool.ids, mllm)
    done = pretrain(compact(), mllm, views, texts, small(batch_size=2))
    assert len(done.history) == 4 and all(math.isfinite(record["loss"]) for record in done.history)


def test_images_that_cannot_be_opened_are_all_named_before_the_first_step(tmp_path, records, mllm):
    for i in range(4):
        Image.new("RGB", (40, 40), (i, 2 * i, 0)).save(tmp_path / f"{i}.jpg")
    described = [record for record in records if record.kind == "detailed_description"][:4]
    views = Views(folder_images(tmp_path, 32), mllm)
    texts = read_texts([replace(r, id=f"{i}.jpg") for i, r in enumerate(described)], views.pool.ids, mllm)
    for i in (1, 3):
        path = tmp_path / f"{i}.jpg"
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"^2 images that texts are about cannot be used: 1\.jpg .*; 3\.jpg [^\n]*$"):
        pretrain(compact(), mllm, views, texts, small(batch_size=2))
