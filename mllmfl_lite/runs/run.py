"""Run one experiment in one folder: every stage writes a file, and is skipped if that file is there.

stage1/resnet8_seed0.safetensors    the compact model after stage 1; .json beside it: its settings
answers/                            the teachers' answers
checkpoints/                        of stage 2, after each round
models/                             ...-federated.safetensors and ...-aligned.safetensors
<label>_seed0.json                  the results
"""

import functools
import hashlib
import json
import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from mllmfl_lite.checkpoint import RunFolder, differences
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.metrics import evaluate_model, summarise
from mllmfl_lite.data.reserved import RESERVED_POOL, overlap
from mllmfl_lite.federated import AlignEachRound, Ask, FedAvg, FedResult, run_federated
from mllmfl_lite.federated.federation import check_run
from mllmfl_lite.models import CompactModel, save_model
from mllmfl_lite.repro import Execution, pick_device, sha256_arrays
from mllmfl_lite.runs.config import Experiment, parameters_of, uses_pool
from mllmfl_lite.runs.parts import initial_model, load_federation, load_pool, load_teacher, make_method
from mllmfl_lite.runs.results import load_result, provenance, result_path, save_result
from mllmfl_lite.runs.stage1 import stage_one
from mllmfl_lite.stages.align import align
from mllmfl_lite.stages.server_set import ServerSet, describe, draw_server_set
from mllmfl_lite.teachers.answers import ask_teacher

log = logging.getLogger(__name__)


def run_experiment(
    experiment: Experiment,
    folder: str | Path = "",
    device: str = "auto",
    workers: int | None = None,
    label: str = "",
    ask: Ask | None = None,
    shared: str = ".",
) -> dict:
    """Run an experiment, or read its result if it is there. A run that was interrupted resumes.

    Args:
        experiment: what to run.
        folder: where everything is kept; empty: a temporary one.
        device: see `pick_device`.
        workers: threads that train clients, see `Execution`.
        label: name of the results file and of the progress bar; default: the method.
        ask: reaches clients outside this process, see `run_federated`.
        shared: where ``stage1/`` and ``answers/`` are, seen from the folder; ``".."``: neighbouring runs share them.

    Returns:
        A dictionary with label, parameters, summary, data, history and provenance; after stage 3 `aligned` holds its
        metrics, losses and server set, and the summary is of the aligned model.

    Raises:
        ValueError: the results file there is of other parameters, or parts do not fit.
        CheckpointError: the folder is in use by the same run, or cannot be written.
    """
    if not folder:
        with tempfile.TemporaryDirectory() as temporary:
            return run_experiment(experiment, temporary, device, workers, label, ask)
    path = result_path(folder, label or experiment.method, experiment.seed)
    if not path.exists():
        run = _Run(experiment, path, shared, Execution(device=str(pick_device(device)), workers=workers), ask)
        with RunFolder(path.parent / "checkpoints" / path.stem, {}):  # a lock: nobody else does the same
            if not path.exists():
                save_result(path, run.result())
    return finished(path, experiment)


def finished(path: str | Path, experiment: Experiment) -> dict:
    """Read a results file; one of other parameters, which are named, is a `ValueError`."""
    result = load_result(path)
    if other := differences(result["parameters"], parameters_of(experiment)):
        raise ValueError(f"{path} holds a run with other parameters ({other}); set them back, or use another folder")
    return result


