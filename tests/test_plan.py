"""The cost model: operations against the meter, memory against what is held, hours against runs of ours and others."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from mllmfl_lite.federated.methods import FedAvg, FedSettings
from mllmfl_lite.measure.cost import PeakMemory, client_cost
from mllmfl_lite.models import build_model
from mllmfl_lite.runs.experiment import Experiment, run_experiment
from mllmfl_lite.runs.memory import GIB
from mllmfl_lite.runs.pipeline import Pipeline
from mllmfl_lite.runs.plan import (
    CLIPS,
    MACHINES,
    Machine,
    Stage,
    in_words,
    language_of,
    make_plan,
    shape_of,
    this_machine,
    training_memory,
)
from mllmfl_lite.runs.results import committed_results, reported
from mllmfl_lite.stages.align import AlignSettings
from mllmfl_lite.stages.pretrain import PretrainSettings
from mllmfl_lite.teachers.clip import load_clip
from mllmfl_lite.teachers.llava import load_mllm

REAL = Experiment(mllm="llava-hf/llava-1.5-7b-hf", mllm_dtype="bfloat16", pool="cc595k", image_size=32)
LEAN = PretrainSettings(epochs=1, batch_size=16, precision="bfloat16", gradient_checkpointing=True)


def stages(pipeline, machine=MACHINES["h100"]):
    return {stage.name.split(":")[0]: stage for stage in make_plan(pipeline, machine).stages}


def test_the_clients_images_are_the_benchmarks():
    assert shape_of(Experiment("cifar10")) == (12_406, 10_000, 10, 32)
    assert shape_of(Experiment("cifar100", 10))[0] == 19_573
    assert shape_of(Experiment("imagenet_lt", image_size=64)) == (115_846, 50_000, 1000, 64)
    train, _ = Experiment("cifar10_mini").clients()
    assert shape_of(Experiment("cifar10_mini"))[0] == len(train)


def test_the_operations_of_the_rounds_are_the_meters():
    """The meter runs a client's own step; the plan multiplies one image's by how many there will be."""
    experiment = Experiment("cifar10_mini", num_clients=4, width=4, settings=FedSettings(3, 2, 5))
    train, split = experiment.clients()
    model = build_model("resnet8", 10, 4)
    metered = [client_cost(FedAvg(), model, train, own, experiment.settings).flops for own in split]
    planned = stages(Pipeline(experiment, None))["rounds"].flops
    assert planned == pytest.approx(3 * 2 * np.mean(metered), rel=0.01)


def test_training_memory_is_what_is_held(images):
    model, x = build_model("resnet8", 10, 8), torch.randn(32, 3, 32, 32)
    with PeakMemory() as memory:
        loss = torch.nn.functional.cross_entropy(model(x), torch.zeros(32, dtype=torch.long))
    held = memory.peak + 4 * sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert loss and training_memory("resnet8", 8, 10, 32, 32, "float32") == pytest.approx(held, rel=0.35)


def test_the_size_of_a_language_model():
    """LLaVA-1.5-7B: 6.74 billion weights in the language model with its embeddings (131 million of them once here)."""
    seven = language_of("llava-hf/llava-1.5-7b-hf", "bfloat16")
    assert seven.weights == pytest.approx(6.74e9 - 0.131e9, rel=0.01)
    assert seven.tower == pytest.approx(0.303e9, rel=0.02) and seven.patches == 576
    tiny, model = language_of("tiny_llava", "float32"), load_mllm(device="cpu", dtype="float32").model.model
    assert tiny.patches == 64
    assert tiny.weights == pytest.approx(sum(p.numel() for p in model.language_model.parameters()), rel=0.02)
    assert tiny.tower == pytest.approx(sum(p.numel() for p in model.vision_tower.parameters()), rel=0.05)
    with pytest.raises(ValueError, match="the size of 'some/llm' is not known; give its folder"):
        language_of("some/llm", "float32")


def test_what_a_clip_costs_is_what_it_says_itself():
    assert CLIPS["tiny_clip"] == load_clip(device="cpu").image_cost()


def test_describing_reads_weights_and_cache_for_every_token():
    """LLaVA-1.5-7B: 13.2 GB of weights, and 64 answers' keys and values, half a megabyte a token."""
    described = Pipeline(replace(REAL, pool_images=64), LEAN, annotations="new")
    first, second = make_plan(described, MACHINES["h100"]).stages[:2]
    weights = 2 * language_of("llava-hf/llava-1.5-7b-hf", "bfloat16").weights
    assert first.read == 60 * (weights + 64 * 676 * 2 * 32 * 4096 * 2) and second.read == 0


