"""How the bundled stand-ins were made: a small CLIP and a small LLaVA of the real classes, trained here from nothing.

No real CLIP or LLaVA can be bundled. `tiny-clip` is an `open_clip` model with its own small configuration, `tiny-llava`
a `transformers.LlavaForConditionalGeneration` with a CLIP vision tower, a projector and a Llama of a few layers. The
pieces here are the whole recipe; `scripts/make_tiny_clip.py` and `scripts/make_tiny_llava.py` run it in full, and the
appendix on building the stand-ins runs a part of it before the reader's eyes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from mllmfl_lite.data import load_images
from mllmfl_lite.data.batches import CHANNEL_MEAN, CHANNEL_STD, Batches
from mllmfl_lite.data.cifar import mini_index
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.names import with_article, words_for
from mllmfl_lite.repro import numpy_generator, progress_bar, stable_seed, torch_generator
from mllmfl_lite.teachers.clip import TEMPLATES
from mllmfl_lite.teachers.prompts import KINDS
from mllmfl_lite.teaching.claims import Facts
from standins.words import write

PAD, IMAGE, BEGIN, END = "<pad>", "<image>", "<s>", "</s>"


VOCABULARY = 1000  # byte-pair merges; the four special tokens follow


def rest_of_cifar(held_out: int = 2000) -> tuple[ImageSet, ImageSet]:
    """The images that stand-ins learn from, and some more to watch them by; no part of `cifar10_mini` holds any.

    Both training sets of CIFAR, without the images of the bundled parts and without either test set. Labels 0-9 are
    CIFAR-10's classes, 10-109 CIFAR-100's fine ones. The images to watch by are all of CIFAR-10.

    Args:
        held_out: how many images to watch by.
    """
    sets = load_images("cifar10"), load_images("cifar100")
    taken = {data.origin: set() for data in sets}
    for part in mini_index()["parts"].values():
        for origin, i in zip(part["origin"], part["index"], strict=True):
            if part["origins"][origin] in taken:
                taken[part["origins"][origin]].add(i)
    rest = [data.subset(np.setdiff1d(np.arange(len(data)), sorted(taken[data.origin]))) for data in sets]
    labels = np.concatenate([rest[0].labels, rest[1].labels + rest[0].num_classes])
    everything = ImageSet(
        np.concatenate([part.images for part in rest]), labels, rest[0].names + rest[1].names, "cifar/rest"
    )
    watched = np.sort(np.random.default_rng(20260).permutation(np.flatnonzero(labels < 10))[:held_out])
    return everything.subset(np.setdiff1d(np.arange(len(labels)), watched)), everything.subset(watched)


def train_tokenizer(texts: Iterator[str] | Sequence[str], add_end: bool):
    """A byte-level BPE tokenizer with `VOCABULARY` entries and four special tokens, as a fast `transformers` one.

    Args:
        texts: what to learn the merges from.
        add_end: close each text with ``</s>`` (CLIP pools there); LLaVA's language model only opens with ``<s>``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens([PAD, IMAGE, BEGIN, END])  # the end has the highest number, where CLIP looks for it
    ends = {token: core.token_to_id(token) for token in (BEGIN, END)}
    core.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}" if add_end else f"{BEGIN} $A", special_tokens=list(ends.items())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="right" if add_end else "left",
    )


def corpus(data: ImageSet, facts: Sequence[Facts], per_class: int, seed: int) -> dict[str, list[list[str]]]:
    """For each kind of text and each class `per_class` texts, written about images of that class."""
    rng = numpy_generator(seed, "corpus")
    own = [np.flatnonzero(data.labels == c) for c in range(data.num_classes)]
    return {
        kind: [
            [write(kind, name, facts[i], rng) for i in rng.choice(own[c], per_class)]
            for c, name in enumerate(data.names)
        ]
        for kind in ("caption", *KINDS)
    }


