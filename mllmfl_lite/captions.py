"""What can be said of a 32 x 32 picture from its class and its pixels: the sentences that the stand-ins learned from.

Two halves that meet in `Facts`. `look` computes facts from pixels (main colour, background, light, size); `write` turns
a class name and facts into text of one kind; `read_claims` goes back from any text to the facts and objects that it
claims, so that a model's text can be held against the picture. Real models need none of this: it exists because
no description of these images exists, and because claims about colour can be checked without a human.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from mllmfl_lite.data import CIFAR10_CLASSES

KINDS = ("conversation", "detailed_description", "complex_reasoning")
COLOURS = ("black", "white", "grey", "red", "orange", "brown", "yellow", "green", "blue", "purple")

# CIFAR-100's superclasses, as a noun each, with their fine classes (Krizhevsky, 2009)
SUPERCLASSES = {
    "sea mammal": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flower": "orchid poppy rose sunflower tulip",
    "container": "bottle bowl can cup plate",
    "fruit": "apple mushroom orange pear sweet_pepper",
    "household device": "clock keyboard lamp telephone television",
    "piece of furniture": "bed chair couch table wardrobe",
    "insect": "bee beetle butterfly caterpillar cockroach",
    "predator": "bear leopard lion tiger wolf",
    "building": "bridge castle house road skyscraper",
    "landscape": "cloud forest mountain plain sea",
    "large animal": "camel cattle chimpanzee elephant kangaroo",
    "wild mammal": "fox porcupine possum raccoon skunk",
    "invertebrate": "crab lobster snail spider worm",
    "person": "baby boy girl man woman",
    "reptile": "crocodile dinosaur lizard snake turtle",
    "small mammal": "hamster mouse rabbit shrew squirrel",
    "tree": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicle": "bicycle bus motorcycle pickup_truck train",
    "machine": "lawn_mower rocket streetcar tank tractor",
}
SUPERCLASS_OF = {fine: noun for noun, members in SUPERCLASSES.items() for fine in members.split()}
SPOKEN = {"orange": "orange fruit", "plain": "grassy plain", "can": "tin can"}  # whose names mean something else, too
SYNONYMS = {"airplane": "plane", "automobile": "car", "ship": "boat"}

# What follows from the class alone: (what it is, where it is found, what it does there)
KNOWLEDGE = {
    "airplane": ("a means of transport", "at an airport or in the sky", "carries passengers over long distances"),
    "automobile": ("a means of transport", "on a street", "takes people from place to place"),
    "ship": ("a means of transport", "on the water", "carries people or goods"),
    "truck": ("a means of transport", "on a street", "moves heavy goods"),
    "bird": ("an animal with wings", "outdoors", "looks for food or rests"),
    "cat": ("a pet", "in or near a home", "rests or watches something"),
    "dog": ("a pet", "in or near a home", "waits for its owner"),
    "deer": ("a wild animal", "in the woods or a field", "looks for food and listens for danger"),
    "frog": ("a small amphibian", "near water", "waits for something to eat"),
    "horse": ("a farm animal", "in a field or a stable", "grazes or runs"),
    "sea mammal": ("an animal of the water", "in the water", "looks for food"),
    "fish": ("an animal of the water", "under water", "swims and looks for food"),
    "flower": ("a plant", "in a garden", "opens in the sun"),
    "container": ("an object of the household", "in a kitchen", "holds food or drink"),
    "fruit": ("something to eat", "in a kitchen or a garden", "ripens until somebody eats it"),
    "household device": ("an object of the household", "in a room", "helps somebody at home"),
    "piece of furniture": ("an object of the household", "in a room", "makes the room useful"),
    "insect": ("a small animal", "on a plant", "looks for food"),
    "predator": ("a wild animal", "in the wild", "watches for prey"),
    "building": ("something that people built", "outdoors", "stands for many years"),
    "landscape": ("a part of nature", "outdoors", "changes with the weather"),
    "large animal": ("a large animal", "outdoors", "grazes or rests"),
    "wild mammal": ("a wild animal", "in the woods", "looks for food at night"),
    "invertebrate": ("a small animal", "on the ground or in the water", "moves slowly"),
    "person": ("a human being", "at home or outdoors", "looks at the camera"),
    "reptile": ("a cold-blooded animal", "in a warm place", "warms itself in the sun"),
    "small mammal": ("a small animal", "on the ground", "hides from danger"),
    "tree": ("a plant", "outdoors", "gives shade"),
    "vehicle": ("a means of transport", "on a street or a track", "takes people from place to place"),
    "machine": ("a machine", "outdoors", "does heavy work"),
}


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


# ------------------------------------------------------------------------------------------------- facts -> text


def with_article(noun: str) -> str:
    """``"an airplane"``, ``"a cat"``."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def spoken(name: str) -> str:
    """A class name as it is said: ``"pickup_truck"`` is "pickup truck"."""
    return SPOKEN.get(name, name.replace("_", " "))


