"""tiny-clip: an `open_clip` model with its own small configuration."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from mllmfl_lite.data.batches import CHANNEL_MEAN, CHANNEL_STD, Batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.names import with_article
from mllmfl_lite.repro import numpy_generator, torch_generator
from mllmfl_lite.teachers.clip import TEMPLATES
from standins.corpus import VOCABULARY
from standins.training import Schedule, Watch, draw_batches, fit, initial_weights
from standins.words import words_for

CONFIG = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "patch_size": None},
    "text_cfg": {
        "context_length": 32,
        "vocab_size": VOCABULARY + 4,
        "width": 96,
        "heads": 4,
        "layers": 2,
        "hf_tokenizer_name": "tiny-clip",
    },
}
PREPROCESSING = {"mean": CHANNEL_MEAN, "std": CHANNEL_STD, "interpolation": "bicubic", "resize_mode": "squash"}
PROMPTS = (*TEMPLATES, "{}.", "this is {}.")


def new_clip(folder: Path, tokenizer, seed: int) -> nn.Module:
    """Write the configuration and tokenizer of tiny-clip into `folder`; return the model, untrained."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    with initial_weights(seed):
        return open_clip.create_model(f"local-dir:{folder}", load_weights=False)


def text_bank(tokenizer, texts: dict[str, list[list[str]]], names: Sequence[str], seed: int) -> Tensor:
    """Tokens of many texts for each class, of every kind: int64 (C, T, context length)."""
    rng = numpy_generator(seed, "prompts")

    def prompt(name: str) -> str:
        template, words = PROMPTS[rng.integers(len(PROMPTS))], words_for(name)
        word = words[rng.integers(len(words))]
        return template.format(with_article(word) if rng.random() < 0.8 else word)

    bank = []
    for c, name in enumerate(names):
        of_class = [prompt(name) for _ in texts["caption"][c]] + [text for kind in texts.values() for text in kind[c]]
        tokens = tokenizer(
            [" ".join(text.split()) for text in of_class],
            padding="max_length",
            truncation=True,
            max_length=CONFIG["text_cfg"]["context_length"],
            return_tensors="pt",
        )
        bank.append(tokens.input_ids)
    return torch.stack(bank)


def clip_input(x: Tensor) -> Tensor:
    """Resize normalised 32 x 32 images (B, 3, 32, 32) as tiny-clip's preprocessing does."""
    size = CONFIG["vision_cfg"]["image_size"]
    x = interpolate(x, (size, size), mode="bicubic", align_corners=False)
    return x.contiguous(memory_format=torch.channels_last)


def train_clip(
    model: nn.Module,
    data: ImageSet,
    bank: Tensor,
    schedule: Schedule,
    seed: int,
    main_share: float = 0.75,
    learn_text: bool = True,
    watch: Watch | None = None,
) -> list[float]:
    """Train tiny-clip in place: each image against one text of every class, cross-entropy over the classes.

    That is CLIP's contrastive loss with the classes' texts as the batch's texts, so that no two texts of a batch
    mean the same. The text encoder learns at every second step, or not at all: then every text is encoded once.

    Args:
        model: from `new_clip`.
        data: images with labels 0-9 (CIFAR-10) and 10-109 (CIFAR-100).
        bank: from `text_bank`.
        schedule: samples, batch, learning rate.
        seed: of batches, crops and texts.
        main_share: share of CIFAR-10 images in a batch.
        learn_text: whether the text encoder learns.
        watch: sees each step.
    """
    images, generator, rows = Batches(data), torch_generator(seed, "augmentation"), torch.arange(len(bank))
    model.train().to(memory_format=torch.channels_last)
    encoded, text = None, None
    if not learn_text:
        with torch.no_grad():
            encoded = torch.stack([model.encode_text(of_class, normalize=True) for of_class in bank])  # (C, T, E)

    def loss_of(step: int, batch: Tensor) -> Tensor:
        nonlocal text
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        if step % 2 == 0 or not learn_text:
            which = torch.randint(bank.shape[1], (len(bank),), generator=generator)
            text = model.encode_text(bank[rows, which], normalize=True) if learn_text else encoded[rows, which]
        x = model.encode_image(clip_input(images.augmented(batch, generator)), normalize=True)
        logits, text = model.logit_scale.exp() * x @ text.T, text.detach()
        return cross_entropy(logits, images.labels[batch], label_smoothing=0.05)

    learning = model if learn_text else model.visual
    batches = draw_batches(data.labels, main_share, schedule, seed)
    losses = fit(loss_of, learning.parameters(), batches, schedule, "tiny-clip", watch=watch)
    with torch.no_grad():
        model.logit_scale.clamp_(max=np.log(100))
    model.eval()
    return losses


def clip_teacher(folder: str, names: Sequence[str]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A trained tiny-clip as a function: images (B, 3, 32, 32) -> features (B, E) and class logits (B, C)."""
    clip = open_clip.create_model(f"local-dir:{folder}").eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        prompts = [[t.format(words_for(name)[0]) for t in PROMPTS] for name in names]
        means = torch.stack([clip.encode_text(tokenizer(of_class), normalize=True).mean(0) for of_class in prompts])
        classes = means / means.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def ask(x: Tensor) -> tuple[Tensor, Tensor]:
        features = clip.encode_image(clip_input(x), normalize=True)
        return features, clip.logit_scale.exp() * features @ classes.T

    return ask
