"""Stage 1b, pretraining: train the compact model and its projection on annotations, by `mixture`."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from mllmfl_lite.checkpoint import RunFolder, optimizer_tensors, restore_optimizer, within
from mllmfl_lite.data.folders import find_unreadable
from mllmfl_lite.data.images import ImageFiles
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import Execution, pick_device, progress_bar, settings_class, sha256_arrays, torch_generator
from mllmfl_lite.stages.mixture import FrozenReader, TextBatch, alpha_at, mixed_loss, new_encoder
from mllmfl_lite.stages.texts import Texts, Views
from mllmfl_lite.teachers.llava import MllmTeacher

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Share = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]


@settings_class
class PretrainSettings:
    """Numbers of a pretraining run. Defaults are for the laptop; LLaVA's own stand in brackets."""

    epochs: Count = 8  #: passes over the texts (1)
    batch_size: Count = 16  #: texts a step, in each process (128 over all GPUs)
    lr: Share = 2e-3  #: peak of AdamW's step size, after `warmup`; then half a cosine down (2e-3)
    weight_decay: Weight = 0.05  #: AdamW's, of all weights, BatchNorm's scales as well (0)
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05  #: share of the steps in which the step size rises (0.03)
    schedule: Literal["linear", "cosine", "step", "constant"] = "linear"  #: of alpha, see `alpha_at`
    ramp: Share = 0.2  #: share of the steps in which alpha rises
    alpha_end: Share = 1.0  #: alpha's last value; below 1, the compact model never stands alone
    language_weight: Weight = 1.0  #: of the language model's loss; 0 leaves feature distillation alone
    feature_weight: Weight = 0.0  #: of the feature term, 1 - cosine
    max_answer_tokens: Count = 128  #: longer answers are cut
    order: Literal["length", "random"] = "length"  #: batches of texts of similar length, or random ones
    augment: bool = True  #: crops and flips for the compact model; CLIP always sees the whole image
    precision: Literal["float32", "bfloat16"] = "float32"  #: of the trained part; bfloat16 means autocast
    gradient_checkpointing: bool = False  #: keep one tensor a layer of the LLM, compute the rest again, for less memory
    checkpoint_every: Count = 200  #: steps between checkpoints

    @model_validator(mode="after")
    def _learns_something(self) -> PretrainSettings:
        if not self.language_weight + self.feature_weight:
            raise ValueError("language_weight and feature_weight are both 0: there is nothing to learn from")
        if self.alpha_end < 1:
            warnings.warn(f"alpha ends at {self.alpha_end}, not 1: the compact model never stands alone", stacklevel=4)
        return self

    def alpha(self, step: int, steps: int) -> float:
        """The compact model's weight in a step."""
        return alpha_at(step, steps, self.schedule, self.ramp, self.alpha_end)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate in a step: linear up, half a cosine down."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


@dataclass(frozen=True)
class Pretrained:
    """What a run returns."""

    model: CompactModel  #: g, ready for the clients
    projection: dict[str, Tensor]  #: the state of P_s
    history: list[dict]  #: one record a step, with step, alpha, loss, its parts, gradient norm of g
    seconds: float  #: spent in steps, over all restarts


def pretrain(
    model: CompactModel,
    mllm: MllmTeacher,
    views: Views,
    texts: Texts,
    settings: PretrainSettings | None = None,
    seed: int = 0,
    execution: Execution | None = None,
) -> Pretrained:
    """Pretrain from the weights of `model`, which is not changed. With a folder, checkpoints are saved and resumed.

    Under ``accelerate launch`` or ``torchrun`` each process takes its share of every batch; all call this with the same
    arguments, and the first one writes checkpoints. A run resumes with as many processes as it began with.

    Raises:
        ValueError: parts that do not fit; or a loss or gradient that is not finite: the batch's images are named.
        CheckpointError: the folder belongs to another run, is damaged, in use or not writable.
    """
    execution = execution or Execution(device="cpu")
    run = _Run((model, mllm, views, texts), settings or PretrainSettings(), int(seed), execution)
    if not execution.folder:
        return run.go(None, None)
    folder = RunFolder(execution.folder, run.identity())
    if not run.accelerator.is_main_process:
        return run.go(folder.load(), None)  # all resume from the checkpoint, one writes it
    with folder:
        return run.go(folder.load(), folder)


