"""The queue of runs behind the book's conclusions: the next undone one, in order of importance, until stopped.

    python scripts/evidence.py            # goes on where it was stopped; one core, beside other work
    python scripts/evidence.py --list     # says what is done, what is left and its price; runs nothing

What is committed is done. A run that is killed resumes from its last round; results files are written atomically.
"""

import argparse
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import tune
from sweep import RESULTS, RUNS

from mllmfl_lite.runs import Experiment
from mllmfl_lite.runs.config import experiment_of
from mllmfl_lite.runs.files import Run, merge, read_runs, read_settings
from mllmfl_lite.runs.needs import missing
from mllmfl_lite.runs.plan import in_words, total_hours
from mllmfl_lite.runs.run import run_experiment

LAPTOP, MEDIUM = "laptop/cifar10_mini_lt_if10_long", "medium/cifar10_lt_if100_clean"
PRIMARY = ["stage3", "stage3_ce", "server_only", "fedyoyo", "fedyoyo_stage3"]
OTHERS = ["fedavg", "fedavg_strong", "balanced_softmax", "creff", "clip2fl", "feddf", "fednpc", "fedprox", "fedavgm"]
ANCHORS = {  # references with the settings of another row, without trials of their own
    "balanced_iid": "fedavg", "one_place": "fedavg", "server_only_longer": "server_only",
    "stage3_longer": "stage3", "server_only_ce_300": "server_only_ce_100", "stage3_ce_300": "stage3_ce_100",
}  # fmt: skip
SECOND = [f"{name}_100" for name in tune.AGAIN]  # the second round of results/PROTOCOL.md, and a control
RIVALS_AT_MEDIUM = ["fedavg_strong", "balanced_softmax", "creff", "clip2fl_imagenet"]
AT_MEDIUM = ["server_only_100", "stage3_100", "stage3_ce_100", "fedyoyo", "fedyoyo_stage3_100"]
FROM_WORDS = ["stage1", "mllm_llava_fl_100", "fedyoyo_all_three_100"]  # weights of stage 1 have three seeds
QUEUE = [  # benchmark, methods, seeds
    (LAPTOP, ["fedavg", *PRIMARY], range(3)),
    (LAPTOP, ["stage1", "mllm_llava_fl"], range(3)),
    (LAPTOP, ["fedavg", "stage3", "stage3_ce", "server_only"], range(3, 5)),
    (LAPTOP, ["server_only_longer", "stage3_longer"], range(5)),
    (LAPTOP, SECOND[:3], range(5)),
    (LAPTOP, SECOND[3:7], range(3)),
    (LAPTOP, [*SECOND[7:], "server_only_ce_300", "stage3_ce_300"], range(5)),
    (LAPTOP, [*OTHERS[1:5], "balanced_iid", "one_place"], range(3)),
    (LAPTOP, ["fedavg", *PRIMARY], range(3, 5)),
    (LAPTOP, [*OTHERS[5:], "fedyoyo_all_three"], range(3)),
    (MEDIUM, ["fedavg", *AT_MEDIUM, *FROM_WORDS, "server_only_ce_100", *RIVALS_AT_MEDIUM], range(3)),
    (MEDIUM, ["fedavg", *AT_MEDIUM], range(3, 5)),
    (MEDIUM, OTHERS[5:], range(3)),
    (LAPTOP, ["fedavg", *PRIMARY, *OTHERS[1:]], [5, 6, 8, 9, 10]),  # the trials have seed 7
]


