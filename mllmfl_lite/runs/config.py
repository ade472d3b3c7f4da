"""The one configuration of an experiment: data, model, method, and the settings of the three stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, field, fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from mllmfl_lite.data import PARTS
from mllmfl_lite.data.reserved import RESERVED_POOL
from mllmfl_lite.federated import METHODS, FedSettings
from mllmfl_lite.repro import nested, settings_class
from mllmfl_lite.stages.align import AlignSettings
from mllmfl_lite.stages.pretrain import PretrainSettings

BUNDLED_POOL = "cifar10_mini"
OF_STAGE = {"pretrain": 1, "start": 1, "annotations": 1, "kind": 1, "pixels": 1, "align": 3}  # used by it alone
Positive = Annotated[int, Field(ge=1, le=100_000)]
T = TypeVar("T")


@settings_class
class Experiment:
    """What is run. Defaults: CIFAR-10-LT at full scale, FedAvg from random weights."""

    dataset: Literal["cifar10_mini", "cifar10", "cifar100", "imagenet_lt"] = "cifar10"
    imbalance_factor: Annotated[float, Field(ge=1)] = 100.0  # images of the first class over images of the last
    balanced: bool = False  # as many images as the long tail has, but equal numbers a class (a control)
    split: Literal["iid", "dirichlet", "dirichlet_equal", "one_class_per_client"] = "dirichlet_equal"
    num_clients: Positive = 20  # K
    alpha: Annotated[float, Field(gt=0)] = 0.5  # concentration of the Dirichlet distribution
    image_size: Positive = 224  # pixels a side at which files are read (ImageNet-LT, a folder as pool)
    model: Literal["resnet8", "resnet50"] = "resnet8"
    width: Positive = 64  # channels of ResNet-8
    method: str = "fedavg"  # a name in `federated.METHODS`, or "module:Class" for your own
    method_options: dict[str, Any] = field(default_factory=dict)  # the method's own numbers, e.g. {"mu": 0.1}
    stages: Annotated[tuple[Literal[1, 2, 3], ...], Field(strict=False)] = (2,)  # pretraining, rounds, alignment
    federated: Annotated[FedSettings, nested(FedSettings)] = FedSettings()  # stage 2
    pretrain: Annotated[PretrainSettings, nested(PretrainSettings)] = PretrainSettings()  # stage 1
    align: Annotated[AlignSettings, nested(AlignSettings)] = AlignSettings()  # stage 3
    start: str = ""  # finished weights of stage 1, a file written by `save_model`; {seed} stands for the seed
    annotations: str = "bundled"  # for stage 1; "new": the MLLM is asked; or a .jsonl file of records
    kind: Literal["conversation", "detailed_description", "complex_reasoning"] = "detailed_description"  # of them
    pixels: Annotated[int, Field(ge=0, le=10_000)] = 0  # image side in stage 1 if the pool is a folder; 0: image_size
    mllm: str = "tiny_llava"  # a name for `load_mllm`
    mllm_dtype: Literal["float32", "bfloat16"] = "float32"
    clip: str = "tiny_clip"  # of CLIP2FL and of align.teacher "clip", a name for `load_zero_shot`
    pool: str = BUNDLED_POOL  # the server's open images: a data set's part "web", "reserved", a folder
    pool_images: Annotated[int, Field(ge=0)] = 0  # use the first so many of them; 0: all
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # of every stage

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        if problems := list(_problems(self)):
            raise ValueError("\n".join(problems))
        return self


SETTINGS = [f.name for f in fields(Experiment)]
INSIDE = {f.name for cls in (FedSettings, PretrainSettings, AlignSettings) for f in fields(cls)}


def _problems(of: Experiment) -> Iterator[str]:
    stages, rounds = of.stages, of.federated
    if sorted(set(stages)) != list(stages) or not {2, 3} & set(stages):
        yield f"stages must name 2, 3 or both, in rising order, each once; got {list(stages)}"
    if 2 in stages and rounds.clients_per_round > of.num_clients:
        yield (
            f"federated.clients_per_round is {rounds.clients_per_round}, but num_clients is {of.num_clients}; draw at "
            "most as many as there are"
        )
    if 2 in stages and not rounds.rounds:
        yield "federated.rounds is 0; run at least one round, or leave 2 out of stages"
    defaults = {f.name: f.default for f in fields(of)}
    for name, stage in OF_STAGE.items():
        if stage not in stages and getattr(of, name) != defaults[name]:
            yield f"{name} has no effect without stage {stage}; add {stage} to stages, or leave {name} out"
    if 3 in stages and of.align.when == "each round" and (of.method != "fedavg" or 2 not in stages):
        yield "align.when is 'each round', which is a server step of 'fedavg' in stage 2; use 'end'"
    if ":" not in of.method and of.method not in METHODS:
        yield f"method must be one of {', '.join(METHODS)}, or 'module:Class'; got {of.method!r}"
    try:
        json.dumps(of.method_options, allow_nan=False)
    except (TypeError, ValueError):
        yield f"method_options must be finite numbers, switches or text; got {of.method_options!r:.100}"
    yield from _option_problems(of)
    if (uses_pool(of) or {1, 3} & set(stages)) and "web" not in PARTS.get(of.pool, ("web",)):
        yield f"pool {of.pool!r} has no open images; use {BUNDLED_POOL!r} or a folder of images"
    if of.pool == RESERVED_POOL and of.dataset != "cifar10":
        yield f"pool {RESERVED_POOL!r} keeps images of cifar10 from its clients; the dataset is {of.dataset!r}"
    if 1 in stages and not of.start:
        if of.annotations not in ("bundled", "new") and not of.annotations.endswith(".jsonl"):
            yield f"annotations must be 'bundled', 'new' or a .jsonl file; got {of.annotations!r}"
        if of.annotations == "bundled" and (of.pool != BUNDLED_POOL or of.pool_images):
            yield f"annotations are 'bundled', which describe the whole pool {BUNDLED_POOL!r}; set them to 'new'"


def _option_problems(of: Experiment) -> Iterator[str]:
    known = {f.name: f.default for f in fields(METHODS[of.method])} if of.method in METHODS else {}
    for name, value in of.method_options.items():
        whole, number = (isinstance(known.get(name), kind) for kind in (int, (int, float)))
        if number and not (type(value) in (int, *([] if whole else [float])) and value >= whole):
            rule = "a whole number, at least 1" if whole else "a number, not negative"
            yield f"method_options.{name} must be {rule}; got {value!r:.60}"


def uses_pool(of: Experiment) -> bool:
    """Return True if the method's server step uses open images."""
    return 2 in of.stages and of.method in METHODS and METHODS[of.method].needs_pool


