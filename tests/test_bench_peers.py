"""What of the comparison with other engines can be checked where they are not installed: its figures, and our sides."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import bench_peers
from bench_peers import Run, differences, faster, row
from peers import ours


def finished(*seconds, state=None):
    """A run whose processes were started 3 s before its rounds."""
    stamps = [10.0 + sum(seconds[:count]) for count in range(len(seconds) + 1)]
    return Run(7.0, stamps, state or {}, (0.0, 0.0))


def test_the_first_round_is_apart():
    run = finished(9, 2, 4)
    assert (run.first, run.later, run.start_up) == (9, [2, 4], 3 + 9 - 3)


def test_ratios_are_taken_within_a_repeat():
    assert faster([finished(9, 4, 4), finished(9, 30, 30)], [finished(1, 2, 2), finished(1, 10, 10)]) == (
        "2.50 (2.00-3.00)"
    )


@pytest.mark.parametrize("name", bench_peers.VARIANTS)
def test_rows_stand_under_their_heads(name):
    line = row(name, [finished(9, 4, 5)], [finished(1, 2, 2)], (1234.5, 678.9))
    assert {len(head) for head in bench_peers.HEAD.splitlines()} == {len(line)}
    assert line.split()[-2:] == ["1234", "679"] and ("2.25 (2.25-2.25)" in line) == (name != "ours")


def test_the_ordinary_loop_ends_with_our_weights():
    """By the same function that compares the others: float64, no augmentation, one order of the images."""
    (_, state), (_, expected) = ours.ordinary(2, 2, True), ours.engine(2, 2, True)
    largest, what = differences(state, expected)
    assert largest < 1e-12 and what == "all"
    parameters = {name: tensor for name, tensor in state.items() if "running" not in name and "num" not in name}
    assert "parameters alone" in differences(parameters, expected)[1]
    with pytest.raises(AssertionError):
        differences({**state, "head.bias": state["head.bias"] + 1e-4}, expected)


def test_stamps_are_one_more_than_rounds():
    stamps, state = ours.engine(2, 3, True)
    assert len(stamps) == 4 and stamps == sorted(stamps) and state["head.bias"].dtype == torch.float64


def test_the_convolutions_are_a_part_of_a_round():
    started = time.perf_counter()
    assert 0 < bench_peers.floor(16) < (time.perf_counter() - started) / bench_peers.CORES


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc")
def test_memory_counts_a_process_and_its_children():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.pid in bench_peers.family([os.getpid()])
    total, once = bench_peers.memory_of([os.getpid()])
    child.communicate(b"\n")
    assert total >= once > 10


def test_a_process_that_fails_ends_the_others():
    codes = "import time; time.sleep(60)", "raise SystemExit(3)"
    sleeps, fails = (subprocess.Popen([sys.executable, "-c", code]) for code in codes)
    bench_peers.wait([sleeps, fails], time.monotonic(), watch=False)
    assert (fails.returncode, sleeps.returncode) == (3, -9)
