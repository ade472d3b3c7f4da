"""Annotation: nothing lost, nothing doubled, whatever happens to the process, the disk or the files; the command."""

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

import numpy as np
import pytest
from conftest import make_images
from fake_server import FakeServer, chat, error
from PIL import Image

from mllmfl_lite.__main__ import main
from mllmfl_lite.data import load_images
from mllmfl_lite.data.folders import folder_images
from mllmfl_lite.stages.annotate import annotate
from mllmfl_lite.stages.backends import Answer, TransformersBackend
from mllmfl_lite.stages.filters import filter_records
from mllmfl_lite.stages.llava_format import check_llava
from mllmfl_lite.stages.records import Journal, Record, read_records
from mllmfl_lite.teachers.llava import load_mllm
from mllmfl_lite.teachers.prompts import KINDS, load_prompts, prompt_hash


class Parrot:
    """A backend whose answer depends on the pixels, the prompt and, as with padding, on its place in the batch."""

    model, batch_size, max_new_tokens = "parrot", 4, 30

    def __init__(self, pause=0.0):
        self.pause, self.asked = pause, 0

    def answers(self, batches, open_image):
        for batch in batches:
            time.sleep(self.pause)
            for place, question in enumerate(batch):
                self.asked += 1
                yield question, self.answer(question, place, open_image)

    def answer(self, question, place, open_image):
        try:
            colour = np.asarray(open_image(question.id)).reshape(-1, 3).mean(0).round().astype(int).tolist()
        except ValueError as error:
            return Answer(refusal=str(error), fault="file")
        return Answer(f"Colour {colour}, place {place}, {question.prompt[:9]}.")


def record(text="A grey cat sits there.", **more):
    return Record(**({"id": "1", "image": "1.png", "kind": KINDS[1], "text": text, "finished": True, "model": "m",
                      "prompt": prompt_hash("p"), "time": "2026-01-01T00:00:00Z"} | more))  # fmt: skip


def without_time(records):
    return [replace(r, time="") for r in records]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.jsonl"


def test_one_record_for_each_image_and_kind(images, path):
    summary = annotate(images, Parrot(), path)
    assert [r.key for r in summary.records] == [(i, kind) for i in images.ids for kind in KINDS]
    assert summary.written == len(images) * len(KINDS) and summary.rejected == {}
    assert {r.prompt for r in summary.records} == {prompt_hash(load_prompts()[kind]) for kind in KINDS}
    kinds = list(dict.fromkeys(r.kind for r in read_records(path)))
    assert kinds == sorted(kinds, key=lambda kind: len(load_prompts()[kind])), "short prompts first"


def test_a_second_run_asks_nothing(images, path):
    annotate(images, Parrot(), path)
    before, backend = path.read_bytes(), Parrot()
    summary = annotate(images, backend, path)
    assert backend.asked == summary.written == 0 and path.read_bytes() == before
    assert len(summary.records) == len(images) * len(KINDS)


def run_slowly(images, path):
    annotate(images, Parrot(pause=0.004), path)


def test_killed_at_ten_random_moments_and_resumed(images, path, tmp_path):
    whole = annotate(images, Parrot(), tmp_path / "whole.jsonl").records
    fork, rng, lengths = multiprocessing.get_context("fork"), random.Random(0), [0]
    for _ in range(10):
        process = fork.Process(target=run_slowly, args=(images, path))
        process.start()
        wanted = lengths[-1] + rng.randrange(3000)  # bytes; how soon they are there is the machine's affair
        while process.is_alive() and (not path.exists() or path.stat().st_size < wanted):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        lengths.append(path.stat().st_size if path.exists() else 0)
    assert len(set(lengths)) > 3 and lengths[-1] < 40_000, "the kills must fall into the middle of the work"
    assert without_time(annotate(images, Parrot(), path).records) == without_time(whole)
    read_records(path)  # refuses doubled records and broken lines


