"""Results files: JSON that says what was run, with what, and what came out, round by round."""

from __future__ import annotations

import datetime
import functools
import hashlib
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

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout

    try:
        git("ls-files", "--error-unmatch", __file__)
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "--", "..").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {metadata.version('mllmfl-lite')}"


def result_path(folder: str | Path, label: str, seed: int) -> Path:
    """The results file of that label and seed.

    Raises:
        ValueError: the label is no plain file name, so that a file elsewhere could be written.
    """
    text = label if isinstance(label, str) and label.isprintable() else ""
    if not text or text != Path(text).name or text.startswith(".") or len(text.encode()) > 200:
        raise ValueError(f"label must be a file name without '/', not hidden, of at most 200 bytes; got {label!r:.100}")
    return Path(folder) / f"{label}_seed{seed}.json"


def save_result(path: str | Path, result: dict) -> None:
    """Write one result atomically, with a checksum; its folder is made if absent."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**result, "checksum": _checksum(result)})
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error}); make room or choose another folder, and start again"
        ) from error


def load_result(path: str | Path) -> dict:
    """Read one result.

    Raises:
        ValueError: the file is no results file, or damaged.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        checksum = result.pop("checksum")
        if not isinstance(result["parameters"], dict):
            raise TypeError("its parameters are no dictionary")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a results file ({error!r}); remove it and run again") from error
    if checksum != _checksum(result):
        raise ValueError(f"{path} is damaged: its content does not fit its checksum; remove it and run again")
    if isinstance(federated := result["parameters"].get("federated"), dict):
        federated.setdefault("augment", "weak")  # files from before this setting
    return result


def _checksum(result: dict) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def load_results(folder: str | Path) -> list[dict]:
    """All results in a folder, by file name."""
    return [load_result(path) for path in sorted(Path(folder).glob("*.json"))]


def differences(found: dict, wanted: dict) -> str:
    """Name the parameters in which two runs differ, as ``outer.inner: there X, now Y``; empty if they do not."""
    before, now = (_flat(json.loads(json.dumps(parameters))) for parameters in (found, wanted))
    return "; ".join(
        f"{key}: there {before.get(key, 'nothing')!r}, now {now.get(key, 'nothing')!r}"
        for key in {**before, **now}
        if before.get(key, "nothing") != now.get(key, "nothing")
    )


def _flat(parameters: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in parameters.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
