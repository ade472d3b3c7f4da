"""What is missing is named, what is there is found, and nothing is fetched."""

import json
from dataclasses import replace

import pytest

from mllmfl_lite import needs as module
from mllmfl_lite.data.pictures import DataError
from mllmfl_lite.runs.experiment import Experiment
from mllmfl_lite.runs.needs import missing, needs, require
from mllmfl_lite.runs.pipeline import Pipeline
from mllmfl_lite.stages.align import AlignSettings
from mllmfl_lite.stages.pretrain import PretrainSettings

BUNDLED = Pipeline(Experiment("cifar10_mini", method="clip2fl", align=AlignSettings()))
REAL = Experiment(
    "imagenet_lt", mllm="llava-hf/llava-1.5-7b-hf", pool="cc595k", method="clip2fl", clip="ViT-B-32-quickgelu:openai",
    align=AlignSettings(),
)  # fmt: skip
PAPER = Pipeline(REAL, PretrainSettings(), annotations="new")


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLMFL_DATA", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def whats(found):
    return [need.what.split(",")[0] for need in found]


def test_the_bundled_parts_need_nothing(empty):
    assert needs(BUNDLED) == []
    require(BUNDLED)


def test_what_is_missing_is_named_with_size_terms_and_command(empty):
    assert whats(missing(PAPER)) == [
        "ImageNet", "the official lists of ImageNet-LT", "CC-595K", "LLaVA-1.5-7B", "CLIP ViT-B/32",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"(?s)145 GB.*hf download llava-hf/llava-1.5-7b-hf.*MIT"):
        require(PAPER)
    assert list(empty.iterdir()) == []


def test_what_is_there_is_found(empty):
    (empty / "imagenet").mkdir()
    (empty / "imagenet_lt").mkdir()
    for part in ("train", "val", "test"):
        (empty / "imagenet_lt" / f"ImageNet_LT_{part}.txt").touch()
    (empty / "cc595k").mkdir()
    for name in ("models--llava-hf--llava-1.5-7b-hf", "models--timm--vit_base_patch32_clip_224.openai"):
        (empty / "hub" / name / "snapshots" / "abc").mkdir(parents=True)
        (empty / "hub" / name / "snapshots" / "abc" / "model.safetensors").touch()
    assert missing(PAPER) == [] and len(needs(PAPER)) == 5
    blobs = empty / "hub" / "models--llava-hf--llava-1.5-7b-hf" / "blobs"
    blobs.mkdir()
    (blobs / "x.incomplete").touch()  # a download that was cut off
    assert whats(missing(PAPER)) == ["LLaVA-1.5-7B"]


def test_cifar_in_any_of_its_forms(empty):
    pipeline = Pipeline(Experiment("cifar100"), None)
    assert whats(missing(pipeline)) == ["CIFAR-100"]
    for form in ("cifar100.npz", "cifar-100-python.tar.gz"):
        (empty / form).touch()
        assert missing(pipeline) == []
        (empty / form).unlink()


def test_a_folder_of_ones_own_stands_for_a_model_or_a_pool(empty):
    own = replace(
        PAPER, experiment=replace(REAL, dataset="cifar10_mini", mllm=str(empty), clip=str(empty), pool=str(empty))
    )
    assert needs(own) == []


def test_an_unknown_model_is_asked_for_by_its_name(empty):
    own = replace(BUNDLED, experiment=replace(BUNDLED.experiment, mllm="some/mllm"))
    assert [str(need) for need in missing(own)] == [
        "some/mllm (size not known; see where it comes from)\n    put it at some/mllm, or fetch it by name"
    ]


def test_the_data_folder_may_not_be_there(empty, monkeypatch):
    monkeypatch.setenv("MLLMFL_DATA", str(empty / "nowhere"))
    assert whats(missing(Pipeline(Experiment("cifar10"), None))) == ["CIFAR-10"]


def test_the_optional_packages(empty, monkeypatch):
    asks = Pipeline(Experiment("cifar10_mini", align=AlignSettings(teacher="imagenet")), None)
    assert whats(needs(asks)) == ["EfficientNet-lite2 for ImageNet"]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert whats(missing(asks)) == ["EfficientNet-lite2 for ImageNet"]


def test_a_model_in_parts_is_there_when_all_of_them_are(empty):
    kept = empty / "hub" / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / "abc"
    kept.mkdir(parents=True)
    parts = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    (kept / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("abc", parts, strict=True))}))
    for count, part in enumerate(parts):
        assert whats(missing(PAPER)).count("LLaVA-1.5-7B") == 1, count
        (kept / part).touch()
    assert "LLaVA-1.5-7B" not in whats(missing(PAPER))


def test_files_of_ones_own_are_looked_for(empty, tmp_path):
    start = replace(BUNDLED.experiment, start="mine.safetensors")
    (lacking,) = missing(Pipeline(start, None), tmp_path)
    assert "start = 'mine.safetensors' for seed 0" in str(lacking)
    (tmp_path / "mine.safetensors").touch()
    assert missing(Pipeline(start, None), tmp_path) == []
    condition = replace(start, start="dwp_linear")
    assert missing(Pipeline(condition, None)) == [] and missing(Pipeline(condition.with_seed(5), None))
    texts = Pipeline(BUNDLED.experiment, PretrainSettings(), annotations=str(tmp_path / "texts.jsonl"))
    assert "texts.jsonl" in str(*missing(texts))
    (tmp_path / "texts.jsonl").touch()
    assert missing(texts) == []