class _Run:
    def __init__(self, parts: tuple, settings: PretrainSettings, seed: int, execution: Execution):
        from accelerate import Accelerator  # slow

        self.initial, self.mllm, self.views, self.texts = parts
        self.settings, self.seed, self.label = settings, seed, execution.label or "pretraining"
        device = pick_device(execution.device)
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        self.batch = settings.batch_size * self.accelerator.num_processes
        self._check(device)
        self.per_epoch = len(self._epoch(0))
        self.steps = settings.epochs * self.per_epoch
        self.history: list[dict] = []
        self.seconds = 0.0

    def _check(self, device: torch.device) -> None:
        if len({device.type, self.mllm.device.type, self.views.device.type}) > 1:
            mllm = f"the compact model trains on {device}, the MLLM is on {self.mllm.device}"
            raise ValueError(f"{mllm}, the views are on {self.views.device}; give all three the same device")
        image, counts = self.texts.image, np.bincount(self.texts.kind, minlength=1)
        if len(image) and image.max() >= len(self.views):
            raise ValueError(f"a text is about image {image.max()}, but there are only {len(self.views)} images")
        if counts.max() < self.batch:
            raise ValueError(f"{len(image)} texts do not fill one batch of {self.batch}; lower batch_size")
        if few := int(counts[counts < self.batch].sum()):
            warnings.warn(f"{few} texts are never used: their kind does not fill a batch of {self.batch}", stacklevel=4)

    def _open_files(self) -> None:
        """Raise `ValueError` if images cannot be opened: now, not after hours. Each process opens its share."""
        used = np.unique(self.texts.image)[self.accelerator.process_index :: self.accelerator.num_processes]
        files = self.views.pool.subset(used).images
        if isinstance(files, ImageFiles) and (bad := find_unreadable(files)):
            shown = "; ".join(list(bad.values())[:8])
            raise ValueError(f"{len(bad)} images that texts are about cannot be used: {shown}. Mend or remove them")

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        return self.texts.batches(self.batch, self.seed, epoch, self.settings.order == "length")

    def identity(self) -> dict:
        """What two runs must share to be the same run."""
        of = self.texts
        texts = repr((of.image.tolist(), of.kind.tolist(), of.questions, of.answers)).encode()
        return {
            **{name: value for name, value in asdict(self.settings).items() if name != "checkpoint_every"},
            "seed": self.seed,
            "processes": self.accelerator.num_processes,  # each adds its share to a batch
            "mllm": self.mllm.identity,
            "images": self.views.pool.checksum(),
            "texts": hashlib.sha256(texts).hexdigest(),
            "initial_weights": sha256_arrays(t.cpu().numpy() for t in self.initial.state_dict().values()),
        }

    def go(self, found: tuple | None, folder: RunFolder | None) -> Pretrained:
        settings = self.settings
        if not found:
            self._open_files()
        self.encoder = new_encoder(self.initial, self.mllm, self.views, self.texts, self.seed, self.accelerator.device)
        self.reader = FrozenReader(self.mllm, settings.gradient_checkpointing)
        weights = [p for p in self.encoder.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=settings.weight_decay)
        if found:
            self._restore(found, optimizer)
        trained, optimizer = self.accelerator.prepare(self.encoder, optimizer)
        trained.train()
        started, first = time.perf_counter() - self.seconds, len(self.history)
        rest = itertools.chain.from_iterable(map(self._epoch, range(first // self.per_epoch, settings.epochs)))
        with progress_bar(self.steps, "steps", self.label, first) as bar:
            for done, rows in enumerate(itertools.islice(rest, first % self.per_epoch, None), first + 1):
                self._step(trained, optimizer, rows)
                self.seconds = time.perf_counter() - started
                bar.set_postfix_str(f"alpha {self.history[-1]['alpha']:.2f}, loss {self.history[-1]['loss']:.3f}")
                bar.update()
                if folder and (done % settings.checkpoint_every == 0 or done == self.steps):
                    self._save(folder, optimizer)
        model, projection = self.encoder.model.cpu().eval(), self.encoder.projection.cpu().state_dict()
        model.head.requires_grad_(True)
        return Pretrained(model, projection, self.history, self.seconds)

    def _step(self, trained: nn.Module, optimizer: Optimizer, rows: np.ndarray) -> None:
        step, process = len(self.history), self.accelerator.process_index
        alpha = self.settings.alpha(step, self.steps)
        optimizer.param_groups[0]["lr"] = self.settings.rate(step, self.steps)
        rows = rows[process :: self.accelerator.num_processes]
        loss, parts = self._loss(trained, alpha, rows, torch_generator(self.seed, "views", step, 0, process))
        length = math.nan
        if math.isfinite(loss.item()):
            self.accelerator.backward(loss)
            squares = [p.grad.float().square().sum() for p in self.encoder.model.parameters() if p.grad is not None]
            length = nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0).item()
        if not math.isfinite(length):
            images = ", ".join(self.texts.ids[i] for i in self.texts.image[rows])
            advice = "Look at them, lower lr, or use float32; the last checkpoint is good"
            raise ValueError(f"the loss or gradient of step {step} is not finite; its images: {images:.2000}. {advice}")
        optimizer.step()
        optimizer.zero_grad()
        record = {"step": step, "alpha": round(alpha, 6), "loss": loss.item(), **parts}
        self.history.append({**record, "gradient": torch.stack(squares).sum().sqrt().item()})

    def _loss(
        self, trained: nn.Module, alpha: float, rows: np.ndarray, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        settings, images, device = self.settings, self.texts.image[rows], self.accelerator.device
        ids, labels = (t.to(device) for t in self.texts.tokens(rows, settings.max_answer_tokens))
        tokens = self.views.tokens(images) if alpha < 1 or settings.feature_weight > 0 else None
        batch = TextBatch(self.views.compact(images, generator if settings.augment else None), tokens, ids, labels)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            return mixed_loss(trained, self.reader, alpha, batch, settings.language_weight, settings.feature_weight)

    def _save(self, folder: RunFolder, optimizer: Optimizer) -> None:
        tensors = {f"encoder.{name}": tensor.cpu() for name, tensor in self.encoder.state_dict().items()}
        tensors |= optimizer_tensors(optimizer)
        record = {"history": self.history, "seconds": round(self.seconds, 3)}
        folder.save(len(self.history), tensors, record)

    def _restore(self, found: tuple, optimizer: Optimizer) -> None:
        _, tensors, record = found
        self.encoder.load_state_dict(within(tensors, "encoder."))
        restore_optimizer(optimizer, tensors)
        self.history, self.seconds = record["history"], record["seconds"]
