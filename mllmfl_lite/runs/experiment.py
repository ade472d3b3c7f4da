"""One experiment from parameters to a results file: data, subset, split, start, rounds, alignment, summary.

The same object describes a laptop minute and a paper-scale day; only the numbers differ. Every stage leaves a file in
the run's folder and is skipped where its file is there and has the same settings::

    experiment = Experiment(method="fedavg", start="dwp_linear", width=16, align=AlignSettings())
    result = run_experiment(experiment, "runs/mine")
"""

from __future__ import annotations

import hashlib
import json
import math
import pkgutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from mllmfl_lite.data import PARTS, load_images
from mllmfl_lite.data.folders import find_folder, folder_images
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.longtail import balanced_subset, long_tail_subset
from mllmfl_lite.data.metrics import evaluate_model, summarise
from mllmfl_lite.data.partition import SPLITS, Split, split_clients
from mllmfl_lite.federated.each_round import AlignEachRound
from mllmfl_lite.federated.methods import FedAvg, FedSettings
from mllmfl_lite.federated.rounds import METHODS, Ask, run_federated
from mllmfl_lite.models import MODELS, CompactModel, build_model, load_model, save_model, with_head, with_norms_of
from mllmfl_lite.repro import PRECISIONS, pick_device, sha256_arrays
from mllmfl_lite.runs.results import RESULTS, ResultError, differences, load_result, provenance, save_result
from mllmfl_lite.runs.settings import check_choice, check_whole
from mllmfl_lite.stages.align import AlignSettings, align
from mllmfl_lite.stages.server_set import ServerSet, describe, draw_server_set, evened
from mllmfl_lite.teachers.answers import ask_teacher
from mllmfl_lite.teachers.labels import PoolLabels

OWN_WEIGHTS = RESULTS / "laptop" / "pretraining"  # chapter 3's


SERVER_ONLY = ("align", "mllm", "mllm_dtype", "pool", "pool_images")  # do not reach the clients' rounds


