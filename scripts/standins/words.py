"""Write text about a 32 x 32 image from its class and its pixels: the sentences that the stand-ins learned from."""

import numpy as np

from mllmfl_lite.data.names import SUPERCLASS_OF, SYNONYMS, spoken, with_article
from standins.claims import Facts

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


def words_for(name: str) -> tuple[str, ...]:
    """The words that name a class: its own, a synonym, and for CIFAR-100 its superclass's noun."""
    more = (SYNONYMS.get(name), SUPERCLASS_OF.get(name))
    return (spoken(name), *(word for word in more if word))


def write(kind: str, name: str, facts: Facts, rng: np.random.Generator) -> str:
    """Write text of one kind about an image: varied in wording, never beyond the class and the facts.

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
