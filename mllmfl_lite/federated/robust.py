"""Aggregation that bears some lying clients: clipped norm, coordinate median, trimmed mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

import torch
from torch import Generator, Tensor

from mllmfl_lite.federated.aggregate import State, distance, statistics_of, weighted_mean, weights_of
from mllmfl_lite.federated.methods import FedAvg


@dataclass(frozen=True)
class ClippedNorm(FedAvg):
    """FedAvg whose server shortens long updates to `factor` times the round's median length (after Sun et al., 2019).

    A lie may still point anywhere. Fewer than half of the clients may lie, else the median length is theirs.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.factor < float("inf"):
            rule = "factor is the longest update over the round's median one, above 0"
            raise ValueError(f"{rule}; got {self.factor}. At 0 no client would move the model")

    def aggregate(self, start: State, states: list[State], sizes: list[int], generator: Generator) -> State:
        """The weighted mean of the shortened updates, added to the weights."""
        return clipped_mean(states, sizes, start, self.factor)


@dataclass(frozen=True)
class TrimmedMean(FedAvg):
    """For each number the mean without the `liars` largest and smallest values (Yin et al., 2018).

    All clients count the same. It bears `liars` liars, fewer than half.
    """

    liars: int = 1

    def __post_init__(self) -> None:
        if type(self.liars) is not int or self.liars < 0:
            raise ValueError(f"liars is a whole number of clients, at least 0; got {self.liars!r}")

    def aggregate(self, start: State, states: list[State], sizes: list[int], generator: Generator) -> State:
        """The mean of what is left."""
        return trimmed_mean(states, self.liars)


@dataclass(frozen=True)
class CoordinateMedian(FedAvg):
    """For each number the median of the clients' (Yin et al., 2018). It bears fewer than half as liars.

    All clients count the same. Of an even number of values it is the mean of the two in the middle.
    """

    def aggregate(self, start: State, states: list[State], sizes: list[int], generator: Generator) -> State:
        """The median."""
        return trimmed_mean(states, most_liars(len(states)))


def most_liars(clients: int) -> int:
    """The most liars that any of these rules bears: fewer than half of the clients."""
    return max(0, (clients - 1) // 2)


def trimmed_mean(states: Sequence[State], cut: int) -> State:
    """Mean of each entry without its `cut` largest and smallest values; none left is a `ValueError`."""
    if not 0 <= cut <= (bound := most_liars(len(states))):
        raise ValueError(
            f"among {len(states)} clients at most {bound} may lie, fewer than half; the rule is asked to bear {cut}. "
            "Ask more clients a round, or set fewer liars"
        )
    return {name: _middle(torch.stack([state[name] for state in states]), cut) for name in states[0]}


def _middle(values: Tensor, cut: int) -> Tensor:
    mean = values.double().sort(0).values[cut : len(values) - cut].mean(0)
    return (mean if values.is_floating_point() else mean.round()).to(values.dtype)


def clipped_mean(states: Sequence[State], weights: Sequence[float], start: State, factor: float) -> State:
    """Weighted mean of updates shortened to `factor` times the median length; of an even number the lower median.

    Weights and BatchNorm statistics are two vectors with lengths of their own. Integer entries take the plain mean.
    """
    clipped = [dict(state) for state in states]
    for names in (weights_of(start), statistics_of(start)):
        lengths = [distance(state, start, names) for state in states]
        longest = factor * median_low(lengths)
        for new, length in zip(clipped, lengths, strict=True):
            share = min(1.0, longest / length) if length else 1.0
            new |= {n: (start[n] + share * (new[n].double() - start[n])).to(start[n].dtype) for n in names}
    return weighted_mean(clipped, weights)
