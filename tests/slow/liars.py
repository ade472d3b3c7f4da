"""One client in eight lies: it is left out by name, or the run ends within two points of the honest one.

Not among them: the sign of its update turned round. It is as large as an honest one; see tests/test_liars.py.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from common import Row
from test_liars import CREFF, FEDAVG, LIAR, each, play, upload, weights

POINTS, RNG = 0.02, torch.Generator().manual_seed(0)


def other(change):
    """A lie about all that is sent: result -> whatever."""
    return lambda results, state: results.update({LIAR: change(results[LIAR], state)})


def noise(t, old):
    return torch.randn(t.shape, generator=RNG)


LIES = {
    "a million times its weights": each(lambda t, old: t * 1e6),
    "its update 20 times, backwards": each(lambda t, old: old - 20 * (t - old)),
    "its update 1,000 times": each(lambda t, old: old + 1000 * (t - old)),
    "weights of noise": each(noise),
    "a head of noise": each(lambda t, old: 30 * noise(t, old), "head.weight"),
    "a body of zeros": each(lambda t, old: t * 0, "conv1.weight"),
    "the weights' sign turned": each(lambda t, old: -t),
    "one NaN": each(lambda t, old: torch.where(torch.arange(t.numel()).view(t.shape) == 0, torch.nan, t)),
    "an infinite mean": each(lambda t, old: t / 0, "running_mean"),
    "negative variances": each(lambda t, old: -t - 1, "running_var"),
    "variances of 1e30": each(lambda t, old: t + 1e30, "running_var"),
    "variances of zero": each(lambda t, old: t * 0, "running_var"),
    "means moved by 1,000": each(lambda t, old: t + 1000, "running_mean"),
    "half precision": each(lambda t, old: t.half()),
    "another shape": each(lambda t, old: t[None]),
    "arrays in place of tensors": each(lambda t, old: t.numpy()),
    "other names": weights(lambda sent, state: {f"module.{name}": t for name, t in sent.items()}),
    "tensors in another order": weights(lambda sent, state: dict(zip(sent, reversed(sent.values()), strict=True))),
    "no weights": weights(lambda sent, state: None),
    "nothing at all": other(lambda sent, state: None),
    "a loss as text": other(lambda sent, state: replace(sent, loss="0.1")),
    "what it was given": other(lambda sent, state: replace(sent, state=dict(state))),
    "classes turned round": each(lambda t, old: t.flip(0), "head.weight"),
    "creff: no gradients": upload(lambda extra: extra.clear()),
    "creff: gradients of 1e30": upload(lambda extra: extra["gradients"].add_(1e30)),
    "creff: gradients backwards": upload(lambda extra: extra["gradients"].neg_()),
    "creff: classes that are none": upload(lambda extra: extra["classes"].add_(99)),
    "creff: one class many times": upload(lambda extra: extra["classes"].mul_(0)),
    "creff: more than is wanted": upload(lambda extra: extra.update(more=torch.ones(1000))),
}


def check(place: Path, seed: int) -> list[Row]:
    logging.getLogger("mllmfl_lite").setLevel(logging.ERROR)  # names each liar
    row = Row("liars: one client in eight", "named, or within two points")
    honest = {
        method: play(lambda results, state: None, method).history[-1]["metrics"]["top1"] for method in (FEDAVG, CREFF)
    }
    row.name += f" (honest {', '.join(f'{top1:.0%}' for top1 in honest.values())})"
    for name, lie in LIES.items():
        method = CREFF if name.startswith("creff") else FEDAVG
        try:
            history = play(lie, method).history
        except Exception as error:
            row.check(False, f"{name}: the run ends: {error!r}")
            continue
        named = all(list(record.get("left_out", {})) == [str(LIAR)] for record in history)
        top1 = history[-1]["metrics"]["top1"]
        row.check(named or top1 >= honest[method] - POINTS, f"{name}: top-1 {top1:.3f}, honest {honest[method]:.3f}")
    return [row]
