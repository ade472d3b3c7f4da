"""A multimodal LLM of the LLaVA family on the server: tokens, answers, likelihoods."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence

from mllmfl_lite.data.pictures import as_pil
from mllmfl_lite.repro import shows_progress
from mllmfl_lite.teachers.base import Images, Teacher, check_names, check_request, join_batches, loading, read_settings
from mllmfl_lite.teachers.prompts import load_prompts

NEEDED = (  # files of a folder
    "config.json",
    "processor_config.json or preprocessor_config.json",
    "tokenizer.json or tokenizer.model or vocab.json",
    "*.safetensors",
)


class MllmTeacher(Teacher):
    """A `LlavaForConditionalGeneration`, or a class with its parts, and its processor with a chat template."""

    family = "llava"

    def __init__(self, name: str, model: Any, processor: Any, device: torch.device, **more: Any):
        super().__init__(name, model, device, **more)
        self.processor = processor

    def asked(self, names: Sequence[str]) -> str:
        """The prompt, and the names as they are said."""
        return "\n".join([load_prompts()["class_name"], *check_names(names)])

    def images_at_once(self, names: Sequence[str]) -> int:
        """Images in a batch: each is scored with every name."""
        return max(1, self.batch_size // max(1, len(names)))

    def pixels(self, images: Images) -> Tensor:
        """Images through the model's own image processor: (N, 3, H, W) in the model's precision."""
        x = self.processor.image_processor(images=[as_pil(image) for image in images], return_tensors="pt")
        return x["pixel_values"].to(self.device, self.model.dtype)

    def tokens(self, images: Images) -> Tensor:
        """Patch tokens of the vision tower, as the projector is given them, float32 (N, P, D)."""
        config = self.model.config

        def work(x: Tensor) -> Tensor:
            hidden = self.model.model.vision_tower(x, output_hidden_states=True).hidden_states
            layers = config.vision_feature_layer
            chosen = [hidden[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
            start = 1 if config.vision_feature_select_strategy == "default" else 0  # without the class token
            return torch.cat([tokens[:, start:] for tokens in chosen], dim=-1)

        return self._each_batch(images, work)

    def chat(self, prompt: str) -> str:
        """A prompt about one image in the form that the model was trained on."""
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        return self.processor.apply_chat_template(turn, add_generation_prompt=True)

    def inputs(self, images: Images, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Model inputs for images and prompts, padded on the left."""
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
        """The ids of a question about one image: chat, the image's places, the prompt."""
        return self.inputs([Image.new("RGB", (64, 64))], [prompt])["input_ids"][0].tolist()

    def answer_ids(self, text: str) -> list[int]:
        """The ids of an answer as the model itself would write it, its end included."""
        tokenizer = self.processor.tokenizer
        ids = [*tokenizer(f" {text}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        # SentencePiece writes a leading space as a token of its own, which a chat model does not answer with
        return ids[1:] if len(ids) > 2 and not tokenizer.decode(ids[:1]).strip() else ids

    def answer_log_likelihoods(self, images: Images, answers: Sequence[str], prompt: str) -> Tensor:
        """Log-probability of each answer, its end included, after the prompt: float32 (N, A), in nats.

        Image and prompt pass through the model once; each answer continues from that cache.
        """
        rows = [torch.tensor(self.answer_ids(answer), device=self.device) for answer in answers]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.processor.tokenizer.eos_token_id)
        real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)

        def work(batch: Images) -> Tensor:
            return self._score(self.inputs(batch, [prompt] * len(batch)), ids, real)

        return join_batches(images, self.images_at_once(answers), work)

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

    def class_logits(self, images: Images, names: Sequence[str]) -> Tensor:
        """Log-likelihoods of the class names as the model's answer, float32 (N, C), in nats.

        Our reading of "under the supervision of the MLLM": the likelihood of the whole name, its end included.
        """
        return self.answer_log_likelihoods(images, check_names(names), load_prompts()["class_name"])


