"""A run is a file below ``notebooks/runs``, by scale, benchmark and method, checked before anything starts::

    python -m mllmfl_lite.runs paper/cifar10_lt_if100/mllm_llava_fl --seeds 0     # one run
    python -m mllmfl_lite.runs medium/cifar10_lt_if100 --seeds 0 1 2              # all methods of a benchmark
    python -m mllmfl_lite.runs paper/imagenet_lt --plan                           # only say what it would take
    accelerate launch --num_processes 8 -m mllmfl_lite.runs paper/imagenet_lt/stage1 --stage1     # on several GPUs

First it says what the runs need and cost; what is not here stops them. Then each run goes through its stages, with a
progress bar, and leaves its results file in ``results/<scale>/<benchmark>`` and an executed copy of
``notebooks/runs/run.ipynb`` beside it. What is done is skipped, what was killed goes on. The keys of a file are the
parameters of that notebook, so papermill runs the same file without this module.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from mllmfl_lite.federated.methods import FedSettings
from mllmfl_lite.runs.experiment import Experiment, finished
from mllmfl_lite.runs.memory import GIB
from mllmfl_lite.runs.needs import listing, missing
from mllmfl_lite.runs.pipeline import Pipeline, run_pipeline, stage_one
from mllmfl_lite.runs.plan import MACHINES, Machine, Plan, Stage, in_words, make_plan, this_machine
from mllmfl_lite.runs.results import RESULTS, ResultError
from mllmfl_lite.runs.settings import is_of
from mllmfl_lite.stages.align import AlignSettings
from mllmfl_lite.stages.pretrain import PretrainSettings

HOME = RESULTS.parent  # of the repository: what `folder` in a file is seen from


RUNS = HOME / "notebooks" / "runs"


NOTEBOOK = RUNS / "run.ipynb"


KINDS = {kind.__name__: kind for kind in (int, float, str, bool, list)}


STAGES = {"pretrain": PretrainSettings, "align": AlignSettings}  # switched by their name, set by name_...


class RunError(ValueError):
    """A run's file cannot be used: every wrong line of it is named, and what would be right."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a notebook.

    Attributes:
        kind: its type as written, ``"int"``, ``"float"``, ``"str"``, ``"bool"``, ``"list"``.
        default: its value in the notebook.
    """

    kind: str
    default: object


@functools.cache
def notebook_parameters(path: str | Path = "") -> dict[str, Parameter]:
    """The names, types and defaults in a notebook's cell that is tagged "parameters"; by default the runs' notebook."""
    cells = json.loads(Path(path or NOTEBOOK).read_text())["cells"]
    (source,) = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    return {
        line.target.id: Parameter(ast.unparse(line.annotation), ast.literal_eval(line.value))
        for line in ast.parse(source).body
    }


class _Loader(yaml.SafeLoader):
    """YAML in which a key may stand once only."""

    def construct_mapping(self, node, deep=False):
        keys = [str(self.construct_object(key, deep=True)) for key, _ in node.value]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise RunError(f"the key {twice[0]!r} stands twice; keep one of them")
        return super().construct_mapping(node, deep)


def read_run(path: str | Path) -> dict:
    """The parameters of a run: the file's, and the notebook's defaults for the others.

    Raises:
        RunError: not YAML, unknown keys, values of another type, or values that a stage refuses.
    """
    path = Path(path)
    try:
        given = yaml.load(path.read_text(), _Loader)  # a SafeLoader
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:  # also what is no text, or no date
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise RunError(f"{path} must hold lines of the form `name: value`; it holds a {type(given).__name__}")
    known = notebook_parameters()
    wrong = [problem for key, value in given.items() if (problem := _problem(key, value, known))]
    if wrong := wrong or _without_effect(given):
        raise RunError(f"{path}:\n" + "\n".join(f"  - {problem}" for problem in wrong))
    values = {**{name: parameter.default for name, parameter in known.items()}, **given}
    try:
        experiment = pipeline_of(values).experiment
    except ValueError as error:
        raise RunError(f"{path}:\n  - {error}") from error
    drawn = experiment.settings.clients_per_round
    if drawn > experiment.num_clients:
        raise RunError(
            f"{path}:\n  - clients_per_round is {drawn}, but there are only {experiment.num_clients} clients"
        )
    return values


def _problem(key: object, value: object, known: dict[str, Parameter]) -> str:
    """What is wrong with a line, and what would be right; empty where nothing is."""
    if key not in known:
        near = difflib.get_close_matches(str(key), known, 1)
        return f"{key!r} is no parameter of {NOTEBOOK.name}" + (f"; is {near[0]!r} meant?" if near else "")
    kind = known[key].kind
    if is_of(value, KINDS[kind]):
        return ""
    number = kind == "float" and isinstance(value, str) and _is_number(value)
    hint = f"; YAML reads {value} as text, write {float(value):.1e}".replace("e-0", "e-") if number else ""
    return f"{key} must be of type {kind}; got {value!r}, of type {type(value).__name__}{hint}"


def _without_effect(given: dict) -> list[str]:
    """Settings of a stage that is off."""
    off = [stage for stage in STAGES if not given.get(stage, notebook_parameters()[stage].default)]
    keys = [(key, stage) for key in given for stage in off if key.startswith(f"{stage}_")]
    return [f"{key} has no effect without `{stage}: true`; add that, or remove the line" for key, stage in keys]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def pipeline_of(values: dict) -> Pipeline:
    """The pipeline that a run's parameters describe; names that are no parameters of the notebook are not looked at.

    `pretrain` and `align` switch stages 1 and 3, whose settings are ``pretrain_lr``, ``align_beta`` and so on; the
    others are named as in `Experiment`, `FedSettings` and `Pipeline`. `seed` is that of every stage.

    Raises:
        ValueError: a stage refuses its settings.
    """
    stages = {
        stage: settings(**_of(settings, values, f"{stage}_"), seed=values["seed"]) if values[stage] else None
        for stage, settings in STAGES.items()
    }
    rounds = FedSettings(**_of(FedSettings, values))
    experiment = Experiment(**_of(Experiment, values), settings=rounds, align=stages["align"])
    return Pipeline(experiment, stages["pretrain"], **_of(Pipeline, values))


def _of(settings: type, values: dict, prefix: str = "") -> dict:
    """The values that are this class's own, by name."""
    names = {prefix + field.name for field in fields(settings)} - set(STAGES)
    return {name.removeprefix(prefix): values[name] for name in notebook_parameters() if name in names}


