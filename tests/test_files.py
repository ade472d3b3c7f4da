"""Pictures in files: ImageNet-LT's lists and folder on a generated set of 30 classes, its crops, its bad files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.transforms import v2

from mllmfl_lite.data import load_images
from mllmfl_lite.data.batches import FileBatches, open_batches, random_box
from mllmfl_lite.data.folders import FOLDER_VARIABLE, find_unreadable, read_list
from mllmfl_lite.data.imagenet_lt import _imagenet_names
from mllmfl_lite.data.images import UNLABELLED, ImageFiles, ImageSet
from mllmfl_lite.federated import FedSettings
from mllmfl_lite.repro import torch_generator
from mllmfl_lite.runs import Experiment, load_federation, load_pool, run_experiment
from mllmfl_lite.runs.config import experiment_of
from mllmfl_lite.stages.align import AlignSettings

CLASSES = 30
TRAIN_COUNTS = [max(2, round(120 * 0.85**c)) for c in range(CLASSES)]  # Many, Medium and Few are all there


def picture(c: int, i: int) -> Image.Image:
    """A smooth picture of a size of its own whose colours tell the class."""
    rng = np.random.default_rng([c, i])
    colour = np.random.default_rng(c).integers(0, 256, (2, 2, 3))
    small = np.clip(colour + rng.integers(-30, 30, (2, 2, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(small).resize((40 + (7 * i) % 30, 40 + (5 * i) % 20), Image.Resampling.BILINEAR)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder of the form of ImageNet-LT."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "imagenet_lt").mkdir()
    counts = {"train": TRAIN_COUNTS, "val": [1] * CLASSES, "test": [2] * CLASSES}
    for part, of in counts.items():
        lines = []
        for c, count in enumerate(of):
            for i in range(count):
                name = f"{'train' if part == 'train' else 'val'}/n{c:08}/{part}_{i}.JPEG"
                (folder / "imagenet" / name).parent.mkdir(parents=True, exist_ok=True)
                picture(c, i + 1000 * (part != "train")).save(folder / "imagenet" / name, "JPEG")
                lines.append(f"{name} {c}")
        (folder / "imagenet_lt" / f"ImageNet_LT_{part}.txt").write_text("\n".join(lines) + "\n")
    (folder / "imagenet_lt" / "classes.txt").write_text("".join(f"thing {c}\n" for c in range(CLASSES)))
    return folder


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(made))
    return made


# ------------------------------------------------------------------------------------------------ lists and sets


def test_the_pages_recipe_lists_labelled_pictures_of_ones_own(tmp_path, monkeypatch):
    for c, name in enumerate(("red fox", "owl")):
        (tmp_path / "imagenet" / name).mkdir(parents=True)
        for i in range(23 + c):
            picture(c, i).save(tmp_path / "imagenet" / name / f"of {i}.jpg", "JPEG")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    page = (Path(__file__).parents[1] / "book" / "operations.md").read_text(encoding="utf-8")
    recipe = page.split("### Your own labelled pictures")[1]
    exec(recipe.split("```python\n")[1].split("```")[0], {})
    assert experiment_of(yaml.safe_load(recipe.split("```yaml\n")[1].split("```")[0])).dataset == "imagenet_lt"
    train, test = (load_images("imagenet_lt", part, 32) for part in ("train", "test"))
    assert train.names == ("owl", "red fox") and train.class_counts().tolist() == [4, 3]
    assert test.class_counts().tolist() == [20, 20]
    assert not {*train.ids} & {*test.ids} and len({*train.ids, *test.ids}) == 47
    for i in range(4):
        (tmp_path / "imagenet" / "owl" / f"of {i}.jpg").unlink()
    with pytest.raises(AssertionError, match="owl has 20 pictures; more than 20 are needed"):
        exec(recipe.split("```python\n")[1].split("```")[0], {})


def test_the_set_is_what_the_list_says(here):
    train = load_images("imagenet_lt", "train", 32)
    assert train.class_counts().tolist() == TRAIN_COUNTS and train.names[7] == "thing 7"
    assert len(train.images) == len(train) == sum(TRAIN_COUNTS)
    np.testing.assert_array_equal(train.images[3], picture_as_stored(here, 0, 3))
    some = train.subset(np.array([150, 3]))
    assert [np.asarray(p).shape for p in some.images] == [np.asarray(train.images[i]).shape for i in (150, 3)]
    assert train.checksum() == load_images("imagenet_lt", "train", 32).checksum()
    assert len({train.checksum(), some.checksum(), load_images("imagenet_lt", "train", 64).checksum()}) == 3


def picture_as_stored(folder, c, i):
    return np.asarray(Image.open(folder / "imagenet" / f"train/n{c:08}/train_{i}.JPEG"))


def test_groups_are_those_of_the_list(here):
    from mllmfl_lite.data.longtail import class_groups

    groups = class_groups(load_images("imagenet_lt", "train").class_counts())
    assert [len(groups[name]) for name in ("many", "medium", "few")] == [
        sum(n > 100 for n in TRAIN_COUNTS), sum(20 <= n <= 100 for n in TRAIN_COUNTS), sum(n < 20 for n in TRAIN_COUNTS)
    ]  # fmt: skip
    assert all(groups[name] for name in ("many", "medium", "few"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a.JPEG 0\nb.JPEG\n", "line 2 of .* must be a path and a class number.*it is 'b.JPEG'"),
        ("a.JPEG -1\n", "line 1 of"),
        ("a.JPEG 99999999999999999999\n", "line 1 of"),
        ("a.JPEG 0\n\nb.JPEG\n", "line 3 of"),
        ("", "has no lines"),
    ],
)
def test_a_list_of_another_form_is_refused(tmp_path, content, says):
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(ValueError, match=says):
        read_list(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_list(tmp_path / "other.txt")


def test_paths_with_spaces(tmp_path):
    (tmp_path / "list.txt").write_text("my pictures/a b.png 3\n")
    paths, labels = read_list(tmp_path / "list.txt")
    assert paths == ["my pictures/a b.png"] and labels.tolist() == [3]


def test_an_official_list_must_be_whole(made, tmp_path, monkeypatch):
    (tmp_path / "imagenet_lt").mkdir()
    lists = tmp_path / "imagenet_lt" / "ImageNet_LT_train.txt"
    lists.write_text((made / "imagenet_lt" / "ImageNet_LT_train.txt").read_text())
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match=r"the official list 115,846; fetch it again, or name the classes"):
        load_images("imagenet_lt", "train")
    (tmp_path / "imagenet_lt" / "classes.txt").write_text("one\ntwo")
    with pytest.raises(ValueError, match="class number 29, but there are 2 class names"):
        load_images("imagenet_lt", "train")


def test_the_official_names_are_a_thousand():
    names = _imagenet_names()
    assert len(set(names)) == 1000 and (names[0], names[207], names[999]) == (
        "tench",
        "golden retriever",
        "toilet tissue",
    )


# ------------------------------------------------------------------------------------------------ bad files


def test_a_list_with_a_mark_blank_lines_and_blanks_is_read(tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeffa.png 0\r\n\r\nb.png  1 \r\n\r\n".encode())
    paths, labels = read_list(tmp_path / "list.txt")
    assert paths == ["a.png", "b.png"] and labels.tolist() == [0, 1]


def own_set(tmp_path, monkeypatch, classes="one\ntwo\n"):
    """Two classes of two images each; the class file as given."""
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet_lt").mkdir()
    for i in range(4):
        picture(i, i).save(tmp_path / "imagenet" / f"p{i}.jpg", "JPEG")
    (tmp_path / "imagenet_lt" / "classes.txt").write_bytes(classes.encode())
    lines = "".join(f"p{i}.jpg {i % 2}\n" for i in range(4))
    (tmp_path / "imagenet_lt" / "ImageNet_LT_train.txt").write_text(lines)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))


def test_class_names_are_stripped_and_blank_lines_skipped(tmp_path, monkeypatch):
    own_set(tmp_path, monkeypatch, "\ufeffone \r\n\r\n\ttwo\r\n\r\n")
    assert load_images("imagenet_lt", "train").names == ("one", "two")


def test_a_class_name_that_stands_twice_is_refused_by_name(tmp_path, monkeypatch):
    own_set(tmp_path, monkeypatch, "bird\nbird\n")
    with pytest.raises(ValueError, match="'bird' stands 2 times"):
        load_images("imagenet_lt", "train")


def test_a_missing_file_is_named_before_anything_trains_and_the_advice_works(tmp_path, monkeypatch):
    own_set(tmp_path, monkeypatch)
    (tmp_path / "imagenet" / "p2.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 listed images are missing below .*: p2.jpg. .*take their lines out"):
        run_experiment(Experiment("imagenet_lt", model="resnet50"), tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()
    listed = tmp_path / "imagenet_lt" / "ImageNet_LT_train.txt"
    listed.write_text("".join(line for line in listed.open() if "p2" not in line))
    assert len(load_images("imagenet_lt", "train")) == 3


def test_all_unreadable_files_are_found_on_request(tmp_path):
    for name in ("a.jpg", "cut.jpg", "empty.jpg"):
        picture(0, 0).save(tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:200])
    (tmp_path / "empty.jpg").write_bytes(b"")
    found = find_unreadable(ImageFiles(tmp_path, ["a.jpg", "cut.jpg", "empty.jpg", "gone.jpg"]))
    assert list(found) == ["cut.jpg", "empty.jpg", "gone.jpg"]
    assert "cut.jpg cannot be read as an image" in found["cut.jpg"] and "0 bytes" in found["empty.jpg"]


def test_a_list_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "list.txt").write_bytes("café/a.png 0\n".encode("latin-1"))
    with pytest.raises(ValueError, match="cannot be read as UTF-8 text"):
        read_list(tmp_path / "list.txt")


def test_a_long_list_holds_names_only():
    paths = [f"train/n{i // 1000:08}/{i:06}.JPEG" for i in range(100_000)] + ["x" * 250]
    many = ImageFiles("nowhere", paths)
    images = ImageSet(many, np.zeros(len(many), np.uint8), ("thing",), "made")
    assert many.paths.nbytes == 8 * len(paths) and images.subset(np.array([100_000])).ids == ["x" * 250]
    assert images.subset(np.arange(3)).checksum() == images.subset(np.arange(3)).checksum()


def test_a_picture_that_goes_bad_later_is_named(tmp_path):
    picture(0, 0).save(tmp_path / "a.jpg")
    files = ImageFiles(tmp_path, np.array(["a.jpg"]), 32)
    batches = FileBatches(ImageSet(files, np.zeros(1, np.int64), ("x",), "made"))
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"a.jpg cannot be read as an image \(FileNotFoundError"):
        batches.plain(torch.tensor([0]))


# ------------------------------------------------------------------------------------------------ batches


def test_test_crops_are_torchvisions(here):
    test = load_images("imagenet_lt", "test", 56)
    usual = v2.Compose([
        v2.PILToTensor(), v2.Resize(64, antialias=True), v2.CenterCrop(56), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    found = open_batches(test).plain(torch.arange(6))
    torch.testing.assert_close(found, torch.stack([usual(test.images[i]) for i in range(6)]), atol=1e-5, rtol=1e-5)


def test_random_boxes_are_spread_as_torchvisions():
    """Area and shape against torchvision's own draws, and every box lies inside."""
    picture, chances = torch.zeros(3, 300, 500), torch.rand(4000, 40, generator=torch_generator(0))
    mine = np.array([random_box(500, 300, of) for of in chances.tolist()])
    assert (mine[:, :2] >= 0).all() and (mine[:, 2] >= 1).all()
    assert (mine[:, 0] + mine[:, 2] <= 300).all() and (mine[:, 1] + mine[:, 3] <= 500).all()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        usual = v2.RandomResizedCrop(32)
        theirs = [usual.make_params([picture]) for _ in range(4000)]
    theirs = np.array([[box[key] for key in ("top", "left", "height", "width")] for box in theirs])
    deciles = [0.1, 0.5, 0.9]
    for of, slack in ((area, 0.04), (shape, 0.04), (lambda b: b[:, 0], 6), (lambda b: b[:, 1], 9)):
        np.testing.assert_allclose(np.quantile(of(mine), deciles), np.quantile(of(theirs), deciles), rtol=0, atol=slack)


