"""How good a model is: top-1, per class, and by class group, all from one confusion matrix."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from mllmfl_lite.data.batches import Batches, FileBatches, open_batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.longtail import class_groups

EVAL_BATCH = 250


@torch.inference_mode()
def predict(model: nn.Module, batches: Batches | FileBatches, indices: torch.Tensor | None = None) -> torch.Tensor:
    """The most likely class of all images, or of those at `indices`: int64 (B,). Sets the model to evaluation mode."""
    model.eval()
    wanted = torch.arange(len(batches), device=batches.labels.device) if indices is None else indices
    return torch.cat([model(batches.plain(part)).argmax(1) for part in wanted.split(EVAL_BATCH)])


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (C, C): row = true class, column = predicted class. Classes outside 0..C - 1 are a `ValueError`."""
    shape = (num_classes, num_classes)
    return np.bincount(np.ravel_multi_index((labels, predictions), shape), minlength=num_classes**2).reshape(shape)


def metrics_from_confusion(confusion: np.ndarray, groups: dict[str, list[int]]) -> dict:
    """Accuracies in [0, 1] from a confusion matrix (C, C) and lists of classes, as a run's history has them.

    `top1` is the share of all images named correctly; `per_class` the same for each class, None if it has no image;
    `groups` the mean of `per_class` over each list, None if that is empty. A matrix without images is a `ValueError`.
    """
    total = confusion.sum()
    if total == 0:
        raise ValueError("no test image: the confusion matrix is empty")
    per_class = [float(confusion[c, c] / n) if n else None for c, n in enumerate(confusion.sum(1))]
    means = {name: _mean([per_class[c] for c in classes]) for name, classes in groups.items()}
    return {"top1": float(np.trace(confusion) / total), "per_class": per_class, "groups": means}


def evaluate_model(
    model: nn.Module, test: ImageSet, train_counts: np.ndarray, device: torch.device | str = "cpu"
) -> dict:
    """`metrics_from_confusion` of a model on `test`; the clients' images a class (C,) make the class groups.

    The model is moved to the device. No test images, or other classes than the model's, are a `ValueError`.
    """
    test.require_same_classes(model)
    guesses = predict(model.to(device), open_batches(test, device)).cpu().numpy()
    confusion = confusion_matrix(test.labels, guesses, test.num_classes)
    return metrics_from_confusion(confusion, class_groups(train_counts))


def summarise(history: list[dict], last: int = 10) -> dict:
    """Every metric as its mean over the last rounds; `best_top1`, which papers report, is the best of all rounds."""
    tested = [record["metrics"] for record in history if record["metrics"]]
    final = [record["metrics"] for record in history[-last:] if record["metrics"]]
    return {
        "top1": _mean([m["top1"] for m in final]),
        "per_class": [_mean(column) for column in zip(*(m["per_class"] for m in final), strict=True)],
        "groups": {group: _mean([m["groups"][group] for m in final]) for group in final[0]["groups"]},
        "best_top1": max(m["top1"] for m in tested),
        "rounds_averaged": len(final),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
