"""Few labels of CIFAR-10, from three starts: every share, every seed, one results file each.

    export MLLMFL_DATA=~/data
    python scripts/measure_scarcity.py --choose-lr    # four step sizes a start, judged on held-out training images
    python scripts/measure_scarcity.py

The pretrained weights are those of `scripts/measure_real_parts.py`: no teacher behind them saw a CIFAR label, and their
images are CIFAR-100's. Each results file counts the images that two of its sets share. Files that are there are kept.
"""

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from real_parts.pool import open_pools
from real_parts.stage1 import weights_path
from sweep import RESULTS, in_processes, options

from mllmfl_lite.data import load_images
from mllmfl_lite.data.longtail import few_labels
from mllmfl_lite.data.reserved import overlap
from mllmfl_lite.measure.transfer import FINETUNING, best, finetune
from mllmfl_lite.models import build_model, load_model, with_head
from mllmfl_lite.repro import Execution, write_atomically
from mllmfl_lite.runs.results import provenance, save_result

OUT = RESULTS / "medium" / "scarce_cifar10"
STARTS = ("random", "words", "features")
SHARES, TRIED, TRIAL_SEED = (0.01, 0.02, 0.1), (0.02, 0.05, 0.1, 0.2), 7
EPOCHS, WIDTH, WATCHED = 30, 16, 2000
NUMBERS = replace(FINETUNING, rounds=EPOCHS, eval_every=3)
pools = functools.cache(open_pools)  # seconds, and the same for every run


def model_for(start: str, seed: int, head_seed: int | None = None):
    """The start's model with a new last layer; each seed has its own pretraining."""
    if start == "random":
        return build_model("resnet8", 10, WIDTH, seed)
    body = load_model(weights_path(RESULTS / "real", start, seed))
    return with_head(body, 10, seed if head_seed is None else head_seed)


def trial(start: str, lr: float, out: Path) -> None:
    """Accuracy on 2,000 held-out training images, with 1 % of the labels; no result has this seed."""
    path = out / "tuning" / f"{start}_{lr}.json"
    if path.exists():
        return
    train = load_images("cifar10", "train")
    labelled = few_labels(train.labels, 10, SHARES[0], TRIAL_SEED)
    others = np.setdiff1d(np.arange(len(train)), labelled)
    watched = train.subset(np.random.default_rng(TRIAL_SEED).permutation(others)[:WATCHED])
    model = model_for(start, TRIAL_SEED if start == "random" else 0, TRIAL_SEED)
    run = finetune(model, train, labelled, watched, replace(NUMBERS, lr=lr), TRIAL_SEED)
    path.parent.mkdir(parents=True, exist_ok=True)
    last = run.history[-1]["metrics"]["top1"]
    write_atomically(path, f"{json.dumps({'start': start, 'lr': lr, 'last': last})}\n".encode())


def step_size(start: str, out: Path) -> float:
    """The best trial's."""
    tried = [json.loads(path.read_text()) for path in (out / "tuning").glob(f"{start}_*.json")]
    if len(tried) < len(TRIED):
        raise ValueError(f"{out}/tuning has {len(tried)} trials of {start!r}; {len(TRIED)} are needed: --choose-lr")
    return max(tried, key=lambda one: (one["last"], -one["lr"]))["lr"]


def measure(share: float, start: str, seed: int, out: Path) -> None:
    """One results file."""
    path = out / f"{start}_{round(100 * share):02d}percent_seed{seed}.json"
    if path.exists():
        return
    train, test = (load_images("cifar10", part) for part in ("train", "test"))
    labelled, lr = few_labels(train.labels, 10, share, seed), step_size(start, out)
    execution = Execution(out / "checkpoints" / path.stem, "cpu", label=path.stem)
    run = finetune(model_for(start, seed), train, labelled, test, replace(NUMBERS, lr=lr), seed, execution)
    result = {
        "label": f"{start}_{round(100 * share):02d}",
        "parameters": {"dataset": "cifar10", "start": start, "share": share, "seed": seed, "labels": len(labelled),
                       "width": WIDTH, "epochs": EPOCHS, "lr": lr, "batch_size": 32},
        "summary": {"best": best(run.history), "last": run.history[-1]["metrics"]["top1"]},
        "data": {"train_sha256": train.checksum(), "test_sha256": test.checksum(),
                 "overlap": overlap(clients=train.subset(labelled), test=test, **pools())},
        "provenance": provenance("cpu"),
        "history": run.history,
    }  # fmt: skip
    save_result(path, result)
    print(f"{path.name}: last {100 * result['summary']['last']:.1f} %", flush=True)


if __name__ == "__main__":
    parser = options(__doc__, STARTS, OUT)
    parser.add_argument("--choose-lr", action="store_true", help="the trials, nothing else")
    chosen = parser.parse_args()
    if chosen.choose_lr:
        in_processes(trial, [(start, lr, chosen.out) for start in chosen.only for lr in TRIED])
    else:
        jobs = [(share, start, k, chosen.out) for share in SHARES for k in chosen.seeds for start in chosen.only]
        in_processes(measure, jobs)
