"""The mixture of Dynamic Weighted Pretraining: a frozen CLIP and the compact model in front of a frozen LLM.

The LLM reads ``H(x) = (1 - alpha) * P_clip(f_clip(x)) + alpha * P_s(g(x))`` in the image's places. The mixture is the
paper's; this equation, the schedules of alpha and the initial P_s are our reading.
"""

import copy
import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import numpy_generator, stable_seed
from mllmfl_lite.stages.texts import Texts, Views
from mllmfl_lite.teachers.llava import MllmTeacher

START_IMAGES = 256  # used to initialise the projection
STAIRS = 4  # levels of the schedule "step": 0, 1/3, 2/3, 1
SCHEDULES = {
    "linear": lambda u: u,
    "cosine": lambda u: (1 - math.cos(math.pi * u)) / 2,
    "step": lambda u: min(1.0, math.floor(u * STAIRS) / (STAIRS - 1)),
    "constant": lambda u: 1.0,
}


def alpha_at(step: int, steps: int, schedule: str = "linear", ramp: float = 1.0, end: float = 1.0) -> float:
    """The compact model's weight in step 0, ..., `steps` - 1: it rises from 0 to `end`, then stays there.

    `schedule` is ``"linear"``, ``"cosine"``, ``"step"`` (four stairs), or an ablation, ``"constant"``: always `end`.
    `ramp` is the share of the steps in which alpha rises. An `end` of 1 removes CLIP.

    Source: the paper has alpha rise from 0 to 1; the shapes are our reading.
    """
    return end * SCHEDULES[schedule](min(1.0, step / max(1, ramp * (steps - 1))))


class CompactEncoder(nn.Module):
    """The trained part: the compact model g without its head, and the projection P_s, as in LLaVA-1.5.

    The MLLM reads `grid` x `grid` tokens of width `hidden`.
    """

    def __init__(self, model: CompactModel, grid: int, hidden: int):
        super().__init__()
        self.model, self.grid = model, grid
        self.model.head.requires_grad_(False)
        self.projection = nn.Sequential(nn.Linear(model.num_features, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> visual tokens (B, grid * grid, H)."""
        return self.projection(self.model.tokens(x, self.grid))

    @torch.no_grad()
    def start_like(self, x: Tensor, visual: Tensor) -> None:
        """Give P_s's tokens of images (B, 3, H, W) the mean and spread of the MLLM's own visual tokens (B, P, H)."""
        last, statistics = cast(nn.Linear, self.projection[-1]), copy.deepcopy(self.state_dict())
        compact = self.train()(x)
        self.load_state_dict(statistics)  # this pass must not move BatchNorm's averages
        wanted, mean = visual.mean((0, 1)), compact.mean((0, 1))
        scale = (visual - wanted).std() / (compact - mean).std().clamp(min=1e-6)
        last.weight.mul_(scale)
        last.bias.copy_(wanted - scale * (mean - last.bias))


def new_encoder(
    model: CompactModel, mllm: MllmTeacher, views: Views, texts: Texts, seed: int, device: str | torch.device = "cpu"
) -> CompactEncoder:
    """Initialise the trained part: a copy of `model`, and a projection with the mean and spread of the MLLM's own.

    Up to `START_IMAGES` images decide mean and spread. The seed decides the projection's weights.

    Raises:
        ValueError: the MLLM's visual tokens are no square grid, or the compact model's feature map does not fit it.
    """
    reader = FrozenReader(mllm)
    places = texts.questions[0].count(reader.image_token)
    grid = math.isqrt(places)
    if grid * grid != places:
        raise ValueError(f"the MLLM reads {places} visual tokens, which is no square grid")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "projection"))
        encoder = CompactEncoder(copy.deepcopy(model), grid, reader.hidden)
    encoder.to(device).to(memory_format=torch.channels_last)
    images = numpy_generator(seed, "start").permutation(np.unique(texts.image))[:START_IMAGES]
    visual = reader.project(views.tokens(np.sort(images))).float().to(device)
    encoder.start_like(views.compact(np.sort(images), None), visual)
    return encoder


class FrozenReader:
    """The frozen half: an MLLM's projector P_clip and its language model. For checkpointing see `PretrainSettings`."""

    def __init__(self, mllm: MllmTeacher, gradient_checkpointing: bool = False):
        self.model = cast(Any, mllm.model)
        self.image_token: int = self.model.config.image_token_index
        self.hidden: int = self.model.config.text_config.hidden_size
        language = self.model.model.language_model
        if gradient_checkpointing:
            language.gradient_checkpointing_enable({"use_reentrant": False})
        language.train(gradient_checkpointing)  # checkpointing needs training mode; a LLaVA's LLM has no dropout

    def project(self, tokens: Tensor) -> Tensor:
        """P_clip: patch tokens (B, P, D) -> visual tokens (B, P, H)."""
        with torch.no_grad():
            return self.model.model.multi_modal_projector(tokens.to(self.model.device, self.model.dtype))

    def loss(self, visual: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        """Mean negative log-likelihood of the tokens whose label is not -100, in nats.

        The visual tokens (B, P, H) are placed where ids (B, L) has image tokens, P a row.
        """
        words = self.model.get_input_embeddings()(ids)
        words = words.masked_scatter((ids == self.image_token).unsqueeze(-1), visual.to(words.dtype))
        hidden = self.model.model.language_model(inputs_embeds=words, use_cache=False).last_hidden_state
        learned = labels[:, 1:] != -100
        logits = self.model.lm_head(hidden[:, :-1][learned])  # of answer tokens alone
        return cross_entropy(logits.float(), labels[:, 1:][learned])


class TextBatch(NamedTuple):
    """One batch of stage 1."""

    x: Tensor  #: the compact model's images (B, 3, H, W)
    tokens: Tensor | None  #: CLIP's patch tokens (B, P, D); None where CLIP is not used (alpha 1, no feature term)
    ids: Tensor  #: int64 (B, L)
    labels: Tensor  #: int64 (B, L), -100 where nothing is learned


def mixed_loss(
    encoder: nn.Module,
    reader: FrozenReader,
    alpha: float,
    batch: TextBatch,
    language_weight: float = 1.0,
    feature_weight: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch, and its parts as numbers.

    The parts are ``-log p_LLM(answer | H(x), question)`` and ``1 - cosine`` between the two projected tokens.

    Raises:
        ValueError: CLIP's tokens are needed and absent.
    """
    seen = compact = encoder(batch.x)
    if alpha < 1 or feature_weight:
        if batch.tokens is None:
            raise ValueError(f"alpha {alpha} and feature_weight {feature_weight} need CLIP's tokens in the batch")
        frozen = reader.project(batch.tokens)
        seen = (1 - alpha) * frozen + alpha * compact if alpha < 1 else compact
    loss, parts = compact.new_zeros(()), {}
    if language_weight:
        language = reader.loss(seen, batch.ids, batch.labels)
        loss, parts["language"] = loss + language_weight * language, language.item()
    if feature_weight:
        feature = (1 - cosine_similarity(compact.float(), frozen.float(), dim=-1)).mean()
        loss, parts["feature"] = loss + feature_weight * feature, feature.item()
    return loss, parts
