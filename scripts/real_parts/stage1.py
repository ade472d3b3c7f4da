"""Stage 1 on real parts: one loop for every condition, on the same images, crops and steps; only the target differs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from mllmfl_lite.checkpoint import RunFolder, optimizer_tensors, restore_optimizer, within
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import progress_bar, stable_seed, torch_generator
from mllmfl_lite.stages.mixture import FrozenReader, TextBatch, mixed_loss, new_encoder
from mllmfl_lite.stages.pretrain import PretrainSettings
from mllmfl_lite.stages.texts import Texts, Views
from mllmfl_lite.teachers.llava import MllmTeacher
from real_parts.reading import random_batches, see


@dataclass(frozen=True)
class Condition:
    """What the compact model learns from."""

    words: bool = False  # texts, through the frozen reader
    features: bool = False  # the encoder's pooled features, cosine distance
    choices: bool = False  # the encoder's first ImageNet class, cross-entropy
    shuffled: bool = False  # each picture gets another picture's texts
    ramp: float = 0.0  # share of the steps in which alpha rises from 0 to 1; 0: alpha is 1
    longer: float = 1.0  # steps, as a multiple of the usual number


CONDITIONS = {
    "words": Condition(words=True),
    "features": Condition(features=True),
    "choices": Condition(choices=True),
    "words_ramp": Condition(words=True, ramp=0.2),
    "shuffled": Condition(words=True, shuffled=True),
    "words_features": Condition(words=True, features=True),
    "words_ramp_longer": Condition(words=True, ramp=0.2, longer=1.25),
}
EVALUATED = (0, 500, 1500, 2500, 4000, 6000)  # steps; the last step is added
KEEP = 250  # steps between checkpoints
OUTPUTS = 1000  # ImageNet classes


@dataclass(frozen=True)
class Targets:
    """What one pool's images are learned from: texts, features (N, D), first choices (N,)."""

    views: Views
    texts: Texts
    features: Tensor
    choices: Tensor


class Learner(nn.Module):
    """The compact model with all that is thrown away afterwards: the projection, and linear layers to the targets."""

    def __init__(self, model: CompactModel, condition: Condition, teacher: MllmTeacher, data: Targets, seed: int):
        super().__init__()
        self.condition, self.reader = condition, FrozenReader(teacher)
        self.compact = new_encoder(model, teacher, data.views, data.texts, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(seed, "targets"))
            self.to_features = nn.Linear(model.num_features, data.features.shape[1])
            self.to_choices = nn.Linear(model.num_features, OUTPUTS)

    def loss(self, data: Targets, rows: np.ndarray, alpha: float, generator: torch.Generator | None) -> Tensor:
        """Of a batch of texts' rows: nats a token, cosine distance, nats, or a sum of these."""
        images, total = data.texts.image[rows], torch.zeros(())
        x = data.views.compact(images, generator)
        if self.condition.words:
            tokens = data.views.tokens(images).float() if alpha < 1 else None
            batch = TextBatch(x, tokens, *data.texts.tokens(rows, 128))
            total = total + mixed_loss(self.compact, self.reader, alpha, batch)[0]
        for name in ("features", "choices"):
            if getattr(self.condition, name):
                total = total + self.distances(name, x, data, images).mean()
        return total

    def distances(self, name: str, x: Tensor, data: Targets, images: np.ndarray) -> Tensor:
        """From the targets of those images: (B,)."""
        given = self.compact.model.features(x)
        if name == "features":
            return 1 - cosine_similarity(self.to_features(given), data.features[images], dim=1)
        return cross_entropy(self.to_choices(given), data.choices[images], reduction="none")

    @torch.inference_mode()
    def held_out(self, data: Targets) -> dict[str, dict[str, float]]:
        """Each part of the loss on held-out images at alpha 1: with their own target, and with another picture's."""
        self.eval()
        found, images = {}, np.unique(data.texts.image)
        if self.condition.words:
            found["words"] = see(self.reader, data.texts, lambda i: self.compact(data.views.compact(i, None)))
        for name in ("features", "choices"):
            if getattr(self.condition, name):
                x, other = data.views.compact(images, None), np.roll(images, 1)
                found[name] = {
                    "right": self.distances(name, x, data, images).mean().item(),
                    "other": self.distances(name, x, data, other).mean().item(),
                }
        self.train()
        return found


def train_stage1(
    learner: Learner, data: Targets, settings: PretrainSettings, steps: int, seed: int, folder: RunFolder, watch
) -> list[dict]:
    """Train in place from the folder's checkpoint, if there is one; return a record for each evaluated step.

    `watch(step)` returns what is recorded at the steps `EVALUATED` and at the end. All chance depends on seed and step.
    """
    weights = [p for p in learner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=settings.weight_decay)
    batches = random_batches(data.texts, settings.batch_size, steps, seed)
    done, history, recent = _restore(folder, learner, optimizer)
    learner.train()
    with progress_bar(steps, "steps", "stage 1", done) as bar:
        for step in range(done, steps + 1):
            if (step in EVALUATED or step == steps) and step not in [record["step"] for record in history]:
                training = sum(recent) / len(recent) if recent else None
                history.append({"step": step, "training_loss": training, **watch(step)})
                recent = []
            if step > done and (step % KEEP == 0 or step == steps):
                _save(folder, step, learner, optimizer, {"history": history, "recent": recent})
            if step < steps:
                recent.append(_step(learner, data, settings, optimizer, (step, steps, seed, batches[step])))
                bar.update()
    return history


def _step(learner: Learner, data: Targets, settings: PretrainSettings, optimizer, at: tuple) -> float:
    step, steps, seed, rows = at
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(step, steps)
    generator = torch_generator(seed, "augmentation", step)
    loss = learner.loss(data, rows, settings.alpha(step, steps), generator)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()} in step {step}; lower the learning rate, {settings.lr}")
    return loss.item()


def _save(folder: RunFolder, step: int, learner: Learner, optimizer, record: dict) -> None:
    tensors = {f"learner.{name}": t for name, t in learner.state_dict().items()}
    folder.save(step, tensors | optimizer_tensors(optimizer), record)


def _restore(folder: RunFolder, learner: Learner, optimizer) -> tuple[int, list[dict], list[float]]:
    """The step to go on with, the records so far, the losses since the last of them."""
    found = folder.load()
    if not found:
        return 0, [], []
    step, tensors, record = found
    learner.load_state_dict(within(tensors, "learner."))
    restore_optimizer(optimizer, tensors)
    return step, record["history"], record["recent"]


def settings_of(condition: Condition) -> PretrainSettings:
    """Batches of 16, AdamW 2e-3, cosine; alpha by the condition."""
    alpha = {"schedule": "linear", "ramp": condition.ramp} if condition.ramp else {"schedule": "constant"}
    return PretrainSettings(order="random", **alpha)


def weights_path(folder: Path, name: str, seed: int) -> Path:
    """Where the compact model of a condition and seed is kept."""
    return folder / "weights" / f"{name}_seed{seed}.safetensors"
