"""The frozen encoder: EfficientNet-lite2 with its ImageNet weights, as 4 x 4 visual tokens an image."""

import copy
import functools
import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, softmax
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.teachers.answers import StoredAnswers
from mllmfl_lite.teachers.imagenet import ImageNetTeacher, load_imagenet

GRID, TOKENS, BATCH = 4, 16, 16


class Encoder(ImageNetTeacher):
    """An `ImageNetTeacher` that also gives tokens; `trunk.extract_features` is its feature map."""

    family = f"imagenet-{GRID}x{GRID}"

    def tokens(self, images) -> Tensor:
        """The feature map averaged to 4 x 4, each place of it with the same weight: float32 (N, 16, D)."""
        return self._each_batch(images, lambda x: pool_map(self._map(x)))

    @functools.cached_property
    def _map(self):
        """Images to feature maps (B, D, h, w), by a copy of the trunk with BatchNorm folded in: half the time."""
        folded, example = fold_norms(self.model.trunk), torch.zeros(1, 3, self.size, self.size, device=self.device)
        found, wanted = (trunk.extract_features(example) for trunk in (folded, self.model.trunk))
        if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3):
            raise ValueError(f"{self.name}: its layers run in another order than listed; use the trunk itself")
        return folded.extract_features


def fold_norms(trunk: nn.Module) -> nn.Module:
    """A copy whose convolutions contain the BatchNorm that is listed next to them, in evaluation mode."""
    folded = copy.deepcopy(trunk)
    for module in [*folded.modules()]:
        for (first, conv), (second, norm) in itertools.pairwise([*module.named_children()]):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, fuse_conv_bn_eval(conv, norm))
                setattr(module, second, nn.Identity())
    return folded


def load_encoder() -> Encoder:
    """EfficientNet-lite2 at 192 pixels on the CPU."""
    teacher = load_imagenet("efficientnet_lite2", device="cpu", batch_size=BATCH)
    return Encoder(teacher.name, teacher.model.trunk, teacher.model.classifier, teacher.device, BATCH, teacher.size)


def pool_map(maps: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, 16, D), row by row; a cell on a border counts in part on both sides of it."""
    rows, columns = (avg_pool1d(torch.eye(side).repeat_interleave(GRID, 1), side) for side in maps.shape[2:])  # (h, 4)
    return (rows.T @ maps @ columns).flatten(2).transpose(1, 2)


def stored_tokens(encoder: Encoder, pool: ImageSet, folder: Path) -> np.ndarray:
    """The tokens of all images, float16 (N, 16, D): computed 1,024 at a time, kept, and resumed after a kill."""
    return StoredAnswers(encoder, "tokens", pool, folder)[np.arange(len(pool))]


def pooled(tokens: np.ndarray) -> Tensor:
    """The encoder's own features: the mean token, float32 (N, D)."""
    return torch.from_numpy(tokens).float().mean(1)


@torch.inference_mode()
def choices(encoder: Encoder, features: Tensor) -> tuple[Tensor, Tensor]:
    """The first two ImageNet classes of features (N, D), int64 (N, 2), and their probabilities (N, 2)."""
    chances = softmax(encoder.model.classifier(features), 1)
    best = chances.topk(2, dim=1)
    return best.indices, best.values
