"""The numbers of stage 1."""

from __future__ import annotations

import math
import warnings
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mllmfl_lite.repro import settings_class
from mllmfl_lite.stages.mixture import alpha_at

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
    alpha_end: Share = 1.0  #: alpha's last value; below 1, clients would still need CLIP
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
            warnings.warn(f"alpha ends at {self.alpha_end}, not at 1: clients would still need CLIP", stacklevel=4)
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
