"""Aggregation on the server: the weighted mean of states, and checks of what clients send."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mllmfl_lite.repro import all_finite

State = dict[str, Tensor]
NORM_FACTOR = 10.0  # an update this many times larger than the round's median is refused
LARGEST_LOSS = 1e6


@dataclass(frozen=True)
class ClientResult:
    """What a client sends back."""

    state: State  #: its weights after local training, BatchNorm statistics included
    extra: State  #: the method's `upload`
    loss: float  #: mean over its training steps

    def to(self, device: torch.device) -> ClientResult:
        """The same with its tensors on the device."""
        state, extra = ({name: t.to(device) for name, t in part.items()} for part in (self.state, self.extra))
        return ClientResult(state, extra, self.loss)


Answers = tuple[dict[int, ClientResult], dict[int, str]]  # by client; reasons by client that is left out


def weighted_mean(states: Sequence[State], weights: Sequence[float]) -> State:
    """Weighted mean of whole states, entry by entry (McMahan et al., 2017, Algorithm 1: weights are image counts n_k).

    Sums run in float64 and in list order. Integer entries (BatchNorm's step counter) are rounded and stay integers.
    Weights that are negative or all zero, and states of different shapes, are a `ValueError`.
    """
    if not states or len(states) != len(weights) or not sum(weights) > 0 or min(weights) < 0:
        raise ValueError(
            "a weighted mean needs states and one weight each, none negative, not all zero; "
            f"got {len(states)} states and weights {list(weights)[:10]}"
        )
    shapes = [{name: t.shape for name, t in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("states to be averaged must have the same names and shapes; they come from different models")
    total, mean = sum(weights), {}
    for name, first in states[0].items():
        entry = torch.zeros_like(first, dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            entry += state[name].double() * (weight / total)
        mean[name] = (entry if first.is_floating_point() else entry.round()).to(first.dtype)
    return mean


def accept(
    answers: Answers, steps: dict[int, int], state: State, check_upload: Callable[[State, State], None]
) -> Answers:
    """Sound results by rising client number, on the server's device; for all others the reason.

    `steps` has the local steps of each client that was asked, `state` the weights that the round started from.
    """
    sent, left_out = answers
    sound, reasons = {}, {client: "it did not answer" for client in steps if client not in sent}
    for client, result in sorted(sent.items()):
        try:
            if client not in steps:
                raise ValueError("it was not asked in this round")
            moved = result.to(next(iter(state.values())).device)
            _check(moved, state)
            check_upload(moved.extra, state)
            sound[client] = moved
        except Exception as error:  # nothing that a client sends may end the run
            reasons[client] = str(error) if isinstance(error, ValueError) else repr(error)
    reasons |= outliers({client: result.state for client, result in sound.items()}, steps, state) | left_out
    return {client: result for client, result in sound.items() if client not in reasons}, reasons


def _check(sent: ClientResult, state: State) -> None:
    if sent.state.keys() != state.keys():
        raise ValueError(f"its weights have other names: {sorted(sent.state.keys() ^ state.keys())[:3]}")
    for name, tensor in sent.state.items():
        if (tensor.shape, tensor.dtype) != (state[name].shape, state[name].dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {tuple(state[name].shape)}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has a number that is not finite")
        if name.endswith("running_var") and (tensor < 0).any():
            raise ValueError(f"{name} is a variance, and it is negative")
    if not all_finite(sent.extra.values()):
        raise ValueError("its upload has a number that is not finite")
    if not abs(sent.loss) <= LARGEST_LOSS:
        raise ValueError(f"its loss is {sent.loss:.3g}; at most {LARGEST_LOSS:g} is accepted")


def outliers(sent: dict[int, State], steps: dict[int, int], state: State) -> dict[int, str]:
    """Clients whose update is absurdly large: more than `NORM_FACTOR` times the round's median, with the reason.

    Norms of weights and of BatchNorm statistics are compared apart, each divided by the root of the client's local
    steps (a random walk grows so). The median is the lower one.
    """
    reasons: dict[int, str] = {}
    ceiling = f"as far a step as the round's median; at most {NORM_FACTOR:g} times is accepted"
    for part, names in (("weights", weights_of(state)), ("BatchNorm statistics", statistics_of(state))):
        norms = {client: distance(sent[client], state, names) / math.sqrt(steps[client]) for client in sent}
        median = sorted(norms.values())[(len(norms) - 1) // 2] if norms else 0.0
        for client, norm in norms.items():
            if norm > NORM_FACTOR * median > 0:
                reasons.setdefault(client, f"its {part} moved {norm / median:.3g} times {ceiling}")
    return reasons


def weights_of(state: State) -> list[str]:
    """Names of what is trained: all entries but BatchNorm's statistics and step counters."""
    return [name for name, tensor in state.items() if tensor.is_floating_point() and "running_" not in name]


def statistics_of(state: State) -> list[str]:
    """Names of BatchNorm's running means and variances."""
    return [name for name in state if "running_" in name]


def distance(sent: State, state: State, names: list[str]) -> float:
    """Euclidean distance of two states over these entries, in float64."""
    squares = [(sent[name].double() - state[name].double()).square().sum() for name in names]
    return torch.stack(squares).sum().sqrt().item() if squares else 0.0
