"""Flip or cut bytes in every kind of file that a run leaves: it is refused by name, or nothing changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import Row, pictures, start, wait
from kills import RUN, contents, settings

from mllmfl_lite.__main__ import main
from mllmfl_lite.checkpoint import CheckpointError, RunFolder
from mllmfl_lite.data import load_images
from mllmfl_lite.data.folders import folder_images
from mllmfl_lite.models import load_model
from mllmfl_lite.repro import sha256_arrays, write_atomically
from mllmfl_lite.runs import load_result
from mllmfl_lite.stages.records import read_records
from mllmfl_lite.teachers import load_mllm
from mllmfl_lite.teachers.answers import StoredAnswers

EACH, AGAIN = 150, 3  # damages of each kind of file; so many more after which the whole run is started again
FILES = {  # for each kind: where it is, and what is removed so that a run started again reads it
    "run.json of rounds": ("checkpoints/fedavg*/run.json", ["*.json"]),
    "weights of rounds": ("checkpoints/fedavg*/weights-*", ["*.json"]),
    "run.json of pretraining": ("stage1/*/run.json", ["*.json", "stage1/*.safetensors"]),
    "weights of pretraining": ("stage1/*/weights-*", ["*.json", "stage1/*.safetensors"]),
    "stage-1 weights": ("stage1/*.safetensors", ["*.json"]),
    "stage-1 record": ("stage1/resnet8_seed0.json", ["*.json"]),
    "annotations": ("stage1/*.jsonl", ["*.json", "stage1/*.safetensors"]),
    "teachers' answers": ("answers/*/*/*.npy", ["*.json"]),
    "features": ("features/*/*/*.npy", None),
    "models": ("models/*aligned*", None),
    "results": ("*.json", []),
}


def readers(out: Path, images: Path) -> dict[str, Callable[[Path], object]]:
    """For each kind of file what reads it; the value is what a run goes on with."""
    identity = {path.parent: json.loads(path.read_bytes())["identity"] for path in out.rglob("run.json")}
    mllm, names = load_mllm("tiny_llava", "cpu"), load_images("cifar10_mini", "test").names
    pool, mini = folder_images(images), load_images("cifar10_mini", "web").subset(np.arange(40))

    def checkpoint(path: Path) -> object:
        with RunFolder(path.parent, identity[path.parent]) as folder:
            step, tensors, record = folder.load()
        return step, sha256_arrays(tensors[name].numpy() for name in sorted(tensors)), json.dumps(record)

    def model(path: Path) -> object:
        found = load_model(path)
        return found.names, sha256_arrays(t.numpy() for t in found.state_dict().values())

    def features(path: Path) -> object:
        return StoredAnswers(mllm, "tokens", mini, out / "features")[np.arange(40)].tobytes()

    def answers(path: Path) -> object:
        return StoredAnswers(mllm, "class_probabilities", pool, out / "answers", names)[np.arange(len(pool))].tobytes()

    features(out)
    special = {"stage-1 weights": model, "models": model, "annotations": read_records, "features": features}
    special |= {"teachers' answers": answers, "results": load_result, "stage-1 record": load_result}
    return {kind: special.get(kind, checkpoint) for kind in FILES}


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    place = int(rng.integers(len(content)))
    if rng.random() < 0.5:
        return content[:place]
    return content[:place] + bytes([content[place] ^ int(rng.integers(1, 256))]) + content[place + 1 :]


def is_named(text: str, path: Path) -> bool:
    return path.name in text and ("remove" in text or "correct that line" in text) and "Traceback" not in text


def read_damaged(row: Row, path: Path, read: Callable[[Path], object], rng: np.random.Generator) -> None:
    whole, expected = path.read_bytes(), read(path)
    for _ in range(EACH):
        write_atomically(path, content := damaged(whole, rng))
        try:
            found = read(path)
            cut = read is read_records and found == expected[: len(found)]  # what is cut off is asked again, see below
            row.check(cut or found == expected, f"accepted: {len(content)} of {len(whole)} bytes of {path.name}")
        except (ValueError, CheckpointError) as error:
            row.check(is_named(str(error), path), f"refused without file or advice: {error!r}")
        except Exception as error:
            row.check(False, f"from inside: {error!r}")
    write_atomically(path, whole)


def run_damaged(row: Row, out: Path, kind: str, again: Callable[[Path], int], rng: np.random.Generator) -> None:
    """Start the whole run again after a damage: the same files at the end, or exit 1 or 2 and the file's name."""
    (pattern, gone), expected = FILES[kind], contents(out)
    for number in range(AGAIN):
        copy, log = out.with_name(f"{kind} {number}"), out.with_name(f"{kind} {number}.log")
        shutil.copytree(out, copy)
        for path in [path for missing in gone for path in copy.glob(missing)]:
            path.unlink()
        (path,) = copy.glob(pattern)
        write_atomically(path, damaged(path.read_bytes(), rng))
        status = wait(start(lambda copy=copy: again(copy), log))
        text = log.read_text(errors="replace")
        fine = contents(copy) == expected if status == 0 else status in (1, 2) and is_named(text, path)
        row.check(fine, f"{kind}: exit {status}; {text}")


def check(place: Path, seed: int) -> list[Row]:
    rng, images, out, rows = np.random.default_rng(seed), pictures(place / "images", 24), place / "out", []
    words = ["run", settings(place, "tiny", {**RUN, "pool": str(images)}), "--device", "cpu", "--out"]
    if wait(start(lambda: main([*words, str(out)]), place / "log")):
        raise RuntimeError((place / "log").read_text())
    restarted, read = Row("damage: the run started again", "the same files, or refused by name"), readers(out, images)
    for kind, (pattern, gone) in FILES.items():
        (path,) = out.glob(pattern)
        rows.append(Row(f"damage: {kind}", "refused by name, or no change"))
        read_damaged(rows[-1], path, read[kind], rng)
        if gone is not None:
            run_damaged(restarted, out, kind, lambda copy: main([*words, str(copy)]), rng)
    return [*rows, restarted]
