"""Hostile files, images, texts and arguments: a sentence of ours within ten seconds, never a traceback."""

import dataclasses
import io
import itertools
import os
import struct
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from common import INSIDE, Row, pictures, start, wait
from PIL import Image

from mllmfl_lite import data, federated, models, repro, runs, teachers
from mllmfl_lite.__main__ import main
from mllmfl_lite.checkpoint import CheckpointError, RunFolder
from mllmfl_lite.data import folders, images, longtail, metrics, partition
from mllmfl_lite.data.pictures import open_picture
from mllmfl_lite.federated import aggregate
from mllmfl_lite.runs import config, results
from mllmfl_lite.stages import cleaning, endpoint, filters, llava_format, records, server_set

REFUSED, EITHER, TAKEN = (1, 2, 3), (0, 2, 3), (0,)  # exit statuses
Case = tuple[object, tuple[int, ...], Callable[[], object]]  # name, what is right, what is done
ROOMS = (
    models, repro, data, runs, teachers, federated, folders, images, longtail, metrics, partition, aggregate, results,
    endpoint, filters, records, server_set,
)  # fmt: skip
BLOCKS = {"": config.Experiment} | {f.name: type(f.default) for f in dataclasses.fields(config.Experiment)}
BLOCKS = {name: cls for name, cls in BLOCKS.items() if dataclasses.is_dataclass(cls)}
WRONG = {  # values for a setting of that kind
    "Literal": (None, "no such", 1, [], {}), "bool": ("false", 1, None, []), "str": (None, 7, [], {}, True),
    "int": (None, "7", 1.5, -1, True, [1], {}, 10**30), "float": (None, "0.1", -1.0, True, float("nan"), [], 1e400),
}  # fmt: skip
ABC = "abcdefghijklmnopqrstuvwxyz"
SETTINGS = [  # must be refused
    "method_options: {a: &a [x], " + ", ".join(f"{b}: &{b} [*{a}, *{a}]" for a, b in itertools.pairwise(ABC)) + "}",
    "stages: " + "[" * 90_000, "federated: " + "{a: " * 20_000, "- " * 40_000, "start: [" + "x" * 10_000_000,
    "? [1]\n: 2", "width: " + "9" * 90_000, "width: 1e999999", "width: " + "1:" * 30_000 + "1",
    "width: !!python/object/apply:os.getcwd", "start: !!binary aGVsbG8=", "width: 4\n---\nwidth: 5\n",
    "width: 4".encode("utf-16"), b"start: \xff\xfe\n", "start: a\0b", "width:\t4\n\twidth: 1", "", "# nothing", "~",
    "width: 4\nwidth: 4", "start: a\x07b", "stages: []", "stages: [2, 2]", "stages: 2,3", "stages: [true]",
    "rounds: 20", "seed: 99999999999999999999", "method_options: {mu: .nan}", "method: os", "width: 4 # \ud83d",
    "federated: {rounds: 1000000000}", "method_options: 3", "federated: 3", "width: *a",
]  # fmt: skip
PLANS = (  # large, and within the bounds: an estimate, or a refusal
    "{rounds: 1000000}", "{rounds: 1000000, eval_every: 1000000}", "{rounds: 1000000, report_rounds: 1000000}",
    "{rounds: 1, clients_per_round: 100000}\nnum_clients: 100000", "{rounds: 1}\nwidth: 100000",
    "{rounds: 1}\ndataset: imagenet_lt\nimage_size: 100000", "{rounds: 1}\nimbalance_factor: 1.0e+300",
)  # fmt: skip
STARTS = (  # refused when they start
    "method: os:system", "method: 'a:b'", "method: ':'", "num_clients: 100000", "split: dirichlet\nalpha: 1.0e-300",
    "method: fedprox\nmethod_options: {nu: 1}", "method: fedprox\nmethod_options: {mu: [1]}",
    "imbalance_factor: 1.0e+9", "federated: {batch_size: 1000000, lr: 1.0e+30, rounds: 2}",
)  # fmt: skip
JSONS = (
    "", "{", "[]", "null", "3", '"x"', "[" * 200_000, '{"a":' * 100_000, "9" * 9_000, b"\xff\xfe\0\0", "\0" * 1000,
    '{"parameters": []}', '{"checksum": 1, "parameters": {}}', '[{"id": 1}]', '{"x": NaN}', '{"x": "' + "y" * 10**7,
)  # fmt: skip
PIECES = (
    "Question: ", "Q1. a\nA1. b\n", "**Q", "1) Answer -", "User: x Assistant: ", "- " * 9, "\n", " ", "\t#", "<think>",
    "a ", "</think>", "<image>", "<", "<a", "[think]", "://", "://a@", "?key=", "&token", "\ud83d", "\0", "\u202e",
    "猫。", "***", "_", "(12):", "q:", "Bot: : ", "sk-abcdefgh1", "=", "\r", "#>*_-", "A\n", "ai gpt user ",
)  # fmt: skip
CALLS = """
make(images=pixels / 255); make(images=pixels.transpose(0, 3, 1, 2)); make(images=pixels[..., :2])
make(images=pixels[:, :0]); make(labels=labels[1:]); make(labels=labels / 1); make(labels=labels - 1)
make(labels=labels.astype(str)); make(labels=labels.astype("u8") - 1); make(names=names[1:]); make(names="abcd")
make(names=("a", "a", "b", "c")); make(names=("a", " ", "b", "c")); make(names=(1, 2, 3, 4))
ImageFiles(home, ["a"], 0); long_tail_counts(10, 100, .01); long_tail_counts(0, 100, 10)
long_tail_counts(10, 100, nan); long_tail_subset(labels, 4, 1e9, 0); long_tail_subset(labels, 5, 2, 0)
balanced_subset(labels, 4, 400, 0); few_labels(labels, 4, 2, 0); few_labels(labels, 4, nan, 0); iid(labels, 0, 0)
iid(labels, 41, 0); iid(labels[:0], 1, 0); dirichlet(labels, 4, 0, 0); dirichlet(labels, 4, nan, 0)
dirichlet(labels, 20, 1e-9, 0); dirichlet(labels, 4, inf, 0); dirichlet_equal(labels, 4, -1, 0)
dirichlet_equal(labels, 4, inf, 0); split_clients("x", labels, 4, 1, 0); one_class_per_client(labels, 3, 0)
check_split([all, all[:0]]); check_split([]); metrics_from_confusion(np.zeros((3, 3), int), {}); build_model("vit", 10)
build_model("resnet8", 10, 0); pick_device("x"); build_model("resnet8", -1); pick_device("mps"); pick_device("cuda:99")
pick_device(""); result_path(home, "../x", 0); result_path(home, "", 0); result_path(home, "x" * 999, 0)
result_path(home, "a\\nb", 0); load_images("mnist"); load_images("cifar10_mini", "valid"); folder_images(gone)
read_list(gone); read_records(gone); read_records(home); load_result(gone); load_result(home); load_model(gone)
load_model(home); load_mllm(str(gone), "cpu"); load_mllm(" ", "cpu"); load_mllm("tiny_llava", "cpu", "int8")
load_clip(str(gone), device="cpu"); load_mllm("tiny_llava", "cpu", batch_size=0)
rounds(model=build_model("resnet8", 5, 2)); rounds(test=good.subset(all[:0])); rounds(split=[all, all[:0]])
rounds(split=[all]); rounds(execution=Execution(__file__, "cpu")); rounds(ask=lambda *_: ({}, {}))
rounds(split=[all, all + 39]); rounds(split=[all, all - 1])
rounds(settings=FedSettings(rounds=3, clients_per_round=2, lr=1e30)); weighted_mean([], [])
weighted_mean([state], [0]); weighted_mean([state], [nan]); weighted_mean([state, state], [2, -1])
weighted_mean([state, {"w": torch.zeros(3)}], [1, 1]); draw_server_set(good, torch.ones(40, 3) / 3, names, 2)
draw_server_set(good, torch.full((40, 4), nan), names, 2); draw_server_set(good, torch.ones(40, 4) / 4, names, 2)
filter_records([], good, None, 2); filter_records([], None, None, .5); EndpointBackend("file:///etc/passwd", "m")
EndpointBackend("", "m"); EndpointBackend("http://", "m"); EndpointBackend("http://a/v1", "m", concurrency=0)
EndpointBackend("http://a:99999/v1", "m"); EndpointBackend("http://a/v1", "m", timeout=nan); mllmfl("fly")
mllmfl("plan"); mllmfl(""); mllmfl("annotate"); mllmfl(f"run {gone} --out o"); mllmfl(f"plan {home} --out o")
mllmfl(f"annotate {gone}")
"""
OPTIONS = (
    "--kinds x", "--batch-size 0", "--max-new-tokens x", "--endpoint http://127.0.0.1:9/v1", "--min-similarity 2",
    "--out x/", "--mllm gone", "--prompts gone", "--dtype int4", "--device mps", "--out /proc/x/y",
    "--endpoint x --mllm m", "--endpoint http://127.0.0.1:9/v1 --mllm m --timeout 0",
)  # fmt: skip


