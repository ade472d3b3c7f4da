"""The training loop of all stand-ins: AdamW, batches with a fixed share of CIFAR-10."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mllmfl_lite.repro import numpy_generator, progress_bar, stable_seed

Watch = Callable[[int, float], None]  # called with (step, loss) after each step


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `samples` images in batches of `batch`; AdamW, warm-up over 5 %, then a line to zero."""

    samples: int
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05

    @property
    def steps(self) -> int:
        """Batches in all."""
        return self.samples // self.batch

    def optimizer(self, parameters: Iterable[nn.Parameter]):
        """AdamW and its learning-rate schedule; vectors (norms, biases) do not decay."""
        parameters = [p for p in parameters if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        warm = max(1, self.steps // 20)
        factor = lambda step: min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))  # noqa: E731
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def draw_batches(labels: np.ndarray, main_share: float, schedule: Schedule, seed: int) -> Iterator[Tensor]:
    """Draw index batches, int64 (B,): `main_share` of each from labels 0-9."""
    rng = numpy_generator(seed, "batches")
    main, other = np.flatnonzero(labels < 10), np.flatnonzero(labels >= 10)
    cut = round(schedule.batch * main_share) if len(other) else schedule.batch
    streams = [(_forever(part, rng), size) for part, size in ((main, cut), (other, schedule.batch - cut)) if size]
    for _ in range(schedule.steps):
        yield torch.from_numpy(np.array([next(stream) for stream, size in streams for _ in range(size)]))


def _forever(indices: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(indices)


def fit(
    loss_of: Callable[[int, Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    batches: Iterable[Tensor],
    schedule: Schedule,
    label: str,
    clipped: Iterable[nn.Parameter] = (),
    watch: Watch | None = None,
) -> list[float]:
    """Train parameters in place; return the loss of every step.

    Args:
        loss_of: (step, batch) -> loss.
        parameters: those that learn.
        batches: from `draw_batches`.
        schedule: samples, batch, learning rate.
        label: of the progress bar.
        clipped: parameters whose gradient is cut at norm 1.
        watch: sees each step.
    """
    (optimizer, rate), clipped, losses = schedule.optimizer(parameters), list(clipped), []
    with progress_bar(schedule.samples, "images", label) as bar:
        for step, batch in enumerate(batches):
            loss = loss_of(step, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(clipped, 1.0)
            optimizer.step()
            rate.step()
            losses.append(loss.item())
            bar.update(len(batch))
            if watch:
                watch(step, losses[-1])
    return losses


@contextlib.contextmanager
def initial_weights(seed: int) -> Iterator[None]:
    """Draw initial weights from the seed; torch's global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "initial weights"))
        yield
