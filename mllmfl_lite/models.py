"""Compact image models behind one interface: feature map, features, token grid, head."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, kl_div, log_softmax, softmax

from mllmfl_lite.repro import sha256_arrays, stable_seed, write_atomically


class CompactModel(nn.Module):
    """A convolutional body and a linear head. A subclass builds `body`; nothing else differs.

    Args:
        body: maps images (B, 3, H, W) to a feature map (B, D, h, w).
        num_features: D.
        num_classes: C.

    Attributes:
        num_features: D.
        head: the linear classifier, D -> C.
    """

    def __init__(self, body: nn.Module, num_features: int, num_classes: int):
        super().__init__()
        self.body = body
        self.num_features = num_features
        self.head = nn.Linear(num_features, num_classes)

    def feature_map(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the last feature map (B, D, h, w)."""
        return self.body(x)

    def features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> features (B, D), the mean over the feature map."""
        return self.feature_map(x).mean((2, 3))

    def tokens(self, x: Tensor, grid: int) -> Tensor:
        """Images (B, 3, H, W) -> visual tokens (B, grid * grid, D), row by row.

        A larger feature map is pooled to the grid, a smaller one is repeated.

        Raises:
            ValueError: neither side divides the other.
        """
        maps = self.feature_map(x)
        for axis in (2, 3):
            side = maps.shape[axis]
            if grid < 1 or (side % grid and grid % side):
                raise ValueError(
                    f"the token grid and the feature map must divide one another; the map is {maps.shape[2]} x "
                    f"{maps.shape[3]}, the grid {grid} x {grid}; choose another image size"
                )
            if side < grid:
                maps = maps.repeat_interleave(grid // side, axis)
        return adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, C)."""
        return self.head(self.features(x))


class _Shortcut(nn.Sequential):
    """A strided 1x1 convolution and BatchNorm, with the stride taken first: the same numbers.

    torch 2.15's backward pass of a strided 1x1 convolution writes beyond its memory on some CPUs (few channels,
    channels last), which ends the process.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :: self.stride, :: self.stride])


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut, 1x1 where the shape changes (He et al., 2016)."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = _Shortcut(nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside))
            self.shortcut.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(self.conv1(x)).relu_()  # in place: the same numbers, less memory to walk through
        return self.norm2(self.conv2(out)).add_(self.shortcut(x)).relu_()


def resnet8(num_classes: int, width: int = 64) -> CompactModel:
    """ResNet-8 for 32 x 32 images: a 3x3 stem and one basic block each at `width`, 2 `width` and 4 `width` channels.

    The feature map is 8 x 8, features are 4 `width` numbers. At the benchmarks' width of 64: 1,225,024 parameters
    without the head, 1,227,594 with 10 classes. The laptop runs use a narrower one.
    """
    _check_positive(num_classes=num_classes, width=width)
    body = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        _BasicBlock(width, width, 1),
        _BasicBlock(width, 2 * width, 2),
        _BasicBlock(2 * width, 4 * width, 2),
    )
    return CompactModel(body, 4 * width, num_classes)


def resnet50(num_classes: int) -> CompactModel:
    """torchvision's ResNet-50, untrained, for 224 x 224 images: features of 2,048 numbers, a 7 x 7 feature map."""
    from torchvision.models import resnet50 as torchvision_resnet50  # slow to import, and ResNet-8 does not need it

    _check_positive(num_classes=num_classes)
    body = nn.Sequential(*list(torchvision_resnet50(weights=None).children())[:-2])
    return CompactModel(body, 2048, num_classes)


MODELS = ("resnet8", "resnet50")


def build_model(name: str, num_classes: int, width: int = 64, seed: int = 0) -> CompactModel:
    """The model of that name with weights that depend on `seed` alone; `width` is for ResNet-8.

    Raises:
        ValueError: no such model, or a size that is not positive.
    """
    if name not in MODELS:
        raise ValueError(f"no model named {name!r}; there are {', '.join(MODELS)}")
    with torch.random.fork_rng(devices=[]):  # torch's initialisers draw from the global generator: give it back after
        torch.manual_seed(stable_seed(seed, "initial weights"))
        return resnet8(num_classes, width) if name == "resnet8" else resnet50(num_classes)


def save_model(path: str | Path, model: CompactModel, name: str, width: int = 64) -> None:
    """Write a model's weights as safetensors, with what `load_model` needs. The same model gives the same bytes.

    Args:
        path: the file.
        model: what `build_model` made, trained or not.
        name: as given to `build_model`.
        width: as given to `build_model`.
    """
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    about = {"name": name, "width": width, "num_classes": model.head.out_features, "sha256": _state_sha256(state)}
    content = safetensors.torch.save(state, {"model": json.dumps(about, sort_keys=True)})  # one entry: no order
    write_atomically(path, content)


def load_model(path: str | Path) -> CompactModel:
    """Read the model that `save_model` wrote.

    Raises:
        ValueError: no such file, not written by `save_model`, or damaged.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            about, state = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = json.loads(about["model"]) if "model" in about else about
        model = build_model(about["name"], int(about["num_classes"]), int(about["width"]))
        model.load_state_dict(state)
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} holds no model written by save_model ({error})") from error
    if about.get("sha256", (found := _state_sha256(state))) != found:
        raise ValueError(f"{path} is damaged: its weights do not fit its checksum; remove it and make it again")
    return model


def _state_sha256(state: dict[str, Tensor]) -> str:
    names = sorted(state)
    digest = hashlib.sha256("\n".join(names).encode())
    digest.update(sha256_arrays(state[name].cpu().numpy() for name in names).encode())
    return digest.hexdigest()


def count_parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(p.numel() for p in model.parameters())


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")


def with_head(model: CompactModel, num_classes: int, seed: int = 0) -> CompactModel:
    """A copy with a fresh linear head for `num_classes` classes, which depends on the seed alone."""
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "head"))
        fresh.head = nn.Linear(model.num_features, num_classes)
    return fresh


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(logits / T))``, mean over the batch (Hinton et al., 2015).

    Args:
        logits: (B, C).
        teacher: the teacher's logits (B, C).
        temperature: T.
    """
    student = log_softmax(logits / temperature, 1)
    return temperature**2 * kl_div(student, softmax(teacher / temperature, 1), reduction="batchmean")
