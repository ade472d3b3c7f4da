"""Run one experiment in one folder: every stage writes a file, and is skipped if that file is there.

stage1/resnet8_seed0.safetensors    the compact model after stage 1; .json beside it: its settings
answers/                            the teachers' answers
checkpoints/                        of stage 2, after each round
models/                             ...-federated.safetensors and ...-aligned.safetensors
<label>_seed0.json                  the results
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from mllmfl_lite.data.metrics import evaluate_model, summarise
from mllmfl_lite.federated import AlignEachRound, Ask, FedAvg, Federation, FedResult, run_federated
from mllmfl_lite.models import CompactModel, save_model
from mllmfl_lite.repro import Execution, pick_device, sha256_arrays
from mllmfl_lite.runs.config import Experiment, parameters_of
from mllmfl_lite.runs.parts import initial_model, load_federation, load_pool, load_teacher, make_method, start_file
from mllmfl_lite.runs.results import differences, load_result, provenance, save_result
from mllmfl_lite.runs.stage1 import stage_one
from mllmfl_lite.stages.align import align
from mllmfl_lite.stages.server_set import describe, draw_server_set
from mllmfl_lite.teachers.answers import ask_teacher


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
        folder: where everything is kept; empty keeps nothing, and then stage 1 needs `start`.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        workers: threads that train clients, see `Execution`.
        label: name of the results file and of the progress bar; default: the method.
        ask: reaches clients outside this process, see `run_federated`.
        shared: where ``stage1/`` and ``answers/`` are, seen from the folder; ``".."``: neighbouring runs share them.

    Returns:
        A dictionary with label, parameters, summary, data, history and provenance; after stage 3 `aligned` holds its
        metrics, losses and server set, and the summary is of the aligned model.

    Raises:
        ValueError: the results file there is of other parameters, or parts do not fit.
    """
    name = f"{label or experiment.method}_seed{experiment.seed}"
    path = Path(folder) / f"{name}.json" if folder else None
    if path and path.exists():
        return finished(path, experiment)
    started, place = time.perf_counter(), pick_device(device)
    answers = Path(folder) / shared / "answers" if folder else ""
    weights = _stage_one_weights(experiment, folder, device, shared) if 1 in experiment.stages else None
    federation = load_federation(experiment)
    model = initial_model(experiment, federation.train.num_classes, weights)
    data = _data_entry(federation, model)
    drawn = _server_set(experiment, federation.train.names, device, answers) if 3 in experiment.stages else None
    checkpoints = Path(folder) / "checkpoints" / _rounds_key(experiment) if folder else None
    execution = Execution(checkpoints, device, workers, name)
    rounds = _rounds(experiment, federation, model, drawn, (execution, ask, answers))
    model.load_state_dict(rounds.deployed)
    _keep(model, experiment, folder, f"{name}-federated")
    result = {"label": label or experiment.method, "parameters": parameters_of(experiment), "data": data}
    result |= _reported(experiment, federation, model, drawn, rounds, (place, folder, name))
    seconds = round(time.perf_counter() - started, 1)
    result["provenance"] = {**provenance(place), "seconds_in_this_process": seconds}
    if path:
        save_result(path, result)
    return result


def finished(path: str | Path, experiment: Experiment) -> dict:
    """Read a results file, if it is this experiment's.

    Raises:
        ValueError: it has other parameters, which are named, or is no results file.
    """
    result = load_result(path)
    if other := differences(result["parameters"], parameters_of(experiment)):
        raise ValueError(f"{path} holds a run with other parameters ({other}); set them back, or use another folder")
    return result


def _stage_one_weights(experiment: Experiment, folder: str | Path, device: str, shared: str) -> Path:
    if experiment.start:
        return start_file(experiment, folder)
    if not folder:
        raise ValueError("stage 1 keeps its weights in a folder; name one, or name finished weights in start")
    return stage_one(experiment, folder, device, shared)


def _server_set(experiment: Experiment, names: tuple[str, ...], device: str, answers: str | Path) -> tuple:
    """The server set, and its description."""
    pool = load_pool(experiment)
    probabilities = ask_teacher(load_teacher(experiment, pool, device), pool, names, answers)
    server_set = draw_server_set(pool, probabilities, names, experiment.align.per_class)
    return server_set, describe(server_set, pool)


def _rounds(experiment, federation, model, drawn, how: tuple[Execution, Ask | None, str | Path]) -> FedResult:
    execution, ask, answers = how
    if 2 not in experiment.stages:
        state = {name: t.clone() for name, t in model.state_dict().items()}
        return FedResult(state, state, [])
    method: FedAvg = make_method(experiment, federation.train, answers)
    if drawn and experiment.align.when == "each round":
        method = AlignEachRound(drawn[0], experiment.align, model)
    return run_federated(model, federation, method, experiment.federated, experiment.seed, execution, ask)


def _reported(experiment, federation: Federation, model: CompactModel, drawn, rounds: FedResult, where: tuple) -> dict:
    """Align, if that is to be done, and summarise."""
    place, folder, name = where
    summary = summarise(rounds.history, experiment.federated.report_rounds) if rounds.history else None
    if not drawn:
        return {"summary": summary, "history": rounds.history}
    aligned = {"server_set": drawn[1]}
    if experiment.align.when == "end":
        done = align(model, drawn[0], experiment.align, experiment.seed, place)
        _keep(done.model, experiment, folder, f"{name}-aligned")
        metrics = evaluate_model(done.model, federation.test, federation.train.class_counts(), place)
        aligned |= {"metrics": metrics, "history": done.history}
        summary = summarise([aligned], 1)
    return {"summary": summary, "aligned": aligned, "history": rounds.history}


def _data_entry(federation: Federation, model: CompactModel) -> dict:
    return {
        "train_images": len(federation.train),
        "train_sha256": federation.train.checksum(),
        "test_sha256": federation.test.checksum(),
        "start_sha256": sha256_arrays(t.numpy() for t in model.state_dict().values()),
    }


def _keep(model: CompactModel, experiment: Experiment, folder: str | Path, name: str) -> None:
    if folder:
        path = Path(folder) / "models" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(path, model, experiment.model, experiment.width)


def _rounds_key(experiment: Experiment) -> str:
    """Name the rounds' checkpoint folder; experiments that differ in stage 3 alone share it."""
    numbers = parameters_of(experiment)
    if not (3 in experiment.stages and experiment.align.when == "each round"):
        for key in ("align", "mllm", "mllm_dtype", "pool", "pool_images"):
            del numbers[key]
    numbers["stages"] = [stage for stage in experiment.stages if stage < 3]
    del numbers["federated"]["rounds"], numbers["seed"]
    digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()
    return f"{experiment.method.replace(':', '.')}-{digest[:8]}_seed{experiment.seed}"