@pytest.mark.parametrize("cut", [1, 2, 30, 100, 200])
def test_a_line_that_a_kill_cut_off_is_written_again(images, path, cut):
    whole = annotate(images, Parrot(), path).records
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:50])[:-cut])
    backend = Parrot()
    assert without_time(annotate(images, backend, path).records) == without_time(whole)
    assert len(path.read_bytes().splitlines()) == len(lines)
    assert cut > 1 or b"".join(lines[:50]) in path.read_bytes(), "only the line break was lost"


def test_a_batch_that_is_partly_done_is_asked_again_whole(path):
    """So that its padding, and so its text, is the same."""
    images = make_images(10)
    whole = annotate(images, Parrot(), path, kinds=KINDS[:1]).records
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[4:]))
    assert without_time(annotate(images, Parrot(), path, kinds=KINDS[:1]).records) == without_time(whole)


def test_records_of_another_model_or_prompt_are_not_mixed(images, path):
    annotate(images, Parrot(), path)
    before, other = path.read_bytes(), Parrot()
    other.model = "owl"
    with pytest.raises(ValueError, match=r"records of 'parrot', now 'owl' is asked; use another file"):
        annotate(images, other, path)
    with pytest.raises(ValueError, match="another prompt of kind 'conversation'"):
        annotate(images, Parrot(), path, prompts=load_prompts() | {"conversation": "Talk."})
    with pytest.raises(ValueError, match="no prompt for poem; there are"):
        annotate(images, Parrot(), path, kinds=["poem"])
    assert path.read_bytes() == before


def test_two_runs_do_not_write_one_file(images, path):
    class Nosy(Parrot):
        def answer(self, *question):
            with pytest.raises(ValueError, match="being written by another run"):
                annotate(images, Parrot(), path)
            return super().answer(*question)

    assert len(annotate(images, Nosy(), path, kinds=KINDS[:1]).records) == len(images)


def test_a_run_says_how_long_it_takes(images, path):
    told = []
    annotate(images, Parrot(), path, kinds=KINDS[:1], tell=told.append)
    (line,) = told
    assert re.fullmatch(r"20 texts written; about 0\.\d minutes and [\d,]+ tokens to go", line)


def test_pictures_that_cannot_be_opened_are_named_and_left_out(path, tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"no picture")
    Image.new("RGB", (40, 40)).save(tmp_path / "good \udcff.png")
    summary = annotate(folder_images(tmp_path), Parrot(), path, KINDS[:1])
    assert [r.id for r in summary.records] == ["good \udcff.png"] and len(summary.rejected) == 30
    assert str(tmp_path) not in path.with_suffix(".rejected.json").read_text()
    assert annotate(folder_images(tmp_path), Parrot(), path, KINDS[:1]).written == 0


# ------------------------------------------------------------------------------------------- files as they come to be


def test_a_file_with_a_flipped_byte_is_refused_with_its_line_and_stays(images, path):
    annotate(images, Parrot(), path, KINDS[:1])
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        for damaged in (content[place] ^ 1, 0, 10):
            flipped = content[:place] + bytes([damaged]) + content[place + 1 :]
            path.write_bytes(flipped)
            try:
                records = read_records(path)
            except ValueError as error:
                assert re.search(r"a\.jsonl, line \d+", str(error)) and "\n" not in str(error)
                with pytest.raises(ValueError, match="line"):
                    annotate(images, Parrot(), path)
                assert path.read_bytes() == flipped
            else:  # a blank between values; a line break; the last line break: that record is asked again
                assert len(records) == len(images) - (place == len(content) - 1 and damaged != 10)


