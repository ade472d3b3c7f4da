"""One client in eight lies. Either the record names it, and the run is the one without it; or the lie does no harm; or
the test says that it is not caught: what looks like an honest update needs another `aggregate` than the mean."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from mllmfl_lite.data import load_images, partition
from mllmfl_lite.data.batches import Batches
from mllmfl_lite.federated import CReFF, FedAvg, Federation, FedSettings, Task, client_step, run_federated
from mllmfl_lite.federated import aggregate as aggregation
from mllmfl_lite.models import build_model
from mllmfl_lite.repro import sha256_arrays

LIAR, CLIENTS = 3, 8
SETTINGS = FedSettings(rounds=3, clients_per_round=CLIENTS, local_epochs=2, eval_every=3, report_rounds=1)
FEDAVG, CREFF = FedAvg(), CReFF(per_class=5, match_steps=5, head_epochs=3, repeats=1)


@functools.cache
def world():
    train = load_images("cifar10_mini", "train").subset(np.arange(800))
    split = partition.dirichlet_equal(train.labels, CLIENTS, 1.0, seed=0)
    model = build_model("resnet8", 10, width=8).to(memory_format=torch.channels_last)
    return Federation(train, split, load_images("cifar10_mini", "test")), model, Batches(train)


@functools.cache
def honest(method, round_, client, key):
    """A client's result for the state and broadcast of that key; most lies lead to the same ones."""
    federation, model, batches = world()
    state, received = STATES[key]
    indices = torch.from_numpy(federation.split[client])
    return client_step(model, batches, indices, method, SETTINGS, Task(state, received, round_, client))


STATES = {}


def play(lie, method=FEDAVG):
    """A run in which `lie(results, state, round_)` changes what has arrived."""

    def ask(state, received, round_, chosen):
        key = sha256_arrays(t.numpy() for t in (*state.values(), *received.values()))
        STATES[key] = (state, received)
        results = {client: honest(method, round_, client, key) for client in chosen}
        lie(results, state, round_)
        return results, {}

    federation, *_ = world()
    return run_federated(build_model("resnet8", 10, width=8), federation, method, SETTINGS, ask=ask)


def floats(change):
    """Change each tensor of floats of the liar's weights: (name, tensor, the global one) -> tensor."""

    def lie(results, state, round_):
        sent = results[LIAR].state
        changed = {n: change(n, t, state[n]) if t.is_floating_point() else t for n, t in sent.items()}
        results[LIAR] = replace(results[LIAR], state=changed)

    return lie


def only(part, change):
    """As `floats`, of names that end in `part`."""
    return floats(lambda name, t, old: change(t) if name.endswith(part) else t)


def whole(change):
    """Change the liar's dictionary of weights."""

    def lie(results, state, round_):
        results[LIAR] = replace(results[LIAR], state=change(dict(results[LIAR].state)))

    return lie


def noise(name, t, old):
    draw = torch.randn(t.shape, generator=torch.Generator().manual_seed(0))
    return t if "running" in name else old + draw


def upload(change):
    def lie(results, state, round_):
        sent = {name: t.clone() for name, t in results[LIAR].extra.items()}
        change(sent)
        results[LIAR] = replace(results[LIAR], extra=sent)

    return lie


def under_another_number(number):
    def lie(results, state, round_):
        results[number] = results.pop(LIAR)

    return lie


STALE = {}


def stale(results, state, round_):
    STALE.setdefault("first", results[LIAR])
    results[LIAR] = STALE["first"]


def huge_loss(loss):
    def lie(results, state, round_):
        results[LIAR] = replace(results[LIAR], loss=loss)

    return lie


def copied(results, state, round_):
    results[LIAR] = results[LIAR + 1]


def silent(results, state, round_):
    del results[LIAR]
