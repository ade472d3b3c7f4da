"""The vision tower of tiny-llava: a CLIP ViT made for little data, trained from labels and from tiny-clip."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import CLIPVisionConfig, CLIPVisionModel

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.repro import torch_generator
from standins.training import Schedule, Watch, draw_batches, fit, initial_weights

CONFIG = {
    "hidden_size": 160,
    "intermediate_size": 320,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
    "hidden_act": "gelu",
}
PATCHES = (CONFIG["image_size"] // CONFIG["patch_size"]) ** 2


def new_tower(images: np.ndarray, seed: int, config: dict = CONFIG) -> CLIPVisionModel:
    """A CLIP vision tower: whitened patches, sinusoidal positions, mimetic attention (Trockman and Kolter, 2023).

    Args:
        images: uint8 (N, H, W, 3); the statistics of their patches set the first layer.
        seed: of the random part.
        config: of `transformers.CLIPVisionConfig`.
    """
    with initial_weights(seed), torch.no_grad():
        tower = CLIPVisionModel(CLIPVisionConfig(**config))
        core, width = core_of(tower), config["hidden_size"]
        core.embeddings.patch_embedding.weight.copy_(_whitening(images, config["patch_size"], width))
        positions = _sinusoids(config["image_size"] // config["patch_size"], width)
        core.embeddings.position_embedding.weight.copy_(torch.cat([torch.zeros(1, width), 0.5 * positions]))
        for layer in core.encoder.layers:
            _mimetic(layer.self_attn, width, config["num_attention_heads"])
    return tower


def core_of(tower: CLIPVisionModel) -> nn.Module:
    """The transformer itself, which transformers before version 5 wrapped."""
    return getattr(tower, "vision_model", tower)


def _whitening(images: np.ndarray, patch: int, width: int) -> Tensor:
    """First-layer filters (width, 3, patch, patch): decorrelated patches, turned at random into `width` numbers."""
    some = images[:2000]
    x = Batches(ImageSet(some, np.zeros(len(some), np.int64), ("image",), "images")).plain(torch.arange(len(some)))
    patches = x.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * patch**2)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    white = vectors / (values + 1e-2).sqrt()  # (P, P): each column a filter with output of unit variance
    turn = torch.linalg.qr(torch.randn(max(width, len(values)), min(width, len(values))))[0]
    turn = turn if width >= len(values) else turn.T  # (width, P): orthonormal rows or columns
    return (turn @ white.T).reshape(width, 3, patch, patch)


def _sinusoids(side: int, width: int) -> Tensor:
    """Two-dimensional sinusoidal position embeddings (side * side, width)."""
    frequencies = 1 / 100 ** torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies  # (side, width / 4)
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    return torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], 1)


def _mimetic(attention: nn.Module, width: int, heads: int) -> None:
    """Queries meet keys near the identity, values leave near minus the identity, as in trained transformers."""
    size = width // heads
    noise = lambda: torch.randn(width, width) / width**0.5  # noqa: E731
    for head in range(heads):
        u, s, v = torch.linalg.svd(0.7 * noise() + 0.7 * torch.eye(width))
        rows = slice(head * size, (head + 1) * size)
        attention.q_proj.weight[rows] = (u[:, :size] * s[:size].sqrt()).T
        attention.k_proj.weight[rows] = s[:size, None].sqrt() * v[:size]
    u, s, v = torch.linalg.svd(0.4 * noise() - 0.4 * torch.eye(width))
    attention.v_proj.weight.copy_((u * s.sqrt()).T)
    attention.out_proj.weight.copy_((s.sqrt()[:, None] * v).T)


def patch_features(
    tower: CLIPVisionModel, x: Tensor, keep: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Patch tokens (B, P, D) of the last layer without the class token; with `keep`, of so many patches at random."""
    core = core_of(tower)
    tokens = core.embeddings(x)
    if keep is not None:
        chosen = torch.randperm(tokens.shape[1] - 1, generator=generator)[:keep] + 1
        tokens = tokens[:, torch.cat([torch.zeros(1, dtype=torch.long), chosen])]
    return core.encoder(inputs_embeds=core.pre_layrnorm(tokens)).last_hidden_state[:, 1:]


class TowerHead(nn.Module):
    """What the tower learns through and then loses: mean over patches, norm, linear layers to classes and CLIP."""

    def __init__(self, width: int, num_classes: int, clip_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, num_classes)
        self.clip = nn.Linear(width, clip_width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, P, D) -> class logits (B, C) and a guess of CLIP's feature (B, E)."""
        pooled = self.norm(tokens.mean(1))
        return self.classes(pooled), self.clip(pooled)


def train_tower(
    tower: CLIPVisionModel,
    head: TowerHead,
    data: ImageSet,
    teacher: Callable[[Tensor], tuple[Tensor, Tensor]],
    schedule: Schedule,
    seed: int,
    distil_from: float = 0.6,
    all_patches_from: float = 0.85,
    main_share: float = 0.75,
    watch: Watch | None = None,
) -> list[float]:
    """Train the vision tower in place: from labels, later also from what a trained CLIP says of the same crops.

    Args:
        tower: from `new_tower`.
        head: what the losses are taken through.
        data: labelled images.
        teacher: from `clip_teacher`.
        schedule: samples, batch, learning rate.
        seed: of batches, crops and patches.
        distil_from: the share of the steps after which the teacher joins.
        all_patches_from: the share of the steps after which no patch is left out; half of them before.
        main_share: share of CIFAR-10 images in a batch.
        watch: sees each step.
    """
    images, generator = Batches(data), torch_generator(seed, "augmentation")

    def loss_of(step: int, batch: Tensor) -> Tensor:
        x = images.augmented(batch, generator)
        keep = PATCHES // 2 if step < all_patches_from * schedule.steps else None
        logits, guess = head(patch_features(tower, x, keep, generator))
        loss = cross_entropy(logits, images.labels[batch], label_smoothing=0.05)
        if step < distil_from * schedule.steps:
            return loss
        features, soft = teacher(x)
        return loss + cross_entropy(logits, soft.softmax(1)) + (1 - cosine_similarity(guess, features)).mean()

    tower.train()
    batches = draw_batches(data.labels, main_share, schedule, seed)
    parameters = [*tower.parameters(), *head.parameters()]
    losses = fit(loss_of, parameters, batches, schedule, "vision tower", tower.parameters(), watch)
    tower.eval()
    return losses