@dataclass(frozen=True)
class Experiment:
    """What is run; defaults are the CIFAR-10-LT benchmark at full scale, with FedAvg from random weights.

    Attributes:
        dataset: a name for `load_images`.
        imbalance_factor: head over tail of the clients' images together; not for ImageNet-LT, whose list has its own.
        balanced: draw as many images as the long tail has, but the same number of each class (the control).
        split: one of `partition.SPLITS`.
        num_clients: K.
        alpha: the Dirichlet's concentration.
        model: a name for `build_model`.
        width: ResNet-8's width.
        method: one of `baselines.METHODS`, or ``"module:Class"`` for one of your own.
        method_options: the method's own numbers, e.g. ``{"mu": 0.1}``.
        settings: rounds and local training. Its seed also decides subset, split and initial weights.
        start: where the rounds start. Empty: random weights. Else a file by `save_model`, in the run's folder or
            anywhere, or the name of one of chapter 3's conditions, e.g. ``"dwp_linear"``, which has a file a seed.
        rescale: give the start's convolutions the norms of random ones; it computes the same, and the clients' steps
            turn it as far as they turn a random start (see `with_norms_of`).
        align: stage 3 after the last round; None leaves it out.
        mllm: the teacher that answers in stage 3, a name for `load_mllm`.
        mllm_dtype: what its weights are loaded in: ``"float32"``, or ``"bfloat16"`` for large ones.
        pool: the server's open images: a data set, whose part ``"web"`` is taken, or a folder of pictures, given by its
            path or by its name in ``$MLLMFL_DATA``.
        pool_images: how many of them are used, the first ones; 0 takes all.
        image_size: pixels a side at which pictures from files are looked at (ImageNet-LT, a folder as the pool).
        clip: the CLIP of CLIP2FL, and of stage 3 where `align.teacher` is ``"clip"``; a name for `load_zero_shot`, so
            an ImageNet network can take its place.
    """

    dataset: str = "cifar10"
    imbalance_factor: float = 100.0
    balanced: bool = False
    split: str = "dirichlet_equal"
    num_clients: int = 20
    alpha: float = 0.5
    model: str = "resnet8"
    width: int = 64
    method: str = "fedavg"
    method_options: dict = field(default_factory=dict)
    settings: FedSettings = field(default_factory=FedSettings)
    start: str = ""
    rescale: bool = False
    align: AlignSettings | None = None
    mllm: str = "tiny_llava"
    mllm_dtype: str = "float32"
    pool: str = "cifar10_mini"
    pool_images: int = 0
    clip: str = "tiny_clip"
    image_size: int = 224

    def __post_init__(self) -> None:
        check_choice(self, dataset=PARTS, split=SPLITS, model=MODELS, mllm_dtype=PRECISIONS)
        check_whole(self, "num_clients", "width", "image_size")
        check_whole(self, "pool_images", least=0)
        if not 1 <= self.imbalance_factor < math.inf:
            raise ValueError(f"imbalance_factor must be at least 1 and finite; got {self.imbalance_factor}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite; got {self.alpha}")
        if self.align and self.align.when == "each round" and self.method != "fedavg":
            raise ValueError(
                f"alignment in each round is a server step of FedAvg's; got method {self.method!r}. Set align.when to "
                "'end', or method to 'fedavg'"
            )
        if "web" not in PARTS.get(self.pool, ("web",)):
            raise ValueError(f"{self.pool} has no open pictures; pool must be 'cifar10_mini' or a folder of pictures")
        if ":" not in self.method and self.method not in METHODS:
            raise ValueError(
                f"no method named {self.method!r}; there are {', '.join(METHODS)}, or 'module:Class' for your own"
            )

    def with_seed(self, seed: int) -> Experiment:
        """The same experiment with another seed, in every stage."""
        aligned = replace(self.align, seed=seed) if self.align else None
        return replace(self, settings=replace(self.settings, seed=seed), align=aligned)

    def clients(self) -> tuple[ImageSet, Split]:
        """The clients' images together, and who holds which."""
        seed, full = self.settings.seed, load_images(self.dataset, "train", self.image_size)
        chosen = np.arange(len(full))
        if self.dataset != "imagenet_lt":
            chosen = long_tail_subset(full.labels, full.num_classes, self.imbalance_factor, seed)
        if self.balanced:
            chosen = balanced_subset(full.labels, full.num_classes, len(chosen), seed)
        train = full.subset(chosen)
        return train, split_clients(self.split, train.labels, self.num_clients, self.alpha, seed)

    def build_method(self, train: ImageSet, folder: str | Path = "") -> FedAvg:
        """The method object for these clients' images; what it asks a CLIP is kept in the folder, if there is one."""
        kind = pkgutil.resolve_name(self.method) if ":" in self.method else METHODS[self.method]
        return kind.for_clients(train, self.clip, folder, **self.method_options)

    def start_file(self, folder: str | Path = "") -> Path:
        """The file that `start` means, seen from the run's folder; it need not be there."""
        own = OWN_WEIGHTS / f"{self.start}_seed{self.settings.seed}.safetensors"
        return next((p for p in (Path(folder) / self.start, Path(self.start)) if p.is_file()), own)

    def build_model(self, num_classes: int, folder: str | Path = "") -> CompactModel:
        """The model that the rounds start from; a pretrained one is given a fresh head.

        Args:
            num_classes: C.
            folder: of the run, where `start` is looked for first.

        Raises:
            ValueError: the file of `start` is not there, or holds another model.
        """
        seed, new = self.settings.seed, build_model(self.model, num_classes, self.width, self.settings.seed)
        if not self.start:
            return new
        path = self.start_file(folder)
        found = with_head(load_model(path), num_classes, seed)
        if [t.shape for t in found.state_dict().values()] != [t.shape for t in new.state_dict().values()]:
            raise ValueError(f"{path} holds another model than {self.model} of width {self.width}; set model and width")
        return with_norms_of(found, new) if self.rescale else found

    def rounds_key(self) -> str:
        """Names the run of the rounds alone: experiments that differ in stage 3 only share it, and its checkpoint."""
        numbers = asdict(self)
        if not (self.align and self.align.when == "each round"):
            numbers = {k: v for k, v in numbers.items() if k not in SERVER_ONLY}
        numbers["settings"] = {k: v for k, v in numbers["settings"].items() if k not in ("rounds", "seed")}
        digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()
        return f"{self.method.replace(':', '.')}-{digest[:8]}_seed{self.settings.seed}"