class Job(NamedTuple):
    """One entry of the queue that is not done: a run of one seed, or (no seed) a method's six trials."""

    benchmark: Path
    name: str
    seed: int | None

    def __str__(self) -> str:
        what = "six trials" if self.seed is None else f"seed {self.seed}"
        return f"{self.benchmark.parent.name}/{self.benchmark.stem}: {self.name}, {what}"

    def run(self) -> Run:
        """The run, with the best settings of the trials; without trials a ValueError."""
        best = tuned_file(self.benchmark, self.name)
        if self.name in ANCHORS:
            anchor = self.benchmark.parent / "anchors" / f"{self.name}.yaml"
            return read_runs([self.benchmark, best], [anchor], [self.seed or 0])[0]
        return read_runs([self.benchmark], [best], [self.seed or 0])[0]

    def is_ready(self) -> bool:
        """Return False for a run whose trials are not done."""
        return self.seed is None or tuned_file(self.benchmark, self.name).exists()

    def experiment(self) -> Experiment:
        """The experiment; before the trials with the benchmark's step sizes."""
        if tuned_file(self.benchmark, self.name).exists():
            return self.run().experiment
        what = tune.METHODS[ANCHORS.get(self.name, self.name)][0]
        return experiment_of({**merge(read_settings([self.benchmark]), what), "seed": self.seed or 0})

    def hours(self) -> float:
        """Estimate for a laptop. Six trials cost three runs."""
        return total_hours([self.experiment()], "laptop") * (3 if self.seed is None else 1)


def tuned_file(benchmark: Path, name: str) -> Path:
    """The file with the settings of the best trial; an anchor has another row's."""
    return tune.tuned_file(benchmark, ANCHORS.get(name, name))


def undone() -> Iterator[Job]:
    """The queue's jobs that are left. Trials come before the runs that use their best settings."""
    asked = set()
    for place, methods, seeds in QUEUE:
        benchmark = RUNS / f"{place}.yaml"
        own = [method for method in methods if method not in ANCHORS]
        needed = dict.fromkeys(name for m in own for name in (tune.ROUNDS_OF.get(m), m) if name)
        for name in needed:
            if not tuned_file(benchmark, name).exists() and (benchmark, name) not in asked:
                asked.add((benchmark, name))
                yield Job(benchmark, name, None)
        for job in (Job(benchmark, method, seed) for seed in seeds for method in methods):
            if not tuned_file(benchmark, job.name).exists() or not job.run().is_done(folder(benchmark)):
                yield job


def folder(benchmark: Path) -> Path:
    """Where the results are."""
    return RESULTS / benchmark.parent.name / "tuned" / benchmark.stem


def do(job: Job) -> None:
    """Carry out one job."""
    if job.seed is None:
        tune.tune(job.benchmark, job.name)
    else:
        run = job.run()
        run_experiment(run.experiment, folder(job.benchmark), "cpu", 1, run.label, shared="../..")


def describe() -> Iterator[str]:
    """What is left, a line for each method of each benchmark, with its price."""
    left: dict[tuple[Path, str], list[Job]] = {}
    for job in undone():
        left.setdefault((job.benchmark, job.name), []).append(job)
    total = 0.0
    for (benchmark, name), jobs in left.items():
        seeds = [str(job.seed) for job in jobs if job.seed is not None]
        what = "six trials, " * (len(seeds) < len(jobs)) + f"seeds {' '.join(seeds)}"
        hours = sum(job.hours() for job in jobs)
        total += hours
        yield f"{benchmark.parent.name}/{benchmark.stem} {name}: {what}: about {in_words(hours)}"
    for need in sorted({need for jobs in left.values() for need in missing(jobs[0].experiment())}):
        yield f"missing: {need}"
    done = len(list(RESULTS.glob("*/tuned/*/*.json")))
    yield f"{done} runs done, {sum(map(len, left.values()))} jobs left, about {in_words(total)} of one core"


def work() -> set[str]:
    """Do one job after the other until none is left; the jobs that failed. The others go on, whatever it is."""
    failed: set[str] = set()
    while job := next((job for job in undone() if str(job) not in failed and job.is_ready()), None):
        print(job, flush=True)
        try:
            if needs := missing(job.experiment()):
                raise ValueError("missing: " + "; ".join(needs))
            do(job)
        except Exception:
            failed.add(str(job))
            print(f"failed, and left for the next start: {job}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="say what is left, run nothing")
    if parser.parse_args().list:
        print(*describe(), sep="\n")
        sys.exit()
    torch.set_num_threads(1)
    sys.exit(bool(work()))
