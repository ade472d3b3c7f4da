"""The ablation controls of `scripts/controls.py`."""

import numpy as np
import pytest
import torch
from conftest import make_images
from controls import even_out, make_wrong, send, swap_words, with_norms_of, without_classes
from standins.claims import objects_in
from torch import nn

from mllmfl_lite.federated import FedAvg
from mllmfl_lite.models import build_model
from mllmfl_lite.stages.records import bundled_annotations
from mllmfl_lite.stages.server_set import draw_server_set


def test_as_many_answers_are_wrong_as_asked_for():
    right = torch.eye(4)[torch.arange(4000) % 4]
    right[:8] = 0.25
    wrong = make_wrong(right, 0.3, seed=1)
    assert torch.equal(make_wrong(right, 0.0, seed=1), right) and torch.equal(wrong[:8], right[:8])
    changed = wrong[8:].argmax(1) != right[8:].argmax(1)
    assert abs(changed.float().mean().item() - 0.3) < 0.03
    shift = (wrong[8:].argmax(1) - right[8:].argmax(1))[changed] % 4
    assert all(abs((shift == k).float().mean().item() - 1 / 3) < 0.05 for k in (1, 2, 3)), "drawn evenly"


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_as_many_texts_name_another_object_as_asked_for(share):
    records = [r for r in bundled_annotations() if r.kind == "detailed_description"][:500]
    swapped = swap_words(records, share, seed=1)
    named, now = ([objects_in(record.text) for record in some] for some in (records, swapped))
    assert sum(a != b for a, b in zip(named, now, strict=True)) == round(share * len(records))
    assert all(len(names) == 1 for names in now) and [r.id for r in swapped] == [r.id for r in records]
    assert all(a.text == b.text for a, b, old, new in zip(records, swapped, named, now, strict=True) if old == new)


def test_two_liars_of_eight_replace_the_mean():
    """Honest clients that have learned nothing more send what they got; then the mean is what the liars trained."""
    start, wanted = (build_model("resnet8", 3, 4, seed).state_dict() for seed in (0, 1))
    sent = [send("door", wanted, start)] * 2 + [start] * 6
    mean = FedAvg().aggregate(start, sent, [10] * 8, torch.Generator())
    for name in (n for n, t in start.items() if t.is_floating_point()):
        torch.testing.assert_close(mean[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_even_answers_favour_no_class():
    answers = torch.rand(500, 5, dtype=torch.float64).softmax(1) * torch.tensor([1.0, 1, 1, 1, 4])
    answers = answers / answers.sum(1, keepdim=True)
    even = even_out(answers, answers)
    torch.testing.assert_close(even.sum(1), torch.ones(500, dtype=torch.float64))
    assert np.ptp(even.mean(0).numpy()) < 0.02 < np.ptp(answers.mean(0).numpy())


def test_a_class_can_be_left_out():
    pool = make_images(12)
    server_set = draw_server_set(pool, torch.eye(3)[torch.from_numpy(pool.labels)] * 1.0, pool.names, 2)
    without = without_classes(server_set, ["class 1"])
    assert without.images.class_counts().tolist() == [2, 0, 2] and without.short == {"class 1": 0}
    assert without.probabilities.argmax(1).tolist() == without.images.labels.tolist()
    with pytest.raises(ValueError, match="there is no class 'lorry' in the set, but: class 0, class 1, class 2"):
        without_classes(server_set, ["lorry"])
    with pytest.raises(ValueError, match="without these classes no picture is left in the set"):
        without_classes(server_set, pool.names)


@pytest.mark.parametrize(("name", "side"), [("resnet8", 16), ("resnet50", 64)])
def test_other_norms_compute_the_same(name, side):
    """Also after a training step's forward pass, where BatchNorm takes the batch's statistics."""
    torch.manual_seed(0)
    model, other = build_model(name, 3, width=4, seed=1), build_model(name, 3, width=4, seed=2)
    for layer in model.body.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data *= 1 + 3 * torch.rand(())
    x = torch.randn(8, 3, side, side)
    model.train()
    model(x)  # running statistics of its own
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    same = with_norms_of(model, other)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in kept.items()), "the first is not changed"
    for of, like in zip(same.body.modules(), other.body.modules(), strict=True):
        if isinstance(of, nn.Conv2d):
            torch.testing.assert_close(of.weight.norm(), like.weight.norm(), rtol=1e-4, atol=0)
    for mode in (False, True):
        torch.testing.assert_close(same.train(mode)(x), model.train(mode)(x), rtol=1e-2, atol=1e-2)
