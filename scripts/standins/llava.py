"""tiny-llava: `transformers.LlavaForConditionalGeneration` with a small vision tower, projector and Llama."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mllmfl_lite.data.batches import CHANNEL_MEAN, CHANNEL_STD, Batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.repro import numpy_generator, stable_seed, torch_generator
from mllmfl_lite.teachers.prompts import load_prompts
from standins import tower as vision
from standins.claims import Facts
from standins.corpus import END, IMAGE
from standins.training import Schedule, Watch, draw_batches, fit, initial_weights
from standins.words import write

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
# more ways to ask than the bundled prompts, so that the model follows a prompt's kind and not its letters
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
PARTS = {
    "language": ("language_model",),
    "projector": ("multi_modal_projector",),
    "both": ("multi_modal_projector", "language_model"),
}
STAGES = {"language": "the Llama, on text alone", "projector": "the projector alone", "both": "projector and Llama"}


def new_processor(tokenizer) -> LlavaProcessor:
    """A processor for 32 x 32 images in 4 x 4 patches."""
    side = vision.CONFIG["image_size"]
    pixels = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(CHANNEL_MEAN),
        image_std=list(CHANNEL_STD),
    )
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=vision.CONFIG["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def new_llava(tower, tokenizer, seed: int, language: dict = LANGUAGE_CONFIG) -> LlavaForConditionalGeneration:
    """A LLaVA around a given tower: new projector, new Llama, nothing trained.

    Args:
        tower: a CLIP vision tower; its weights are copied and frozen.
        tokenizer: from `train_tokenizer`.
        seed: of the new weights.
        language: of `transformers.LlamaConfig`.
    """
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids, **language),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with initial_weights(seed):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    model.generation_config.update(pad_token_id=tokenizer.pad_token_id, **ids, do_sample=False)
    return model


def all_prompts() -> dict[str, tuple[str, ...]]:
    """Every way to ask for each kind of text, the bundled prompt first."""
    bundled = load_prompts()
    return {kind: (*([bundled[kind]] if kind in bundled else []), *others) for kind, others in OTHER_PROMPTS.items()}


class Lessons:
    """Makes training sequences: prompt, answer and which tokens are learned.

    The wording of an answer follows from its colours, at random but always the same: a model that answers greedily
    would otherwise use the most frequent wording for every image.

    Args:
        processor: from `new_processor`.
        data: labelled images.
        facts: what the pixels of each say.
        kinds: kinds of text and how often each comes.
    """

    def __init__(self, processor: LlavaProcessor, data: ImageSet, facts: Sequence[Facts], kinds: dict[str, int]):
        self.processor, self.data, self.facts = processor, data, facts
        self.kinds = [kind for kind, times in kinds.items() for _ in range(times)]
        self.prompts = all_prompts()
        self.patches = vision.PATCHES

    def batch(self, indices: np.ndarray, with_image: bool, rng: np.random.Generator) -> dict[str, Tensor]:
        """Sequences of one kind about the images at `indices`: input_ids, attention_mask, labels (B, L).

        Only the answer and its end are learned; every other label is -100. Padding is on the right.
        """
        kind, tokenizer = self.kinds[rng.integers(len(self.kinds))], self.processor.tokenizer
        asked, answers = [], []
        for i in indices:
            prompt = self.prompts[kind][rng.integers(len(self.prompts[kind]))]
            asked.append(f"USER: {IMAGE * self.patches + chr(10) if with_image else ''}{prompt} ASSISTANT:")
            answers.append(f" {self._answer(kind, i)}{END}")
        asked = tokenizer(asked).input_ids
        answers = tokenizer(answers, add_special_tokens=False).input_ids
        length = max(len(a) + len(b) for a, b in zip(asked, answers, strict=True))
        ids = torch.full((len(asked), length), tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (question, answer) in enumerate(zip(asked, answers, strict=True)):
            end = len(question) + len(answer)
            ids[row, :end], mask[row, :end] = torch.tensor(question + answer), 1
            labels[row, len(question) : end] = torch.tensor(answer)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _answer(self, kind: str, i: int) -> str:
        name, facts = self.data.names[self.data.labels[i]], self.facts[i]
        wording = numpy_generator("wording", kind, facts.colour or "", facts.background or "")
        return write(kind, name, facts, wording)


def train_llava(
    model: LlavaForConditionalGeneration,
    lessons: Lessons,
    stage: str,
    schedule: Schedule,
    seed: int,
    main_share: float = 0.7,
    watch: Watch | None = None,
) -> list[float]:
    """Train a part of a LLaVA in place, in the order of Liu et al. (2023); return the loss of every step.

    Args:
        model: from `new_llava`.
        lessons: makes the sequences.
        stage: one of `STAGES`: what is trained.
        schedule: samples, batch, learning rate.
        seed: of batches, crops and wording.
        main_share: share of CIFAR-10 images in a batch.
        watch: sees each step.
    """
    if stage not in STAGES:
        raise ValueError(f"no stage named {stage!r}; there are {', '.join(STAGES)}")
    images, generator = Batches(lessons.data), torch_generator(seed, stage, "augmentation")
    rng = numpy_generator(seed, stage, "wording")
    model.requires_grad_(False)
    for part in PARTS[stage]:
        getattr(model.model, part).requires_grad_(True)

    def loss_of(step: int, batch: Tensor) -> Tensor:
        inputs = lessons.batch(batch.numpy(), stage != "language", rng)
        if stage != "language":
            inputs["pixel_values"] = images.augmented(batch, generator)
        return model(**inputs).loss

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    batches = draw_batches(lessons.data.labels, main_share, schedule, stable_seed(seed, stage))
    losses = fit(loss_of, trained, batches, schedule, STAGES[stage], trained, watch)
    model.eval()
    return losses
