from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from conftest import make_imagenet_teacher
from torch.nn.functional import cross_entropy

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.federated import METHODS, FedAvg, Federation, FedSettings, creff
from mllmfl_lite.federated import run_federated as run_on
from mllmfl_lite.federated.clip2fl import CLIP2FL
from mllmfl_lite.federated.creff import HEAD, CReFF, head_gradients, mean_by_class
from mllmfl_lite.measure.cost import PeakMemory
from mllmfl_lite.models import distillation
from mllmfl_lite.repro import Execution, torch_generator
from mllmfl_lite.runs import Experiment, load_federation
from mllmfl_lite.runs.parts import make_method
from mllmfl_lite.teachers.clip import ClipTeacher

FEW = load_federation(Experiment("cifar10_mini", num_clients=10)).train
QUICK = FedSettings(rounds=2, clients_per_round=2, local_epochs=1, batch_size=16, lr=0.05)
SMALL = {"per_class": 5, "match_steps": 5, "head_epochs": 3, "repeats": 2}


def run_federated(model, train, split, test, method, settings, **execution):
    return run_on(model, Federation(train, split, test), method, settings, 0, Execution(device="cpu", **execution))


def clip2fl(images, **options):
    torch.manual_seed(0)
    words = torch.nn.functional.normalize(torch.randn(3, 7), dim=1)
    return CLIP2FL(clip_logits=torch.randn(len(images), 3), text_features=words, **SMALL, **options)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------ CReFF


@pytest.mark.parametrize("groups", [(), (4,), (2, 3)])
def test_head_gradients_are_autograds(groups):
    torch.manual_seed(0)
    features, labels = torch.randn(*groups, 6, 5), torch.randint(3, (*groups, 6))
    weight, bias = torch.randn(3, 5, requires_grad=True), torch.randn(3, requires_grad=True)
    found = head_gradients(features, labels, weight, bias).flatten(0, -3) if groups else None
    found = head_gradients(features, labels, weight, bias)[None] if found is None else found
    for mine, f, y in zip(found, features.reshape(-1, 6, 5), labels.reshape(-1, 6), strict=True):
        by_autograd = torch.autograd.grad(cross_entropy(f @ weight.T + bias, y), (weight, bias))
        torch.testing.assert_close(mine[:, :-1], by_autograd[0])
        torch.testing.assert_close(mine[:, -1], by_autograd[1])


