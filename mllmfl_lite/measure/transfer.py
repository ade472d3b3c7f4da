"""What a pretrained model is worth: a linear probe on its features, and finetuning with few labels::

    probe = linear_probe(embed(model, train), train.labels, embed(model, test), num_classes=10)
    run = finetune(with_head(model, 10), train, few_labels(train.labels, 10, 0.02, seed=0), test)
    epochs_to(run.history, 0.3), best(run.history)

Finetuning is a federation of one client, so it shares its loop, its checkpoints and its random draws with the rounds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.metrics import EVAL_BATCH
from mllmfl_lite.federated.methods import FedSettings
from mllmfl_lite.federated.rounds import FedResult, run_federated
from mllmfl_lite.models import CompactModel


@torch.inference_mode()
def embed(model: CompactModel, data: ImageSet) -> Tensor:
    """The features of all images, float32 (N, D); puts the model in evaluation mode."""
    model.eval()
    batches = open_batches(data)
    return torch.cat([model.features(batches.plain(part)) for part in torch.arange(len(data)).split(EVAL_BATCH)])


def linear_probe(
    features: Tensor, labels: Tensor, test_features: Tensor, num_classes: int, decay: float = 1e-3
) -> Tensor:
    """Predictions (M,) of a linear classifier on frozen features: how much a straight cut can tell the classes apart.

    Multinomial logistic regression on features scaled to unit variance, solved by L-BFGS, so without any randomness.

    Args:
        features: float (N, D), to learn from.
        labels: int64 (N,).
        test_features: float (M, D), to classify.
        num_classes: C.
        decay: the weight of the squared norm of the C x D matrix.

    Raises:
        ValueError: not one label for each feature.
    """
    if len(features) != len(labels) or not len(labels):
        raise ValueError(f"one label a feature, at least one: {len(features)} features, {len(labels)} labels")
    mean, spread = features.mean(0), features.std(0) + 1e-6
    known, asked = ((part - mean).div(spread).clone() for part in (features, test_features))
    weight = torch.zeros(known.shape[1], num_classes, requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = cross_entropy(known @ weight + bias, labels) + decay * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return (asked @ weight + bias).detach().argmax(1)


def finetune(
    model: CompactModel,
    train: ImageSet,
    labelled: np.ndarray,
    test: ImageSet,
    *,
    epochs: int = 30,
    lr: float = 0.05,
    batch_size: int = 32,
    eval_every: int = 1,
    seed: int = 0,
    folder: str | Path | None = None,
    device: torch.device | str = "cpu",
    label: str = "finetuning",
) -> FedResult:
    """Ordinary training of all weights on the labelled images: federated rounds with one client of one epoch each.

    Args:
        model: where training starts; not changed.
        train: the images.
        labelled: which of them have labels, int64 (n,).
        test: the images to test on.
        epochs: passes over the labelled images.
        lr: SGD's step size.
        batch_size: images a step.
        eval_every: test every so many epochs, and in the last.
        seed: of batches and augmentation.
        folder: keep a checkpoint here.
        device: where to train.
        label: a name for the progress bar.
    """
    settings = FedSettings(
        rounds=epochs, clients_per_round=1, local_epochs=1, batch_size=batch_size, lr=lr, eval_every=eval_every,
        report_rounds=1, seed=seed,
    )  # fmt: skip
    return run_federated(model, train, [labelled], test, settings=settings, folder=folder, device=device, label=label)


def best(history: list[dict]) -> float:
    """The best test accuracy of a run, in [0, 1]. It flatters; the paper reports it, so it stands beside the last."""
    return max(record["metrics"]["top1"] for record in history if record["metrics"])


def epochs_to(history: list[dict], target: float) -> int | None:
    """The first epoch, counted from 1, that is tested at `target` or better; None if there is none."""
    reached = [r["round"] for r in history if r["metrics"] and r["metrics"]["top1"] >= target]
    return reached[0] if reached else None
