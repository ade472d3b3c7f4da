import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import make_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mllmfl_lite import federated
from mllmfl_lite.baselines import CLIP2FL, CReFF
from mllmfl_lite.batches import Batches
from mllmfl_lite.checkpoint import CheckpointError
from mllmfl_lite.data import ImageSet
from mllmfl_lite.experiment import Experiment, run_experiment
from mllmfl_lite.federated import ClientDiverged, FedAvg, FedAvgM, FedProx, FedSettings, client_step, run_federated
from mllmfl_lite.files import ImageFiles
from mllmfl_lite.models import CompactModel, build_model
from mllmfl_lite.repro import tf32
from mllmfl_lite.together import ClientStack, Together, equal_lengths, settle

QUICK = FedSettings(rounds=2, clients_per_round=3, local_epochs=2, batch_size=8, lr=0.05)
SIZES = (21, 3, 17, 8, 11)  # batches of one image, of less than one batch, of whole ones only
SMALL = {"per_class": 5, "match_steps": 5, "head_epochs": 3, "repeats": 2}


def slices(sizes):
    return np.split(np.random.default_rng(0).permutation(sum(sizes)), np.cumsum(sizes)[:-1])


def little(width=3, seed=0):
    """One convolution with BatchNorm and a head: compiled and trained in no time."""
    torch.manual_seed(seed)
    return CompactModel(nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU()), width, 3)


def run(method=None, numbers=QUICK, model=None, **how):
    images = make_images(sum(SIZES))
    return run_federated(model or little(), images, slices(SIZES), images, method or FedAvg(), numbers, **how)


def close(a: dict, b: dict, rtol=1e-4, atol=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def clip2fl():
    torch.manual_seed(0)
    words = torch.nn.functional.normalize(torch.randn(3, 7), dim=1)
    return CLIP2FL(clip_logits=torch.randn(sum(SIZES), 3), text_features=words, **SMALL)


# ----------------------------------------------------------------------------------------------- the same as one by one


@pytest.mark.parametrize(
    "method", [FedAvg(), FedProx(mu=0.7), FedAvgM(), CReFF(**SMALL), clip2fl()], ids=lambda m: type(m).__name__
)
def test_a_run_together_is_the_run_one_by_one(method):
    alone, side_by_side = run(method, together=False), run(method, together=True)
    close(alone.state, side_by_side.state)
    close(alone.deployed, side_by_side.deployed, 1e-3, 1e-4)
    for one, other in zip(alone.history, side_by_side.history, strict=True):
        assert one["clients"] == other["clients"]
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)


def test_resnet8_with_its_shortcuts_and_more_than_one_epoch():
    close(*(run(model=build_model("resnet8", 3, width=2), together=how).state for how in (False, True)))


@dataclass(frozen=True)
class InDoubles(FedProx):
    def local_loss(self, model, x, y, rows, anchor):
        return super().local_loss(model, x.double(), y, rows, anchor)


def ask_both(sizes, method, numbers, how, model=None):
    """Each client's result, trained one by one and together."""
    images, split = make_images(sum(sizes)), [torch.from_numpy(own) for own in slices(sizes)]
    model, batches, chosen = model or little(), Batches(images), list(range(len(sizes)))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    part = (copy.deepcopy(model), batches)
    alone = {k: client_step(*part, split[k], method, numbers, state, {}, 3, k) for k in chosen}
    together, left_out = ClientStack(model, batches, split, method, numbers, how).ask(state, {}, 3, chosen)
    assert left_out == {} and sorted(together) == chosen
    return alone, together


def test_in_float64_the_two_agree_to_the_last_digits():
    numbers = replace(QUICK, clients_per_round=5)
    alone, side_by_side = ask_both(SIZES, InDoubles(mu=0.5), numbers, Together(), little().double())
    for client in alone:
        close(alone[client].state, side_by_side[client].state, rtol=1e-12, atol=1e-13)
        assert alone[client].loss == pytest.approx(side_by_side[client].loss, rel=1e-12)


def test_each_client_has_its_own_running_statistics():
    _, results = ask_both((9, 20), FedAvg(), replace(QUICK, clients_per_round=2), Together())
    steps = [results[k].state["body.1.num_batches_tracked"].item() for k in (0, 1)]
    assert steps == [2 * 2, 2 * 3] and results[0].state["body.1.num_batches_tracked"].dtype == torch.int64
    assert not torch.equal(*(results[k].state["body.1.running_mean"] for k in (0, 1)))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 5))
def test_any_sizes_give_the_same_as_one_by_one(sizes, batch_size, at_once):
    numbers = replace(QUICK, clients_per_round=len(sizes), batch_size=batch_size, lr=0.02)
    alone, side_by_side = ask_both(sizes, FedAvg(), numbers, Together(at_once))
    for client in alone:
        close(alone[client].state, side_by_side[client].state, 1e-3, 1e-4)
        assert alone[client].loss == pytest.approx(side_by_side[client].loss, rel=1e-3)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 9))