@dataclass(frozen=True)
class Run:
    """One file with one seed.

    Attributes:
        name: scale, benchmark and method, or the file's path where it is none of ours.
        values: its parameters.
    """

    name: str
    values: dict

    @property
    def pipeline(self) -> Pipeline:
        """What is run."""
        return pipeline_of(self.values)

    @property
    def folder(self) -> Path:
        """Where everything is kept."""
        return HOME / self.values["folder"]

    @property
    def result(self) -> Path:
        """Its results file."""
        return self.folder / f"{self.values['label']}_seed{self.values['seed']}.json"

    @property
    def report(self) -> Path:
        """The executed copy of the notebook."""
        return self.folder / "reports" / f"{self.result.stem}.ipynb"

    @property
    def owes_report(self) -> Path:
        """A file that is there from the run's start until its report is written."""
        return self.report.with_suffix(".owed")

    def is_done(self) -> bool:
        """Whether nothing is left to do.

        Raises:
            ResultError: its results file is of other parameters, or damaged.
        """
        if not self.result.exists():
            return False
        finished(self.result, self.pipeline.started)
        return not self.owes_report.exists()

    def __str__(self) -> str:
        return f"{self.name}, seed {self.values['seed']}"


def find_files(names: Sequence[str]) -> list[Path]:
    """The files that are meant: ``medium/cifar10_lt_if100/fedavg``, all below ``medium/cifar10_lt_if100``, or a path.

    Raises:
        RunError: there is none of that name.
    """
    found = []
    for name in names:
        inside, itself = RUNS / name, Path(name)
        of_folder = sorted(inside.rglob("*.yaml")) if inside.is_dir() else []
        one = next((p for p in (inside.with_name(inside.name + ".yaml"), itself) if p.is_file()), None)
        if not of_folder and not one:
            raise RunError(f"there is no run {name!r}; there are\n" + "\n".join(f"  {b}" for b in benchmarks()))
        found += of_folder or [one]
    return found


