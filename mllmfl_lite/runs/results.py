"""Results files: JSON that says what was run, with what, and what came out, round by round."""

from __future__ import annotations

import datetime
import functools
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from mllmfl_lite.repro import write_json

PACKAGES = ("torch", "torchvision", "numpy", "pillow")


def provenance(device: torch.device | str) -> dict:
    """Date, commit, package versions and device of a run."""
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
    """The commit of the checkout this package lies in, with a + if files were changed; else the package's version."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", ".."], capture_output=True, text=True, check=True
        )
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"version {metadata.version('mllmfl-lite')}"
    return commit + ("+" if changed.stdout.strip() else "")


def save_result(path: str | Path, result: dict) -> None:
    """Write one result atomically; its folder is made if absent."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def load_result(path: str | Path) -> dict:
    """Read one result.

    Raises:
        ValueError: the file is no results file.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(result["parameters"], dict):
            raise TypeError("its parameters are no dictionary")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a results file ({error!r}); remove it and run again") from error
    return result


def load_results(folder: str | Path) -> list[dict]:
    """All results in a folder, by file name."""
    return [load_result(path) for path in sorted(Path(folder).glob("*.json"))]


def differences(found: dict, wanted: dict) -> str:
    """Name the parameters in which two runs differ, as ``outer.inner: there X, now Y``; empty if they do not."""
    before, now = (_flat(json.loads(json.dumps(parameters))) for parameters in (found, wanted))
    absent = "nothing"
    return "; ".join(
        f"{key}: there {before.get(key, absent)!r}, now {now.get(key, absent)!r}"
        for key in {**before, **now}
        if before.get(key, absent) != now.get(key, absent)
    )


def _flat(parameters: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in parameters.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
