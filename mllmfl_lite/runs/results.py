"""Results files: JSON that says what was run, with what, and what came out, round by round."""

import contextlib
import datetime
import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from mllmfl_lite.checkpoint import read_checked, write_checked

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
    """The results file of that label and seed; a label that is no plain file name is a `ValueError`."""
    text = label if isinstance(label, str) and label.isprintable() else ""
    if not text or text != Path(text).name or text.startswith(".") or len(text.encode()) > 200:
        raise ValueError(f"label must be a file name without '/', not hidden, of at most 200 bytes; got {label!r:.100}")
    return Path(folder) / f"{label}_seed{seed}.json"


def save_result(path: str | Path, result: dict) -> None:
    """Write one result atomically, with a checksum; its folder is made if absent."""
    with contextlib.suppress(OSError):  # said when the file is written
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_checked(path, result)


def load_result(path: str | Path) -> dict:
    """Read one result; a file that is none, or damaged, is a `ValueError`."""
    try:
        result = read_checked(path)
        if not isinstance(result.get("parameters"), dict):
            raise ValueError("it has no parameters")
    except ValueError as error:
        raise ValueError(f"{path} is not a results file, or damaged ({error}); remove it and run again") from error
    if isinstance(federated := result["parameters"].get("federated"), dict):
        federated.setdefault("augment", "weak")  # files from before this setting
    return result


def load_results(folder: str | Path) -> list[dict]:
    """All results in a folder, by file name."""
    return [load_result(path) for path in sorted(Path(folder).glob("*.json"))]
