"""What the pixels say, what is written, and what is read back out of a text."""

import colorsys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from standins.claims import COLOURS, Facts, look, name_colours, names_class, objects_in, read_claims
from standins.words import KNOWLEDGE, words_for, write

from mllmfl_lite.data import load_images
from mllmfl_lite.data.names import CIFAR10_CLASSES, SUPERCLASS_OF, SUPERCLASSES, spoken
from mllmfl_lite.teachers.prompts import KINDS

CLASSES = (*CIFAR10_CLASSES, *SUPERCLASS_OF)
MADE = st.builds(
    Facts,
    colour=st.sampled_from([None, *COLOURS]),
    background=st.sampled_from([None, *COLOURS]),
    plain=st.booleans(),
    light=st.sampled_from([None, "dark", "bright"]),
    size=st.sampled_from([None, "small", "large"]),
)


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0, 0, 0), "black"), ((255, 255, 255), "white"), ((128, 128, 128), "grey"), ((220, 20, 20), "red"),
        ((250, 140, 20), "orange"), ((110, 70, 40), "brown"), ((240, 230, 40), "yellow"), ((40, 160, 40), "green"),
        ((40, 80, 200), "blue"), ((150, 40, 170), "purple"),
    ],
)  # fmt: skip
def test_colours_are_called_what_people_call_them(rgb, name):
    assert COLOURS[name_colours(np.array(rgb, np.uint8))] == name


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_hue_agrees_with_the_standard_library(rgb):
    """For strong colours the hue decides alone; colorsys computes it independently."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(v / 255 for v in rgb))
    name = COLOURS[name_colours(np.array(rgb, np.uint8))]
    if saturation > 0.3 and value > 0.3:
        bounds = {"green": (68, 165), "blue": (165, 260), "purple": (260, 335)}
        near = [edge for pair in bounds.values() for edge in pair]
        if min(abs(hue * 360 - edge) for edge in near) > 1:
            expected = next((n for n, (low, high) in bounds.items() if low < hue * 360 < high), None)
            assert expected in (None, name) and (expected or name not in bounds or 45 < hue * 360 < 68)


def test_facts_of_made_pictures():
    sky = np.full((32, 32, 3), (60, 110, 220), np.uint8)
    sky[13:19, 13:19] = (220, 20, 20)
    bright = np.full((32, 32, 3), 250, np.uint8)
    bright[2:30, 2:30] = (40, 160, 40)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    first, second, third = look(np.stack([sky, bright, noise]))
    assert first == Facts(colour="blue", background="blue", plain=True, light=None, size="small")
    assert second.colour == "green" and second.size is None and not second.plain
    assert third == Facts()


def test_every_fine_class_has_one_superclass_and_something_is_known_of_it():
    names = load_images("cifar10_mini", "web").names[10:]
    assert set(names) == set(SUPERCLASS_OF) and len(SUPERCLASS_OF) == 100 and len(SUPERCLASSES) == 20
    assert set(KNOWLEDGE) == set(CIFAR10_CLASSES) | set(SUPERCLASSES)


@given(st.sampled_from(["caption", "class_name", *KINDS]), st.sampled_from(CLASSES), MADE, st.integers(0, 99))
def test_texts_claim_their_class_and_their_facts_and_nothing_else(kind, name, facts, seed):
    assume(facts.colour != "orange" or SUPERCLASS_OF.get(name) != "fruit")  # "an orange fruit" has two meanings
    text = write(kind, name, facts, np.random.default_rng(seed))
    assert names_class(text, name)
    assert objects_in(text) <= {name, SUPERCLASS_OF.get(name, name)}
    for about, claimed in read_claims(text).items():
        assert claimed == {getattr(facts, about)}, (text, about)


def test_the_name_of_a_thing_is_no_claim_about_its_colour():
    assert "colour" not in read_claims("A photo of an orange fruit.")
    assert read_claims("A photo of a green orange fruit.")["colour"] == {"green"}


def test_texts_vary():
    data = load_images("cifar10_mini", "train")
    rng = np.random.default_rng(0)
    facts = look(data.images[:200])
    texts = {write("detailed_description", "airplane", fact, rng) for fact in facts}
    assert len(texts) > 150


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("Two cars and a pickup truck.", {"automobile", "pickup_truck"}),
        ("An orange truck on a plain background can be seen.", {"truck"}),
        ("A boat, a plane: no dogma.", {"ship", "airplane"}),
        ("Foxes and buses.", {"fox", "bus"}),
        ("", set()),
    ],
)
def test_objects_are_found_as_whole_words(text, objects):
    assert objects_in(text) == objects


def test_a_superclass_counts_as_a_name_but_not_another_class():
    assert names_class("It is a fish.", "trout") and names_class("It is a trout.", "trout")
    assert not names_class("It is a shark.", "trout") and not names_class("It is a fish.", "whale")
    assert spoken("orange") == "orange fruit" and words_for("ship") == ("ship", "boat")


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="no kind of text named 'poem'"):
        write("poem", "cat", Facts(), np.random.default_rng(0))
