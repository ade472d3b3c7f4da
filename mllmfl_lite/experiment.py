"""One experiment from parameters to a results file: data, subset, split, model, rounds, summary.

The same object describes a laptop minute and a paper-scale day; only the numbers differ.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mllmfl_lite.data import ImageSet, load_images
from mllmfl_lite.federated import METHODS, FedAvg, FedSettings, run_federated, summarise
from mllmfl_lite.models import build_model
from mllmfl_lite.partition import Split, balanced_subset, long_tail_subset, split_clients
from mllmfl_lite.repro import pick_device
from mllmfl_lite.results import ResultError, load_result, provenance, save_result


@dataclass(frozen=True)
class Experiment:
    """What is run; defaults are the CIFAR-10-LT benchmark at full scale.

    Attributes:
        dataset: a name for `load_images`.
        imbalance_factor: head over tail of the clients' images together.
        balanced: draw as many images as the long tail has, but the same number of each class (the control).
        split: one of `partition.SPLITS`.
        num_clients: K.
        alpha: the Dirichlet's concentration.
        model: a name for `build_model`.
        width: ResNet-8's width.
        method: one of `federated.METHODS`.
        method_options: the method's own numbers, e.g. ``{"mu": 0.1}``.
        settings: rounds and local training. Its seed also decides subset, split and initial weights.
    """

    dataset: str = "cifar10"
    imbalance_factor: float = 100
    balanced: bool = False
    split: str = "dirichlet_equal"
    num_clients: int = 20
    alpha: float = 0.5
    model: str = "resnet8"
    width: int = 64
    method: str = "fedavg"
    method_options: dict = field(default_factory=dict)
    settings: FedSettings = field(default_factory=FedSettings)

    def with_seed(self, seed: int) -> Experiment:
        """The same experiment with another seed."""
        return replace(self, settings=replace(self.settings, seed=seed))

    def clients(self) -> tuple[ImageSet, Split]:
        """The clients' images together, and who holds which."""
        seed, full = self.settings.seed, load_images(self.dataset, "train")
        chosen = long_tail_subset(full.labels, full.num_classes, self.imbalance_factor, seed)
        if self.balanced:
            chosen = balanced_subset(full.labels, full.num_classes, len(chosen), seed)
        train = full.subset(chosen)
        return train, split_clients(self.split, train.labels, self.num_clients, self.alpha, seed)

    def build_method(self) -> FedAvg:
        """The method object.

        Raises:
            ValueError: no such method.
        """
        if self.method not in METHODS:
            raise ValueError(f"no method named {self.method!r}; there are {', '.join(METHODS)}")
        return METHODS[self.method](**self.method_options)


def run_experiment(
    experiment: Experiment, folder: str | Path = "", device: str = "auto", workers: int | None = None, label: str = ""
) -> dict:
    """Run it, or take it from its results file.

    Args:
        experiment: what to run.
        folder: where results are kept, as ``<label>_seed<seed>.json``, with a checkpoint after each round in
            ``checkpoints/`` beside; a finished run is read back, an interrupted one goes on. Empty: nothing is kept.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        workers: client threads, see `run_federated`.
        label: the name of the run in the folder and on the progress bar; default the method's.

    Returns:
        A dictionary with parameters, summary, history, data and provenance.

    Raises:
        ResultError: the results file there is of other parameters.
    """
    name = f"{label or experiment.method}_seed{experiment.settings.seed}"
    path = Path(folder) / f"{name}.json" if folder else None
    if path and path.exists():
        return _finished(path, experiment)
    chosen = pick_device(device)
    started = time.perf_counter()
    train, split = experiment.clients()
    test = load_images(experiment.dataset, "test")
    model = build_model(experiment.model, train.num_classes, experiment.width, experiment.settings.seed)
    rounds = run_federated(
        model, train, split, test, experiment.build_method(), experiment.settings,
        folder=Path(folder) / "checkpoints" / name if folder else None, device=chosen, workers=workers, label=name,
    )  # fmt: skip
    result = {
        "label": label or experiment.method,
        "parameters": asdict(experiment),
        "summary": summarise(rounds.history, experiment.settings.report_rounds),
        "data": {"train_images": len(train), "train_sha256": train.checksum(), "test_sha256": test.checksum()},
        "provenance": {**provenance(chosen), "seconds_in_this_process": round(time.perf_counter() - started, 1)},
        "history": rounds.history,
    }
    if path:
        save_result(path, result)
    return result


def _finished(path: Path, experiment: Experiment) -> dict:
    result = load_result(path)
    there, now = _flat(result["parameters"]), _flat(asdict(experiment))
    other = [f"{k} there {there.get(k)!r}, now {now.get(k)!r}" for k in {**there, **now} if there.get(k) != now.get(k)]
    if other:
        raise ResultError(
            f"{path} holds a run with other parameters ({'; '.join(other)}); set them back, or choose another folder"
        )
    return result


def _flat(parameters: dict) -> dict:
    return {**parameters, **parameters["settings"], "settings": None}
