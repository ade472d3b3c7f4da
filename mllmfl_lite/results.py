"""Results files: plain JSON that says what was run, where, on what, and what came out, round by round."""

from __future__ import annotations

import datetime
import functools
import json
import platform
import subprocess
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


# Student's t, two-sided 5 %, by degrees of freedom
T_CRITICAL = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def beyond_chance(differences: list[float]) -> bool:
    """Whether paired differences have a mean other than zero, by a t-test at 5 %; a single one never has.

    Raises:
        ValueError: none, or more than ten differences.
    """
    if len(differences) == 1:
        return False
    if len(differences) - 1 not in T_CRITICAL:
        raise ValueError(f"the t-test here takes 1 to 10 differences; got {len(differences)}")
    mean, spread = mean_and_spread(differences)
    return abs(mean) > T_CRITICAL[len(differences) - 1] * spread / len(differences) ** 0.5
