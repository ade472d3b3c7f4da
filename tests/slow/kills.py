"""Kill a run at random moments, start it again: its files are those of a run that nobody killed, times apart."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from common import Row, pictures, start, wait
from fake_server import FakeServer, chat, error, sent_image

from mllmfl_lite.__main__ import main

KILLS, IN_A_ROW = 12, 4  # of each job; of one run at most
TIMES = {"seconds", "seconds_in_this_process", "date", "time", "revision", "crc", "checksum"}  # checksums cover times
RUN = {
    "dataset": "cifar10_mini", "num_clients": 4, "width": 4, "stages": [1, 2, 3], "annotations": "new", "pixels": 32,
    "federated": {"rounds": 4, "clients_per_round": 2, "local_epochs": 1, "report_rounds": 1},
    "pretrain": {"epochs": 3, "batch_size": 4, "checkpoint_every": 2}, "align": {"per_class": 3, "epochs": 2},
}  # fmt: skip
LONG = {"rounds": 10, "clients_per_round": 2, "local_epochs": 1, "report_rounds": 1}
STAGES = {  # what is run from a YAML file
    "pretraining": {**RUN, "pretrain": {"epochs": 6, "batch_size": 4, "checkpoint_every": 1}},
    "rounds": {**RUN, "stages": [2], "method": "creff", "method_options": {"head_epochs": 5}, "federated": LONG},
    "alignment": {**RUN, "stages": [3], "pool": "cifar10_mini", "pool_images": 64},
    "run from YAML": RUN,
}


def serve(pipe: int) -> None:
    """Answer by what is in the image; refuse some."""

    def reply(request: dict) -> tuple:
        time.sleep(0.02)
        name = hashlib.sha256(sent_image(request).tobytes()).hexdigest()
        if name[0] in "01":
            return 400, error(f"image {name[:6]} refused")
        return 200, chat(f"It is image {name[:6]}.", "length" if name[0] == "2" else "stop")

    os.write(pipe, FakeServer(reply).url.encode())
    time.sleep(3600)


def settings(place: Path, name: str, values: dict) -> str:
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def jobs(place: Path) -> dict[str, list[str]]:
    """What is killed: words of the command line but for ``--out``."""
    images, (reading, writing) = str(pictures(place / "images", 24)), os.pipe()
    start(lambda: serve(writing), place / "server.log")
    url = os.read(reading, 100).decode()
    few = ["--kinds", "detailed_description", "--batch-size"]
    found = {
        "annotation, bundled model": ["annotate", images, *few, "2", "--max-new-tokens", "40"],
        "annotation, endpoint": ["annotate", images, *few, "3", "--endpoint", url, "--mllm", "m"],
    }
    for name, values in STAGES.items():
        path = settings(place, name, {"pool": images, **values})
        found[name] = ["run", path, "--device", "cpu", *(["--stage1"] if name == "pretraining" else [])]
    return found


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def contents(folder: Path, sort: bool = False) -> dict[str, object]:
    """Each file of a run. An endpoint's records may come in any order: `sort`."""
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        if path.suffix == ".jsonl":
            lines = [without_times(json.loads(line)) for line in content.splitlines()]
            found[name] = sorted(lines, key=str) if sort else lines
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(content))
        elif path.suffix != ".lock":
            found[name] = content
    return found


def killed(name: str, work: Callable[[Path], int], place: Path, rng: np.random.Generator) -> Row:
    row, kills, log, began = Row(f"kills: {name}", "the same files"), 0, place / "log", time.monotonic()
    (place / "whole" / "o").mkdir(parents=True)
    usual = wait(start(lambda: work(place / "whole" / "o"), log))
    row.check(usual in (0, 3), f"fails unkilled: {log.read_text()}")  # 3: filters took more than half
    seconds, sort = time.monotonic() - began, "endpoint" in name
    expected = contents(place / "whole", sort)
    for trial in range(3 * KILLS):
        folder = place / str(trial) / "o"
        folder.mkdir(parents=True)
        for _ in range(int(rng.integers(1, IN_A_ROW + 1))):
            kills += wait(start(lambda out=folder: work(out), log), float(rng.uniform(0, seconds))) is None
        status, found = wait(start(lambda out=folder: work(out), log)), contents(folder.parent, sort)
        other = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
        row.check(status == usual and not other, f"{trial}: exit {status}, other files {other}; {log.read_text()}")
        if kills >= KILLS:
            break
    row.name += f" ({kills})"
    return row


def check(place: Path, seed: int) -> list[Row]:
    rng, rows = np.random.default_rng(seed), []
    for name, words in jobs(place).items():
        rows.append(killed(name, lambda out, words=words: main([*words, "--out", str(out)]), place / name, rng))
    rows.append(Row("kills in all", "at least 60"))
    kills = sum(int(row.name.rpartition("(")[2][:-1]) for row in rows[:-1])
    rows[-1].check(kills >= 60, f"only {kills}")
    return rows
