"""The recipe: what is learned in each step, what is not, and that no bundled picture is in the training."""

import re

import numpy as np
import open_clip
import pytest
import torch
from conftest import make_images
from standins import corpus as texts_of
from standins import tower as vision
from standins.claims import look
from standins.clip import new_clip, text_bank, train_clip
from standins.corpus import END, IMAGE, corpus, train_tokenizer
from standins.llava import Lessons, new_llava, new_processor, train_llava
from standins.tower import TowerHead, new_tower, patch_features, train_tower
from standins.training import Schedule

from mllmfl_lite.data import load_images
from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.cifar import mini_index
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.repro import numpy_generator
from mllmfl_lite.teachers.prompts import KINDS, load_prompts

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True}  # fmt: skip
TINY_TOWER = vision.CONFIG | {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def data():
    made = make_images(60, size=32)
    return ImageSet(made.images, made.labels, ("cat", "ship", "frog"), made.origin)


@pytest.fixture(scope="module")
def texts(data):
    return corpus(data, look(data.images), 8, seed=0)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer([f" {t}" for kind in texts.values() for own in kind for t in own], add_end=False)


@pytest.fixture
def llava(data, tokenizer):
    return new_llava(new_tower(data.images, 0, TINY_TOWER), tokenizer, 0, TINY)


def test_the_tokenizer_reads_back_what_it_wrote(tokenizer):
    for text in ("A small brown cat.", "naïve 猫 😀", "<image>", "line\nbreak"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer(IMAGE, add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids(IMAGE)]


def test_clip_pools_at_the_end_token(texts):
    """Argmax pooling takes the highest number: it must be the end of each text."""
    tokenizer = train_tokenizer([t for kind in texts.values() for own in kind for t in own], add_end=True)
    bank = text_bank(tokenizer, texts, ("cat", "ship", "frog"), 0)
    ends = tokenizer.convert_tokens_to_ids(END)
    assert bank.max() == ends and ((bank == ends).sum(-1) == 1).all() and bank.shape[::2] == (3, 32)


def test_no_bundled_picture_is_learned_from(monkeypatch):
    """The real function on sets whose pictures carry their own number."""

    def numbered(name, part="train"):
        numbers = np.arange(50_000, dtype=np.int32).view(np.uint8).reshape(50_000, 1, 1, 4)[..., :3]
        classes = {"cifar10": 10, "cifar100": 100}[name]
        labels = np.arange(50_000) % classes
        return ImageSet(numbers.copy(), labels, tuple(f"{name} {c}" for c in range(classes)), f"{name}/{part}")

    monkeypatch.setattr(texts_of, "load_images", numbered)
    train, watched = texts_of.rest_of_cifar(100)

    def places(some, ten):
        of = some.images[(some.labels < 10) == ten].astype(np.int64).reshape(-1, 3)
        return set((of @ [1, 256, 65536]).tolist())

    for part in mini_index()["parts"].values():
        for o, origin in enumerate(part["origins"]):
            held = {i for i, which in zip(part["index"], part["origin"], strict=True) if which == o}
            if origin.endswith("train"):
                ten = origin == "cifar10/train"
                assert held and not held & (places(train, ten) | places(watched, ten))
    assert not places(train, True) & places(watched, True) and len(watched) == 100
    assert len(train) == 100_000 - 5000 - 3000 - 100 and train.num_classes == 110


def test_only_the_answer_is_learned(data, tokenizer):
    lessons = Lessons(new_processor(tokenizer), data, look(data.images), dict.fromkeys(KINDS, 1))
    batch = lessons.batch(np.arange(6), True, numpy_generator(0))
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        whole, answer = tokenizer.decode(ids[mask.bool()]), tokenizer.decode(labels[labels != -100])
        assert whole.endswith("ASSISTANT:" + answer) and answer.endswith(END)
        assert (ids == tokenizer.convert_tokens_to_ids(IMAGE)).sum() == 64
        assert torch.equal(ids[labels != -100], labels[labels != -100])


def test_a_lesson_reads_like_the_chat_template(data, tokenizer):
    """What the model is asked later must be, token by token, what it learned from."""
    processor = new_processor(tokenizer)
    lessons = Lessons(processor, data, look(data.images), {"class_name": 1})
    lessons.prompts = {"class_name": (load_prompts()["class_name"],)}
    batch = lessons.batch(np.array([0]), True, numpy_generator(0))
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": load_prompts()["class_name"]}]}]
    asked = processor.apply_chat_template(turn, add_generation_prompt=True)
    ids = processor(images=[data.images[0]], text=[asked], return_tensors="pt")["input_ids"][0]
    assert torch.equal(batch["input_ids"][0][: len(ids)], ids)
    assert (batch["labels"][0][: len(ids)] == -100).all() and batch["labels"][0][len(ids)] != -100


TRAINED = {"language": {"language_model"}, "projector": {"multi_modal_projector"},
           "both": {"multi_modal_projector", "language_model"}}  # fmt: skip


@pytest.mark.parametrize("stage", TRAINED)
def test_each_step_changes_its_parts_and_no_other(llava, data, tokenizer, stage):
    lessons = Lessons(new_processor(tokenizer), data, look(data.images), {"caption": 1})
    before = {name: tensor.clone() for name, tensor in llava.state_dict().items()}
    losses = train_llava(llava, lessons, stage, Schedule(40, batch=4, lr=5e-3), 0, main_share=1.0)
    changed = {
        re.match(r"model\.(\w+)\.", name)[1]
        for name, tensor in llava.state_dict().items()
        if name.startswith("model.") and not torch.equal(tensor, before[name])
    }
    assert changed == TRAINED[stage] and len(losses) == 10
    if stage != "projector":
        assert np.mean(losses[-3:]) < losses[0] - 0.3


def test_wording_follows_from_the_colours(tokenizer):
    train = load_images("cifar10_mini", "train")
    lessons = Lessons(new_processor(tokenizer), train, look(train.images), {"detailed_description": 1})

    def texts(seed, indices):
        batch = lessons.batch(indices, False, numpy_generator(seed))
        return [tokenizer.decode(row[row != -100]) for row in batch["labels"]]

    indices = np.arange(0, 5000, 100)
    assert texts(0, indices) == texts(1, indices), "the seed picks the prompt, not the answer"
    starts = {text.split(" airplane")[0].split(" a ")[0] for text in texts(0, np.arange(300))}
    assert len(starts) > 3


def test_the_same_seed_gives_the_same_model(data, tokenizer):
    lessons = Lessons(new_processor(tokenizer), data, look(data.images), {"caption": 1})
    models = []
    for _ in range(2):
        model = new_llava(new_tower(data.images, 0, TINY_TOWER), tokenizer, 0, TINY)
        train_llava(model, lessons, "both", Schedule(8, batch=4), 0, main_share=1.0)
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_an_unknown_step_is_named(llava, data, tokenizer):
    lessons = Lessons(new_processor(tokenizer), data, look(data.images), {"caption": 1})
    with pytest.raises(ValueError, match="no stage named 'vision'; there are language, projector, both"):
        train_llava(llava, lessons, "vision", Schedule(4, batch=4), 0)


def test_whitened_patches_are_decorrelated(data):
    images = load_images("cifar10_mini", "train").images[::10]
    tower = new_tower(images, 0)
    filters = vision.core_of(tower).embeddings.patch_embedding.weight
    x = Batches(ImageSet(images, np.zeros(len(images), np.int64), ("one",), "x")).plain(torch.arange(len(images)))
    out = torch.nn.functional.conv2d(x, filters.detach(), stride=4).permute(0, 2, 3, 1).reshape(-1, 160)
    values = torch.linalg.eigvalsh(torch.cov(out.T))[-48:]  # 160 numbers of 48 directions
    assert values.max() < 1.1 and values.median() > 0.3


def test_mimetic_attention_meets_itself():
    """Queries and keys agree with the identity more than two random maps would; values go the other way."""
    attention = vision.core_of(new_tower(np.zeros((2000, 32, 32, 3), np.uint8), 0)).encoder.layers[0].self_attn
    q, k, v, out = (getattr(attention, f"{name}_proj").weight.detach() for name in ("q", "k", "v", "out"))
    meet, leave = q.T @ k, v.T @ out.T
    assert meet.diagonal().mean() > 0.3 and leave.diagonal().mean() == pytest.approx(-0.4, abs=0.05)


def test_left_out_patches_do_not_pass(data):
    tower = new_tower(data.images, 0, TINY_TOWER).eval()
    x = torch.randn(2, 3, 32, 32)
    whole = patch_features(tower, x)
    half = patch_features(tower, x, 32, torch.Generator().manual_seed(0))
    assert whole.shape == (2, 64, 32) and half.shape == (2, 32, 32)
    hidden = tower(x, output_hidden_states=True).hidden_states[-1][:, 1:]
    torch.testing.assert_close(whole, hidden)


def test_the_tower_learns_from_labels_and_then_from_its_teacher(data):
    tower, head, asked = new_tower(data.images, 0, TINY_TOWER), TowerHead(32, 3, 5), []

    def teacher(x):
        asked.append(len(x))
        return torch.ones(len(x), 5), torch.zeros(len(x), 3)

    schedule = Schedule(160, batch=8, lr=5e-3)
    losses = train_tower(tower, head, data, teacher, schedule, 0, distil_from=0.5, main_share=1.0)
    assert asked == [8] * 10 and np.mean(losses[6:10]) < losses[0]


def test_a_new_clip_learns_and_open_clip_loads_it(data, texts, tmp_path):
    tokenizer = train_tokenizer([t for kind in texts.values() for own in kind for t in own], add_end=True)
    model = new_clip(tmp_path, tokenizer, 0)
    bank, steps = text_bank(tokenizer, texts, data.names, 0), []
    watch = lambda step, loss: steps.append(step)  # noqa: E731
    losses = train_clip(model, data, bank, Schedule(400, batch=16, lr=5e-4), 0, main_share=1.0, watch=watch)
    assert steps == list(range(25))
    assert np.mean(losses[-5:]) < np.mean(losses[:3])
    before = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("visual")}
    train_clip(model, data, bank[:, :4], Schedule(32, batch=16), 1, main_share=1.0, learn_text=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_schedules_warm_up_and_end_at_zero():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer, rate = Schedule(2000, batch=10, lr=1.0).optimizer([weight])
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rate.step()
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates.index(1.0) <= 10
    assert rates[-1] == pytest.approx(1 / 190) and rates[10:] == sorted(rates[10:], reverse=True)