def load_mllm(name: str = "tiny_llava", device: str = "auto", dtype: str = "auto", batch_size: int = 64) -> MllmTeacher:
    """Load a LLaVA by transformers, from this machine: nothing is downloaded, code from its folder never runs.

    `name` is the bundled stand-in ``"tiny_llava"``, a folder, or a hub name such as ``"llava-hf/llava-1.5-7b-hf"``.
    `dtype` is ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: what the weights were saved in.

    Raises:
        ValueError: it is not here, is no such model, lacks weights or a setting, or asks to run its own code.
    """
    name, place = check_request(name, device, batch_size)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16'; got {dtype!r}")
    who = f"the MLLM {name!r} (setting `mllm`)"
    folder = _find(name, who)
    settings = read_settings(folder)
    teacher = MllmTeacher(name, *_load(who, folder, dtype), place, batch_size=batch_size, settings=settings)
    _ask_once(folder, teacher)
    return teacher


def _find(name: str, who: str) -> Path:
    """The folder of a model, or of its snapshot in the Hugging Face cache."""
    folder, fetch = Path(name), f"fetch it once on a connected machine: hf download {name}"
    if not folder.is_dir():
        with loading(f"{who} is no folder and no hub name with files in the cache; {fetch}"):
            folder = Path(snapshot_download(name, local_files_only=True))
    for files in NEEDED:
        if not any(path for pattern in files.split(" or ") for path in folder.glob(pattern)):
            raise ValueError(f"{who} has no {files} in {folder}; take it from the model's authors, or {fetch}")
    return folder


def _load(who: str, folder: Path, dtype: str) -> tuple[Any, Any]:
    """The model and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor  # slow
    from transformers.utils import logging as bars

    if not shows_progress():
        bars.disable_progress_bar()
    named_below = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    with loading(f"{who} cannot be loaded from {folder}"):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, trust_remote_code=False, dtype=dtype, use_safetensors=True, **named_below
        )
    model, report = loaded
    wrong = [*sorted(report["missing_keys"]), *sorted(key for key, *_ in report["mismatched_keys"])]
    if wrong:
        lost = ", ".join(wrong)[:300]
        raise ValueError(f"the weights in {folder} lack, or have in another size than config.json asks for: {lost}")
    return model, processor


def _ask_once(folder: Path, teacher: MllmTeacher) -> None:
    """Raise `ValueError` if a setting is absent, or a question has not as many places as an image has visual tokens."""
    config, tokenizer = teacher.model.config, getattr(teacher.processor, "tokenizer", None)
    wanted = {
        "patch_size in processor_config.json": getattr(teacher.processor, "patch_size", None),
        "chat_template in chat_template.jinja": getattr(teacher.processor, "chat_template", None),
        "eos_token_id in generation_config.json": teacher.model.generation_config.eos_token_id,
        "eos_token in tokenizer_config.json": getattr(tokenizer, "eos_token_id", None),
        "pad_token in tokenizer_config.json": getattr(tokenizer, "pad_token_id", None),
        "image_token_index in config.json": getattr(config, "image_token_index", None),
    }
    if absent := [key for key, value in wanted.items() if value is None]:
        raise ValueError(f"{folder} has no {'; no '.join(absent)}; add it, as the model's authors give it")
    files = "processor_config.json, chat_template.jinja and config.json (vision_feature_layer)"
    with loading(f"{folder} cannot be asked about an image", f"Compare {files} with those of the model's authors"):
        places = teacher.question_ids("What is it?").count(config.image_token_index)
        given = teacher.tokens([Image.new("RGB", (64, 64))]).shape[1]
    if places != given:
        raise ValueError(
            f"{folder}: a question has {places} places for {given} visual tokens. Correct patch_size, "
            "num_additional_image_tokens or vision_feature_select_strategy in processor_config.json, or "
            "image_token_index in config.json"
        )
