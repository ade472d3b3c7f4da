"""Image sets as normalised float batches on a device, augmented a whole batch at a time."""

import itertools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mllmfl_lite.data.images import ImageFiles, ImageSet
from mllmfl_lite.repro import count_cores

# Usual channel statistics of CIFAR-10 and ImageNet. Constants: nothing is learned from a client.
CHANNEL_MEAN, CHANNEL_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRIES = 10  # random boxes drawn for a file until one fits


class Batches:
    """An image set in memory, on a device: a random crop is an indexed read of a strided view.

    Random crops may reach over `padding` black pixels on each side (4 is usual for CIFAR).
    """

    def __init__(self, data: ImageSet, device: torch.device | str = "cpu", padding: int = 4):
        images = np.asarray(data.images)
        height, width = images.shape[1:3]
        self.padding = padding
        self.labels = torch.from_numpy(np.array(data.labels)).to(device)  #: int64 (N,), on the device
        margin = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        padded = torch.from_numpy(np.pad(images, margin)).to(device)  # (N, H + 2p, W + 2p, 3)
        self._windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # (N, 2p + 1, 2p + 1, 3, H, W)
        self.normalise = _Normalise(CHANNEL_MEAN, CHANNEL_STD, device)

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, indices: Tensor) -> Tensor:
        """The images at `indices` (B,), normalised: float32 (B, 3, H, W), channels last in memory."""
        return self.normalise(self._windows[indices, self.padding, self.padding])

    def augmented(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """As `plain`, each image with its own random crop and horizontal flip."""
        return self.normalise(self.cropped(indices, generator))

    def cropped(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """As `augmented`, in pixels: uint8 (B, 3, H, W)."""
        return self._crop(indices, self._draw(len(indices), generator).to(indices.device))

    def stream(self, parts: Iterable[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
        """`augmented` for each run of indices. All draws are made at once, so a GPU is synchronised once."""
        parts = list(parts)
        lengths = [len(part) for part in parts]
        drawn = torch.cat([self._draw(n, generator) for n in (0, *lengths)], 1).to(self.labels.device)
        return map(self.normalise, map(self._crop, parts, drawn.split(lengths, 1)))

    def _draw(self, length: int, generator: torch.Generator) -> Tensor:
        """Top, left and flip of each image: int64 (3, B)."""
        corners = torch.randint(2 * self.padding + 1, (2, length), generator=generator)
        return torch.cat([corners, torch.randint(2, (1, length), generator=generator)])

    def _crop(self, indices: Tensor, drawn: Tensor) -> Tensor:
        top, left, flip = drawn
        crops = self._windows[indices, top, left]  # (B, 3, H, W)
        return torch.where(flip.view(-1, 1, 1, 1).bool(), crops.flip(3), crops)


class FileBatches:
    """An image set in files: ImageNet's usual crops by torchvision, decoded in threads, one batch ahead.

    Training sees a random part of each image (8 to 100 % of its area, sides 3:4 to 4:3) at `size`, flipped or not.
    Testing sees the middle after the shorter side was scaled to ``size * 256 / 224``. Random numbers are drawn before
    an image is handed to a thread, so the number of threads changes nothing.
    """

    def __init__(self, data: ImageSet, device: torch.device | str = "cpu", threads: int | None = None):
        self._files, self._size = data.images, data.images.size
        self.labels = torch.from_numpy(np.array(data.labels)).to(device)  #: int64 (N,), on the device
        self._threads = ThreadPoolExecutor(threads or count_cores(), initializer=torch.set_num_threads, initargs=(1,))
        statistics = (CHANNEL_MEAN, CHANNEL_STD) if self._size <= 32 else (IMAGENET_MEAN, IMAGENET_STD)
        self._normalise = _Normalise(*statistics, device)

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, indices: Tensor) -> Tensor:
        """The middle of the images at `indices` (B,): float32 (B, 3, size, size). A damaged file is a `ValueError`."""
        return self._collect([self._threads.submit(self._middle, i) for i in indices.tolist()])

    def augmented(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """As `plain`, each image with its own random part and flip."""
        return self._collect(self._begin(indices, generator))

    def stream(self, parts: Iterable[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
        """`augmented` for each run of indices; the next is decoded while the last is in use."""
        parts = [part.cpu() for part in parts]  # all at once: a GPU is synchronised once
        begun = (self._begin(part, generator) for part in [*parts, torch.empty(0)])  # the last one ends the pairs
        return (self._collect(jobs) for jobs, _ in itertools.pairwise(begun))

    def _begin(self, indices: Tensor, generator: torch.Generator) -> list[Future]:
        drawn = torch.rand(len(indices), 1 + 4 * TRIES, generator=generator).tolist()
        return [self._threads.submit(self._part, *one) for one in zip(indices.tolist(), drawn, strict=True)]

    def _collect(self, jobs: list[Future]) -> Tensor:
        pixels = torch.stack([job.result() for job in jobs])
        return self._normalise(pixels.to(self.labels.device))

    def _part(self, index: int, drawn: list[float]) -> Tensor:
        image = self._files[index]
        top, left, height, width = random_box(image.width, image.height, drawn[1:])
        pixels = F.pil_to_tensor(image.crop((left, top, left + width, top + height)))
        pixels = F.resize(pixels, [self._size, self._size], antialias=True)
        return pixels.flip(2) if drawn[0] < 0.5 else pixels

    def _middle(self, index: int) -> Tensor:
        pixels = F.pil_to_tensor(self._files[index])
        pixels = F.resize(pixels, [math.ceil(self._size * 256 / 224)], antialias=True)
        return F.center_crop(pixels, [self._size, self._size])


class _Normalise:
    """Pixels uint8 (B, 3, H, W) -> float32 in units of deviations, channels last in memory."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str):
        deviation = torch.tensor(std, device=device).view(1, 3, 1, 1)
        self._scale = 1 / (255 * deviation)
        self._shift = -torch.tensor(mean, device=device).view(1, 3, 1, 1) / deviation

    def __call__(self, pixels: Tensor) -> Tensor:
        floats = pixels.to(torch.float32, memory_format=torch.channels_last)
        return floats.mul_(self._scale).add_(self._shift)


def random_box(width: int, height: int, drawn: list[float]) -> tuple[int, int, int, int]:
    """A random part of an image (Szegedy et al., 2015): top, left, height, width, in pixels.

    `drawn` are numbers in [0, 1), four a try: area, shape, place. If no try fits, the middle is taken.
    """
    for area, shape, down, right in zip(*(drawn[i::4] for i in range(4)), strict=True):
        wanted, ratio = (0.08 + 0.92 * area) * width * height, (3 / 4) * (16 / 9) ** shape
        w, h = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def open_batches(data: ImageSet, device: torch.device | str = "cpu") -> Batches | FileBatches:
    """`Batches` for images in memory, `FileBatches` for images in files."""
    return (FileBatches if isinstance(data.images, ImageFiles) else Batches)(data, device)
