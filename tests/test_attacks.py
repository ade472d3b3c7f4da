"""Attacks and defences against closed forms, a synthetic case with a known answer, and published figures."""

import math
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from opacus.accountants.analysis import rdp
from scipy.stats import norm
from torch import nn

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.federated import FedAvg, FedSettings, Task, train_client
from mllmfl_lite.federated.aggregate import distance, weights_of
from mllmfl_lite.federated.creff import head_gradients
from mllmfl_lite.measure import attacks
from mllmfl_lite.measure.defences import clipped_and_noised
from mllmfl_lite.stages.server_set import draw_server_set

CHAPTER = Path(__file__).parent.parent / "notebooks" / "09_what_leaks_and_what_it_costs.ipynb"


def update_norm(state, anchor):
    return distance(state, anchor, weights_of(anchor))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------- attacks


@pytest.mark.parametrize(("classes", "width", "label"), [(2, 3, 1), (10, 64, 7), (100, 256, 0)])
def test_features_come_back_from_one_images_gradient(classes, width, label):
    draws = generator(classes)
    weight, bias = torch.randn(classes, width, generator=draws) / width, torch.randn(classes, generator=draws)
    features = torch.randn(1, width, generator=draws)
    gradient = head_gradients(features, torch.tensor([label]), weight, bias)
    torch.testing.assert_close(attacks.input_from_gradient(gradient, label), features[0], atol=1e-4, rtol=1e-4)