CLIP_CONFIG = {
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


CLIP_PREPROCESSING = {"mean": CHANNEL_MEAN, "std": CHANNEL_STD, "interpolation": "bicubic", "resize_mode": "squash"}


PROMPTS = (*TEMPLATES, "{}.", "this is {}.")


def new_clip(folder: Path, tokenizer, seed: int) -> nn.Module:
    """Write the configuration and tokenizer of tiny-clip into `folder`; return the model, untrained."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": CLIP_PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "initial weights"))
        return open_clip.create_model(f"local-dir:{folder}", load_weights=False)


def text_bank(tokenizer, texts: dict[str, list[list[str]]], names: Sequence[str], seed: int) -> Tensor:
    """Tokens of many texts for each class: int64 (C, T, context length), of every kind."""
    rng = numpy_generator(seed, "prompts")
    bank = []
    for c, name in enumerate(names):
        prompts = [
            PROMPTS[rng.integers(len(PROMPTS))].format(_with_or_without_article(words_for(name), rng))
            for _ in texts["caption"][c]
        ]
        of_class = [*prompts, *(text for kind in texts.values() for text in kind[c])]
        bank.append(
            tokenizer(
                [" ".join(t.split()) for t in of_class],
                padding="max_length",
                truncation=True,
                max_length=CLIP_CONFIG["text_cfg"]["context_length"],
                return_tensors="pt",
            ).input_ids
        )
    return torch.stack(bank)


def _with_or_without_article(words: Sequence[str], rng: np.random.Generator) -> str:
    word = words[rng.integers(len(words))]
    return with_article(word) if rng.random() < 0.8 else word


def clip_input(x: Tensor) -> Tensor:
    """Normalised 32 x 32 images (B, 3, 32, 32) at tiny-clip's own size, as its preprocessing resizes them."""
    size = CLIP_CONFIG["vision_cfg"]["image_size"]
    return interpolate(x, (size, size), mode="bicubic", align_corners=False).contiguous(
        memory_format=torch.channels_last
    )


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `samples` images in batches of `batch`, AdamW, warm-up over 5 %, then a line to zero."""

    samples: int
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05

    @property
    def steps(self) -> int:
        """Batches in all."""
        return self.samples // self.batch

    def optimizer(self, parameters: Iterator[nn.Parameter]):
        """AdamW and its learning-rate schedule; vectors (norms, biases) do not decay."""
        parameters = [p for p in parameters if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        warm = max(1, self.steps // 20)
        factor = lambda step: min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))  # noqa: E731
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def draw_batches(labels: np.ndarray, main_classes: int, main_share: float, schedule: Schedule, seed: int):
    """Index batches, int64 (B,): `main_share` of each from the first `main_classes` classes."""
    rng = numpy_generator(seed, "batches")
    main, other = np.flatnonzero(labels < main_classes), np.flatnonzero(labels >= main_classes)
    cut = round(schedule.batch * main_share) if len(other) else schedule.batch
    streams = [(_forever(part, rng), size) for part, size in ((main, cut), (other, schedule.batch - cut)) if size]
    for _ in range(schedule.steps):
        yield torch.from_numpy(np.array([next(stream) for stream, size in streams for _ in range(size)]))


def _forever(indices: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(indices)


def train_clip(
    model: nn.Module,
    data: ImageSet,
    bank: Tensor,
    schedule: Schedule,
    seed: int,
    main_share: float = 0.75,
    learn_text: bool = True,
    watch=None,
) -> None:
    """Train tiny-clip in place: each image against one text of every class, cross-entropy over the classes.

    That is CLIP's contrastive loss with the classes' texts as the batch's texts, so that no two texts of a batch
    mean the same. The texts' side learns at every second step, or not at all: then every text is encoded once.

    Args:
        model: from `new_clip`.
        data: images with labels 0-9 (CIFAR-10) and 10-109 (CIFAR-100).
        bank: from `text_bank`.
        schedule: samples, batch, learning rate.
        seed: of batches, crops and texts.
        main_share: the share of CIFAR-10 images in a batch.
        learn_text: whether the text encoder learns, too.
        watch: called with (step, loss) after each step.
    """
    images, generator = Batches(data), torch_generator(seed, "augmentation")
    learning = model if learn_text else model.visual
    optimizer, rate = schedule.optimizer(learning.parameters())
    model.train().to(memory_format=torch.channels_last)
    labels, rows = images.labels, torch.arange(len(bank))
    if not learn_text:
        with torch.no_grad():
            encoded = torch.stack([model.encode_text(own, normalize=True) for own in bank])  # (C, T, E)
    with progress_bar(schedule.samples, "images", "tiny-clip") as bar:
        for step, batch in enumerate(draw_batches(data.labels, 10, main_share, schedule, seed)):
            if step % 2 == 0 or not learn_text:
                which = torch.randint(bank.shape[1], (len(bank),), generator=generator)
                text = model.encode_text(bank[rows, which], normalize=True) if learn_text else encoded[rows, which]
            x = model.encode_image(clip_input(images.augmented(batch, generator)), normalize=True)
            loss = cross_entropy(model.logit_scale.exp() * x @ text.T, labels[batch], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rate.step()
            text = text.detach()
            with torch.no_grad():
                model.logit_scale.clamp_(max=np.log(100))
            bar.update(len(batch))
            if watch:
                watch(step, loss.item())
    model.eval()


TOWER_CONFIG = {
    "hidden_size": 160,
    "intermediate_size": 320,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
    "hidden_act": "gelu",
}


def new_tower(images: np.ndarray, seed: int, config: dict = TOWER_CONFIG):
    """A CLIP vision tower (ViT) made for little data: whitened patches, sinusoidal places, mimetic attention.

    Args:
        images: uint8 (N, H, W, 3); the statistics of their patches set the first layer.
        seed: of the random part.
        config: of `transformers.CLIPVisionConfig`.

    Source: mimetic initialisation, Trockman and Kolter (2023).
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "initial weights"))
        tower = CLIPVisionModel(CLIPVisionConfig(**config))
        core, width = _core(tower), config["hidden_size"]
        with torch.no_grad():
            core.embeddings.patch_embedding.weight.copy_(_whitening(images, config["patch_size"], width))
            places = _sinusoids(config["image_size"] // config["patch_size"], width)
            core.embeddings.position_embedding.weight.copy_(torch.cat([torch.zeros(1, width), 0.5 * places]))
            for layer in core.encoder.layers:
                _mimetic(layer.self_attn, width, config["num_attention_heads"])
    return tower


def _core(tower):
    return getattr(tower, "vision_model", tower)  # transformers before version 5 wrapped it


def _whitening(images: np.ndarray, patch: int, width: int) -> Tensor:
    """First-layer filters (width, 3, patch, patch): decorrelated patches, turned at random into `width` numbers."""
    some = images[:2000]
    x = Batches(ImageSet(some, np.zeros(len(some), np.int64), ("",), "")).plain(torch.arange(len(some)))
    patches = x.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * patch**2)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    white = vectors / (values + 1e-2).sqrt()  # (P, P): each column a filter with output of unit variance
    turn = torch.linalg.qr(torch.randn(max(width, len(values)), min(width, len(values))))[0]
    turn = turn if width >= len(values) else turn.T  # (width, P): orthonormal rows or columns
    return (turn @ white.T).reshape(width, 3, patch, patch)


