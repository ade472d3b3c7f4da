"""All methods and controls beside one another: every one, every seed, one results file each.

    python scripts/measure_methods.py laptop
    export MLLMFL_DATA=~/data
    python scripts/measure_methods.py medium                              # hours; goes on where it was stopped
    python scripts/measure_methods.py medium --only fedavg creff --seeds 0

The last conditions ask a second teacher, which needs two optional packages (see `imagenet_teacher.NETWORKS`).

Files that are there are kept. Conditions that differ in stage 3 only share one run of the rounds. The settings of stage
3 were chosen with `scripts/choose_alignment.py`, which never looks at the test part.
"""

import argparse
import multiprocessing
from dataclasses import replace
from pathlib import Path

import torch

from mllmfl_lite.align import AlignSettings
from mllmfl_lite.experiment import Experiment, run_experiment
from mllmfl_lite.federated import FedSettings
from mllmfl_lite.repro import count_cores
from mllmfl_lite.results import RESULTS

LAPTOP = FedSettings(rounds=20, clients_per_round=4, local_epochs=2, eval_every=5, report_rounds=5)
MEDIUM = FedSettings(rounds=60, clients_per_round=8, local_epochs=2, eval_every=10, precision="bfloat16")
SCALES = {
    "laptop": ("laptop/cifar10_mini_lt_if100", Experiment("cifar10_mini", num_clients=10, width=16, settings=LAPTOP)),
    "medium": ("medium/cifar10_lt_if100_methods", Experiment("cifar10", num_clients=20, width=16, settings=MEDIUM)),
}
START = "dwp_linear"  # the paper's stage 1; "features" is the control that needs no words
ALIGN = AlignSettings()
CE_ONLY = replace(ALIGN, beta=0.0)
IMAGENET = replace(ALIGN, teacher="imagenet")  # has never seen CIFAR
CONDITIONS = {
    "fedavg": {},
    "stage1": {"start": START},
    "creff": {"method": "creff"},
    "clip2fl": {"method": "clip2fl"},
    "fedprox": {"method": "fedprox"},
    "fedavgm": {"method": "fedavgm"},
    "stage1_features": {"start": "features"},
    "stage3": {"align": ALIGN},
    "stage3_ce": {"align": CE_ONLY},
    "mllm_llava_fl": {"start": START, "align": ALIGN},
    "mllm_llava_fl_ce": {"start": START, "align": CE_ONLY},
    "mllm_llava_fl_features": {"start": "features", "align": ALIGN},
    "creff_stage3": {"method": "creff", "align": ALIGN},
    "clip2fl_stage3": {"method": "clip2fl", "align": ALIGN},
    "server_only": {"method": "server_only", "align": ALIGN},
    "server_only_stage1": {"method": "server_only", "start": START, "align": ALIGN},
    "server_only_features": {"method": "server_only", "start": "features", "align": ALIGN},
    "stage1_rescaled": {"start": START, "rescale": True},
    "stage1_features_rescaled": {"start": "features", "rescale": True},
    "mllm_llava_fl_rescaled": {"start": START, "rescale": True, "align": ALIGN},
    "stage3_imagenet": {"align": IMAGENET},
    "mllm_llava_fl_imagenet": {"start": START, "align": IMAGENET},
    "server_only_imagenet": {"method": "server_only", "align": IMAGENET},
    "clip2fl_imagenet": {"method": "clip2fl", "clip": "efficientnet_lite2"},
}


def condition(scale: str, name: str, seed: int) -> Experiment:
    """The experiment of that name at that scale."""
    _, base = SCALES[scale]
    if CONDITIONS[name].get("method") == "server_only":  # nothing comes of its rounds: one is enough
        base = replace(base, settings=replace(base.settings, rounds=1, report_rounds=1))
    return replace(base, **CONDITIONS[name]).with_seed(seed)


def measure(scale: str, names: list[str], seed: int, out: Path) -> None:
    """Conditions of one seed that share a run of the rounds, one after the other."""
    torch.set_num_threads(1)
    for name in names:
        if (out / f"{name}_seed{seed}.json").exists():
            continue
        result = run_experiment(condition(scale, name, seed), out, device="cpu", workers=1, label=name)
        seconds, top1 = result["provenance"]["seconds_in_this_process"], result["summary"]["top1"]
        print(f"{scale} {name} seed {seed}: {100 * top1:.1f} % in {seconds:.0f} s", flush=True)


def jobs(scale: str, names: list[str], seeds: list[int], out: Path) -> list[tuple]:
    """What may run side by side, in the order of the conditions: no two of them write to the same checkpoint."""
    sharing = {}
    for name in names:
        for seed in seeds:
            sharing.setdefault((condition(scale, name, seed).rounds_key(), seed), []).append(name)
    return [(scale, together, seed, out) for (_, seed), together in sharing.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scale", choices=SCALES)
    parser.add_argument("--only", nargs="*", default=list(CONDITIONS), choices=CONDITIONS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    out = chosen.out or RESULTS / SCALES[chosen.scale][0]
    with multiprocessing.get_context("spawn").Pool(count_cores()) as pool:
        pool.starmap(measure, jobs(chosen.scale, chosen.only, chosen.seeds, out), chunksize=1)
