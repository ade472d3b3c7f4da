"""What a pretrained model is worth: a linear probe on its features, and finetuning with few labels."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.metrics import EVAL_BATCH
from mllmfl_lite.federated import Federation, FedResult, FedSettings, run_federated
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import Execution

FINETUNING = FedSettings(rounds=30, clients_per_round=1, local_epochs=1, lr=0.05, report_rounds=1)


@torch.inference_mode()
def embed(model: CompactModel, data: ImageSet) -> Tensor:
    """Features of all images, float32 (N, D). Puts the model in evaluation mode."""
    model.eval()
    batches = open_batches(data)
    return torch.cat([model.features(batches.plain(part)) for part in torch.arange(len(data)).split(EVAL_BATCH)])


def linear_probe(
    features: Tensor, labels: Tensor, test_features: Tensor, num_classes: int, decay: float = 1e-3
) -> Tensor:
    """Linear probe: predictions (M,) of a linear classifier on frozen features.

    Multinomial logistic regression on features (N, D) of unit variance, solved by L-BFGS, without randomness; it
    classifies `test_features` (M, D). `decay` weighs the squared norm of the matrix.
    """
    if len(features) != len(labels) or not len(labels):
        raise ValueError(f"one label a feature, at least one: {len(features)} features, {len(labels)} labels")
    mean, spread = features.mean(0), features.std(0) + 1e-6
    known, unknown = ((part - mean).div(spread).clone() for part in (features, test_features))
    weight = torch.zeros(known.shape[1], num_classes, requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = cross_entropy(known @ weight + bias, labels) + decay * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return (unknown @ weight + bias).detach().argmax(1)


def finetune(
    model: CompactModel,
    train: ImageSet,
    labelled: np.ndarray,
    test: ImageSet,
    settings: FedSettings = FINETUNING,
    seed: int = 0,
    execution: Execution | None = None,
) -> FedResult:
    """Train all weights of a copy on the images at `labelled` (n,): a federation of one client, a round an epoch.

    The seed decides batches and augmentation.
    """
    return run_federated(model, Federation(train, [labelled], test), None, settings, seed, execution)


def best(history: list[dict]) -> float:
    """Best test accuracy over rounds, in [0, 1] (optimistic); reported because the paper does."""
    return max(record["metrics"]["top1"] for record in history if record["metrics"])


def epochs_to(history: list[dict], target: float) -> int | None:
    """The first epoch, counted from 1, tested at `target` or better; None if there is none."""
    reached = [r["round"] for r in history if r["metrics"] and r["metrics"]["top1"] >= target]
    return reached[0] if reached else None
