"""The one configuration of an experiment: data, model, method, and the settings of the three stages."""

from __future__ import annotations

from dataclasses import asdict, field, fields
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mllmfl_lite.data import PARTS
from mllmfl_lite.federated import METHODS, FedSettings
from mllmfl_lite.repro import nested, settings_class
from mllmfl_lite.stages.align import AlignSettings
from mllmfl_lite.stages.pretrain_settings import PretrainSettings

BUNDLED_POOL = "cifar10_mini"
# settings that one stage alone uses
OF_STAGE = {"pretrain": 1, "start": 1, "annotations": 1, "kind": 1, "pixels": 1, "align": 3}
Precision = Literal["float32", "bfloat16"]
Positive = Annotated[int, Field(ge=1, le=100_000)]


@settings_class
class Experiment:
    """What is run. Defaults: CIFAR-10-LT at full scale, FedAvg from random weights.

    Attributes:
        dataset: name for `load_images`.
        imbalance_factor: images of the first class over images of the last; ImageNet-LT's lists have their own.
        balanced: as many images as the long tail has, but equal numbers a class (a control).
        split: how images are dealt to clients, see `data.partition`.
        num_clients: K.
        alpha: concentration of the Dirichlet distribution.
        image_size: pixels a side at which files are read (ImageNet-LT, a folder as pool).
        model: ``"resnet8"`` or ``"resnet50"``.
        width: channels of ResNet-8.
        method: a name in `federated.METHODS`, or ``"module:Class"`` for your own.
        method_options: the method's own numbers, e.g. ``{"mu": 0.1}``.
        stages: which of the three are run: 1 pretraining, 2 federated rounds, 3 alignment.
        federated: stage 2.
        pretrain: stage 1.
        align: stage 3.
        start: finished weights of stage 1, a file written by `save_model`; ``{seed}`` stands for the seed.
        annotations: for stage 1: ``"bundled"``, ``"new"`` to ask the MLLM, or a ``.jsonl`` file of records.
        kind: which annotations stage 1 learns from.
        pixels: side of the compact model's images in stage 1 if the pool is a folder; 0: `image_size`.
        mllm: the multimodal LLM, a name for `load_mllm`.
        mllm_dtype: precision of its weights.
        clip: the CLIP of CLIP2FL and of ``align.teacher = "clip"``, a name for `load_zero_shot`.
        pool: the server's open images: a data set (its part ``"web"``), or a folder of images.
        pool_images: use the first so many of them; 0: all.
        seed: of every stage.
    """

    dataset: Literal["cifar10_mini", "cifar10", "cifar100", "imagenet_lt"] = "cifar10"
    imbalance_factor: Annotated[float, Field(ge=1)] = 100.0
    balanced: bool = False
    split: Literal["iid", "dirichlet", "dirichlet_equal", "one_class_per_client"] = "dirichlet_equal"
    num_clients: Positive = 20
    alpha: Annotated[float, Field(gt=0)] = 0.5
    image_size: Positive = 224
    model: Literal["resnet8", "resnet50"] = "resnet8"
    width: Positive = 64
    method: str = "fedavg"
    method_options: dict[str, Any] = field(default_factory=dict)
    stages: Annotated[tuple[Literal[1, 2, 3], ...], Field(strict=False)] = (2,)
    federated: Annotated[FedSettings, nested(FedSettings)] = FedSettings()
    pretrain: Annotated[PretrainSettings, nested(PretrainSettings)] = PretrainSettings()
    align: Annotated[AlignSettings, nested(AlignSettings)] = AlignSettings()
    start: str = ""
    annotations: str = "bundled"
    kind: Literal["conversation", "detailed_description", "complex_reasoning"] = "detailed_description"
    pixels: Annotated[int, Field(ge=0, le=10_000)] = 0
    mllm: str = "tiny_llava"
    mllm_dtype: Precision = "float32"
    clip: str = "tiny_clip"
    pool: str = BUNDLED_POOL
    pool_images: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        stages, problems = self.stages, []
        if sorted(set(stages)) != list(stages) or not {2, 3} & set(stages):
            problems.append(f"stages must name 2, 3 or both, in rising order, each once; got {list(stages)}")
        if ":" not in self.method and self.method not in METHODS:
            problems.append(f"method must be one of {', '.join(METHODS)}, or 'module:Class'; got {self.method!r}")
        if 2 in stages and self.federated.clients_per_round > self.num_clients:
            problems.append(
                f"federated.clients_per_round is {self.federated.clients_per_round}, but num_clients is "
                f"{self.num_clients}; draw at most as many as there are"
            )
        defaults = {f.name: f.default for f in fields(type(self))}  # type: ignore[arg-type]
        problems += [
            f"{name} has no effect without stage {stage}; add {stage} to stages, or leave {name} out"
            for name, stage in OF_STAGE.items()
            if stage not in stages and getattr(self, name) != defaults[name]
        ]
        if 3 in stages and self.align.when == "each round" and (self.method != "fedavg" or 2 not in stages):
            problems.append("align.when is 'each round', which is a server step of 'fedavg' in stage 2; use 'end'")
        if {1, 3} & set(stages) and "web" not in PARTS.get(self.pool, ("web",)):
            problems.append(f"pool {self.pool!r} has no open images; use {BUNDLED_POOL!r} or a folder of images")
        problems += self._annotation_problems() if 1 in stages and not self.start else []
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _annotation_problems(self) -> list[str]:
        if self.annotations not in ("bundled", "new") and not self.annotations.endswith(".jsonl"):
            return [f"annotations must be 'bundled', 'new' or a .jsonl file; got {self.annotations!r}"]
        if self.annotations == "bundled" and self.pool != BUNDLED_POOL:
            return [f"the bundled annotations describe the pool {BUNDLED_POOL!r}; set annotations to 'new'"]
        return []


def experiment_of(values: dict[str, Any]) -> Experiment:
    """Build the experiment that values describe; other keys are ignored, blocks of stages that are off dropped.

    Args:
        values: the fields of `Experiment`; `federated`, `pretrain` and `align` as dictionaries.

    Raises:
        ValueError: names every wrong value.
    """
    known = {f.name for f in fields(Experiment)}  # type: ignore[arg-type]
    given = {key: value for key, value in values.items() if key in known}
    stages = given.get("stages", (2,))
    if isinstance(stages, (list, tuple)):
        given = {key: value for key, value in given.items() if OF_STAGE.get(key, 2) in {2, *stages}}
    return Experiment(**given)


def parameters_of(experiment: Experiment) -> dict:
    """The experiment as plain JSON, as results files hold it."""
    return {**asdict(experiment), "stages": list(experiment.stages)}  # type: ignore[call-overload]
