"""What all frozen teachers share: batches, an identity, and checks of names and of a model's folder."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mllmfl_lite.data.images import ImageFiles
from mllmfl_lite.data.names import spoken
from mllmfl_lite.repro import ASSETS, pick_device

BUNDLED = {name: str(ASSETS / name) for name in ("tiny_clip", "tiny_llava")}  # the stand-ins, by their short names
TINY_CLIP, TINY_LLAVA = BUNDLED.values()
Images = np.ndarray | ImageFiles | Sequence[Image.Image]  # an array is uint8 (N, H, W, 3)
# what changes an answer in a model's folder, besides the weights
SETTINGS = ("*config.json", "*token*", "vocab*", "merges*", "*.model", "*chat_template*", "*/*.jinja")


class Teacher:
    """A frozen model on the server. `settings`, as text, is what else changes its answers; part of its identity."""

    family: str
    pixels: Callable[[Images], Tensor]  # as this model wants them: float (N, 3, H, W), on its device
    class_logits: Callable[[Images, Sequence[str]], Tensor]  # a score of each class name: float32 (N, C)

    def __init__(self, name: str, model: Any, device: torch.device, batch_size: int = 64, settings: str = ""):
        self.name, self.device, self.batch_size, self.settings = name, device, batch_size, settings
        self.model = model.to(device).eval().requires_grad_(False)
        self.encoder: torch.nn.Module = self.model  # what an image passes through

    @functools.cached_property
    def identity(self) -> str:
        """Family, and a checksum of weights, precision and settings, as ``"llava-1f0c2a..."``; no path, no device."""
        digest = hashlib.sha256(self.settings.encode())
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return f"{self.family}-{digest.hexdigest()[:12]}"

    def asked(self, names: Sequence[str]) -> str:
        """What the model is asked in order to score these class names, as text: part of the cache's key."""
        return "\n".join(names)

    def images_at_once(self, names: Sequence[str]) -> int:
        """Images in a batch when class names are scored."""
        return self.batch_size

    def class_probabilities(self, images: Images, names: Sequence[str]) -> Tensor:
        """Softmax of `class_logits`: the probability of each name if it must be one of these, float32 (N, C)."""
        return self.class_logits(images, names).softmax(1)

    def image_cost(self) -> tuple[int, int]:
        """Floating-point operations of the image encoder on one image, and the bytes of its weights."""
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # torch does not count inside a fused attention layer
        try:
            with FlopCounterMode(display=False) as counter, torch.inference_mode():
                self.encoder(self.pixels([Image.new("RGB", (32, 32))]))
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
        return counter.get_total_flops(), sum(p.numel() * p.element_size() for p in self.encoder.parameters())

    def _each_batch(self, images: Images, work: Callable[[Tensor], Tensor]) -> Tensor:
        return join_batches(images, self.batch_size, lambda batch: work(self.pixels(batch)).float().cpu())


def join_batches(given: Any, size: int, work: Callable[[Any], Tensor]) -> Tensor:
    """Apply `work` to `size` images or texts at a time and join what it returns."""
    if not len(given):
        raise ValueError("there are no images or texts; give at least one")
    with torch.inference_mode():
        return torch.cat([work(given[i : i + size]) for i in range(0, len(given), size)])


def check_request(name: str, device: str, batch_size: int) -> tuple[str, torch.device]:
    """Check what a loader is given, before it loads: the name (stripped, short names as paths), and the device."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if not name.strip():
        raise ValueError("the name of a model is empty; give a folder, a hub name or a bundled stand-in")
    return str(Path(BUNDLED.get(name.strip(), name.strip())).expanduser()), pick_device(device)


def check_names(names: Sequence[str]) -> list[str]:
    """The class names as they are said; `ValueError` unless there is at least one, none empty and none twice."""
    said = [spoken(name).strip() for name in names]
    if isinstance(names, str) or not said or "" in said or len(set(said)) < len(said):
        raise ValueError(f"class names must be a list, none of them empty, each once; got {list(names)!r:.200}")
    return said


def read_settings(folder: Path) -> str:
    """Checksums of the files in a model's folder that may change an answer, weights apart.

    A file that is no JSON, or that asks to run code from the folder, is a `ValueError`.
    """
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            json.loads(path.read_text(encoding="utf-8"), object_hook=_refuse_code)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be used: {error}") from error
    files = sorted({path for pattern in SETTINGS for path in folder.glob(pattern) if path.is_file()})
    return "\n".join(f"{p.relative_to(folder).as_posix()} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in files)


def _refuse_code(values: dict) -> dict:
    if isinstance(values.get("auto_map"), (str, list, dict)):  # a number: a word of a vocabulary
        raise ValueError("it asks to run code from its own folder (auto_map), which is refused; use another model")
    return values


@contextmanager
def loading(failure: str, advice: str = "") -> Iterator[None]:
    """Forbid downloads from the Hugging Face hub, and turn another package's error into a `ValueError` of one line."""
    was, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    except Exception as error:
        reason = (" ".join(str(error).split())[:300] or type(error).__name__).rstrip(".")
        raise ValueError(f"{failure}: {reason}" + (f". {advice}" if advice else "")) from error
    finally:
        constants.HF_HUB_OFFLINE = was