def test_a_step_of_matching_follows_the_gradient_of_the_cosines():
    """One step from the same start, with the loss written out class by class and row by row."""
    method = CReFF(per_class=4, match_steps=1)
    torch.manual_seed(1)
    features, wanted = torch.randn(3, 4, 5), torch.randn(2, 3, 6)
    head, present = [torch.randn(3, 5), torch.randn(3)], torch.tensor([0, 2])
    moved = method._match({"features": features}, wanted, present, head)["features"]

    free = features.clone().requires_grad_()
    loss = 0
    for goal, c in zip(wanted, present.tolist(), strict=True):
        w, b = (t.clone().requires_grad_() for t in head)
        of_w, of_b = torch.autograd.grad(
            cross_entropy(free[c] @ w.T + b, torch.full((4,), c)), (w, b), create_graph=True
        )
        for row in range(3):
            mine = torch.cat([of_w[row], of_b[row : row + 1]])
            loss = loss + 1 - (mine @ goal[row]) / (mine.norm() * goal[row].norm())
    torch.testing.assert_close(moved, features - 0.1 * torch.autograd.grad(loss, free)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(moved[1], features[1]), "a class that nobody holds stays"


def test_matching_brings_gradients_nearer():
    torch.manual_seed(2)
    real, head = torch.randn(3, 30, 8), [torch.randn(3, 8), torch.randn(3)]
    labels = torch.arange(3)[:, None].expand(-1, 30)
    wanted, start = head_gradients(real, labels, *head), {"features": torch.randn(3, 20, 8)}

    def distance(features):
        found = head_gradients(features, labels[:, :20], *head)
        return (1 - torch.cosine_similarity(found, wanted, dim=-1)).sum()

    after = CReFF(per_class=20)._match(start, wanted, torch.arange(3), head)["features"]
    assert distance(after) < 0.3 * distance(start["features"])


def test_a_client_sends_the_mean_gradient_of_each_class_it_holds(images, model, monkeypatch):
    monkeypatch.setattr(creff, "strongly_augmented", lambda batches, rows, generator: batches.plain(rows))
    indices = torch.from_numpy(np.flatnonzero(images.labels != 1))
    head = {name: t.detach() + 0.1 for name, t in model.named_parameters() if name in HEAD}
    sent = CReFF(images=1000, repeats=2).upload(model, Batches(images), indices, head, torch_generator(0))
    assert sent["classes"].tolist() == [0, 2] and sent["gradients"].shape == (2, 3, model.num_features + 1)
    model.load_state_dict({**model.state_dict(), **head})
    for c, mine in zip((0, 2), sent["gradients"], strict=True):
        rows = indices[Batches(images).labels[indices] == c]
        loss = cross_entropy(model.eval()(Batches(images).plain(rows)), torch.full((len(rows),), c))
        weight, bias = torch.autograd.grad(loss, (model.head.weight, model.head.bias))
        torch.testing.assert_close(mine, torch.cat([weight, bias[:, None]], 1), rtol=1e-3, atol=1e-5)


def test_gradients_are_averaged_over_the_clients_that_hold_a_class():
    ones = torch.ones(1, 3, 2)
    uploads = [
        {"classes": torch.tensor([0, 2]), "gradients": torch.cat([ones, 2 * ones])},
        {"classes": torch.tensor([2]), "gradients": 4 * ones},
    ]
    mean, present = mean_by_class(uploads, 3)
    assert present.tolist() == [0, 2] and mean[:, 0, 0].tolist() == [1.0, 0.0, 3.0]


BAD_UPLOADS = {
    "shape": (lambda u: u.update(gradients=u["gradients"][:, :2]), "gradients must be torch.float32"),
    "type": (lambda u: u.update(gradients=u["gradients"].double()), "it sent torch.float64"),
    "outside": (lambda u: u["classes"].fill_(3), "whole numbers from 0 to 2, each once; it sent"),
    "negative": (lambda u: u["classes"].sub_(9), "whole numbers from 0 to 2"),
    "twice": (lambda u: u["classes"].fill_(u["classes"][0]), "each once"),
    "floats": (lambda u: u.update(classes=u["classes"].float()), "whole numbers"),
    "none": (lambda u: u.update(classes=u["classes"][:0], gradients=u["gradients"][:0]), "whole numbers"),
    "missing": (lambda u: u.pop("classes"), "classes and gradients are wanted"),
    "huge": (lambda u: u["gradients"].fill_(1e30), "impossibly large"),
    "bias": (lambda u: u["gradients"][..., -1].fill_(1.1), "impossibly large"),
    "features": (lambda u: u["gradients"][..., 0].fill_(1e5), "impossibly large"),
}


@pytest.mark.parametrize("fault", BAD_UPLOADS)
def test_an_impossible_upload_is_refused(images, model, fault):
    method, state = CReFF(**SMALL), model.state_dict()
    indices = torch.arange(20)
    sent = method.upload(model, Batches(images), indices, {name: state[name] for name in HEAD}, torch_generator(0))
    method.check_upload(sent, state)
    spoil, reason = BAD_UPLOADS[fault]
    spoil(sent)
    with pytest.raises(ValueError, match=reason):
        method.check_upload(sent, state)


def test_the_fresh_head_separates_what_can_be_separated():
    features = torch.eye(3)[:, None].expand(-1, 10, -1) + 0.01 * torch.randn(3, 10, 3)
    weight, bias = CReFF(head_lr=0.1)._fresh_head(features, torch_generator(0))
    assert (features @ weight.T + bias).argmax(-1).equal(torch.arange(3)[:, None].expand(-1, 10))


def test_strong_augmentation_changes_each_image_its_own_way_and_is_repeatable(images):
    batches, rows = Batches(images), torch.zeros(8, dtype=torch.long)
    one, again = (creff.strongly_augmented(batches, rows, torch_generator(3)) for _ in range(2))
    assert torch.equal(one, again) and len({tuple(x.flatten().tolist()) for x in one}) == 8
    assert one.shape == batches.plain(rows).shape and torch.isfinite(one).all()


# ------------------------------------------------------------------------------------------------ CLIP2FL


def test_the_clients_loss_by_hand(images, model):
    """CE + T^2 sum_c q_c (log q_c - log p_c), with every number written out."""
    method, rows = clip2fl(images, distill=0.5, temperature=3.0), torch.tensor([4, 9])
    x, y = Batches(images).plain(rows), Batches(images).labels[rows]
    found = method.local_loss(model.eval(), x, y, rows, {}).item()
    out, teacher = model(x).detach().double().numpy(), method.clip_logits[rows].double().numpy()

    def softened(z):
        e = np.exp(z / 3.0)
        return e / e.sum(1, keepdims=True)

    p = np.exp(out) / np.exp(out).sum(1, keepdims=True)
    ce = -np.mean([np.log(p[i, c]) for i, c in enumerate(y.tolist())])
    q, s = softened(teacher), softened(out)
    assert found == pytest.approx(ce + 0.5 * 9.0 * np.mean((q * (np.log(q) - np.log(s))).sum(1)), rel=1e-4)


def test_distillation_of_oneself_costs_nothing():
    logits = torch.randn(4, 5)
    assert distillation(logits, logits + 7, 3.0).item() == pytest.approx(0, abs=1e-6)
    assert distillation(logits, torch.randn(4, 5), 3.0).item() > 0


def test_the_contrastive_term_by_hand(images):
    method = clip2fl(images, contrast=2.0, contrast_temperature=0.5)
    features, classes, linear = torch.randn(2, 4, 5), torch.tensor([0, 2]), torch.randn(7, 5)
    found = method.other_loss(features, classes, {"map": linear}).item()
    total = 0
    for group, c in zip(features, classes.tolist(), strict=True):
        prototype = linear @ group.mean(0)
        near = [(prototype @ t / (prototype.norm() * t.norm())).item() / 0.5 for t in method.text_features]
        total += -np.log(np.exp(near[c]) / np.exp(near).sum())
    assert found == pytest.approx(2.0 * total / 2, rel=1e-4)


def test_clip2fl_without_clip_is_creff_to_the_bit(images, model, split):
    silent = clip2fl(images, distill=0.0, contrast=0.0)
    runs = [run_federated(model, images, split, images, m, QUICK) for m in (CReFF(**SMALL), silent)]
    assert equal(runs[0].state, runs[1].state)  # the bodies; heads are trained from other random numbers


def test_clip2fl_needs_clip(images):
    with pytest.raises(TypeError, match="clip_logits"):
        CLIP2FL()
    with pytest.raises(ValueError, match="there are 3 and 4"):
        CLIP2FL(clip_logits=torch.zeros(5, 3), text_features=torch.zeros(4, 7))


def test_an_imagenet_network_can_take_clips_place(monkeypatch):
    teacher, asked = make_imagenet_teacher(size=8), []
    monkeypatch.setattr("mllmfl_lite.teachers.load_imagenet", lambda *a, **k: asked.append(a) or teacher)
    few = FEW.subset(np.arange(6))
    method = make_method(Experiment(method="clip2fl", clip="efficientnet_lite2"), few)
    assert asked[0][0] == "efficientnet_lite2"
    assert torch.equal(method.clip_logits, teacher.class_logits(few.images, few.names))
    assert torch.equal(method.text_features, teacher.class_features(few.names))
    assert (method.clip_flops, method.clip_bytes) == teacher.image_cost()


def test_clip_is_asked_about_the_clients_images():
    few = FEW.subset(np.arange(6))
    method = CLIP2FL.for_clients(few, "tiny_clip")
    assert method.clip_logits.shape == (6, 10) and method.clip_flops > 1e6 and method.clip_bytes > 1e6
    torch.testing.assert_close(method.text_features.norm(dim=1), torch.ones(10))


def test_clips_answers_are_kept_and_not_asked_for_again(tmp_path, monkeypatch):
    few = FEW.subset(np.arange(6))
    experiment = Experiment(method="clip2fl")
    fresh = make_method(experiment, few, tmp_path)
    assert torch.equal(fresh.clip_logits, CLIP2FL.for_clients(few).clip_logits)
    monkeypatch.setattr(ClipTeacher, "features", None)
    again = make_method(experiment, few, tmp_path)
    assert again.identity() == fresh.identity() and len(list(tmp_path.rglob("*.npy"))) == 1
    with pytest.raises(ValueError, match="not callable"):  # other images are asked about
        make_method(experiment, few.subset(np.arange(3)), tmp_path)


# ------------------------------------------------------------------------------------------------ in the rounds


def test_fedavg_in_the_framework_is_fedavg(images, model, split):
    """What goes on from round to round under CReFF is FedAvg's model, bit for bit; what is tested has another head."""
    plain = run_federated(model, images, split, images, FedAvg(), QUICK)
    mended = run_federated(model, images, split, images, CReFF(**SMALL), QUICK)
    assert equal(plain.state, mended.state) and equal(plain.state, plain.deployed)
    assert [n for n in plain.state if not torch.equal(plain.state[n], mended.deployed[n])] == list(HEAD)


def test_what_is_tested_is_what_is_deployed(images, model, split):
    """Deployed weights that name the last class always, whatever the clients have learned."""
    run = run_federated(model, images, split, images, Stubborn(), QUICK)
    assert [record["metrics"]["per_class"] for record in run.history] == [[0.0, 0.0, 1.0]] * 2
    assert run.deployed["head.bias"].tolist() != run.state["head.bias"].tolist()


@dataclass(frozen=True)
class Stubborn(FedAvg):
    """Never learns, as far as one can see."""

    def deployed(self, state, server_state):
        return {**state, "head.weight": 0 * state["head.weight"], "head.bias": torch.tensor([0.0, 0.0, 1.0])}


def test_a_client_uploads_from_all_its_images_and_the_weights_as_they_arrived(images, model, split):
    method = Witness()
    run = run_federated(model, images, split, images, method, replace(QUICK, rounds=1))
    chosen = run.history[0]["clients"]
    assert [sent["rows"].tolist() for sent in method.seen] == [split[client].tolist() for client in chosen]
    assert all(torch.equal(sent["bias"], model.head.bias) for sent in method.seen)
    assert all(sent["received"].item() == 7 for sent in method.seen)


@dataclass(frozen=True)
class Witness(FedAvg):
    """Clients send what they see; the server writes it down."""

    seen: list = field(default_factory=list)

    def broadcast(self, server_state):
        return {"seven": torch.tensor(7)}

    def upload(self, model, batches, indices, received, generator):
        return {"rows": indices, "bias": model.head.bias.detach().clone(), "received": received["seven"]}

    def check_upload(self, extra, state):
        pass

    def server_update(self, state, mean, server_state, uploads, generator):
        self.seen.extend(uploads)
        return mean, server_state


@pytest.mark.parametrize("make", [lambda _: CReFF(**SMALL), clip2fl])
def test_workers_and_stops_change_no_bit(images, model, split, tmp_path, make):
    method = make(images)
    whole = run_federated(model, images, split, images, method, QUICK, workers=1)
    other = run_federated(model, images, split, images, method, QUICK, workers=3)
    run_federated(model, images, split, images, method, replace(QUICK, rounds=1), folder=tmp_path)
    resumed = run_federated(model, images, split, images, method, QUICK, folder=tmp_path)
    assert equal(whole.deployed, other.deployed) and equal(whole.deployed, resumed.deployed)


def test_another_clip_is_another_run(images):
    one, two = clip2fl(images), replace(clip2fl(images), clip_logits=torch.zeros(len(images), 3))
    assert one.identity() != two.identity() and one.identity() == clip2fl(images).identity()


@dataclass(frozen=True)
class HeadOnly(FedAvg):
    """A method of one's own, as a reader would write it: the server takes the clients' heads and keeps its body."""

    def server_update(self, state, mean, server_state, uploads, generator):
        return {**state, **{name: mean[name] for name in HEAD}}, server_state


def test_a_sixth_method_takes_one_file(images, model, split):
    start = model.state_dict()
    method = make_method(Experiment(method="test_baselines:HeadOnly"), images)
    state = run_federated(model, images, split, images, method, QUICK).state
    assert {n for n in state if not torch.equal(state[n], start[n])} == set(HEAD)


@pytest.mark.parametrize("name", ["creff", "clip2fl"])
def test_matching_a_few_classes_at_a_time_gives_the_same_features_and_holds_less(monkeypatch, name):
    classes, width, draw = 12, 40, torch.Generator().manual_seed(0)
    options = {"per_class": 4, "match_steps": 3, "head_epochs": 1}
    if name == "clip2fl":
        texts = torch.randn(classes, 6, generator=draw)
        options |= {"clip_logits": torch.zeros(1, classes), "text_features": texts / texts.norm(dim=1, keepdim=True)}
    method = METHODS[name](**options)
    head = {"head.weight": torch.randn(classes, width, generator=draw), "head.bias": torch.zeros(classes)}
    server_state = method.init_server_state(head, torch_generator(0, "memory"))
    sent = {"classes": torch.arange(classes), "gradients": torch.randn(classes, classes, width + 1, generator=draw)}
    found, peaks = [], []
    for at_once in (2**27, 2 * classes * (width + 1)):
        monkeypatch.setattr(creff, "MATCHED", at_once)
        with PeakMemory() as meter:
            found.append(method.server_update({}, {}, server_state, [sent], torch_generator(0, "server"))[1])
        peaks.append(meter.peak)
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-5, atol=1e-6)
    assert peaks[1] < peaks[0] / 2
    assert not torch.equal(found[0]["features"], server_state["features"])
