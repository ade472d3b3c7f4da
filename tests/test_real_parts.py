"""The real parts' code on made-up parts: nothing is downloaded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images
from real_parts import smollm, stage1
from real_parts.encoder import TOKENS, Encoder, choices, pool_map, pooled
from real_parts.pool import split_pool
from real_parts.reader import RealTeacher, Words, load_reader, new_reader, save_reader
from real_parts.reading import gate, random_batches, train_reader
from real_parts.stage1 import CONDITIONS, Learner, Targets, settings_of, train_stage1
from real_parts.wording import PROMPTS, describe, split_words, vocabulary, write_records
from standins.claims import Facts
from standins.training import Schedule
from table_real_parts import table
from torch import nn

from mllmfl_lite.checkpoint import RunFolder
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.models import build_model
from mllmfl_lite.repro import sha256_arrays
from mllmfl_lite.runs.results import save_result
from mllmfl_lite.stages.mixture import FrozenReader
from mllmfl_lite.stages.pretrain import PretrainSettings, pretrain
from mllmfl_lite.stages.texts import Texts, Views, read_texts

NAMES = [f"thing {word}" for word in "abcdefghij"] * 100
INSIDE = 8


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, INSIDE, 4, 4), nn.BatchNorm2d(INSIDE)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.1, 2)

    def extract_features(self, x):
        return self.norm(self.layer(x)).relu()

    def forward(self, x):
        return self.extract_features(x).mean((2, 3))


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder("made", Trunk(), nn.Linear(INSIDE, 1000), torch.device("cpu"), size=24)


@pytest.fixture
def pool():
    return make_images(64, size=32)


@pytest.fixture
def teacher(encoder):
    words = Words(vocabulary(NAMES))
    return RealTeacher("made", new_reader(len(words.words), INSIDE, 0, layers=1, width=16), words, encoder)


def texts_about(pool, encoder, teacher):
    chosen = choices(encoder, pooled(encoder.tokens(pool.images).numpy()))[0]
    return read_texts(write_records(pool.images, chosen.tolist(), NAMES, pool.ids), pool.ids, teacher, PROMPTS)


def test_pooling_gives_each_place_of_the_map_the_same_weight():
    maps = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    tokens = pool_map(maps)
    corner = (maps[:, :, 0, 0] + maps[:, :, 0, 1] / 2 + maps[:, :, 1, 0] / 2 + maps[:, :, 1, 1] / 4) / 2.25
    torch.testing.assert_close(tokens[:, 0], corner)
    torch.testing.assert_close(tokens.mean(1), maps.mean((2, 3)))


def test_tokens_are_the_trunks_map_and_their_mean_gives_the_choices(encoder, pool):
    tokens = encoder.tokens(pool.images)
    with torch.no_grad():
        torch.testing.assert_close(tokens, pool_map(encoder.model.trunk.extract_features(encoder.pixels(pool.images))))
        best = encoder.model(encoder.pixels(pool.images)).topk(2, dim=1).indices
    assert tokens.shape == (64, TOKENS, INSIDE)
    assert torch.equal(choices(encoder, tokens.mean(1))[0], best)


def test_parts_of_the_pool_are_disjoint_and_have_no_label():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 32, 32, 3), np.uint8)
    pool = ImageSet(pixels, np.arange(90) % 15, tuple("abcdefghijklmno"), "made")
    parts = split_pool(pool, {"stage1": 12, "reader": 10, "held_out": 5})
    found = [image.tobytes() for part in parts.values() for image in part.images]
    others = {image.tobytes() for image in pool.images[pool.labels >= 10]}
    assert len(set(found)) == len(found) == 27
    assert set(found) <= others
    assert all(part.num_classes == 1 and not part.labels.any() for part in parts.values())
    assert np.array_equal(parts["stage1"].images, pool.images[pool.labels >= 10][:12])
    with pytest.raises(ValueError, match="31 images are asked for, the pool has 30 of other classes; ask for fewer"):
        split_pool(pool, {"stage1": 20, "reader": 11})


def test_no_label_enters_a_text(pool, encoder, teacher):
    other = ImageSet(pool.images, 1 - (pool.labels > 0), pool.names, pool.origin)
    assert texts_about(pool, encoder, teacher).answers == texts_about(other, encoder, teacher).answers


def test_texts_say_what_was_chosen_and_measured():
    said = describe(Facts(colour="brown", background="grey", plain=True, light="dark", size="small"), "moped", "axe")
    assert said == {
        "object": "a small brown moped, maybe an axe, on a plain grey background, in dark light.",
        "ground": "behind it is a plain grey background, in dark light; it is a small brown moped, maybe an axe.",
    }
    assert describe(Facts(), "axe", "moped")["object"] == "an axe, maybe a moped, on a mixed background."
    known = set(vocabulary(["moped", "axe"]))
    assert all(set(split_words(text)) <= known for text in said.values())


def test_a_word_that_the_reader_lacks_is_named(teacher):
    with pytest.raises(ValueError, match="has no word 'zebra', in the text 'a zebra'"):
        teacher.answer_ids("a zebra")


def test_the_readers_loss_is_that_of_each_row_alone(pool, encoder, teacher):
    """Reference: each row without padding, embeddings joined by hand, log-probabilities picked one by one."""
    texts, reader = texts_about(pool, encoder, teacher), teacher.model
    rows = np.flatnonzero(texts.kind == 0)[:5]
    visual = reader.model.multi_modal_projector(encoder.tokens(pool.images)[texts.image[rows]])
    found = FrozenReader(teacher).loss(visual, *texts.tokens(rows, 64))
    logs, embed = [], reader.get_input_embeddings()
    for row, seen in zip(rows, visual, strict=True):
        begin, answer = torch.tensor(texts.questions[0]), torch.tensor(texts.answers[row])
        parts = [embed(begin[:1]), seen, embed(begin[1 + TOKENS :]), embed(answer)]
        hidden = reader.model.language_model(inputs_embeds=torch.cat(parts)[None]).last_hidden_state[0]
        chances = (hidden @ embed.weight.T).log_softmax(1)  # the last layer is tied to the embedding
        logs += [chances[len(begin) - 1 + i, word] for i, word in enumerate(answer)]
    torch.testing.assert_close(found, -torch.stack(logs).mean())


def test_the_gate_lets_a_trained_reader_pass_and_refuses_a_blind_one(pool, teacher):
    tokens = np.eye(INSIDE, dtype=np.float32)[np.arange(64) % 8].repeat(TOKENS, 0).reshape(64, TOKENS, INSIDE)
    answers = [[10 + i % 8, 3] for i in range(64)]
    texts = Texts(np.arange(64), np.zeros(64, int), [teacher.question_ids("what ?")], answers, pool.ids)
    reader = teacher.model.requires_grad_(True)
    train_reader(reader, tokens, texts, Schedule(60 * 16, batch=16, lr=1e-2))
    sight = gate(reader, tokens, texts)
    assert sight["other"] - sight["right"] >= 0.2
    for weight in reader.model.multi_modal_projector[-1].parameters():
        weight.data.zero_()
    with pytest.raises(ValueError, match="the reader is blind: with the right picture"):
        gate(reader, tokens, texts)


def test_a_reader_loads_as_it_was_saved_and_names_what_is_missing(tmp_path, teacher, capsys):
    path = tmp_path / "reader.safetensors"
    save_reader(path, teacher.model, teacher.words, {"layers": 1})
    with pytest.raises(ValueError, match=r"does not fit this model: missing model.language_model.layers.1"):
        load_reader(path, INSIDE)


def test_batches_are_of_one_kind_and_too_few_texts_are_refused(pool, encoder, teacher):
    texts = texts_about(pool, encoder, teacher)
    batches = random_batches(texts, 16, 20, 0)
    assert len(batches) == 20
    assert all(len(batch) == 16 and len(set(texts.kind[batch])) == 1 for batch in batches)
    with pytest.raises(ValueError, match="128 texts do not fill one batch of 65"):
        random_batches(texts, 65, 20, 0)


def learn(pool, encoder, teacher, folder, name, steps, stop=None):
    texts = texts_about(pool, encoder, teacher)
    features = pooled(encoder.tokens(pool.images).numpy())
    data = Targets(Views(pool, encoder, folder.path / "tokens"), texts, features, choices(encoder, features)[0][:, 0])
    learner = Learner(build_model("resnet8", 10, 4), CONDITIONS[name], teacher, data, 0)

    def watch(step):
        if step == stop:
            raise KeyboardInterrupt
        return learner.held_out(data)

    with folder:
        history = train_stage1(learner, data, settings_of(CONDITIONS[name]), steps, 0, folder, watch)
    return sha256_arrays(t.detach().numpy() for t in learner.state_dict().values()), history


@pytest.mark.parametrize("name", ["words_ramp", "words_features", "choices"])
def test_a_killed_run_goes_on_to_the_same_weights_and_records(name, pool, encoder, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(stage1, "KEEP", 2)
    monkeypatch.setattr(stage1, "EVALUATED", (0, 1, 3))
    whole = learn(pool, encoder, teacher, RunFolder(tmp_path / "whole", {}), name, 5)
    with pytest.raises(KeyboardInterrupt):
        learn(pool, encoder, teacher, RunFolder(tmp_path / "killed", {}), name, 5, stop=3)
    assert learn(pool, encoder, teacher, RunFolder(tmp_path / "killed", {}), name, 5) == whole
    assert [record["step"] for record in whole[1]] == [0, 1, 3, 5]


def test_the_frozen_parts_stay_as_they_are(pool, encoder, teacher, tmp_path):
    before = sha256_arrays(t.numpy() for t in teacher.model.state_dict().values())
    learn(pool, encoder, teacher, RunFolder(tmp_path, {}), "words_ramp", 3)
    assert sha256_arrays(t.numpy() for t in teacher.model.state_dict().values()) == before


def test_the_packages_own_pretraining_runs_through_the_reader(pool, encoder, teacher, tmp_path):
    views, texts = Views(pool, encoder, tmp_path), texts_about(pool, encoder, teacher)
    done = pretrain(build_model("resnet8", 10, 4), teacher, views, texts, PretrainSettings(epochs=1, order="random"))
    assert len(done.history) == 8
    assert done.history[-1]["alpha"] == 1


def test_a_damaged_language_model_is_named(tmp_path):
    (tmp_path / smollm.FILE).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"Q4_1.gguf is damaged: its sha256 is .*; remove it, it is fetched again"):
        smollm.fetch_smollm(tmp_path)


def test_the_table_has_a_row_for_random_weights_and_for_each_file(tmp_path):
    results = Path(__file__).parent.parent / "results"
    for folder in ("cifar10_mini_lt_if100", "pretraining"):
        (tmp_path / "laptop").mkdir(exist_ok=True)
        (tmp_path / "laptop" / folder).symlink_to(results / "laptop" / folder)
    ends = {"right": 1.25, "other": 2.5}
    history = [{"step": s, "held_out": {"words": ends}, "probe": s / 10_000} for s in (500, 1500, 2500, 6000)]
    found = {"parameters": {"condition": {"name": "words"}, "seed": 1}, "history": history}
    save_result(tmp_path / "real" / "pretraining" / "words_seed1.json", found)
    lines = table(tmp_path)
    assert len(lines) == 4 and lines[2].startswith("| random weights |")
    assert lines[3] == "| words, alpha = 1; seed 1 | 1.25 / 2.50 | 5.0 | 15.0 | 25.0 | 60.0 |  |  |  |"
