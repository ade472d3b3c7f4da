"""What leaks from rounds and models, and what defences cost, at laptop scale: one file for each case and seed.

    python scripts/measure_leaks.py                 # half an hour on one core

Every attack is on runs of this book. Membership is measured with models that were trained on random halves of the same
images: each is attacked once, the others are its shadow models. Files that are there are kept.
"""

import copy
import functools
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from sweep import RESULTS, laptop_run, options
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mllmfl_lite.data import load_images
from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.longtail import rank_thirds
from mllmfl_lite.data.metrics import evaluate_model, summarise
from mllmfl_lite.federated import FedAvg, Task, choose_clients, client_step, run_federated, train_client
from mllmfl_lite.federated.aggregate import ClientResult, distance, weighted_mean, weights_of
from mllmfl_lite.federated.federation import Federation
from mllmfl_lite.measure.attacks import (
    auc,
    confidences,
    first_network,
    gradient_of,
    in_unit_range,
    invert_gradient,
    lira,
    psnr,
    roc,
    ssim,
    tpr_at,
)
from mllmfl_lite.measure.defences import clipped_and_noised
from mllmfl_lite.models import CompactModel, build_model, load_model, save_model
from mllmfl_lite.repro import Execution, numpy_generator, torch_generator
from mllmfl_lite.runs import load_federation, load_pool, load_teacher
from mllmfl_lite.runs.results import provenance, save_result
from mllmfl_lite.stages.align import AlignSettings, align
from mllmfl_lite.stages.server_set import draw_server_set
from mllmfl_lite.teachers.answers import ask_teacher

OUT = RESULTS / "laptop" / "leaks"
CLIP = 0.5  # norm of a client's update of the weights
NOISES = (0.0, 0.01, 1.0)  # deviations in units of CLIP, of the sum over a round's clients
EPOCHS = (1, 2, 10)  # local epochs under attack
MODELS = {"update": 8, "aligned": 6, "final": 6}  # random halves of the images and their complements
ROUNDS, WIDTH = 10, 8
LAST = 3  # rounds whose mean is reported
PICTURES = (("first", 1, 0), ("first", 4, 0), ("first", 8, 0), ("first", 8, 2), ("resnet8", 1, 0))
INVERSION = 250  # steps of a reconstruction
ALIGN = AlignSettings(per_class=50, epochs=10)  # a shorter stage 3
GRID = np.geomspace(1e-3, 1, 31)  # false positive rates of the curves kept


def kept(path, label, seed, parameters, make):
    """Make and save one result unless its file is there."""
    if not path.exists():
        found = make()
        head = {"label": label, "parameters": parameters if label in MODELS else {"seed": seed, **parameters}}
        save_result(path, {**head, **found, "provenance": provenance("cpu")})
        print(path.stem, flush=True)


# ------------------------------------------------------------------------------------------- shared between the cases


@functools.cache
def world(seed):
    """The laptop's experiment, but narrower and shorter, since each case is run many times; its images and split."""
    experiment = laptop_run("fedavg", seed).experiment
    federated = replace(experiment.federated, rounds=ROUNDS, eval_every=ROUNDS, report_rounds=LAST)
    experiment = replace(experiment, width=WIDTH, federated=federated)
    return experiment, load_federation(experiment)


def model_of(name, seed, make):
    """A model that is trained once and kept beside the results, not committed."""
    path = OUT / "checkpoints" / f"{name}_seed{seed}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        save_model(path, make(), "resnet8", world(seed)[0].width)
    return load_model(path)


def rounds_of(seed, settings, split=None, method=None, ask=None):
    """Federated rounds from the experiment's first weights: the final model, and the history."""
    experiment, federation = world(seed)
    here = Federation(federation.train, split or federation.split, federation.test)
    start = build_model("resnet8", here.train.num_classes, experiment.width, seed)
    done = run_federated(start, here, method, settings, seed, Execution(device="cpu", workers=1), ask)
    start.load_state_dict(done.deployed)
    return start, done.history


def fedavg(seed):
    """FedAvg's final model."""
    return model_of("fedavg", seed, lambda: rounds_of(seed, world(seed)[0].federated)[0])


@functools.cache
def server_set(seed):
    """The server set of stage 3, and the pool's images."""
    experiment, federation = world(seed)
    pool = load_pool(experiment)
    teacher = load_teacher(replace(experiment, stages=(2, 3)), pool, "cpu")
    answers = ask_teacher(teacher, pool, federation.train.names, OUT / "checkpoints" / "answers")
    return draw_server_set(pool, answers, federation.train.names, ALIGN.per_class)


def scored(model, seed):
    _, federation = world(seed)
    return evaluate_model(model, federation.test, federation.train.class_counts())