def settings_cases(place: Path, rng: np.random.Generator) -> Iterator[Case]:
    wrong = []
    for (block, cls), (kind, values) in itertools.product(BLOCKS.items(), WRONG.items()):
        for field, value in itertools.product(dataclasses.fields(cls), values):
            if kind in str(field.type) and field.name not in ("stages", "method_options", *BLOCKS):
                inner = {field.name: value}
                wrong.append(yaml.safe_dump({"stages": [1, 2, 3], **({block: inner} if block else inner)}))
    files = [(text, REFUSED, "plan") for text in [*SETTINGS, *rng.choice(wrong, 90, replace=False).tolist()]]
    files += [("federated: " + text, EITHER, "plan") for text in PLANS]
    files += [("dataset: cifar10_mini\nwidth: 4\n" + text, REFUSED, "run") for text in STARTS]
    for number, (text, right, command) in enumerate(files):
        path = place / f"{number}.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
        yield text, right, lambda words=(command, str(path), "--out", f"{path}.out"): main(words)


def json_cases(place: Path) -> Iterator[Case]:
    def checkpoint(path: Path) -> object:
        path.rename(path.parent / "run.json")
        with RunFolder(path.parent, {}) as folder:
            return folder.load()

    def model(path: Path) -> object:
        path.rename(path.parent / "config.json")
        for name in ("processor_config.json", "tokenizer.json", "model.safetensors"):
            (path.parent / name).write_text("{}")
        return teachers.load_mllm(str(path.parent), "cpu")

    for read in (runs.load_result, records.read_records, checkpoint, model, models.load_model):
        for number, text in enumerate(JSONS):
            path = place / f"{read.__name__}{number}" / "it.json"
            path.parent.mkdir()
            path.write_bytes((text if isinstance(text, bytes) else text.encode()) + b"\n")  # no kill cut it off
            right = TAKEN if read is records.read_records and not text else REFUSED
            yield f"{read.__name__}: {text[:20]!r}", right, lambda path=path, read=read: read(path)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], rows: bytes = b"") -> bytes:
    """A PNG, true or not."""
    every = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks]
    every += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in every]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def picture_cases(rng: np.random.Generator) -> Iterator[Case]:
    forms, rows = {}, bytes(16 * (24 * 3 + 1))
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "JPEG2000"):
        Image.new("RGB", (24, 16), "teal").save(out := io.BytesIO(), form)
        forms[form] = out.getvalue()
    gif, jpeg, bmp = forms["GIF"], forms["JPEG"], forms["BMP"]
    refused = (
        b"", b"no image" * 99, b"<!doctype html><p>404", b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"II*\0\x08\0\0\0" * 9, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n(x) run",
        b"\0\0\0\x18ftypisom" + bytes(99), jpeg[:400], png(60_000, 60_000), png(20_000, 8, rows=bytes(480_008)),
        png(1, 1, rows=bytes(4)), png(0, 16), png(24, 16), png(24, 16, rows=rows[:500]), forms["PNG"][:20],
        b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIHDR", gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        bmp[:18] + struct.pack("<ii", 2**30, 2**30) + bmp[26:],
    )  # fmt: skip
    exif = b"\xff\xe1\0\x20Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(14)
    notes, profile = (b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000))), (b"iCCP", b"x\0\0no")
    taken = png(24, 16, notes, rows=rows), png(24, 16, profile, rows=rows), jpeg[:2] + exif + jpeg[2:]
    spoilt = []
    for content in map(bytearray, list(forms.values()) * 4):
        content[int(rng.integers(len(content)))] = int(rng.integers(256))
        spoilt.append(bytes(content[: rng.integers(8, len(content) + 1)]))
    for right, contents in ((REFUSED, refused), (TAKEN, taken), (EITHER, spoilt)):
        yield from ((c[:30], right, lambda content=c: open_picture(content, "a\nb.png")) for c in contents)


