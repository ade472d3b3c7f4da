"""The folder of one run: locked while in use, with one checkpoint in it that is always whole.

`weights-000012.safetensors` is written first; `run.json`, which names it with its checksum, is renamed into place last.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import filelock
import safetensors.torch
from torch import Tensor
from torch.optim import Optimizer

from mllmfl_lite.repro import write_atomically, write_json


class CheckpointError(RuntimeError):
    """A run's folder is damaged, belongs to another run, is in use or not writable. Nothing in it was changed."""


class RunFolder:
    """A context manager that locks a folder, made if absent.

    `identity` is what two runs must share to be the same run (settings, checksums of data): plain JSON.
    """

    def __init__(self, path: str | Path, identity: dict):
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity))
        self._lock = filelock.FileLock(self.path / ".lock", timeout=0)

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise CheckpointError(f"{self.path} is in use by another run; wait for it, or use another folder") from None
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written ({error}); choose a folder that can be") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def save(self, step: int, tensors: dict[str, Tensor], record: object) -> None:
        """Replace the checkpoint: named tensors, and a record of plain JSON."""
        content = safetensors.torch.save({name: t.contiguous().clone() for name, t in tensors.items()})
        name = f"weights-{step:06d}.safetensors"
        entry = {"step": step, "weights": name, "sha256": hashlib.sha256(content).hexdigest()}
        try:
            write_atomically(self.path / name, content)
            write_checked(self.path / "run.json", {**entry, "identity": self.identity, "record": record})
        except OSError as error:
            raise CheckpointError(f"checkpoint {step}: {error}, then start again; the one before is good") from error
        for old in self.path.glob("weights-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self) -> tuple[int, dict[str, Tensor], Any] | None:
        """The checkpoint as (step, tensors, record); None if there is none yet.

        One that is damaged, or belongs to a run with another identity, is a `CheckpointError`.
        """
        path, advice = self.path / "run.json", f"remove the folder {self.path} to start again"
        if not path.exists():
            return None
        try:
            entry = read_checked(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); {advice}") from error
        if other := differences(entry["identity"], self.identity):
            raise CheckpointError(f"{self.path} holds another run ({other}); use another folder, or set these back")
        weights = self.path / entry["weights"]
        content = weights.read_bytes() if weights.exists() else b""
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{weights} is damaged: {len(content)} bytes do not fit their checksum; {advice}")
        return entry["step"], safetensors.torch.load(content), entry["record"]


def within(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins so, under the rest of their name."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments for `RunFolder.save`, on the CPU, as ``optimizer.0.exp_avg``."""
    moments = optimizer.state_dict()["state"].items()
    return {f"optimizer.{number}.{name}": tensor.cpu() for number, of in moments for name, tensor in of.items()}


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put them back into an optimiser of one group."""
    state = optimizer.state_dict()
    state["state"] = {i: within(tensors, f"optimizer.{i}.") for i in state["param_groups"][0]["params"]}
    optimizer.load_state_dict(state)


def write_checked(path: str | Path, value: dict) -> None:
    """Write a dictionary as JSON, atomically, with a checksum in it."""
    plain = json.loads(json.dumps(value))
    write_json(path, {**plain, "checksum": _checksum(plain)})


def read_checked(path: str | Path) -> dict:
    """Read what `write_checked` wrote, without the checksum; anything else, or a change, is a `ValueError`."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        checksum = value.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no JSON object with a checksum: {error!r:.100}") from error
    if checksum != _checksum(value):
        raise ValueError("its content does not fit its checksum")
    return value


def _checksum(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(found: dict, wanted: dict) -> str:
    """Name the entries in which two dictionaries differ, as ``outer.inner: there X, now Y``; empty if they do not."""
    before, now = (_flat(json.loads(json.dumps(values))) for values in (found, wanted))
    pairs = {key: (before.get(key, "nothing"), now.get(key, "nothing")) for key in {**before, **now}}
    return "; ".join(f"{key}: there {old!r}, now {new!r}" for key, (old, new) in pairs.items() if old != new)


def _flat(values: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
