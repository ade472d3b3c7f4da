"""What all parts of the harness use: work in a process of its own, small images, a row of the table."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parent.parent))  # fake_server
torch.set_num_threads(1)
os.environ |= {"MLLMFL_PROGRESS": "0", "TOKENIZERS_PARALLELISM": "false"}
INSIDE = 99  # exit status of work that raised what no user should see


@dataclass
class Row:
    """A line of the table: what must hold, how often it was tried, and a sentence for each time it did not."""

    name: str
    bound: str
    tried: int = 0
    broken: list[str] = field(default_factory=list)

    def check(self, holds: bool, sentence: object) -> None:
        self.tried += 1
        if not holds:
            self.broken.append(" ".join(str(sentence).split())[-400:])


def start(work: Callable[[], object], log: Path) -> int:
    """Fork a process that does the work and writes to the log; its exit status is what `work` returns."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = INSIDE
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        status = int(work() or 0)
    except SystemExit as end:  # of argparse
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait(pid: int, seconds: float = 120) -> int | None:
    """The exit status; a process that still works after so many seconds is killed (SIGKILL): None."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def pictures(folder: Path, count: int) -> Path:
    """Small images of noise in a colour each."""
    folder.mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        pixels = rng.integers(0, 60, (32, 32, 3)) + rng.integers(0, 190, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    return folder
