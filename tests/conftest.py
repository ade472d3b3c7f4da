import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mllmfl_lite.data import partition
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.models import CompactModel, build_model
from mllmfl_lite.teachers.imagenet import ImageNetTeacher

torch.set_num_threads(1)
sys.path.append(str(Path(__file__).parent.parent / "scripts"))  # controls, pages, standins

pytest_plugins = ["visits"]


def make_images(n: int = 60, num_classes: int = 3, size: int = 8, seed: int = 0) -> ImageSet:
    """Random small pictures whose brightness gives the class away, so that a model can learn something."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % num_classes
    images = rng.integers(0, 120, (n, size, size, 3)) + 60 * labels[:, None, None, None]
    names = tuple(f"class {c}" for c in range(num_classes))
    return ImageSet(np.clip(images, 0, 255).astype(np.uint8), labels.astype(np.int64), names, "made/train")


@pytest.fixture
def images() -> ImageSet:
    return make_images()


@pytest.fixture
def model() -> CompactModel:
    return build_model("resnet8", 3, width=4)


@pytest.fixture
def split(images) -> partition.Split:
    return partition.iid(images.labels, 4, seed=0)


FEATURES = 6  # of the tiny ImageNet network


class Trunk(nn.Module):
    """Picture (N, 3, H, W) -> six numbers: each channel's mean, and three mixtures of them."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, FEATURES)

    def forward(self, x):
        return self.mix(x.mean((2, 3)))


def make_imagenet_teacher(seed: int = 0, **more) -> ImageNetTeacher:
    torch.manual_seed(seed)
    return ImageNetTeacher("somewhere/tiny", Trunk(), nn.Linear(FEATURES, 1000), torch.device("cpu"), **more)