@pytest.mark.parametrize(("line", "message"), [
    (b"rubbish", "line 2, is no record"), (b"[]", "line 2"), (b"[" * 100_000, "line 2"), (b"{}", "line 2"),
    (b"\0", "line 2"),
    (b"x" * 1_000_000, "line 2"), (b'{"id": 1}', "line 2"), (b"\xff", "line 2"),
    (record().line()[:-1], "has two records"),
    (record(text=7).line()[:-1], "text is of the wrong type"), (record(finished="no").line()[:-1], "finished is of"),
])  # fmt: skip
def test_a_line_that_is_no_record_is_named(path, line, message):
    path.write_bytes(record().line() + line + b"\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_records(path)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_what_editors_leave_is_read(path):
    """A byte-order mark, Windows line ends, blank lines, no line break at the end, no checksum."""
    two = record(id="2").line()
    unsigned = json.dumps({k: v for k, v in json.loads(two).items() if k != "crc"}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + record().line()[:-1] + b"\r\n\n" + unsigned)
    assert [r.id for r in read_records(path)] == ["1", "2"]
    with pytest.raises(ValueError, match="is not a file; annotate first"):
        read_records(path.with_name("none.jsonl"))


def test_a_full_disk_keeps_what_was_written(images, path, tmp_path, monkeypatch):
    whole = annotate(images, Parrot(), tmp_path / "whole.jsonl").records
    original = Journal._write

    def full(self, line):
        if len(self.done) == 8:
            self._file.write(line[:20])
            raise OSError(28, "No space left on device")
        original(self, line)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "_write", full)
    monkeypatch.setattr("mllmfl_lite.stages.records.write_json", refuse)
    with pytest.raises(
        ValueError, match=r"No space left on device\); make room. 8 of 180 texts .* 8 are kept; the same"
    ):
        annotate(images, Parrot(), path)
    assert len(read_records(path)) == 8
    monkeypatch.undo()
    assert without_time(annotate(images, Parrot(), path).records) == without_time(whole)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_device_that_is_full_from_the_start(path):
    journal = Journal(path, "m", {})
    journal._file.close()
    journal._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(ValueError, match=r"cannot be written .*make room"):
        journal.append(record())
    assert journal.done == set()


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"b": 1}}', '{"a": {"b": {}}}', "[" * 100_000, "\0"])
def test_a_damaged_list_of_rejected_pictures_is_named(images, path, content):
    path.with_suffix(".rejected.json").write_text(content)
    with pytest.raises(ValueError, match=r"rejected.json is damaged .*; remove it"):
        annotate(images, Parrot(), path)
    assert len(annotate(images, Parrot(), path, KINDS[:1], retry_rejected=True).records) == len(images)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path):
    """Four pictures."""
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.new("RGB", (40, 40 + i), "teal").save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(FakeServer(reply))
        return servers[-1].url

    yield start
    for server in servers:
        server.close()


def run(folder, *options, out="out"):
    return main(["annotate", str(folder), "--out", str(folder.parent / out), *map(str, options)])


def test_the_command_asks_a_server_and_writes_three_files(folder, serve, capsys):
    url = serve(lambda request: (200, chat()))
    assert run(folder, "--endpoint", url, "--mllm", "m", "--kinds", "conversation", "class_name") == 0
    printed = capsys.readouterr().out
    assert "4 images, 8 new records" in printed and "'kept': 8" in printed
    entries = json.loads((folder.parent / "out.llava.json").read_text())
    assert len(entries) == 8 and check_llava(entries, os.listdir(folder)) == []
    assert json.loads((folder.parent / "out.rejected.json").read_text()) == {}


def test_the_command_exports_for_llavas_first_stage(folder, serve):
    url = serve(lambda request: (200, chat("Q: What?\nA: A dog.")))
    assert run(folder, "--endpoint", url, "--mllm", "m", "--plain") == 0
    entries = json.loads((folder.parent / "out.llava.json").read_text())
    assert len(entries) == 4 and all(len(entry["conversations"]) == 2 for entry in entries)


def test_the_command_says_when_filters_took_more_than_half(folder, serve, capsys):
    url = serve(lambda request: (200, chat("A dog that", "length")))
    assert run(folder, "--endpoint", url, "--mllm", "m") == 3
    assert "12 of 12 texts were dropped, most as 'cut-off'" in capsys.readouterr().out
    assert json.loads((folder.parent / "out.llava.json").read_text()) == []
    assert len(read_records(folder.parent / "out.jsonl")) == 12