def test_several_images_give_their_mean_weighted_by_errors():
    gradient = torch.zeros(1, 3)
    errors, features = torch.tensor([-0.5, -0.25]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    gradient[0, :2], gradient[0, 2] = errors @ features / 2, errors.mean()
    torch.testing.assert_close(attacks.input_from_gradient(gradient, 0), torch.tensor([2 / 3, 1 / 3]))


def test_a_row_without_error_is_refused():
    with pytest.raises(ValueError, match="row 1 has no error to divide by"):
        attacks.input_from_gradient(torch.zeros(2, 4), 1)


def test_the_bias_of_an_absent_class_only_falls(images, model):
    own = torch.from_numpy(np.flatnonzero(images.labels != 2)[:16])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    settings = FedSettings(rounds=1, clients_per_round=1, local_epochs=3, batch_size=8)
    train_client(model, Batches(images), own, FedAvg(), settings, Task(before, {}, 1, 0))
    after = model.state_dict()
    assert after["head.bias"][2] < before["head.bias"][2]
    assert attacks.surely_held(before, after) and 2 not in attacks.surely_held(before, after)


def test_an_inversion_finds_the_picture():
    """Of 6 x 6 pixels, through one linear layer with a bias: the gradient has it in closed form."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), torch.randn(1, 3, 6, 6), torch.tensor([1])
    seen = attacks.gradient_of(model, x, y)
    exact = attacks.input_from_gradient(torch.cat([seen[0], seen[1][:, None]], 1), 1)
    torch.testing.assert_close(exact.view_as(x), x, atol=1e-4, rtol=1e-4)
    found = attacks.invert_gradient(model, seen, torch.zeros_like(x), y, 200, smooth=0.0)
    assert (found - x).square().mean() < 0.05 * x.square().mean()


def test_batchnorm_in_training_mode_is_refused(model):
    x, y = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"training mode.*call model.eval\(\)"):
        attacks.invert_gradient(model.train(), [], x, y, 1)
    assert attacks.invert_gradient(model.eval(), attacks.gradient_of(model, x, y), x, y, 1).shape == x.shape


def test_total_variation_by_hand():
    steps = torch.tensor([[0.0, 1.0], [0.0, 3.0]]).expand(1, 3, 2, 2)
    assert attacks.total_variation(steps).item() == pytest.approx((1 + 3) / 2 + (0 + 2) / 2)


def test_psnr_and_ssim():
    x = torch.rand(2, 3, 16, 16, generator=generator())
    assert attacks.psnr(x * 0 + 0.5, x * 0 + 0.6).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)
    assert attacks.ssim(x, x).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    a, b, first = 0.25, 0.75, 0.01**2  # flat pictures: only their brightness is compared
    flat = attacks.ssim(torch.full_like(x, a), torch.full_like(x, b))
    assert flat.tolist() == pytest.approx(2 * [(2 * a * b + first) / (a * a + b * b + first)], abs=1e-3)
    assert (attacks.ssim(1 - x, x) < 0).all()


def test_pictures_leave_their_normalisation(images):
    pixels = torch.from_numpy(images.images[:4]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(attacks.in_unit_range(Batches(images).plain(torch.arange(4))), pixels)


def test_confidence_is_the_logit_of_the_right_class(images, model):
    logits = model.eval()(Batches(images).plain(torch.arange(5)))
    p = logits.softmax(1).gather(1, torch.from_numpy(images.labels[:5])[:, None])[:, 0]
    found = attacks.confidences(model, images)[:5]
    np.testing.assert_allclose(found, (p / (1 - p)).log().detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_lira_is_the_best_test_where_the_answer_is_known(shift):
    """Members score `shift` deviations higher, each image around a level of its own: the ROC curve is known."""
    rng, count, shadows = np.random.default_rng(0), 4000, 64
    level, member = 5 * rng.normal(size=count), rng.random((shadows, count)) < 0.5
    seen = level + shift * member + rng.normal(size=(shadows, count))
    truth = rng.random(count) < 0.5
    scores = attacks.lira(level + shift * truth + rng.normal(size=count), seen, member)
    assert attacks.auc(scores, truth) == pytest.approx(norm.cdf(shift / math.sqrt(2)), abs=0.03)
    assert attacks.tpr_at(scores, truth, 0.1) == pytest.approx(norm.cdf(shift + norm.ppf(0.1)), abs=0.06)


def test_lira_by_hand():
    member = np.array([[True], [True], [False], [False]])
    shadows = np.array([[2.0], [4.0], [-1.0], [1.0]])
    (score,) = attacks.lira(np.array([3.0]), shadows, member)
    assert score == pytest.approx(norm.logpdf(3, 3, 2**0.5) - norm.logpdf(3, 0, 2**0.5))
    with pytest.raises(ValueError, match="two shadow models or more"):
        attacks.lira(np.zeros(1), shadows, np.array([[True], [False], [False], [False]]))


def test_roc_by_hand():
    scores, member = np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False])
    false, true = attacks.roc(scores, member)
    assert false.tolist() == [0, 0, 0.5, 1] and true.tolist() == [0, 0.5, 1, 1]
    assert attacks.auc(scores, member) == pytest.approx(0.875)
    assert attacks.tpr_at(scores, member, 0.4) == 0.5 and attacks.tpr_at(scores, member, 0.5) == 1
    with pytest.raises(ValueError, match="members and others"):
        attacks.roc(scores, np.ones(4, bool))


# ------------------------------------------------------------------------------------------------------------ defences


def moved(model, by):
    state = {name: t.clone() for name, t in model.state_dict().items()}
    return state, {name: t + by if t.is_floating_point() else t + 1 for name, t in state.items()}


@pytest.mark.parametrize("by", [1e-4, 1.0])
def test_an_update_is_at_most_as_long_as_clip(model, by):
    anchor, state = moved(model, by)
    sent = clipped_and_noised(state, anchor, clip=0.5, noise=0.0, generator=generator())
    assert update_norm(sent, anchor) == pytest.approx(min(0.5, update_norm(state, anchor)), rel=1e-4)
    assert all(torch.equal(sent[name], anchor[name]) for name in anchor.keys() - set(weights_of(anchor)))
    count = sum(anchor[name].numel() for name in weights_of(anchor))
    assert update_norm(state, anchor) == pytest.approx(by * count**0.5, rel=1e-3)


def test_noise_has_its_deviation(model):
    anchor, _ = moved(model, 0.0)
    sent = clipped_and_noised(anchor, anchor, clip=2.0, noise=0.5, generator=generator())
    drawn = torch.cat([(sent[name] - anchor[name]).flatten() for name in weights_of(anchor)])
    assert drawn.std().item() == pytest.approx(1.0, abs=5 / (2 * len(drawn)) ** 0.5)


@pytest.mark.parametrize(("clip", "noise", "says"), [(0.0, 1.0, "above 0; got 0.0"), (1.0, -1.0, "0 or more; got -1")])
def test_bad_numbers_are_refused(model, clip, noise, says):
    anchor, state = moved(model, 1.0)
    with pytest.raises(ValueError, match=says):
        clipped_and_noised(state, anchor, clip, noise, generator())


def test_a_pool_that_is_empty_after_exclusions_is_refused():
    pool = ImageSet(np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, np.int64), ("a", "b"), "made/web")
    with pytest.raises(ValueError, match="with at least one image"):
        draw_server_set(pool, torch.zeros(0, 2), ["a", "b"], 1)


# ------------------------------------------------------------------------------------------ the accountant and the page


def test_the_accountant_gives_the_published_epsilon():
    """Abadi et al. (2016), section 5: q = 0.01, sigma = 4, 10,000 steps, delta = 1e-5 give 1.26 by moments up to 32."""
    orders = list(range(2, 34))
    spent = rdp.compute_rdp(q=0.01, noise_multiplier=4.0, steps=10_000, orders=orders)
    assert round(min(r + math.log(1e5) / (a - 1) for r, a in zip(spent, orders, strict=True)), 2) == 1.26


def from_page(name):
    """The function of that name as the chapter defines it."""
    cells = nbformat.read(CHAPTER, as_version=4).cells
    (source,) = [c.source for c in cells if c.cell_type == "code" and f"def {name}(" in c.source]
    function = source[source.index(f"def {name}(") :].split("\n\n")[0]
    space = {"np": np, "torch": torch, "math": math}
    exec(function, space)
    return space[name]


def test_the_pages_masks_cancel_exactly():
    masked, rng = from_page("masked"), np.random.default_rng(0)
    numbers = rng.integers(0, 2**64, (5, 1000), np.uint64)
    sent = masked(numbers, seed=3)
    assert np.array_equal(sent.sum(0, dtype=np.uint64), numbers.sum(0, dtype=np.uint64))
    assert not (sent == numbers).any()


def test_the_pages_epsilon_is_an_upper_bound_that_grows_with_rounds():
    """Exact for Gaussian noise (Balle and Wang, 2018): delta of epsilon in closed form."""
    epsilon_of = from_page("epsilon_of")
    for noise, times in ((1.0, 1), (1.0, 12), (4.0, 10)):
        mu, found = times**0.5 / noise, epsilon_of(noise, times, 1e-5)
        delta = norm.cdf(mu / 2 - found / mu) - math.exp(found) * norm.cdf(-mu / 2 - found / mu)
        assert 0 < delta <= 1e-5
    assert epsilon_of(1.0, 2, 1e-5) > epsilon_of(1.0, 1, 1e-5)
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match="above 0"):
            epsilon_of(wrong, 1, 1e-5)
