"""Stage 3, global alignment: finetune the federated model on the server set, with ``CE(y, p) + beta * KL(q || p)``."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.models import CompactModel, distillation
from mllmfl_lite.repro import all_finite, pick_device, settings_class, torch_generator
from mllmfl_lite.stages.server_set import ServerSet

Count = Annotated[int, Field(ge=1, le=1_000_000)]


@settings_class
class AlignSettings:
    """Numbers of an alignment. Defaults were chosen on held-out images."""

    per_class: Count = 100  #: images a class in the server set
    beta: Annotated[float, Field(ge=0, le=1e6)] = 4.0  #: weight of the KL term; 0 leaves cross-entropy alone
    temperature: Annotated[float, Field(ge=0.01, le=1000)] = 2.0  #: T, softens both distributions of the KL term
    epochs: Count = 20  #: passes over the set
    batch_size: Count = 32  #: images a step
    lr: Annotated[float, Field(gt=0, le=100)] = 0.02  #: SGD's peak step size, lowered along half a cosine
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  #: SGD's
    part: Literal["all", "head"] = "all"  #: which weights are trained
    #: "mllm" is the likelihood of each class name as the MLLM's answer; "clip" is zero-shot; "imagenet" is a classifier
    #: that never saw CIFAR; "labels" is a control, the pool's own labels
    teacher: Literal["mllm", "clip", "imagenet", "labels"] = "mllm"
    when: Literal["end", "each round"] = "end"  #: after the last round, or in each one before the mean goes on


def alignment_loss(
    logits: Tensor, labels: Tensor, probabilities: Tensor, beta: float, temperature: float = 1.0
) -> Tensor:
    """``CE(y, p) + beta * T^2 * KL(q_T || p_T)``, mean over the batch.

    y (B,) and q (B, C) are the teacher's first choice and distribution; ``q_T`` is q to the power 1 / T, normalised;
    ``p_T`` is ``softmax(logits / T)``. Source: the paper's loss; the temperature (Hinton et al., 2015) is our addition.
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
    """Finetune a copy of the model on the class-balanced set. The seed decides batches and augmentation.

    Raises:
        ValueError: the set is empty, its classes are not the model's, or loss or weights are no longer finite.
    """
    settings, device = settings or AlignSettings(), pick_device(device)
    _check(model, server_set)
    model = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
    batches, probabilities = open_batches(server_set.images, device), server_set.probabilities.to(device)
    weights = list((model if settings.part == "all" else model.head).parameters())
    optimizer = torch.optim.SGD(weights, settings.lr, settings.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    generator, history = torch_generator(int(seed), "alignment"), []
    advice = f"lower lr (it is {settings.lr})"
    for epoch in range(1, settings.epochs + 1):
        model.train(settings.part == "all")  # a head alone learns on the features that it will be used on
        total = 0.0
        for step, loss in enumerate(_steps(model, batches, probabilities, settings, (optimizer, generator)), 1):
            total += loss
            if not math.isfinite(loss):
                raise ValueError(f"the loss of step {step} in epoch {epoch} is not finite; {advice}")
        if not all_finite(model.state_dict().values()):
            raise ValueError(f"the weights after epoch {epoch} are not finite; {advice}")
        history.append({"epoch": epoch, "loss": total / len(batches)})
        schedule.step()
    return Aligned(model, history)


def _steps(
    model: CompactModel, batches, probabilities: Tensor, settings: AlignSettings, tools: tuple
) -> Iterator[float]:
    """Train one epoch; yield each batch's summed loss."""
    optimizer, generator = tools
    parts = torch.randperm(len(batches), generator=generator).to(probabilities.device).split(settings.batch_size)
    for part, x in zip(parts, batches.stream(parts, generator), strict=True):
        try:
            logits = model(x)
        except ValueError as error:  # of BatchNorm
            raise ValueError(f"a batch of {len(part)} images is too small ({error}); change batch_size") from error
        loss = alignment_loss(logits, batches.labels[part], probabilities[part], settings.beta, settings.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item() * len(part)


def _check(model: CompactModel, server_set: ServerSet) -> None:
    images, classes = server_set.images, model.head.out_features
    if not len(images):
        raise ValueError("the server set has no image: the teacher recognised none of the classes in the pool")
    if images.num_classes != classes:
        found = f"the server set has {images.num_classes} classes, the model's head {classes}"
        raise ValueError(f"{found}; draw the set for the clients' class names")
    images.require_same_classes(model)
    if not all_finite(model.state_dict().values()):
        raise ValueError("the model to align has weights that are not finite; train it again")
    if server_set.probabilities.shape != (len(images), classes):
        shape = tuple(server_set.probabilities.shape)
        raise ValueError(f"probabilities must be (images, classes) = ({len(images)}, {classes}); they are {shape}")
