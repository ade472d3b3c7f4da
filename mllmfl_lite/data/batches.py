"""Image sets as tensors on a device, handed out as normalised float batches, augmented a whole batch at a time.

The images stay uint8 and padded; a random crop is one indexed read of a strided view, so augmenting costs microseconds
an image instead of the hundreds of a PIL pipeline, and nothing is decoded twice. Pictures in files, which no memory
holds, are decoded and augmented by threads that stay one batch ahead (`FileBatches`)::

    batches = open_batches(data, device)              # the one or the other
    for x in batches.stream(order.split(32), generator): ...
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from mllmfl_lite.data.images import ImageFiles, ImageSet
from mllmfl_lite.repro import count_cores

# The usual CIFAR-10 channel statistics. Used for every 32 x 32 set here: constants leak nothing about a client.
CHANNEL_MEAN = (0.4914, 0.4822, 0.4465)


CHANNEL_STD = (0.2470, 0.2435, 0.2616)


IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


def channel_statistics(size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation by which pictures of `size` pixels a side are normalised: CIFAR's up to 32, then ImageNet's.

    So a server's picture from a file looks to a model as its clients' own do.
    """
    return (CHANNEL_MEAN, CHANNEL_STD) if size <= 32 else (IMAGENET_MEAN, IMAGENET_STD)


