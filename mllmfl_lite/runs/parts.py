"""The parts that an experiment names: images and split, method, model, pool, teacher."""

import pkgutil
from pathlib import Path

import numpy as np
import torch

from mllmfl_lite.data import PARTS, load_images
from mllmfl_lite.data.folders import find_folder, folder_images
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.longtail import balanced_subset, long_tail_subset
from mllmfl_lite.data.partition import split_clients
from mllmfl_lite.data.reserved import RESERVED_POOL, for_clients, reserved_pool
from mllmfl_lite.federated import METHODS, FedAvg, Federation
from mllmfl_lite.models import CompactModel, build_model, load_model, with_head
from mllmfl_lite.runs.config import Experiment
from mllmfl_lite.teachers import load_imagenet, load_mllm, load_zero_shot
from mllmfl_lite.teachers.answers import PoolLabels
from mllmfl_lite.teachers.base import Teacher


def load_clients_part(experiment: Experiment) -> ImageSet:
    """The training part, less what the server keeps of it: what clients may hold."""
    full = load_images(experiment.dataset, "train", experiment.image_size)
    return full.subset(for_clients(full)) if experiment.pool == RESERVED_POOL else full


def load_federation(experiment: Experiment) -> Federation:
    """The clients' images, who holds which, and the test images."""
    full = load_clients_part(experiment)
    chosen = np.arange(len(full))
    if experiment.dataset != "imagenet_lt":
        chosen = long_tail_subset(full.labels, full.num_classes, experiment.imbalance_factor, experiment.seed)
    if experiment.balanced:
        chosen = balanced_subset(full.labels, full.num_classes, len(chosen), experiment.seed)
    train = full.subset(chosen)
    split = split_clients(experiment.split, train.labels, experiment.num_clients, experiment.alpha, experiment.seed)
    return Federation(train, split, load_images(experiment.dataset, "test", experiment.image_size))


def make_method(experiment: Experiment, train: ImageSet, folder: str | Path = "") -> FedAvg:
    """The method for these clients' images; the folder caches what it asks a CLIP.

    Raises:
        ValueError: no such class, or an option that the method does not have.
    """
    name, server = experiment.method, {}
    try:
        method = pkgutil.resolve_name(name) if ":" in name else METHODS[name]
        if method.needs_pool:
            server = {"pool": load_pool(experiment), "model": initial_model(experiment, train.num_classes)}
        return method.for_clients(train, experiment.clip, folder, **experiment.method_options, **server)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"method {name!r} with options {experiment.method_options} cannot be made: {error}") from error


def start_file(experiment: Experiment, folder: str | Path = "") -> Path:
    """The file that `start` names, seen from the run's folder or else from the working directory."""
    name = experiment.start.replace("{seed}", str(experiment.seed))
    return next((path for path in (Path(folder) / name, Path(name)) if path.is_file()), Path(name))


def initial_model(experiment: Experiment, num_classes: int, weights: Path | None = None) -> CompactModel:
    """The model that the rounds start from: random weights, or those of a file with a new last layer.

    Raises:
        ValueError: the file is absent or holds another model.
    """
    model = build_model(experiment.model, num_classes, experiment.width, experiment.seed)
    if weights is None:
        return model
    found = with_head(load_model(weights), num_classes, experiment.seed)
    if [t.shape for t in found.state_dict().values()] != [t.shape for t in model.state_dict().values()]:
        raise ValueError(
            f"{weights} holds another model than {experiment.model} of width {experiment.width}; set model and width"
        )
    return found


def load_pool(experiment: Experiment) -> ImageSet:
    """The server's open images. Labels, if there are any, are for measuring only."""
    if experiment.pool in PARTS:
        pool = load_images(experiment.pool, "web")
    elif experiment.pool == RESERVED_POOL:
        pool = reserved_pool()
    else:
        pool = folder_images(find_folder(experiment.pool), experiment.image_size)
    return pool.subset(np.arange(min(experiment.pool_images, len(pool)))) if experiment.pool_images else pool


def load_teacher(experiment: Experiment, pool: ImageSet, device: torch.device | str = "auto") -> Teacher | PoolLabels:
    """The teacher that ``align.teacher`` names."""
    name = experiment.align.teacher
    if name == "labels":
        return PoolLabels(pool)
    if name == "imagenet":
        return load_imagenet(device=str(device))
    if name == "clip":
        return load_zero_shot(experiment.clip, device=str(device))
    return load_mllm(experiment.mllm, device=str(device), dtype=experiment.mllm_dtype)
