"""Stage 3, global alignment: a class-balanced server set chosen by the teacher, and finetuning on it::

    told    = teacher.class_probabilities(web.images, names)
    chosen  = draw_server_set(web, told, names, per_class=100)
    aligned = align(model, chosen, AlignSettings())

The loss is ``CE(y, p) + beta * KL(q || p)`` (the paper's): p is the model's softmax, q the teacher's distribution over
the class names, y the teacher's own first choice. No client's image and no human label enters. That the set is drawn
from open web images by the teacher's confidence is our reading.
"""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from mllmfl_lite.baselines import distillation
from mllmfl_lite.batches import open_batches
from mllmfl_lite.data import UNLABELLED, ImageSet
from mllmfl_lite.federated import METHODS, FedAvg, State, all_finite
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import sha256_arrays, torch_generator, write_atomically
from mllmfl_lite.settings import check_choice, check_whole

if TYPE_CHECKING:  # slow to import
    from mllmfl_lite.teacher import Teacher


class AlignError(ValueError):
    """Alignment cannot start: no image was chosen, or teacher and images do not fit; the message says how."""


@dataclass(frozen=True)
class ServerSet:
    """The balanced set.

    Attributes:
        images: the chosen images; their labels are the teacher's first choice.
        told: the teacher's distribution q for each, float32 (n, C).
        rows: which images of the pool they are, int64 (n,).
        short: for each class with fewer images than were asked for, how many there are.
    """

    images: ImageSet
    told: Tensor
    rows: np.ndarray
    short: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


def ask_teacher(
    teacher: Teacher, pool: ImageSet, names: Sequence[str], folder: str | Path = "", what: str = "class_probabilities"
) -> Tensor:
    """The teacher's distribution over the class names for each image of the pool, float32 (N, C).

    Args:
        teacher: anything with `identity` and `class_probabilities`, see `mllmfl_lite.teacher`.
        pool: open images on the server.
        names: the clients' class names.
        folder: where answers are kept, a file for each teacher, pool and list of names; empty keeps nothing.
        what: ``"class_logits"`` for logits in place of probabilities.
    """
    ask = getattr(teacher, what)
    if not folder:
        return ask(pool.images, names)
    asked = [teacher.identity, pool.checksum(), *names, *([what] if what != "class_probabilities" else [])]
    digest = hashlib.sha256("\n".join(asked).encode()).hexdigest()
    path = Path(folder) / f"{teacher.identity}-{digest[:12]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)  # before hours of answers
    with filelock.FileLock(path.with_suffix(".turn")):  # of several runs the first asks, the others wait and read
        if not path.exists():
            write_atomically(path, safetensors.torch.save({"told": ask(pool.images, names).contiguous()}))
    try:
        return safetensors.torch.load_file(path)["told"]
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the teacher is asked again") from error


class PoolLabels:
    """The control of `AlignSettings.teacher`: it reads the pool's own labels, and errs as often as it is told to.

    Args:
        pool: open images with labels.
        wrong: how often it names another class, drawn evenly from the others, in [0, 1].
        seed: decides where.
    """

    def __init__(self, pool: ImageSet, wrong: float = 0.0, seed: int = 0):
        self.pool, self.wrong, self.seed = pool, wrong, seed
        self.identity = f"labels-wrong{wrong:g}-seed{seed}" if wrong else "labels"

    def class_probabilities(self, images: np.ndarray, names: Sequence[str]) -> Tensor:
        """One for the class that it names; the same for all where the label is none of the names, float32 (N, C)."""
        label = torch.tensor([names.index(n) if n in names else -1 for n in np.take(self.pool.names, self.pool.labels)])
        generator = torch_generator(self.seed, "wrong labels")
        errs = torch.rand(len(label), generator=generator) < self.wrong
        other = (label + torch.randint(1, len(names), label.shape, generator=generator)) % len(names)
        named = torch.where(errs, other, label).clamp(min=0)
        return torch.where(label[:, None] < 0, 1 / len(names), one_hot(named, len(names)).float())


