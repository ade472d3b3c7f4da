"""Results of several seeds side by side: grouped by label, means, paired differences, how many seeds a claim needs."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from mllmfl_lite.repro import ASSETS


def find_upwards(name: str) -> Path:
    """The nearest folder of that name, here or above.

    Raises:
        ValueError: there is none.
    """
    here = Path.cwd()
    found = next((place / name for place in (here, *here.parents) if (place / name).is_dir()), None)
    if found is None:
        raise ValueError(f"there is no folder {name!r} in {here} or above it; start in the project's folder")
    return found


def group_by_label(results: Iterable[dict]) -> dict[str, list[dict]]:
    """Results by label, in the order in which they come."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(result["label"], []).append(result)
    return groups


def reported() -> dict:
    """Figures that others report, each with its source; kept apart from ours."""
    return json.loads((ASSETS / "reported.json").read_text(encoding="utf-8"))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); NaN for the deviation of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


class Difference(NamedTuple):
    """A mean paired difference with its 95 % interval and the p-value of a two-sided t-test against zero."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def clear(self) -> bool:
        """p below 0.05."""
        return self.p < 0.05


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Compare two methods seed by seed.

    Raises:
        ValueError: no pairs, or unequal numbers.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"each seed needs a figure of both methods; got {len(ours)} and {len(theirs)}")
    gains = np.subtract(ours, theirs)
    if len(gains) == 1 or not gains.any():
        return Difference(float(gains.mean()), float("nan"), float("nan"), 1.0)
    if np.ptp(gains) == 0:
        return Difference(float(gains[0]), float(gains[0]), float(gains[0]), 0.0)
    test = stats.ttest_1samp(gains, 0.0)
    low, high = test.confidence_interval(0.95)
    return Difference(float(gains.mean()), float(low), float(high), float(test.pvalue))


def seeds_needed(points: float, variance: float, power: float = 0.8, paired: bool = False) -> int:
    """Seeds that each of two methods needs until a two-sided t-test at 5 % finds their difference, with its sign.

    Exact for normal figures (noncentral t; Cohen, 1988). Both methods are taken to vary alike if not paired.

    Args:
        points: the difference, in the figures' unit.
        variance: of the paired differences, or else the sum of the methods' variances.
        power: chance to find it, in (0, 1).
        paired: whether the same seeds are compared.

    Returns:
        2 to 10,000; 10,000 stands for more.

    Raises:
        ValueError: a zero difference, a negative variance, or a chance outside (0, 1).
    """
    if not (points and 0 < power < 1 and variance >= 0):
        raise ValueError(
            f"a difference other than zero, a variance and a chance in (0, 1) are needed; got {points}, {variance} "
            f"and {power}"
        )

    def chance(seeds: int) -> float:
        free = (seeds - 1) * (1 if paired else 2)
        shift = abs(points) / max(variance / seeds, 1e-300) ** 0.5
        return float(stats.nct.sf(stats.t.ppf(0.975, free), free, min(shift, 1e6)))

    return 2 + bisect_left(range(2, 10_000), power, key=chance)
