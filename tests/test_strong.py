"""Strong augmentation: each operation against torchvision's own AutoAugment, the square, chance, order of images."""

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.folders import folder_images
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.strong import CUTOUT, POLICIES, _square, change, strong_views
from mllmfl_lite.federated import FedAvg, Federation, FedSettings, FedYoYo, run_federated
from mllmfl_lite.models import build_model
from mllmfl_lite.repro import torch_generator


@pytest.fixture(scope="module")
def batches():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    return Batches(ImageSet(pixels, np.arange(40) % 4, tuple("abcd"), "noise"))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("policy", range(len(POLICIES)))
def test_operations_are_torchvisions(policy, turn, sign, monkeypatch):
    """One operation of each policy, forced to happen; pixels may be rounded to the neighbouring level."""
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch_generator(0, "images"))
    chance, signs = torch.full((2,), 2.0), torch.full((2,), 0 if sign < 0 else 1)
    chance[turn] = 0
    monkeypatch.setattr(AutoAugment, "get_params", staticmethod(lambda count: (policy, chance, signs)))
    operation, _, level = POLICIES[policy][turn]
    wanted = AutoAugment(AutoAugmentPolicy.CIFAR10)(images)
    assert (change(images, operation, level, sign).int() - wanted.int()).abs().max() <= 1


def test_each_image_is_changed_by_itself(batches):
    """An image's view depends on its place and on the generator, not on the images beside it."""
    rows = torch.arange(12)
    one = strong_views(batches, rows, torch_generator(1, "x"))
    other = rows.clone()
    other[1:] = 30
    assert torch.equal(one[0], strong_views(batches, other, torch_generator(1, "x"))[0])
    assert one.shape == (12, 3, 32, 32) and one.dtype == torch.float32 and len({float(x.sum()) for x in one}) == 12


def test_the_square_is_blank_and_cut_at_the_border():
    marked = _square(torch.tensor([[0, 16, 31], [16, 16, 0]]), torch.Size((32, 32)))
    half = CUTOUT // 2
    assert marked.sum((1, 2, 3)).tolist() == [half * CUTOUT, CUTOUT**2, (half + 1) * half]
    assert marked[1, 0, 8:24, 8:24].all()


def test_every_view_has_a_square(batches):
    views = strong_views(batches, torch.arange(40), torch_generator(2, "x"))
    assert ((views == 0).all(1).sum((1, 2)) >= (CUTOUT // 2) ** 2).all()


def test_a_stream_is_the_views_in_order(batches):
    parts = torch.arange(10).split(4)
    generator = torch_generator(3, "x")
    wanted = [strong_views(batches, part, generator) for part in parts]
    assert all(map(torch.equal, FedAvg().views(batches, parts, torch_generator(3, "x"), "strong"), wanted))


@pytest.mark.parametrize(("augment", "method"), [("strong", FedAvg()), ("weak", FedYoYo())])
def test_images_in_files_are_refused_before_the_first_round(augment, method, tmp_path):
    for i in range(4):
        Image.fromarray(make_images(4, size=40).images[i]).save(tmp_path / f"{i}.png")
    files = folder_images(tmp_path, 32)
    federation = Federation(files, [np.arange(4)], files)
    settings = FedSettings(rounds=1, clients_per_round=1, local_epochs=1, batch_size=4, augment=augment)
    with pytest.raises(ValueError, match="strong views are for images in memory"):
        run_federated(build_model("resnet8", 1, width=4), federation, method, settings)
