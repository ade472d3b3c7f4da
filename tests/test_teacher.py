"""The teachers: loaded by the public classes, equal to plain computations, features kept and never mixed up."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import make_images
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mllmfl_lite.data import load_images
from mllmfl_lite.data.folders import array_source
from mllmfl_lite.stages.annotate import annotate
from mllmfl_lite.stages.backends import TransformersBackend
from mllmfl_lite.stages.records import bundled_annotations
from mllmfl_lite.teachers.answers import stored
from mllmfl_lite.teachers.base import ASSETS, TINY_CLIP, TINY_LLAVA, TeacherError
from mllmfl_lite.teachers.clip import ClipTeacher, load_clip
from mllmfl_lite.teachers.llava import load_mllm, refuse_remote_code
from mllmfl_lite.teachers.prompts import load_prompts
from mllmfl_lite.teaching.claims import names_class


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
    from PIL import Image

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
    source = array_source(test_set)
    records = annotate(source, backend, tmp_path / "a.jsonl", kinds=["detailed_description"]).records
    names = dict(zip(source.ids, (test_set.names[label] for label in test_set.labels), strict=True))
    hits = np.mean([names_class(record.text, names[record.id]) for record in records])
    assert len(records) == 2000 and hits >= 0.65


def test_the_web_annotations_are_what_the_bundled_model_says(mllm, tmp_path):
    """The first 60 pictures again, cut into the same batches as `make annotations` cuts them.

    Another processor rounds differently, and a tie may fall the other way: hence not all, but nearly all.
    """
    source = array_source(load_images("cifar10_mini", "web")).first(60)
    backend = TransformersBackend(load_mllm(device="cpu", dtype="float32", batch_size=60), max_new_tokens=64)
    again = {r.key: r.text for r in annotate(source, backend, tmp_path / "a.jsonl").records}
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
    templates = ("a photo of {}.", "this is {}.")
    x = torch.stack([clip.preprocess(image) for image in map(as_pil, images)])
    with torch.inference_mode():
        columns = []
        for name in names:
            article = "an" if name[0] in "aeiou" else "a"
            both = clip.model.encode_text(clip.tokenizer([t.format(f"{article} {name}") for t in templates]))
            mean = (both / both.norm(dim=1, keepdim=True)).mean(0)
            columns.append(mean / mean.norm())
        picture = clip.model.encode_image(x)
        picture = picture / picture.norm(dim=1, keepdim=True)
        expected = (clip.model.logit_scale.exp() * picture @ torch.stack(columns).T).softmax(1)
    torch.testing.assert_close(clip.class_probabilities(images, names, templates), expected, atol=1e-5, rtol=1e-4)


def as_pil(image):
    from PIL import Image

    return Image.fromarray(image)


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
    for teacher in (mllm, clip):
        torch.testing.assert_close(teacher.features(test_set.images[:4]).norm(dim=1), torch.ones(4))
        assert teacher.tokens(test_set.images[:4]).ndim == 3
    assert mllm.tokens(test_set.images[:1]).shape == (1, 64, 160)


def test_similarity_pairs_each_image_with_its_text(clip, test_set):
    texts = ["a photo of a cat.", "a photo of a ship.", "a photo of a frog."]
    whole = clip.features(test_set.images[:3]) @ clip.text_features(texts).T
    torch.testing.assert_close(clip.similarity(test_set.images[:3], texts), whole.diagonal())
    with pytest.raises(ValueError, match="one text an image: 3 images, 2 texts"):
        clip.similarity(test_set.images[:3], texts[:2])


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


# ------------------------------------------------------------------------------------------- features on the disk


class Counting:
    """A teacher whose features are the images' means, and which counts what it looks at."""

    def __init__(self, identity="counting-1"):
        self.identity, self.looked_at = identity, 0

    def features(self, images):
        self.looked_at += len(images)
        return torch.from_numpy(images.reshape(len(images), -1).mean(1, keepdims=True))


@pytest.fixture
def many():
    return make_images(2500)


def expected(data, indices):
    return data.images[indices].reshape(len(indices), -1).mean(1, keepdims=True).astype(np.float16)


def test_features_are_computed_once(many, tmp_path):
    teacher = Counting()
    first = stored(teacher, "features", many, tmp_path)
    assert teacher.looked_at == 2500 and np.array_equal(first, expected(many, np.arange(2500)))
    again = stored(teacher, "features", many, tmp_path)
    assert teacher.looked_at == 2500 and np.array_equal(first, again) and first.dtype == np.float16


def test_files_of_another_model_or_other_images_are_refused_by_key(many, tmp_path):
    """Another model's folder put in this one's place: the key inside is what counts."""
    first, second = Counting("counting-1"), Counting("counting-2")
    stored(first, "features", many, tmp_path)
    (folder,) = tmp_path.glob("*/counting-1-features")
    folder.rename(folder.with_name("counting-2-features"))
    with pytest.raises(
        TeacherError, match=r"of another origin \(model: counting-1, now counting-2\); remove the folder"
    ):
        stored(second, "features", many, tmp_path)
    other = make_images(2501).subset(np.arange(1, 2501))
    stored(second, "features", other, tmp_path)
    assert second.looked_at == 2500, "other images have a folder of their own"


