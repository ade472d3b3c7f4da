"""Stage 1b against the MLLM's own forward pass, closed forms, kills and bad input."""

import copy
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mllmfl_lite import pretrain as module
from mllmfl_lite.checkpoint import CheckpointError
from mllmfl_lite.data import load_images
from mllmfl_lite.data.folders import array_source, folder_source
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.models import build_model
from mllmfl_lite.stages.filters import filter_records
from mllmfl_lite.stages.mixture import SCHEDULES, CompactEncoder, FrozenReader, PretrainError, alpha_at, mixed_loss
from mllmfl_lite.stages.pretrain import PretrainDiverged, PretrainSettings, pretrain
from mllmfl_lite.stages.records import AnnotationError, bundled_annotations, read_records
from mllmfl_lite.stages.texts import read_texts
from mllmfl_lite.stages.views import ArrayViews, PictureViews, random_part
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
    return array_source(load_images("cifar10_mini", "web")).ids[:COUNT]


@pytest.fixture
def texts(records, ids, mllm):
    return read_texts(records, ids, mllm)


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
        ({"epochs": 0}, "epochs must be a whole number"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"schedule": "quadratic"}, "schedule must be one of linear, cosine, step, constant"),
        ({"precision": "int8"}, "precision must be one of float32, bfloat16"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"ramp": 1.5}, "ramp must be above 0 and at most 1"),
        ({"alpha_end": 1.2}, "alpha_end must be above 0"),
        ({"feature_weight": -1.0}, "feature_weight must not be negative"),
        ({"language_weight": 0.0}, "nothing to learn from"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        PretrainSettings(**changes)


def test_a_schedule_that_does_not_end_at_1_is_warned_of():
    with pytest.warns(UserWarning, match=r"alpha ends at 0.8, not at 1: CLIP would still be needed on the client"):
        PretrainSettings(alpha_end=0.8)


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
    with pytest.raises(PretrainError, match="no text to learn from"):
        read_texts([], ids, mllm)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(PretrainError, match="no text to learn from"):
        read_texts(read_records(tmp_path / "empty.jsonl"), ids, mllm)
    nothing = filter_records([replace(record, text="") for record in records]).kept
    with pytest.raises(PretrainError, match="filters took every record"):
        read_texts(nothing, ids, mllm)
    with pytest.raises(PretrainError, match=r"3 of 36 records are about images that are not there, such as '0011'"):
        read_texts(records, ids[:-1], mllm)
    with pytest.raises(PretrainError, match="no prompt for records of kind 'poem'"):
        read_texts([replace(records[0], kind="poem")], ids, mllm)
    with pytest.raises(AnnotationError, match="is not there"):
        read_records(tmp_path / "absent.jsonl")


# -------------------------------------------------------------------------------------------------------- the mixture


def batch_of(texts, web, mllm):
    rows = texts.batches(4, 0, 0)[0]
    images = texts.image[rows]
    return images, *texts.tokens(rows, 128)


def test_at_alpha_0_it_is_the_mllms_own_loss(texts, web, mllm):
    images, inputs, labels = batch_of(texts, web, mllm)
    views = ArrayViews(web, mllm)
    encoder = CompactEncoder(compact(), 8, 128)
    loss, parts = mixed_loss(
        encoder, FrozenReader(mllm), 0.0, views.compact(images, None), views.tokens(images), inputs, labels, small()
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
        views = ArrayViews(web, teacher)
        x, tokens = views.compact(images, None), views.tokens(images)
        losses += [mixed_loss(encoder, FrozenReader(teacher), 1.0, x, tokens, inputs, labels, small())[0].item()]
        half = mixed_loss(encoder, FrozenReader(teacher), 0.5, x, tokens, inputs, labels, small())[0].item()
        assert half != losses[-1]
    assert losses[0] == losses[1] == losses[2]
    assert mixed_loss(encoder, FrozenReader(mllm), 1.0, x, None, inputs, labels, small())[0].item() == losses[0]


def test_the_mixture_in_between_by_hand(texts, web, mllm):
    images, inputs, labels = batch_of(texts, web, mllm)
    views, reader = ArrayViews(web, mllm), FrozenReader(mllm)
    encoder = CompactEncoder(compact(), 8, 128).eval()
    x, tokens = views.compact(images, None), views.tokens(images)
    settings = small(feature_weight=0.5)
    loss, _ = mixed_loss(encoder, reader, 0.3, x, tokens, inputs, labels, settings)
    clip, own = mllm.model.model.multi_modal_projector(tokens), encoder(x)
    words = mllm.model.get_input_embeddings()(inputs).clone()
    for i in range(len(images)):
        words[i, inputs[i] == mllm.model.config.image_token_index] = 0.7 * clip[i] + 0.3 * own[i]
    chances = mllm.model(inputs_embeds=words).logits.log_softmax(-1)
    chosen = [(i, t) for i, t in zip(*torch.nonzero(labels != -100, as_tuple=True), strict=True)]
    language = -sum(chances[i, t - 1, labels[i, t]] for i, t in chosen) / len(chosen)
    cosine = (clip * own).sum(-1) / clip.norm(dim=-1) / own.norm(dim=-1)
    torch.testing.assert_close(loss, language + 0.5 * (1 - cosine).mean(), atol=1e-5, rtol=1e-5)


def test_feature_distillation_needs_no_words(texts, web, mllm):
    images, inputs, labels = batch_of(texts, web, mllm)
    views, encoder = ArrayViews(web, mllm), CompactEncoder(compact(), 8, 128)
    settings = small(language_weight=0.0, feature_weight=1.0)
    reader = FrozenReader(mllm)
    reader.loss = None  # would raise if it were called
    _, parts = mixed_loss(
        encoder, reader, 1.0, views.compact(images, None), views.tokens(images), inputs, labels, settings
    )
    assert set(parts) == {"feature"}


def test_the_projection_starts_where_the_mllms_own_puts_its_tokens(web, mllm):
    visual = FrozenReader(mllm).project(mllm.tokens(web.images))
    encoder = CompactEncoder(compact(), 8, 128)
    x = ArrayViews(web, mllm).compact(np.arange(COUNT), None)
    before = copy.deepcopy(encoder.model.state_dict())
    encoder.start_like(x, visual)
    assert same(before, encoder.model.state_dict()), "looking moved the compact model"
    own = encoder.train()(x)
    middle = own.mean((0, 1))
    spread = (own - middle).std() / (visual - visual.mean((0, 1))).std()
    assert spread.item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(middle, visual.mean((0, 1)), atol=1e-3, rtol=1e-3)


# ----------------------------------------------------------------------------------------------------------- the loop


def test_it_learns_and_changes_nothing_it_was_given(texts, web, mllm):
    model, before = compact(), mllm.identity
    given = copy.deepcopy(model.state_dict())
    done = pretrain(model, mllm, ArrayViews(web, mllm), texts, small(epochs=6, schedule="constant", augment=False))
    losses = [record["loss"] for record in done.history]
    assert np.mean(losses[-9:]) < 0.8 * np.mean(losses[:9])
    assert same(given, model.state_dict()) and not same(given, done.model.state_dict())
    fresh = copy.copy(mllm)
    fresh.__dict__.pop("identity", None)
    assert fresh.identity == before and not any(p.requires_grad for p in mllm.model.parameters())
    assert [record["alpha"] for record in done.history] == [1.0] * len(done.history)


@pytest.mark.parametrize("killed_at", [0, 1, 4])
def test_killed_and_resumed_it_ends_with_the_same_bits(texts, web, mllm, tmp_path, monkeypatch, killed_at):
    views, settings = ArrayViews(web, mllm, tmp_path / "features"), small(checkpoint_every=2)
    whole = pretrain(compact(), mllm, views, texts, settings)
    step = module._Run._step

    def dies(self, *args):
        if len(self.history) == killed_at:
            raise KeyboardInterrupt
        step(self, *args)

    monkeypatch.setattr(module._Run, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain(compact(), mllm, views, texts, settings, folder=tmp_path / "run")
    monkeypatch.undo()
    resumed = pretrain(compact(), mllm, views, texts, settings, folder=tmp_path / "run")
    assert same(whole.model.state_dict(), resumed.model.state_dict()) and same(whole.projection, resumed.projection)
    assert whole.history == resumed.history
    monkeypatch.setattr(module._Run, "_step", None)  # a finished run is read back: no further step
    again = pretrain(compact(), mllm, views, texts, settings, folder=tmp_path / "run")
    assert same(whole.model.state_dict(), again.model.state_dict())


def test_another_runs_folder_is_refused(texts, web, mllm, tmp_path):
    views = ArrayViews(web, mllm)
    pretrain(compact(), mllm, views, texts, small(epochs=1), folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"schedule: there 'linear', now 'cosine'"):
        pretrain(compact(), mllm, views, texts, small(epochs=1, schedule="cosine"), folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"texts: there"):
        pretrain(compact(), mllm, views, texts.shuffled(0), small(epochs=1), folder=tmp_path)


def test_a_loss_that_is_not_a_number_stops_it_and_names_the_batch(texts, web, mllm, tmp_path):
    class Poisoned(ArrayViews):
        def compact(self, indices, generator):
            x = super().compact(indices, generator)
            return x * math.nan if 7 in indices and generator is not None else x

    with pytest.raises(PretrainDiverged, match=r"bad_batch.json") as caught:
        pretrain(compact(), mllm, Poisoned(web, mllm), texts, small(), folder=tmp_path)
    saved = json.loads((tmp_path / "bad_batch.json").read_text())
    assert saved["images"] == caught.value.ids and "0007" in saved["images"] and len(saved["images"]) == 4
    with pytest.raises(PretrainDiverged, match="its images: "):
        pretrain(compact(), mllm, Poisoned(web, mllm), texts, small())


def test_what_does_not_fit_together_is_said_before_the_start(texts, web, mllm):
    views = ArrayViews(web, mllm)
    with pytest.raises(PretrainError, match="do not fill one batch of 64; lower batch_size"):
        pretrain(compact(), mllm, views, texts, small(batch_size=64))
    with pytest.raises(PretrainError, match="about image 11, but there are only 5 images"):
        pretrain(compact(), mllm, ArrayViews(web.subset(np.arange(5)), mllm), texts, small())
    odd = ImageSet(np.zeros((COUNT, 24, 24, 3), np.uint8), web.labels, web.names, "odd")
    with pytest.raises(ValueError, match=r"the map is 6 x 6, the grid 8 x 8; choose another image size"):
        pretrain(compact(), mllm, ArrayViews(odd, mllm), texts, small())


def test_stored_features_change_nothing_beyond_their_precision(texts, web, mllm, tmp_path):
    images = np.array([3, 1, 3])
    stored, live = ArrayViews(web, mllm, tmp_path), ArrayViews(web, mllm)
    torch.testing.assert_close(stored.tokens(images).float(), live.tokens(images), atol=2e-3, rtol=2e-3)


def test_options_that_must_not_change_the_sum(texts, web, mllm):
    views = ArrayViews(web, mllm)
    plain = pretrain(compact(), mllm, views, texts, small(epochs=1, schedule="constant"))
    lean = pretrain(compact(), mllm, views, texts, small(epochs=1, schedule="constant", gradient_checkpointing=True))
    assert plain.history[-1]["loss"] == pytest.approx(lean.history[-1]["loss"], rel=1e-3)
    rough = pretrain(compact(), mllm, views, texts, small(epochs=1, schedule="constant", precision="bfloat16"))
    assert rough.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=0.05)
    fewer = pretrain(compact(), mllm, views, texts, small(epochs=1, schedule="constant", accumulate=3))
    assert len(fewer.history) == len(plain.history) // 3
    first = np.mean([record["loss"] for record in plain.history[:1]])
    assert fewer.history[0]["loss"] == pytest.approx(first, rel=0.5)


def test_accumulated_gradients_are_those_of_one_large_batch(texts, web, mllm):
    """Without BatchNorm two half batches of equally long answers are one batch."""
    rows = texts.batches(4, 0, 0)[0]
    views, reader = ArrayViews(web, mllm), FrozenReader(mllm)

    def gradient(parts):
        encoder = CompactEncoder(compact(), 8, 128).eval()
        torch.manual_seed(0)
        for weight in encoder.projection.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        for part in parts:
            ids, labels = texts.tokens(part, 5)
            x = views.compact(texts.image[part], None)
            loss, _ = mixed_loss(encoder, reader, 1.0, x, None, ids, labels, small())
            (loss / len(parts)).backward()
        return encoder.projection[0].weight.grad

    torch.testing.assert_close(gradient([rows]), gradient([rows[:2], rows[2:]]), atol=1e-5, rtol=1e-3)


TWO_PROCESSES = """
import sys, torch
import numpy as np
from mllmfl_lite.annotate import bundled_annotations
from mllmfl_lite.data import load_images
from mllmfl_lite.models import build_model
from mllmfl_lite.pictures import array_source
from mllmfl_lite.pretrain import ArrayViews, PretrainSettings, pretrain, read_texts
from mllmfl_lite.teacher import load_mllm
from accelerate import PartialState

torch.set_num_threads(1)
web = load_images("cifar10_mini", "web")
mllm, some = load_mllm(device="cpu"), web.subset(np.arange(16))
texts = read_texts([r for r in bundled_annotations() if int(r.id) < 16], array_source(web).ids[:16], mllm)
settings = PretrainSettings(epochs=1, batch_size=4, checkpoint_every=2, augment=False)
done = pretrain(build_model("resnet8", 10, 4), mllm, ArrayViews(some, mllm), texts, settings, folder=sys.argv[1],
                device="cpu")
rank = PartialState().process_index
weights = {n: p.detach() for n, p in done.model.named_parameters()}
torch.save({"weights": weights, "losses": [record["loss"] for record in done.history]}, f"{sys.argv[1]}/rank{rank}.pt")
print(f"rank {rank}: {len(done.history)} steps")
"""


def test_two_processes_share_a_batch_and_stay_equal(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, *["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]]
    for launch in range(2):  # the second one finds the finished run
        job = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=240)
        assert job.returncode == 0, job.stderr[-3000:]
        assert "rank 0: 6 steps" in job.stdout and "rank 1: 6 steps" in job.stdout, job.stdout
        first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
        assert same(first["weights"], second["weights"])
        if launch == 0:  # each saw its own half of the batch
            assert all(a != b for a, b in zip(first["losses"], second["losses"], strict=True))
    alone = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert "holds another run (processes: there 2, now None)" in alone.stderr, alone.stderr[-3000:]


# ------------------------------------------------------------------------------------------------ pictures on the disk


def test_pictures_of_any_size_from_a_folder(tmp_path, mllm):
    rng = np.random.default_rng(0)
    for i, size in enumerate([(40, 60), (100, 30), (64, 64), (33, 47)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    views = PictureViews(folder_source(tmp_path), mllm, size=32, threads=3)
    assert len(views) == 4 and views.tokens(np.array([2, 0])).shape == (2, 64, 160)
    generator = torch.Generator
    one = views.compact(np.arange(4), generator().manual_seed(1))
    two = PictureViews(folder_source(tmp_path), mllm, size=32, threads=1).compact(
        np.arange(4), generator().manual_seed(1)
    )
    assert one.shape == (4, 3, 32, 32) and torch.equal(one, two), "threads changed a view"
    assert not torch.equal(one, views.compact(np.arange(4), generator().manual_seed(2)))
    assert torch.equal(views.compact(np.arange(4), None), views.compact(np.arange(4), None))
    records = [replace(bundled_annotations()[0], id=f"{i}.png", kind=kind) for i in range(4) for kind in load_prompts()]
    texts = read_texts(records, views.source.ids, mllm)
    done = pretrain(compact(), mllm, views, texts, small(epochs=1, batch_size=2))
    assert len(done.history) == 8 and all(math.isfinite(record["loss"]) for record in done.history)


@given(st.lists(st.floats(0, 0.999), min_size=5, max_size=5), st.integers(8, 90), st.integers(8, 90))
def test_a_random_part_has_the_size_asked_for(chances, width, height):
    assert random_part(Image.new("RGB", (width, height)), 16, chances).size == (16, 16)


def test_a_random_part_may_be_flipped():
    picture = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1))).convert("RGB")  # bright on the right
    whole = [0.999999, 0.5, 0, 0]
    plain, flipped = (np.asarray(random_part(picture, 16, [*whole, coin])).astype(int) for coin in (0.9, 0.1))
    assert plain[0, 0, 0] < plain[0, 15, 0] and np.array_equal(flipped, plain[:, ::-1])
