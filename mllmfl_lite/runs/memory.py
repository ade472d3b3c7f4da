"""What pretraining will keep in memory, reckoned before it starts and without any weights::

    print(plan_memory(mllm_config, encoder, PretrainSettings(batch_size=16), pixels=384, answer_tokens=60))

Models are built on torch's "meta" device, where tensors have shapes and no content; autograd then says itself what it
would keep for the backward pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GIB = 2**30


OVERHEAD = 0.1  # fragments, workspaces and the CUDA context, on top of what is counted


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose.

    Attributes:
        parts: what is counted, e.g. ``{"language model, weights": 13_476_839_424, ...}``.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts and a tenth on top."""
        return round(sum(self.parts.values()) * (1 + OVERHEAD))

    def __str__(self) -> str:
        lines = [f"{size / GIB:8.2f} GiB  {name}" for name, size in self.parts.items()]
        return "\n".join([*lines, f"{self.total / GIB:8.2f} GiB  in all, with {OVERHEAD:.0%} for what is not counted"])


def plan_memory(
    config, encoder: nn.Module, settings, pixels: int, prompt_tokens: int = 40, answer_tokens: int = 60,
    live_tower: bool = True,
) -> MemoryPlan:  # fmt: skip
    """The memory that `pretrain` needs on its device.

    Args:
        config: a `transformers.LlavaConfig`; its `dtype` is what the MLLM is loaded in.
        encoder: a `CompactEncoder`, or any module from images to visual tokens.
        settings: `PretrainSettings`: batch size, precision and checkpointing are read.
        pixels: the side of the compact model's images.
        prompt_tokens: of a question, its picture not counted.
        answer_tokens: of a long answer.
        live_tower: whether CLIP runs beside the training, or its tokens come from the disk.
    """
    language, dtype = config.text_config, config.dtype or torch.float32
    layers, batch = language.num_hidden_layers, settings.batch_size
    mllm = _on_meta(config, dtype)
    visual, kept_encoder = _kept_by_encoder(encoder, batch, pixels, settings.precision)
    shape = (batch, visual.shape[1] + prompt_tokens + answer_tokens, language.hidden_size)
    layer = mllm.model.language_model.layers[0]
    kept_layer = _kept_by_layer(mllm.model.language_model, shape, dtype)
    kept_input = math.prod(shape) * dtype.itemsize
    kept_language = kept_layer + (layers - 1) * kept_input if settings.gradient_checkpointing else layers * kept_layer
    shared = 0 if config.tie_word_embeddings else _size(mllm.lm_head)
    parts = {
        "language model, weights": layers * _size(layer) + _size(mllm.model.language_model.embed_tokens) + shared,
        "language model, kept for the backward pass": kept_language,
        "logits of the answers, and their gradient": batch * answer_tokens * language.vocab_size * (dtype.itemsize + 8),
        "compact model: weights, gradients, AdamW's two moments": 4 * _size(encoder),
        "compact model, kept for the backward pass": kept_encoder,
    }
    if live_tower:
        parts["CLIP tower and projector, weights"] = _size(mllm.model.vision_tower)
        parts["CLIP tower and projector, weights"] += _size(mllm.model.multi_modal_projector)
    return MemoryPlan(parts)


def count_weights(config) -> tuple[int, int]:
    """How many weights of an MLLM each token passes: those of the language model's layers and output, and the tower's.

    Args:
        config: a `transformers.LlavaConfig`.
    """
    mllm = _on_meta(config, torch.float32)
    layer, output, tower = (
        sum(p.numel() for p in part.parameters())
        for part in (mllm.model.language_model.layers[0], mllm.lm_head, mllm.model.vision_tower)
    )
    return config.text_config.num_hidden_layers * layer + output, tower


def _on_meta(config, dtype: torch.dtype) -> nn.Module:
    """The MLLM with one layer of its language model, weightless."""
    from transformers import LlavaForConditionalGeneration

    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = 1
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config).to(dtype).requires_grad_(False)


def _kept_by_encoder(encoder: nn.Module, batch: int, pixels: int, precision: str) -> tuple[Tensor, int]:
    encoder = copy.deepcopy(encoder).to("meta").train()
    images = torch.empty(batch, 3, pixels, pixels, device="meta")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        return kept_for_backward(lambda: encoder(images), encoder)


def _kept_by_layer(language_model: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    hidden = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    places = torch.arange(shape[1], device="meta")[None]
    angles = language_model.rotary_emb(hidden, places)
    return kept_for_backward(
        lambda: language_model.layers[0](hidden, position_embeddings=angles, attention_mask=None),
        language_model,
        matrix=(shape[1], shape[1]),
    )[1]


def kept_for_backward(
    work: Callable[[], Tensor], module: nn.Module, matrix: tuple[int, int] = (-1, -1)
) -> tuple[Tensor, int]:
    """What `work` returns, and the bytes that autograd keeps for its backward pass, the module's weights left out.

    Args:
        work: a forward pass.
        module: whose weights are not counted.
        matrix: tensors of this shape at their end are not counted: attention weights, which fused kernels never keep.
    """
    weights = {_storage(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights and tuple(tensor.shape[-2:]) != matrix:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = work()
    return out, sum(kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # on "meta", every address is 0


def _size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
