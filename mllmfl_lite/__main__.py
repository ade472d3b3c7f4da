"""The command line: ``mllmfl annotate``, ``mllmfl run``, ``mllmfl plan``."""

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from mllmfl_lite.checkpoint import CheckpointError
from mllmfl_lite.federated import ClientDiverged
from mllmfl_lite.repro import pick_device
from mllmfl_lite.runs.config import parameters_of
from mllmfl_lite.runs.files import Run, read_runs
from mllmfl_lite.runs.plan import RATES, describe_plan, missing
from mllmfl_lite.runs.run import run_experiment
from mllmfl_lite.runs.stage1 import stage_one
from mllmfl_lite.stages import annotate_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0 done, 1 failed in part, 2 wrong input, 3 something is missing."""
    chosen = _parser().parse_args(arguments)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # several would wait for each other on a busy machine
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        return chosen.function(chosen)
    except (ValueError, OSError, CheckpointError, ClientDiverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mllmfl", description="A multimodal LLM on the server, federated learning")
    subparsers = parser.add_subparsers(required=True)
    annotate_command.add_command(subparsers)
    run = subparsers.add_parser("run", help="run experiments; what is done is skipped, what was interrupted resumes")
    plan = subparsers.add_parser("plan", help="say what experiments need and roughly cost, and run nothing")
    for command in (run, plan):
        command.add_argument("files", nargs="+", help="YAML files; a later one replaces keys of earlier ones")
        command.add_argument("--methods", nargs="+", default=[], help="YAML files, one run each, merged after FILES")
        command.add_argument("--seeds", type=int, nargs="+", default=[], help="one run each (default: as in the files)")
        command.add_argument("--out", required=True, help="folder of the results files")
    run.add_argument("--device", default="auto", help="auto, cpu or cuda")
    run.add_argument("--shared", default=".", help="where stage1/ and answers/ are, seen from --out")
    run.add_argument("--report", help="a notebook that papermill executes on each finished run, into reports/")
    run.add_argument("--stage1", action="store_true", help="stage 1 only; accelerate launch may start it")
    run.set_defaults(function=_run)
    plan.add_argument("--on", choices=RATES, default="laptop", help="machine whose rates the estimate uses")
    plan.set_defaults(function=_plan)
    return parser


def _unfinished(chosen: argparse.Namespace) -> list[Run]:
    runs = read_runs(chosen.files, chosen.methods, chosen.seeds)
    todo = [run for run in runs if not run.is_done(chosen.out)]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done", flush=True)
    return todo


def _plan(chosen: argparse.Namespace) -> int:
    print(*describe_plan(_unfinished(chosen), chosen.on), sep="\n")
    return 0


def _run(chosen: argparse.Namespace) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not chosen.stage1:
        raise ValueError("several processes can share stage 1 alone: add --stage1, then start one process without")
    if chosen.report and not Path(chosen.report).is_file():
        raise ValueError(f"there is no notebook {chosen.report}; name one, or leave --report out")
    pick_device(chosen.device)
    sys.path.append(os.getcwd())  # a method of one's own may stand there
    todo = [run for run in _unfinished(chosen) if 1 in run.experiment.stages or not chosen.stage1]
    if needs := sorted({need for run in todo for need in missing(run.experiment, chosen.out)}):
        print("missing, and not fetched for you; nothing was started:", *needs, sep="\n", file=sys.stderr)
        return 3
    failed = []
    for number, run in enumerate(todo, 1):
        started = time.perf_counter()
        print(f"[{number}/{len(todo)}] {run}", flush=True)
        try:
            print(f"{_do(run, chosen)}, {time.perf_counter() - started:.0f} s", flush=True)
        except Exception as error:  # a sweep of days goes on, whatever it is
            failed.append(str(run))
            expected = isinstance(error, (ValueError, OSError, RuntimeError))
            print(f"failed: {error if expected else traceback.format_exc()}", file=sys.stderr, flush=True)
    if failed:
        print("failed, and can be started again: " + "; ".join(failed), file=sys.stderr)
    return 1 if failed else 0


def _do(run: Run, chosen: argparse.Namespace) -> str:
    """Do one run, or its stage 1; say where the result is."""
    if chosen.stage1:
        return f"stage 1 in {stage_one(run.experiment, chosen.out, chosen.device, chosen.shared)}"
    result = run_experiment(run.experiment, chosen.out, chosen.device, label=run.label, shared=chosen.shared)
    if chosen.report:
        _write_report(run, chosen)
    return f"top-1 {result['summary']['top1']:.1%} in {run.result(chosen.out)}"


def _write_report(run: Run, chosen: argparse.Namespace) -> None:
    """Execute the notebook on the run's result."""
    path = Path(chosen.out) / "reports" / f"{run.result('').stem}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {**parameters_of(run.experiment), "label": run.label, "folder": str(Path(chosen.out).resolve())}
    command = [sys.executable, "-m", "papermill", "--kernel", "python3", "--no-progress-bar", "--log-level", "ERROR"]
    command += [chosen.report, str(path), "-y", yaml.safe_dump(values)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        raise ValueError(f"the result is there, but its report failed: {done.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