def leave_one_out(found, member):
    """Each model is attacked once: AUC and TPR at 1 % FPR by the loss alone and by LiRA; mean curve of LiRA.

    Its shadow models are all but itself and its complement: each image is in one half of them and out of the other.
    """
    rows, curves, scores = [], [], np.empty_like(found)
    for target in range(len(found)):
        others = np.arange(len(found)) // 2 != target // 2
        scores[target] = lira(found[target], found[others], member[others])
        truth, row = member[target], {}
        for name, score in (("loss", found[target]), ("lira", scores[target])):
            row |= {f"{name}_auc": auc(score, truth), f"{name}_tpr": tpr_at(score, truth)}
        rows.append(row)
        curves.append(np.interp(GRID, *roc(scores[target], truth)))
    return {"targets": rows, "curve": {"fpr": GRID.tolist(), "tpr": np.mean(curves, 0).tolist()}}, scores


def halves(labels, seed, name):
    """Which images each model is trained on: a random half of each class, then the other half; bool (M, N)."""
    generator, member = numpy_generator(seed, name), np.zeros((MODELS[name], len(labels)), bool)
    for row in range(0, MODELS[name], 2):
        for c in np.unique(labels):
            own = generator.permutation(np.flatnonzero(labels == c))
            member[row, own[: (len(own) + (row // 2 + c) % 2) // 2]] = True  # odd classes: rounded up and down in turn
        member[row + 1] = ~member[row]
    return member


# ------------------------------------------------------------------------------------------------------------ attacks


def from_update(seed, epochs):
    """Was the picture among the client's? The server knows the weights that it sent, and sees those that came back."""
    experiment, federation = world(seed)
    before, full = fedavg(seed), load_images(experiment.dataset, "train")
    settings = replace(experiment.federated, local_epochs=epochs)
    own = federation.train.subset(federation.split[seed % len(federation.split)])
    unseen = [own.labels.tolist().count(c) for c in range(own.num_classes)]
    generator = numpy_generator(seed, "candidates")
    more = [generator.permutation(np.flatnonzero(full.labels == c))[: 2 * n] for c, n in enumerate(unseen)]
    candidates = full.subset(np.concatenate(more))  # twice as many as the client holds, of the same classes
    member = halves(candidates.labels, seed, "update")
    batches, state, found = Batches(candidates), before.state_dict(), []
    start = confidences(before, candidates)
    for row, chosen in enumerate(member):
        model = build_model("resnet8", own.num_classes, experiment.width)
        task = Task({n: t.clone() for n, t in state.items()}, {}, 1, row, seed)
        train_client(model, batches, torch.from_numpy(np.flatnonzero(chosen)), FedAvg(), settings, task)
        found.append(confidences(model, candidates) - start)
    return {"summary": leave_one_out(np.stack(found), member)[0], "candidates": len(candidates)}


def from_final(seed):
    """Was the picture among any client's? Whoever has the final model can ask."""
    experiment, federation = world(seed)
    train, found = federation.train, []
    member = halves(train.labels, seed, "final")
    for row, chosen in enumerate(member):
        split = [own[chosen[own]] for own in federation.split]
        trained = functools.partial(rounds_of, seed, experiment.federated, split)
        model = model_of(f"half{row}", seed, lambda trained=trained: trained()[0])
        found.append(confidences(model, train))
    summary, scores = leave_one_out(np.stack(found), member)
    return {"summary": {**summary, "groups": by_group(scores, member, train)}, "candidates": len(train)}


def from_aligned(seed):
    """Was the picture in the server's set? Whoever has the aligned model can ask."""
    drawn, found = server_set(seed), []
    member = halves(drawn.images.labels, seed, "aligned")
    for row, chosen in enumerate(member):
        rows = np.flatnonzero(chosen)
        some = replace(drawn, images=drawn.images.subset(rows), rows=drawn.rows[rows],
                       probabilities=drawn.probabilities[torch.from_numpy(rows)])  # fmt: skip
        model = model_of(
            f"aligned{row}", seed, lambda some=some: align(fedavg(seed), some, AlignSettings(), seed).model
        )
        found.append(confidences(model, drawn.images))
    return {"summary": leave_one_out(np.stack(found), member)[0], "candidates": len(drawn)}


def by_group(scores, member, train):
    """AUC by thirds of the classes, for each attacked model."""
    thirds = rank_thirds(train.class_counts())
    return {
        group: [auc(s[inside], m[inside]) for s, m in zip(scores, member, strict=True)]
        for group, inside in ((g, np.isin(train.labels, classes)) for g, classes in thirds.items())
    }


# ----------------------------------------------------------------------------------------------------------- defences


@dataclass(frozen=True)
class Guarded(FedAvg):
    """FedAvg that counts each client once, and measures BatchNorm's statistics anew on open images."""

    model: CompactModel
    open_images: Tensor

    def identity(self):
        """Its name; it is not resumed."""
        return {"name": "Guarded"}

    def aggregate(self, start, states, sizes, generator):
        """The plain mean: the bound on a client's influence does not depend on its size."""
        return weighted_mean(states, [1] * len(states))

    @torch.no_grad()
    def server_update(self, state, mean, server_state, uploads, generator):
        """The mean, with statistics of the open images."""
        self.model.load_state_dict(mean)
        norms = [m for m in self.model.train().modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over batches
        for part in self.open_images.split(256):
            self.model(part)
        return {name: t.clone() for name, t in self.model.state_dict().items()}, server_state


def protecting(seed, settings, noise):
    """Clients that train as usual, then clip and noise. Each adds its share: the sum's deviation is noise * CLIP."""
    experiment, federation = world(seed)
    model = build_model("resnet8", federation.train.num_classes, experiment.width)
    batches, share, norms = Batches(federation.train), noise / settings.clients_per_round**0.5, []

    def ask(state, received, round_, chosen):
        sent = {}
        for client in chosen:
            task, own = Task(state, received, round_, client, seed), torch.from_numpy(federation.split[client])
            done = client_step(model, batches, own, FedAvg(), settings, task)
            norms.append(distance(done.state, state, weights_of(state)))
            safe = clipped_and_noised(done.state, state, CLIP, share, task.generator("privacy"))
            sent[client] = ClientResult(safe, {}, done.loss)
        return sent, {}

    return ask, norms


def guarded(seed, noise):
    """FedAvg with clipped and noised updates, then stage 3 on what the noise has left."""
    experiment, _ = world(seed)
    settings = experiment.federated
    ask, norms = protecting(seed, settings, noise)
    images = Batches(load_pool(experiment)).plain(torch.arange(512))
    method = Guarded(build_model("resnet8", 10, experiment.width), images)
    model, history = rounds_of(seed, settings, method=method, ask=ask)
    drawn = [choose_clients(experiment.num_clients, settings, r, seed) for r in range(1, settings.rounds + 1)]
    aligned = scored(align(model, server_set(seed), ALIGN, seed).model, seed)
    return {
        "summary": {"rounds": summarise(history, LAST), "aligned": aligned},
        "most_rounds_of_a_client": int(np.bincount(np.concatenate(drawn)).max()),
        "norms": {"median": float(np.median(norms)), "clipped": float(np.mean(np.array(norms) > CLIP))},
        "clip": CLIP,
    }


def plain(seed, epochs):
    """FedAvg without noise, then stage 3."""
    model, history = rounds_of(seed, replace(world(seed)[0].federated, local_epochs=epochs))
    aligned = scored(align(model, server_set(seed), ALIGN, seed).model, seed)
    return {"summary": {"rounds": summarise(history, LAST), "aligned": aligned}}


def reconstructed(seed, network, images, epochs):
    """A picture from a gradient, or from the update of a client that has these images and trains in batches of four."""
    generator, batches = numpy_generator(seed, "pictures"), Batches(load_images("cifar10_mini", "train"))
    rows = torch.from_numpy(generator.choice(len(batches), images, replace=False))
    x, y = batches.plain(rows).contiguous(), batches.labels[rows]
    model = first_network(seed) if network == "first" else build_model("resnet8", 10, 16, seed).eval()
    seen = mean_gradient(model, x, y, epochs) if epochs else gradient_of(model, x, y)
    start = 0.3 * torch.randn(x.shape, generator=torch_generator(seed, "start"))
    found = invert_gradient(model, seen, start, y, INVERSION)
    ours, truth, grey = in_unit_range(found), in_unit_range(x), torch.full_like(x, 0.5)
    scores = {"psnr": psnr(ours, truth), "ssim": ssim(ours, truth), "psnr_of_grey": psnr(grey, truth)}
    return {"summary": {name: value.mean().item() for name, value in scores.items()}}


def mean_gradient(model, x, y, epochs, lr=0.1):
    """What a server sees of several steps: the update over the step size and the number of steps."""
    local = copy.deepcopy(model)
    optimizer, steps = torch.optim.SGD(local.parameters(), lr), 0
    for _ in range(epochs):
        for a, b in zip(x.split(4), y.split(4), strict=True):
            optimizer.zero_grad()
            cross_entropy(local(a), b).backward()
            optimizer.step()
            steps += 1
    pairs = zip(model.parameters(), local.parameters(), strict=True)
    return [((old - new) / (lr * steps)).detach() for old, new in pairs]


CASES = {
    **{f"update_{e}_epochs": (functools.partial(from_update, epochs=e), {"epochs": e}) for e in EPOCHS},
    **{f"noise_{z:g}": (functools.partial(guarded, noise=z), {"noise": z}) for z in NOISES},
    **{f"plain_{e}_epochs": (functools.partial(plain, epochs=e), {"epochs": e}) for e in (1, 2)},
    "aligned": (from_aligned, {}),
    "final": (from_final, {}),
    **{
        "_".join(map(str, case)): (
            functools.partial(reconstructed, network=case[0], images=case[1], epochs=case[2]),
            dict(zip(("network", "images", "epochs"), case, strict=True)),
        )
        for case in PICTURES
    },
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="the pool has fewer")
    torch.set_num_threads(1)
    chosen = options(__doc__, CASES, OUT).parse_args()
    for name in chosen.only:
        make, parameters = CASES[name]
        for seed in chosen.seeds[:1] if name in MODELS else chosen.seeds:  # several models of one world
            kept(chosen.out / f"{name}_seed{seed}.json", name, seed, parameters, functools.partial(make, seed))