def test_each_image_is_in_one_batch(sizes, most):
    sizes, seen = sorted(sizes, reverse=True), [0] * len(sizes)
    for start in range(0, sizes[0], most):
        for first, last, length in equal_lengths(sizes, start, most):
            assert 1 <= length <= most
            for place in range(first, last):
                assert seen[place] == start
                seen[place] += length
    assert seen == sizes


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_a_stack_may_be_smaller_than_a_round(at_once):
    close(run(together=False).state, run(together=Together(at_once=at_once)).state)


def test_what_a_client_sends_beside_its_weights_has_the_same_bits():
    model, method = little(), CReFF(**SMALL)
    received = {name: model.state_dict()[name] for name in ("head.weight", "head.bias")}
    split, batches = [torch.from_numpy(own) for own in slices(SIZES)], Batches(make_images(sum(SIZES)))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    worker = copy.deepcopy(model).to(memory_format=torch.channels_last)
    alone = client_step(worker, batches, split[0], method, QUICK, state, received, 1, 0).beside
    stack = ClientStack(model, batches, split, method, QUICK, Together())
    assert equal(alone, stack.ask(state, received, 1, [0, 2])[0][0].beside)
    assert equal(state, model.state_dict())


# ----------------------------------------------------------------------------------------------- precision, compilation


