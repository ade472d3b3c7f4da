"""The folder of one run: locked while in use, with one checkpoint in it that is always whole.

Two files: `weights-000012.safetensors`, and `run.json`, which names it with its checksum. The weights are written
first and `run.json` is renamed into place last, so a kill at any moment leaves the checkpoint before or the one after.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import filelock
import safetensors.torch
from torch import Tensor

from mllmfl_lite.repro import write_atomically, write_json

FORMAT = 1


class CheckpointError(RuntimeError):
    """A run's folder cannot be used: damaged, of another run, in use, or not writable. Nothing in it was changed."""


class RunFolder:
    """A context manager: enter to take the folder, leave to give it back.

    Args:
        path: the folder; made if absent.
        identity: what must be equal for two runs to be the same run (settings, data checksums, ...), plain JSON.
    """

    def __init__(self, path: str | Path, identity: dict):
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity))
        self._lock = filelock.FileLock(self.path / ".lock", timeout=0)

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            write_atomically(self.path / ".writable", b"")
            (self.path / ".writable").unlink()
        except filelock.Timeout:
            raise CheckpointError(
                f"{self.path} is in use by another run; wait for it, or choose another folder"
            ) from None
        except OSError as error:
            self._lock.release()
            raise CheckpointError(f"{self.path} cannot be written ({error}); choose a folder that can be") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def save(self, step: int, tensors: dict[str, Tensor], record: object) -> None:
        """Write checkpoint number `step`: named tensors and anything that is plain JSON. Replaces the one before."""
        content = safetensors.torch.save({name: t.contiguous().clone() for name, t in tensors.items()})
        name = f"weights-{step:06d}.safetensors"
        write_atomically(self.path / name, content)
        write_json(
            self.path / "run.json",
            {
                "format": FORMAT,
                "step": step,
                "weights": name,
                "sha256": hashlib.sha256(content).hexdigest(),
                "identity": self.identity,
                "record": record,
            },
        )
        for old in self.path.glob("weights-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self) -> tuple[int, dict[str, Tensor], object] | None:
        """The checkpoint as (step, tensors, record), or None where the folder has none yet.

        Raises:
            CheckpointError: it is damaged, or belongs to a run with another identity (the differences are named).
        """
        path = self.path / "run.json"
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
            step, name, digest, identity = found["step"], found["weights"], found["sha256"], found["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(path, repr(error)) from error
        if found.get("format") != FORMAT:
            raise self._damaged(path, f"format {found.get('format')}, this version reads format {FORMAT}")
        self._same_run(identity)
        weights = self.path / name
        content = weights.read_bytes() if weights.exists() else b""
        if hashlib.sha256(content).hexdigest() != digest:
            raise self._damaged(weights, f"{len(content)} bytes whose checksum is not the one in run.json")
        return step, safetensors.torch.load(content), found["record"]

    def _same_run(self, identity: dict) -> None:
        keys = sorted({*identity, *self.identity})
        other = [k for k in keys if identity.get(k) != self.identity.get(k)]
        if other:
            changes = "; ".join(f"{k}: there {identity.get(k)!r}, now {self.identity.get(k)!r}" for k in other)
            raise CheckpointError(
                f"{self.path} holds another run ({changes}); choose another folder, or set these back to go on with it"
            )

    @staticmethod
    def _damaged(path: Path, why: str) -> CheckpointError:
        return CheckpointError(
            f"{path} is cut or damaged ({why}); remove the folder to start again, nothing was changed"
        )
