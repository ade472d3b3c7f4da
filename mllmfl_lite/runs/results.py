"""Results files: plain JSON that says what was run, where, on what, and what came out, round by round."""

from __future__ import annotations

import datetime
import functools
import json
import platform
import subprocess
from bisect import bisect_left
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from mllmfl_lite.repro import write_json

FORMAT = 1


RESULTS = Path(__file__).parent.parent / "results"  # the files that came with the repository


PACKAGES = ("torch", "torchvision", "numpy", "pillow")


class ResultError(RuntimeError):
    """A results file cannot be read, or belongs to other parameters."""


def provenance(device: torch.device | str) -> dict:
    """Where and with what a run was made: revision, package versions, device, date."""
    gpu = torch.device(device).type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": _revision(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {platform.machine()}",
        "platform": platform.system(),
    }


@functools.cache
def _revision() -> str:
    """The commit this package was run from, with a + where files had changed since; "unknown" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed.stdout.strip() else "")


def save_result(path: str | Path, result: dict) -> None:
    """Write one run's result, atomically; its folder is made if absent."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(path), {"format": FORMAT, **result})


def load_result(path: str | Path) -> dict:
    """Read one run's result.

    Raises:
        ResultError: the file is no results file of this format.
    """
    try:
        result = json.loads(Path(path).read_text())
        if result["format"] != FORMAT:
            raise ValueError(f"format {result['format']}, this version reads {FORMAT}")
        if "parameters" not in result:
            raise ValueError("it has no parameters")
    except (ValueError, KeyError, TypeError) as error:
        raise ResultError(f"{path} is not a results file ({error}); remove it and run again") from error
    return result


def differences(there: dict, now: dict) -> str:
    """Where two sets of parameters differ, in words; empty where they do not. Inner ones are named ``outer.inner``."""
    there, now = (_flat(json.loads(json.dumps(parameters))) for parameters in (there, now))  # as files have them
    missing = "nothing"
    return "; ".join(
        f"{key} there {there.get(key, missing)!r}, now {now.get(key, missing)!r}"
        for key in {**there, **now}
        if there.get(key, missing) != now.get(key, missing)
    )


def _flat(parameters: dict, before: str = "") -> dict:
    flat = {}
    for key, value in parameters.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat


def load_results(folder: str | Path) -> list[dict]:
    """All results in a folder, by file name; an empty list where there are none."""
    return [load_result(path) for path in sorted(Path(folder).glob("*.json"))]


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) over seeds; the spread of a single value is not known: NaN."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def reported() -> dict:
    """Figures that others report, each with its source; kept apart from ours, and in no other place of the book."""
    return json.loads((Path(__file__).parent / "assets" / "reported.json").read_text())


def committed_results(benchmark: str) -> list[dict]:
    """The results files that came with the repository, e.g. for ``"medium/cifar10_lt_if100"``; may be empty."""
    return load_results(RESULTS / benchmark)


def beyond_chance(differences: list[float]) -> bool:
    """Whether paired differences have a mean other than zero, by a t-test at 5 %, two-sided; a single one never has.

    Raises:
        ValueError: there are none.
    """
    from scipy.stats import t  # slow to import

    if len(differences) == 0:
        raise ValueError("a t-test needs differences, one for each seed that both methods have; got none")
    if len(differences) == 1:
        return False
    mean, spread = mean_and_spread(differences)
    return abs(mean) > t.ppf(0.975, len(differences) - 1) * spread / len(differences) ** 0.5


def seeds_needed(points: float, variance: float, power: float = 0.8, paired: bool = False) -> int:
    """Seeds that each of two methods needs, until a two-sided t-test at 5 % finds their difference, with its sign.

    Exact for normal figures (noncentral t, Cohen, 1988); for two samples both are taken to vary alike.

    Args:
        points: the difference, in the figures' unit.
        variance: of a pair's difference over seeds if `paired`, otherwise the sum of the methods' variances.
        power: the chance to find it, in (0, 1).
        paired: whether both run with the same clients and batches for each seed, and pairs are compared.

    Returns:
        At least 2; and at most 10,000, which stands for more.

    Raises:
        ValueError: a difference of nothing, a negative variance, or a chance outside of (0, 1).
    """
    if not (points and 0 < power < 1 and variance >= 0):
        raise ValueError(
            f"a difference that is not zero, a variance and a chance in (0, 1) are needed; got {points}, {variance} "
            f"and {power}"
        )
    return 2 + bisect_left(range(2, 10_000), power, key=lambda n: _chance_to_find(abs(points), variance, n, paired))


def _chance_to_find(points: float, variance: float, seeds: int, paired: bool) -> float:
    from scipy.stats import nct, t  # slow to import

    free = (seeds - 1) * (1 if paired else 2)
    shift = points / max(variance / seeds, 1e-300) ** 0.5
    return float(nct.sf(t.ppf(0.975, free), free, min(shift, 1e6)))  # the other tail is the difference's wrong sign