def benchmarks() -> list[str]:
    """The folders of runs that come with the book, e.g. ``"paper/imagenet_lt"``."""
    return sorted({path.parent.relative_to(RUNS).as_posix() for path in RUNS.rglob("*.yaml")})


def read_runs(files: Sequence[Path], seeds: Sequence[int] = ()) -> list[Run]:
    """Every file with every seed, the seeds one after the other; all files are read before one of them is used.

    Args:
        files: as `find_files` gives them.
        seeds: none: each file's own.

    Raises:
        RunError: names every line that is wrong, of all files; or two runs would write the same results file.
    """
    values, wrong = {}, []
    for path in files:
        try:
            values[path] = read_run(path)
        except RunError as error:
            wrong.append(str(error))
        else:
            wrong += [f"{path} needs a {key}" for key in ("label", "folder") if not values[path][key]]
    if wrong := wrong + [f"a seed must be a whole number of at least 0; got {seed}" for seed in seeds if seed < 0]:
        raise RunError("\n".join(wrong))
    by_result: dict[Path, Run] = {}
    for seed, path in itertools.product([{"seed": seed} for seed in seeds] or [{}], files):
        run = Run(_name(path), values[path] | seed)
        first = by_result.setdefault(run.result.resolve(), run)
        if first.name != run.name:
            raise RunError(
                f"{first.name} and {run.name} would both write {run.result}; give one of them another label or folder"
            )
    return list(by_result.values())


def _name(path: Path) -> str:
    return path.relative_to(RUNS).with_suffix("").as_posix() if RUNS in path.parents else str(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mllmfl_lite.runs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", help="scale/benchmark/method, scale/benchmark, or a file of your own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="in place of the file's own")
    parser.add_argument("--device", default="", help="auto, cpu or cuda, in place of the file's own")
    parser.add_argument("--plan", action="store_true", help="say what the runs need and cost, and end")
    parser.add_argument("--stage1", action="store_true", help="only annotate and pretrain; accelerate launch may do it")
    parser.add_argument("--on", choices=MACHINES, help="with --plan: on this machine, in place of the one at hand")
    chosen = parser.parse_args(arguments)
    try:
        return _carry_out(chosen)
    except (ValueError, ResultError) as error:
        print(error, file=sys.stderr)
        return 2


def _carry_out(chosen: argparse.Namespace) -> int:
    runs = read_runs(find_files(chosen.runs), chosen.seeds)
    if chosen.device:
        runs = [replace(run, values=run.values | {"device": chosen.device}) for run in runs]
    todo = [run for run in runs if not run.is_done()]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done")
    if not todo:
        return 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not chosen.stage1:
        print("several processes can share stage 1 only: add --stage1, then start one process without", file=sys.stderr)
        return 2
    lacking = list(dict.fromkeys(need for run in todo for need in missing(run.pipeline, run.folder)))
    try:
        if not chosen.stage1:
            tell_plan(todo, MACHINES.get(chosen.on) if chosen.on else None)
    finally:  # also where a model that is not here has no known size
        if lacking:
            sys.stdout.flush()
            print(f"\n{listing(lacking)}", file=sys.stderr)
    if chosen.plan or lacking:
        return 0 if chosen.plan else 3
    if chosen.stage1:
        return do_all([run for run in todo if run.pipeline.pretrain], _stage_one)
    return do_all(todo, _all_stages)


