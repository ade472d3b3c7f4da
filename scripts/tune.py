"""Six trials for every method, on one tuning seed and held-out training images; the best becomes the method's file.

    python scripts/tune.py notebooks/runs/laptop/cifar10_mini_lt_if10_long.yaml           # all methods not yet tuned
    python scripts/tune.py notebooks/runs/laptop/cifar10_mini_lt_if10_long.yaml fedavg    # one

A fifth of the clients' training part is held out, class by class, and stands in for the test. A trial runs half of the
benchmark's rounds. It is written as it ends, into results/SCALE/tuning/BENCHMARK/METHOD.json. The best one's file goes
into notebooks/runs/SCALE/tuned.
"""

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from sweep import RESULTS

from mllmfl_lite.data.longtail import long_tail_subset
from mllmfl_lite.data.metrics import evaluate_model, summarise
from mllmfl_lite.data.partition import split_clients
from mllmfl_lite.federated import Federation, FedResult, run_federated
from mllmfl_lite.repro import Execution, numpy_generator, write_json
from mllmfl_lite.runs import Experiment, load_pool, load_teacher
from mllmfl_lite.runs.config import experiment_of
from mllmfl_lite.runs.files import merge, read_settings
from mllmfl_lite.runs.parts import initial_model, load_clients_part, make_method, start_file
from mllmfl_lite.runs.run import rounds_key
from mllmfl_lite.stages.align import align
from mllmfl_lite.stages.server_set import draw_server_set
from mllmfl_lite.teachers.answers import ask_teacher

SEED = 7  # no result uses it
RATES = {"federated": [{"lr": lr} for lr in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)]}
SOME = {"federated": [{"lr": lr} for lr in (0.05, 0.1, 0.3)]}
TWO = {"federated": [{"lr": lr} for lr in (0.1, 0.3)]}
DISTILL = TWO | {"method_options": [{"distill": d} for d in (0.3, 1.0, 3.0)]}
STRONG = {"federated": [{**rate, "augment": "strong"} for rate in RATES["federated"]]}
STAGE_3 = {"align": [{"lr": lr, "beta": beta} for lr in (0.02, 0.05, 0.1) for beta in (1.0, 4.0)]}
CE_ALONE = {"align": [{"lr": lr, "beta": 0.0} for lr in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)]}
# Stage 3 trained to its end, with smaller steps and less weight of the KL term than the first grid's corner.
TO_ITS_END = {"align": [{"epochs": 100, "lr": r, "beta": beta} for r in (0.01, 0.02, 0.05) for beta in (0.3, 1.0)]}
CE_TO_ITS_END = {"align": [{"epochs": 100, **one} for one in CE_ALONE["align"]]}
# What a method is, and the settings of which its six trials are all combinations.
METHODS = {
    "fedavg": ({}, RATES),
    "fedavg_strong": ({}, STRONG),
    "balanced_softmax": ({"method": "balanced_softmax"}, SOME | {"method_options": [{"tau": 1.0}, {"tau": 1.5}]}),
    "fedyoyo": ({"method": "fedyoyo"}, SOME | {"method_options": [{"rising": 3}, {"rising": 10}]}),
    "fedprox": ({"method": "fedprox"}, TWO | {"method_options": [{"mu": mu} for mu in (0.001, 0.01, 0.1)]}),
    "fedavgm": ({"method": "fedavgm"}, TWO | {"method_options": [{"momentum": m} for m in (0.5, 0.7, 0.9)]}),
    "creff": ({"method": "creff"}, TWO | {"method_options": [{"head_lr": r} for r in (0.01, 0.03, 0.1)]}),
    "clip2fl": ({"method": "clip2fl"}, DISTILL),
    # where the stand-in CLIP saw the clients' images with labels
    "clip2fl_imagenet": ({"method": "clip2fl", "clip": "efficientnet_lite2"}, DISTILL),
    "fednpc": ({"method": "fednpc"}, {"method_options": [{"steps": n} for n in (2, 4, 7, 10, 14, 27)]}),
    "feddf": ({"method": "feddf"}, TWO | {"method_options": [{"lr": lr} for lr in (3e-4, 1e-3, 3e-3)]}),
    "stage3": ({"stages": [2, 3]}, STAGE_3),
    "stage3_ce": ({"stages": [2, 3]}, CE_ALONE),
    "server_only": ({"stages": [3]}, STAGE_3),
    "server_only_ce": ({"stages": [3]}, CE_ALONE),
    "stage1": ({"stages": [1, 2]}, RATES),
    "mllm_llava_fl": ({"stages": [1, 2, 3]}, STAGE_3),
    "mllm_llava_fl_ce": ({"stages": [1, 2, 3]}, CE_ALONE),
    "fedyoyo_stage3": ({"method": "fedyoyo", "stages": [2, 3]}, STAGE_3),
    "fedyoyo_all_three": ({"method": "fedyoyo", "stages": [1, 2, 3]}, STAGE_3),
}
AGAIN = (
    "stage3", "stage3_ce", "server_only", "mllm_llava_fl", "fedyoyo_stage3", "fedyoyo_all_three",
    "mllm_llava_fl_ce", "server_only_ce",
)  # fmt: skip
METHODS |= {f"{m}_100": (METHODS[m][0], CE_TO_ITS_END if m.endswith("_ce") else TO_ITS_END) for m in AGAIN}
# A method that goes on from another one's rounds takes that one's step size: its own six trials are stage 3's.
ROUNDS_OF = {
    "fednpc": "fedavg",
    "stage3": "fedavg", "stage3_ce": "fedavg", "mllm_llava_fl": "stage1", "mllm_llava_fl_ce": "stage1",
    "fedyoyo_stage3": "fedyoyo", "fedyoyo_all_three": "fedyoyo",
}  # fmt: skip
ROUNDS_OF |= {f"{name}_100": ROUNDS_OF[name] for name in AGAIN if name in ROUNDS_OF}


