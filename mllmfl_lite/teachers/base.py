"""What all frozen teachers share: a name, a device, batches, an identity."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mllmfl_lite.repro import ASSETS

BUNDLED = {name: str(ASSETS / name) for name in ("tiny_clip", "tiny_llava")}  # the stand-ins, by their short names
TINY_CLIP, TINY_LLAVA = BUNDLED.values()
SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")  # files of a model folder that may change an answer


class Teacher:
    """A frozen model on the server.

    Images are uint8 arrays (N, H, W, 3), `ImageFiles`, or lists of PIL images.

    Args:
        name: what was asked for, e.g. a folder or a hub name.
        model: the network.
        device: where it runs.
        batch_size: images at a time.
        settings: what else changes its answers (preprocessing, templates), as text; part of its identity.
    """

    def __init__(self, name: str, model: torch.nn.Module, device: torch.device, batch_size: int, settings: str = ""):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        self.name, self.device, self.batch_size, self.settings = name, device, batch_size, settings
        self.model = model.to(device).eval().requires_grad_(False)

    @functools.cached_property
    def identity(self) -> str:
        """Name, and a checksum of weights and settings: ``"tiny_llava-1f0c2a..."``."""
        digest = hashlib.sha256(self.settings.encode())
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return f"{Path(self.name).name.replace(':', '-')}-{digest.hexdigest()[:12]}"

    def images_at_once(self, names: Sequence[str]) -> int:
        """Images in a batch when class names are scored."""
        return self.batch_size

    def pixels(self, images: Sequence) -> Tensor:
        """Images as this model wants them: float (N, 3, H, W), on its device."""
        raise NotImplementedError

    def _each_batch(self, images: Sequence, work: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.inference_mode():
            parts = [
                work(self.pixels(images[i : i + self.batch_size])).float().cpu()
                for i in range(0, len(images), self.batch_size)
            ]
        if not parts:
            raise ValueError("there are no images; give at least one")
        return torch.cat(parts)

    def _cost(self, encode: Callable[[Tensor], Tensor], weights: torch.nn.Module) -> tuple[int, int]:
        """Floating-point operations of `encode` on one image, and the bytes of the weights that it uses."""
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # torch does not count inside a fused attention layer
        try:
            with FlopCounterMode(display=False) as counter, torch.inference_mode():
                encode(self.pixels([Image.new("RGB", (32, 32))]))
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
        return counter.get_total_flops(), sum(p.numel() * p.element_size() for p in weights.parameters())


def folder_settings(folder: Path) -> str:
    """Checksums of the files in a model's folder that may change an answer, weights apart."""
    files = {path for pattern in SETTINGS for path in folder.glob(pattern) if not path.name.endswith(".index.json")}
    return "\n".join(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sorted(files))


def first_line(error: Exception) -> str:
    """The first line of another package's error, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