def area(boxes):
    return boxes[:, 2] * boxes[:, 3] / (300 * 500)


def shape(boxes):
    return boxes[:, 3] / boxes[:, 2]


def test_boxes_reach_every_edge():
    square = [0.5, 0.5]  # half of the picture, as wide as high
    top, left, height, width = random_box(100, 100, [*square, 0.0, 0.0])
    assert (top, left) == (0, 0) and height == width == round((0.54 * 100 * 100) ** 0.5)
    top, left, height, width = random_box(100, 100, [*square, 1 - 1e-9, 1 - 1e-9])
    assert (top + height, left + width) == (100, 100)


def test_where_no_box_fits_the_middle_is_taken():
    never = [0.999, 0.999, 0.5, 0.5] * 10  # nearly the whole area, as wide as allowed
    assert random_box(10, 1000, never) == ((1000 - 13) // 2, 0, 13, 10)
    assert random_box(1000, 10, [0.999, 0.001, 0.5, 0.5] * 10) == (0, (1000 - 13) // 2, 10, 13)


def test_threads_and_streams_change_nothing_and_seeds_do(here):
    train = load_images("imagenet_lt", "train", 16)
    parts = torch.arange(40).split(16)
    one, many = FileBatches(train, threads=1), FileBatches(train, threads=4)
    calm = [one.augmented(part, g) for g in [torch_generator(1)] for part in parts]
    ahead = list(many.stream(parts, torch_generator(1)))
    assert [x.shape for x in ahead] == [(16, 3, 16, 16), (16, 3, 16, 16), (8, 3, 16, 16)]
    assert all(torch.equal(a, b) for a, b in zip(calm, ahead, strict=True))
    assert not torch.equal(calm[0], one.augmented(parts[0], torch_generator(2)))
    assert list(many.stream([], torch_generator(1))) == []


def test_half_of_the_pictures_are_flipped(here):
    train = load_images("imagenet_lt", "train", 8)
    batches = FileBatches(train)
    flips = [of[0] < 0.5 for of in torch.rand(200, 41, generator=torch_generator(3)).tolist()]
    x = batches.augmented(torch.zeros(200, dtype=torch.int64), torch_generator(3))
    assert 70 < sum(flips) < 130
    chances = [0.9, *[1 - 1e-9, 0.5, 0.5, 0.5] * 10]
    straight, mirrored = (batches._part(0, [coin, *chances[1:]]) for coin in (0.9, 0.1))
    assert torch.equal(straight.flip(2), mirrored) and x.shape == (200, 3, 8, 8)


# ------------------------------------------------------------------------------------------------ the whole way


@pytest.mark.parametrize("teacher", ["clip"])
def test_resnet50_runs_on_files_with_a_folder_as_the_pool(here, tmp_path, teacher):
    """Rounds and stage 3 at 32 pixels, clients from the list, an unlabelled folder as the server's pool; and again."""
    settings = FedSettings(rounds=1, clients_per_round=1, local_epochs=1, batch_size=16, lr=0.01, report_rounds=1)
    (pool := tmp_path / "pool").mkdir()
    for c in range(4):
        picture(c, 5).save(pool / f"{c}.png")
    align = AlignSettings(per_class=2, epochs=1, batch_size=4, teacher=teacher)
    experiment = Experiment(
        "imagenet_lt", model="resnet50", num_clients=12, federated=settings, image_size=32, align=align, pool=str(pool),
        stages=(2, 3),
    )  # fmt: skip
    _, split, _ = load_federation(experiment)
    assert sorted(np.concatenate(split)) == list(range(sum(TRAIN_COUNTS))), "the list's own long tail"
    assert load_pool(experiment).names == UNLABELLED
    with pytest.warns(UserWarning, match="the pool has fewer than 2 images"):
        result = run_experiment(experiment, tmp_path / "run", "cpu")
    assert result["summary"]["groups"].keys() >= {"many", "medium", "few"}
    assert result["aligned"]["server_set"]["labels_right"] is None
    assert json.loads((tmp_path / "run" / "fedavg_seed0.json").read_text())["summary"] == result["summary"]
    plain = replace(experiment, stages=(2,), align=AlignSettings())
    assert run_experiment(plain, tmp_path / "run", "cpu", label="plain")["history"] == result["history"]