def run_experiment(
    experiment: Experiment,
    folder: str | Path = "",
    device: str = "auto",
    workers: int | None = None,
    label: str = "",
    ask: Ask | None = None,
    together: bool | Together = False,
    shared: str = ".",
) -> dict:
    """Run it, or take it from its results file.

    Args:
        experiment: what to run.
        folder: where results are kept, as ``<label>_seed<seed>.json``, with a checkpoint after each round in
            ``checkpoints/`` beside, and the models after stages 2 and 3 in ``models/``; a finished run is read back, an
            interrupted one goes on. Empty: nothing is kept.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        workers: client threads, see `run_federated`.
        ask: how clients are asked that are not threads of this process, see `run_federated`.
        together: whether clients are trained side by side, see `run_federated`. Recorded, but no part of what a run is.
        label: the name of the run in the folder and on the progress bar; default the method's.
        shared: where ``told/``, the teachers' answers, is kept, seen from the folder.

    Returns:
        A dictionary with parameters, summary, history, data and provenance; with stage 3, `aligned` holds its metrics,
        its losses and what was in the server set, and the summary is of the aligned model.

    Raises:
        ResultError: the results file there is of other parameters.
    """
    name = f"{label or experiment.method}_seed{experiment.settings.seed}"
    path = Path(folder) / f"{name}.json" if folder else None
    if path and path.exists():
        return finished(path, experiment)
    device, started = pick_device(device), time.perf_counter()
    train, split = experiment.clients()
    side_by_side = settle(together, train, ask)
    test = load_images(experiment.dataset, "test", experiment.image_size)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)  # or nothing could be seen from it
    model = experiment.build_model(train.num_classes, folder)
    start = sha256_arrays(t.numpy() for t in model.state_dict().values())
    told = Path(folder) / shared / "told" if folder else ""
    chosen = _server_set(experiment, train.names, device, told) if experiment.align else None
    method = experiment.build_method(train, told)
    if chosen and experiment.align.when == "each round":
        method = AlignEachRound(chosen, experiment.align, model)
    rounds = run_federated(
        model, train, split, test, method, experiment.settings,
        folder=Path(folder) / "checkpoints" / experiment.rounds_key() if folder else None,
        device=device, workers=workers, label=name, ask=ask, together=side_by_side or False,
    )  # fmt: skip
    model.load_state_dict(rounds.deployed)
    _keep(model, experiment, folder, f"{name}-federated")
    result = {
        "label": label or experiment.method,
        "parameters": asdict(experiment),
        "summary": summarise(rounds.history, experiment.settings.report_rounds),
        "data": {
            "train_images": len(train),
            "train_sha256": train.checksum(),
            "test_sha256": test.checksum(),
            "start_sha256": start,
        },
        "history": rounds.history,
    }
    if chosen:
        result["aligned"] = {"server_set": describe(chosen, load_pool(experiment))}
    if chosen and experiment.align.when == "end":
        done = align(model, chosen, experiment.align, device)
        _keep(done.model, experiment, folder, f"{name}-aligned")
        result["aligned"] |= {
            "metrics": evaluate_model(done.model, test, train.class_counts(), device),
            "history": done.history,
        }
        result["summary"] = summarise([result["aligned"]], 1)
    seconds = round(time.perf_counter() - started, 1)
    trained = "asked elsewhere" if ask else "together" if side_by_side else "one by one"
    result["provenance"] = {**provenance(device), "clients": trained, "seconds_in_this_process": seconds}
    if path:
        save_result(path, result)
    return result


def _keep(model: CompactModel, experiment: Experiment, folder: str | Path, name: str) -> None:
    if folder:
        path = Path(folder) / "models" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(path, model, experiment.model, experiment.width)


def _server_set(experiment: Experiment, names, device, folder: str | Path) -> ServerSet:
    pool, wanted = load_pool(experiment), experiment.align
    told = ask_teacher(load_teacher(experiment, device), pool, names, folder)
    chosen = draw_server_set(pool, told, names, wanted.per_class, wanted.without)
    return replace(chosen, told=evened(chosen.told, told)) if wanted.even else chosen


def load_pool(experiment: Experiment) -> ImageSet:
    """The server's open images: of a data set, or of a folder. Labels, if there are any, are for measuring only."""
    if experiment.pool in PARTS:
        pool = load_images(experiment.pool, "web")
    else:
        pool = folder_images(find_folder(experiment.pool), experiment.image_size)
    return pool.subset(np.arange(min(experiment.pool_images, len(pool)))) if experiment.pool_images else pool


def load_teacher(experiment: Experiment, device: torch.device | str = "auto"):
    """The teacher of stage 3, as `experiment.align` names it."""
    from mllmfl_lite.teachers import load_zero_shot  # slow to import, and not always needed
    from mllmfl_lite.teachers.imagenet import load_imagenet  # slow to import, and not always needed
    from mllmfl_lite.teachers.llava import load_mllm

    if experiment.align.teacher == "labels":
        return PoolLabels(load_pool(experiment), experiment.align.wrong, experiment.align.seed)
    if experiment.align.teacher == "imagenet":
        return load_imagenet(device=str(device))
    if experiment.align.teacher == "clip":
        return load_zero_shot(experiment.clip, device=str(device))
    return load_mllm(experiment.mllm, device=str(device), dtype=experiment.mllm_dtype)


def finished(path: str | Path, experiment: Experiment) -> dict:
    """The result that a file holds, if it is this experiment's.

    Raises:
        ResultError: it is of other parameters, which are named, or no results file.
    """
    result = load_result(path)
    there = {**asdict(Experiment()), **result["parameters"]}  # a file older than a parameter was made with its default
    there["settings"] = {**asdict(FedSettings()), **there["settings"]}
    there["align"] = there["align"] and {**asdict(AlignSettings()), **there["align"]}
    if other := differences(there, asdict(experiment)):
        raise ResultError(
            f"{path} holds a run with other parameters ({other}); set them back, or choose another folder"
        )
    return result
