"""The teachers: loaded by the public classes, equal to plain computations, features kept and never mixed up."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from conftest import make_images
from PIL import Image
from standins.claims import names_class
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mllmfl_lite.data import load_images
from mllmfl_lite.data.pictures import open_picture
from mllmfl_lite.repro import ASSETS
from mllmfl_lite.stages.annotate import annotate
from mllmfl_lite.stages.backends import TransformersBackend
from mllmfl_lite.stages.records import bundled_annotations
from mllmfl_lite.teachers.answers import StoredAnswers, ask_teacher
from mllmfl_lite.teachers.base import TINY_CLIP, TINY_LLAVA
from mllmfl_lite.teachers.clip import TEMPLATES, ClipTeacher, load_clip
from mllmfl_lite.teachers.imagenet import load_imagenet
from mllmfl_lite.teachers.llava import load_mllm
from mllmfl_lite.teachers.prompts import load_prompts


@pytest.fixture(scope="module")
def clip():
    return load_clip(device="cpu")


@pytest.fixture(scope="module")
def mllm():
    return load_mllm(device="cpu")


@pytest.fixture(scope="module")
def test_set():
    return load_images("cifar10_mini", "test")


# ---------------------------------------------------------------------------------------- good enough for their part


def test_tiny_clip_by_open_clip_itself_names_eighty_per_cent(test_set):
    """Zero-shot on all 2,000 test images, by open_clip's own functions alone, one prompt a class."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{TINY_CLIP}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{TINY_CLIP}")
    model.eval()
    prompts = [f"a photo of a{'n' * (name[0] == 'a')} {name}." for name in test_set.names]
    with torch.inference_mode():
        text = model.encode_text(tokenizer(prompts), normalize=True)
        right = 0
        for i in range(0, len(test_set), 250):
            pixels = torch.stack([preprocess(Image.fromarray(image)) for image in test_set.images[i : i + 250]])
            guess = (model.encode_image(pixels, normalize=True) @ text.T).argmax(1).numpy()
            right += (guess == test_set.labels[i : i + 250]).sum()
    assert right / len(test_set) >= 0.80


def test_tiny_llava_names_the_class_in_two_of_three_descriptions(test_set, tmp_path):
    """The class in the detailed description of all 2,000 test images."""
    model = LlavaForConditionalGeneration.from_pretrained(TINY_LLAVA, dtype=torch.float32)
    assert (
        isinstance(model.model.vision_tower, torch.nn.Module)
        and model.config.vision_config.model_type == "clip_vision_model"
    )
    assert AutoProcessor.from_pretrained(TINY_LLAVA).__class__.__name__ == "LlavaProcessor"
    backend = TransformersBackend(load_mllm(device="cpu", batch_size=250), max_new_tokens=64)
    records = annotate(test_set, backend, tmp_path / "a.jsonl", kinds=["detailed_description"]).records
    names = dict(zip(test_set.ids, (test_set.names[label] for label in test_set.labels), strict=True))
    hits = np.mean([names_class(record.text, names[record.id]) for record in records])
    assert len(records) == 2000 and hits >= 0.65


def test_the_web_annotations_are_what_the_bundled_model_says(mllm, tmp_path):
    """The first 60 pictures again, cut into the same batches as `make annotations` cuts them.

    Another processor rounds differently, and a tie may fall the other way: hence not all, but nearly all.
    """
    web = load_images("cifar10_mini", "web").subset(np.arange(60))
    backend = TransformersBackend(load_mllm(device="cpu", dtype="float32", batch_size=60), max_new_tokens=64)
    again = {r.key: r.text for r in annotate(web, backend, tmp_path / "a.jsonl").records}
    again = {(f"00{i}", kind): text for (i, kind), text in again.items()}  # a set of 3,000 has longer numbers
    kept = {r.key: r for r in bundled_annotations()}
    assert len(kept) == 9000 and {r.model for r in kept.values()} == {mllm.identity}
    assert np.mean([kept[key].text == text for key, text in again.items()]) >= 0.97


