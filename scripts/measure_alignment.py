"""What each part of stage 3 is worth, at laptop scale: every condition, every seed, one file each.

    python scripts/measure_alignment.py                 # about half an hour on two cores

All conditions of a seed start from one run of FedAvg, `notebooks/runs/laptop/cifar10_mini_lt_if100/fedavg.yaml`.
"""

import argparse
import multiprocessing
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from mllmfl_lite.repro import count_cores
from mllmfl_lite.runs.experiment import run_experiment
from mllmfl_lite.runs.launch import find_files, read_runs
from mllmfl_lite.runs.results import RESULTS
from mllmfl_lite.stages.align import AlignSettings

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
    "even": {"even": True},
    "imagenet_even": {"teacher": "imagenet", "even": True},
    **{f"wrong_{w}": {"teacher": "labels", "beta": 0.0, "wrong": w / 100} for w in (20, 40, 60, 80)},
    "each_round": {"when": "each round", "epochs": 1},  # as many passes in all
    "without_truck": {"without": ("truck",)},
    "without_airplane": {"without": ("airplane",)},
}


def measure(seed: int, names: list[str], out: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="the pool has fewer")
    (fedavg,) = read_runs(find_files(["laptop/cifar10_mini_lt_if100/fedavg"]), [seed])
    for name in names:
        experiment = replace(fedavg.pipeline.experiment, align=AlignSettings(**CONDITIONS[name], seed=seed))
        result = run_experiment(experiment, out, device="cpu", workers=1, label=name)
        print(f"{name} seed {seed}: {100 * result['summary']['top1']:.1f} %", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(CONDITIONS), choices=CONDITIONS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "laptop" / "alignment")
    chosen = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(count_cores()) as pool:  # a seed's conditions share its rounds
        pool.starmap(measure, [(seed, chosen.only, chosen.out) for seed in chosen.seeds], chunksize=1)
