"""What texts about CIFAR images claim, and what the pixels say, so that one can be held against the other."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from mllmfl_lite.data.names import CIFAR10_CLASSES, SPOKEN, SUPERCLASS_OF, SUPERCLASSES, SYNONYMS, words_for

COLOURS = ("black", "white", "grey", "red", "orange", "brown", "yellow", "green", "blue", "purple")


@dataclass(frozen=True)
class Facts:
    """What the pixels say; None where they do not allow a statement.

    Attributes:
        colour: the main colour of the middle of the picture.
        background: the main colour of its border.
        plain: whether one colour fills most of the border.
        light: ``"dark"`` or ``"bright"``.
        size: ``"small"`` or ``"large"``: how much of the picture differs from a plain background.
    """

    colour: str | None = None
    background: str | None = None
    plain: bool = False
    light: str | None = None
    size: str | None = None


def name_colours(pixels: np.ndarray) -> np.ndarray:
    """The index into `COLOURS` of each RGB pixel: uint8 (..., 3) -> int64 (...), by hue, saturation and value."""
    red, green, blue = np.moveaxis(pixels.astype(np.float32) / 255, -1, 0)
    value, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    span = np.maximum(value - low, 1e-6)
    hue = np.select(
        [value == red, value == green], [(green - blue) / span % 6, (blue - red) / span + 2], (red - green) / span + 4
    )
    hue, pale = hue * 60, (value - low) < 0.16 * np.maximum(value, 1e-6)
    glowing = (value > 0.65) & (value - low > 0.5 * value)
    cases = [
        (value < 0.2, "black"),
        (pale & (value > 0.78), "white"),
        (pale, "grey"),
        ((hue < 15) | (hue >= 335), "red"),
        ((hue < 45) & glowing, "orange"),
        (hue < 45, "brown"),
        ((hue < 68) & (value > 0.5), "yellow"),
        (hue < 165, "green"),
        (hue < 260, "blue"),
        (hue < 335, "purple"),
    ]
    return np.select([where for where, _ in cases], [COLOURS.index(name) for _, name in cases])


def look(images: np.ndarray) -> list[Facts]:
    """The facts of each picture: uint8 (N, 32, 32, 3) -> N `Facts`.

    The middle is the central quarter, the border a frame of four pixels. A colour is stated if 40 % of the middle, or
    half of the border, has it; a border with 75 % of one colour is plain, and only then is a size stated.
    """
    frame = np.ones(images.shape[1:3], bool)
    frame[4:-4, 4:-4] = False
    colours = name_colours(images)
    middle, main = _majority(colours[:, 8:-8, 8:-8].reshape(len(images), -1))
    border, share = _majority(colours[:, frame])
    light = images.mean((1, 2, 3)) / 255
    ground = np.median(images[:, frame].astype(np.int16), axis=1)[:, None, None]  # (N, 1, 1, 3)
    covered = (np.abs(images - ground).max(-1) > 40).mean((1, 2))
    return [
        Facts(
            colour=COLOURS[middle[i]] if main[i] >= 0.4 else None,
            background=COLOURS[border[i]] if share[i] >= 0.5 else None,
            plain=bool(share[i] >= 0.75),
            light="dark" if light[i] < 0.33 else "bright" if light[i] > 0.62 else None,
            size=None if share[i] < 0.75 else "small" if covered[i] < 0.22 else "large" if covered[i] > 0.42 else None,
        )
        for i in range(len(images))
    ]


def _majority(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row of colour codes (N, P) the most frequent one and its share."""
    counts = np.stack([(codes == c).mean(1) for c in range(len(COLOURS))], 1)
    return counts.argmax(1), counts.max(1)


LEXICON = {
    **{
        word: name
        for name in (*CIFAR10_CLASSES, *SUPERCLASS_OF)
        for word in words_for(name)[: 2 if name in SYNONYMS else 1]
    },
    **{noun: noun for noun in SUPERCLASSES},
}


_OBJECTS = re.compile(r"\b(" + "|".join(sorted(map(re.escape, LEXICON), key=len, reverse=True)) + r")(?:e?s)?\b", re.I)


_COLOUR = "(" + "|".join(COLOURS) + ")"


_NOUN = "(?:" + "|".join(sorted(map(re.escape, LEXICON), key=len, reverse=True)) + ")"


_CLAIMS = {
    "colour": [
        rf"\b{_COLOUR} {_NOUN}\b",
        rf"(?<!around )it is mostly {_COLOUR}\b",
        rf"\bmainly {_COLOUR}\b",
        rf"\band {_COLOUR} colour\b",
    ],
    "background": [
        rf"\bbackground is (?:uniformly |mostly )?{_COLOUR}\b",
        rf"\b(?:behind it the picture|around it) is (?:uniformly |mostly )?{_COLOUR}\b",
        rf"\b{_COLOUR} background\b",
    ],
    "light": [r"\b(?:photo|light) is (dark|bright)\b"],
    "size": [
        rf"\b(small|large) (?:{_COLOUR} )?{_NOUN}\b",
        r"\bfills most (of) the frame\b",
        r"\ba small (part) of the frame\b",
    ],
}
_CLAIMS = {about: [re.compile(pattern, re.I) for pattern in patterns] for about, patterns in _CLAIMS.items()}


_SIZE_WORDS = {"of": "large", "part": "small"}


def objects_in(text: str) -> set[str]:
    """The objects that a text names: class names of CIFAR-10 and CIFAR-100, and superclass nouns."""
    return {LEXICON[match.group(1).lower()] for match in _OBJECTS.finditer(text)}


def same_thing(found: str, name: str) -> bool:
    """Whether an object found in a text is class `name`, or its superclass."""
    return found in (name, SUPERCLASS_OF.get(name))


def names_class(text: str, name: str) -> bool:
    """Whether a text names the class, by its name, a synonym or its superclass's noun."""
    return any(same_thing(found, name) for found in objects_in(text))


def read_claims(text: str) -> dict[str, set[str]]:
    """The facts that a text claims, e.g. ``{"colour": {"red"}, "light": {"dark"}}``; only what it speaks of."""
    claims = {}
    for phrase in SPOKEN.values():
        text = text.replace(phrase, phrase.split()[-1])  # an orange fruit is no claim about a colour
    for about, patterns in _CLAIMS.items():
        found = {m.group(1).lower() for pattern in patterns for m in pattern.finditer(text)}
        if found:
            claims[about] = {_SIZE_WORDS.get(word, word) for word in found}
    return claims
