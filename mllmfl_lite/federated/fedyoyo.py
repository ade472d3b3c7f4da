"""FedYoYo: each client is its own teacher, from a weak view of an image to a strong one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize, softmax

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.strong import strong_views
from mllmfl_lite.federated.aggregate import State
from mllmfl_lite.federated.methods import FedAvg
from mllmfl_lite.models import CompactModel

SMALLEST = 1e-8  # of a class's share, so that its logarithm is finite
LARGEST = 1e6  # effective images of a class that a client may report
PART = 500  # images whose features are computed at a time


def effective_numbers(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How many different images of each class there are: (C,), between 1 and their number; 0 for none.

    ``1 / mean cosine`` over all pairs of a class's features (n, D), each image with itself included, after the mean of
    all features was subtracted. Equal images count as one; images at right angles count each.
    """
    directions = normalize(features - features.mean(0), dim=1)
    found = features.new_zeros(num_classes)
    for c in labels.unique().tolist():
        own = directions[labels == c]
        mean_cosine = own.mean(0).square().sum()
        found[c] = (1 / mean_cosine.clamp(min=1 / len(own))).clamp(min=1)
    return found


@dataclass(frozen=True)
class FedYoYo(FedAvg):
    """Self-distillation and logit adjustment on the client (Yan et al., ICCV 2025); the server only averages.

    Each image has a weak view (crop, flip) and a strong one. Both views' logits gain ``tau * log(prior)``; the loss is
    cross-entropy on both, and ``weight * KL(softmax(weak / T), fixed || softmax(strong / T))`` on images that the weak
    view gets right. `weight` rises in equal steps over the first `rising` rounds. The prior starts a round as the
    server's and moves by `mix` towards the client's own class shares at every batch. The server's prior moves by `mix`
    a round towards the sum of the drawn clients' `effective_numbers`, which they upload.

    Our reading: the weak view has no rotation, the effective numbers are bounded, shares are at least 1e-8.
    """

    strong_views = True
    tau: float = 1.5
    temperature: float = 1.5  #: T
    weight: float = 4.0  #: of the distillation, at its end
    rising: int = 50  #: rounds
    mix: float = 0.1

    def init_server_state(self, parameters: State, generator: torch.Generator) -> State:
        """The prior: equal shares."""
        bias = parameters["head.bias"]
        return {"prior": torch.full_like(bias, 1 / len(bias))}

    def broadcast(self, server_state: State) -> State:
        """The prior."""
        return server_state

    @torch.no_grad()
    def upload(
        self, model: CompactModel, batches: Batches, indices: Tensor, received: State, generator: torch.Generator
    ) -> State:
        """`effective` (C,), the effective number of each class's images."""
        model.eval()
        features = torch.cat([model.features(batches.plain(part)) for part in indices.split(PART)])
        return {"effective": effective_numbers(features, batches.labels[indices], model.head.out_features)}

    def check_upload(self, extra: State, state: State) -> None:
        """Require one possible number a class."""
        bias, found = state["head.bias"], {name: (t.shape, t.dtype) for name, t in extra.items()}
        if found != {"effective": (bias.shape, bias.dtype)}:
            raise ValueError(f"effective must be {bias.dtype} {tuple(bias.shape)}; it sent {sorted(extra)[:3]}")
        sent = extra["effective"]
        if not (sent.min() >= 0 and 0 < sent.max() <= LARGEST):
            raise ValueError(f"its effective numbers are impossible, from {sent.min():.3g} to {sent.max():.3g}")

    def for_client(  # type: ignore[override]  # `views` and `local_loss` are all that is asked of it
        self, batches: Batches, indices: Tensor, received: State, round_: int
    ) -> _YoYoClient:
        """The loss with this client's class shares."""
        counts = torch.bincount(batches.labels[indices], minlength=len(received["prior"]))
        return _YoYoClient(self, received["prior"], counts / counts.sum(), self.weight * min(1.0, round_ / self.rising))

    def server_update(
        self, state: State, mean: State, server_state: State, uploads: list[State], generator: torch.Generator
    ) -> tuple[State, State]:
        """Keep the mean; move the prior."""
        seen = torch.stack([sent["effective"] for sent in uploads]).sum(0)
        prior = (1 - self.mix) * server_state["prior"] + self.mix * seen / seen.sum()
        return mean, {"prior": prior}


class _YoYoClient:
    """One client's round: its prior moves at every batch."""

    def __init__(self, method: FedYoYo, prior: Tensor, own: Tensor, weight: float):
        self.method, self.prior, self.own, self.weight = method, prior, own, weight

    def views(
        self, batches: Batches, parts: list[Tensor], generator: torch.Generator, augment: str
    ) -> Iterator[Tensor]:
        """Both views (2, B, 3, H, W) of each batch; `augment` changes nothing."""
        for part in parts:
            yield torch.stack([batches.augmented(part, generator), strong_views(batches, part, generator)])

    def local_loss(self, model: CompactModel, x: Tensor, y: Tensor, rows: Tensor, anchor: State) -> Tensor:
        """Cross-entropy of both views, and the distillation."""
        method = self.method
        self.prior = (1 - method.mix) * self.prior + method.mix * self.own
        logits = model(x.flatten(0, 1)) + method.tau * self.prior.clamp(min=SMALLEST).log()
        weak, strong = logits.float().chunk(2)
        loss = cross_entropy(weak, y) + cross_entropy(strong, y)
        return loss + self.weight * self_distillation(weak, strong, y, method.temperature)


def self_distillation(weak: Tensor, strong: Tensor, y: Tensor, temperature: float) -> Tensor:
    """``KL(softmax(weak / T), fixed || softmax(strong / T))``, mean over images that `weak` gets right; 0 for none."""
    right = weak.argmax(1) == y
    if not right.any():
        return 0 * strong.sum()
    target = softmax(weak[right].detach() / temperature, 1)
    return kl_div(log_softmax(strong[right] / temperature, 1), target, reduction="batchmean")
