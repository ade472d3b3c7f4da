"""Image sets as tensors on a device, handed out as normalised float batches, augmented a whole batch at a time.

The images stay uint8 and padded; a random crop is one indexed read of a strided view, so augmenting costs microseconds
an image instead of the hundreds of a PIL pipeline, and nothing is decoded twice.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mllmfl_lite.data import ImageSet

# The usual CIFAR-10 channel statistics. Used for every 32 x 32 set here: constants leak nothing about a client.
CHANNEL_MEAN = (0.4914, 0.4822, 0.4465)
CHANNEL_STD = (0.2470, 0.2435, 0.2616)


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
        std = torch.tensor(CHANNEL_STD, device=device).view(1, 3, 1, 1)
        self._scale = 1 / (255 * std)
        self._shift = -torch.tensor(CHANNEL_MEAN, device=device).view(1, 3, 1, 1) / std

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, indices: Tensor) -> Tensor:
        """The images at `indices` (B,), normalised: float32, shape (B, 3, H, W), channels last in memory."""
        return self._normalise(self._windows[indices, self.padding, self.padding])

    def augmented(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """As `plain`, each image with its own random crop and its own coin for a horizontal flip."""
        corners = torch.randint(2 * self.padding + 1, (2, len(indices)), generator=generator).to(indices.device)
        flip = torch.randint(2, (len(indices), 1, 1, 1), generator=generator).to(indices.device, torch.bool)
        crops = self._windows[indices, corners[0], corners[1]]  # (B, 3, H, W)
        return self._normalise(torch.where(flip, crops.flip(3), crops))

    def _normalise(self, pixels: Tensor) -> Tensor:
        floats = pixels.to(torch.float32, memory_format=torch.channels_last)
        return floats.mul_(self._scale).add_(self._shift)
