"""Annotation: nothing lost, nothing doubled, whatever happens; filters and LLaVA's format against hand-made cases."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mllmfl_lite import annotate as module
from mllmfl_lite.data import load_images
from mllmfl_lite.data.folders import PictureSource, array_source, folder_source
from mllmfl_lite.data.pictures import BadPictureError
from mllmfl_lite.stages.annotate import annotate
from mllmfl_lite.stages.backends import Answer, TransformersBackend
from mllmfl_lite.stages.filters import filter_records, is_cut_off, is_empty, is_looping
from mllmfl_lite.stages.llava_format import check_llava, from_llava, to_llava
from mllmfl_lite.stages.records import AnnotationError, Record, read_records
from mllmfl_lite.teachers.llava import load_mllm
from mllmfl_lite.teachers.prompts import KINDS, load_prompts, prompt_hash


class Parrot:
    """A backend whose answer depends on the pixels, the prompt and, as with padding, on its place in the batch."""

    model, batch_size, max_new_tokens = "parrot", 4, 30

    def __init__(self, pause=0.0):
        self.pause, self.asked = pause, 0

    def answer(self, images, prompts):
        self.asked += len(images)
        time.sleep(self.pause)
        colours = [np.asarray(image).reshape(-1, 3).mean(0).round().astype(int).tolist() for image in images]
        return [
            Answer(f"Colour {c}, place {i}, {p[:9]}.", True)
            for i, (c, p) in enumerate(zip(colours, prompts, strict=True))
        ]

    def count_tokens(self, prompt):
        return len(prompt.split())


def record(text="A grey cat sits there.", **more):
    return Record(**({"id": "1", "image": "1.png", "kind": KINDS[1], "text": text, "finished": True, "model": "m",
                      "prompt": prompt_hash("p"), "time": "2026-01-01T00:00:00Z"} | more))  # fmt: skip


@pytest.fixture
def source(images):
    return array_source(images)


def told(records):
    return [replace(r, time="") for r in records]


def test_one_record_for_each_image_and_kind(source, tmp_path):
    summary = annotate(source, Parrot(), tmp_path / "a.jsonl")
    assert [r.key for r in summary.records] == [(i, kind) for i in source.ids for kind in KINDS]
    assert summary.written == len(source) * len(KINDS)
    first = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert set(first) == {"id", "image", "kind", "text", "finished", "model", "prompt", "time"}
    assert {r.prompt for r in summary.records} == {prompt_hash(load_prompts()[kind]) for kind in KINDS}


def test_a_second_run_asks_nothing(source, tmp_path):
    annotate(source, Parrot(), tmp_path / "a.jsonl")
    before = (tmp_path / "a.jsonl").read_bytes()
    backend = Parrot()
    summary = annotate(source, backend, tmp_path / "a.jsonl")
    assert backend.asked == summary.written == 0 and (tmp_path / "a.jsonl").read_bytes() == before
    assert len(summary.records) == len(source) * len(KINDS)


def run_slowly(source, path):
    annotate(source, Parrot(pause=0.004), path)


def test_killed_at_ten_random_moments_and_resumed(source, tmp_path):
    whole = annotate(source, Parrot(), tmp_path / "whole.jsonl").records
    fork, rng, lengths = multiprocessing.get_context("fork"), random.Random(0), [0]
    for _ in range(10):
        process = fork.Process(target=run_slowly, args=(source, tmp_path / "a.jsonl"))
        process.start()
        time.sleep(rng.uniform(0.005, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        path = tmp_path / "a.jsonl"
        lengths.append(path.stat().st_size if path.exists() else 0)
    assert len(set(lengths)) > 3, "the kills must fall into the middle of the work"
    assert told(annotate(source, Parrot(), tmp_path / "a.jsonl").records) == told(whole)
    read_records(tmp_path / "a.jsonl")  # refuses doubled records and broken lines


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_a_kill_cut_off_is_written_again(source, tmp_path, cut):
    whole = annotate(source, Parrot(), tmp_path / "a.jsonl").records
    content = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(content[: len(content) // 2 - cut])
    assert told(annotate(source, Parrot(), tmp_path / "a.jsonl").records) == told(whole)


def test_records_of_another_model_or_prompt_are_not_mixed(source, tmp_path):
    annotate(source, Parrot(), tmp_path / "a.jsonl")
    before = (tmp_path / "a.jsonl").read_bytes()
    other = Parrot()
    other.model = "owl"
    with pytest.raises(AnnotationError, match=r"records of 'parrot', this run asks 'owl'; choose another file"):
        annotate(source, other, tmp_path / "a.jsonl")
    with pytest.raises(AnnotationError, match="another prompt of kind 'conversation'"):
        annotate(source, Parrot(), tmp_path / "a.jsonl", prompts=load_prompts() | {"conversation": "Talk."})
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_two_runs_do_not_write_one_file(source, tmp_path):
    class Nosy(Parrot):
        def answer(self, images, prompts):
            with pytest.raises(AnnotationError, match="being written by another run"):
                annotate(source, Parrot(), tmp_path / "a.jsonl")
            return super().answer(images, prompts)

    annotate(source, Nosy(), tmp_path / "a.jsonl", kinds=KINDS[:1])


def test_a_full_disk_keeps_what_was_written(source, tmp_path, monkeypatch):
    calls = []

    def full(fd):
        calls.append(fd)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    whole = annotate(source, Parrot(), tmp_path / "whole.jsonl").records
    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(AnnotationError, match=r"No space left on device.*8 records are kept"):
        annotate(source, Parrot(), tmp_path / "a.jsonl")
    monkeypatch.undo()
    assert told(annotate(source, Parrot(), tmp_path / "a.jsonl").records) == told(whole)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_device_that_is_full_from_the_start(source, tmp_path):
    journal = module._Journal(tmp_path / "a.jsonl", "m", {})
    journal._file.close()
    journal._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(AnnotationError, match=r"cannot be written .*make room"):
        journal.append([record()])
    assert journal.done == set()


def test_bad_pictures_are_named_and_left_out(images, tmp_path):
    def read(i):
        if i == "bad":
            raise BadPictureError("bad.jpg is no whole picture")
        return Image.fromarray(images.images[0])

    summary = annotate(PictureSource(["a", "bad", "c"], ["a", "bad.jpg", "c"], read), Parrot(), tmp_path / "a.jsonl")
    assert {r.id for r in summary.records} == {"a", "c"} and summary.rejected == {"bad": "bad.jpg is no whole picture"}


def test_the_estimate_counts_what_is_left(source, tmp_path):
    told = []
    annotate(source, Parrot(pause=0.001), tmp_path / "a.jsonl", kinds=KINDS[:2], tell=told.append)
    (estimate,) = told
    prompts = load_prompts()
    assert estimate.records == 2 * len(source)
    assert estimate.tokens_in == len(source) * sum(len(prompts[kind].split()) for kind in KINDS[:2])
    assert estimate.tokens_out == 30 * estimate.records and estimate.seconds > 0
    assert "120 records to write" in str(estimate)


def test_questions_are_sorted_by_length(source, tmp_path):
    annotate(source, Parrot(), tmp_path / "a.jsonl")
    kinds = list(dict.fromkeys(r.kind for r in read_records(tmp_path / "a.jsonl")))
    prompts = load_prompts()
    assert kinds == sorted(kinds, key=lambda kind: len(prompts[kind]))


def test_unknown_kinds_and_bad_prompt_folders(source, tmp_path):
    with pytest.raises(AnnotationError, match="no prompt for poem; there are"):
        annotate(source, Parrot(), tmp_path / "a.jsonl", kinds=["poem"])
    with pytest.raises(AnnotationError, match="it holds none"):
        load_prompts(tmp_path)
    (tmp_path / "conversation.txt").write_text("  \n")
    with pytest.raises(AnnotationError, match="empty: conversation"):
        load_prompts(tmp_path)


def test_a_line_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(vars(record()))
    path.write_text(line + "\nrubbish\n" + line + "\n")
    with pytest.raises(AnnotationError, match="line 2, is no record"):
        read_records(path)
    path.write_text(line + "\n" + line + "\n")
    with pytest.raises(AnnotationError, match="line 2: image '1' has two records"):
        read_records(path)
    with pytest.raises(AnnotationError, match="is not there; annotate first"):
        read_records(tmp_path / "none.jsonl")


# ------------------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("text", "finished", "reason"),
    [
        ("A grey cat sits there.", True, None),
        ("", True, "empty"),
        ("A cat.", True, "empty"),
        ("A grey cat sits", True, "cut-off"),
        ("A grey cat sits there.", False, "cut-off"),
        ("It is a cat and it is a cat and it is a cat.", True, "looping"),
        ('He says "it is a cat."', True, None),
    ],
)
def test_each_filter_on_one_case(text, finished, reason):
    result = filter_records([record(text, finished=finished)])
    assert result.counts == {"kept": int(reason is None)} | {r: int(r == reason) for r in module.FILTERS}


@given(st.lists(st.tuples(st.text(max_size=60), st.booleans()), max_size=20))
def test_filters_lose_and_double_nothing(cases):
    records = [record(text, finished=finished, id=str(i)) for i, (text, finished) in enumerate(cases)]
    result = filter_records(records)
    everything = result.kept + [r for dropped in result.dropped.values() for r in dropped]
    assert sorted(r.id for r in everything) == sorted(r.id for r in records)
    assert not any(is_empty(r) or is_cut_off(r) or is_looping(r) for r in result.kept)


def test_off_image_needs_somebody_who_compares(source):
    with pytest.raises(ValueError, match="needs clip= and source="):
        filter_records([record()], min_similarity=0.2)


def test_off_image_drops_what_is_under_the_threshold(source):
    import torch

    class Compare:
        def features(self, images):
            return torch.ones(len(images), 1)

        def text_features(self, texts):
            return torch.tensor([[0.9 if "cat" in text else 0.1] for text in texts])

    records = [record(id="00"), record("A red car stands there.", id="01")]
    result = filter_records(records, source, Compare(), 0.5)
    assert [r.id for r in result.kept] == ["00"] and result.counts["off-image"] == 1


# ------------------------------------------------------------------------------------------------- LLaVA's format


def test_a_conversation_becomes_turns():
    text = "Question: What is it?\nAnswer: A cat.\nQuestion: What colour?\nAnswer: Grey."
    (entry,) = to_llava([record(text, kind="conversation")])
    assert [t["from"] for t in entry["conversations"]] == ["human", "gpt", "human", "gpt"]
    assert [t["value"] for t in entry["conversations"]] == ["<image>\nWhat is it?", "A cat.", "What colour?", "Grey."]
    assert entry["id"] == "1-conversation" and entry["image"] == "1.png"


def test_a_text_answers_its_prompt():
    (entry,) = to_llava([record("It is a cat.", kind="detailed_description")])
    question = "<image>\n" + load_prompts()["detailed_description"]
    assert entry["conversations"] == [{"from": "human", "value": question}, {"from": "gpt", "value": "It is a cat."}]


@given(st.text(max_size=200), st.sampled_from(KINDS))
def test_whatever_a_model_says_the_export_keeps_llavas_rules(text, kind):
    entries = to_llava([record(text, kind=kind), record(text + "<image>", kind=kind, id="2")])
    assert check_llava(entries, ["1.png"]) == []


def test_export_and_import_agree(source, tmp_path):
    entries = to_llava(annotate(source, Parrot(), tmp_path / "a.jsonl").records)
    (tmp_path / "a.json").write_text(json.dumps(entries))
    assert from_llava(tmp_path / "a.json") == entries
    assert check_llava(entries, [source.file(i) for i in source.ids]) == []


def turns(*pairs):
    return [{"from": who, "value": value} for who, value in pairs]


GOOD = {"id": "a", "image": "a.png", "conversations": turns(("human", "<image>\nWhat?"), ("gpt", "A cat."))}


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([GOOD, GOOD], "the id stands twice"),
        ([GOOD | {"image": "b.png"}], "image 'b.png' does not exist"),
        ([GOOD | {"conversations": turns(("human", "What?"), ("gpt", "A cat."))}], "<image> must stand once"),
        ([GOOD | {"conversations": turns(("human", "<image> <image>"), ("gpt", "A cat."))}], "<image> must stand once"),
        ([GOOD | {"conversations": turns(("human", "Hm"), ("gpt", "<image>"))}], "in the first human turn"),
        ([GOOD | {"conversations": turns(("gpt", "<image>"), ("human", "A cat."))}], "turns must alternate"),
        ([GOOD | {"conversations": turns(("human", "<image>"))}], "turns must alternate"),
        ([GOOD | {"conversations": []}], "has no list of conversations"),
        ([GOOD | {"conversations": [{"from": "human"}]}], "has no list of conversations"),
        (["rubbish"], "has no list of conversations"),
    ],
)
def test_each_broken_rule_is_named(entries, problem):
    (found,) = check_llava(entries, ["a.png"])
    assert problem in found


def test_import_refuses_what_is_no_llava_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD | {"extra": 1}]))
    assert from_llava(path) == [GOOD]
    for content, message in [
        ("{", "cannot be read as JSON"),
        ('{"a": 1}', "one JSON list"),
        (json.dumps([GOOD] * 2), "twice"),
    ]:
        path.write_text(content)
        with pytest.raises(AnnotationError, match=message):
            from_llava(path)


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert module.main([str(tmp_path / "nowhere")]) == 1
    assert "is not a folder; give the folder that holds the pictures" in capsys.readouterr().err


def test_bigger_sets_keep_the_batches(tmp_path):
    """A batch that is partly done is asked again whole, so that its padding, and so its text, is the same."""
    source = array_source(make_images(10))
    whole = annotate(source, Parrot(), tmp_path / "a.jsonl", kinds=KINDS[:1]).records
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:3] + lines[4:]))
    assert told(annotate(source, Parrot(), tmp_path / "a.jsonl", kinds=KINDS[:1]).records) == told(whole)


def test_the_readmes_command_killed_and_run_again(tmp_path):
    """As a reader would: the command of the README on a folder of pictures, killed, and given again."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (command,) = re.findall(r"^\.venv/bin/python (-m mllmfl_lite\.annotate my_pictures .*?) +#", readme, re.M)
    data = load_images("cifar10_mini", "test").subset(np.arange(0, 2000, 100))
    (tmp_path / "my_pictures").mkdir()
    for i, image in enumerate(data.images):
        Image.fromarray(image).save(tmp_path / "my_pictures" / f"{i:02d}.png")
    (tmp_path / "my_pictures" / "broken.jpg").write_bytes(b"no picture")
    run = [sys.executable, *command.split(), "--batch-size", "4"]
    alone = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # beside other tests, threads only get in the way
    first = subprocess.Popen(run, cwd=tmp_path, env=alone, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = tmp_path / "my_annotations.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (records.exists() and records.stat().st_size):
        time.sleep(0.01)
    first.kill()
    first.wait()
    there = len(read_records(records))
    second = subprocess.run(run, cwd=tmp_path, env=alone, capture_output=True, text=True, check=True)
    assert 0 < there < 60 and f"{60 - there} new records" in second.stdout
    assert "broken.jpg is no whole picture" in second.stdout
    printed = Path(re.search(r"^LLaVA's format: (.*)$", second.stdout, re.M)[1])
    entries = from_llava(printed)
    assert check_llava(entries, [p.name for p in (tmp_path / "my_pictures").iterdir()]) == [] and len(entries) > 50
    backend = TransformersBackend(load_mllm(device="cpu", batch_size=4))
    whole = annotate(folder_source(tmp_path / "my_pictures"), backend, tmp_path / "whole.jsonl").records
    assert {r.key: r.text for r in whole} == {r.key: r.text for r in read_records(records)}
