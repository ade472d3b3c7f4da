"""All three stages in one folder: annotations, pretrained weights, rounds, alignment, results::

    pipeline = Pipeline(Experiment("cifar10_mini", num_clients=10, width=16, align=AlignSettings()))
    result = run_pipeline(pipeline, "runs/mine")

Each step leaves a file and is skipped where its file is there and was made with the same settings. So a run can be
killed at any moment, goes on where it was, and can be carried to another machine with its folder:

    stage1/annotations.jsonl          what the MLLM said of the web pictures, as it comes
    stage1/resnet8_seed0.safetensors  the compact model after stage 1, and beside it .json: what it was made with
    told/                             the teachers' answers, about the web pictures and, for CLIP2FL, the clients'
    checkpoints/                      of stages 1 and 2, after so many steps and each round
    models/                           ...-federated.safetensors after stage 2, ...-aligned.safetensors after stage 3
    <label>_seed0.json                the results

Several experiments may share a folder, and share what they have in common.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath

import filelock

from mllmfl_lite.data import PARTS, load_images
from mllmfl_lite.data.folders import PictureSource, pool_source
from mllmfl_lite.data.images import ImageFiles, ImageSet
from mllmfl_lite.models import build_model, save_model
from mllmfl_lite.repro import pick_device
from mllmfl_lite.runs.experiment import Experiment, load_pool, run_experiment
from mllmfl_lite.runs.results import ResultError, differences, load_result, provenance, save_result
from mllmfl_lite.runs.settings import check_choice, check_whole
from mllmfl_lite.stages.annotate import annotate
from mllmfl_lite.stages.backends import TransformersBackend
from mllmfl_lite.stages.filters import filter_records
from mllmfl_lite.stages.pretrain import PretrainSettings, pretrain
from mllmfl_lite.stages.records import Record, bundled_annotations, read_records
from mllmfl_lite.stages.texts import read_texts
from mllmfl_lite.stages.views import ArrayViews, PictureViews, Views
from mllmfl_lite.teachers.llava import KINDS, MllmTeacher, load_mllm

BUNDLED_POOL = "cifar10_mini"


BEFORE = {"pixels": 0, "mllm_dtype": "float32", "pool_images": 0}  # of files older than these parameters


@dataclass(frozen=True)
class Pipeline:
    """What is run.

    Attributes:
        experiment: stages 2 and 3; its `start` is set here, its `mllm` writes the annotations.
        pretrain: stage 1; its seed becomes the experiment's. None leaves stage 1 out.
        kind: of the annotations that stage 1 learns from.
        annotations: ``"bundled"``; ``"new"``: ask the MLLM; or a file of records about the pool's pictures, as
            `mllmfl_lite.annotate` writes it (``....jsonl``). What is empty, cut off or looping is left out.
        pixels: the side at which the compact model looks at pictures from files in stage 1; 0: the experiment's
            `image_size`. Its feature map must fit the MLLM's tokens: ResNet-50 at 384 has 12 x 12, LLaVA-1.5 24 x 24.
        shared: where ``stage1/`` and ``told/`` are, seen from the run's folder. With ``".."`` the runs of neighbouring
            folders have them in common: the MLLM describes a pool once and answers about it once for each list of
            class names, and each compact model is pretrained once a seed.
    """

    experiment: Experiment
    pretrain: PretrainSettings | None = field(default_factory=PretrainSettings)
    kind: str = "detailed_description"
    annotations: str = "bundled"
    pixels: int = 0
    shared: str = "."

    def __post_init__(self) -> None:
        check_choice(self, kind=KINDS)
        check_whole(self, "pixels", least=0)
        if self.pretrain and self.experiment.start:
            raise ValueError(
                f"stage 1 makes the weights that the rounds start from; start is {self.experiment.start!r}: leave it "
                "empty, or leave stage 1 out"
            )
        if self.annotations not in ("bundled", "new") and not self.annotations.endswith(".jsonl"):
            raise ValueError(f"annotations must be 'bundled', 'new' or a .jsonl file; got {self.annotations!r}")
        if self.pretrain and self.annotations == "bundled" and self.experiment.pool != BUNDLED_POOL:
            raise ValueError(
                f"the bundled annotations are of the pool {BUNDLED_POOL!r}, not of {self.experiment.pool!r}; set "
                "annotations to 'new', so that the MLLM is asked, or pool back"
            )

    @property
    def started(self) -> Experiment:
        """Stages 2 and 3 as they are run, from the weights of stage 1 where there is one."""
        if not self.pretrain:
            return self.experiment
        weights = f"{self.experiment.model}_seed{self.experiment.settings.seed}.safetensors"
        return replace(self.experiment, start=(PurePath(self.shared) / "stage1" / weights).as_posix())

    def with_seed(self, seed: int) -> Pipeline:
        """The same with another seed, in every stage."""
        return replace(self, experiment=self.experiment.with_seed(seed))


def run_pipeline(
    pipeline: Pipeline,
    folder: str | Path,
    device: str = "auto",
    label: str = "",
    together: bool | Together = False,
) -> dict:
    """Run what is not there yet, and return the result (see `run_experiment`).

    Args:
        pipeline: what to run.
        folder: where everything is kept.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        label: names the results file; default the method.
        together: whether a round's clients are trained side by side, see `run_federated`.

    Raises:
        ResultError: the folder has pretrained weights or results of other settings; the differences are named.
    """
    if pipeline.pretrain:
        stage_one(pipeline, Path(folder), device)
    return run_experiment(pipeline.started, folder, device, label=label, together=together, shared=pipeline.shared)


def stage_one(pipeline: Pipeline, folder: Path, device: str = "auto") -> Path:
    """Annotate and pretrain, or find it done: the file with the compact model's weights.

    May be called by all processes of ``accelerate launch`` or ``torchrun``: one annotates, one writes, all return when
    the file is there. The stages after it run in one process. A run that finds another at work on the same file waits.
    """
    experiment, seed = pipeline.experiment, pipeline.experiment.settings.seed
    folder.mkdir(parents=True, exist_ok=True)  # or nothing could be seen from it
    path = folder / pipeline.started.start
    asked = {
        "pretrain": asdict(replace(pipeline.pretrain, seed=seed)),
        "kind": pipeline.kind, "annotations": pipeline.annotations, "pixels": _side(pipeline),
        **{name: getattr(experiment, name) for name in ("mllm", "mllm_dtype", "model", "width", "pool", "pool_images")},
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    one_process = int(os.environ.get("WORLD_SIZE", "1")) == 1  # several would wait for each other, not for a lock
    with filelock.FileLock(path.with_suffix(".turn")) if one_process else contextlib.nullcontext():
        if not path.exists():
            _pretrain(pipeline, folder, path, asked, device)
    there = load_result(path.with_suffix(".json"))["parameters"]
    if other := differences({**BEFORE, **there}, asked):
        raise ResultError(
            f"{path} was made with other settings ({other}); set them back, or choose another folder, and another one "
            "to share if that was shared"
        )
    return path


def _side(pipeline: Pipeline) -> int:
    """Pixels at which stage 1 looks at pictures from files; 0 where they are in memory, as they are."""
    return 0 if pipeline.experiment.pool in PARTS else pipeline.pixels or pipeline.experiment.image_size


def _pretrain(pipeline: Pipeline, folder: Path, path: Path, asked: dict, device: str) -> None:
    from accelerate import PartialState  # slow to import

    experiment, seed, started = pipeline.experiment, pipeline.experiment.settings.seed, time.perf_counter()
    pool, mllm = load_pool(experiment), load_mllm(experiment.mllm, device=device, dtype=experiment.mllm_dtype)
    source = pool_source(pool)
    records = _records(pipeline, source, mllm, path.parent / "annotations.jsonl")
    views = _views(pipeline, pool, source, mllm, folder, pick_device(device))
    classes = load_images(experiment.dataset, "test").num_classes
    done = pretrain(
        build_model(experiment.model, classes, experiment.width, seed),
        mllm,
        views,
        read_texts(records, source.ids, mllm),
        replace(pipeline.pretrain, seed=seed),
        folder=folder / "checkpoints" / f"stage1_seed{seed}",
        device=device,
    )
    processes = PartialState()  # those that have shared the batches; by itself this one is the main one
    seconds = round(time.perf_counter() - started, 1)
    spent = {"processes": processes.num_processes, "seconds_in_this_process": seconds}
    result = {
        "label": "stage1",
        "parameters": asked,
        "data": {"images": len(pool), "pool_sha256": pool.checksum(), "texts": len(records), "mllm": mllm.identity},
        "provenance": {**provenance(pick_device(device)), **spent},
        "history": done.history[:: max(1, len(done.history) // 200)],
    }
    if processes.is_main_process:
        save_result(path.with_suffix(".json"), result)
        save_model(path, done.model.cpu(), experiment.model, experiment.width)  # last: where it is, all is there
    processes.wait_for_everyone()


def _views(pipeline: Pipeline, pool: ImageSet, source: PictureSource, mllm: MllmTeacher, folder: Path, device) -> Views:
    if isinstance(pool.images, ImageFiles):
        return PictureViews(source, mllm, _side(pipeline), device)
    return ArrayViews(pool, mllm, folder / "checkpoints" / "features", device)


def _records(pipeline: Pipeline, source: PictureSource, mllm: MllmTeacher, path: Path) -> list[Record]:
    if pipeline.annotations == "new":
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".turn")):  # of several processes the first asks, the others read
            return filter_records(annotate(source, TransformersBackend(mllm), path, [pipeline.kind]).records).kept
    given = bundled_annotations() if pipeline.annotations == "bundled" else _read_given(pipeline.annotations, source)
    return [record for record in given if record.kind == pipeline.kind]


def _read_given(path: str, source: PictureSource) -> list[Record]:
    used = set(source.ids)  # `pool_images` may take fewer than were annotated
    return filter_records([record for record in read_records(path) if record.id in used]).kept