def test_pretraining_takes_about_as_long_as_llavas_did():
    """Its authors' own run had the same model and as many visual tokens."""
    theirs = reported()["llava_1_5_pretraining"]
    pipeline = Pipeline(replace(REAL, pool_images=theirs["texts"]), LEAN, annotations="new")
    eight = replace(MACHINES["a100"], gpus=8)
    hours = stages(pipeline)["stage 1"].seconds(eight) / 3600
    assert 0.5 * theirs["hours"] < hours < 2 * theirs["hours"]


def test_hours_follow_from_rates():
    machine = Machine("made", rates=100.0, matmul=10.0, bandwidth=1.0, step=2.0, small=0.5, decode=4.0)
    assert Stage("x", flops=1000.0).seconds(machine) == 10
    assert Stage("x", flops=1000.0, steps=7).seconds(machine) == 14  # steps cannot go faster
    assert Stage("x", flops=1000.0, pictures=80).seconds(machine) == 20  # nor pictures
    assert Stage("x", matmul=50.0, read=3.0, small_steps=4).seconds(machine) == 5 + 3 + 2
    assert Stage("x", matmul=50.0, spread=True).seconds(replace(machine, gpus=5)) == 1
    assert [in_words(s) for s in (0, 45, 600, 7200, 86400, 864000, 1e8)] == [
        "0 s", "45 s", "10 min", "2.0 h", "24 h", "10 d", "3.2 y",
    ]  # fmt: skip


def test_a_plan_has_the_stages_that_will_be_run():
    everything = Pipeline(replace(REAL, method="clip2fl", align=AlignSettings()), LEAN, annotations="new")
    names = [stage.name for stage in make_plan(everything, MACHINES["h100"]).stages]
    assert [name.split(" ")[0] for name in names] == [
        "stage", "stage", "stage", "rounds:", "tests:", "gradients", "CLIP's", "stage",
    ]  # fmt: skip
    assert len(make_plan(Pipeline(REAL, None), MACHINES["h100"]).stages) == 2
    text = str(make_plan(everything, MACHINES["8xh100"]))
    assert "in all" in text and "reckoned, not measured" in text


def test_creffs_gradients_of_a_thousand_classes_do_not_hide():
    large = Experiment("imagenet_lt", model="resnet50", method="creff")
    assert stages(Pipeline(large, None))["gradients of the head, synthetic features, new head"].memory > 30 * GIB


def test_recorded_runs_took_what_the_operations_say():
    """Seconds a round of all seeds at medium scale, FedAvg's rate for all: FedProx and FedAvgM within 1.5 times."""
    spent = {}
    for result in committed_results("medium/cifar10_lt_if100"):
        plain = [r["seconds"] for r in result["history"] if r["metrics"] is None]
        spent.setdefault(result["label"], []).append(np.median(plain) if plain else np.nan)
    rate = np.median(spent["fedavg"])
    for method in ("fedprox", "fedavgm"):
        assert 1 / 1.5 < np.median(spent[method]) / rate < 1.5
    assert np.median(spent["creff"]) > np.median(spent["fedavg"])


def test_the_machine_at_hand_is_foretold():
    """Planned and real seconds of a small run, whatever the load: no more than four times off, in one of three."""
    experiment = Experiment(
        "cifar10_mini", num_clients=4, width=8, settings=FedSettings(2, 2, 2, eval_every=9, report_rounds=1)
    )
    assert any(1 / 4 < _real_over_planned(experiment) < 4 for _ in range(3))  # other work may come and go


def _real_over_planned(experiment):
    plan = make_plan(Pipeline(experiment, None), this_machine(Pipeline(experiment, None), "cpu"))
    assert plan.machine.measured and plan.machine.memory > GIB
    started = time.perf_counter()
    run_experiment(experiment, device="cpu")
    return (time.perf_counter() - started) / (3600 * plan.hours)
