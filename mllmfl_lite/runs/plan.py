"""A rough estimate of a run: its parts, their operations, and hours on a machine."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from mllmfl_lite.data.imagenet_lt import IMAGENET_LT
from mllmfl_lite.data.longtail import long_tail_counts
from mllmfl_lite.data.reserved import RESERVED, RESERVED_POOL
from mllmfl_lite.models import build_model
from mllmfl_lite.runs.config import Experiment, pool_side
from mllmfl_lite.runs.files import Run
from mllmfl_lite.runs.needs import missing
from mllmfl_lite.runs.run import rounds_key

SIZES = {  # training images, test images, classes
    "cifar10_mini": (5_000, 2_000, 10),
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "imagenet_lt": (IMAGENET_LT["train"], IMAGENET_LT["test"], 1000),
}
POOLS = {"cifar10_mini": 3_000, "cc595k": 595_375, RESERVED_POOL: 55_000}
LARGE = {  # weights of language model and vision tower, visual tokens; others count as LLaVA-1.5-7B
    "tiny_llava": (0.6e6, 1.1e6, 64),
    "llava-hf/llava-1.5-7b-hf": (6.7e9, 0.3e9, 576),
}
RATES = {  # operations a second on a compact and on a large model; seconds that a training step takes at least
    "laptop": (67e9, 320e9, 0.0),  # measured; the others were not
    "a100": (16e12, 125e12, 2.5e-3),
    "h100": (49e12, 396e12, 2.5e-3),
}


class Stage(NamedTuple):
    """One part of a run, and what it takes."""

    name: str
    key: str  #: runs that share stage 1 and the teachers' answers carry out a part with the same key once
    compact: float = 0.0  #: operations on the compact model
    large: float = 0.0  #: operations on a large frozen model
    steps: float = 0.0  #: training steps of the compact model

    def hours(self, machine: str) -> float:
        """Estimate for a machine in `RATES`."""
        compact, large, step = RATES[machine]
        return (max(self.compact / compact, self.steps * step) + self.large / large) / 3600


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


def estimate(of: Experiment) -> list[Stage]:
    """The run's parts with their operations, from nothing. CReFF's server, CLIP and decoding of files are left out."""
    train, test, classes = SIZES[of.dataset]
    pixels, train = 32, train - RESERVED * classes * (of.pool == RESERVED_POOL)
    if of.dataset == "imagenet_lt":
        pixels = of.image_size
    else:
        train = sum(long_tail_counts(classes, train // classes, of.imbalance_factor))
    learn, look = image_operations(of.model, of.width, classes, pixels)
    language, tower, tokens = LARGE.get(of.mllm, LARGE["llava-hf/llava-1.5-7b-hf"])
    reading = 2 * (tower * tokens + language * (tokens + 100))  # one image, a question and a long answer
    pool = POOLS.get(of.pool, POOLS["cc595k"])
    pool, asked, stages = min(pool, of.pool_images or pool), f"{of.mllm} {of.pool} {of.pool_images}", []
    if 1 in of.stages and not of.start:
        texts, side, passes = pool * of.pretrain.epochs, pool_side(of) or 32, 2 + of.pretrain.gradient_checkpointing
        if of.annotations == "new":
            stages.append(Stage(f"stage 1: describe {pool:,} images", f"{asked} {of.kind}", large=pool * reading))
        compact, steps = texts * image_operations(of.model, of.width, classes, side)[0], texts / of.pretrain.batch_size
        key = f"{asked} {of.kind} {of.pretrain} {of.model} {of.width} {of.seed} {side}"
        stages.append(Stage(f"stage 1: pretrain on {texts:,} texts", key, compact, texts * passes * reading, steps))
    if 2 in of.stages:
        rounds = of.federated
        shown = rounds.rounds * rounds.clients_per_round * rounds.local_epochs * train / of.num_clients
        tested = sum(map(rounds.evaluates, range(1, rounds.rounds + 1))) * test
        key, steps = f"{of.dataset} {rounds_key(of)} {rounds.rounds}", shown / rounds.batch_size
        stages.append(Stage(f"stage 2: {rounds.rounds} rounds", key, shown * learn + tested * look, steps=steps))
    if 3 in of.stages:
        if of.align.teacher == "mllm":
            scoring = reading + 3 * 2 * language * classes  # about three tokens a class name
            name = f"stage 3: score {classes:,} names on {pool:,} images"
            stages.append(Stage(name, f"{asked} {of.dataset}", large=pool * scoring))
        shown = of.align.epochs * of.align.per_class * classes
        stages.append(Stage("stage 3: align", str(of), shown * learn, steps=shown / of.align.batch_size))
    return stages


def total_hours(experiments: Sequence[Experiment], machine: str) -> float:
    """Hours of all of them where stage 1 and answers are shared: what several need counts once."""
    parts = {(stage.name, stage.key): stage for experiment in experiments for stage in estimate(experiment)}
    return sum(stage.hours(machine) for stage in parts.values())


def in_words(hours: float) -> str:
    """A duration with two digits: ``"50 s"``, ``"14 min"``, ``"4.2 h"``."""
    value, unit = (hours, "h") if hours >= 1.5 else (60 * hours, "min") if hours >= 0.025 else (3600 * hours, "s")
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


def describe_plan(runs: Sequence[Run], machine: str) -> Iterator[str]:
    """Lines of text: what is missing, and each run's estimate."""
    for need in sorted({need for run in runs for need in missing(run.experiment)}):
        yield f"missing: {need}"
    for run in runs:
        parts = [(stage.name, stage.hours(machine)) for stage in estimate(run.experiment)]
        listed = ", ".join(f"{name} {in_words(hours)}" for name, hours in parts)
        yield f"{run}: about {in_words(sum(hours for _, hours in parts))} on {machine} ({listed})"
    total = in_words(total_hours([run.experiment for run in runs], machine))
    rates = "measured rates" if machine == "laptop" else "rates that no run has checked"
    yield f"in all about {total} if all share a folder; estimated from operations, with {rates}"
