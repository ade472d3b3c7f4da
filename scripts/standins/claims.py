"""Hold texts about CIFAR images against the pixels: what the image shows, and what the text claims."""

import re
from dataclasses import dataclass

import numpy as np

from mllmfl_lite.data.names import CIFAR10_CLASSES, SPOKEN, SUPERCLASS_OF, SUPERCLASSES, SYNONYMS, spoken, with_article

COLOURS = ("black", "white", "grey", "red", "orange", "brown", "yellow", "green", "blue", "purple")


@dataclass(frozen=True)
class Facts:
    """What the pixels of an image allow to state; None: nothing."""

    colour: str | None = None  #: the main colour of the middle
    background: str | None = None  #: the main colour of the border
    plain: bool = False  #: whether one colour fills most of the border
    light: str | None = None  #: ``"dark"`` or ``"bright"``
    size: str | None = None  #: ``"small"`` or ``"large"``, how much of the image differs from a plain background


def name_colours(pixels: np.ndarray) -> np.ndarray:
    """Name RGB pixels by hue, saturation and value: uint8 (..., 3) -> indices into `COLOURS`, int64 (...)."""
    red, green, blue = np.moveaxis(pixels.astype(np.float32) / 255, -1, 0)
    value, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    span = np.maximum(value - low, 1e-6)
    hue = np.select(
        [value == red, value == green], [(green - blue) / span % 6, (blue - red) / span + 2], (red - green) / span + 4
    )
    hue, pale = hue * 60, (value - low) < 0.16 * np.maximum(value, 1e-6)
    glowing = (value > 0.65) & (value - low > 0.5 * value)
    cases = {
        "black": value < 0.2,
        "white": pale & (value > 0.78),
        "grey": pale,
        "red": (hue < 15) | (hue >= 335),
        "orange": (hue < 45) & glowing,
        "brown": hue < 45,
        "yellow": (hue < 68) & (value > 0.5),
        "green": hue < 165,
        "blue": hue < 260,
        "purple": hue < 335,
    }
    return np.select(list(cases.values()), [COLOURS.index(name) for name in cases])


def look(images: np.ndarray) -> list[Facts]:
    """State the facts of each image: uint8 (N, 32, 32, 3) -> N `Facts`.

    The middle is the central quarter, the border a frame of four pixels. A colour is stated if 40 % of the middle, or
    half of the border, has it. A border with 75 % of one colour is plain; only then is a size stated.
    """
    frame = np.ones(images.shape[1:3], bool)
    frame[4:-4, 4:-4] = False
    colours = name_colours(images)
    middle, middle_share = _majority(colours[:, 8:-8, 8:-8].reshape(len(images), -1))
    border, border_share = _majority(colours[:, frame])
    light = images.mean((1, 2, 3)) / 255
    ground = np.median(images[:, frame].astype(np.int16), axis=1)[:, None, None]  # (N, 1, 1, 3)
    covered = (np.abs(images - ground).max(-1) > 40).mean((1, 2))
    plain = border_share >= 0.75
    return [
        Facts(
            colour=COLOURS[middle[i]] if middle_share[i] >= 0.4 else None,
            background=COLOURS[border[i]] if border_share[i] >= 0.5 else None,
            plain=bool(plain[i]),
            light="dark" if light[i] < 0.33 else "bright" if light[i] > 0.62 else None,
            size=None if not plain[i] else "small" if covered[i] < 0.22 else "large" if covered[i] > 0.42 else None,
        )
        for i in range(len(images))
    ]


def _majority(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent colour of each row (N, P), and its share."""
    counts = np.stack([(codes == c).mean(1) for c in range(len(COLOURS))], 1)
    return counts.argmax(1), counts.max(1)


_CLASS_OF = {spoken(name): name for name in (*CIFAR10_CLASSES, *SUPERCLASS_OF)}
_CLASS_OF |= {word: name for name, word in SYNONYMS.items()} | {noun: noun for noun in SUPERCLASSES}
_NOUN = "|".join(sorted(map(re.escape, _CLASS_OF), key=len, reverse=True))
_COLOUR = "(" + "|".join(COLOURS) + ")"
_CLAIMS = {
    "colour": rf"\b{_COLOUR} (?:{_NOUN})\b|(?<!around )it is mostly {_COLOUR}\b|\bmainly {_COLOUR}\b"
    rf"|\band {_COLOUR} colour\b",
    "background": rf"\bbackground is (?:uniformly |mostly )?{_COLOUR}\b|\b{_COLOUR} background\b"
    rf"|\b(?:behind it the picture|around it) is (?:uniformly |mostly )?{_COLOUR}\b",
    "light": r"\b(?:photo|light) is (dark|bright)\b",
    "size": rf"\b(small|large) (?:(?:{'|'.join(COLOURS)}) )?(?:{_NOUN})\b|\bfills most (of) the frame\b"
    r"|\ba small (part) of the frame\b",
}
_SIZES = {"of": "large", "part": "small"}


def objects_in(text: str) -> set[str]:
    """Find the objects that a text names: class names of CIFAR-10 and CIFAR-100, and superclass nouns."""
    return {_CLASS_OF[found.lower()] for found in re.findall(rf"\b({_NOUN})(?:e?s)?\b", text, re.I)}


def rename_object(text: str, name: str) -> str:
    """The text with another class's name in place of its object; colours and all other words stay."""

    def other(match: re.Match) -> str:
        return with_article(spoken(name)) if match[1] else spoken(name)

    return re.sub(rf"(\ban? )?\b(?:{_NOUN})\b", other, text, count=1, flags=re.I)


def same_thing(found: str, name: str) -> bool:
    """Return True if an object found in a text is class `name` or its superclass."""
    return found in (name, SUPERCLASS_OF.get(name))


def names_class(text: str, name: str) -> bool:
    """Return True if a text names the class by its name, a synonym or its superclass's noun."""
    return any(same_thing(found, name) for found in objects_in(text))


def read_claims(text: str) -> dict[str, set[str]]:
    """Find the facts that a text claims, e.g. ``{"colour": {"red"}, "light": {"dark"}}``."""
    for phrase in SPOKEN.values():
        text = text.replace(phrase, phrase.split()[-1])  # an orange fruit is no claim about a colour
    claims = {}
    for about, pattern in _CLAIMS.items():
        found = {word.lower() for match in re.finditer(pattern, text, re.I) for word in match.groups() if word}
        if found:
            claims[about] = {_SIZES.get(word, word) for word in found}
    return claims
