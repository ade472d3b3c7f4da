"""CLIP on the server: image and text features in one space, zero-shot classification (Radford et al., 2021)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from mllmfl_lite.data.names import spoken, with_article
from mllmfl_lite.data.pictures import as_pil
from mllmfl_lite.repro import pick_device
from mllmfl_lite.teachers.base import BUNDLED, Teacher, first_line, folder_settings

TEMPLATES = ("a photo of {}.", "a small photo of {}.", "a picture of {}.")


class ClipTeacher(Teacher):
    """A CLIP of `open_clip`.

    Args:
        name: what was asked for.
        model: the CLIP.
        tokenizer: open_clip's.
        preprocess: PIL image -> tensor (3, H, W).
        device: where it runs.
        batch_size: images at a time.
        settings: see `Teacher`.
    """

    def __init__(self, name, model, tokenizer, preprocess, device, batch_size: int = 256, settings: str = ""):
        super().__init__(name, model, device, batch_size, settings)
        self.tokenizer, self.preprocess = tokenizer, preprocess

    def pixels(self, images: Sequence) -> Tensor:
        """Images through open_clip's own preprocessing: float (N, 3, H, W)."""
        return torch.stack([self.preprocess(as_pil(image)) for image in images]).to(self.device)

    def features(self, images: Sequence) -> Tensor:
        """Image features of unit length, float32 (N, D)."""
        return self._each_batch(images, lambda x: self.model.encode_image(x, normalize=True))

    def tokens(self, images: Sequence) -> Tensor:
        """The last feature map of the image encoder as visual tokens, float32 (N, P, D)."""

        def work(x: Tensor) -> Tensor:
            out = self.model.forward_intermediates(x, image_indices=1, intermediates_only=True)
            return out["image_intermediates"][-1].flatten(2).transpose(1, 2)

        return self._each_batch(images, work)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Text features of unit length, float32 (M, D)."""
        with torch.inference_mode():
            parts = [
                self.model.encode_text(self.tokenizer(list(texts[i : i + 256])).to(self.device), normalize=True)
                for i in range(0, len(texts), 256)
            ]
        return torch.cat(parts).float().cpu()

    def class_features(self, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
        """The mean text feature of each class's prompts, unit length, float32 (C, D): Radford et al., section 3.1."""
        prompts = [t.format(with_article(spoken(name))) for name in names for t in templates]
        classes = self.text_features(prompts).view(len(names), len(templates), -1).mean(1)
        return classes / classes.norm(dim=1, keepdim=True)

    def class_logits(self, images: Sequence, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
        """Similarities to each class's mean prompt times CLIP's learned scale (100 for OpenAI's), float32 (N, C)."""
        return self.model.logit_scale.exp().item() * self.features(images) @ self.class_features(names, templates).T

    def class_probabilities(
        self, images: Sequence, names: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> Tensor:
        """Zero-shot classification: softmax of `class_logits`, float32 (N, C)."""
        return self.class_logits(images, names, templates).softmax(1)

    def image_cost(self) -> tuple[int, int]:
        """Floating-point operations of the image encoder on one image, and the bytes of its weights."""
        return self._cost(self.model.encode_image, self.model.visual)

    def similarity(self, images: Sequence, texts: Sequence[str]) -> Tensor:
        """Cosine of each image with its own text, float32 (N,); long texts are cut at the context length."""
        if len(images) != len(texts):
            raise ValueError(f"one text an image: {len(images)} images, {len(texts)} texts")
        return (self.features(images) * self.text_features(texts)).sum(1)


def load_clip(
    name: str = "tiny_clip", pretrained: str | None = None, device: str = "auto", batch_size: int = 256
) -> ClipTeacher:
    """Load a CLIP by open_clip, from this machine: nothing is downloaded.

    Args:
        name: the bundled stand-in ``"tiny_clip"``, a folder with ``open_clip_config.json``, or an open_clip name.
        pretrained: open_clip's tag of the weights, e.g. ``"openai"``; not for folders. It may follow the name:
            ``"ViT-B-32-quickgelu:openai"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        batch_size: images at a time.

    Raises:
        ValueError: no such model, or its weights are not here.
    """
    import open_clip  # slow

    name = BUNDLED.get(name.strip(), name.strip())
    place = pick_device(device)
    where = f"local-dir:{name}" if Path(name).is_dir() else name
    if where == name and not pretrained:
        where, _, pretrained = name.partition(":")
    try:
        logging.getLogger("open_clip").setLevel(logging.ERROR)
        if where == name.partition(":")[0]:
            _require_cached(open_clip.get_pretrained_cfg(where, pretrained), where, pretrained)
        model, _, preprocess = open_clip.create_model_and_transforms(
            where, pretrained=pretrained or None, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(where)
    except Exception as error:
        raise ValueError(
            f"the CLIP {name!r} (setting `clip`) cannot be loaded: {first_line(error)}. Give a folder with "
            "open_clip_config.json and weights, or an open_clip name and tag with weights in the Hugging Face cache"
        ) from error
    settings = folder_settings(Path(name)) if Path(name).is_dir() else f"{open_clip.get_model_config(where)}"
    return ClipTeacher(name, model, tokenizer, preprocess, place, batch_size, f"{settings}\n{preprocess}")


def _require_cached(config: dict, name: str, pretrained: str | None) -> None:
    """Raise `ValueError` if open_clip would have to download the weights."""
    repository = config.get("hf_hub", "").strip("/")
    if not config:
        raise ValueError(f"open_clip knows no model {name!r} with weights {pretrained!r}")
    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
    if repository and not any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        raise ValueError(f"its weights are not on this machine; fetch them once: hf download {repository}")
