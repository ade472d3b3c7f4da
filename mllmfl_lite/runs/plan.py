"""What a run will cost before it starts: operations, hours, memory and disk of each stage::

    plan = make_plan(pipeline, this_machine(pipeline))
    print(plan)                       # a table: stage, hours, memory
    plan.hours, plan.memory, plan.disk

Operations are counted: torch's own counter on models without weights, or the usual two for each weight and token of a
language model. Hours are operations over a machine's rates, or steps times the seconds that a step takes at least. The
rates of the machine at hand are measured, in a few seconds; those of the GPUs in `MACHINES` are reckoned, and a plan
says which. Neither data nor weights are needed.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.folders import find_folder, folder_source
from mllmfl_lite.data.imagenet_lt import IMAGENET_LT
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.longtail import long_tail_counts
from mllmfl_lite.federated.clients import Workers, train_client
from mllmfl_lite.federated.clip2fl import CLIP2FL
from mllmfl_lite.federated.creff import MATCHED, CReFF
from mllmfl_lite.federated.methods import FedAvg
from mllmfl_lite.federated.rounds import METHODS
from mllmfl_lite.measure.cost import size
from mllmfl_lite.models import CompactModel, build_model
from mllmfl_lite.repro import PRECISIONS, count_cores, pick_device
from mllmfl_lite.runs.experiment import Experiment
from mllmfl_lite.runs.memory import GIB, OVERHEAD, count_weights, kept_for_backward, plan_memory
from mllmfl_lite.runs.pipeline import Pipeline
from mllmfl_lite.stages.align import AlignSettings
from mllmfl_lite.stages.mixture import CompactEncoder
from mllmfl_lite.stages.pretrain import PretrainSettings
from mllmfl_lite.teachers.base import BUNDLED

# training images, test images, classes, pixels a side (of ImageNet-LT: the experiment's)
DATASETS = {
    "cifar10_mini": (5_000, 2_000, 10, 32),
    "cifar10": (50_000, 10_000, 10, 32),
    "cifar100": (50_000, 10_000, 100, 32),
    "imagenet_lt": (IMAGENET_LT["train"], IMAGENET_LT["test"], 1000, 0),
}


POOLS = {"cifar10_mini": 3_000, "cc595k": 595_375}  # pictures


PROMPT, ANSWER, NAME = 40, 60, 3  # tokens of a question, of a long answer, of a class name


DECODED_AT_ONCE = 64  # answers that are written side by side


PROBE = 2e10  # operations of a client in one call of the probe, at most


DECODED = 150  # JPEG pictures of ImageNet's size that a core decodes and crops in a second


# Operations on one picture, and bytes of the weights, of a CLIP's image encoder, as torch counts them: `image_cost` of
# those that can be had, the architecture of the last.
CLIPS = {
    "tiny_clip": (36_716_544, 5_383_136),
    "efficientnet_lite2": (847_795_072, 24_368_288),
    "ViT-B-32-quickgelu:openai": (8_725_463_040, 351_396_864),
}


@dataclass(frozen=True)
class Machine:
    """How fast a machine is at what a run consists of.

    Attributes:
        name: in words.
        rates: FLOP/s that training the compact model reaches.
        matmul: FLOP/s that large matrix products reach.
        bandwidth: bytes/s at which weights are read.
        step: seconds that a training step takes at least, however small: on a GPU, for starting its kernels.
        small: seconds of a step on a few synthetic features, as CReFF's server makes them.
        decode: pictures/s that are read from files.
        memory: bytes on the device.
        gpus: how many; the server's frozen models are spread over them, the rounds of one run are not.
        measured: whether the rates were measured, or reckoned from published peaks.
    """

    name: str
    rates: float
    matmul: float
    bandwidth: float
    step: float = 0.0
    small: float = 0.0
    decode: float = math.inf
    memory: int = 0
    gpus: int = 1
    measured: bool = False


# The laptop's rates were measured, by `this_machine` on two cores of a server's processor. The others are reckoned:
# 40 % of the dense bf16 peak for matrix products, 70 % of the memory's bandwidth, a twentieth of the peak for a compact
# model, 100 kernels of 25 microseconds a training step, 16 cores that decode pictures.
MACHINES = {
    "laptop": Machine("two cores, measured", 67e9, 320e9, 32e9, 0.0, 1e-4, 2 * DECODED, 24 * GIB, measured=True),
    "a100": Machine("A100 80 GB, reckoned", 16e12, 125e12, 1.4e12, 2.5e-3, 5e-4, 16 * DECODED, 80 * GIB),
    "h100": Machine("H100 80 GB, reckoned", 49e12, 396e12, 2.3e12, 2.5e-3, 5e-4, 16 * DECODED, 80 * GIB),
}
MACHINES["8xh100"] = replace(MACHINES["h100"], name="8 H100 80 GB, reckoned", gpus=8)


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    Attributes:
        name: what is done.
        flops: operations of the compact model.
        matmul: operations of a frozen large model.
        read: bytes of weights and of the cache that are read for each token that is written.
        steps: training steps, one after the other.
        small_steps: steps on synthetic features.
        pictures: read from files.
        once: runs with the same of this and of `folder` share the stage; empty: each run has its own.
        folder: where what it makes is kept, seen from the run's.
        memory: bytes on the device at the peak.
        disk: bytes that are left in the run's folder.
        spread: whether several GPUs share it.
    """

    name: str
    flops: float = 0.0
    matmul: float = 0.0
    read: float = 0.0
    steps: float = 0.0
    small_steps: float = 0.0
    pictures: float = 0.0
    once: str = ""
    folder: str = ""
    memory: int = 0
    disk: int = 0
    spread: bool = False

    def seconds(self, machine: Machine) -> float:
        """On that machine."""
        training = max(self.flops / machine.rates, self.steps * machine.step, self.pictures / machine.decode)
        frozen = self.matmul / machine.matmul + self.read / machine.bandwidth
        alone = training + frozen + self.small_steps * machine.small
        return alone / machine.gpus if self.spread else alone