def pool_side(of: Experiment) -> int:
    """Pixels a side at which stage 1 sees a pool of files; 0 for a pool in memory, whose images keep their size."""
    return 0 if of.pool in (*PARTS, RESERVED_POOL) else of.pixels or of.image_size


def experiment_of(values: dict[str, Any]) -> Experiment:
    """Build the experiment from the fields of `Experiment`, its blocks as dictionaries; other keys are ignored.

    Settings of stages that are off are checked, then dropped.

    Raises:
        ValueError: names every wrong value, and every setting that stands outside its block.
    """
    outside = [f"{key}: write it inside federated, pretrain or align" for key in values if key in INSIDE]
    given = {key: values[key] for key in SETTINGS if key in values}
    stages = given.get("stages", (2,))
    off = [stage for stage in (1, 3) if isinstance(stages, (list, tuple)) and stage not in stages]
    dropped = {key: value for key, value in given.items() if OF_STAGE.get(key) in off}
    kept = {key: value for key, value in given.items() if key not in dropped}
    return all_of(lambda: Experiment(**{**dropped, "stages": (1, 2, 3)}), lambda: Experiment(**kept), known=outside)[1]


def all_of(*makers: Callable[[], T], known: Sequence[str] = ()) -> list[T]:
    """Call each; problems known before and all that they raise are one `ValueError`, each line once."""
    made, problems = [], list(known)
    for make in makers:
        try:
            made.append(make())
        except ValueError as error:
            problems += str(error).splitlines()
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return made


def parameters_of(experiment: Experiment) -> dict:
    """The experiment as plain JSON, as results files hold it."""
    return {**asdict(experiment), "stages": list(experiment.stages)}
