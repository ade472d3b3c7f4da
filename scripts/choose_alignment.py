"""How the settings of stage 3 were chosen: on held-out training images, never on the test part.

    python scripts/choose_alignment.py          # about half an hour on two cores

A fifth of the training part of `cifar10_mini` is held out and stands in for the test; the clients hold the long tail of
the other four fifths. The seed is one that no result uses.
"""

import argparse
import itertools
import warnings

import numpy as np
from sweep import RESULTS, in_processes

from mllmfl_lite.data import load_images
from mllmfl_lite.data.longtail import long_tail_subset
from mllmfl_lite.data.metrics import evaluate_model
from mllmfl_lite.data.partition import split_clients
from mllmfl_lite.federated import Federation, FedSettings, run_federated
from mllmfl_lite.models import build_model, load_model, with_head
from mllmfl_lite.repro import Execution
from mllmfl_lite.runs import Experiment, load_pool, load_teacher
from mllmfl_lite.stages.align import AlignSettings, align
from mllmfl_lite.stages.server_set import draw_server_set
from mllmfl_lite.teachers.answers import ask_teacher

SEED = 7
ROUNDS = FedSettings(rounds=20, clients_per_round=4, local_epochs=2, eval_every=100, report_rounds=1)
ANSWERS = RESULTS / "laptop" / "answers"
GRID = {
    "teacher": ("mllm", "clip"),
    "per_class": (40, 60, 100),
    "beta": (0.0, 1.0, 4.0),
    "temperature": (1.0, 2.0),
    "lr": (0.02, 0.05),
    "epochs": (20,),
}


def world():
    """Clients' images, split and held-out images."""
    full = load_images("cifar10_mini", "train")
    turn = np.random.default_rng(SEED).permutation(len(full))
    held, rest = full.subset(turn[: len(full) // 5]), full.subset(turn[len(full) // 5 :])
    train = rest.subset(long_tail_subset(rest.labels, 10, 100, SEED))
    return train, split_clients("dirichlet_equal", train.labels, 10, 0.5, SEED), held


def federated(start):
    train, split, held = world()
    weights = RESULTS / "laptop" / "pretraining" / f"{start}_seed0.safetensors"
    model = with_head(load_model(weights), 10, SEED) if start else build_model("resnet8", 10, 16, SEED)
    run = run_federated(model, Federation(train, split, held), None, ROUNDS, SEED, Execution(device="cpu", workers=1))
    print(f"{start or 'random'}: before alignment {100 * run.history[-1]['metrics']['top1']:.1f} %", flush=True)
    return start, run.deployed


def tried(start, state, numbers):
    warnings.simplefilter("ignore")
    settings = AlignSettings(**numbers)
    train, _, held = world()
    experiment = Experiment(width=16, stages=(2, 3), align=settings)
    pool, model = load_pool(experiment), build_model("resnet8", 10, 16)
    answers = ask_teacher(load_teacher(experiment, pool, "cpu"), pool, train.names, ANSWERS)
    model.load_state_dict(state)
    done = align(model, draw_server_set(pool, answers, train.names, settings.per_class), settings, SEED)
    metrics = evaluate_model(done.model, held, train.class_counts())
    groups = " ".join(f"{g} {100 * metrics['groups'][g]:.1f}" for g in ("head", "middle", "tail"))
    print(f"{start or 'random':10} {numbers} all {100 * metrics['top1']:.1f} {groups}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", nargs="*", default=["", "dwp_linear"])
    chosen = parser.parse_args()
    grid = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    grid = [numbers for numbers in grid if numbers["beta"] or numbers["temperature"] == 1]  # T is in the KL term only
    states = in_processes(federated, [(start,) for start in chosen.starts])
    in_processes(tried, [(start, state, numbers) for numbers in grid for start, state in states])