@dataclass(frozen=True)
class Plan:
    """What a run costs on a machine.

    Attributes:
        stages: its parts, in order.
        machine: where.
    """

    stages: list[Stage]
    machine: Machine

    @property
    def hours(self) -> float:
        """All stages together."""
        return sum(stage.seconds(self.machine) for stage in self.stages) / 3600

    @property
    def memory(self) -> int:
        """Bytes on the device at the highest peak."""
        return max(stage.memory for stage in self.stages)

    @property
    def disk(self) -> int:
        """Bytes that the run leaves."""
        return sum(stage.disk for stage in self.stages)

    def __str__(self) -> str:
        lines = [f"{'':52s} {'time':>10s} {'memory':>10s} {'disk':>10s}"]
        for stage in self.stages:
            spent = in_words(stage.seconds(self.machine))
            lines.append(f"{stage.name:52s} {spent:>10s} {stage.memory / GIB:6.2f} GiB {stage.disk / GIB:6.2f} GiB")
        lines.append(f"{'in all':52s} {in_words(3600 * self.hours):>10s} {self.memory / GIB:6.2f} GiB "
                     f"{self.disk / GIB:6.2f} GiB")  # fmt: skip
        how = "rates measured); expect half to twice the time"
        if not self.machine.measured:
            how = "rates reckoned, not measured); no run has checked them"
        return "\n".join([*lines, f"on {self.machine.name} ({how}"])


def in_words(seconds: float) -> str:
    """A duration with two or three digits: ``"40 s"``, ``"12 min"``, ``"3.5 h"``, ``"20 d"``, ``"6.2 y"``."""
    hour, day, year = 3600, 86_400, 31_557_600
    for limit, unit, length in ((90, "s", 1), (1.5 * hour, "min", 60), (100 * hour, "h", hour), (2 * year, "d", day)):
        if seconds < limit:
            return f"{seconds / length:.{1 if unit == 'h' and seconds < 10 * hour else 0}f} {unit}"
    return f"{seconds / year:.{1 if seconds < 10 * year else 0}f} y"


