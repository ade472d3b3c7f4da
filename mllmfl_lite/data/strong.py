"""Strong augmentation of small images: AutoAugment's CIFAR-10 policy and Cutout, drawn for each image.

The policy (Cubuk et al., 2019) was searched on labelled, balanced CIFAR-10 images: a mild leak where those are scarce.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms.v2 import functional as F

from mllmfl_lite.data.batches import Batches

CUTOUT = 16  # pixels a side of the blank square (DeVries & Taylor, 2017)
POLICIES = AutoAugment(AutoAugmentPolicy.CIFAR10).policies  # 25 pairs of (operation, probability, level 0..9)


def _shear(x: Tensor, *slopes: float) -> Tensor:
    return F.affine(x, 0.0, [0, 0], 1.0, [math.degrees(math.atan(slope)) for slope in slopes], center=[0, 0])


def _move(x: Tensor, *pixels: float) -> Tensor:
    return F.affine(x, 0.0, list(map(int, pixels)), 1.0, [0.0, 0.0])


# Each operation on images uint8 (B, 3, H, W), with the strength at level 9; strengths grow in equal steps from 0.
# "signed" ones go both ways.
Operation = Callable[[Tensor, float], Tensor]
SIGNED: dict[str, tuple[Operation, float]] = {
    "ShearX": (lambda x, m: _shear(x, m, 0), 0.3),
    "ShearY": (lambda x, m: _shear(x, 0, m), 0.3),
    "TranslateX": (lambda x, m: _move(x, m * x.shape[3], 0), 150 / 331),
    "TranslateY": (lambda x, m: _move(x, 0, m * x.shape[2]), 150 / 331),
    "Rotate": (F.rotate, 30.0),
    "Brightness": (lambda x, m: F.adjust_brightness(x, 1 + m), 0.9),
    "Color": (lambda x, m: F.adjust_saturation(x, 1 + m), 0.9),
    "Contrast": (lambda x, m: F.adjust_contrast(x, 1 + m), 0.9),
    "Sharpness": (lambda x, m: F.adjust_sharpness(x, 1 + m), 0.9),
}
UNSIGNED: dict[str, Operation] = {
    "Posterize": lambda x, level: F.posterize(x, 8 - round(level / (9 / 4))),
    "Solarize": lambda x, level: F.solarize(x, 255 * (1 - level / 9)),
    "AutoContrast": lambda x, level: F.autocontrast(x),
    "Equalize": lambda x, level: F.equalize(x),
    "Invert": lambda x, level: F.invert(x),
}


def change(images: Tensor, operation: str, level: float | None, sign: int) -> Tensor:
    """Apply one operation of AutoAugment, at a level of 0..9, to images uint8 (B, 3, H, W); `sign` is 1 or -1."""
    if operation in SIGNED:
        apply, strongest = SIGNED[operation]
        return apply(images, sign * strongest * (level or 0) / 9)
    return UNSIGNED[operation](images, level or 0)


def strong_views(batches: Batches, rows: Tensor, generator: torch.Generator) -> Tensor:
    """The images at `rows` (B,), cropped and flipped, then changed by the policy and Cutout: float32 (B, 3, H, W)."""
    count, pixels = len(rows), batches.cropped(rows, generator)
    chosen = torch.randint(len(POLICIES), (count,), generator=generator).tolist()
    chance = torch.rand(count, 2, generator=generator).tolist()
    sign = (1 - 2 * torch.randint(2, (count, 2), generator=generator)).tolist()
    centre = torch.rand(2, count, generator=generator) * torch.tensor(pixels.shape[2:])[:, None]
    for turn in (0, 1):
        alike: dict[tuple, list[int]] = {}
        for i, policy in enumerate(chosen):
            operation, probability, level = POLICIES[policy][turn]
            if chance[i][turn] <= probability:
                alike.setdefault((operation, level, sign[i][turn] if operation in SIGNED else 1), []).append(i)
        for operation, images in alike.items():
            pixels[images] = change(pixels[images], *operation)
    square = _square(centre.long().to(rows.device), pixels.shape[2:])
    return batches.normalise(pixels).masked_fill(square, 0.0)


def _square(centre: Tensor, sides: torch.Size) -> Tensor:
    """Mark a square around each centre (2, B), as much of it as lies inside: bool (B, 1, H, W)."""
    down, right = (torch.arange(side, device=c.device) - c[:, None] for side, c in zip(sides, centre, strict=True))
    rows, columns = ((away >= -CUTOUT // 2) & (away < CUTOUT // 2) for away in (down, right))
    return rows[:, None, :, None] & columns[:, None, None, :]
