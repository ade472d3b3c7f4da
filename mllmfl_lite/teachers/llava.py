"""A multimodal LLM of the LLaVA family on the server: tokens, answers, likelihoods; and its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch import Tensor
from torch.nn.functional import log_softmax

from mllmfl_lite.data.names import spoken
from mllmfl_lite.data.pictures import as_pil
from mllmfl_lite.repro import pick_device, shows_progress
from mllmfl_lite.teachers.base import BUNDLED, Teacher, first_line, folder_settings
from mllmfl_lite.teachers.prompts import load_prompts


class MllmTeacher(Teacher):
    """A multimodal LLM of the LLaVA family in `transformers`: vision tower, projector, language model.

    Args:
        name: what was asked for.
        model: a `LlavaForConditionalGeneration` or a class with its `get_image_features`.
        processor: its processor, with a chat template.
        device: where it runs.
        batch_size: images at a time.
        settings: see `Teacher`.
    """

    def __init__(self, name, model, processor, device, batch_size: int = 64, settings: str = ""):
        super().__init__(name, model, device, batch_size, settings)
        self.processor = processor

    def images_at_once(self, names: Sequence[str]) -> int:
        """Images in a batch: each is scored with every name."""
        return max(1, self.batch_size // max(1, len(names)))

    def pixels(self, images: Sequence) -> Tensor:
        """Images through the model's own image processor: (N, 3, H, W) in the model's precision."""
        x = self.processor.image_processor(images=[as_pil(image) for image in images], return_tensors="pt")
        return x["pixel_values"].to(self.device, self.model.dtype)

    def tokens(self, images: Sequence) -> Tensor:
        """Patch tokens of the vision tower, as the projector is given them, float32 (N, P, D)."""
        config = self.model.config

        def work(x: Tensor) -> Tensor:
            hidden = self.model.model.vision_tower(x, output_hidden_states=True).hidden_states
            layers = config.vision_feature_layer
            chosen = [hidden[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
            start = 1 if config.vision_feature_select_strategy == "default" else 0  # without the class token
            return torch.cat([tokens[:, start:] for tokens in chosen], dim=-1)

        return self._each_batch(images, work)

    def features(self, images: Sequence) -> Tensor:
        """The mean over the patch tokens, of unit length, float32 (N, D)."""
        pooled = self.tokens(images).mean(1)
        return pooled / pooled.norm(dim=1, keepdim=True)

    def chat(self, prompt: str) -> str:
        """A prompt about one picture in the form that the model was trained on."""
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        return self.processor.apply_chat_template(turn, add_generation_prompt=True)

    def inputs(self, images: Sequence, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Model inputs for pictures and prompts, padded on the left."""
        batch = self.processor(
            images=[as_pil(image) for image in images],
            text=[self.chat(prompt) for prompt in prompts],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.device)
        batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
        return batch

    def question_ids(self, prompt: str) -> list[int]:
        """The ids of a question about one picture: chat, the picture's places, the prompt."""
        return self.inputs([Image.new("RGB", (64, 64))], [prompt])["input_ids"][0].tolist()

    def answer_ids(self, text: str) -> list[int]:
        """The ids of an answer as the model itself would write it, its end included."""
        tokenizer = self.processor.tokenizer
        ids = [*tokenizer(f" {text}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        # SentencePiece writes a leading space as a token of its own, which a chat model does not answer with
        return ids[1:] if len(ids) > 2 and not tokenizer.decode(ids[:1]).strip() else ids

    def answer_log_likelihoods(self, images: Sequence, answers: Sequence[str], prompt: str) -> Tensor:
        """Log-probability of each answer, its end included, after the prompt: float32 (N, A), in nats.

        The picture and the prompt pass through the model once; each answer continues from that cache.
        """
        tokenizer = self.processor.tokenizer
        rows = [self.answer_ids(answer) for answer in answers]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows], device=self.device)
        real = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows], device=self.device)
        at_once = self.images_at_once(answers)
        with torch.inference_mode():
            parts = [
                self._score(self.inputs(images[i : i + at_once], [prompt] * len(images[i : i + at_once])), ids, real)
                for i in range(0, len(images), at_once)
            ]
        return torch.cat(parts)

    def _score(self, inputs: dict[str, Tensor], ids: Tensor, real: Tensor) -> Tensor:
        first = self.model(**inputs, use_cache=True)
        count, answers = len(inputs["input_ids"]), len(ids)
        cached = "cache" if "cache" in first else "past_key_values"  # its name before transformers 5.24
        first[cached].batch_repeat_interleave(answers)
        every = ids.repeat(count, 1)  # (count * answers, T)
        seen = inputs["attention_mask"].repeat_interleave(answers, 0)
        rest = self.model(
            input_ids=every[:, :-1],
            attention_mask=torch.cat([seen, torch.ones_like(every[:, :-1])], 1),
            **{cached: first[cached]},
        )
        before = torch.cat([first.logits[:, -1:].repeat_interleave(answers, 0), rest.logits], 1)
        scores = log_softmax(before.float(), -1).gather(2, every[..., None])[..., 0]
        return (scores * real.repeat(count, 1)).sum(1).view(count, answers).cpu()

    def class_probabilities(self, images: Sequence, names: Sequence[str], prompt: str | None = None) -> Tensor:
        """Likelihoods of the class names as the model's answer, normalised: float32 (N, C).

        Our reading of "under the supervision of the MLLM": the likelihood of the whole name, its end included.
        """
        prompt = prompt or load_prompts()["class_name"]
        return self.answer_log_likelihoods(images, [spoken(name) for name in names], prompt).softmax(1)


