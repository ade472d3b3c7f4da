"""CLIP on the server: image and text features in one space, zero-shot classification (Radford et al., 2021)."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from mllmfl_lite.data.names import with_article
from mllmfl_lite.data.pictures import as_pil
from mllmfl_lite.teachers.base import Images, Teacher, check_names, check_request, join_batches, loading, read_settings

TEMPLATES = ("a photo of {}.", "a small photo of {}.", "a picture of {}.")


class ClipTeacher(Teacher):
    """A CLIP with its tokenizer and preprocessing (PIL image -> tensor (3, H, W)), all of `open_clip`."""

    family = "clip"

    def __init__(self, name: str, model: Any, tokenizer: Any, preprocess: Any, device: torch.device, **more: Any):
        super().__init__(name, model, device, **more)
        self.tokenizer, self.preprocess, self.encoder = tokenizer, preprocess, model.visual

    def asked(self, names: Sequence[str]) -> str:
        """The prompts."""
        return "\n".join(_prompts(names))

    def pixels(self, images: Images) -> Tensor:
        """Images through open_clip's own preprocessing: float (N, 3, H, W)."""
        return torch.stack([self.preprocess(as_pil(image)) for image in images]).to(self.device)

    def features(self, images: Images) -> Tensor:
        """Image features of unit length, float32 (N, D)."""
        return self._each_batch(images, lambda x: self.model.encode_image(x, normalize=True))

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Text features of unit length, float32 (M, D); long texts are cut at the context length."""

        def work(batch: Sequence[str]) -> Tensor:
            return self.model.encode_text(self.tokenizer(list(batch)).to(self.device), normalize=True).float().cpu()

        return join_batches(texts, 256, work)

    def class_features(self, names: Sequence[str]) -> Tensor:
        """The mean text feature of each class's prompts, unit length, float32 (C, D): Radford et al., section 3.1."""
        classes = self.text_features(_prompts(names)).view(len(names), len(TEMPLATES), -1).mean(1)
        return classes / classes.norm(dim=1, keepdim=True)

    def class_logits(self, images: Images, names: Sequence[str]) -> Tensor:
        """Similarities to each class's mean prompt times CLIP's learned scale (100 for OpenAI's), float32 (N, C)."""
        classes = self.class_features(names)
        return self.model.logit_scale.exp().item() * self.features(images) @ classes.T


def _prompts(names: Sequence[str]) -> list[str]:
    return [template.format(with_article(name)) for name in check_names(names) for template in TEMPLATES]


def load_clip(
    name: str = "tiny_clip", pretrained: str | None = None, device: str = "auto", batch_size: int = 256
) -> ClipTeacher:
    """Load a CLIP by open_clip, from this machine: nothing is downloaded.

    `name` is the bundled stand-in ``"tiny_clip"``, a folder with ``open_clip_config.json``, or an open_clip name.
    `pretrained` is open_clip's tag, or a file of weights; it may follow the name: ``"ViT-B-32-quickgelu:openai"``.

    Raises:
        ValueError: no such model, or its weights are not here or do not fit.
    """
    import open_clip  # slow

    name, place = check_request(name, device, batch_size)
    folder = Path(name)
    if folder.is_dir():
        where, tag, settings = f"local-dir:{name}", None, read_settings(folder)
    else:
        where, tag = (name, pretrained) if pretrained else name.partition(":")[::2]
        settings = str(open_clip.get_model_config(where))
    logging.getLogger("open_clip").setLevel(logging.ERROR)
    advice = "Give a folder with open_clip_config.json and weights, or a name and tag with weights in the hub's cache"
    with loading(f"the CLIP {name!r} (setting `clip`) cannot be loaded", advice):
        if tag is not None:
            _require_weights(where, tag, open_clip.get_pretrained_cfg(where, tag))
        model, _, preprocess = open_clip.create_model_and_transforms(where, pretrained=tag, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(where)
    settings += str(open_clip.get_model_preprocess_cfg(model))
    return ClipTeacher(name, model, tokenizer, preprocess, place, batch_size=batch_size, settings=settings)


def _require_weights(where: str, tag: str, config: dict) -> None:
    """Raise `ValueError` if open_clip does not know the weights, or would have to download them."""
    repository, file = os.path.split(config.get("hf_hub", ""))
    files = [file, "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors"]
    if not config and not Path(tag).is_file():
        raise ValueError(f"open_clip knows no model {where!r} with weights {tag!r}")
    if repository and not any(isinstance(try_to_load_from_cache(repository, name), str) for name in files if name):
        raise ValueError(f"its weights are not on this machine; fetch them once: hf download {repository}")
