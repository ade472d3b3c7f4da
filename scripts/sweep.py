"""What the measuring scripts share: their options, and one process a core with one thread each."""

import argparse
import multiprocessing
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch

from mllmfl_lite.repro import count_cores
from mllmfl_lite.runs.files import Run, read_runs

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RUNS = ROOT / "results", ROOT / "notebooks" / "runs"


def options(doc: str, conditions: Collection[str], out: Path | None) -> argparse.ArgumentParser:
    """The command line: which conditions and seeds, and where the files go."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(conditions), choices=conditions, help="these conditions")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=out, help="folder of the results files")
    return parser


def in_processes(work: Callable, jobs: Iterable[tuple]) -> list:
    """Call ``work(*job)`` for each job, as many at once as there are cores; results in the order of the jobs."""
    with multiprocessing.get_context("spawn").Pool(count_cores(), torch.set_num_threads, (1,)) as pool:
        return pool.starmap(work, jobs, chunksize=1)


def laptop_run(method: str, seed: int) -> Run:
    """The laptop-scale run of a method, as its file describes it."""
    (path,) = RUNS.glob(f"methods/**/{method}.yaml")
    return read_runs([RUNS / "laptop" / "cifar10_mini_lt_if100.yaml"], [path], [seed])[0]
