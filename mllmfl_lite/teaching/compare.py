"""Compare results of several seeds: by label, mean and spread, paired differences, how many seeds a claim needs."""

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from mllmfl_lite.repro import ASSETS


def find_upwards(name: str) -> Path:
    """Find the nearest folder of that name, here or above; a `ValueError` says that there is none."""
    for place in ((here := Path.cwd()), *here.parents):
        if (place / name).is_dir():
            return place / name
    raise ValueError(f"there is no folder {name!r} in {here} or above it; start in the project's folder")


def group_by_label(results: Iterable[dict]) -> dict[str, list[dict]]:
    """Group results by label, in the order in which they come."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(result["label"], []).append(result)
    return groups


def reported() -> dict:
    """Figures that others report, each with its source."""
    return json.loads((ASSETS / "reported.json").read_text(encoding="utf-8"))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); NaN for the deviation of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


class Difference(NamedTuple):
    """A mean paired difference, its 95 % interval, and the p-value of a two-sided t-test against zero."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def verdict(self) -> str:
        """``"beyond chance"`` if p is below 0.05, else ``"within chance"``."""
        return "beyond chance" if self.p < 0.05 else "within chance"

    @property
    def points(self) -> str:
        """A difference of two shares in points with its interval, such as ``"+1.5 (+0.6 to +2.3)"``."""
        return "{:+.1f} ({:+.1f}\u00a0to\u00a0{:+.1f})".format(*(100 * value for value in self[:3]))


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Compare two methods seed by seed; unequal numbers of figures, or none, are a `ValueError`."""
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"each seed needs a figure of both methods; got {len(ours)} and {len(theirs)}")
    gains = np.subtract(ours, theirs)
    mean = float(gains.mean())
    if len(gains) == 1:
        return Difference(mean, float("nan"), float("nan"), 1.0)
    if np.ptp(gains) == 0:
        return Difference(mean, mean, mean, float(mean == 0))
    test = stats.ttest_1samp(gains, 0.0)
    return Difference(mean, *map(float, (*test.confidence_interval(0.95), test.pvalue)))


def seeds_needed(points: float, variance: float, power: float = 0.8, paired: bool = False) -> int:
    """Seeds that each of two methods needs until a two-sided t-test at 5 % finds their difference, with its sign.

    `power` is the probability of finding a difference of so many points. `variance` is that of the paired differences,
    or the sum of two that are alike. 10,000 stands for more. Exact for normal figures (noncentral t; Cohen, 1988).
    """
    if not (points and 0 < power < 1 and variance >= 0):
        raise ValueError(f"points must not be 0, power in (0, 1), variance >= 0; got {points}, {power}, {variance}")

    def found(seeds: int) -> float:
        free = (seeds - 1) * (1 if paired else 2)
        shift = abs(points) / max(variance / seeds, 1e-300) ** 0.5
        return float(stats.nct.sf(stats.t.ppf(0.975, free), free, min(shift, 1e6)))

    return 2 + bisect_left(range(2, 10_000), power, key=found)
