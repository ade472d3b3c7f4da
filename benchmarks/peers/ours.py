"""This package's engine, one worker a core, and the ordinary loop of bench_rounds, torch's default threads."""

import functools
import itertools
import time
from unittest import mock

from bench_rounds import ordinary_round, shuffled

from mllmfl_lite.federated import Federation, rounds, run_federated
from peers import batches_of, in_order, job


def engine(width, count, equal):
    model, data, split, settings = job(width, count, equal)
    with mock.patch.object(rounds, "open_batches", lambda data, _: batches_of(data, equal)):
        result = run_federated(model, Federation(data, split, data.subset(slice(0, 1))), None, settings)
    seconds = [record["seconds"] for record in result.history]
    started = time.monotonic() - sum(seconds)
    return list(itertools.accumulate(seconds, initial=started)), result.state


def ordinary(width, rounds, equal):
    model, data, split, settings = job(width, rounds, equal)
    stamps = [time.monotonic()]
    for round_ in range(1, rounds + 1):
        load = functools.partial(in_order, round_=round_) if equal else shuffled
        model.load_state_dict(ordinary_round(model, data, split, settings, load))
        stamps.append(time.monotonic())
    return stamps, model.state_dict()
