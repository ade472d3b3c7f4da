"""Stage 3, global alignment: finetune the federated model on the server set, with ``CE(y, p) + beta * KL(q || p)``."""

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.data.images import ImageSet
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
        ValueError: the set's classes are not the model's, or loss or weights are no longer finite.
    """
    settings, device = settings or AlignSettings(), pick_device(device)
    _require_same_classes(model, server_set.images)
    model = copy.deepcopy(model).to(device).to(memory_format=torch.channels_last)
    weights = list((model if settings.part == "all" else model.head).parameters())
    optimizer = torch.optim.SGD(weights, settings.lr, settings.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    batches, probabilities = open_batches(server_set.images, device), server_set.probabilities.to(device)
    generator, history = torch_generator(int(seed), "alignment"), []
    for epoch in range(1, settings.epochs + 1):
        model.train(settings.part == "all")  # a head alone learns on the features that it will be used on
        parts = torch.randperm(len(batches), generator=generator).to(device).split(settings.batch_size)
        total = 0.0
        for step, (part, x) in enumerate(zip(parts, batches.stream(parts, generator), strict=True), 1):
            y, q = batches.labels[part], probabilities[part]
            loss = alignment_loss(_logits(model, x), y, q, settings.beta, settings.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(part)
            if not math.isfinite(total):
                raise ValueError(
                    f"the loss of step {step} in epoch {epoch} is not finite; lower lr (it is {settings.lr})"
                )
        if not all_finite(model.state_dict().values()):
            raise ValueError(f"the weights after epoch {epoch} are not finite; lower lr (it is {settings.lr})")
        history.append({"epoch": epoch, "loss": total / len(batches)})
        schedule.step()
    return Aligned(model, history)


def _logits(model: CompactModel, x: Tensor) -> Tensor:
    try:
        return model(x)
    except ValueError as error:  # of BatchNorm
        raise ValueError(f"a batch of {len(x)} images is too small ({error}); change batch_size") from error


def _require_same_classes(model: CompactModel, images: ImageSet) -> None:
    if images.num_classes != model.head.out_features:
        raise ValueError(f"the server set has {images.num_classes} classes, the model's head {model.head.out_features}")
    images.require_same_classes(model)
