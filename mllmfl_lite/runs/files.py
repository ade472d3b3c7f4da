"""Runs from files: settings in YAML, one experiment for each method and seed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import yaml

from mllmfl_lite.runs.config import INSIDE, SETTINGS, Experiment, all_of, experiment_of
from mllmfl_lite.runs.results import result_path
from mllmfl_lite.runs.run import finished


class _Loader(yaml.SafeLoader):
    """YAML without aliases, in which each key of a block stands once; PyYAML alone would take the last.

    Aliases of aliases make a value of a million million parts out of thirty lines.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not allowed; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"the key {twice[0]!r:.60} stands twice; keep one of them")
        return super().construct_mapping(node, deep)


def read_settings(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Read fields of `Experiment` from YAML files; a later file's key replaces an earlier one's, also inside a block.

    Files that cannot be read and keys that are no settings are named in one `ValueError`.
    """
    return reduce(merge, all_of(*(partial(_read, path) for path in paths)), {})


def merge(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Replace settings by those given; a block keeps its keys that are not given."""
    blocks = [key for key, value in given.items() if isinstance(value, dict) and isinstance(values.get(key), dict)]
    return {**values, **given, **{key: {**values[key], **given[key]} for key in blocks}}


def _read(path: str | Path) -> dict[str, Any]:
    try:
        given = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _Loader)  # a SafeLoader
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split()):.400}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold lines of the form `name: value`; it holds a {type(given).__name__}")
    if wrong := [key for key in given if key not in SETTINGS and key not in INSIDE][:10]:
        raise ValueError("\n".join(f"{path}: {key!r:.60} is no setting; there are {SETTINGS}" for key in wrong))
    return given


@dataclass(frozen=True)
class Run:
    """One experiment of a list; the label names its results file."""

    label: str
    experiment: Experiment

    def result(self, folder: str | Path) -> Path:
        """The results file in that folder."""
        return result_path(folder, self.label, self.experiment.seed)

    def is_done(self, folder: str | Path) -> bool:
        """Return True if the results file is there; a file of other parameters is a `ValueError`."""
        path = self.result(folder)
        return path.exists() and bool(finished(path, self.experiment))

    def __str__(self) -> str:
        return f"{self.label}, seed {self.experiment.seed}"


def read_runs(files: Sequence[str | Path], methods: Sequence[str | Path] = (), seeds: Sequence[int] = ()) -> list[Run]:
    """Read the runs that files describe, by rising seed. All are checked before one is started.

    Args:
        files: settings that all runs share, merged from left to right.
        methods: one file a method, each merged after them; its name without ending is the run's label. None: one run
            of `files` alone, with the last one's name.
        seeds: one run each; none: the seed in the files.

    Raises:
        ValueError: names every wrong setting with its file, and runs that would write the same results file.
    """
    paths = list(dict.fromkeys(map(Path, methods or files[-1:])))
    lists = all_of(*(partial(_runs_of, [*files, path] if methods else files, path.stem, seeds) for path in paths))
    stems = [path.stem for path in paths]
    if twice := [str(path) for path in paths if stems.count(path.stem) > 1]:
        raise ValueError(f"{' and '.join(twice)} would write the same results files; rename one of them")
    return sorted((run for runs in lists for run in runs), key=lambda run: run.experiment.seed)


def _runs_of(paths: Sequence[str | Path], label: str, seeds: Sequence[int]) -> list[Run]:
    values = read_settings(paths)
    result_path("", label, 0)  # refuses a label that is no file name
    try:
        experiment = experiment_of(values)
        return [Run(label, replace(experiment, seed=seed)) for seed in dict.fromkeys(seeds or [experiment.seed])]
    except ValueError as error:
        lines = [f"{_source(re.split(r'[^a-z_]', line)[0], paths)}: {line}" for line in str(error).splitlines()]
        raise ValueError("\n".join(lines)) from error


def _source(key: str, paths: Sequence[str | Path]) -> str | Path:
    """The last file that names the setting."""
    return next((path for path in reversed(paths) if key in _read(path)), paths[-1])
