"""Stage 1 of an experiment: annotate the pool, pretrain the compact model, save its weights."""

import contextlib
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import filelock

from mllmfl_lite.checkpoint import differences
from mllmfl_lite.data import load_images
from mllmfl_lite.data.images import ImageFiles, ImageSet
from mllmfl_lite.models import build_model, save_model
from mllmfl_lite.repro import Execution, pick_device
from mllmfl_lite.runs.config import Experiment, pool_side
from mllmfl_lite.runs.parts import load_pool, start_file
from mllmfl_lite.runs.results import load_result, provenance, save_result
from mllmfl_lite.stages.annotate import annotate
from mllmfl_lite.stages.backends import TransformersBackend
from mllmfl_lite.stages.filters import filter_records
from mllmfl_lite.stages.pretrain import pretrain
from mllmfl_lite.stages.records import Record, bundled_annotations, read_records
from mllmfl_lite.stages.texts import Views, read_texts
from mllmfl_lite.teachers import load_mllm
from mllmfl_lite.teachers.llava import MllmTeacher

SHARED_SETTINGS = ("kind", "annotations", "mllm", "mllm_dtype", "model", "width", "pool", "pool_images", "seed")


def stage_one(experiment: Experiment, folder: str | Path, device: str = "auto", shared: str = ".") -> Path:
    """Annotate and pretrain, or find it done (`start` may name it); return the file with the compact model's weights.

    All processes of ``accelerate launch`` or ``torchrun`` may call it: one annotates, one writes, all return when the
    file is there. A second run waits for the first. `folder`, `device` and `shared` are those of `run_experiment`.

    Raises:
        ValueError: the file was made with other settings, which are named.
    """
    if experiment.start:
        return start_file(experiment, folder)
    path = Path(folder) / shared / "stage1" / f"{experiment.model}_seed{experiment.seed}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = {"pretrain": asdict(experiment.pretrain), "pixels": pool_side(experiment)}
    wanted |= {name: getattr(experiment, name) for name in SHARED_SETTINGS}
    single = int(os.environ.get("WORLD_SIZE", "1")) == 1  # several processes would wait for each other
    with filelock.FileLock(path.with_suffix(".lock")) if single else contextlib.nullcontext():
        if not path.exists():
            _pretrain(experiment, path, wanted, device)
    if other := differences(load_result(path.with_suffix(".json"))["parameters"], wanted):
        raise ValueError(f"{path} was made with other settings ({other}); set them back, or choose another folder")
    return path


def _pretrain(experiment: Experiment, path: Path, wanted: dict, device: str) -> None:
    from accelerate import PartialState  # slow

    started = time.perf_counter()
    pool, mllm = load_pool(experiment), load_mllm(experiment.mllm, device=device, dtype=experiment.mllm_dtype)
    records = _records(experiment, pool, mllm, path.with_name("annotations.jsonl"))
    seen, files = pool, pool.images
    if isinstance(files, ImageFiles):
        seen = replace(pool, images=replace(files, size=wanted["pixels"]))
    classes = load_images(experiment.dataset, "test", experiment.image_size).num_classes
    done = pretrain(
        build_model(experiment.model, classes, experiment.width, experiment.seed),
        mllm,
        Views(seen, mllm, path.with_name("features"), device),
        read_texts(records, pool.ids, mllm),
        experiment.pretrain,
        experiment.seed,
        Execution(path.with_suffix(""), device),
    )
    processes = PartialState()  # those that shared the batches
    if processes.is_main_process:
        seconds = round(time.perf_counter() - started, 1)
        result = {
            "label": "stage1",
            "parameters": wanted,
            "data": {"images": len(pool), "pool_sha256": pool.checksum(), "texts": len(records), "mllm": mllm.identity},
            "provenance": {
                **provenance(pick_device(device)),
                "processes": processes.num_processes,
                "seconds_in_this_process": seconds,
            },
            "history": done.history[:: max(1, len(done.history) // 200)],
        }
        save_result(path.with_suffix(".json"), result)
        save_model(path, done.model.cpu(), experiment.model, experiment.width)  # last: its presence means done
    processes.wait_for_everyone()


def _records(experiment: Experiment, pool: ImageSet, mllm: MllmTeacher, path: Path) -> list[Record]:
    if experiment.annotations == "new":
        with filelock.FileLock(path.with_suffix(".lock")):  # the first of several processes asks, the others read
            records = annotate(pool, TransformersBackend(mllm), path, [experiment.kind]).records
    else:
        bundled = experiment.annotations == "bundled"
        records = bundled_annotations() if bundled else read_records(experiment.annotations)
    ids = set(pool.ids)
    wanted = [record for record in records if record.kind == experiment.kind and record.id in ids]
    return wanted if experiment.annotations == "bundled" else filter_records(wanted).kept
