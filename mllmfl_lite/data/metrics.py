"""How good a model is: top-1, per class, and by class group, all from one confusion matrix."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from mllmfl_lite.data.batches import Batches, open_batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.longtail import class_groups

EVAL_BATCH = 250


@dataclass(frozen=True)
class Metrics:
    """Accuracies in [0, 1].

    Attributes:
        top1: share of all test images named correctly.
        per_class: the same for each class; None where the test set has no image of it.
        groups: mean of `per_class` over each class group; None where the group is empty.
    """

    top1: float
    per_class: list[float | None]
    groups: dict[str, float | None]

    def as_dict(self) -> dict:
        """A plain dictionary, ready for JSON."""
        return asdict(self)


@torch.inference_mode()
def predict(model: nn.Module, batches: Batches, indices: torch.Tensor | None = None) -> torch.Tensor:
    """The most likely class of each image, int64 (B,); of all images, or those at `indices`.

    Puts the model in evaluation mode (BatchNorm uses its running statistics) and leaves it there.
    """
    model.eval()
    wanted = torch.arange(len(batches), device=batches.labels.device) if indices is None else indices
    return torch.cat([model(batches.plain(part)).argmax(1) for part in wanted.split(EVAL_BATCH)])


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (C, C): row = true class, column = predicted class."""
    flat = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def metrics_from_confusion(confusion: np.ndarray, groups: dict[str, list[int]]) -> Metrics:
    """Accuracies from a confusion matrix (C, C) and lists of classes.

    Raises:
        ValueError: the matrix counts no image.
    """
    total = confusion.sum()
    if total == 0:
        raise ValueError("no test image: the confusion matrix is empty")
    seen = confusion.sum(1)
    per_class = [float(confusion[c, c] / n) if n else None for c, n in enumerate(seen)]
    return Metrics(float(np.trace(confusion) / total), per_class, {g: _mean(per_class, of) for g, of in groups.items()})


def evaluate_model(
    model: nn.Module, test: ImageSet, train_counts: np.ndarray, device: torch.device | str = "cpu"
) -> dict:
    """A model's `Metrics` on `test` as a plain dictionary, as a run's history has them.

    Args:
        model: images to logits.
        test: the images to test on.
        train_counts: the clients' images a class, which make the class groups (C,).
        device: where to test; the model is moved there.

    Raises:
        ValueError: the test set has no image.
    """
    guesses = predict(model.to(device), open_batches(test, device)).cpu().numpy()
    confusion = confusion_matrix(test.labels, guesses, test.num_classes)
    return metrics_from_confusion(confusion, class_groups(train_counts)).as_dict()


def _mean(per_class: list[float | None], classes: list[int]) -> float | None:
    values = [per_class[c] for c in classes if per_class[c] is not None]
    return float(np.mean(values)) if values else None


def summarise(history: list[dict], last: int = 10) -> dict:
    """The reported figures: every metric as its mean over the last `last` rounds.

    One round's accuracy swings by several points, and the best of many rounds flatters: `best_top1` is given only
    to compare with reports that use it.
    """
    tested = [record["metrics"] for record in history if record["metrics"]]
    final = [record["metrics"] for record in history[-last:] if record["metrics"]]
    return {
        "top1": _mean_of([m["top1"] for m in final]),
        "per_class": [_mean_of(column) for column in zip(*(m["per_class"] for m in final), strict=True)],
        "groups": {group: _mean_of([m["groups"][group] for m in final]) for group in final[0]["groups"]},
        "best_top1": max(m["top1"] for m in tested),
        "rounds_averaged": len(final),
    }


def _mean_of(values: list[float | None] | tuple[float | None, ...]) -> float | None:
    return None if None in values else float(np.mean(values))
