"""Train a reader with its projector on tokens and texts, and the gate: does it see, or does it guess?"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from standins.training import Schedule, fit
from torch import Tensor

from mllmfl_lite.stages.mixture import FrozenReader
from mllmfl_lite.stages.texts import Texts
from real_parts.reader import Reader

STEPS = Schedule(800 * 32, batch=32, lr=2e-3)
GATE = 0.2  # nats a token
LONGEST = 64  # tokens of an answer
Visual = Callable[[np.ndarray], Tensor]  # numbers of images -> visual tokens (B, P, H)


def random_batches(texts: Texts, size: int, steps: int, seed: int) -> list[np.ndarray]:
    """Rows of the first `steps` batches, epoch after epoch, each of one kind, in random order."""
    batches: list[np.ndarray] = []
    for epoch in range(steps):
        batches += texts.batches(size, seed, epoch, by_length=False)
        if len(batches) >= steps or not batches:
            break
    if not batches:
        raise ValueError(f"{len(texts)} texts do not fill one batch of {size}; give more texts")
    return batches[:steps]


def train_reader(
    reader: Reader, tokens: np.ndarray, texts: Texts, schedule: Schedule = STEPS, seed: int = 0, watch=None
) -> list[float]:
    """Train all weights that ask for a gradient, in place; return the loss of every step."""
    answer = FrozenReader(SimpleNamespace(model=reader))
    project = reader.model.multi_modal_projector

    def loss_of(step: int, rows: np.ndarray) -> Tensor:
        visual = project(torch.from_numpy(tokens[texts.image[rows]]).float())
        return answer.loss(visual, *texts.tokens(rows, LONGEST))

    weights = [p for p in reader.parameters() if p.requires_grad]
    rows = random_batches(texts, schedule.batch, schedule.steps, seed)
    return fit(loss_of, weights, rows, schedule, "reader", weights, watch)


@torch.inference_mode()
def reading_loss(answer: FrozenReader, texts: Texts, visual_of: Visual, size: int = 32) -> float:
    """Mean negative log-likelihood of the texts' tokens, in nats; `visual_of` gives the visual tokens of images."""
    total, count = 0.0, 0
    for kind in np.unique(texts.kind):
        rows = np.flatnonzero(texts.kind == kind)
        for part in np.split(rows, range(size, len(rows), size)):
            ids, labels = texts.tokens(part, LONGEST)
            tokens = int((labels[:, 1:] != -100).sum())
            total += tokens * answer.loss(visual_of(texts.image[part]), ids, labels).item()
            count += tokens
    return total / count


def see(answer: FrozenReader, texts: Texts, visual_of: Visual) -> dict[str, float]:
    """The loss with each text's own picture and with another one's, in nats a token."""
    return {
        "right": reading_loss(answer, texts, visual_of),
        "other": reading_loss(answer, texts.shuffled(0), visual_of),
    }


def gate(reader: Reader, tokens: np.ndarray, texts: Texts) -> dict[str, float]:
    """`see` of the reader's own projector on held-out images; `ValueError` if it is blind."""
    answer = FrozenReader(SimpleNamespace(model=reader))
    losses = see(answer, texts, lambda images: answer.project(torch.from_numpy(tokens[images])))
    require_sight(losses)
    return losses


def require_sight(losses: dict[str, float]) -> None:
    """Raise `ValueError` unless the right picture's loss is `GATE` nats a token under another picture's."""
    gap = losses["other"] - losses["right"]
    if not gap >= GATE:
        raise ValueError(
            f"the reader is blind: with the right picture {losses['right']:.3f} nats a token, with another "
            f"{losses['other']:.3f}; it must be {GATE} less. Train it longer or on more texts; stage 1 stops here"
        )
