"""Filters of texts: hand-made cases; nothing is lost or doubled; the similarity filter opens one picture at a time."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mllmfl_lite.data.folders import folder_images
from mllmfl_lite.data.images import ImageFiles
from mllmfl_lite.stages.filters import FILTERS, filter_records, is_cut_off, is_empty, is_looping, similarities
from mllmfl_lite.stages.records import Record, bundled_annotations
from mllmfl_lite.teachers.clip import load_clip


def record(text="A grey cat sits there.", finished=True, name="1"):
    return Record(name, f"{name}.png", "conversation", text, finished, "m", "p", "")


@pytest.mark.parametrize(
    ("text", "finished", "reason"),
    [
        ("A grey cat sits there.", True, None),
        ("cat", True, None),
        ("A grey cat sits there", True, None),
        ("图片中有一只棕色的狗", True, None),
        ("**A cat.**", True, None),
        ("7", True, None),
        ("", True, "empty"),
        (" \n...!*", True, "empty"),
        ("A grey cat sits there.", False, "cut-off"),
        ("It is a cat and it is a cat and it is a cat.", True, "looping"),
        ("the " * 40, True, "looping"),
        ("What colour is the car? Red. What colour is the bus? It is blue. What colour is the sky? Grey.", True, None),
        ("विश्वविद्यालय में छात्र हैं। विश्वविद्यालय बड़ा है। विश्वविद्यालय पुराना है।", True, None),
    ],
)
def test_each_filter_on_one_case(text, finished, reason):
    result = filter_records([record(text, finished)])
    assert result.counts == {"kept": int(reason is None)} | {name: int(name == reason) for name in FILTERS}


@given(st.lists(st.tuples(st.text(max_size=60), st.booleans()), max_size=20))
def test_filters_lose_and_double_nothing(cases):
    records = [record(text, finished, str(i)) for i, (text, finished) in enumerate(cases)]
    result = filter_records(records)
    everything = result.kept + [r for dropped in result.dropped.values() for r in dropped]
    assert sorted(r.id for r in everything) == sorted(r.id for r in records)
    assert not any(is_empty(r) or is_cut_off(r) or is_looping(r) for r in result.kept)


def test_the_bundled_texts_lose_those_that_were_cut_off():
    assert filter_records(bundled_annotations()).counts == {"kept": 8858, "empty": 0, "cut-off": 142, "looping": 0}


def test_a_loss_of_more_than_half_is_said_with_rule_and_example():
    lost, kept = record("A cat\x1b[31m that sits", finished=False), record()
    assert filter_records([lost, kept]).warning() == filter_records([]).warning() == ""
    warning = filter_records([lost, lost, kept]).warning()
    assert "2 of 3 texts were dropped, most as 'cut-off' (It ran into the token limit" in warning
    assert "'A cat\\x1b[31m that sits'" in warning


def test_a_megabyte_takes_no_time():
    start = time.process_time()
    for text in ("a " * 500_000, "x" * 1_000_000, "some words that differ " + " ".join(map(str, range(150_000)))):
        filter_records([record(text)])
    assert time.process_time() - start < 15


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.01, -2])
def test_a_similarity_is_a_cosine(images, value):
    with pytest.raises(ValueError, match="between -1 and 1"):
        filter_records([record()], images, object(), value)


class Compare:
    """A CLIP for which pictures are alike, and only some texts fit."""

    def features(self, images):
        return torch.ones(len(images), 1)

    def text_features(self, texts):
        return torch.tensor([[0.9 if "cat" in text else 0.1] for text in texts])


def test_off_image_drops_what_is_under_the_threshold(images):
    records = [record(name="00"), record("A red car stands there.", name="01")]
    result = filter_records(records, images, Compare(), 0.5)
    assert [r.id for r in result.kept] == ["00"] and result.counts["off-image"] == 1
    assert similarities([], images, Compare()) == []
    with pytest.raises(ValueError, match="needs clip= and pool="):
        filter_records(records, min_similarity=0.2)
    with pytest.raises(ValueError, match="not in the pool, such as 'nowhere'"):
        similarities([record(name="nowhere")], images, Compare())


def test_one_picture_is_open_at_a_time(tmp_path, monkeypatch):
    for i in range(5):
        Image.new("RGB", (40, 40), (i * 50, 0, 0)).save(tmp_path / f"{i}.png")
    pool, clip = folder_images(tmp_path), load_clip(device="cpu")
    opened = []
    original, preprocess = ImageFiles.__getitem__, clip.preprocess

    def get(self, chosen):
        if isinstance(chosen, (int, np.integer)):
            opened.append(1)
        return original(self, chosen)

    def prepare(image):
        assert sum(opened) == 1
        opened.clear()
        return preprocess(image)

    records = [record(text, name=f"{i}.png") for i in (3, 1) for text in ("red", "blue")]
    expected = similarities(records, pool, clip)
    monkeypatch.setattr(ImageFiles, "__getitem__", get)
    clip.preprocess = prepare
    assert similarities(records, pool, clip) == expected and len(set(expected)) == 4