def test_only_the_files_that_are_needed_are_made_and_order_is_kept(many, tmp_path):
    teacher = Counting()
    indices = np.array([2400, 3, 2400, 1])
    assert np.array_equal(stored(teacher, "features", many, tmp_path, indices), expected(many, indices))
    assert teacher.looked_at == 1024 + (2500 - 2048)


def test_a_stop_in_the_middle_loses_only_the_file_in_work(many, tmp_path):
    class Stopping(Counting):
        def features(self, images):
            if self.looked_at:
                raise KeyboardInterrupt
            return super().features(images)

    with pytest.raises(KeyboardInterrupt):
        stored(Stopping(), "features", many, tmp_path)
    teacher = Counting()
    assert np.array_equal(stored(teacher, "features", many, tmp_path), expected(many, np.arange(2500)))
    assert teacher.looked_at == 2500 - 1024


def test_other_images_or_another_model_are_computed_anew(many, tmp_path):
    stored(Counting(), "features", many, tmp_path)
    for teacher, data in ((Counting("counting-2"), many), (Counting(), make_images(2500, seed=1))):
        assert np.array_equal(stored(teacher, "features", data, tmp_path), expected(data, np.arange(2500)))
        assert teacher.looked_at == 2500


def test_damaged_features_are_refused(many, tmp_path):
    stored(Counting(), "features", many, tmp_path)
    file = sorted(tmp_path.rglob("00001.npy"))[0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TeacherError, match=r"00001.npy is damaged .*computed again"):
        stored(Counting(), "features", many, tmp_path)
    np.save(file, np.zeros((3, 1), np.float16))
    with pytest.raises(TeacherError, match="holds 3 images, not 1024"):
        stored(Counting(), "features", many, tmp_path)


def test_what_cannot_be_stored_is_named(many, tmp_path):
    with pytest.raises(ValueError, match="what is 'features' or 'tokens'; got 'dreams'"):
        stored(Counting(), "dreams", many, tmp_path)
    with pytest.raises(ValueError, match=r"indices must lie in 0..2499; these run from 0 to 2500"):
        stored(Counting(), "features", many, tmp_path, np.array([0, 2500]))


def test_real_features_are_stored_under_their_model(clip, mllm, test_set, tmp_path):
    some = test_set.subset(np.arange(8))
    for teacher in (clip, mllm):
        kept = stored(teacher, "features", some, tmp_path, np.array([5, 2]))
        torch.testing.assert_close(
            torch.from_numpy(kept).float(), teacher.features(some.images[[5, 2]]), atol=2e-3, rtol=0
        )
    folders = {path.parent.name for path in tmp_path.rglob("*.npy")}
    assert folders == {f"{clip.identity}-features", f"{mllm.identity}-features"}


def test_other_weights_are_another_identity(mllm):
    before = mllm.identity
    assert before == load_mllm(device="cpu").identity
    other = load_mllm(device="cpu")
    other.model.lm_head.weight[0, 0] += 1
    assert other.identity != before and before.startswith("tiny_llava-")


# ------------------------------------------------------------------------------------------------------ bad input


def test_a_folder_that_wants_its_own_code_is_refused(tmp_path):
    shutil.copytree(TINY_LLAVA, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForImageTextToText": "evil.Model"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "evil.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(TeacherError, match=r"asks to run code from its own folder .*refused"):
        load_mllm(str(tmp_path / "model"))
    refuse_remote_code(TINY_LLAVA)


def test_a_missing_model_says_what_to_fetch_and_which_parameter_names_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TeacherError, match=r"'llava-hf/llava-1.5-7b-hf' \(parameter `mllm`\).*`hf download llava-hf"):
        load_mllm("llava-hf/llava-1.5-7b-hf")
    with pytest.raises(TeacherError, match=r"'ViT-B-32' \(parameter `clip`\) cannot be loaded.*fetched once"):
        load_clip("ViT-B-32", "openai")


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TeacherError, match="cannot be loaded"):
        load_mllm(str(tmp_path))
    with pytest.raises(TeacherError, match="cannot be loaded"):
        load_clip(str(tmp_path))


def test_no_images_and_no_batch(clip):
    with pytest.raises(ValueError, match="no images to look at"):
        clip.features([])
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        load_clip(batch_size=0)


@pytest.mark.parametrize(
    ("name", "tag", "asked"),
    [
        ("ViT-B-32-quickgelu:openai", None, ("ViT-B-32-quickgelu", "openai")),
        ("ViT-L-14", "openai", ("ViT-L-14", "openai")),
        ("tiny_clip", None, (f"local-dir:{TINY_CLIP}", None)),
    ],
)
def test_a_clips_tag_may_follow_its_name(monkeypatch, name, tag, asked):
    import open_clip

    seen = []

    def create(model, pretrained, require_pretrained):
        seen.append((model, pretrained))
        raise RuntimeError("not here")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    with pytest.raises(TeacherError, match="not here"):
        load_clip(name, tag)
    assert seen == [asked]