def test_bfloat16_is_close_to_bfloat16():
    rough = replace(QUICK, precision="bfloat16")
    alone, side_by_side = run(numbers=rough, together=False), run(numbers=rough, together=True)
    close(alone.state, side_by_side.state, rtol=0.1, atol=0.05)
    assert not equal(side_by_side.state, run(together=True).state), "autocast does something"
    assert {t.dtype for t in side_by_side.state.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("together", [False, True])
def test_tf32_is_float32_on_a_cpu(together):
    assert equal(run(together=together).state, run(numbers=replace(QUICK, precision="tf32"), together=together).state)


def flags():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_flags_of_torchs_newer_kind_are_kept(monkeypatch):
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [flag.fp32_precision for flag in (matmul, conv)]
    try:
        matmul.fp32_precision = "tf32"
        with tf32(False):
            assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
        assert matmul.fp32_precision == "tf32"
    finally:
        for flag, was in zip((matmul, conv), before, strict=True):
            flag.fp32_precision = was


@pytest.mark.parametrize(("precision", "during"), [("float32", (False, False)), ("tf32", (True, True))])
def test_the_rounding_of_products_is_set_for_the_run_and_put_back(precision, during):
    before, seen = flags(), []

    def ask(state, received, round_, chosen):
        seen.append(flags())
        raise ClientDiverged(0, round_)

    with pytest.raises(ClientDiverged):
        run(numbers=replace(QUICK, precision=precision), ask=ask)
    assert seen == [during] and flags() == before


def test_the_tenth_compiled_run_is_compiled_too():
    """torch compiles a piece of code eight times, and then no more."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for i in range(10):
        numbers = replace(QUICK, rounds=1, local_epochs=1, lr=0.01 * (i + 1))
        run(numbers=numbers, together=Together(at_once=2, compile={"backend": backend}))
    assert len(graphs) == 10


def test_one_graph_is_compiled_and_gives_the_same_bits():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = run(FedProx(mu=0.5), together=Together(at_once=2, compile={"backend": backend, "fullgraph": True}))
    assert len(graphs) == 1, "only whole steps are compiled, and they have one shape"
    assert equal(compiled.state, run(FedProx(mu=0.5), together=Together(at_once=2)).state)


def test_a_compiled_run_is_close():
    """aot_eager takes the step apart as the compiler for a GPU does, without its kernels."""
    close(run(together=False).state, run(together=Together(compile={"backend": "aot_eager"})).state)


def test_the_stack_stays_where_it_is():
    """A recorded CUDA graph writes to the addresses that it was recorded with."""
    split, model = [torch.from_numpy(own) for own in slices(SIZES)], little()
    stack = ClientStack(model, Batches(make_images(sum(SIZES))), split, FedAvg(), QUICK, Together())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def addresses():
        return [t.data_ptr() for t in (*stack.stack.state_dict().values(), *stack.anchor.values(), stack.total)]

    before = addresses()
    results, _ = stack.ask(state, {}, 1, [0, 2])
    kept = {name: tensor.clone() for name, tensor in results[0].state.items()}
    stack.ask(results[2].state, {}, 2, [1, 3, 4])
    assert addresses() == before and equal(kept, results[0].state), "a result is no window onto the stack"


# ------------------------------------------------------------------------------------------------ divergence


@dataclass(frozen=True)
class Poisoned(FedAvg):
    """The loss is not a number for whoever holds one of the images `bad`."""

    bad: tuple[int, ...] = ()

    def local_loss(self, model, x, y, rows, anchor):
        lost = (rows[:, None] == torch.tensor(self.bad)).any()
        return super().local_loss(model, x, y, rows, anchor) + torch.where(lost, float("nan"), 0.0)


class Cliff(FedAvg):
    """A finite loss whose gradient is not a number."""

    def local_loss(self, model, x, y, rows, anchor):
        bias = model.head.bias
        return super().local_loss(model, x, y, rows, anchor) + (bias - bias.detach()).abs().sqrt().sum()


@pytest.mark.parametrize("at_once", [1, 2, None])
def test_the_client_that_diverged_is_named(at_once, tmp_path):
    numbers, method = replace(QUICK, clients_per_round=5), Poisoned(bad=(int(slices(SIZES)[3][0]),))
    with pytest.raises(ClientDiverged, match="client 3 diverged in round 1"):
        run(method, numbers, together=Together(at_once), folder=tmp_path)
    assert not list(tmp_path.glob("weights-*"))


def test_of_several_the_smallest_number_is_named():
    method = Poisoned(bad=tuple(int(slices(SIZES)[client][0]) for client in (4, 1, 2)))
    with pytest.raises(ClientDiverged, match="client 1 diverged"):
        run(method, replace(QUICK, clients_per_round=5), together=True)


def test_weights_lost_in_the_very_last_step_are_noticed():
    with pytest.raises(ClientDiverged, match="round 1"):
        run(Cliff(), replace(QUICK, rounds=1, local_epochs=1, batch_size=1000), together=True)


# ------------------------------------------------------------------------------------------------ the choice


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    for method in (FedAvg(), FedAvgM()):
        folder, numbers = tmp_path / type(method).__name__, replace(QUICK, rounds=3)
        whole = run(method, numbers, together=True)
        run(method, replace(QUICK, rounds=1), together=True, folder=folder)
        resumed = run(method, numbers, together=True, folder=folder)
        assert equal(whole.state, resumed.state)
        assert [r["metrics"] for r in whole.history] == [r["metrics"] for r in resumed.history]


def test_the_choice_is_no_part_of_what_a_run_is(tmp_path):
    run(numbers=replace(QUICK, rounds=1), together=False, folder=tmp_path)
    close(run(together=False).state, run(together=Together(2), folder=tmp_path).state)
    with pytest.raises(CheckpointError, match="precision"):
        run(numbers=replace(QUICK, precision="tf32"), folder=tmp_path)


def test_it_is_for_images_in_memory_and_clients_at_hand(tmp_path):
    images = make_images()
    in_files = ImageSet(ImageFiles(tmp_path, ("a.png",), 8), np.zeros(1, np.int64), ("a",), "made")
    assert settle(True, images) == Together() == settle(Together(), images)
    assert settle(False, images) is settle(False, in_files) is None
    with pytest.raises(ValueError, match="holding pictures in files cannot be trained together"):
        settle(True, in_files)
    with pytest.raises(ValueError, match="asked elsewhere cannot be trained together"):
        run(ask=lambda *_: None, together=True)


@pytest.mark.parametrize("wanted", ["yes", "auto", 3, None])
def test_an_unknown_choice_is_refused(wanted):
    with pytest.raises(ValueError, match="together must be True, False or a Together"):
        run(together=wanted)


@pytest.mark.parametrize("at_once", [0, -1, 1.5, True])
def test_a_stack_of_no_size_is_refused(at_once):
    with pytest.raises(ValueError, match="at_once must be a whole number"):
        Together(at_once)


def test_a_results_file_says_how_clients_were_trained():
    tiny = Experiment(
        "cifar10_mini", num_clients=4, width=2, settings=FedSettings(1, 2, 1, batch_size=64, report_rounds=1)
    )
    alone, side_by_side = (run_experiment(tiny, device="cpu", together=how) for how in (False, True))
    assert [r["provenance"]["clients"] for r in (alone, side_by_side)] == ["one by one", "together"]
    assert alone["parameters"] == side_by_side["parameters"]
    assert alone["history"][0]["train_loss"] == pytest.approx(side_by_side["history"][0]["train_loss"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ what it rests on


def test_a_method_moves_its_tensors_and_stays_the_same_method():
    method = clip2fl()
    assert method.to("cpu").identity() == method.identity() and FedProx(mu=0.2).to("cpu") == FedProx(mu=0.2)
    assert method.to("meta").clip_logits.device.type == "meta" and method.clip_logits.device.type == "cpu"


def test_the_threads_are_not_asked(monkeypatch):
    monkeypatch.setattr(federated, "client_step", None)
    assert len(run(together=True).history) == 2