def draw_server_set(
    pool: ImageSet, told: Tensor, names: Sequence[str], per_class: int, without: Sequence[str] = ()
) -> ServerSet:
    """The teacher's `per_class` most confident images of each class. The pool's own labels are not looked at.

    An image can stand for one class only, the teacher's first choice. Classes for which the pool has too few are named
    in a warning and in `ServerSet.short`.

    Args:
        pool: open images on the server.
        told: the teacher's distribution over `names` for each, float (N, C), rows summing to 1.
        names: the clients' class names.
        per_class: images a class, n.
        without: classes to leave out.

    Raises:
        AlignError: shapes that do not fit, rows that are no distributions, n under 1, or an unknown class to leave out.
    """
    if told.shape != (len(pool), len(names)) or not len(pool):
        raise AlignError(f"told must be (images, classes) = ({len(pool)}, {len(names)}); it is {tuple(told.shape)}")
    if not (torch.isfinite(told).all() and (told >= 0).all() and (told.sum(1) - 1).abs().max() < 1e-3):
        raise AlignError("each row of told must be a distribution; take them from a teacher's class_probabilities")
    if per_class < 1:
        raise AlignError(f"per_class must be at least 1; got {per_class}")
    if unknown := [name for name in without if name not in names]:
        raise AlignError(f"there is no class {unknown[0]!r} to leave out; there are {', '.join(names)}")
    sure, label = (values.numpy() for values in told.max(1))
    order = np.argsort(-sure, kind="stable")
    wanted = [0 if name in without else per_class for name in names]
    by_class = [order[label[order] == c][:n] for c, n in enumerate(wanted)]
    short = {name: len(own) for name, own in zip(names, by_class, strict=True) if len(own) < per_class}
    if short:
        listed = ", ".join(f"{name} ({count})" for name, count in short.items())
        warnings.warn(
            f"the pool has fewer than {per_class} images of {len(short)} of {len(names)} classes: {listed}; the set is "
            "not balanced there. Take a larger pool or fewer images a class",
            stacklevel=2,
        )
    rows = np.sort(np.concatenate(by_class))
    images = ImageSet(pool.images[rows], label[rows].astype(np.int64), tuple(names), f"{pool.origin}, chosen")
    return ServerSet(images, told[torch.from_numpy(rows)], rows, short)


def evened(told: Tensor, over: Tensor) -> Tensor:
    """Answers divided by the mean answer and normalised: what is left when no class is favoured on the whole.

    Args:
        told: distributions (n, C).
        over: the distributions to take the mean of (N, C), e.g. those on the whole pool.
    """
    even = told / over.mean(0).clamp(min=1e-12)
    return even / even.sum(1, keepdim=True)


def describe(chosen: ServerSet, pool: ImageSet) -> dict:
    """Images a class, classes that came short, and how often the teacher's choice is the pool's own label.

    Those labels measure only; a class that the pool has no label for counts as wrong. None for an unlabelled pool.
    """
    names = chosen.images.names
    right = [
        pool.names[pool.labels[row]] == names[label]
        for row, label in zip(chosen.rows, chosen.images.labels, strict=True)
    ]
    return {
        "images": len(chosen),
        "per_class": chosen.images.class_counts().tolist(),
        "short": chosen.short,
        "labels_right": None if pool.names == UNLABELLED else sum(right) / max(1, len(right)),
    }


CHOICES = {"part": ("all", "head"), "teacher": ("mllm", "clip", "imagenet", "labels"), "when": ("end", "each round")}


@dataclass(frozen=True)
class AlignSettings:
    """The numbers of an alignment. Defaults were chosen on held-out images (`scripts/choose_alignment.py`).

    Attributes:
        per_class: images a class in the server set.
        beta: weight of the KL term; 0 leaves cross-entropy alone.
        temperature: T; both distributions are softened by it, and the term is multiplied by T^2 (Hinton et al., 2015).
        epochs: passes over the set.
        batch_size: images a step.
        lr: SGD's peak step size, lowered along half a cosine.
        momentum: SGD's.
        part: ``"all"`` weights, or the ``"head"`` alone.
        teacher: ``"mllm"``, the likelihood of each class name as the MLLM's answer; ``"clip"``, zero-shot;
            ``"imagenet"``, a classifier that never saw CIFAR (see `imagenet_teacher`); or ``"labels"``, a control: the
            pool's own labels, which no server has.
        wrong: how often the control ``"labels"`` names another class, in [0, 1].
        even: take the KL term's q as `evened` over the pool; the set and its labels stay what they are.
        when: ``"end"``, once after the last round, or ``"each round"``: the clients' mean is aligned before it goes on.
        without: class names left out of the set, to see what a pool does that lacks them.
        seed: of batches and augmentation.
    """

    per_class: int = 100
    beta: float = 4.0
    temperature: float = 2.0
    epochs: int = 20
    batch_size: int = 32
    lr: float = 0.02
    momentum: float = 0.9
    part: str = "all"
    teacher: str = "mllm"
    wrong: float = 0.0
    even: bool = False
    when: str = "end"
    without: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(self, "per_class", "epochs", "batch_size")
        check_choice(self, **CHOICES)
        for name, low, high in (("lr", 0, math.inf), ("temperature", 0, math.inf)):
            if not low < getattr(self, name) < high:
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)}")
        for name, high in (("beta", math.inf), ("momentum", 1)):
            if not 0 <= getattr(self, name) < high:
                raise ValueError(f"{name} must be at least 0 and under {high}; got {getattr(self, name)}")
        if not 0 <= self.wrong <= (self.teacher == "labels"):
            raise ValueError(f"wrong must be in [0, 1], and 0 unless teacher is 'labels'; got {self.wrong}")


