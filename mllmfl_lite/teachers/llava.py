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

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import log_softmax

from mllmfl_lite.data.names import spoken
from mllmfl_lite.data.pictures import as_pil
from mllmfl_lite.repro import pick_device, shows_progress
from mllmfl_lite.stages.records import AnnotationError
from mllmfl_lite.teachers.base import ASSETS, BUNDLED, Teacher, TeacherError, first_line


class MllmTeacher(Teacher):
    """A multimodal LLM of the LLaVA family in `transformers`: vision tower, projector, language model.

    Args:
        name: what was asked for.
        model: a `LlavaForConditionalGeneration` or a class with its `get_image_features`.
        processor: its processor, with a chat template.
        device: where it runs.
        batch_size: images at a time.
    """

    def __init__(self, name, model, processor, device, batch_size: int = 64):
        super().__init__(name, model, device, batch_size)
        self.processor = processor

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
        at_once = max(1, self.batch_size // len(rows))
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
        """The model's distribution over the class names as its answer, float32 (N, C): likelihoods, normalised.

        Our reading of "under the supervision of the MLLM": the likelihood of the whole name, its end included.
        """
        from mllmfl_lite.teachers.llava import load_prompts

        prompt = prompt or load_prompts()["class_name"]
        return self.answer_log_likelihoods(images, [spoken(name) for name in names], prompt).softmax(1)


def load_mllm(name: str = "tiny_llava", device: str = "auto", dtype: str = "auto", batch_size: int = 64) -> MllmTeacher:
    """A LLaVA by `AutoModelForImageTextToText.from_pretrained`; code from a model's folder is never run.

    Args:
        name: the bundled stand-in ``"tiny_llava"``, a folder, or a hub name such as ``"llava-hf/llava-1.5-7b-hf"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``; ``"auto"``: what the weights were saved in.
        batch_size: images at a time.

    Raises:
        TeacherError: it is not here and cannot be fetched, is no such model, or asks to run its own code.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging as bars

    if not shows_progress():
        bars.disable_progress_bar()
    name = BUNDLED.get(name, name)
    refuse_remote_code(name)
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            name,
            trust_remote_code=False,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
        )
    except Exception as error:
        raise TeacherError(
            f"the MLLM {name!r} (parameter `mllm`) cannot be loaded: {first_line(error)}. Give a folder with its "
            f"config.json and safetensors, or fetch it once on a connected machine with `hf download {name}`"
        ) from error
    return MllmTeacher(name, model, processor, pick_device(device), batch_size)


def refuse_remote_code(name: str) -> None:
    """Raise `TeacherError` if a model's folder wants its own Python code to be run."""
    for file in ("config.json", "processor_config.json", "tokenizer_config.json", "preprocessor_config.json"):
        path = Path(name) / file
        if path.is_file() and "auto_map" in json.loads(path.read_text()):
            raise TeacherError(
                f"{path} asks to run code from its own folder (auto_map); that is refused, whatever the code is. "
                "Use a model whose class is part of transformers"
            )


PROMPTS = ASSETS / "prompts"


def load_prompts(folder: str | Path | None = None) -> dict[str, str]:
    """The prompts of a folder, one text file a kind, ``detailed_description.txt``, ...: edit them, or name another.

    Raises:
        AnnotationError: no prompt there, or an empty one.
    """
    folder = folder or PROMPTS
    prompts = {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(Path(folder).glob("*.txt"))}
    empty = [kind for kind, prompt in prompts.items() if not prompt]
    if empty or not prompts:
        raise AnnotationError(
            f"{folder} must hold a text file for each kind ({', '.join(KINDS)}), none of them empty; "
            + (f"empty: {', '.join(empty)}" if empty else "it holds none")
        )
    return prompts


def prompt_hash(prompt: str) -> str:
    """The first 16 digits of the prompt's sha256: two records with the same hash answered the same question."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


KINDS = ("conversation", "detailed_description", "complex_reasoning")
