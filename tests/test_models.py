import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, resnet50

from mllmfl_lite.models import (
    CompactModel,
    build_model,
    count_parameters,
    load_model,
    resnet8,
    save_model,
    with_head,
)


def test_parameter_counts_of_the_benchmarks():
    assert count_parameters(resnet8(10)) == 1_227_594
    assert count_parameters(resnet8(100)) == 1_250_724
    assert count_parameters(resnet8(10).body) == 1_225_024


def shortcut(inside, outside, stride):
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))


def test_resnet8_computes_what_torchvisions_blocks_compute():
    """The same network built from torchvision's blocks, with our weights, gives our logits and our gradients."""
    ours, w = resnet8(7, width=8), 8
    theirs = nn.Sequential(
        nn.Conv2d(3, w, 3, padding=1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
        BasicBlock(w, w), BasicBlock(w, 2 * w, 2, shortcut(w, 2 * w, 2)),
        BasicBlock(2 * w, 4 * w, 2, shortcut(2 * w, 4 * w, 2)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 7),
    )  # fmt: skip
    tensors = list(ours.state_dict().values())
    theirs.load_state_dict(dict(zip(theirs.state_dict(), tensors, strict=True)))
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).sum().backward()
    theirs(x).sum().backward()
    torch.testing.assert_close(ours.body[0].weight.grad, theirs[0].weight.grad, rtol=1e-4, atol=1e-4)


def test_resnet50_is_torchvisions():
    model, reference = build_model("resnet50", 11), resnet50(num_classes=11)
    assert count_parameters(model) == count_parameters(reference)
    reference.load_state_dict(dict(zip(reference.state_dict(), model.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))
    assert model.features(x).shape == (2, 2048)


def test_features_tokens_and_head_fit_together():
    model = resnet8(5, width=4).eval()
    x = torch.randn(3, 3, 32, 32)
    tokens = model.tokens(x, 4)
    assert tokens.shape == (3, 16, 16) and model.num_features == 16
    torch.testing.assert_close(tokens.mean(1), model.features(x))
    torch.testing.assert_close(model.tokens(x, 1)[:, 0], model.features(x))
    torch.testing.assert_close(model(x), model.head(model.features(x)))


def test_tokens_stand_row_by_row():
    picture = torch.arange(16.0).view(1, 1, 4, 4)
    assert CompactModel(nn.Identity(), 1, 2).tokens(picture, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_a_small_map_is_repeated_to_a_large_grid():
    picture = torch.tensor([[1.0, 2], [3, 4]]).view(1, 1, 2, 2)
    tokens = CompactModel(nn.Identity(), 1, 2).tokens(picture, 4).view(4, 4)
    assert tokens.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


@pytest.mark.parametrize("grid", [0, 3, 12])
def test_a_grid_that_does_not_divide_is_refused(grid):
    with pytest.raises(ValueError, match=rf"the map is 8 x 8, the grid {grid} x {grid}"):
        resnet8(2, width=2).tokens(torch.zeros(1, 3, 32, 32), grid)


def test_initial_weights_depend_on_the_seed_and_leave_torchs_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (build_model("resnet8", 3, 4, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_unknown_models_and_sizes_are_refused():
    with pytest.raises(ValueError, match="no model named 'vgg'; there are resnet8, resnet50"):
        build_model("vgg", 10)
    with pytest.raises(ValueError, match="must be at least 1; got 10 and 0"):
        build_model("resnet8", 10, width=0)


def test_the_shortcut_is_a_strided_convolution():
    """Stride first, then 1x1: the same numbers as torch's own strided convolution, in float64."""
    block = resnet8(3, width=4).body[4].double().eval()
    x = torch.randn(2, 4, 32, 32, dtype=torch.float64)
    conv, norm = block.shortcut
    expected = norm(torch.nn.functional.conv2d(x, conv.weight, stride=2))
    assert block.shortcut.stride == 2
    torch.testing.assert_close(block.shortcut(x), expected)


def test_a_saved_model_comes_back_and_anything_else_is_refused(tmp_path):
    model = build_model("resnet8", 7, width=2, seed=5)
    save_model(tmp_path / "model.safetensors", model, "resnet8", 2)
    found = load_model(tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), found.state_dict().values(), strict=True))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("cut", "other", "absent"):
        with pytest.raises(ValueError, match=rf"{name}.safetensors holds no model written by save_model .*remove it"):
            load_model(tmp_path / f"{name}.safetensors")


def test_a_model_is_written_with_the_same_bytes_each_time_and_damage_is_found(tmp_path):
    model = build_model("resnet8", 3, width=4, seed=1)
    for name in "ab":
        save_model(tmp_path / name, model, "resnet8", 4, ("cat", "dog", "bird"))
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    places = np.random.default_rng(0).integers(8, len(content), 40).tolist()
    for place in [*places, content.index(b"dog"), content.index(b"bird")]:
        damaged = bytearray(content)
        damaged[place] ^= 4
        (tmp_path / "b").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"holds no model|is damaged"):
            load_model(tmp_path / "b")


def test_class_names_travel_with_a_model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, build_model("resnet8", 2, width=2), "resnet8", 2, ("cat", "été"))
    found = load_model(path)
    assert found.names == ("cat", "été") and with_head(found, 2).names == ()
    save_model(path, found, "resnet8", 2)
    assert load_model(path).names == ("cat", "été"), "kept when it is saved again"
    with pytest.raises(ValueError, match="2 class names, 1 given"):
        save_model(path, found, "resnet8", 2, ("cat",))


def test_weights_without_a_checksum_are_read(tmp_path):
    model = build_model("resnet8", 2, width=2)
    about = {"name": "resnet8", "width": "2", "num_classes": "2"}
    safetensors.torch.save_file(model.state_dict(), tmp_path / "old", about)
    found = load_model(tmp_path / "old")
    assert torch.equal(found.head.weight, model.head.weight) and found.names == ()
