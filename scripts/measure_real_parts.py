"""Stage 1 on real parts, and what it is worth at the end: one results file a condition and seed.

    python scripts/measure_real_parts.py ~/real_parts                                  # all conditions, seed 0
    python scripts/measure_real_parts.py ~/real_parts --only words --seeds 0 1 --then pretrain

`pretrain` writes pretraining/*.json, `federate` the laptop world from each start (FedAvg, then stage 3 with a teacher
that saw no CIFAR label). Files that are there are kept, a run that was killed goes on. `make real-parts` comes first.
"""

import copy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from real_parts.parts import Parts
from real_parts.stage1 import CONDITIONS, Learner, Targets, settings_of, train_stage1, weights_path
from sweep import RESULTS, laptop_run, options

from mllmfl_lite.checkpoint import RunFolder
from mllmfl_lite.data import load_images
from mllmfl_lite.data.reserved import overlap
from mllmfl_lite.measure.transfer import embed, linear_probe
from mllmfl_lite.models import build_model, save_model
from mllmfl_lite.runs.results import provenance, save_result
from mllmfl_lite.runs.run import run_experiment
from mllmfl_lite.stages.texts import Views

STEPS, WIDTH, WATCHED = 6000, 16, 256  # steps of stage 1; width; held-out images
PROBED = (0, 500, 1500, 2500)  # steps, and the last
METHODS = {"stage1": "fedavg", "mllm_llava_fl_imagenet": "stage3_imagenet"}  # with stage 1: without it


def probe(model) -> float:
    """Share of the bundled test images that a linear classifier on the model's features names right."""
    model = copy.deepcopy(model)  # `embed` would leave it in evaluation mode
    train, test = (load_images("cifar10_mini", part) for part in ("train", "test"))
    guess = linear_probe(embed(model, train), torch.from_numpy(train.labels.copy()), embed(model, test), 10)
    return float((guess.numpy() == test.labels).mean())


def targets(parts: Parts, name: str, teacher, few: int = 0, shuffled: bool = False, seed: int = 0) -> Targets:
    """What the images of a pool are learned from; `few`: of the first so many."""
    texts = parts.texts(name, teacher)
    if few:
        rows = np.flatnonzero(texts.image < few)
        texts = replace(texts, image=texts.image[rows], kind=texts.kind[rows], answers=[texts.answers[r] for r in rows])
    views = Views(parts.pools[name], parts.encoder, parts.folder / "tokens")
    given = texts.shuffled(seed) if shuffled else texts
    return Targets(views, given, parts.features(name), parts.choices(name)[0][:, 0])


def pretrain(parts: Parts, name: str, seed: int, out: Path, steps: int = STEPS) -> None:
    """One condition: its results file, and its weights beside it."""
    path, condition = out / "pretraining" / f"{name}_seed{seed}.json", CONDITIONS[name]
    if path.exists() and weights_path(out, name, seed).exists():
        return
    (teacher, about), settings = parts.small_reader(), settings_of(condition)
    data = targets(parts, "stage1", teacher, shuffled=condition.shuffled, seed=seed)
    held_out, steps = targets(parts, "held_out", teacher, WATCHED), round(steps * condition.longer)
    learner = Learner(build_model("resnet8", 10, WIDTH, seed), condition, teacher, data, seed)
    given = {
        "condition": {"name": name, **asdict(condition)}, "seed": seed, "steps": steps, "width": WIDTH,
        "batch": settings.batch_size, "lr": settings.lr, "weight_decay": settings.weight_decay,
        "images": len(parts.pools["stage1"]), "texts": len(data.texts), "reader": teacher.identity,
    }  # fmt: skip

    def watch(step: int) -> dict:
        found = {"held_out": learner.held_out(held_out)}
        if step in PROBED or step == steps:
            found["probe"] = probe(learner.compact.model)
        print(f"{path.stem}, step {step}: {found}", flush=True)
        return found

    with RunFolder(out / "checkpoints" / path.stem, given) as folder:
        history = train_stage1(learner, data, settings, steps, seed, folder, watch)
    model = learner.compact.model
    model.head.requires_grad_(True)
    weights_path(out, name, seed).parent.mkdir(parents=True, exist_ok=True)
    save_model(weights_path(out, name, seed), model, "resnet8", WIDTH)
    clients, test = (load_images("cifar10_mini", part) for part in ("train", "test"))
    result = {
        "label": name, "parameters": given, "summary": {"probe": history[-1]["probe"]}, "history": history,
        "reader": about, "provenance": provenance("cpu"),
        "data": {
            "pool_sha256": parts.pools["stage1"].checksum(),
            "overlap": overlap(clients=clients, test=test, **parts.pools),
        },
    }  # fmt: skip
    save_result(path, result)


def federate(name: str, seed: int, fed_seed: int, out: Path) -> None:
    """The laptop world from one start: FedAvg, then all three stages; two results files."""
    for method in METHODS:
        experiment = replace(laptop_run(method, fed_seed).experiment, start=str(weights_path(Path(".."), name, seed)))
        run_experiment(experiment, out / "federated", "cpu", 1, f"{name}{seed}_{METHODS[method]}")


def main() -> None:
    parser = options(__doc__, CONDITIONS, RESULTS / "real")
    parser.add_argument("folder", type=Path, help="the real parts")
    parser.add_argument("--then", nargs="*", default=["pretrain", "federate"], choices=["pretrain", "federate"])
    parser.add_argument("--clients-seeds", type=int, nargs="*", default=[0, 1, 2], help="of the federations")
    parser.set_defaults(seeds=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = Parts(args.folder)
    for seed in args.seeds:
        for name in args.only:
            if "pretrain" in args.then:
                pretrain(parts, name, seed, args.out)
            for fed_seed in args.clients_seeds if "federate" in args.then else ():
                federate(name, seed, fed_seed, args.out)


if __name__ == "__main__":
    main()
