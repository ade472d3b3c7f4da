"""The images of a federation, and what is checked before its first round."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.partition import Split, check_split
from mllmfl_lite.federated.methods import FedSettings
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import numpy_generator


class Federation(NamedTuple):
    """The images of a federation.

    Attributes:
        train: all clients' images.
        split: each client's indices into `train`.
        test: images to test on.
    """

    train: ImageSet
    split: Split
    test: ImageSet


def choose_clients(num_clients: int, settings: FedSettings, round_: int, seed: int) -> list[int]:
    """Draw the clients of a round without replacement, in rising order."""
    rng = numpy_generator(seed, "clients", round_)
    return sorted(rng.choice(num_clients, settings.clients_per_round, replace=False).tolist())


def check_run(model: CompactModel, federation: Federation, settings: FedSettings) -> None:
    """Raise `ValueError` if the rounds could not run to their end."""
    train, split, test = federation
    check_split(split)
    if settings.clients_per_round > len(split):
        raise ValueError(f"clients_per_round is {settings.clients_per_round}, but there are only {len(split)} clients")
    if len(test) == 0:
        raise ValueError("the test set has no images")
    train.require_same_classes(test)
    if train.num_classes != model.head.out_features:
        raise ValueError(
            f"{train.origin} has {train.num_classes} classes, the model's head {model.head.out_features}; "
            "build the model with num_classes of the data"
        )
    single = [k for k, indices in enumerate(split) if len(indices) % settings.batch_size == 1]
    if settings.rounds and single and not _trains_on_one(model, train):
        raise ValueError(
            f"client {single[0]} has {len(split[single[0]])} images, so its last batch holds a single one, and "
            f"this model's BatchNorm needs two; change batch_size ({settings.batch_size}), or use larger images"
        )


def _trains_on_one(model: CompactModel, train: ImageSet) -> bool:
    """Return False if BatchNorm refuses a batch of one image of this set."""
    probe = copy.deepcopy(model).train()
    try:
        with torch.no_grad():
            probe(open_batches(train.subset(np.arange(1))).plain(torch.zeros(1, dtype=torch.int64)))
    except ValueError:
        return False
    return True
