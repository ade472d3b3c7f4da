"""The frozen models on the server behind one small interface: features, visual tokens, class probabilities::

    clip = load_clip()                               # the bundled stand-in; or ("ViT-L-14", "openai")
    mllm = load_mllm()                               # the bundled stand-in; or ("llava-hf/llava-1.5-7b-hf")
    clip.features(images)                            # (N, D), unit length
    mllm.tokens(images)                              # (N, P, D): what its projector is given
    clip.class_probabilities(images, names)          # (N, C): zero-shot, from text prompts
    mllm.class_probabilities(images, names)          # (N, C): likelihood of each name as its answer
    stored(clip, "features", data, folder)           # computed once, kept on disk

Images are uint8 arrays (N, H, W, 3), or lists of PIL images of any size.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ASSETS = Path(__file__).parent / "assets"


BUNDLED = {name: str(ASSETS / name) for name in ("tiny_clip", "tiny_llava")}  # the stand-ins, by their short names


TINY_CLIP, TINY_LLAVA = BUNDLED.values()


class TeacherError(RuntimeError):
    """A model cannot be loaded, or stored features do not belong to it; the message says what to do."""


class Teacher:
    """What both kinds of teacher share: a name, a device, batches.

    Args:
        name: what was asked for, e.g. a folder or a hub name.
        device: where it runs.
        batch_size: images at a time.
    """

    def __init__(self, name: str, model: torch.nn.Module, device: torch.device, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        self.name, self.device, self.batch_size = name, device, batch_size
        self.model = model.to(device).eval().requires_grad_(False)

    @functools.cached_property
    def identity(self) -> str:
        """Name and checksum of the weights, as in ``"tiny_llava-1f0c2a…"``; other models are kept apart."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return f"{Path(self.name).name}-{digest.hexdigest()[:12]}"

    def pixels(self, images: Sequence) -> Tensor:
        """Images as this model wants them: float, (N, 3, H, W), on its device."""
        raise NotImplementedError

    def _each_batch(self, images: Sequence, work: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.inference_mode():
            parts = [
                work(self.pixels(images[i : i + self.batch_size])).float().cpu()
                for i in range(0, len(images), self.batch_size)
            ]
        if not parts:
            raise ValueError("there are no images to look at; give at least one")
        return torch.cat(parts)

    def _cost(self, look: Callable[[Tensor], Tensor], weights: torch.nn.Module) -> tuple[int, int]:
        """Floating-point operations of `look` on one picture, and the bytes of the weights that it uses."""
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # torch does not count inside of a fused attention layer
        try:
            with FlopCounterMode(display=False) as counter, torch.inference_mode():
                look(self.pixels([Image.new("RGB", (32, 32))]))
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
        return counter.get_total_flops(), sum(p.numel() * p.element_size() for p in weights.parameters())


def first_line(error: Exception) -> str:
    """What an error of another package says first, short enough for a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