def words_for(name: str) -> tuple[str, ...]:
    """The words that name a class: its own, a synonym, and for CIFAR-100 its superclass's noun."""
    more = (SYNONYMS.get(name), SUPERCLASS_OF.get(name))
    return (spoken(name), *(word for word in more if word))


def write(kind: str, name: str, facts: Facts, rng: np.random.Generator) -> str:
    """Text of one kind about a picture of class `name`: varied in wording, never beyond the class and the facts.

    Args:
        kind: one of `KINDS`, ``"caption"`` (one short sentence) or ``"class_name"`` (the bare name).
        name: a class of CIFAR-10 or CIFAR-100.
        facts: what the pixels say.
        rng: decides the wording.
    """
    writers = {
        "class_name": lambda *_: spoken(name),
        "caption": _caption,
        "conversation": _conversation,
        "detailed_description": _description,
        "complex_reasoning": _reasoning,
    }
    if kind not in writers:
        raise ValueError(f"no kind of text named {kind!r}; there are {', '.join(writers)}")
    return writers[kind](name, facts, rng)


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return choices[int(rng.integers(len(choices)))]


def _noun(name: str, rng: np.random.Generator) -> str:
    return _pick(rng, *words_for(name))


def _phrase(name: str, facts: Facts, rng: np.random.Generator) -> str:
    """The object with what is known of it: ``"a small brown horse"``."""
    size = facts.size if facts.size and rng.random() < 0.7 else ""
    colour = facts.colour if facts.colour and rng.random() < 0.8 else ""
    return with_article(" ".join(word for word in (size, colour, _noun(name, rng)) if word))


def _caption(name: str, facts: Facts, rng: np.random.Generator) -> str:
    phrase = _phrase(name, facts, rng)
    place = f" on a {facts.background} background" if facts.background else ""
    return _pick(rng, f"{phrase}{place}.", f"A photo of {phrase}{place}.", f"This is {phrase}{place}.")


def _description(name: str, facts: Facts, rng: np.random.Generator) -> str:
    phrase = _phrase(name, facts, rng)
    sentences = [
        _pick(
            rng,
            f"The picture shows {phrase}.",
            f"There is {phrase} in the middle of the picture.",
            f"In this photo we see {phrase}.",
            f"{phrase[0].upper()}{phrase[1:]} is the main object of the photo.",
        )
    ]
    if facts.background:
        ground = f"{'uniformly ' if facts.plain else 'mostly '}{facts.background}"
        sentences.append(
            _pick(rng, f"The background is {ground}.", f"Behind it the picture is {ground}.", f"Around it is {ground}.")
        )
    else:
        sentences.append(_pick(rng, "The background has many colours.", "There is no single colour behind it."))
    if facts.light:
        sentences.append(_pick(rng, f"The photo is {facts.light}.", f"The light is {facts.light}."))
    if facts.size:
        fills = "fills most of the frame" if facts.size == "large" else "takes up a small part of the frame"
        sentences.append(f"It {fills}.")
    return " ".join(sentences)


def _conversation(name: str, facts: Facts, rng: np.random.Generator) -> str:
    noun = with_article(_noun(name, rng))
    turns = [
        (
            _pick(rng, "What is in the picture?", "What does the photo show?", "What is the main object?"),
            _pick(rng, f"It is {noun}.", f"The picture shows {noun}.", f"{noun[0].upper()}{noun[1:]}."),
        )
    ]
    if facts.colour:
        turns.append(("What colour is it?", _pick(rng, f"It is mostly {facts.colour}.", f"Mainly {facts.colour}.")))
    if facts.background:
        turns.append(("What colour is the background?", f"The background is {facts.background}."))
    if facts.light:
        turns.append(("Is the photo dark or bright?", f"The photo is {facts.light}."))
    keep = [0, *(1 + np.sort(rng.permutation(len(turns) - 1)[:2]))]  # the object, and up to two more
    return "\n".join(f"Question: {turns[i][0]}\nAnswer: {turns[i][1]}" for i in keep)


def _reasoning(name: str, facts: Facts, rng: np.random.Generator) -> str:
    noun = _noun(name, rng)
    what, where, does = KNOWLEDGE[name if name in KNOWLEDGE else SUPERCLASS_OF[name]]
    evidence = f", and the {facts.background} background fits that" if facts.background else ""
    guess = _pick(rng, "The photo was probably taken", "It was most likely photographed", "This was probably seen")
    shape = _pick(rng, "its shape", "its outline", "its form")
    seen = f"{shape} and {facts.colour} colour" if facts.colour else shape
    return f"From {seen} it is {with_article(noun)}, which is {what}. {guess} {where}{evidence}. " + _pick(
        rng, f"The {noun} perhaps {does}.", f"Next, the {noun} perhaps {does}."
    )


# ------------------------------------------------------------------------------------------------- text -> claims

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
