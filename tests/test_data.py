import hashlib
import pickle
import socket
import tarfile

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from mllmfl_lite.data import cifar, folders, load_images
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.names import CIFAR10_CLASSES, CIFAR100_CLASSES


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(folders.FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# ------------------------------------------------------------------------------------------------ the bundled set


@pytest.mark.parametrize(("part", "size", "classes"), [("train", 5000, 10), ("web", 3000, 110), ("test", 2000, 10)])
def test_the_bundled_parts(part, size, classes):
    images = load_images("cifar10_mini", part)
    assert images.images.shape == (size, 32, 32, 3) and images.images.dtype == np.uint8
    assert images.num_classes == classes and images.names[:10] == CIFAR10_CLASSES
    assert not images.images.flags.writeable


def test_the_bundled_class_counts():
    assert load_images("cifar10_mini", "train").class_counts().tolist() == [500] * 10
    assert load_images("cifar10_mini", "test").class_counts().tolist() == [200] * 10
    assert load_images("cifar10_mini", "web").class_counts().tolist() == [150] * 10 + [15] * 100


def test_the_bundled_parts_are_disjoint():
    parts = cifar.mini_index()["parts"].values()
    places = [(part["origins"][o], i) for part in parts for o, i in zip(part["origin"], part["index"], strict=True)]
    assert len(set(places)) == len(places) == 10_000
    assert {origin for origin, _ in places} == {"cifar10/train", "cifar10/test", "cifar100/train"}
    assert set(cifar.mini_index()["parts"]["test"]["origins"]) == {"cifar10/test"}


def test_no_picture_stands_twice():
    seen = [hashlib.sha256(i).digest() for p in ("train", "web", "test") for i in load_images("cifar10_mini", p).images]
    assert len(set(seen)) == len(seen)


def test_the_web_pool_is_shuffled():
    """Its order must not give the classes away."""
    labels = load_images("cifar10_mini", "web").labels
    assert abs((labels[:1500] < 10).mean() - 0.5) < 0.05
    assert (np.diff(labels) == 0).mean() < 0.1


def test_the_bundle_is_small_and_its_card_tells_the_truth():
    files = list(cifar.MINI_FOLDER.iterdir())
    assert sum(f.stat().st_size for f in files) < 8e6
    card = (cifar.MINI_FOLDER / "README.md").read_text(encoding="utf-8")
    for part in cifar.mini_index()["parts"].values():
        assert part["sha256"] in card and f"{part['bytes']:,}" in card


def test_a_damaged_bundle_is_refused(tmp_path, monkeypatch):
    for file in cifar.MINI_FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    sheet = tmp_path / "test.avif"
    sheet.write_bytes(sheet.read_bytes()[:-100])
    monkeypatch.setattr(cifar, "MINI_FOLDER", tmp_path)
    cifar.load_mini.cache_clear()
    with pytest.raises(ValueError, match=r"test.avif is damaged or missing; .*git checkout"):
        load_images("cifar10_mini", "test")
    sheet.unlink()
    with pytest.raises(ValueError, match="damaged or missing"):
        load_images("cifar10_mini", "test")
    cifar.load_mini.cache_clear()


# ------------------------------------------------------------------------------------------------ image sets


def test_subsets_and_checksums(images):
    part = images.subset(np.array([4, 1]))
    assert len(part) == 2 and part.labels.tolist() == [images.labels[4], images.labels[1]]
    assert part.checksum() == images.subset(np.array([4, 1])).checksum() != images.subset(np.array([1, 4])).checksum()


@pytest.mark.parametrize(
    ("shape", "kind", "labels", "rule"),
    [((2, 8, 8, 3), np.float32, [0, 1], "must be uint8"), ((2, 8, 8, 4), np.uint8, [0, 1], "must be uint8"),
     ((2, 8, 8, 3), np.uint8, [0], "one label an image"), ((2, 8, 8, 3), np.uint8, [0, 2], r"must lie in 0\.\.1"),
     ((2, 8, 8, 3), np.uint8, [-1, 0], r"must lie in 0\.\.1")],
)  # fmt: skip
def test_arrays_that_are_no_image_set_are_refused(shape, kind, labels, rule):
    with pytest.raises(ValueError, match=rule):
        ImageSet(np.zeros(shape, kind), np.array(labels), ("a", "b"), "made")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no data set named 'mnist'; there are cifar10_mini"):
        load_images("mnist")
    with pytest.raises(ValueError, match="cifar10 has no part 'web'; it has train, test"):
        load_images("cifar10", "web")


# ------------------------------------------------------------------------------------------------ the full sets


def sha256(pixels, labels):
    return hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest()


def write_batches(folder, monkeypatch):
    """A folder in CIFAR-10's own format with 6 made pictures, and torchvision and us told their checksums."""
    rng, base = np.random.default_rng(0), folder / CIFAR10.base_folder
    base.mkdir()
    lists = {"train_list": ["data_batch_1", "data_batch_2"], "test_list": ["test_batch"]}
    arrays = {}
    for attribute, names in lists.items():
        parts = [(rng.integers(0, 256, (3, 3072), dtype=np.uint8), rng.integers(0, 10, 3).tolist()) for _ in names]
        for name, (pixels, labels) in zip(names, parts, strict=True):
            (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
        sums = [[n, hashlib.md5((base / n).read_bytes()).hexdigest()] for n in names]
        monkeypatch.setattr(CIFAR10, attribute, sums)
        pixels = np.concatenate([p for p, _ in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        arrays[attribute.removesuffix("_list")] = (pixels, np.concatenate([labels for _, labels in parts]))
    meta = base / "batches.meta"
    meta.write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}))
    md5 = hashlib.md5(meta.read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta.name, "key": "label_names", "md5": md5})
    for part, (pixels, labels) in arrays.items():
        monkeypatch.setitem(cifar.PIXELS_SHA256, ("cifar10", part), sha256(pixels, labels))
    return arrays