def combinations(choices: dict[str, list[dict]]) -> list[dict]:
    """All combinations of the blocks' choices; six."""
    found = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    assert len(found) == 6, found
    return found


def world(of: Experiment) -> Federation:
    """Clients' images and split, and the held-out fifth in the test part's place."""
    full = load_clients_part(of)
    turns = numpy_generator(SEED, "held out")
    held = np.concatenate([turns.permutation(np.flatnonzero(full.labels == c)) for c in range(full.num_classes)])
    held = held.reshape(full.num_classes, -1)[:, : len(full) // full.num_classes // 5].ravel()
    rest = full.subset(np.setdiff1d(np.arange(len(full)), held))
    train = rest.subset(long_tail_subset(rest.labels, rest.num_classes, of.imbalance_factor, SEED))
    split = split_clients(of.split, train.labels, of.num_clients, of.alpha, SEED)
    return Federation(train, split, full.subset(np.sort(held)))


def halved(of: Experiment) -> Experiment:
    """The experiment with half of its rounds."""
    return replace(of, federated=replace(of.federated, rounds=-(-of.federated.rounds // 2)))


def trial(of: Experiment, answers: Path, done: dict[str, FedResult]) -> float:
    """Top-1 on the held-out images: the mean of the last rounds, or of the aligned model."""
    federation = world(of)
    train = federation.train
    start = start_file(replace(of, seed=0)) if of.start else None  # the tuning seed has no weights of stage 1
    model = initial_model(of, train.num_classes, start)
    if 2 in of.stages:
        if rounds_key(of) not in done:  # trials of stage 3 share their rounds
            method, here = make_method(of, train, answers), Execution(device="cpu", workers=1)
            done[rounds_key(of)] = run_federated(model, federation, method, of.federated, SEED, here)
        if 3 not in of.stages:
            return summarise(done[rounds_key(of)].history, of.federated.report_rounds)["top1"]
        model.load_state_dict(done[rounds_key(of)].deployed)
    pool = load_pool(of)
    said = ask_teacher(load_teacher(of, pool, "cpu"), pool, train.names, answers)
    aligned = align(model, draw_server_set(pool, said, train.names, of.align.per_class), of.align, SEED).model
    return evaluate_model(aligned, federation.test, train.class_counts())["top1"]


def tuned_file(benchmark: Path, name: str) -> Path:
    """The file with the best of a method's trials."""
    return benchmark.parent / "tuned" / f"{name}.yaml"


def tune(benchmark: Path, name: str) -> None:
    """Run the trials that are not done, and write the best one's file."""
    scale = benchmark.parent.name
    out, tuned = RESULTS / scale / "tuning" / benchmark.stem / f"{name}.json", tuned_file(benchmark, name)
    what, choices = METHODS[name]
    if name in ROUNDS_OF:
        what = merge(read_settings([tuned_file(benchmark, ROUNDS_OF[name])]), what)
    trials = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    done: dict[str, FedResult] = {}
    for settings in combinations(choices)[len(trials) :]:
        of = experiment_of({**merge(read_settings([benchmark]), merge(what, settings)), "seed": SEED})
        top1 = trial(halved(of), RESULTS / scale / "answers", done)
        trials.append({"settings": settings, "top1": round(top1, 4)})
        write_json(out, trials)
        print(f"{name} {settings}: {100 * top1:.1f} %", flush=True)
    best = max(trials, key=lambda one: one["top1"])
    tuned.parent.mkdir(exist_ok=True)
    figure = f"{100 * best['top1']:.1f} % of seed {SEED}'s held-out images"
    line = f"# {name}: the best of six trials ({figure}), by scripts/tune.py\n"
    tuned.write_text(line + yaml.safe_dump(merge(what, best["settings"]), sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", type=Path, help="a file of notebooks/runs/laptop or medium")
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)}")
    chosen = parser.parse_args()
    for method in chosen.methods or METHODS:
        tune(chosen.benchmark, method)
