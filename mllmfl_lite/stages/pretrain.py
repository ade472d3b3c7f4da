"""Stage 1b, Dynamic Weighted Pretraining: a compact model takes a frozen CLIP's place in front of a frozen LLM::

    mllm  = load_mllm()
    texts = read_texts(bundled_annotations(), array_source(web).ids, mllm)
    views = ArrayViews(web, mllm, folder="runs/features")
    done  = pretrain(build_model("resnet8", 10, width=16), mllm, views, texts, PretrainSettings(epochs=8))
    done.model                                     # what goes to the clients

The language model sees ``H(x) = (1 - alpha) * P_clip(f_clip(x)) + alpha * P_s(g(x))`` in the places of the picture,
with alpha rising from 0 to 1, and its loss on the annotation's tokens trains g and P_s alone. The mixture is the
paper's; this equation, the schedules and the start of P_s are our reading of it.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mllmfl_lite.checkpoint import RunFolder
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import PRECISIONS, pick_device, progress_bar, sha256_arrays, torch_generator, write_json
from mllmfl_lite.runs.settings import check_choice, check_whole
from mllmfl_lite.stages.mixture import SCHEDULES, FrozenReader, PretrainError, alpha_at, mixed_loss, new_encoder
from mllmfl_lite.stages.texts import Texts
from mllmfl_lite.stages.views import Views
from mllmfl_lite.teachers.llava import MllmTeacher


class PretrainDiverged(RuntimeError):
    """The loss is no longer a number. Weights were not changed by that batch; the checkpoint before it is good.

    Attributes:
        step: the step, counted from 0.
        ids: the image ids of the batch.
    """

    def __init__(self, step: int, ids: list[str], saved: Path | None):
        where = f"its images are listed in {saved}" if saved else f"its images: {', '.join(ids[:8])}"
        super().__init__(
            f"the loss of step {step} is not finite; {where}. Look at them, lower the learning rate, or use float32"
        )
        self.step, self.ids = step, ids


@dataclass(frozen=True)
class PretrainSettings:
    """The numbers of a pretraining run. Defaults are for the laptop; LLaVA's own values stand in brackets.

    Attributes:
        epochs: passes over the texts (1).
        batch_size: texts a step, in each process (128 over all GPUs).
        accumulate: batches whose gradients are added up before a step.
        lr: the peak of AdamW's learning rate, reached after `warmup` and lowered along a cosine (2e-3).
        weight_decay: AdamW's (0).
        warmup: share of the steps in which the learning rate rises (0.03).
        schedule: of alpha, see `alpha_at`.
        ramp: share of the steps in which alpha rises.
        alpha_end: where alpha ends; under 1, CLIP would still be needed on the client.
        language_weight: of the language-model loss; 0 leaves plain feature distillation (with `feature_weight`).
        feature_weight: of the optional feature term, 1 - cosine of the two projected tokens.
        max_answer_tokens: longer answers are cut.
        augment: crops and flips for the compact model's view; CLIP always sees the whole picture.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast) for the trained part.
        compile: `torch.compile` for the trained part.
        gradient_checkpointing: keep one tensor a layer of the LLM and compute the rest again: less memory, more time.
        checkpoint_every: steps between checkpoints, where a folder is given.
        seed: of batches, augmentation and the new projection.
    """

    epochs: int = 8
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    schedule: str = "linear"
    ramp: float = 0.2
    alpha_end: float = 1.0
    language_weight: float = 1.0
    feature_weight: float = 0.0
    max_answer_tokens: int = 128
    augment: bool = True
    precision: str = "float32"
    compile: bool = False
    gradient_checkpointing: bool = False
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(self, "epochs", "batch_size", "accumulate", "max_answer_tokens", "checkpoint_every")
        check_choice(self, schedule=SCHEDULES, precision=PRECISIONS)
        for name, low, high in (("lr", 0, math.inf), ("ramp", 0, 1), ("alpha_end", 0, 1)):
            if not low < getattr(self, name) <= high:
                raise ValueError(f"{name} must be above {low} and at most {high}; got {getattr(self, name)}")
        for name in ("language_weight", "feature_weight", "weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        if not self.language_weight + self.feature_weight:
            raise ValueError("language_weight and feature_weight are both 0: there is nothing to learn from")
        if self.alpha_end < 1:
            warnings.warn(
                f"alpha ends at {self.alpha_end}, not at 1: CLIP would still be needed on the client", stacklevel=3
            )

    def alpha(self, step: int, steps: int) -> float:
        """The weight of the compact model in a step."""
        return alpha_at(step, steps, self.schedule, self.ramp, self.alpha_end)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate in a step: a line up, half a cosine down."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


@dataclass(frozen=True)
class Pretrained:
    """What a run leaves.

    Attributes:
        model: the compact model g, ready for the clients.
        projection: the state of P_s.
        history: one record a step: step, alpha, loss, gradient norm into g, and the loss's parts.
        seconds: spent in steps, by this process and those before it.
    """

    model: CompactModel
    projection: dict[str, Tensor]
    history: list[dict]
    seconds: float


def pretrain(
    model: CompactModel,
    mllm: MllmTeacher,
    views: Views,
    texts: Texts,
    settings: PretrainSettings | None = None,
    *,
    folder: str | Path | None = None,
    device: str = "auto",
    label: str = "pretraining",
) -> Pretrained:
    """Dynamic Weighted Pretraining from the weights of `model`, which is not changed.

    Under ``accelerate launch`` or ``torchrun`` every process takes its own share of each batch, and all must call this
    with the same arguments and ``device="auto"`` (each its own GPU) or ``"cpu"``. The first one writes the checkpoints;
    files that the caller writes are the caller's own care (see `pipeline.stage_one`). A run goes on with as many
    processes as it was begun with.

    Args:
        model: the compact model.
        mllm: the frozen LLaVA.
        views: the pictures.
        texts: what was said of them.
        settings: the numbers.
        folder: keep a checkpoint here, and go on from it if it is there.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        label: a name for the progress bar.

    Raises:
        PretrainError: too few texts for a batch, or a text about an image that `views` lack.
        ValueError: the compact model's feature map does not fit the token grid.
        PretrainDiverged: the loss is not finite; the batch's image ids are saved in the folder.
        CheckpointError: the folder is another run's, damaged, in use or not writable.
    """
    run = _Run(model, mllm, views, texts, settings or PretrainSettings(), pick_device(device), label)
    if folder is None:
        return run.go(None, None)
    kept = RunFolder(folder, run.identity())
    if not run.accelerator.is_main_process:
        return run.go(kept.load(), None)  # all go on from the checkpoint, one writes it
    with kept:
        return run.go(kept.load(), kept)


class _Run:
    def __init__(self, model, mllm, views, texts, settings, device, label):
        from accelerate import Accelerator

        self.mllm, self.views, self.texts, self.settings, self.label = mllm, views, texts, settings, label
        self.given = model
        if len(texts) and texts.image.max() >= len(views):
            raise PretrainError(f"a text is about image {texts.image.max()}, but there are only {len(views)} images")
        self.accelerator = Accelerator(cpu=device.type == "cpu", gradient_accumulation_steps=settings.accumulate)
        processes = self.accelerator.num_processes
        per_epoch = len(texts.batches(settings.batch_size * processes, settings.seed, 0))
        if not per_epoch:
            raise PretrainError(
                f"{len(texts)} texts do not fill one batch of {settings.batch_size * processes}; lower batch_size"
            )
        self.steps = settings.epochs * per_epoch // settings.accumulate
        self.encoder = new_encoder(model, mllm, views, texts, settings.seed, device)
        self.reader = FrozenReader(mllm, settings.gradient_checkpointing)
        self.history: list[dict] = []
        self.seconds = 0.0

    def identity(self) -> dict:
        """What makes two runs the same run."""
        digest = hashlib.sha256(repr((self.texts.image.tolist(), self.texts.kind.tolist())).encode())
        digest.update(repr((self.texts.questions, self.texts.answers)).encode())
        numbers = {k: v for k, v in asdict(self.settings).items() if k not in ("checkpoint_every", "compile")}
        processes = self.accelerator.num_processes  # each adds its own share to a batch
        return {
            **numbers,
            **({"processes": processes} if processes > 1 else {}),
            "mllm": self.mllm.identity,
            "images": self.views.identity,
            "texts": digest.hexdigest(),
            "initial_weights": sha256_arrays(t.cpu().numpy() for t in self.given.state_dict().values()),
        }

    def go(self, found: tuple | None, folder: RunFolder | None) -> Pretrained:
        """From a checkpoint, or from the start, to the end."""
        settings = self.settings
        trained = list(self._trained().values())
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
        if found:
            self._restore(found, optimizer)
        trained, optimizer = self.accelerator.prepare(self.encoder, optimizer)
        if settings.compile:
            trained = torch.compile(trained)
        trained.train()
        started, before = time.perf_counter(), self.seconds
        with progress_bar(self.steps, "steps", self.label, done=len(self.history)) as bar:
            for batches in self._batches_from(len(self.history)):
                self._step(trained, optimizer, batches, folder)
                self.seconds = before + time.perf_counter() - started
                bar.set_postfix_str(f"alpha {self.history[-1]['alpha']:.2f}, loss {self.history[-1]['loss']:.3f}")
                bar.update()
                step = len(self.history)
                if folder and (step % settings.checkpoint_every == 0 or step == self.steps):
                    self._save(folder, optimizer)
        model, projection = self.encoder.model.cpu().eval(), self.encoder.projection.cpu().state_dict()
        model.head.requires_grad_(True)
        return Pretrained(model, projection, self.history, self.seconds)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.encoder.named_parameters() if p.requires_grad}

    def _batches_from(self, done: int):
        """For each step its batches of row numbers, this process's share of them."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        step, waiting = 0, []
        for epoch in range(self.settings.epochs):
            for rows in self.texts.batches(self.settings.batch_size * processes, self.settings.seed, epoch):
                waiting.append(rows[rank::processes])
                if len(waiting) == self.settings.accumulate:
                    if step >= done:
                        yield waiting
                    step, waiting = step + 1, []

    def _step(self, trained, optimizer, batches: list[np.ndarray], folder: RunFolder | None) -> None:
        settings, step = self.settings, len(self.history)
        alpha = settings.alpha(step, self.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step, self.steps)
        record = {"step": step, "alpha": round(alpha, 6), "loss": 0.0}
        for number, rows in enumerate(batches):
            generator = torch_generator(settings.seed, "views", step, number, self.accelerator.process_index)
            with self.accelerator.accumulate(trained):
                loss, parts = self._loss(trained, alpha, rows, generator)
                if not math.isfinite(loss.item()):
                    raise self._diverged(step, rows, folder)
                self.accelerator.backward(loss)
                record["loss"] += loss.item() / len(batches)
                for name, value in parts.items():
                    record[name] = record.get(name, 0.0) + value / len(batches)
        record["gradient"] = _gradient_norm(self.encoder.model)
        nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        self.history.append(record)

    def _loss(self, trained, alpha: float, rows: np.ndarray, generator) -> tuple[Tensor, dict[str, float]]:
        settings, images = self.settings, self.texts.image[rows]
        device = self.accelerator.device
        ids, labels = (t.to(device) for t in self.texts.tokens(rows, settings.max_answer_tokens))
        needed = alpha < 1 or settings.feature_weight > 0
        tokens = self.views.tokens(images) if needed else None
        x = self.views.compact(images, generator if settings.augment else None)
        with torch.autocast(device.type, PRECISIONS[settings.precision], enabled=settings.precision != "float32"):
            return mixed_loss(trained, self.reader, alpha, x, tokens, ids, labels, settings)

    def _diverged(self, step: int, rows: np.ndarray, folder: RunFolder | None) -> PretrainDiverged:
        ids = [self.texts.ids[i] for i in self.texts.image[rows]]
        saved = folder.path / "bad_batch.json" if folder else None
        if saved:
            write_json(saved, {"step": step, "images": ids, "texts": rows.tolist()})
        return PretrainDiverged(step, ids, saved)

    def _save(self, folder: RunFolder, optimizer) -> None:
        names = list(self._trained())
        moments = {
            f"optimizer.{names[i]}.{key}": value.float().cpu()
            for i, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }
        weights = {f"encoder.{name}": tensor.cpu() for name, tensor in self.encoder.state_dict().items()}
        record = {"history": self.history, "seconds": round(self.seconds, 3), "steps": self.steps}
        folder.save(len(self.history), {**weights, **moments}, record)

    def _restore(self, found, optimizer) -> None:
        _, tensors, record = found
        self.encoder.load_state_dict(_within(tensors, "encoder."))
        state = optimizer.state_dict()
        for i, name in enumerate(self._trained()):
            state["state"][i] = _within(tensors, f"optimizer.{name}.")
        optimizer.load_state_dict(state)
        self.history, self.seconds = record["history"], record["seconds"]


def _within(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _gradient_norm(module: nn.Module) -> float:
    """The length of the gradient of all of a module's parameters together."""
    squares = [p.grad.float().square().sum() for p in module.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item() if squares else 0.0