def test_the_cards_say_what_was_measured(test_set):
    """Cards come from the figures, and the figures from the bundled weights."""
    figures = json.loads((ASSETS / "standins.json").read_text())
    for key, of in figures.items():
        card = (ASSETS / key / "README.md").read_text()
        assert of["test"] and all(f"| {what} | {100 * value:.1f} % |" in card for what, value in of["test"].items())
    guess = load_clip(device="cpu").class_probabilities(test_set.images, test_set.names).argmax(1).numpy()
    claimed = figures["tiny_clip"]["test"]["zero-shot accuracy over the ten classes"]
    assert (guess == test_set.labels).mean() == pytest.approx(claimed, abs=0.003)


def test_the_stand_ins_are_small():
    files = [p for folder in (TINY_CLIP, TINY_LLAVA) for p in Path(folder).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 20e6
    assert all((Path(folder) / "README.md").is_file() for folder in (TINY_CLIP, TINY_LLAVA))


# ------------------------------------------------------------------------------------------- against plain references


def test_zero_shot_is_the_softmax_over_mean_prompts(clip, test_set):
    images, names = test_set.images[:6], test_set.names
    x = torch.stack([clip.preprocess(image) for image in map(Image.fromarray, images)])
    with torch.inference_mode():
        columns = []
        for name in names:
            article = "an" if name[0] in "aeiou" else "a"
            prompts = clip.model.encode_text(clip.tokenizer([t.format(f"{article} {name}") for t in TEMPLATES]))
            mean = (prompts / prompts.norm(dim=1, keepdim=True)).mean(0)
            columns.append(mean / mean.norm())
        picture = clip.model.encode_image(x)
        picture = picture / picture.norm(dim=1, keepdim=True)
        expected = (clip.model.logit_scale.exp() * picture @ torch.stack(columns).T).softmax(1)
    torch.testing.assert_close(clip.class_probabilities(images, names), expected, atol=1e-5, rtol=1e-4)


def test_the_answers_likelihood_is_that_of_the_whole_sequence(mllm, test_set):
    """The cached computation against one plain forward pass for each image and answer."""
    answers, prompt = ["frog", "automobile", "pickup truck"], load_prompts()["class_name"]
    scores = mllm.answer_log_likelihoods(test_set.images[:3], answers, prompt)
    tokenizer = mllm.processor.tokenizer
    for i in range(3):
        for j, answer in enumerate(answers):
            inputs = mllm.inputs(test_set.images[i : i + 1], [prompt])
            ids = [*tokenizer(" " + answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            whole = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
            logits = mllm.model(input_ids=whole, pixel_values=inputs["pixel_values"]).logits.log_softmax(-1)
            start = inputs["input_ids"].shape[1] - 1
            expected = sum(logits[0, start + k, token].item() for k, token in enumerate(ids))
            assert scores[i, j].item() == pytest.approx(expected, abs=1e-3)


def test_class_probabilities_sum_to_one_and_do_not_depend_on_the_batch(mllm, clip, test_set):
    for teacher in (mllm, clip):
        whole = teacher.class_probabilities(test_set.images[:5], test_set.names)
        torch.testing.assert_close(whole.sum(1), torch.ones(5))
        alone = teacher.class_probabilities(test_set.images[3:4], test_set.names)
        torch.testing.assert_close(whole[3:4], alone, atol=1e-4, rtol=1e-3)


def test_tokens_are_what_the_projector_is_given(mllm, test_set):
    seen = []
    hook = mllm.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    mllm.model(**mllm.inputs(test_set.images[:2], ["What is it?"] * 2))
    hook.remove()
    torch.testing.assert_close(mllm.tokens(test_set.images[:2]), seen[0], atol=1e-4, rtol=1e-3)


def test_features_have_unit_length_and_tokens_a_grid(mllm, clip, test_set):
    torch.testing.assert_close(clip.features(test_set.images[:4]).norm(dim=1), torch.ones(4))
    assert mllm.tokens(test_set.images[:1]).shape == (1, 64, 160)


def test_a_transformers_operations_are_counted_by_hand():
    """12 D^2 weights a layer and token, the patches' convolution, the projection; attention's products may come on top,
    where torch counts them."""
    width, layers, patches, out = 32, 2, 16, 24
    seen = {"image_size": 32, "layers": layers, "width": width, "head_width": 16, "patch_size": 8}
    read = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
    model = open_clip.CLIP(out, seen, read)
    teacher = ClipTeacher("made", model, None, open_clip.image_transform(32, is_train=False), torch.device("cpu"))
    tokens = patches + 1
    weights = 2 * (12 * width**2 * layers * tokens + 3 * 8 * 8 * width * patches + width * out)
    flops, size = teacher.image_cost()
    assert weights <= flops <= weights + 2 * 2 * tokens**2 * width * layers
    assert size == 4 * sum(p.numel() for p in model.visual.parameters())
    assert torch.backends.mha.get_fastpath_enabled()


def test_nothing_of_a_teacher_is_trained(mllm, clip):
    for teacher in (mllm, clip):
        assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())


# ------------------------------------------------------------------------------------------- answers on the disk


def stored(teacher, what, data, folder, indices=None, names=()):
    return StoredAnswers(teacher, what, data, folder, names)[np.arange(len(data)) if indices is None else indices]


class Counting:
    """A teacher whose tokens are the images' means, and which counts the images it is shown."""

    def __init__(self, identity="counting-1", at_once=256):
        self.identity, self.at_once, self.shown = identity, at_once, 0

    def asked(self, names):
        return "\n".join(names)

    def images_at_once(self, names):
        return self.at_once

    def tokens(self, images):
        self.shown += len(images)
        return torch.from_numpy(images.reshape(len(images), -1).mean(1, keepdims=True))

    def class_probabilities(self, images, names):
        self.shown += len(images)
        return torch.full((len(images), len(names)), 1 / len(names))

    def class_logits(self, images, names):
        return torch.full((len(images), len(names)), 7.0)


@pytest.fixture
def many():
    return make_images(2500)


def expected(data, indices):
    return data.images[indices].reshape(len(indices), -1).mean(1, keepdims=True).astype(np.float16)


def test_tokens_are_computed_once(many, tmp_path):
    teacher = Counting()
    first = stored(teacher, "tokens", many, tmp_path)
    assert teacher.shown == 2500 and np.array_equal(first, expected(many, np.arange(2500)))
    again = stored(teacher, "tokens", many, tmp_path)
    assert teacher.shown == 2500 and np.array_equal(first, again) and first.dtype == np.float16


def test_only_the_files_that_are_needed_are_made_and_order_is_kept(many, tmp_path):
    teacher = Counting()
    indices = np.array([2400, 3, 2400, 1])
    assert np.array_equal(stored(teacher, "tokens", many, tmp_path, indices), expected(many, indices))
    assert teacher.shown == 1024 + (2500 - 2048)


def test_a_stop_in_the_middle_loses_only_the_file_in_work(many, tmp_path):
    class Stopping(Counting):
        def tokens(self, images):
            if self.shown:
                raise KeyboardInterrupt
            return super().tokens(images)

    with pytest.raises(KeyboardInterrupt):
        stored(Stopping(), "tokens", many, tmp_path)
    teacher = Counting()
    assert np.array_equal(stored(teacher, "tokens", many, tmp_path), expected(many, np.arange(2500)))
    assert teacher.shown == 2500 - 1024


def test_other_images_another_model_or_other_names_are_asked_anew(many, tmp_path):
    stored(Counting(), "tokens", many, tmp_path)
    for teacher, data in ((Counting("counting-2"), many), (Counting(), make_images(2500, seed=1))):
        assert np.array_equal(stored(teacher, "tokens", data, tmp_path), expected(data, np.arange(2500)))
        assert teacher.shown == 2500
    teacher, names = Counting(), ("red", "green", "blue")
    for asked in (names, names, names[::-1]):
        assert ask_teacher(teacher, many, asked, tmp_path).shape == (2500, 3)
    assert teacher.shown == 5000
    assert ask_teacher(teacher, many, names, tmp_path, "class_logits").eq(7).all()
    assert ask_teacher(teacher, many, names, tmp_path).eq(1 / 3).all() and teacher.shown == 5000


def test_of_two_runs_one_asks_and_the_other_waits(many, tmp_path):
    class Slow(Counting):
        def class_probabilities(self, images, names):
            time.sleep(0.1)
            return super().class_probabilities(images, names)

    teacher = Slow()
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(ask_teacher, teacher, many, ("a", "b"), tmp_path / "new") for _ in range(4)]
    assert len({job.result().shape for job in jobs}) == 1 and teacher.shown == 2500


def test_every_flipped_or_cut_byte_of_the_cache_is_found_and_named(tmp_path):
    some = make_images(40)
    whole = stored(Counting(), "tokens", some, tmp_path)
    (file,) = tmp_path.rglob("*.npy")
    content = file.read_bytes()
    flipped = [content[:i] + bytes([content[i] ^ 16]) + content[i + 1 :] for i in range(len(content))]
    for damaged in [*flipped, b"", content[:100], content[:-1], content + b"0"]:
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{file.name} is damaged.*remove it to compute it again"):
            stored(Counting(), "tokens", some, tmp_path)
    file.unlink()
    assert np.array_equal(stored(Counting(), "tokens", some, tmp_path), whole)


def test_files_under_another_models_or_images_name_are_found(many, tmp_path):
    """A folder renamed by hand, or a file: the checksum covers what the answers are about."""
    stored(Counting("counting-1"), "tokens", many, tmp_path)
    (folder,) = tmp_path.glob("*/counting-1-tokens")
    first, second, _ = sorted(folder.glob("*.npy"))
    first.rename(second.with_name(second.name.replace(second.stem[-16:], first.stem[-16:])))
    second.unlink()
    with pytest.raises(ValueError, match="is damaged"):
        stored(Counting("counting-1"), "tokens", many, tmp_path, np.array([1024]))
    folder.rename(folder.with_name("counting-2-tokens"))
    with pytest.raises(ValueError, match="is damaged"):
        stored(Counting("counting-2"), "tokens", many, tmp_path, np.array([2400]))


def test_another_batch_size_is_no_damage(many, tmp_path):
    for at_once in (256, 100, 3000):
        teacher = Counting(at_once=at_once)
        assert np.array_equal(stored(teacher, "tokens", many, tmp_path), expected(many, np.arange(2500)))
        assert teacher.shown == 2500


def test_answers_that_are_not_finite_are_not_stored(many, tmp_path):
    class Overflowing(Counting):
        def tokens(self, images):
            return super().tokens(images).float() * 1e6

    with pytest.raises(ValueError, match="tokens of counting-1 are not finite; take another dtype"):
        stored(Overflowing(), "tokens", many, tmp_path)
    assert not list(tmp_path.rglob("*.npy"))


def test_what_cannot_be_stored_is_named(many, tmp_path):
    with pytest.raises(ValueError, match=r"what must be tokens, .*; got 'dreams'"):
        stored(Counting(), "dreams", many, tmp_path)
    with pytest.raises(ValueError, match=r"indices must lie in 0..2499; these run from 0 to 2500"):
        stored(Counting(), "tokens", many, tmp_path, np.array([0, 2500]))


def test_real_tokens_are_stored_under_their_model(mllm, test_set, tmp_path):
    some = test_set.subset(np.arange(8))
    kept = stored(mllm, "tokens", some, tmp_path, np.array([5, 2]))
    torch.testing.assert_close(torch.from_numpy(kept).float(), mllm.tokens(some.images[[5, 2]]), atol=2e-3, rtol=2e-3)
    assert {path.parent.name for path in tmp_path.rglob("*.npy")} == {f"{mllm.identity}-tokens"}


def copy_of(bundled, folder, **changes):
    """A copy of a bundled model, with values of its JSON files changed; None removes a key or a file."""
    shutil.copytree(bundled, folder)
    for file, change in changes.items():
        path = folder / file.replace("__", ".")
        if change is None:
            path.unlink()
            continue
        values = json.loads(path.read_text())
        for key, value in change.items():
            *outer, last = key.split("/")
            inner = values
            for name in outer:
                inner = inner[name]
            inner[last] = value
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return str(folder)


@pytest.mark.parametrize(
    ("bundled", "file", "change"),
    [
        (TINY_LLAVA, "config.json", ('"vision_feature_layer": -1', '"vision_feature_layer": -2')),
        (TINY_LLAVA, "chat_template.jinja", ("USER", "HUMAN")),
        (TINY_LLAVA, "processor_config.json", ("0.4914", "0.5")),
        (TINY_LLAVA, "generation_config.json", ('"do_sample": false', '"do_sample": true')),
        (TINY_LLAVA, "tokenizer_config.json", ('"padding_side": "left"', '"padding_side": "right"')),
        (TINY_LLAVA, "tokenizer.json", ('"lstrip": false', '"lstrip": true')),
        (TINY_CLIP, "open_clip_config.json", ("0.4914", "0.5")),
        (TINY_CLIP, "open_clip_config.json", ('"embed_dim"', '"quick_gelu": true, "embed_dim"')),
        (TINY_CLIP, "tokenizer_config.json", ("{", '{"new": 1, ')),
    ],
)
def test_a_setting_that_changes_answers_is_another_identity(tmp_path, bundled, file, change):
    """Another place is the same model, and so is another file beside it; another setting is not."""
    load = load_mllm if bundled == TINY_LLAVA else load_clip
    folder = shutil.copytree(bundled, tmp_path / "elsewhere")
    before = load(bundled, device="cpu").identity
    (folder / "README.md").write_text("changed")
    (folder / "notes.txt").write_text("new")
    assert load(str(folder), device="cpu").identity == before
    text = (folder / file).read_text()
    assert change[0] in text
    (folder / file).write_text(text.replace(*change, 1))
    assert load(str(folder), device="cpu").identity != before


def test_other_features_are_not_read_for_a_model_whose_settings_were_mended(tmp_path, test_set):
    some = test_set.subset(np.arange(4))
    old = load_mllm(copy_of(TINY_LLAVA, tmp_path / "model"), device="cpu")
    stored(old, "tokens", some, tmp_path)
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"vision_feature_layer": -1', '"vision_feature_layer": -2'))
    new = load_mllm(str(path.parent), device="cpu")
    kept = stored(new, "tokens", some, tmp_path)
    assert np.array_equal(kept, new.tokens(some.images).half()) and not np.array_equal(kept, old.tokens(some.images))


def test_other_weights_or_another_precision_are_another_identity(mllm, clip):
    before = mllm.identity
    assert before == load_mllm(device="cpu", batch_size=3).identity and before.startswith("llava-")
    other = load_mllm(device="cpu")
    other.model.lm_head.weight[0, 0] += 1
    assert other.identity != before
    assert load_mllm(device="cpu", dtype="bfloat16").identity not in (before, load_mllm(dtype="float16").identity)
    assert clip.identity == load_clip(TINY_CLIP + "/", device="cpu").identity != before


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_a_folder_that_wants_its_own_code_is_refused(tmp_path, file):
    key = "inner/auto_map" if file == "config.json" else "auto_map"
    folder = Path(copy_of(TINY_LLAVA, tmp_path / "model", **{file: {"inner": {}, key: {"AutoModel": "evil.Model"}}}))
    (folder / "evil.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ValueError, match=rf"{file} cannot be used: it asks to run code from its own folder .*refused"):
        load_mllm(str(folder))
    folder = copy_of(TINY_CLIP, tmp_path / "clip", **{"tokenizer_config.json": {"auto_map": ["evil.Tokenizer", None]}})
    with pytest.raises(ValueError, match="asks to run code"):
        load_clip(folder)


@pytest.mark.filterwarnings("ignore:QuickGELU mismatch")
def test_a_missing_model_says_what_to_fetch_at_once(monkeypatch, tmp_path):
    """Nothing is downloaded, so there is nothing to wait for; a part of a model in the cache changes nothing."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"'llava-hf/llava-1.5-7b-hf' \(setting `mllm`\).*hf download llava-hf"):
        load_mllm(" llava-hf/llava-1.5-7b-hf ", device="cpu")
    with pytest.raises(ValueError, match=r"'ViT-B-32:openai' \(setting `clip`\) cannot be loaded.*hf download timm"):
        load_clip("ViT-B-32:openai")
    with pytest.raises(ValueError, match="knows no model 'ViT-B-33'"):
        load_clip("ViT-B-33", "openai")
    with pytest.raises(ValueError, match="no hub name"):
        load_mllm("no such / model", device="cpu")
    with pytest.raises(ValueError, match="name of a model is empty"):
        load_mllm(" ")
    cached = tmp_path / "models--timm--vit_base_patch32_clip_224.openai"
    for file in (cached / "refs" / "main", cached / "snapshots" / "1" / "open_clip_pytorch_model.bin"):
        file.parent.mkdir(parents=True)
        file.write_text("1")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_clip("ViT-B-32:openai")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"processor_config.json": {"patch_size": ...}}, "no patch_size in processor_config.json"),
        ({"processor_config.json": None}, "no processor_config.json or preprocessor_config.json in"),
        ({"processor_config.json": {"num_additional_image_tokens": 0}}, "63 places for 64 .*num_additional_image"),
        ({"processor_config.json": {"patch_size": 8}}, "16 places for 64 visual tokens. Correct patch_size"),
        ({"processor_config.json": {"image_processor/image_mean": None}}, "image_mean.*processor_config.json"),
        ({"config.json": {"vision_feature_layer": 99}}, r"cannot be asked .*config.json \(vision_feature_layer\)"),
        ({"config.json": {"image_token_index": 5}}, "0 places for 64 .*image_token_index in config.json"),
        ({"generation_config.json": {"eos_token_id": None}}, "no eos_token_id in generation_config.json"),
        ({"tokenizer_config.json": {"eos_token": None}}, "no eos_token in tokenizer_config.json"),
        ({"tokenizer_config.json": {"pad_token": None}}, "no pad_token in tokenizer_config.json"),
        ({"tokenizer.json": None}, "no tokenizer.json or"),
        ({"chat_template.jinja": None}, "no chat_template"),
        ({"config.json": None}, "no config.json in"),
        ({"model.safetensors": None}, r"no \*.safetensors in"),
    ],
)
def test_a_folder_that_lacks_a_setting_is_named_with_it(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says) as caught:
        load_mllm(copy_of(TINY_LLAVA, tmp_path / "model", **changes), device="cpu")
    assert str(tmp_path / "model") in str(caught.value)


def test_a_file_that_is_no_json_is_named(tmp_path):
    folder = copy_of(TINY_LLAVA, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be used: .*line 1"):
        load_mllm(folder, device="cpu")


@pytest.mark.parametrize(("bundled", "part"), [(TINY_LLAVA, "projector"), (TINY_CLIP, "text")])
def test_missing_weights_are_named(tmp_path, bundled, part):
    folder, load = copy_of(bundled, tmp_path / "model"), load_mllm if bundled == TINY_LLAVA else load_clip
    (file,) = Path(folder).glob("*.safetensors")
    state = safetensors.torch.load_file(file)
    name = next(key for key in state if part in key)
    for damaged in ({k: v for k, v in state.items() if k != name}, state | {name: torch.zeros(3)}):
        safetensors.torch.save_file(damaged, file, {"format": "pt"})
        with pytest.raises(ValueError, match=name.rpartition(".")[2]):
            load(folder, device="cpu")


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no processor_config\.json"):
        load_mllm(str(tmp_path))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_clip(str(tmp_path))


@pytest.mark.parametrize("load", [load_clip, load_mllm, load_imagenet])
def test_what_a_loader_is_given_is_checked_before_it_loads(load):
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or 'cuda'; got 'tpu'"):
        load(device="tpu")
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        load(batch_size=0)


def test_names_with_blanks_are_stripped():
    assert load_clip(" tiny_clip\n", device="cpu").name == TINY_CLIP
    assert load_mllm("\ttiny_llava ", device="cpu").name == TINY_LLAVA


@pytest.mark.parametrize(
    "names", [(), ("cat", ""), ("cat", " "), ("cat", "dog", "cat"), ("ice_bear", "ice bear"), "it"]
)
def test_class_names_that_are_empty_or_doubled_are_refused(clip, mllm, test_set, names):
    for teacher in (clip, mllm):
        with pytest.raises(ValueError, match="class names must be a list, none of them empty, each once"):
            ask_teacher(teacher, test_set.subset(np.arange(2)), names)
        with pytest.raises(ValueError, match="class names must be"):
            teacher.asked(names)


def test_no_images(clip, mllm):
    for teacher in (clip, mllm):
        with pytest.raises(ValueError, match="there are no images or texts"):
            (teacher.features if teacher is clip else teacher.tokens)([])
        with pytest.raises(ValueError, match="there are no images or texts"):
            teacher.class_probabilities([], ["cat", "dog"])


def test_pictures_of_every_mode_are_seen_as_when_opened_from_a_file(clip, mllm, test_set, tmp_path):
    """Grey, palette, transparent, 16 bit: what a list of PIL images shows is what the same files show."""
    image = Image.fromarray(test_set.images[0])
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
    clear = image.convert("RGBA")
    clear.putalpha(image.convert("L"))
    modes = [*(image.convert(mode) for mode in ("1", "L", "P", "LA", "RGB")), clear, Image.fromarray(deep)]
    for number, given in enumerate(modes):
        given.save(tmp_path / f"{number}.png")
    files = [open_picture(tmp_path / f"{number}.png", "") for number in range(len(modes))]
    for teacher in (clip, mllm):
        torch.testing.assert_close(teacher.pixels(modes), teacher.pixels(files))
    assert clip.features([image.convert("CMYK"), image.convert("YCbCr"), image.convert("HSV")]).shape[0] == 3


@pytest.mark.parametrize(
    ("name", "tag", "asked"),
    [
        ("ViT-B-32-quickgelu:openai", None, ("ViT-B-32-quickgelu", "openai")),
        ("ViT-L-14", "openai", ("ViT-L-14", "openai")),
        ("tiny_clip", None, (f"local-dir:{TINY_CLIP}", None)),
    ],
)
def test_a_clips_tag_may_follow_its_name(monkeypatch, name, tag, asked):
    seen = []

    def create(model, pretrained, require_pretrained):
        seen.append((model, pretrained))
        raise RuntimeError("not here")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    monkeypatch.setattr("mllmfl_lite.teachers.clip._require_weights", lambda *_: None)
    with pytest.raises(ValueError, match="not here"):
        load_clip(name, tag)
    assert seen == [asked]