def text_cases() -> Iterator[Case]:
    def work(text: str) -> None:
        record = records.Record("a", "a.png", "conversation", text, True, "m", "p", "t")
        mask = cleaning.Mask("sk-abcdefgh12345", "http://me:pass-word1@host")
        for change in (cleaning.clean, cleaning.one_line, cleaning.without_thinking, mask):
            change(text)
        filters.filter_records([record])
        if problems := llava_format.check_llava(llava_format.to_llava([record])):
            raise AssertionError(problems)

    for piece, end in itertools.product(PIECES, ("", "!x\nQ: a")):
        text = piece * (200_000 // len(piece)) + end
        yield text[:20], TAKEN, lambda text=text: work(text)


def call_cases(place: Path) -> Iterator[Case]:
    labels, pixels, names, whole = np.arange(40) % 4, np.zeros((40, 8, 8, 3), np.uint8), tuple("abcd"), np.arange(40)

    def make(images=pixels, labels=labels, names=names) -> images.ImageSet:
        return data.ImageSet(images, labels, names, "here")

    def rounds(model=None, split=(whole[:20], whole[20:]), test=None, settings=None, **more) -> object:
        settings = settings or federated.FedSettings(rounds=1, clients_per_round=2, local_epochs=1)
        federation = federated.Federation(make(), list(split), make() if test is None else test)
        return federated.run_federated(model or models.build_model("resnet8", 4, 2), federation, None, settings, **more)

    here = {name: value for room in ROOMS for name, value in vars(room).items()}
    here |= {
        "labels": labels,
        "pixels": pixels,
        "names": names,
        "all": whole,
        "good": make(),
        "make": make,
        "rounds": rounds,
    }
    here |= {"nan": float("nan"), "inf": float("inf"), "np": np, "torch": torch, "state": {"w": torch.zeros(2)}}
    here |= {"home": pictures(place / "home", 2), "gone": place / "gone", "mllmfl": lambda words: main(words.split())}
    calls = CALLS.replace("\n", "; ").strip("; ").split("; ")
    for call in [*calls, *(f"mllmfl(f'annotate {{home}} {option}')" for option in OPTIONS)]:
        yield call, REFUSED, lambda call=call: eval(call, here)


def outcome(done: Callable[[], object], place: Path) -> int:
    """A command's own status; 0 if a value comes back, 2 if a sentence of ours does."""
    os.chdir(place)
    try:
        value = done()
        return value if isinstance(value, int) else 0
    except OSError as error:
        return 2 if error.filename else INSIDE
    except (ValueError, CheckpointError, federated.ClientDiverged) as error:
        raised = traceback.extract_tb(error.__traceback__)[-1].filename
        print(f"{type(error).__name__}: {error} ({raised})")
        return 2 if "mllmfl_lite" in raised and str(error) else INSIDE


def check(place: Path, seed: int) -> list[Row]:
    rng, log, rows = np.random.default_rng(seed), place / "log", []
    groups = {"settings": settings_cases(place, rng), "JSON": json_cases(place), "pictures": picture_cases(rng)}
    for group, cases in {**groups, "texts": text_cases(), "arguments": call_cases(place)}.items():
        rows.append(Row(f"hostile: {group}", "a sentence within 10 s"))
        for name, right, done in cases:
            log.write_text("")
            status, said = wait(start(lambda done=done: outcome(done, place), log), 10), log.read_text(errors="replace")
            fine = status in right and "Traceback" not in said
            rows[-1].check(fine, f"{str(name)[:70]!r} must be {right}: exit {status}; {said[-250:]}")
    return rows
