"""The world without overlap: what the server keeps, its pool, and what a run says of images that sets share."""

import logging

import numpy as np
import pytest

from mllmfl_lite.data import reserved
from mllmfl_lite.data.cifar import NAMES
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.reserved import fingerprints, for_clients, overlap, reserved_pool
from mllmfl_lite.runs import Experiment, load_federation, load_pool, run_experiment
from mllmfl_lite.runs.config import experiment_of

SMALL = {"num_clients": 4, "width": 4, "imbalance_factor": 5.0, "pool": "reserved"}
ROUNDS = {"rounds": 1, "clients_per_round": 2, "local_epochs": 1, "report_rounds": 1}


def made(dataset, part):
    names, each = NAMES[dataset], {"train": 12 if dataset == "cifar10" else 2, "test": 2}[part]
    rng = np.random.default_rng(sum(map(ord, dataset + part)))
    labels = np.repeat(np.arange(len(names)), each)
    images = rng.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    if (dataset, part) == ("cifar100", "train"):
        images[7] = made("cifar10", "test").images[3]  # as one of the real images is
    return ImageSet(images, labels, names, f"{dataset}/{part}")


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    monkeypatch.setattr(reserved, "load_cifar", made)
    monkeypatch.setattr("mllmfl_lite.data.load_cifar", made)
    monkeypatch.setattr(reserved, "RESERVED", 4)


def test_clients_pool_and_test_share_no_image_whatever_the_seed():
    for seed in range(4):
        experiment = experiment_of({"seed": seed, "federated": ROUNDS, **SMALL})
        (train, split, test), pool = load_federation(experiment), load_pool(experiment)
        assert overlap(clients=train, pool=pool, test=test) == {
            "clients and pool": 0, "clients and test": 0, "pool and test": 0,
        }  # fmt: skip
        assert train.class_counts().tolist()[0] == 8 and len(np.concatenate(split)) == len(train)


def test_the_server_keeps_the_same_images_of_each_class():
    full, pool = made("cifar10", "train"), reserved_pool()
    kept = set(fingerprints(full)) - set(fingerprints(full.subset(for_clients(full))))
    assert kept == set(fingerprints(pool.subset(np.flatnonzero(pool.labels < 10))))
    assert pool.class_counts()[:10].tolist() == [4] * 10 and len(pool) == 40 + 199
    assert ((pool.labels < 10) == (np.arange(len(pool)) % 2 == 0))[:80].all() and (pool.labels[80:] >= 10).all()


def test_an_image_keeps_its_class():
    pool, other = reserved_pool(), made("cifar100", "train")
    classes = dict(zip(fingerprints(other), other.labels, strict=True))
    assert all(classes[p] + 10 == c for p, c in zip(fingerprints(pool), pool.labels, strict=True) if c >= 10)


def test_a_run_says_what_its_sets_share(tmp_path, caplog, monkeypatch):
    clean = run_experiment(experiment_of({"federated": ROUNDS, **SMALL}), tmp_path / "a", "cpu")
    assert clean["data"]["overlap"] == {"clients and test": 0}
    monkeypatch.setattr("mllmfl_lite.runs.run.load_pool", lambda _: made("cifar10", "train"))
    experiment = experiment_of(
        {"stages": [2, 3], "federated": ROUNDS, **SMALL, "align": {"teacher": "labels", "epochs": 1, "per_class": 2}}
    )
    monkeypatch.setattr("mllmfl_lite.runs.parts.load_pool", lambda _: made("cifar10", "train"))
    with caplog.at_level(logging.WARNING):
        leaky = run_experiment(experiment, tmp_path / "b", "cpu")
    assert leaky["data"]["overlap"]["clients and pool"] == leaky["data"]["train_images"]
    assert "images that two sets share" in caplog.text


def test_a_lossy_copy_is_the_same_image_and_a_near_one_is_not():
    data = made("cifar10", "train")
    noise = np.random.default_rng(0).integers(-6, 7, data.images.shape)
    copies = ImageSet(np.clip(data.images + noise, 0, 255).astype(np.uint8), data.labels, data.names, "copies")
    shifted = ImageSet(np.clip(data.images.astype(int) + 12, 0, 255).astype(np.uint8), data.labels, data.names, "other")
    assert overlap(a=data, b=copies, c=shifted) == {"a and b": len(data), "a and c": 0, "b and c": 0}


def test_the_pool_is_for_cifar10():
    with pytest.raises(ValueError, match="pool 'reserved' keeps images of cifar10 from its clients"):
        Experiment("cifar100", pool="reserved")