def test_torchvisions_folder_is_read(folder, monkeypatch, offline):
    arrays = write_batches(folder, monkeypatch)
    for part in ("train", "test"):
        images = load_images("cifar10", part)
        assert np.array_equal(images.images, arrays[part][0]) and images.labels.tolist() == arrays[part][1].tolist()
        assert images.names == CIFAR10_CLASSES


def test_other_pixels_than_the_originals_are_refused(folder, monkeypatch, offline):
    write_batches(folder, monkeypatch)
    monkeypatch.setitem(cifar.PIXELS_SHA256, ("cifar10", "train"), "0" * 64)
    with pytest.raises(ValueError, match="differ from the originals"):
        load_images("cifar10", "train")


def test_a_packed_file_is_read_and_checked(folder, monkeypatch):
    pixels, labels = np.zeros((2, 32, 32, 3), np.uint8), np.array([1, 0])
    arrays = {"x_test": pixels, "y_test": labels, "names": np.array(CIFAR10_CLASSES)}
    np.savez(folder / "cifar10.npz", **arrays)
    with pytest.raises(ValueError, match="differ from the originals"):
        load_images("cifar10", "test")
    monkeypatch.setitem(cifar.PIXELS_SHA256, ("cifar10", "test"), sha256(pixels, labels))
    assert load_images("cifar10", "test").labels.tolist() == [1, 0]
    (folder / "cifar10.npz").write_bytes((folder / "cifar10.npz").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cifar10.npz cannot be read"):
        load_images("cifar10", "test")


def test_a_packed_file_with_other_arrays_is_refused(folder, monkeypatch):
    pixels, labels = np.zeros((2, 32, 32, 3), np.uint8), np.array([1, 0])
    monkeypatch.setitem(cifar.PIXELS_SHA256, ("cifar10", "test"), sha256(pixels, labels))
    np.savez(folder / "cifar10.npz", images=pixels, labels=labels)
    with pytest.raises(ValueError, match=r"cifar10.npz cannot be read .*x_test"):
        load_images("cifar10", "test")
    np.savez(folder / "cifar10.npz", x_test=pixels, y_test=labels.astype(float))
    with pytest.raises(ValueError, match="labels must be whole numbers"):
        load_images("cifar10", "test")
    np.savez(folder / "cifar10.npz", x_test=pixels, y_test=np.array([1, "x"], object))
    with pytest.raises(ValueError, match=r"cifar10.npz cannot be read .*pickle"):
        load_images("cifar10", "test")
    np.savez(folder / "cifar10.npz", x_test=pixels, y_test=labels, names=np.array(CIFAR10_CLASSES[::-1]))
    assert load_images("cifar10", "test").names == CIFAR10_CLASSES, "the data set's own, whatever the file says"


def test_cifar100s_names_are_in_the_order_of_its_labels():
    web = load_images("cifar10_mini", "web")
    assert web.names[10:] == CIFAR100_CLASSES


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_absent_and_offline_says_what_to_put_where(folder, offline, dataset):
    with pytest.raises(ValueError) as caught:
        load_images(dataset, "train")
    message = str(caught.value)
    assert str(folder) in message and folders.FOLDER_VARIABLE in message and "-python.tar.gz" in message
    assert "Network is unreachable" in message and "\n" not in message


def test_a_corrupt_archive_is_refused_and_kept(folder, offline):
    archive = folder / "cifar-10-python.tar.gz"
    archive.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz is corrupt: its md5 is not"):
        load_images("cifar10", "train")
    assert archive.read_bytes() == b"not an archive"


def test_an_archive_with_damaged_batches_is_refused(folder, monkeypatch, offline):
    write_batches(folder, monkeypatch)
    (folder / CIFAR10.base_folder / "data_batch_2").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be downloaded"):
        load_images("cifar10", "train")


def test_an_archive_is_unpacked(folder, monkeypatch, offline):
    write_batches(folder, monkeypatch)
    archive = folder / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / CIFAR10.base_folder, arcname=CIFAR10.base_folder)
    for file in (folder / CIFAR10.base_folder).iterdir():
        file.unlink()
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(load_images("cifar10", "train")) == 6


def test_a_wrong_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(folders.FOLDER_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"MLLMFL_DATA=.*nowhere is not a folder; create it"):
        load_images("cifar10")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(folders.FOLDER_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ValueError, match="file is not a folder"):
        load_images("cifar10")
    inside = tmp_path / "cifar-10-batches-py"
    inside.mkdir()
    monkeypatch.setenv(folders.FOLDER_VARIABLE, str(inside))
    with pytest.raises(ValueError, match=f"name the folder above it: {tmp_path}"):
        load_images("cifar10")


def test_without_the_variable_a_cache_folder_is_used(monkeypatch):
    monkeypatch.delenv(folders.FOLDER_VARIABLE, raising=False)
    assert folders.data_folder().name == "mllmfl_lite"