def make_plan(pipeline: Pipeline, machine: Machine) -> Plan:
    """The plan of a run on that machine, from nothing: what is there already costs nothing again.

    Raises:
        ValueError: the MLLM is neither here nor among `MLLMS`, so its size is not known.
    """
    parts: list[Stage] = []
    if pipeline.pretrain:
        weights = Path(pipeline.started.start)
        folder = weights.parent.as_posix()
        if pipeline.annotations == "new":
            parts.append(replace(_annotating(pipeline), once="annotations", folder=folder))
        parts.append(replace(_pretraining(pipeline), once=weights.name, folder=folder))
    if pipeline.experiment.align and pipeline.experiment.align.teacher == "mllm":
        parts.append(replace(_asking(pipeline.experiment), once="told", folder=pipeline.shared))
    parts += [replace(stage, once=pipeline.started.rounds_key()) for stage in _rounds(pipeline.experiment)]
    if pipeline.experiment.align:
        parts.append(_aligning(pipeline.experiment, pipeline.experiment.align))
    return Plan(parts, machine)


def shape_of(experiment: Experiment) -> tuple[int, int, int, int]:
    """The clients' training images together, test images, classes, and pixels a side."""
    train, test, classes, pixels = DATASETS[experiment.dataset]
    if experiment.dataset != "imagenet_lt":
        train = sum(long_tail_counts(classes, train // classes, experiment.imbalance_factor))
    return train, test, classes, pixels or experiment.image_size


@functools.lru_cache(maxsize=64)
def weightless(model: str, width: int, classes: int) -> CompactModel:
    """A compact model on torch's "meta" device: shapes without numbers. The same object each time."""
    with torch.device("meta"):
        return build_model(model, classes, width)


def _model(experiment: Experiment) -> CompactModel:
    return weightless(experiment.model, experiment.width, shape_of(experiment)[2])


def _train_once(model: CompactModel, batch: int, pixels: int, precision: str) -> torch.Tensor:
    device = next(model.parameters()).device
    with torch.autocast("cpu" if device.type == "meta" else device.type, torch.bfloat16, precision == "bfloat16"):
        logits = model(torch.zeros(batch, 3, pixels, pixels, device=device))
    return cross_entropy(logits.float(), torch.zeros(batch, dtype=torch.long, device=device))


@functools.lru_cache(maxsize=64)
def image_flops(model: str, width: int, classes: int, pixels: int) -> tuple[float, float]:
    """Operations of a compact model on one image: to train on it, and to test it."""
    built = weightless(model, width, classes)
    with FlopCounterMode(display=False) as training:
        _train_once(built, 4, pixels, "float32").backward()
    with FlopCounterMode(display=False) as testing, torch.no_grad():
        _train_once(built, 4, pixels, "float32")
    return training.get_total_flops() / 4, testing.get_total_flops() / 4


def _flops(experiment: Experiment) -> tuple[float, float]:
    _, _, classes, pixels = shape_of(experiment)
    return image_flops(experiment.model, experiment.width, classes, pixels)


@functools.lru_cache(maxsize=64)
def training_memory(model: str, width: int, classes: int, pixels: int, batch: int, precision: str) -> int:
    """Bytes that training a compact model holds: weights four times, and what its backward pass needs."""
    built = weightless(model, width, classes)
    kept = kept_for_backward(lambda: _train_once(built, batch, pixels, precision), built)[1]
    return round((kept + 4 * size(built.state_dict())) * (1 + OVERHEAD))


def _memory(experiment: Experiment, precision: str, batch: int) -> int:
    _, _, classes, pixels = shape_of(experiment)
    return training_memory(experiment.model, experiment.width, classes, pixels, batch, precision)


def _rounds(experiment: Experiment) -> list[Stage]:
    settings, (train, test, classes, pixels) = experiment.settings, shape_of(experiment)
    learn, look = _flops(experiment)
    own = train / experiment.num_clients  # images of a client, on average
    steps = settings.local_epochs * math.ceil(own / settings.batch_size)
    asked = settings.rounds * settings.clients_per_round
    tested = sum(settings.evaluates(round_) for round_ in range(1, settings.rounds + 1)) * test
    state = size(_model(experiment).state_dict())
    from_files = experiment.dataset == "imagenet_lt"
    held = 0 if from_files else 3 * (pixels + 8) ** 2 * (train + test)
    stages = [
        Stage(
            f"rounds: {settings.rounds} x {settings.clients_per_round} clients x {settings.local_epochs} epochs",
            flops=asked * settings.local_epochs * own * learn,
            steps=asked * steps,
            pictures=from_files * asked * settings.local_epochs * own,
            memory=_memory(experiment, settings.precision, settings.batch_size) + held,
            disk=3 * state,
        ),
        Stage(f"tests: {tested:,} images", flops=tested * look, steps=tested / 250, pictures=from_files * tested),
    ]
    method = METHODS.get(experiment.method)
    if method and issubclass(method, CReFF):
        stages.append(_mending(experiment, classes, own, look))
    if method and issubclass(method, CLIP2FL):
        flops, weights = CLIPS.get(experiment.clip, CLIPS["ViT-B-32-quickgelu:openai"])
        stages.append(
            Stage(
                f"CLIP's answers about {train:,} images",
                matmul=train * flops,
                pictures=from_files * train,
                memory=2 * weights,
            )
        )
    return stages


def _mending(experiment: Experiment, classes: int, own: float, look: float) -> Stage:
    """CReFF's own work: gradients of the head on the clients; synthetic features and a new head on the server."""
    creff, settings, features = CReFF(), experiment.settings, _model(experiment).num_features
    sent = settings.clients_per_round * min(1, own / classes) / 2  # of all gradients: a client has half of the classes
    views = creff.repeats * min(own, classes * creff.images)  # of a client's images, each round
    gradients = classes * classes * (features + 1)
    matching = creff.match_steps * 12 * gradients * creff.per_class  # there, back, and back through that
    return Stage(
        "gradients of the head, synthetic features, new head",
        flops=settings.rounds * (settings.clients_per_round * views * look + matching),
        small_steps=settings.rounds * _server_steps(creff, classes),
        memory=round(
            4 * gradients * (2 + sent) + 24 * min(MATCHED, gradients) + 8 * classes * creff.per_class * features
        ),
    )


def _server_steps(creff: CReFF, classes: int) -> int:
    """Small steps of a round on the server; one that moves features takes as long as some four on the head."""
    return 4 * creff.match_steps + creff.head_epochs * math.ceil(classes * creff.per_class / creff.head_batch)


# What `AutoConfig` would say of models that are not here: hidden size, layers, feed-forward size.
MLLMS = {"llava-hf/llava-1.5-7b-hf": (4096, 32, 11008), "llava-hf/llava-1.5-13b-hf": (5120, 40, 13824)}


@dataclass(frozen=True)
class Language:
    """The size of an MLLM.

    Attributes:
        config: its `LlavaConfig`.
        weights: of the language model's layers and its output.
        tower: of the vision tower.
        patches: visual tokens of a picture.
        width: bytes a weight.
    """

    config: object = field(repr=False)
    weights: int
    tower: int
    patches: int
    width: int

    def reading(self, pictures: float, tokens: float) -> float:
        """Operations to look at pictures and read a prompt of so many tokens after each."""
        return 2 * pictures * (self.tower * self.patches + self.weights * (self.patches + tokens))

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return self.width * (self.weights + self.tower)


@functools.lru_cache(maxsize=8)
def language_of(name: str, dtype: str) -> Language:
    """The size of the MLLM of that name, from its config or from `MLLMS`.

    Raises:
        ValueError: neither is there.
    """
    config = _config(BUNDLED.get(name, name))
    config.dtype = PRECISIONS[dtype]
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return Language(config, *count_weights(config), patches, PRECISIONS[dtype].itemsize)


def _config(name: str):
    from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig  # slow to import

    if Path(name).is_dir():
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    if name not in MLLMS:
        raise ValueError(f"the size of {name!r} is not known; give its folder, or one of {', '.join(MLLMS)}")
    hidden, layers, inside = MLLMS[name]
    tower = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inside,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128,
    )  # fmt: skip
    return LlavaConfig(vision_config=tower, text_config=text)


def pool_size(experiment: Experiment) -> int:
    """Pictures of the server's pool that are used; of a folder of the user's own, what is in it, if it is here."""
    known = POOLS.get(experiment.pool)
    if known is None:
        folder = find_folder(experiment.pool)
        known = len(folder_source(folder)) if folder.is_dir() else POOLS["cc595k"]
    return min(known, experiment.pool_images) if experiment.pool_images else known


def _annotating(pipeline: Pipeline) -> Stage:
    experiment = pipeline.experiment
    pictures, mllm = pool_size(experiment), language_of(experiment.mllm, experiment.mllm_dtype)
    tokens = DECODED_AT_ONCE * (mllm.patches + PROMPT + ANSWER)
    text = mllm.config.text_config
    share = getattr(text, "num_key_value_heads", text.num_attention_heads) / text.num_attention_heads
    cache = 2 * tokens * text.num_hidden_layers * text.hidden_size * share * mllm.width  # keys and values
    return Stage(
        f"stage 1: the MLLM describes {pictures:,} pictures",
        matmul=mllm.reading(pictures, PROMPT + ANSWER),
        read=pictures / DECODED_AT_ONCE * ANSWER * (mllm.width * mllm.weights + cache),
        memory=round((mllm.size + cache) * (1 + OVERHEAD)),
        disk=pictures * 600,
        spread=True,
    )


def _pretraining(pipeline: Pipeline) -> Stage:
    experiment, settings = pipeline.experiment, pipeline.pretrain
    texts, mllm = pool_size(experiment) * settings.epochs, language_of(experiment.mllm, experiment.mllm_dtype)
    in_memory = experiment.pool in DATASETS
    pixels = 32 if in_memory else pipeline.pixels or experiment.image_size
    passes = 3 if settings.gradient_checkpointing else 2  # forward, and back to the picture's places
    reading = 2 * texts * mllm.weights * (mllm.patches + PROMPT + ANSWER)
    looking = 2 * texts * mllm.tower * mllm.patches
    classes = shape_of(experiment)[2]
    memory, trained = pretraining_memory(
        experiment.mllm, experiment.mllm_dtype, experiment.model, experiment.width, classes, pixels, settings, in_memory
    )
    tokens = pool_size(experiment) * mllm.patches * mllm.config.vision_config.hidden_size * 4 if in_memory else 0
    return Stage(
        f"stage 1: pretraining on {texts:,} texts",
        flops=texts * image_flops(experiment.model, experiment.width, classes, pixels)[0],
        matmul=passes * reading + (looking / settings.epochs if in_memory else looking),
        memory=memory,
        disk=round(5 * trained + tokens),
        spread=True,
    )


@functools.lru_cache(maxsize=64)
def pretraining_memory(
    mllm: str, dtype: str, model: str, width: int, classes: int, pixels: int, settings: PretrainSettings, stored: bool
) -> tuple[int, int]:
    """Bytes that pretraining holds on its device (see `plan_memory`), and those of the trained weights."""
    language = language_of(mllm, dtype)
    built = weightless(model, width, classes)
    encoder = CompactEncoder(built, math.isqrt(language.patches), language.config.text_config.hidden_size)
    planned = plan_memory(language.config, encoder, settings, pixels, PROMPT, ANSWER, live_tower=not stored)
    return planned.total, size(encoder.state_dict())


def _asking(experiment: Experiment) -> Stage:
    pictures, mllm = pool_size(experiment), language_of(experiment.mllm, experiment.mllm_dtype)
    names = shape_of(experiment)[2]
    return Stage(
        f"stage 3: {names:,} names scored on {pictures:,} pictures",
        matmul=mllm.reading(pictures, PROMPT) + 2 * pictures * names * NAME * mllm.weights,
        memory=round(1.3 * mllm.size),
        disk=4 * names * pictures,
        spread=True,
    )


def _aligning(experiment: Experiment, settings: AlignSettings) -> Stage:
    _, test, classes, _ = shape_of(experiment)
    learn, look = _flops(experiment)
    times = experiment.settings.rounds if settings.when == "each round" else 1
    shown = times * settings.epochs * settings.per_class * classes
    return Stage(
        f"stage 3: alignment on {settings.per_class * classes:,} images",
        flops=shown * learn + test * look,
        steps=shown / settings.batch_size,
        memory=_memory(experiment, "float32", settings.batch_size),
        disk=2 * size(_model(experiment).state_dict()),
    )


def this_machine(pipeline: Pipeline, device: str = "auto") -> Machine:
    """The machine at hand, measured in a few seconds: clients' steps, a matrix product, a step on a few features."""
    where, cores, experiment = pick_device(device), count_cores(), pipeline.experiment
    gpu, classes = where.type == "cuda", shape_of(experiment)[2]
    model = build_model(experiment.model, classes, experiment.width).to(where)
    before = torch.get_num_threads()
    if not gpu:
        torch.set_num_threads(1)
    try:
        a = torch.randn(1024, 1024, device=where, dtype=PRECISIONS[experiment.mllm_dtype])
        product = 2 * 1024**3 / _middle(lambda: a @ a, where) * (1 if gpu else cores)
        small = _small_step(model, where)
    finally:
        torch.set_num_threads(before)
    memory = torch.cuda.get_device_properties(where).total_memory if gpu else _main_memory()
    name = torch.cuda.get_device_name(where) if gpu else f"this machine, {cores} cores"
    rate = _training_rate(experiment, model, where, 1 if gpu else cores)
    # a processor reads some byte for each ten operations that it can do
    bandwidth = _bandwidth(where) if gpu else product / 10
    return Machine(name, rate, product, bandwidth, 0.0, small, cores * DECODED, memory, 1, True)


def _training_rate(experiment: Experiment, model: CompactModel, device: torch.device, workers: int) -> float:
    """FLOP/s of clients that train side by side, as many as the run would have, on made-up images."""
    pixels, learn = shape_of(experiment)[3], _flops(experiment)[0]
    batch = min(experiment.settings.batch_size, max(2, round(PROBE / learn)))  # large models on few images
    settings = replace(experiment.settings, local_epochs=1, batch_size=batch)
    count, workers = (4 * batch if 4 * batch * learn < PROBE else batch), min(workers, settings.clients_per_round)
    made = np.zeros((count, pixels, pixels, 3), np.uint8)
    batches = Batches(ImageSet(made, np.zeros(count, np.int64), ("any",), "made"), device)
    own, state = torch.arange(count, device=device), model.state_dict()
    with Workers(model, workers) as threads:

        def round_() -> None:
            jobs = [threads.submit(train_client, batches, own, FedAvg(), settings, state, 1, k) for k in range(workers)]
            for job in jobs:
                job.result()

        return workers * count * learn / _middle(round_, device)


def _small_step(model: CompactModel, device: torch.device) -> float:
    """Seconds of a step on a few synthetic features: a twentieth of what CReFF's server does in a round."""
    creff, classes = CReFF(match_steps=5, head_epochs=15), 10
    of_head = {"head.weight": torch.randn(classes, model.num_features, device=device)}
    of_head["head.bias"] = torch.zeros(classes, device=device)
    generator = torch.Generator().manual_seed(0)
    memory = creff.init_memory(of_head, generator)
    sent = {"classes": torch.arange(classes, device=device)}
    sent["gradients"] = torch.randn(classes, classes, model.num_features + 1, device=device)
    work = _middle(lambda: creff.server_update({}, {}, memory, [sent], generator), device)
    return work / _server_steps(creff, classes)


def _middle(work: Callable[[], object], device: torch.device, seconds: float = 1.0) -> float:
    """The median time of repeated calls, after one that warms up."""
    work()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy in the device's memory, read and written."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    return 2 * len(source) / _middle(lambda: copy.copy_(source), device)


def _main_memory() -> int:
    from os import sysconf

    return sysconf("SC_PAGE_SIZE") * sysconf("SC_PHYS_PAGES")