def tell_plan(todo: Sequence[Run], machine: Machine | None) -> None:
    """Print what the runs cost: one run stage by stage, several a line each; shared work is counted once."""
    here, machine = machine is None, machine or this_machine(todo[0].pipeline, todo[0].values["device"])
    plans = [make_plan(run.pipeline, machine) for run in todo]
    if len(todo) == 1:
        print(f"\n{todo[0]}\n{plans[0]}")
    else:
        _tell_several(todo, plans, machine)
    memory = max(plan.memory for plan in plans)
    disk = sum(stage.disk for stages in own_stages(todo, plans) for stage in stages)
    if machine.memory < memory:
        print(
            f"This will not fit: {memory / GIB:.1f} GiB are needed, {machine.name} has {machine.memory / GIB:.1f} GiB"
        )
    place = next(p for p in (todo[0].folder, *todo[0].folder.parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if here and free < disk:
        print(f"This will not fit on the disk: {disk / GIB:.1f} GiB are needed, {free / GIB:.1f} GiB are free")


def _tell_several(todo: Sequence[Run], plans: Sequence[Plan], machine: Machine) -> None:
    spent = own_seconds(todo, plans, machine)
    memory = {run.name: plan.memory for run, plan in zip(todo, plans, strict=True)}
    for name, seconds in spent.items():
        each = f"{len(seconds)} x {in_words(sum(seconds) / len(seconds)):>8s}"
        print(f"  {name:50s} {each} {memory[name] / GIB:6.2f} GiB")
    total = sum(map(sum, spent.values()))
    print(f"  {'in all, one after the other':54s} {in_words(total):>8s} {max(memory.values()) / GIB:6.2f} GiB")
    print(f"on {machine.name}; what runs share is counted with the first of them")


def own_seconds(todo: Sequence[Run], plans: Sequence[Plan], machine: Machine) -> dict[str, list[float]]:
    """Seconds of each file's seeds, without what an earlier run of the list has done for it."""
    spent: dict[str, list[float]] = {}
    for run, stages in zip(todo, own_stages(todo, plans), strict=True):
        spent.setdefault(run.name, []).append(sum(stage.seconds(machine) for stage in stages))
    return spent


def own_stages(todo: Sequence[Run], plans: Sequence[Plan]) -> list[list[Stage]]:
    """Each run's stages, without what an earlier run of the list has done for it."""
    counted: set[tuple] = set()
    own = []
    for run, plan in zip(todo, plans, strict=True):
        keyed = {((run.folder / stage.folder).resolve(), stage.name, stage.once): stage for stage in plan.stages}
        own.append([stage for key, stage in keyed.items() if not stage.once or key not in counted])
        counted.update(keyed)
    return own


def do_all(todo: Sequence[Run], work: Callable[[Run], str]) -> int:
    """Do it for one after the other; one that fails is named, and the others go on."""
    failed = []
    for number, run in enumerate(todo, 1):
        started = time.perf_counter()
        print(f"\n[{number}/{len(todo)}] {run}", flush=True)
        try:
            said = work(run)
        except Exception as error:  # whatever it is, the others may be well
            failed.append(run)
            print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        print(f"{said}, {in_words(time.perf_counter() - started)}: {run.result}")
    if failed:
        print("\nfailed, and can be started again:", *(f"  {run}" for run in failed), sep="\n", file=sys.stderr)
    return 1 if failed else 0


def _all_stages(run: Run) -> str:
    run.owes_report.parent.mkdir(parents=True, exist_ok=True)
    run.owes_report.touch()
    values = run.values
    result = run_pipeline(run.pipeline, run.folder, values["device"], values["label"], values["together"])
    write_report(run)
    run.owes_report.unlink()
    return f"top-1 {result['summary']['top1']:.1%}"


def _stage_one(run: Run) -> str:
    return f"stage 1 in {stage_one(run.pipeline, run.folder, run.values['device'])}"


def write_report(run: Run) -> Path:
    """Have papermill execute the notebook on the run's results, into ``reports/`` beside them.

    Raises:
        RuntimeError: it failed; what it said is in the message.
    """
    path = run.report
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "papermill", "--kernel", "python3", "--no-progress-bar", "--log-level", "ERROR"]
    command += [str(NOTEBOOK), str(path), "-y", yaml.safe_dump(run.values)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the results are there, but their report failed: {done.stderr.strip()[-2000:]}")
    return path


if __name__ == "__main__":
    sys.exit(main())
