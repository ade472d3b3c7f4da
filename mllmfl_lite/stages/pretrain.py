"""Stage 1b, pretraining: train the compact model and its projection on annotations, by `mixture`."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mllmfl_lite.checkpoint import RunFolder
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import (
    PRECISIONS,
    Execution,
    pick_device,
    progress_bar,
    sha256_arrays,
    torch_generator,
    write_json,
)
from mllmfl_lite.stages.mixture import FrozenReader, TextBatch, mixed_loss, new_encoder
from mllmfl_lite.stages.pretrain_settings import PretrainSettings
from mllmfl_lite.stages.texts import Texts
from mllmfl_lite.stages.views import Views
from mllmfl_lite.teachers.llava import MllmTeacher


@dataclass(frozen=True)
class Pretrained:
    """What a run returns.

    Attributes:
        model: the compact model g, ready for the clients.
        projection: the state of P_s.
        history: one record a step: step, alpha, loss, its parts, gradient norm of g.
        seconds: spent in steps, over all restarts.
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
    seed: int = 0,
    execution: Execution | None = None,
) -> Pretrained:
    """Pretrain from the weights of `model`, which is not changed.

    Under ``accelerate launch`` or ``torchrun`` each process takes its share of every batch; all call this with the same
    arguments, and the first one writes checkpoints. A run resumes with as many processes as it began with.

    Args:
        model: the compact model.
        mllm: the frozen LLaVA.
        views: the images.
        texts: their annotations.
        settings: the numbers.
        seed: of batches, augmentation and the projection.
        execution: with a folder, checkpoints are saved there, and the run resumes.

    Raises:
        ValueError: parts that do not fit; or a loss that is not finite: the batch's image ids are saved in the folder.
        CheckpointError: the folder belongs to another run, is damaged, in use or not writable.
    """
    execution = execution or Execution(device="cpu")
    run = _Run((model, mllm, views, texts), settings or PretrainSettings(), seed, execution)
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
        if len(self.texts) and self.texts.image.max() >= len(self.views):
            raise ValueError(
                f"a text is about image {self.texts.image.max()}, but there are only {len(self.views)} images"
            )
        device = pick_device(execution.device)
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        size = settings.batch_size * self.accelerator.num_processes
        per_epoch = len(self._epoch(0))
        if not per_epoch:
            raise ValueError(f"{len(self.texts)} texts do not fill one batch of {size}; lower batch_size")
        self.steps = settings.epochs * per_epoch
        self.encoder = new_encoder(self.initial, self.mllm, self.views, self.texts, seed, device)
        self.reader = FrozenReader(self.mllm, settings.gradient_checkpointing)
        self.history: list[dict] = []
        self.seconds = 0.0

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        size = self.settings.batch_size * self.accelerator.num_processes
        return self.texts.batches(size, self.seed, epoch, self.settings.order == "length")

    def identity(self) -> dict:
        """What two runs must share to be the same run."""
        digest = hashlib.sha256(repr((self.texts.image.tolist(), self.texts.kind.tolist())).encode())
        digest.update(repr((self.texts.questions, self.texts.answers)).encode())
        numbers = {k: v for k, v in asdict(self.settings).items() if k != "checkpoint_every"}  # type: ignore[call-overload]
        return {
            **numbers,
            "seed": self.seed,
            "processes": self.accelerator.num_processes,  # each adds its share to a batch
            "mllm": self.mllm.identity,
            "images": self.views.identity,
            "texts": digest.hexdigest(),
            "initial_weights": sha256_arrays(t.cpu().numpy() for t in self.initial.state_dict().values()),
        }

    def go(self, found: tuple | None, folder: RunFolder | None) -> Pretrained:
        settings = self.settings
        weights = list(self._trained().values())
        optimizer = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=settings.weight_decay)
        if found:
            self._restore(found, optimizer)
        trained, optimizer = self.accelerator.prepare(self.encoder, optimizer)
        trained.train()
        started, before = time.perf_counter(), self.seconds
        with progress_bar(self.steps, "steps", self.label, done=len(self.history)) as bar:
            for rows in self._batches_from(len(self.history)):
                self._step(trained, optimizer, rows, folder)
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

    def _batches_from(self, done: int) -> Iterator[np.ndarray]:
        """Row numbers of this process for each step from number `done` on."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        step = 0
        for epoch in range(self.settings.epochs):
            for rows in self._epoch(epoch):
                if step >= done:
                    yield rows[rank::processes]
                step += 1

    def _step(self, trained: nn.Module, optimizer, rows: np.ndarray, folder: RunFolder | None) -> None:
        step = len(self.history)
        alpha = self.settings.alpha(step, self.steps)
        for group in optimizer.param_groups:
            group["lr"] = self.settings.rate(step, self.steps)
        generator = torch_generator(self.seed, "views", step, 0, self.accelerator.process_index)
        loss, parts = self._loss(trained, alpha, rows, generator)
        if not math.isfinite(loss.item()):
            raise self._diverged(step, rows, folder)
        self.accelerator.backward(loss)
        gradient = _gradient_norm(self.encoder.model)
        nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        self.history.append(
            {"step": step, "alpha": round(alpha, 6), "loss": loss.item(), **parts, "gradient": gradient}
        )

    def _loss(self, trained: nn.Module, alpha: float, rows: np.ndarray, generator) -> tuple[Tensor, dict[str, float]]:
        settings, images, device = self.settings, self.texts.image[rows], self.accelerator.device
        ids, labels = (t.to(device) for t in self.texts.tokens(rows, settings.max_answer_tokens))
        tokens = self.views.tokens(images) if alpha < 1 or settings.feature_weight > 0 else None
        batch = TextBatch(self.views.compact(images, generator if settings.augment else None), tokens, ids, labels)
        with torch.autocast(device.type, PRECISIONS[settings.precision], enabled=settings.precision != "float32"):
            return mixed_loss(trained, self.reader, alpha, batch, settings.language_weight, settings.feature_weight)

    def _diverged(self, step: int, rows: np.ndarray, folder: RunFolder | None) -> ValueError:
        ids = [self.texts.ids[i] for i in self.texts.image[rows]]
        where = f"its images: {', '.join(ids[:8])}"
        if folder:
            write_json(folder.path / "bad_batch.json", {"step": step, "images": ids, "texts": rows.tolist()})
            where = f"its images are listed in {folder.path / 'bad_batch.json'}"
        return ValueError(
            f"the loss of step {step} is not finite; {where}. Look at them, lower lr, or use float32. Weights were not "
            "changed by this batch; the checkpoint before it is good"
        )

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

    def _restore(self, found: tuple, optimizer) -> None:
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
    """Norm of the gradient of all parameters together."""
    squares = [p.grad.float().square().sum() for p in module.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item() if squares else 0.0
