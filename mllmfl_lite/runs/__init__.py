"""Runs: one experiment from its configuration to its results file."""

from mllmfl_lite.runs.config import Experiment, experiment_of, parameters_of
from mllmfl_lite.runs.parts import load_federation, load_pool, load_teacher
from mllmfl_lite.runs.results import load_result, load_results, provenance, save_result
from mllmfl_lite.runs.run import run_experiment

__all__ = [
    "Experiment", "experiment_of", "load_federation", "load_pool", "load_result", "load_results", "load_teacher",
    "parameters_of", "provenance", "run_experiment", "save_result",
]  # fmt: skip