def load_mllm(name: str = "tiny_llava", device: str = "auto", dtype: str = "auto", batch_size: int = 64) -> MllmTeacher:
    """Load a LLaVA by transformers, from this machine: nothing is downloaded, code from its folder never runs.

    Args:
        name: the bundled stand-in ``"tiny_llava"``, a folder, or a hub name such as ``"llava-hf/llava-1.5-7b-hf"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``; ``"auto"``: what the weights were saved in.
        batch_size: images at a time.

    Raises:
        ValueError: it is not here, is no such model, lacks a setting, or asks to run its own code.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor  # slow
    from transformers.utils import logging as bars

    if not shows_progress():
        bars.disable_progress_bar()
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16'; got {dtype!r}")
    name, place = BUNDLED.get(name.strip(), name.strip()), pick_device(device)
    folder = _find(name)
    _refuse_code(folder)
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            trust_remote_code=False,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ValueError(
            f"the MLLM {name!r} (setting `mllm`) cannot be loaded: {first_line(error)}. Give a folder with its "
            f"config.json and safetensors, or fetch it again: hf download {name}"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"the MLLM {name!r} lacks {len(missing)} of its weights, such as {missing[0]}; fetch it again")
    _require_settings(folder, model, processor)
    return MllmTeacher(name, model, processor, place, batch_size, folder_settings(folder))


def _find(name: str) -> Path:
    """The folder of a model, or of its snapshot in the Hugging Face cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError as error:
        raise ValueError(f"the MLLM {name!r} (setting `mllm`) is no folder and no name of the hub ({error})") from error
    if not isinstance(found, str):
        raise ValueError(
            f"the MLLM {name!r} (setting `mllm`) is no folder, and not in the Hugging Face cache; fetch it once on a "
            f"connected machine: hf download {name}"
        )
    return Path(found).parent


def _refuse_code(folder: Path) -> None:
    """Raise `ValueError` if a model's folder wants its own Python code to be run."""
    for path in sorted(folder.glob("*.json")):
        if b'"auto_map"' in path.read_bytes():
            raise ValueError(
                f"{path} asks to run code from its own folder (auto_map); that is refused, whatever the code is. "
                "Use a model whose class is part of transformers"
            )


def _require_settings(folder: Path, model, processor) -> None:
    """Raise `ValueError` if a setting is absent without which the model fails later, inside."""
    wanted = {
        "patch_size in processor_config.json": getattr(processor, "patch_size", None),
        "chat_template (chat_template.jinja, or in processor_config.json)": processor.chat_template,
        "eos_token_id in generation_config.json": model.generation_config.eos_token_id,
        "eos_token in tokenizer_config.json": processor.tokenizer.eos_token_id,
        "image_token_index in config.json": getattr(model.config, "image_token_index", None),
    }
    if absent := [key for key, value in wanted.items() if value is None]:
        raise ValueError(f"{folder} has no {'; no '.join(absent)}; add it, as the model's authors give it")
