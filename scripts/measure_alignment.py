"""What each part of stage 3 is worth, at laptop scale: every condition, every seed, one file each.

    python scripts/measure_alignment.py                 # about half an hour on two cores

All conditions of a seed start from one run of FedAvg. Controls (wrong labels, even answers, missing classes) change
what the teacher says of the pool, or the set that is drawn by it. Files that are there are kept.
"""

import warnings
from dataclasses import replace
from pathlib import Path

from controls import even_out, make_wrong, without_classes
from sweep import RESULTS, in_processes, laptop_run, options

from mllmfl_lite.data.metrics import evaluate_model, summarise
from mllmfl_lite.models import load_model
from mllmfl_lite.runs import (
    Experiment,
    load_federation,
    load_pool,
    load_teacher,
    parameters_of,
    provenance,
    run_experiment,
    save_result,
)
from mllmfl_lite.stages.align import AlignSettings, align
from mllmfl_lite.stages.server_set import describe, draw_server_set
from mllmfl_lite.teachers.answers import ask_teacher

CONDITIONS = {  # AlignSettings that differ from the default, and the control
    "beta_0": ({"beta": 0.0}, {}),
    "beta_1": ({"beta": 1.0}, {}),
    "beta_4": ({}, {}),
    "beta_16": ({"beta": 16.0}, {}),
    "temperature_1": ({"temperature": 1.0}, {}),
    "images_10": ({"per_class": 10}, {}),
    "images_30": ({"per_class": 30}, {}),
    "head_only": ({"part": "head"}, {}),
    "clip": ({"teacher": "clip"}, {}),
    "labels": ({"teacher": "labels"}, {}),
    "labels_beta_0": ({"teacher": "labels", "beta": 0.0}, {}),
    "clip_beta_0": ({"teacher": "clip", "beta": 0.0}, {}),
    "imagenet_beta_0": ({"teacher": "imagenet", "beta": 0.0}, {}),
    "each_round": ({"when": "each round", "epochs": 1}, {}),  # as many passes in all
    "even": ({}, {"even": True}),
    "imagenet_even": ({"teacher": "imagenet"}, {"even": True}),
    **{f"wrong_{w}": ({"teacher": "labels", "beta": 0.0}, {"wrong": w / 100}) for w in (20, 40, 60, 80)},
    "without_truck": ({}, {"without": ["truck"]}),
    "without_airplane": ({}, {"without": ["airplane"]}),
}


def measure(seed: int, names: list[str], out: Path) -> None:
    """All conditions of a seed, one after the other: they share its rounds."""
    warnings.filterwarnings("ignore", message="the pool has fewer")
    fedavg = laptop_run("fedavg", seed).experiment
    for name in names:
        settings, control = CONDITIONS[name]
        experiment = replace(fedavg, stages=(2, 3), align=AlignSettings(**settings))
        path = out / f"{name}_seed{seed}.json"
        if control and not path.exists():
            save_result(path, {"label": name, **controlled(experiment, control, out)})
        elif not control:
            run_experiment(experiment, out, "cpu", 1, name)
        print(path.stem, flush=True)


def controlled(experiment: Experiment, control: dict, out: Path) -> dict:
    """Align FedAvg's model on a set whose labels, answers or classes were changed."""
    fedavg = replace(experiment, stages=(2,), align=AlignSettings())
    rounds = run_experiment(fedavg, out / "rounds", "cpu", 1, "fedavg")
    model = load_model(out / "rounds" / "models" / f"fedavg_seed{experiment.seed}-federated.safetensors")
    federation, pool = load_federation(experiment), load_pool(experiment)
    names = federation.train.names
    answers = ask_teacher(load_teacher(experiment, pool, "cpu"), pool, names, out / "answers")
    if "wrong" in control:
        answers = make_wrong(answers, control["wrong"], experiment.seed)
    server_set = draw_server_set(pool, answers, names, experiment.align.per_class)
    if "even" in control:
        server_set = replace(server_set, probabilities=even_out(server_set.probabilities, answers))
    if "without" in control:
        server_set = without_classes(server_set, control["without"])
    done = align(model, server_set, experiment.align, experiment.seed)
    metrics = evaluate_model(done.model, federation.test, federation.train.class_counts())
    aligned = {"server_set": describe(server_set, pool), "metrics": metrics, "history": done.history}
    return {
        "parameters": {**parameters_of(experiment), "control": control},
        "summary": summarise([aligned], 1),
        "data": rounds["data"],
        "history": rounds["history"],
        "aligned": aligned,
        "provenance": provenance("cpu"),
    }


if __name__ == "__main__":
    chosen = options(__doc__, CONDITIONS, RESULTS / "laptop" / "alignment").parse_args()
    in_processes(measure, [(seed, chosen.only, chosen.out) for seed in chosen.seeds])
