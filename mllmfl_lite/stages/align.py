"""Stage 3, global alignment: finetune the federated model on the server set, with ``CE(y, p) + beta * KL(q || p)``."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.models import CompactModel, distillation
from mllmfl_lite.repro import all_finite, settings_class, torch_generator
from mllmfl_lite.stages.server_set import ServerSet

Count = Annotated[int, Field(ge=1, le=1_000_000)]


@settings_class
class AlignSettings:
    """Numbers of an alignment. Defaults were chosen on held-out images (`scripts/choose_alignment.py`).

    Attributes:
        per_class: images a class in the server set.
        beta: weight of the KL term; 0: cross-entropy alone.
        temperature: T; it softens both distributions, and T^2 scales the term (Hinton et al., 2015).
        epochs: passes over the set.
        batch_size: images a step.
        lr: SGD's peak step size, lowered along half a cosine.
        momentum: SGD's.
        part: train ``"all"`` weights, or the ``"head"`` alone.
        teacher: ``"mllm"``: likelihood of each class name as the MLLM's answer; ``"clip"``: zero-shot; ``"imagenet"``:
            a classifier that never saw CIFAR; ``"labels"``: a control, the pool's own labels.
        when: ``"end"``, after the last round, or ``"each round"``, before the mean goes on.
    """

    per_class: Count = 100
    beta: Annotated[float, Field(ge=0)] = 4.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    epochs: Count = 20
    batch_size: Count = 32
    lr: Annotated[float, Field(gt=0)] = 0.02
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    part: Literal["all", "head"] = "all"
    teacher: Literal["mllm", "clip", "imagenet", "labels"] = "mllm"
    when: Literal["end", "each round"] = "end"


def alignment_loss(
    logits: Tensor, labels: Tensor, probabilities: Tensor, beta: float, temperature: float = 1.0
) -> Tensor:
    """``CE(y, p) + beta * T^2 * KL(q_T || p_T)``, mean over the batch.

    Args:
        logits: the model's (B, C).
        labels: y, the teacher's first choice (B,).
        probabilities: q, the teacher's distribution (B, C).
        beta: weight of the second term.
        temperature: T; ``q_T`` is q to the power 1 / T, normalised; ``p_T`` is ``softmax(logits / T)``.

    Source: the paper's loss; the temperature is our addition, and 1 leaves it out.
    """
    loss = cross_entropy(logits, labels)
    if beta:
        loss = loss + beta * distillation(logits, probabilities.clamp(min=1e-12).log(), temperature)
    return loss


@dataclass(frozen=True)
class Aligned:
    """The aligned model, and one record an epoch with its mean loss."""

    model: CompactModel
    history: list[dict]


def align(
    model: CompactModel,
    server_set: ServerSet,
    settings: AlignSettings | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Aligned:
    """Finetune a copy of the model on the server set.

    Args:
        model: the federated model; not changed.
        server_set: the class-balanced set.
        settings: the numbers.
        seed: of batches and augmentation.
        device: where to train.

    Raises:
        ValueError: the set is empty, its classes are not the model's, or the loss is no longer finite.
    """
    settings = settings or AlignSettings()
    _check(model, server_set)
    model = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
    batches, probabilities = open_batches(server_set.images, device), server_set.probabilities.to(device)
    optimizer = torch.optim.SGD(
        list((model if settings.part == "all" else model.head).parameters()), settings.lr, settings.momentum
    )
    generator = torch_generator(seed, "alignment")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    history = []
    for epoch in range(1, settings.epochs + 1):
        loss = _epoch(model, batches, probabilities, settings, (optimizer, generator))
        if not math.isfinite(loss) or not all_finite(model.state_dict().values()):
            raise ValueError(f"the loss or weights of epoch {epoch} are not finite; lower lr (it is {settings.lr})")
        history.append({"epoch": epoch, "loss": loss})
        schedule.step()
    return Aligned(model, history)


def _check(model: CompactModel, server_set: ServerSet) -> None:
    if not len(server_set):
        raise ValueError("the server set has no image: the teacher recognised none of the classes in the pool")
    if server_set.images.num_classes != model.head.out_features:
        raise ValueError(
            f"the server set has {server_set.images.num_classes} classes, the model's head {model.head.out_features}; "
            "ask the teacher about the clients' class names"
        )


def _epoch(model: CompactModel, batches, probabilities: Tensor, settings: AlignSettings, tools: tuple) -> float:
    optimizer, generator = tools
    model.train(settings.part == "all")  # a head alone learns on the features that it will be used on
    total = 0.0
    parts = torch.randperm(len(batches), generator=generator).to(probabilities.device).split(settings.batch_size)
    for part, x in zip(parts, batches.stream(parts, generator), strict=True):
        loss = alignment_loss(
            model(x), batches.labels[part], probabilities[part], settings.beta, settings.temperature
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(part)
    return total / len(batches)
