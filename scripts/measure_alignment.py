"""What each part of stage 3 is worth, at laptop scale: every condition, every seed, one file each.

    python scripts/measure_alignment.py                 # about half an hour on two cores

All conditions of a seed start from one run of FedAvg. Controls (wrong labels, even answers, missing classes) change
what the teacher says before the set is drawn.
"""

import argparse
import multiprocessing
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from controls import even_out, make_wrong, without_classes

from mllmfl_lite.data.metrics import evaluate_model, summarise
from mllmfl_lite.models import load_model
from mllmfl_lite.repro import count_cores
from mllmfl_lite.runs import load_federation, load_pool, load_teacher, parameters_of, provenance, run_experiment
from mllmfl_lite.runs import save_result as save
from mllmfl_lite.runs.files import read_runs
from mllmfl_lite.stages.align import AlignSettings, align
from mllmfl_lite.stages.server_set import describe, draw_server_set
from mllmfl_lite.teachers.answers import ask_teacher

RUNS = Path(__file__).parent.parent / "notebooks" / "runs"
OUT = Path(__file__).parent.parent / "results" / "laptop" / "alignment"
CONDITIONS = {
    "beta_0": {"beta": 0.0},
    "beta_1": {"beta": 1.0},
    "beta_4": {},
    "beta_16": {"beta": 16.0},
    "temperature_1": {"temperature": 1.0},
    "images_10": {"per_class": 10},
    "images_30": {"per_class": 30},
    "head_only": {"part": "head"},
    "clip": {"teacher": "clip"},
    "labels": {"teacher": "labels"},
    "labels_beta_0": {"teacher": "labels", "beta": 0.0},
    "clip_beta_0": {"teacher": "clip", "beta": 0.0},
    "imagenet_beta_0": {"teacher": "imagenet", "beta": 0.0},
    "each_round": {"when": "each round", "epochs": 1},  # as many passes in all
}
CONTROLS = {
    "even": ({}, {"even": True}),
    "imagenet_even": ({"teacher": "imagenet"}, {"even": True}),
    **{f"wrong_{w}": ({"teacher": "labels", "beta": 0.0}, {"wrong": w / 100}) for w in (20, 40, 60, 80)},
    "without_truck": ({}, {"without": ["truck"]}),
    "without_airplane": ({}, {"without": ["airplane"]}),
}


def measure(seed: int, names: list[str], out: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="the pool has fewer")
    (fedavg,) = read_runs([RUNS / "laptop" / "cifar10_mini_lt_if100.yaml"], [RUNS / "methods" / "fedavg.yaml"], [seed])
    for name in names:
        numbers, control = CONTROLS.get(name, (CONDITIONS.get(name), None))
        experiment = replace(fedavg.experiment, stages=(2, 3), align=AlignSettings(**numbers))
        if control:
            result = run_control(experiment, control, out, name)
        else:
            result = run_experiment(experiment, out, "cpu", 1, name)
        print(f"{name} seed {seed}: {100 * result['summary']['top1']:.1f} %", flush=True)


def run_control(experiment, control: dict, out: Path, name: str) -> dict:
    """Align FedAvg's model on a set whose labels or answers were changed."""
    rounds = run_experiment(replace(experiment, stages=(2,), align=AlignSettings()), out / "rounds", "cpu", 1, "fedavg")
    model = load_model(out / "rounds" / "models" / f"fedavg_seed{experiment.seed}-federated.safetensors")
    federation, pool = load_federation(experiment), load_pool(experiment)
    answers = ask_teacher(load_teacher(experiment, pool, "cpu"), pool, federation.train.names, out / "answers")
    if "wrong" in control:
        answers = make_wrong(answers, control["wrong"], experiment.seed)
    server_set = draw_server_set(pool, answers, federation.train.names, experiment.align.per_class)
    if "even" in control:
        server_set = replace(server_set, probabilities=even_out(server_set.probabilities, answers))
    if "without" in control:
        server_set = without_classes(server_set, control["without"])
    done = align(model, server_set, experiment.align, experiment.seed)
    metrics = evaluate_model(done.model, federation.test, federation.train.class_counts())
    aligned = {"server_set": describe(server_set, pool), "metrics": metrics, "history": done.history}
    result = {**rounds, "label": name, "parameters": {**parameters_of(experiment), "control": control}}
    result |= {"summary": summarise([aligned], 1), "aligned": aligned, "provenance": provenance("cpu")}
    save(out / f"{name}_seed{experiment.seed}.json", result)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [*CONDITIONS, *CONTROLS]
    parser.add_argument("--only", nargs="*", default=every, choices=every)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(count_cores()) as pool:  # a seed's conditions share its rounds
        pool.starmap(measure, [(seed, chosen.only, chosen.out) for seed in chosen.seeds], chunksize=1)