def alignment_loss(logits: Tensor, labels: Tensor, told: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """``CE(y, p) + beta * T^2 * KL(q_T || p_T)``, mean over the batch.

    Args:
        logits: the model's (B, C).
        labels: y, the teacher's first choice (B,).
        told: q, the teacher's distribution (B, C).
        beta: weight of the second term.
        temperature: T; ``q_T`` is q to the power 1 / T, normalised, and ``p_T`` is ``softmax(logits / T)``.

    Source: the paper's loss; the temperature is our addition, and 1 leaves it out.
    """
    loss = cross_entropy(logits, labels)
    if beta:
        loss = loss + beta * distillation(logits, told.clamp(min=1e-12).log(), temperature)
    return loss


@dataclass(frozen=True)
class Aligned:
    """What alignment leaves: the model, and one record an epoch with its mean loss."""

    model: CompactModel
    history: list[dict]


def align(
    model: CompactModel, chosen: ServerSet, settings: AlignSettings | None = None, device: torch.device | str = "cpu"
) -> Aligned:
    """Finetune a copy of the model on the server set.

    Args:
        model: the federated model; not changed.
        chosen: the server set.
        settings: the numbers.
        device: where to train.

    Raises:
        AlignError: the set is empty, or its classes are not the head's; the loss is no longer finite.
    """
    settings = settings or AlignSettings()
    if not len(chosen):
        raise AlignError("the server set has no image: the teacher recognised none of the classes in the pool")
    if chosen.images.num_classes != model.head.out_features:
        raise AlignError(
            f"the server set has {chosen.images.num_classes} classes, the model's head {model.head.out_features}; "
            "ask the teacher about the clients' class names"
        )
    model = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
    batches, told = open_batches(chosen.images, device), chosen.told.to(device)
    weights = list((model if settings.part == "all" else model.head).parameters())
    optimizer = torch.optim.SGD(weights, settings.lr, settings.momentum)
    generator = torch_generator(settings.seed, "alignment")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    history = []
    for epoch in range(1, settings.epochs + 1):
        loss = _epoch(model, batches, told, settings, optimizer, generator)
        if not math.isfinite(loss):
            raise AlignError(f"the loss of epoch {epoch} is not finite; lower lr (it is {settings.lr})")
        history.append({"epoch": epoch, "loss": loss})
        schedule.step()
    if not all_finite(model.state_dict().values()):
        raise AlignError(f"the last step gave weights that are not finite; lower lr (it is {settings.lr})")
    return Aligned(model, history)


def _epoch(model, batches, told, settings, optimizer, generator) -> float:
    model.train(settings.part == "all")  # a head alone learns on the features that it will be used on
    total = 0.0
    parts = torch.randperm(len(batches), generator=generator).to(told.device).split(settings.batch_size)
    for part, x in zip(parts, batches.stream(parts, generator), strict=True):
        logits = model(x)
        loss = alignment_loss(logits, batches.labels[part], told[part], settings.beta, settings.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(part)
    return total / len(batches)


@dataclass(frozen=True)
class AlignEachRound(FedAvg):
    """FedAvg with an alignment of the mean after each round, in place of one at the end (our reading's option).

    Attributes:
        chosen: the server set.
        settings: of each alignment.
        model: any model of the right shape.
    """

    chosen: ServerSet = None
    settings: AlignSettings = field(default_factory=AlignSettings)
    model: CompactModel = None

    def identity(self) -> dict:
        """The set's checksum and the settings."""
        drawn = [self.chosen.images.checksum(), sha256_arrays([self.chosen.told.numpy()])]
        return {"name": type(self).__name__, "chosen": drawn, **asdict(self.settings)}

    def server_update(
        self, state: State, mean: State, memory: State, uploads: list[State], generator: torch.Generator
    ) -> tuple[State, State]:
        """The aligned mean."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(mean)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        aligned = align(model, self.chosen, replace(self.settings, seed=seed), next(iter(mean.values())).device)
        return dict(aligned.model.state_dict()), memory


@dataclass(frozen=True)
class ServerOnly(FedAvg):
    """The control without clients: whatever they send is dropped, and the server's weights stay as they were."""

    def server_update(
        self, state: State, mean: State, memory: State, uploads: list[State], generator: torch.Generator
    ) -> tuple[State, State]:
        """The state before."""
        return state, memory


METHODS["server_only"] = ServerOnly
