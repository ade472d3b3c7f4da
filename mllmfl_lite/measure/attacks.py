"""Attacks on what clients send and on what models keep, each with its source. For our own runs only."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, log_softmax

from mllmfl_lite.data.batches import CHANNEL_MEAN, CHANNEL_STD, open_batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.metrics import EVAL_BATCH
from mllmfl_lite.federated import State
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import stable_seed


def input_from_gradient(gradient: Tensor, row: int) -> Tensor:
    """The input (D,) of a linear layer, from its gradient (C, D + 1) with the bias's in the last column.

    ``G[r, :-1] / G[r, -1]`` (Phong et al., 2018): exact for one image, a mean weighted by the errors for several.
    """
    if not abs(gradient[row, -1]) >= 1e-6:
        raise ValueError(f"row {row} has no error to divide by ({gradient[row, -1]:.2g}); take another row")
    return gradient[row, :-1] / gradient[row, -1]


def surely_held(before: State, after: State) -> list[int]:
    """Classes that a client surely holds: their bias in the head rose in local training.

    With plain SGD the bias of an absent class only falls (Zhao et al., 2020). That of a held one may fall, too.
    """
    return (after["head.bias"] > before["head.bias"]).nonzero().flatten().tolist()


def gradient_of(model: nn.Module, x: Tensor, y: Tensor, create_graph: bool = False) -> list[Tensor]:
    """The gradient of mean cross-entropy on images (B, 3, H, W) in all parameters."""
    return list(torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()), create_graph=create_graph))


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels in images (B, 3, H, W)."""
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


def invert_gradient(
    model: nn.Module, gradient: Sequence[Tensor], start: Tensor, labels: Tensor, steps: int, smooth: float = 0.001
) -> Tensor:
    """Images (B, 3, H, W) whose gradient is the one observed (Zhu et al., 2019; total variation: Geiping et al., 2020).

    Adam from `start` on the gradients' squared distance, relative in each layer, plus `smooth` times the total
    variation. The attacker is given the labels. BatchNorm in training mode is a `ValueError` (Huang et al., 2021).
    """
    if any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        why = "its gradient depends on statistics of the client's batch, which the server does not have"
        raise ValueError(f"the model's BatchNorm is in training mode: {why}; call model.eval() before the attack")
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sizes = [g.square().sum().clamp(min=1e-12) for g in gradient]
    for _ in range(steps):
        found = zip(gradient_of(model, x, labels, create_graph=True), gradient, sizes, strict=True)
        apart = torch.stack([(ours - seen).square().sum() / size for ours, seen, size in found]).mean()
        x.grad = torch.autograd.grad(apart + smooth * total_variation(x), x)[0]
        optimizer.step()
        schedule.step()
    return x.detach()


def first_network(seed: int, num_classes: int = 10) -> nn.Module:
    """A network like the one that gradients were first inverted on (Zhu et al., 2019), for 32 x 32 images.

    Sigmoids, no pooling, no BatchNorm: each of them helps the attacker.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "first network"))
        layers = [nn.Conv2d(inside, 12, 5, stride, padding=2) for inside, stride in ((3, 2), (12, 2), (12, 1))]
        parts = [part for layer in layers for part in (layer, nn.Sigmoid())]
        return nn.Sequential(*parts, nn.Flatten(), nn.Linear(768, num_classes))


def in_unit_range(x: Tensor) -> Tensor:
    """Undo `Batches`' normalisation: images (B, 3, H, W) in [0, 1]."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CHANNEL_MEAN, CHANNEL_STD))
    return (x * std + mean).clamp(0, 1)


def psnr(ours: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [0, 1]: (B,)."""
    return -10 * (ours - truth).square().mean((1, 2, 3)).log10()


def ssim(ours: Tensor, truth: Tensor, window: int = 7) -> Tensor:
    """Structural similarity of images (B, 3, H, W) in [0, 1] (Wang et al., 2004), even windows: (B,)."""

    def mean(x: Tensor) -> Tensor:
        return avg_pool2d(x, window, 1)

    a, b = mean(ours), mean(truth)
    va, vb, both = mean(ours * ours) - a * a, mean(truth * truth) - b * b, mean(ours * truth) - a * b
    first, second = 0.01**2, 0.03**2
    found = (2 * a * b + first) * (2 * both + second) / ((a * a + b * b + first) * (va + vb + second))
    return found.mean((1, 2, 3))


@torch.inference_mode()
def confidences(model: CompactModel, data: ImageSet) -> np.ndarray:
    """``log p / (1 - p)`` of each image's own label, float64 (N,): high where the loss is low.

    Puts the model in evaluation mode.
    """
    model.eval()
    batches, found = open_batches(data), []
    for part in torch.arange(len(data)).split(EVAL_BATCH):
        logs, own = log_softmax(model(batches.plain(part)).double(), 1), batches.labels[part][:, None]
        others = logs.scatter(1, own, -torch.inf).logsumexp(1)
        found.append(logs.gather(1, own)[:, 0] - others)
    return torch.cat(found).numpy()


def lira(observed: np.ndarray, shadows: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Log-likelihood ratio "was trained on" over "was not" for each image (N,) (Carlini et al., 2022).

    `observed` are the attacked model's `confidences` (N,), `shadows` those of S models that the attacker trained
    himself (S, N), `member` (S, N) the images that each was trained on. As usual for few shadow models, an image's two
    normal distributions have means of their own, and one variance over all images.
    """
    if min(member.sum(0).min(), (~member).sum(0).min()) < 2:
        raise ValueError("each image must be in the training set of two shadow models or more, and not in two's")
    inside, outside = (np.where(m, shadows, np.nan) for m in (member, ~member))
    means = [np.nanmean(part, 0) for part in (inside, outside)]
    spread = [np.nanmean(np.nanvar(part, 0, ddof=1)) ** 0.5 for part in (inside, outside)]
    found = [stats.norm.logpdf(observed, mean, max(s, 1e-9)) for mean, s in zip(means, spread, strict=True)]
    return found[0] - found[1]


def roc(scores: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates, from (0, 0) to (1, 1), as the threshold on the scores (N,) falls."""
    if not (member.any() and not member.all()):
        raise ValueError("a ROC curve needs members and others")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores pass together
    hits, alarms = np.cumsum(member[order])[last], np.cumsum(~member[order])[last]
    return np.append(0, alarms / (~member).sum()), np.append(0, hits / member.sum())


def auc(scores: np.ndarray, member: np.ndarray) -> float:
    """Area under the ROC curve: how often a member scores higher than another image; 0.5 is chance."""
    false, true = roc(scores, member)
    return float((np.diff(false) * (true[1:] + true[:-1])).sum() / 2)


def tpr_at(scores: np.ndarray, member: np.ndarray, fpr: float = 0.01) -> float:
    """True positive rate where at most a share `fpr` of the others is accused."""
    false, true = roc(scores, member)
    return float(true[false <= fpr].max())
