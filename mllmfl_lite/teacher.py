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
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import filelock
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils.flop_counter import FlopCounterMode

from mllmfl_lite.captions import spoken, with_article
from mllmfl_lite.data import ImageSet
from mllmfl_lite.repro import pick_device, progress_bar, somebody_looks, write_atomically, write_json

ASSETS = Path(__file__).parent / "assets"
BUNDLED = {name: str(ASSETS / name) for name in ("tiny_clip", "tiny_llava")}  # the stand-ins, by their short names
TINY_CLIP, TINY_LLAVA = BUNDLED.values()
TEMPLATES = ("a photo of {}.", "a small photo of {}.", "a picture of {}.")
CHUNK = 1024  # images in one file of stored features


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


class ClipTeacher(Teacher):
    """A CLIP of `open_clip`: two encoders that put pictures and sentences into one space (Radford et al., 2021).

    Args:
        name: what was asked for.
        model: the CLIP.
        tokenizer: open_clip's tokenizer for it.
        preprocess: PIL image -> tensor (3, H, W).
        device: where it runs.
        batch_size: images at a time.
    """

    def __init__(self, name, model, tokenizer, preprocess, device, batch_size: int = 256):
        super().__init__(name, model, device, batch_size)
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
        from mllmfl_lite.annotate import load_prompts

        prompt = prompt or load_prompts()["class_name"]
        return self.answer_log_likelihoods(images, [spoken(name) for name in names], prompt).softmax(1)


def as_pil(image) -> Image.Image:
    """A picture of either kind, uint8 array (H, W, 3) or PIL image, as a PIL image."""
    return image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))


# ------------------------------------------------------------------------------------------------------- loading


def load_clip(
    name: str = "tiny_clip", pretrained: str | None = None, device: str = "auto", batch_size: int = 256
) -> ClipTeacher:
    """A CLIP by `open_clip.create_model_and_transforms`.

    Args:
        name: the bundled stand-in ``"tiny_clip"``, a folder with ``open_clip_config.json``, or an open_clip name.
        pretrained: open_clip's tag of the weights, e.g. ``"openai"``; not for folders. It may also follow the name:
            ``"ViT-B-32-quickgelu:openai"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        batch_size: images at a time.

    Raises:
        TeacherError: no such model, or its weights are not here and cannot be fetched.
    """
    import open_clip

    name = BUNDLED.get(name, name)
    where = f"local-dir:{name}" if Path(name).is_dir() else name
    if where == name and not pretrained:
        where, _, pretrained = name.partition(":")
    try:
        logging.getLogger("open_clip").setLevel(logging.ERROR)
        model, _, preprocess = open_clip.create_model_and_transforms(
            where, pretrained=pretrained or None, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(where)
    except Exception as error:
        raise TeacherError(
            f"the CLIP {name!r} (parameter `clip`) cannot be loaded: {first_line(error)}. Give a folder that holds an "
            "open_clip_config.json with its weights, or an open_clip name with `pretrained` whose weights were fetched "
            "once on a connected machine (open_clip keeps them in the Hugging Face cache)"
        ) from error
    return ClipTeacher(name, model, tokenizer, preprocess, pick_device(device), batch_size)


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

    if not somebody_looks():
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


def first_line(error: Exception) -> str:
    """What an error of another package says first, short enough for a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


# ------------------------------------------------------------------------------------------- features on the disk


class StoredFeatures:
    """Features or tokens of a data set, computed once, read by index: ``stored[indices]`` -> float16 (B, ...).

    One file holds 1,024 images, written whole or not at all, so that a killed run goes on where it was. Files are
    mapped, not loaded. The folder's name is made of the data's checksum and the model's, so that no other images' or
    model's numbers are ever read.

    Args:
        teacher: computes what is missing.
        what: ``"features"`` or ``"tokens"``.
        data: the images.
        folder: where features are kept.

    Raises:
        ValueError: no such thing to store; when read, an index beyond the data.
        TeacherError: when read, a file is damaged or belongs to another model or other images.
    """

    def __init__(self, teacher: Teacher, what: str, data: ImageSet, folder: str | Path):
        if what not in ("features", "tokens"):
            raise ValueError(f"what is 'features' or 'tokens'; got {what!r}")
        self.teacher, self.what, self.data = teacher, what, data
        self._key = {"model": teacher.identity, "data": data.checksum(), "what": what}
        images = f"{data.origin.replace('/', '-')}-{self._key['data'][:12]}"
        self.place = Path(folder) / images / f"{teacher.identity}-{what}"
        self._open: dict[int, np.ndarray] = {}

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices)
        if not len(indices):
            return np.empty((0,), np.float16)
        if not 0 <= indices.min() <= indices.max() < len(self.data):
            raise ValueError(
                f"indices must lie in 0..{len(self.data) - 1}; these run from {indices.min()} to {indices.max()}"
            )
        self._compute(sorted({int(c) for c in indices // CHUNK} - set(self._open)))
        out = None
        for c in np.unique(indices // CHUNK).tolist():
            mine = np.flatnonzero(indices // CHUNK == c)
            out = np.empty((len(indices), *self._open[c].shape[1:]), np.float16) if out is None else out
            out[mine] = self._open[c][indices[mine] % CHUNK]
        return out

    def _compute(self, chunks: list[int]) -> None:
        """Open these files; compute those that are not there."""
        if not chunks:
            return
        self.place.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.place / ".lock"):
            self._same_key()
            missing = [c for c in chunks if not self._path(c).exists()]
            with progress_bar(len(missing) * CHUNK, "images", self.what) as bar:
                for c in missing:
                    values = getattr(self.teacher, self.what)(self.data.images[c * CHUNK : (c + 1) * CHUNK])
                    write_atomically(self._path(c), _as_npy(values.half().numpy()))
                    bar.update(CHUNK)
        for c in chunks:
            self._open[c] = _read_npy(self._path(c), min(CHUNK, len(self.data) - c * CHUNK))

    def _same_key(self) -> None:
        """The folder's name could have been given by hand: what made its files is written inside, too."""
        made_by = self.place / "made_by.json"
        if not made_by.exists():
            write_json(made_by, self._key)
        elif (found := json.loads(made_by.read_text())) != self._key:
            other = "; ".join(f"{k}: {found.get(k)}, now {v}" for k, v in self._key.items() if found.get(k) != v)
            raise TeacherError(
                f"{self.place} holds features of another origin ({other}); remove the folder, and they are computed "
                "again, or name another one"
            )

    def _path(self, chunk: int) -> Path:
        return self.place / f"{chunk:05d}.npy"


def stored(
    teacher: Teacher, what: str, data: ImageSet, folder: str | Path, indices: np.ndarray | None = None
) -> np.ndarray:
    """All of them at once: float16 (len(indices), ...), in the order of `indices`, by default of the data.

    Raises:
        ValueError: as `StoredFeatures`.
        TeacherError: as `StoredFeatures`.
    """
    return StoredFeatures(teacher, what, data, folder)[np.arange(len(data)) if indices is None else indices]


def _as_npy(values: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def _read_npy(path: Path, length: int) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise TeacherError(f"{path} is damaged ({error}); remove it, and it is computed again") from error
    if len(values) != length:
        raise TeacherError(f"{path} holds {len(values)} images, not {length}; remove it, and it is computed again")
    return values