def _sinusoids(side: int, width: int) -> Tensor:
    """Two-dimensional sinusoidal position embeddings (side * side, width)."""
    frequencies = 1 / 100 ** torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies  # (side, width / 4)
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    return torch.cat([rows, columns], 1)


def _mimetic(attention, width: int, heads: int) -> None:
    """Queries meet keys near the identity, values leave near minus the identity, as in trained transformers."""
    size = width // heads
    noise = lambda: torch.randn(width, width) / width**0.5  # noqa: E731
    for head in range(heads):
        u, s, v = torch.linalg.svd(0.7 * noise() + 0.7 * torch.eye(width))
        rows = slice(head * size, (head + 1) * size)
        attention.q_proj.weight[rows] = (u[:, :size] * s[:size].sqrt()).T
        attention.k_proj.weight[rows] = s[:size, None].sqrt() * v[:size]
    u, s, v = torch.linalg.svd(0.4 * noise() - 0.4 * torch.eye(width))
    attention.v_proj.weight.copy_((u * s.sqrt()).T)
    attention.out_proj.weight.copy_((s.sqrt()[:, None] * v).T)


def patch_features(tower, x: Tensor, keep: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """What a LLaVA takes from its tower: patch tokens (B, P, D) of the last layer, without the class token.

    With `keep`, only that many patches drawn at random for the batch pass through: half the patches, half the time.
    """
    core = _core(tower)
    tokens = core.embeddings(x)
    if keep is not None:
        chosen = torch.randperm(tokens.shape[1] - 1, generator=generator)[:keep] + 1
        tokens = tokens[:, torch.cat([torch.zeros(1, dtype=torch.long), chosen])]
    return core.encoder(inputs_embeds=core.pre_layrnorm(tokens)).last_hidden_state[:, 1:]


class TowerHead(nn.Module):
    """What the tower learns through and then loses: mean over patches, norm, linear layers to classes and CLIP."""

    def __init__(self, width: int, num_classes: int, clip_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, num_classes)
        self.clip = nn.Linear(width, clip_width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, P, D) -> class logits (B, C) and a guess of CLIP's feature (B, E)."""
        pooled = self.norm(tokens.mean(1))
        return self.classes(pooled), self.clip(pooled)


def clip_teacher(folder: str, names: Sequence[str]):
    """What `train_tower` asks: images (B, 3, 32, 32) -> CLIP's features (B, E) and class logits (B, C).

    Args:
        folder: of a trained tiny-clip.
        names: the classes.
    """
    import open_clip

    clip = open_clip.create_model(f"local-dir:{folder}").eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        prompts = [[t.format(words_for(name)[0]) for t in PROMPTS] for name in names]
        means = torch.stack([clip.encode_text(tokenizer(own), normalize=True).mean(0) for own in prompts])
        classes = means / means.norm(dim=1, keepdim=True)

    def ask(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            features = clip.encode_image(clip_input(x), normalize=True)
            return features, clip.logit_scale.exp() * features @ classes.T

    return ask


def train_tower(
    tower,
    head: TowerHead,
    data: ImageSet,
    teacher,
    schedule: Schedule,
    seed: int,
    distil_from: float = 0.6,
    all_patches_from: float = 0.85,
    main_share: float = 0.75,
    watch=None,
) -> None:
    """Train the vision tower in place: labels first, then also what a trained CLIP says of the same crops.

    Args:
        tower: from `new_tower`.
        head: what the losses are taken through.
        data: labelled images.
        teacher: called once, when it is first needed; returns a function as `clip_teacher` does.
        schedule: samples, batch, learning rate.
        seed: of batches, crops and patches.
        distil_from: the share of the steps after which the teacher joins.
        all_patches_from: the share of the steps after which no patch is left out; half of them before.
        main_share: the share of CIFAR-10 images in a batch.
        watch: called with (step, loss) after each step.
    """
    images, generator = Batches(data), torch_generator(seed, "augmentation")
    optimizer, rate = schedule.optimizer([*tower.parameters(), *head.parameters()])
    half = (TOWER_CONFIG["image_size"] // TOWER_CONFIG["patch_size"]) ** 2 // 2
    ask = None
    tower.train()
    with progress_bar(schedule.samples, "images", "vision tower") as bar:
        for step, batch in enumerate(draw_batches(data.labels, 10, main_share, schedule, seed)):
            x = images.augmented(batch, generator)
            keep = half if step < all_patches_from * schedule.steps else None
            logits, guess = head(patch_features(tower, x, keep, generator))
            loss = cross_entropy(logits, images.labels[batch], label_smoothing=0.05)
            if step >= distil_from * schedule.steps:
                ask = ask or teacher()
                features, soft = ask(x)
                loss = (
                    loss
                    + cross_entropy(logits, soft.softmax(1))
                    + (1 - nn.functional.cosine_similarity(guess, features)).mean()
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimizer.step()
            rate.step()
            bar.update(len(batch))
            if watch:
                watch(step, loss.item())
    tower.eval()


LANGUAGE_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] != 'text' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


# Other ways to ask, so that the model follows a prompt's kind and not its letters. The first of each kind is its file.
OTHER_PROMPTS = {
    "class_name": (
        "Which object is this?",
        "Name the main object.",
        "What is in the picture? One name.",
        "What is it?",
    ),
    "caption": (
        "Describe the image briefly.",
        "Give a short caption.",
        "Write a caption for this picture.",
        "Caption?",
    ),
    "conversation": (
        "Ask questions about this picture and answer them.",
        "Write a conversation about the picture: questions and answers.",
        "Make up two questions about the photo, with answers.",
    ),
    "detailed_description": (
        "Describe this picture in detail.",
        "What do you see? Give details.",
        "Give a detailed description of the photo.",
        "Describe the picture.",
    ),
    "complex_reasoning": (
        "Explain what this picture shows and how you can tell.",
        "Reason about the picture: what is it, where was it taken, what may happen next?",
        "What can be concluded from this photo?",
    ),
}


def new_processor(tokenizer):
    """Words and pixels to model inputs: a `transformers.LlavaProcessor` for 32 x 32 images in 4 x 4 patches."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    side = TOWER_CONFIG["image_size"]
    pixels = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(CHANNEL_MEAN),
        image_std=list(CHANNEL_STD),
    )
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=TOWER_CONFIG["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def new_llava(tower, tokenizer, seed: int, language: dict = LANGUAGE_CONFIG):
    """A `transformers.LlavaForConditionalGeneration` around a given tower: new projector, new Llama, nothing trained.

    Args:
        tower: a CLIP vision tower; its weights are taken over and frozen.
        tokenizer: from `train_tokenizer`.
        seed: of the new weights.
        language: of `transformers.LlamaConfig`.
    """
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids, **language)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "initial weights"))
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    model.generation_config.update(pad_token_id=tokenizer.pad_token_id, **ids, do_sample=False)
    return model


def all_prompts() -> dict[str, tuple[str, ...]]:
    """Every way to ask for each kind of text, the bundled prompt first."""
    from mllmfl_lite.teachers.prompts import load_prompts

    bundled = load_prompts()
    return {kind: (*([bundled[kind]] if kind in bundled else []), *others) for kind, others in OTHER_PROMPTS.items()}


class Lessons:
    """Makes training sequences: prompt, answer and which tokens are learnt.

    The wording of an answer follows from its colours, at random but always the same: a model that answers greedily
    would otherwise use the most frequent wording for every picture.

    Args:
        processor: from `new_processor`.
        data: labelled images.
        facts: what the pixels of each say.
        kinds: kinds of text and how often each comes.
    """

    def __init__(self, processor, data: ImageSet, facts: Sequence[Facts], kinds: dict[str, int]):
        self.processor, self.data, self.facts = processor, data, facts
        self.kinds = [kind for kind, times in kinds.items() for _ in range(times)]
        self.prompts = all_prompts()
        self.patches = (TOWER_CONFIG["image_size"] // TOWER_CONFIG["patch_size"]) ** 2

    def batch(self, indices: np.ndarray, with_image: bool, rng: np.random.Generator) -> dict[str, Tensor]:
        """Sequences of one kind about the images at `indices`: input_ids, attention_mask, labels (B, L).

        Only the answer and its end are learnt; every other label is -100. Padding is on the right.
        """
        kind = self.kinds[rng.integers(len(self.kinds))]
        tokenizer = self.processor.tokenizer
        heads, tails = [], []
        for i in indices:
            ask = self.prompts[kind][rng.integers(len(self.prompts[kind]))]
            heads.append(f"USER: {IMAGE * self.patches + chr(10) if with_image else ''}{ask} ASSISTANT:")
            name, facts = self.data.names[self.data.labels[i]], self.facts[i]
            wording = numpy_generator("wording", kind, facts.colour or "", facts.background or "")
            tails.append(" " + write(kind, name, facts, wording) + END)
        heads = tokenizer(heads).input_ids
        tails = tokenizer(tails, add_special_tokens=False).input_ids
        length = max(len(h) + len(t) for h, t in zip(heads, tails, strict=True))
        ids = torch.full((len(heads), length), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            both = torch.tensor(head + tail)
            ids[row, : len(both)], mask[row, : len(both)] = both, 1
            labels[row, len(head) : len(both)] = both[len(head) :]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


STAGES = {"language": "the Llama, on text alone", "projector": "the projector alone", "both": "projector and Llama"}


def train_llava(
    model, lessons: Lessons, stage: str, schedule: Schedule, seed: int, main_share: float = 0.7, watch=None
) -> list[float]:
    """Train a part of a LLaVA in place; return the loss of every step.

    Args:
        model: from `new_llava`.
        lessons: makes the sequences.
        stage: one of `STAGES`: what is trained, in the order in which LLaVA was (Liu et al., 2023).
        schedule: samples, batch, learning rate.
        seed: of batches, crops and wording.
        main_share: the share of CIFAR-10 images in a batch.
        watch: called with (step, loss) after each step.
    """
    if stage not in STAGES:
        raise ValueError(f"no stage named {stage!r}; there are {', '.join(STAGES)}")
    images, generator = Batches(lessons.data), torch_generator(seed, stage, "augmentation")
    rng = numpy_generator(seed, stage, "wording")
    model.requires_grad_(False)
    for part in {"language": ["language_model"], "projector": ["multi_modal_projector"]}.get(
        stage, ["multi_modal_projector", "language_model"]
    ):
        getattr(model.model, part).requires_grad_(True)
    optimizer, rate = schedule.optimizer(model.parameters())
    losses = []
    model.train()
    with progress_bar(schedule.samples, "sequences", STAGES[stage]) as bar:
        for step, batch in enumerate(
            draw_batches(lessons.data.labels, 10, main_share, schedule, stable_seed(seed, stage))
        ):
            inputs = lessons.batch(batch.numpy(), stage != "language", rng)
            if stage != "language":
                inputs["pixel_values"] = images.augmented(batch, generator)
            loss = model(**inputs).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), 1.0)
            optimizer.step()
            rate.step()
            losses.append(loss.item())
            bar.update(len(batch))
            if watch:
                watch(step, loss.item())
    model.eval()
    return losses
