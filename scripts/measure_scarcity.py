"""Few labels of full CIFAR, from the pretrained weights and from random ones: every share, every seed, one file each.

    export MLLMFL_DATA=~/data
    python scripts/measure_scarcity.py --dataset cifar10
    python scripts/measure_scarcity.py --dataset cifar10 --choose-lr       # how the step sizes below were chosen

The pretrained weights are those of the laptop-scale table (`scripts/measure_pretraining.py`). Pictures that the server
had seen in pretraining are taken out of the training set before labels are drawn. Step sizes were chosen on training
pictures without a label, never on the test set: 0.1 was best of those tried for both starts, and the control has it,
too. Files that are there are kept.
"""

from dataclasses import replace

import numpy as np
from sweep import RESULTS, in_processes, options

from mllmfl_lite.data import load_images
from mllmfl_lite.data.cifar import mini_index
from mllmfl_lite.data.longtail import few_labels
from mllmfl_lite.measure.transfer import FINETUNING, best, finetune
from mllmfl_lite.models import build_model, load_model, with_head
from mllmfl_lite.repro import Execution
from mllmfl_lite.runs.results import provenance, save_result

PRETRAINED = RESULTS / "laptop" / "pretraining"
RATES = {"pretrained": 0.1, "random": 0.1, "features": 0.1}
WEIGHTS = {"pretrained": "dwp_linear", "features": "features"}  # the control: distilled features, no words
TRIED = (0.02, 0.05, 0.1, 0.2)
EPOCHS, WIDTH = 30, 16
NUMBERS = replace(FINETUNING, rounds=EPOCHS, eval_every=3)


def unseen(dataset):
    """The training images that are not in the web pool."""
    pool = mini_index()["parts"]["web"]
    places = zip(pool["origin"], pool["index"], strict=True)
    taken = [i for origin, i in places if pool["origins"][origin] == f"{dataset}/train"]
    full = load_images(dataset, "train")
    return full.subset(np.setdiff1d(np.arange(len(full)), taken))


def model_for(start, num_classes, seed):
    if start == "random":
        return build_model("resnet8", num_classes, WIDTH, seed)
    return with_head(load_model(PRETRAINED / f"{WEIGHTS[start]}_seed{seed}.safetensors"), num_classes, seed)


def measure(dataset, share, start, seed, out):
    path = out / f"{start}_{round(100 * share):02d}percent_seed{seed}.json"
    if path.exists():
        return
    train, test = unseen(dataset), load_images(dataset, "test")
    labelled = few_labels(train.labels, train.num_classes, share, seed)
    model = model_for(start, train.num_classes, seed)
    execution = Execution(out / "checkpoints" / path.stem, "cpu", label=path.stem)
    run = finetune(model, train, labelled, test, replace(NUMBERS, lr=RATES[start]), seed, execution)
    result = {
        "label": f"{start}_{round(100 * share):02d}",
        "parameters": {"dataset": dataset, "start": start, "share": share, "seed": seed, "labels": len(labelled),
                       "width": WIDTH, "epochs": EPOCHS, "lr": RATES[start], "batch_size": 32},
        "summary": {"best": best(run.history), "last": run.history[-1]["metrics"]["top1"]},
        "data": {"train_sha256": train.checksum(), "test_sha256": test.checksum()},
        "provenance": provenance("cpu"),
        "history": run.history,
    }  # fmt: skip
    save_result(path, result)
    print(f"{dataset} {path.name}: best {100 * best(run.history):.1f} %", flush=True)


def choose(dataset, share, start, lr):
    """Accuracy on 2,000 training images without a label; a seed that no result uses."""
    train = unseen(dataset)
    labelled = few_labels(train.labels, train.num_classes, share, seed=7)
    others = np.setdiff1d(np.arange(len(train)), labelled)
    watched = train.subset(np.random.default_rng(7).permutation(others)[:2000])
    model = with_head(model_for(start, train.num_classes, 0), train.num_classes, 7)
    run = finetune(model, train, labelled, watched, replace(NUMBERS, lr=lr), 7)
    print(f"{dataset} {share:.0%} {start} lr {lr}: best {100 * best(run.history):.1f} %", flush=True)


if __name__ == "__main__":
    parser = options(__doc__, RATES, None)
    parser.add_argument("--dataset", choices=("cifar10", "cifar100"), default="cifar10")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.01, 0.02, 0.1])
    parser.add_argument("--choose-lr", action="store_true")
    chosen = parser.parse_args()
    out = chosen.out or RESULTS / "medium" / f"scarce_{chosen.dataset}"
    if chosen.choose_lr:
        in_processes(choose, [(chosen.dataset, chosen.shares[0], s, lr) for lr in TRIED for s in chosen.only])
    else:
        jobs = [(chosen.dataset, p, s, k, out) for p in chosen.shares for k in chosen.seeds for s in chosen.only]
        in_processes(measure, jobs)