class Batches:
    """One image set on one device.

    Args:
        data: the images.
        device: where the tensors live.
        padding: black pixels on each side that random crops may reach into (4 is the usual choice for CIFAR).

    Attributes:
        labels: int64, shape (N,), on the device.
    """

    def __init__(self, data: ImageSet, device: torch.device | str = "cpu", padding: int = 4):
        self.height, self.width = data.images.shape[1:3]
        self.padding = padding
        self.labels = torch.from_numpy(np.array(data.labels)).to(device)
        margin = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        padded = torch.from_numpy(np.pad(data.images, margin)).to(device)  # (N, H + 2p, W + 2p, 3)
        self._windows = padded.unfold(1, self.height, 1).unfold(2, self.width, 1)  # (N, 2p + 1, 2p + 1, 3, H, W)
        self._normalise = Normalise(CHANNEL_MEAN, CHANNEL_STD, device)

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, indices: Tensor) -> Tensor:
        """The images at `indices` (B,), normalised: float32, shape (B, 3, H, W), channels last in memory."""
        return self._normalise(self._windows[indices, self.padding, self.padding])

    def augmented(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """As `plain`, each image with its own random crop and its own coin for a horizontal flip."""
        return self.cut(indices, self.chances([len(indices)], generator).to(indices.device))

    def chances(self, lengths: Iterable[int], generator: torch.Generator) -> Tensor:
        """What `augmented` draws for batches of these lengths: each image's top, left and flip, int64 (3, sum)."""
        drawn = [self._draw(length, generator) for length in lengths]
        return torch.cat([torch.empty(3, 0, dtype=torch.int64), *drawn], 1)

    def _draw(self, length: int, generator: torch.Generator) -> Tensor:
        corners = torch.randint(2 * self.padding + 1, (2, length), generator=generator)
        return torch.cat([corners, torch.randint(2, (1, length), generator=generator)])

    def cut(self, indices: Tensor, chances: Tensor) -> Tensor:
        """The images at `indices` (...) with these `chances` (3, ...), on the device: float32 (..., 3, H, W)."""
        top, left, flip = chances.flatten(1)
        crops = self._windows[indices.flatten(), top, left]  # (B, 3, H, W)
        flipped = torch.where(flip.view(-1, 1, 1, 1).bool(), crops.flip(3), crops)
        return self._normalise(flipped).unflatten(0, indices.shape)

    def stream(self, parts: Iterable[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
        """`augmented` for one run of indices after the other; all is drawn at once, so a GPU is waited for once."""
        parts = list(parts)
        lengths = [len(part) for part in parts]
        chances = self.chances(lengths, generator).to(self.labels.device)
        return map(self.cut, parts, chances.split(lengths, 1))


class Normalise:
    """Pixels uint8 (B, 3, H, W) -> float32 in units of deviations, channels last in memory."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str):
        deviation = torch.tensor(std, device=device).view(1, 3, 1, 1)
        self._scale = 1 / (255 * deviation)
        self._shift = -torch.tensor(mean, device=device).view(1, 3, 1, 1) / deviation

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise a batch."""
        floats = pixels.to(torch.float32, memory_format=torch.channels_last)
        return floats.mul_(self._scale).add_(self._shift)


class FileBatches:
    """The same for pictures in files: ImageNet's usual crops, by torchvision's v2 functions, in threads.

    Training sees a random part of each picture (8 to 100 % of its area, sides 3:4 to 4:3) at `size`, flipped by a
    coin; testing the middle of the picture after its shorter side was made ``size * 256 / 224``. Each picture's chances
    are drawn before it is handed to a thread, so the number of threads changes nothing.

    Args:
        data: the set, its images `ImageFiles`.
        device: where batches go.
        threads: that decode; default one a core.

    Attributes:
        labels: int64, shape (N,), on the device.
    """

    TRIES = 10  # boxes drawn for a picture until one fits

    def __init__(self, data: ImageSet, device: torch.device | str = "cpu", threads: int | None = None):
        self.files, self.size = data.images, data.images.size
        self.labels = torch.from_numpy(np.array(data.labels)).to(device)
        self._threads = ThreadPoolExecutor(threads or count_cores(), initializer=torch.set_num_threads, initargs=(1,))
        self._normalise = Normalise(*channel_statistics(self.size), device)

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, indices: Tensor) -> Tensor:
        """The middle of the pictures at `indices` (B,): float32 (B, 3, size, size).

        Raises:
            BadPictureError: a file is gone or damaged.
        """
        return self._collect([self._threads.submit(self._middle, i) for i in indices.tolist()])

    def augmented(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """As `plain`, each picture with its own random part and its own coin for a horizontal flip."""
        return self._collect(self._begin(indices, generator))

    def stream(self, parts: Iterable[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
        """`augmented` for one run of indices after the other; the next is decoded while the last is in use."""
        ahead: list[Future] = []
        for part in [part.cpu() for part in parts]:  # all now: later a GPU would have to be waited for
            begun = self._begin(part, generator)
            if ahead:
                yield self._collect(ahead)
            ahead = begun
        if ahead:
            yield self._collect(ahead)

    def _begin(self, indices: Tensor, generator: torch.Generator) -> list[Future]:
        chances = torch.rand(len(indices), 1 + 4 * self.TRIES, generator=generator).tolist()
        return [self._threads.submit(self._part, *one) for one in zip(indices.tolist(), chances, strict=True)]

    def _collect(self, jobs: list[Future]) -> Tensor:
        pixels = torch.stack([job.result() for job in jobs])
        return self._normalise(pixels.to(self.labels.device))

    def _part(self, index: int, chances: list[float]) -> Tensor:
        from torchvision.transforms.v2 import functional  # slow to import

        picture = self.files[index]
        top, left, height, width = random_box(*picture.size, chances[1:])
        pixels = functional.pil_to_tensor(picture.crop((left, top, left + width, top + height)))
        pixels = functional.resize(pixels, [self.size, self.size], antialias=True)
        return functional.horizontal_flip(pixels) if chances[0] < 0.5 else pixels

    def _middle(self, index: int) -> Tensor:
        from torchvision.transforms.v2 import functional

        pixels = functional.pil_to_tensor(self.files[index])
        pixels = functional.resize(pixels, [math.ceil(self.size * 256 / 224)], antialias=True)
        return functional.center_crop(pixels, [self.size, self.size])


def random_box(width: int, height: int, chances: list[float]) -> tuple[int, int, int, int]:
    """A random part of a picture, as ImageNet is trained on (Szegedy et al., 2015): top, left, height, width.

    Args:
        width: of the picture.
        height: of the picture.
        chances: numbers in [0, 1), four for each try: area, shape, place. If no try fits, the middle is taken.
    """
    for area, shape, down, right in zip(*(chances[i::4] for i in range(4)), strict=True):
        wanted, ratio = (0.08 + 0.92 * area) * width * height, (3 / 4) * (16 / 9) ** shape
        w, h = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def open_batches(data: ImageSet, device: torch.device | str = "cpu") -> Batches | FileBatches:
    """`Batches` for images in memory, `FileBatches` for images in files."""
    return (FileBatches if isinstance(data.images, ImageFiles) else Batches)(data, device)