class _Run:
    """One run: its parts in order."""

    def __init__(self, experiment: Experiment, path: Path, shared: str, execution: Execution, ask: Ask | None):
        self.experiment, self.folder, self.name = experiment, path.parent, path.stem
        self.shared, self.answers = shared, path.parent / shared / "answers"
        self.execution, self.device, self.ask = execution, execution.device, ask
        self.started = time.perf_counter()
        self.federation = load_federation(experiment)
        self.method = self._method()

    @functools.cached_property
    def pool(self) -> ImageSet:
        """The server's open images; read when a stage needs them, once."""
        return load_pool(self.experiment)

    def _method(self) -> FedAvg | None:
        """The method; what would stop the rounds is said here, before stage 1."""
        experiment, train = self.experiment, self.federation.train
        if 2 not in experiment.stages:
            return None
        method = make_method(experiment, train, self.answers)
        check_run(initial_model(experiment, train.num_classes), self.federation, experiment.federated, method)
        return method

    def result(self) -> dict:
        """Carry out the stages; what the results file holds."""
        experiment, history, aligned = self.experiment, [], {}
        weights = stage_one(experiment, self.folder, self.device, self.shared) if 1 in experiment.stages else None
        model = initial_model(experiment, self.federation.train.num_classes, weights)
        data = self._data_entry(model)
        drawn = self._server_set() if 3 in experiment.stages else None
        if self.method:
            rounds = self._rounds(model, self.method, drawn)
            model.load_state_dict(rounds.deployed)
            history = rounds.history
        self._keep(model, "federated")
        if drawn:
            aligned = {"server_set": describe(drawn, self.pool), **self._aligned(model, drawn)}
        seconds = round(time.perf_counter() - self.started, 1)
        final = [aligned] if "metrics" in aligned else history
        return {
            "label": self.name.removesuffix(f"_seed{experiment.seed}"),
            "parameters": parameters_of(experiment),
            "summary": summarise(final, experiment.federated.report_rounds),
            "data": data,
            "history": history,
            **({"aligned": aligned} if aligned else {}),
            "provenance": {**provenance(self.device), "seconds_in_this_process": seconds},
        }

    def _data_entry(self, model: CompactModel) -> dict:
        train, test = self.federation.train, self.federation.test
        sets = {"clients": train, "test": test}
        if {1, 3} & set(self.experiment.stages) or uses_pool(self.experiment):
            sets["pool"] = self.pool
        shared = overlap(**sets)
        if any(shared.values()):
            log.warning("images that two sets share: %s; use a pool that holds none of the clients' images", shared)
        return {
            "overlap": shared,
            "train_images": len(train),
            "train_sha256": train.checksum(),
            "test_sha256": test.checksum(),
            "start_sha256": sha256_arrays(t.numpy() for t in model.state_dict().values()),
        }

    def _server_set(self) -> ServerSet:
        names, teacher = self.federation.train.names, load_teacher(self.experiment, self.pool, self.device)
        probabilities = ask_teacher(teacher, self.pool, names, self.answers)
        return draw_server_set(self.pool, probabilities, names, self.experiment.align.per_class)

    def _rounds(self, model: CompactModel, method: FedAvg, drawn: ServerSet | None) -> FedResult:
        experiment = self.experiment
        if drawn and experiment.align.when == "each round":
            method = AlignEachRound(drawn, experiment.align, model)
        kept = self.folder / "checkpoints" / rounds_key(experiment)
        execution = replace(self.execution, folder=kept, label=self.name)
        return run_federated(model, self.federation, method, experiment.federated, experiment.seed, execution, self.ask)

    def _aligned(self, model: CompactModel, drawn: ServerSet) -> dict:
        """Metrics and losses of the aligned model; nothing if each round aligned."""
        if self.experiment.align.when == "each round":
            return {}
        done = align(model, drawn, self.experiment.align, self.experiment.seed, self.device)
        self._keep(done.model, "aligned")
        counts = self.federation.train.class_counts()
        metrics = evaluate_model(done.model, self.federation.test, counts, self.device)
        return {"metrics": metrics, "history": done.history}

    def _keep(self, model: CompactModel, name: str) -> None:
        path = self.folder / "models" / f"{self.name}-{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(path, model, self.experiment.model, self.experiment.width, self.federation.train.names)


def rounds_key(experiment: Experiment) -> str:
    """Name the rounds' checkpoint folder; experiments that differ in stage 3 alone share it."""
    numbers = parameters_of(experiment)
    if not (3 in experiment.stages and experiment.align.when == "each round"):
        for key in ("align", "mllm", "mllm_dtype"):
            del numbers[key]
        if not uses_pool(experiment) and experiment.pool != RESERVED_POOL:
            del numbers["pool"], numbers["pool_images"]
    numbers["stages"] = [stage for stage in experiment.stages if stage < 3]
    del numbers["federated"]["rounds"], numbers["seed"]
    digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()
    return f"{experiment.method.replace(':', '.')}-{digest[:8]}_seed{experiment.seed}"
