"""The reckoned memory against what autograd really keeps, and against the published sizes of LLaVA-1.5-7B."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from mllmfl_lite.models import build_model
from mllmfl_lite.runs.memory import GIB, kept_for_backward, plan_memory
from mllmfl_lite.stages.mixture import CompactEncoder
from mllmfl_lite.stages.pretrain import PretrainSettings
from mllmfl_lite.teachers.llava import load_mllm

LANGUAGE = "language model, kept for the backward pass"
COMPACT = "compact model, kept for the backward pass"


@pytest.fixture(scope="module")
def llava_7b():
    tower = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(vision_config=tower, text_config=LlamaConfig(vocab_size=32064))
    config.dtype = torch.bfloat16
    return config


def kept(work, module):
    """Bytes that this pass keeps, weights left out; an implementation of its own: it runs for real."""
    weights = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    sizes, alive = {}, []

    def note(tensor):
        alive.append(tensor)
        if tensor.untyped_storage().data_ptr() not in weights:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        work()
    return sum(sizes.values())


def test_the_plan_is_what_autograd_keeps():
    mllm = load_mllm(device="cpu", dtype="float32")
    encoder = CompactEncoder(build_model("resnet8", 10, 8), 8, 128)
    plan = plan_memory(mllm.model.config, encoder, PretrainSettings(batch_size=4), 32, 20, 30)
    words = torch.randn(4, 64 + 20 + 30, 128, requires_grad=True)
    language = mllm.model.model.language_model
    really = kept(lambda: language(inputs_embeds=words, use_cache=False), language)
    assert plan.parts[LANGUAGE] == pytest.approx(really, rel=0.1)
    really = kept(lambda: encoder.train()(torch.randn(4, 3, 32, 32)), encoder)
    assert plan.parts[COMPACT] == pytest.approx(really, rel=0.02)


def test_llava_7b_on_one_card_of_80_gb(llava_7b):
    encoder = CompactEncoder(build_model("resnet50", 1000), 24, 4096)
    plans = {
        (batch, lean): plan_memory(
            llava_7b,
            encoder,
            PretrainSettings(batch_size=batch, precision="bfloat16", gradient_checkpointing=lean),
            384,
        )
        for batch, lean in ((8, False), (16, False), (64, True))
    }
    weights = plans[8, False].parts["language model, weights"]
    assert weights == pytest.approx(2 * 6.74e9, rel=0.01)  # Llama-2's 7 B, two bytes each
    assert plans[8, False].parts["CLIP tower and projector, weights"] == pytest.approx(2 * 0.325e9, rel=0.03)
    assert plans[8, False].total < plans[16, False].total
    assert plans[8, False].total < 80e9 and plans[64, True].total < 80e9
    assert plans[16, False].parts[LANGUAGE] == pytest.approx(2 * plans[8, False].parts[LANGUAGE], rel=1e-3)
    without = plan_memory(llava_7b, encoder, PretrainSettings(batch_size=8), 384, live_tower=False)
    assert "CLIP tower and projector, weights" not in without.parts
    text = str(plans[64, True])
    assert text.count("GiB") == 7 and f"{plans[64, True].total / GIB:.2f} GiB  in all" in text


def test_what_is_kept_in_closed_form():
    """A product keeps both factors, a sum none; weights do not count."""
    a, b = (torch.randn(10, 10, requires_grad=True) for _ in range(2))
    nothing = torch.nn.Module()
    assert kept_for_backward(lambda: a + b, nothing)[1] == 0
    assert kept_for_backward(lambda: a * b, nothing)[1] == 800
    assert kept_for_backward(lambda: a * b, nothing, matrix=(10, 10))[1] == 0
    layer = torch.nn.Linear(10, 10)
    assert kept_for_backward(lambda: layer(a), layer)[1] == 400
