"""Runs from files: settings in YAML, one experiment for each method and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from mllmfl_lite.runs.config import Experiment, experiment_of
from mllmfl_lite.runs.run import finished

LONGEST = 100_000  # characters of a file of settings


class _Loader(yaml.SafeLoader):
    """YAML without aliases, in which each key stands once."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not allowed; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [str(self.construct_object(key, deep=True)) for key, _ in node.value]
        if repeated := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"the key {repeated[0]!r} stands twice; keep one of them")
        return super().construct_mapping(node, deep)


def read_settings(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Read fields of `Experiment` from YAML files; a key in a later file replaces the same key in an earlier one.

    Raises:
        ValueError: names file and rule.
    """
    known = {f.name for f in fields(Experiment)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8-sig")
            if len(text) > LONGEST:
                raise ValueError(f"it has {len(text):,} characters; at most {LONGEST:,} are read")
            given = yaml.load(text, _Loader)  # a SafeLoader
        except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{path} must hold lines of the form `name: value`; it holds a {type(given).__name__}")
        if unknown := [str(key) for key in given if key not in known]:
            raise ValueError(f"{path}: there is no setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        values |= given
    return values


@dataclass(frozen=True)
class Run:
    """One experiment of a list.

    Attributes:
        label: names its results file.
        experiment: what is run.
        values: its settings as the files give them, with the seed.
    """

    label: str
    experiment: Experiment
    values: dict[str, Any]

    def result(self, folder: str | Path) -> Path:
        """The results file in that folder."""
        return Path(folder) / f"{self.label}_seed{self.experiment.seed}.json"

    def is_done(self, folder: str | Path) -> bool:
        """Return True if the results file is there; a file of other parameters is a `ValueError`."""
        path = self.result(folder)
        return path.exists() and bool(finished(path, self.experiment))

    def __str__(self) -> str:
        return f"{self.label}, seed {self.experiment.seed}"


def read_runs(files: Sequence[str | Path], methods: Sequence[str | Path] = (), seeds: Sequence[int] = ()) -> list[Run]:
    """Read the runs that files describe. All are checked before one is started.

    Args:
        files: settings that all runs share, merged from left to right.
        methods: one file a method, each merged after them; none: one run of `files` alone.
        seeds: one run each; none: the seed in the files.

    Raises:
        ValueError: names every wrong setting of every file.
    """
    runs, problems = [], []
    for path in [Path(method) for method in methods] or [Path(files[-1])]:
        try:
            values = read_settings([*files, *([path] if methods else [])])
            experiment = experiment_of(values)
        except ValueError as error:
            problems += [f"{path}: {line}" for line in str(error).splitlines()]
            continue
        for seed in seeds or [experiment.seed]:
            runs.append(Run(path.stem, replace(experiment, seed=seed), {**values, "seed": seed}))
    if problems:
        raise ValueError("\n".join(problems))
    return sorted(runs, key=lambda run: run.experiment.seed)
