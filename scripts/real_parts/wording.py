"""Texts that no label enters: the encoder's first two ImageNet choices, and colours measured on the pixels."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from standins.claims import COLOURS, Facts, look

from mllmfl_lite.data.names import with_article
from mllmfl_lite.stages.records import Record
from mllmfl_lite.teachers.prompts import prompt_hash

PROMPTS = {"object": "what ?", "ground": "where ?"}  # by kind; each is asked of every image
FRAME = "a an maybe on background behind it the is with in dark bright light small large plain mixed"
WRITER = "EfficientNet-lite2's first two ImageNet classes, colours measured"


def imagenet_names() -> list[str]:
    """The 1,000 ImageNet classes in the usual order, in lower case."""
    from torchvision.models import ResNet18_Weights  # slow; its list of names, no weights

    return [name.lower() for name in ResNet18_Weights.DEFAULT.meta["categories"]]


def split_words(text: str) -> list[str]:
    """Words and marks: ``"a dog, maybe"`` is a, dog, comma, maybe."""
    return re.findall(r"[a-z0-9'-]+|[.,;?]", text.lower())


def vocabulary(names: Sequence[str]) -> list[str]:
    """All words that a text about these names may have, sorted."""
    given = [*names, FRAME, *COLOURS, *PROMPTS.values(), ",.;"]
    return sorted({word for text in given for word in split_words(text)})


def describe(facts: Facts, first: str, second: str) -> dict[str, str]:
    """The two texts about an image: the object first, or the background first."""
    thing = with_article(" ".join(word for word in (facts.size, facts.colour, first) if word))
    thing += f", maybe {with_article(second)}"
    ground = " ".join(word for word in ("plain" if facts.plain else "", facts.background or "mixed") if word)
    light = f", in {facts.light} light" if facts.light else ""
    return {
        "object": f"{thing}, on {with_article(ground)} background{light}.",
        "ground": f"behind it is {with_article(ground)} background{light}; it is {thing}.",
    }


def write_records(
    images: np.ndarray, chosen: Iterable[Iterable[int]], names: Sequence[str], ids: Sequence[str]
) -> list[Record]:
    """Two records an image: uint8 (N, 32, 32, 3) and its two ImageNet classes (N, 2)."""
    records = []
    for image, facts, (first, second) in zip(ids, look(images), chosen, strict=True):
        for kind, text in describe(facts, names[int(first)], names[int(second)]).items():
            records.append(Record(image, image, kind, text, True, WRITER, prompt_hash(PROMPTS[kind]), ""))
    return records
