"""CReFF: classifier re-training with federated features, a baseline that retrains the last layer on the server."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, one_hot, softmax

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.federated.methods import FedAvg, State
from mllmfl_lite.models import CompactModel

MATCHED = 2**27  # gradient entries in memory at once on the server: 4 bytes each, about six copies
LARGEST_GRADIENT = 1e4  # that a client may send: such features do not come out of BatchNorm
HEAD = ("head.weight", "head.bias")


def head_gradients(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The gradient of mean cross-entropy in a linear head, in closed form: ``(softmax(W f + b) - y) [f, 1]^T``.

    Features (..., n, D), labels (..., n), weight (C, D) and bias (C,) give (..., C, D + 1), the bias's in the last
    column; dimensions in front are separate groups.
    """
    error = softmax(features @ weight.T + bias, -1) - one_hot(labels, len(weight))
    with_one = torch.cat([features, features.new_ones(*features.shape[:-1], 1)], -1)
    return error.transpose(-1, -2) @ with_one / features.shape[-2]


def strongly_augmented(batches: Batches, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Random crop, flip, brightness, contrast and a blank square of half the side; each image draws its own.

    CReFF's code augments strongly before it takes gradients; which changes and how strong is our reading.
    """
    x, count = batches.augmented(rows, generator), len(rows)
    light, contrast = (torch.rand(2, count, 1, 1, 1, generator=generator) - 0.5).to(x)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (1 + contrast) + mean + light
    height, width = x.shape[2:]
    centres = torch.rand(2, count, generator=generator) * torch.tensor([[height], [width]])
    down, right = centres.long().to(x.device)[:, :, None]
    blank_rows = (torch.arange(height, device=x.device) - down).abs() < height // 4  # (B, H)
    blank_columns = (torch.arange(width, device=x.device) - right).abs() < width // 4  # (B, W)
    return x.masked_fill(blank_rows[:, None, :, None] & blank_columns[:, None, None, :], 0.0)


@dataclass(frozen=True)
class CReFF(FedAvg):
    """Classifier re-training with federated features (Shang et al., 2022).

    Each round a client also sends the mean gradient of the head on its own features, for each class that it holds. The
    server optimises synthetic features until they give the same gradients, and trains a fresh head on them, with equal
    numbers a class. The averaged body with that head is tested; the averaged model with its own head goes on.

    Our reading: gradients are taken in evaluation mode, at the last round's retrained head; the mean over clients is
    not weighted; a class that no drawn client holds keeps its synthetic features.
    """

    per_class: int = 100  #: S, synthetic features a class
    match_steps: int = 100  #: steps of plain gradient descent on the synthetic features each round
    match_lr: float = 0.1  #: step size of this descent
    head_epochs: int = 300  #: passes over the synthetic features when the head is trained
    head_lr: float = 0.01  #: its step size
    head_batch: int = 32  #: features a step
    repeats: int = 10  #: augmented views over which a client averages a class's gradient
    images: int = 32  #: at most so many images of a class a repeat

    def broadcast(self, server_state: State) -> State:
        """The retrained head, at which gradients are taken."""
        return {name: server_state[name] for name in HEAD}

    @torch.no_grad()
    def upload(
        self, model: CompactModel, batches: Batches, indices: Tensor, received: State, generator: torch.Generator
    ) -> State:
        """`classes` (k,), the classes that the client holds, and `gradients` (k, C, D + 1)."""
        model.eval()
        head, labels = [received[name] for name in HEAD], batches.labels[indices]
        classes = labels.unique()

        def gradient(rows: Tensor) -> Tensor:
            some = rows[torch.randperm(len(rows), generator=generator)[: self.images].to(rows.device)]
            features = model.features(strongly_augmented(batches, some, generator))
            return head_gradients(features, batches.labels[some], *head)

        views = [torch.stack([gradient(indices[labels == c]) for _ in range(self.repeats)]) for c in classes]
        return {"classes": classes, "gradients": torch.stack([view.mean(0) for view in views])}

    def check_upload(self, extra: State, state: State) -> None:
        """Require each class once, and one possible gradient for each: no error of a softmax is larger than one."""
        if extra.keys() != {"classes", "gradients"}:
            raise ValueError(f"classes and gradients are wanted; it sent {sorted(extra)[:3]}")
        classes, gradients, head = extra["classes"], extra["gradients"], state["head.weight"]
        held, (count, width) = classes.tolist(), head.shape
        if classes.dtype != torch.int64 or not held or sorted(set(held) & set(range(count))) != sorted(held):
            raise ValueError(f"classes must be whole numbers from 0 to {count - 1}, each once; it sent {held[:10]}")
        wanted, sent = (head.dtype, (len(held), count, width + 1)), (gradients.dtype, tuple(gradients.shape))
        if sent != wanted:
            raise ValueError("gradients must be {} {}; it sent {} {}".format(*wanted, *sent))
        if not (gradients[..., -1].abs().max() <= 1.001 and gradients.abs().max() <= LARGEST_GRADIENT):
            raise ValueError(f"its gradients are impossibly large, up to {gradients.abs().max():.3g}")

    def init_server_state(self, parameters: State, generator: torch.Generator) -> State:
        """Synthetic features (C, S, D) from a standard normal distribution, and the initial head."""
        head = {name: parameters[name].clone() for name in HEAD}
        classes, width = head["head.weight"].shape
        features = torch.randn(classes, self.per_class, width, generator=generator).to(head["head.weight"])
        return {"features": features, **head}

    def server_update(
        self, state: State, mean: State, server_state: State, uploads: list[State], generator: torch.Generator
    ) -> tuple[State, State]:
        """Keep the mean, match the features, train a fresh head."""
        wanted, present = mean_by_class(uploads, len(server_state["features"]))
        head = [server_state[name] for name in HEAD]
        server_state = {**server_state, **self._match(server_state, wanted[present], present, head)}
        weight, bias = self._fresh_head(server_state["features"], generator)
        return mean, {**server_state, "head.weight": weight, "head.bias": bias}

    def _match(self, server_state: State, wanted: Tensor, present: Tensor, head: list[Tensor]) -> State:
        """Optimise features of the classes `present` (k,) towards the gradients `wanted` (k, C, D + 1)."""
        moved = server_state["features"][present].clone().requires_grad_()
        rest = server_state.keys() - {"features", *HEAD}  # what else a method optimises with the features
        others = {name: server_state[name].clone().requires_grad_() for name in sorted(rest)}
        free = [moved, *others.values()]
        labels = present[:, None].expand(-1, self.per_class)
        some = max(1, MATCHED // wanted[0].numel())  # classes at once: this bounds the memory used
        for _ in range(self.match_steps):
            steps = list(torch.autograd.grad(self.other_loss(moved, present, others), free))
            parts = zip(moved.detach().split(some), labels.split(some), wanted.split(some), strict=True)
            steps[0] = steps[0] + torch.cat([_towards(*part, head) for part in parts])
            with torch.no_grad():
                for tensor, step in zip(free, steps, strict=True):
                    tensor.sub_(self.match_lr * step)
        features = server_state["features"].clone()
        features[present] = moved.detach()
        return {"features": features, **{name: t.detach() for name, t in others.items()}}

    def other_loss(self, features: Tensor, classes: Tensor, trained: State) -> Tensor:
        """A further term of the server's loss; none."""
        return 0 * features.sum()

    def _fresh_head(self, features: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        classes, count, width = features.shape
        rows, labels = features.flatten(0, 1), torch.arange(classes, device=features.device).repeat_interleave(count)
        start = (torch.rand(classes, width + 1, generator=generator) * 2 - 1) * width**-0.5  # as torch's linear layer
        both = start.to(features)  # weight and bias
        with torch.no_grad():
            for _ in range(self.head_epochs):
                for part in torch.randperm(len(rows), generator=generator).to(rows.device).split(self.head_batch):
                    step = head_gradients(rows[part], labels[part], both[:, :-1], both[:, -1])
                    both.sub_(step, alpha=self.head_lr)
        return both[:, :-1].clone(), both[:, -1].clone()

    def deployed(self, state: State, server_state: State) -> State:
        """The averaged body with the retrained head."""
        return {**state, **{name: server_state[name] for name in HEAD}}


def _towards(features: Tensor, labels: Tensor, wanted: Tensor, head: list[Tensor]) -> Tensor:
    """Gradient of the matching loss ``sum (1 - cosine)`` with respect to the features (k, S, D)."""
    features = features.clone().requires_grad_()
    loss = (1 - cosine_similarity(head_gradients(features, labels, *head), wanted, dim=-1)).sum()
    return torch.autograd.grad(loss, features)[0]


def mean_by_class(uploads: list[State], num_classes: int) -> tuple[Tensor, Tensor]:
    """Average gradients (C, C, D + 1) over the clients that hold each class; list the classes that any holds (k,)."""
    first = uploads[0]["gradients"][0]
    total, count = first.new_zeros(num_classes, *first.shape), first.new_zeros(num_classes)
    for sent in uploads:
        total.index_add_(0, sent["classes"], sent["gradients"])
        count += torch.bincount(sent["classes"], minlength=num_classes)
    return total / count.clamp(min=1)[:, None, None], count.nonzero().flatten()
