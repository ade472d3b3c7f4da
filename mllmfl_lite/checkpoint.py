"""The folder of one run: locked while in use, with one checkpoint in it that is always whole.

`weights-000012.safetensors` is written first; `run.json`, which names it with its checksum, is renamed into place last.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import filelock
import safetensors.torch
from torch import Tensor

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
        entry |= {"identity": self.identity, "record": json.loads(json.dumps(record))}
        try:
            write_atomically(self.path / name, content)
            write_json(self.path / "run.json", {**entry, "checksum": _checksum(entry)})
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {step} cannot be written to {self.path} ({error}); the one before is good: make room and "
                "start again"
            ) from error
        for old in self.path.glob("weights-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self) -> tuple[int, dict[str, Tensor], object] | None:
        """The checkpoint as (step, tensors, record); None if there is none yet.

        Raises:
            CheckpointError: it is damaged, or belongs to a run with another identity (the differences are named).
        """
        path = self.path / "run.json"
        if not path.exists():
            return None
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            if entry.pop("checksum", None) != _checksum(entry):
                raise ValueError("its checksum does not fit")
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(path, error) from error
        self._same_run(entry["identity"])
        weights = self.path / entry["weights"]
        content = weights.read_bytes() if weights.exists() else b""
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise self._damaged(weights, f"its {len(content)} bytes do not fit the checksum in run.json")
        return entry["step"], safetensors.torch.load(content), entry["record"]

    def _same_run(self, identity: dict) -> None:
        keys = sorted({*identity, *self.identity})
        if other := [k for k in keys if identity.get(k) != self.identity.get(k)]:
            changes = "; ".join(f"{k}: there {identity.get(k)!r}, now {self.identity.get(k)!r}" for k in other)
            raise CheckpointError(f"{self.path} holds another run ({changes}); use another folder, or set these back")

    @staticmethod
    def _damaged(path: Path, why: object) -> CheckpointError:
        return CheckpointError(f"{path} is damaged ({why}); remove the folder {path.parent} to start again")


def _checksum(entry: dict) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