def test_the_command_lists_what_was_refused(folder, serve, capsys):
    refuses, agrees = serve(lambda request: (400, error("too\x1b[31m thin"))), serve(lambda request: (200, chat()))
    one = ["--mllm", "m", "--kinds", "class_name", "--endpoint"]
    assert run(folder, *one, refuses) == 1
    printed = capsys.readouterr().out
    assert "no text for 0.png: 400: too [31m thin" in printed and "\x1b" not in printed
    assert (
        "images that lack a text: 4" in printed
        and str(folder.resolve()) not in (folder.parent / "out.rejected.json").read_text()
    )
    assert run(folder, *one, agrees) == 1
    assert run(folder, *one, agrees, "--retry-rejected") == 0


@pytest.mark.parametrize(("options", "message"), [
    (["--endpoint", "http://localhost:1/v1"], "--endpoint needs --mllm"),
    (["--endpoint", "http://localhost:1/v1", "--mllm", " "], "--endpoint needs --mllm"),
    (["--endpoint", "", "--mllm", "m"], "begins with http"),
    (["--endpoint", "localhost", "--mllm", "m"], "begins with http"),
    (["--min-similarity", "nan"], "between -1 and 1"), (["--min-similarity", "2"], "between -1 and 1"),
    (["--batch-size", "0"], "must be at least 1"), (["--max-new-tokens", "0"], "must be at least 1"),
    (["--kinds", "poem"], "no prompt for poem"), (["--mllm", "nowhere/at-all"], "nowhere/at-all"),
    (["--min-similarity", ".2", "--clip", "nowhere:none"], "nowhere"), (["--prompts", "nowhere"], "it holds none"),
    (["--endpoint", "http://localhost:1", "--mllm", "m", "--max-side", "3"], "max_side at least 64"),
    (["--endpoint", "http://localhost:1", "--mllm", "m", "--timeout", "nan"], "timeout above 0"),
])  # fmt: skip
def test_the_command_says_what_is_wrong_in_one_sentence(folder, capsys, options, message):
    assert run(folder, *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line and not (folder.parent / "out.llava.json").exists()


def test_the_command_refuses_places_that_cannot_be_written(folder, serve, capsys):
    one = ["--mllm", "m", "--kinds", "class_name", "--endpoint", serve(lambda request: (200, chat()))]
    os.mkfifo(folder.parent / "fifo.jsonl")
    (folder.parent / "taken.llava.json").mkdir()
    (folder.parent / "listed.rejected.json").mkdir()
    for out in ("fifo", "taken", "listed"):
        assert run(folder, *one, out=out) == 2
        assert "is not a regular file; choose another name" in capsys.readouterr().err
    for out in ("x" * 300, "pictures/0.png/a", "pictures/"):
        assert main(["annotate", str(folder), *one, "--out", f"{folder.parent}/{out}"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "cannot be written" in line or "must end in a name" in line
    assert main(["annotate", str(folder / "nowhere")]) == 2


def test_a_full_disk_after_the_last_answer_is_said_rightly(folder, serve, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mllmfl_lite.stages.annotate_command.write_json", refuse)
    assert run(folder, "--endpoint", serve(lambda request: (200, chat())), "--mllm", "m") == 2
    assert "No space left on device); all 12 records are in" in capsys.readouterr().err


def test_ctrl_c_ends_the_command_at_once(folder, serve, capsys, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where a shell started us with &
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def reply(request):
        if request["messages"][0]["content"][1]["text"] == load_prompts()["class_name"]:
            return 200, chat()
        os.kill(os.getpid(), signal.SIGINT)
        return "hang", b""

    start, url = time.monotonic(), serve(reply)
    assert (
        run(folder, "--endpoint", url, "--mllm", "m", "--kinds", "conversation", "class_name", "--batch-size", "1")
        == 130
    )
    assert time.monotonic() - start < 10 and "the same command resumes" in capsys.readouterr().err
    assert len(read_records(folder.parent / "out.jsonl")) == 4


def test_every_picture_ends_as_a_record_or_in_the_list(folder, serve):
    """A server that does all of it: limits, faults, refusals, thoughts; the command is given until it says done."""
    for i in range(40):
        Image.new("RGB", (40 + i, 40), "teal").save(folder / f"more {i}.png")
    rng, count = random.Random(0), []
    once = [
        (429, error("slow"), {"Retry-After": "0.01"}),
        (200, chat()),
        (200, chat("<think>hm</think>A dog.")),
        ("close", ""),
    ]
    often = [(400, error("bad picture")), (200, chat(None)), (200, error("bad picture")), (500, error("policy"))]

    def reply(request):
        count.append(1)
        return rng.choice(once * 3 + often) if len(count) % 50 else (401, error("no"))

    url = serve(reply)
    options = ["--endpoint", url, "--mllm", "m", "--kinds", "class_name", "--batch-size", "4"]
    codes = [run(folder, *options)]
    while codes[-1] == 2:
        codes.append(run(folder, *options))
    rejected = json.loads((folder.parent / "out.rejected.json").read_text())
    written = {r.id for r in read_records(folder.parent / "out.jsonl")}
    assert codes[-1] == 0 and len(codes) < 10 and not written & set(rejected)
    assert written | set(rejected) == set(os.listdir(folder))


def test_the_bundled_model_names_classes_that_can_be_exported(path):
    data = load_images("cifar10_mini", "test").subset(np.arange(0, 2000, 400))
    backend = TransformersBackend(load_mllm(device="cpu", batch_size=4))
    summary = annotate(data, backend, path, ["class_name"])
    assert filter_records(summary.records).counts["kept"] == 5


def test_a_picture_that_a_model_cannot_take_is_rejected_alone(images, path):
    class Choosy(TransformersBackend):
        def answer(self, images, prompts):
            if any(np.asarray(image).mean() < 70 for image in images):
                raise RuntimeError("size mismatch\nat layer 3")
            return [Answer("Light.") for _ in images]

    class Teacher:
        identity, batch_size = "choosy", 4

    some = images.subset(np.arange(12))
    summary = annotate(some, Choosy(Teacher()), path, KINDS[:1])
    assert [r.id for r in summary.records] == [some.ids[i] for i in range(12) if some.images[i].mean() >= 70]
    assert set(summary.rejected.values()) == {"the model cannot take it: size mismatch at layer 3"}


def test_the_readmes_command_killed_and_run_again(tmp_path):
    """As a reader would: the command on a folder of pictures, killed, and given again."""
    data = load_images("cifar10_mini", "test").subset(np.arange(0, 2000, 100))
    (tmp_path / "my_pictures").mkdir()
    for i, image in enumerate(data.images):
        Image.fromarray(image).save(tmp_path / "my_pictures" / f"{i:02d}.png")
    (tmp_path / "my_pictures" / "broken.jpg").write_bytes(b"no picture")
    run = [
        sys.executable,
        "-m",
        "mllmfl_lite",
        "annotate",
        "my_pictures",
        "--out",
        "my_annotations",
        "--batch-size",
        "4",
    ]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # beside other tests, threads get in the way
    first = subprocess.Popen(run, cwd=tmp_path, env=alone, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = tmp_path / "my_annotations.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (records.exists() and records.stat().st_size):
        time.sleep(0.01)
    first.kill()
    first.wait()
    done = len(read_records(records))
    second = subprocess.run(run, cwd=tmp_path, env=alone, capture_output=True, text=True, check=True)
    assert 0 < done < 60 and f"{60 - done} new records" in second.stdout
    assert "no text for broken.jpg: broken.jpg cannot be read as an image" in second.stdout
    printed = tmp_path / re.search(r"^LLaVA's format: (.*)$", second.stdout, re.M)[1]
    entries = json.loads(printed.read_text())
    assert check_llava(entries, [p.name for p in (tmp_path / "my_pictures").iterdir()]) == [] and len(entries) > 50
    backend = TransformersBackend(load_mllm(device="cpu", batch_size=4))
    whole = annotate(folder_images(tmp_path / "my_pictures"), backend, tmp_path / "whole.jsonl").records
    assert {r.key: r.text for r in whole} == {r.key: r.text for r in read_records(records)}
