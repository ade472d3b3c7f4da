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
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.federated.each_round import ServerOnly
from mllmfl_lite.models import CompactModel, distillation
from mllmfl_lite.repro import all_finite, torch_generator
from mllmfl_lite.runs.settings import check_choice, check_whole
from mllmfl_lite.stages.server_set import AlignError, ServerSet

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


METHODS["server_only"] = ServerOnly
