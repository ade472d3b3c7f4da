"""The images of a federation, what is checked before its first round, and what makes two runs the same."""

import copy
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import torch

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.data.images import ImageFiles, ImageSet
from mllmfl_lite.data.partition import Split, check_split
from mllmfl_lite.federated.methods import FedAvg, FedSettings
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import numpy_generator, sha256_arrays


class Federation(NamedTuple):
    """The images of a federation."""

    train: ImageSet  #: all clients' images
    split: Split  #: each client's indices into them
    test: ImageSet  #: images to test on


def choose_clients(num_clients: int, settings: FedSettings, round_: int, seed: int) -> list[int]:
    """Draw the clients of a round without replacement, in rising order."""
    rng = numpy_generator(seed, "clients", round_)
    return sorted(rng.choice(num_clients, settings.clients_per_round, replace=False).tolist())


def check_run(
    model: CompactModel, federation: Federation, settings: FedSettings, method: FedAvg | type[FedAvg] = FedAvg
) -> None:
    """Raise `ValueError` if the rounds could not run to their end."""
    train, split, test = federation
    strong = settings.augment == "strong" or getattr(method, "strong_views", False)
    if strong and isinstance(train.images, ImageFiles):
        raise ValueError("strong views are for images in memory; use federated.augment 'weak' and another method")
    check_split(split)
    low, high = min(indices.min() for indices in split), max(indices.max() for indices in split)
    if not 0 <= low <= high < len(train):
        raise ValueError(f"the split's indices must lie in 0..{len(train) - 1}; they run from {low} to {high}")
    if settings.clients_per_round > len(split):
        raise ValueError(f"clients_per_round is {settings.clients_per_round}, but there are only {len(split)} clients")
    if len(test) == 0:
        raise ValueError("the test set has no images")
    train.require_same_classes(test)
    train.require_same_classes(model)
    if train.num_classes != model.head.out_features:
        raise ValueError(f"{train.origin} has {train.num_classes} classes, the model's head {model.head.out_features}")
    single = [k for k, indices in enumerate(split) if (len(indices) - 1) % settings.batch_size == 0]
    if settings.rounds and single:
        one = open_batches(train.subset(np.arange(1))).plain(torch.zeros(1, dtype=torch.int64))
        try:
            copy.deepcopy(model).train()(one)
        except ValueError as error:  # of BatchNorm
            raise ValueError(
                f"client {single[0]} has {len(split[single[0]])} images, so its last batch holds a single one, and "
                f"this model's BatchNorm needs two; change batch_size ({settings.batch_size}), or use larger images"
            ) from error


def identity_of(model: CompactModel, federation: Federation, method: FedAvg, settings: FedSettings, seed: int) -> dict:
    """What two runs must share to be the same run. A finished run may be continued, so `rounds` is left out."""
    numbers = {k: v for k, v in asdict(settings).items() if k not in ("rounds", "eval_every", "report_rounds")}
    return {
        **numbers,
        "seed": seed,
        "method": method.identity(),
        "train": federation.train.checksum(),
        "test": federation.test.checksum(),
        "split": sha256_arrays(federation.split),
        "initial_weights": sha256_arrays(t.cpu().numpy() for t in model.state_dict().values()),
    }
