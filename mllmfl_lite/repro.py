"""What makes a run repeatable: seeds by name, atomic files, a progress bar that is silent where nobody looks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # its own is shared with forked processes: one killed while it held it stops all
warnings.filterwarnings("ignore", message="IProgress not found")  # from tqdm.auto, in a notebook without widgets


def stable_seed(*keys: int | str) -> int:
    """One 63-bit integer from any run of keys; unlike Python's hash(), the same on every machine."""
    words = [key if isinstance(key, int) else int.from_bytes(key.encode(), "little") for key in keys]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(*keys: int | str) -> torch.Generator:
    """A torch generator that depends on the keys alone: ``torch_generator(seed, "batches", round, client, epoch)``.

    Nothing in this package draws from torch's global generator, so neither the number of workers nor a resumed
    run can change a result. Keys are non-negative integers or short strings.
    """
    return torch.Generator().manual_seed(stable_seed(*keys))


def numpy_generator(*keys: int | str) -> np.random.Generator:
    """The same idea for NumPy: a generator that depends on the keys alone."""
    return np.random.default_rng(stable_seed(*keys))


def sha256_arrays(arrays: Iterable[np.ndarray]) -> str:
    """One sha256 over arrays, their shapes and types included."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to the disk and rename it: readers see the old file or the new, whole."""
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: Path, value: object) -> None:
    """Write `value` as readable JSON, atomically; non-finite numbers are refused (JSON has none)."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def somebody_looks() -> bool:
    """Whether a progress bar has a reader: a terminal or a notebook, unless ``MLLMFL_PROGRESS=0`` says otherwise."""
    wish = os.environ.get("MLLMFL_PROGRESS")
    if wish is not None:
        return wish != "0"
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


def progress_bar(total: int, unit: str, label: str, done: int = 0) -> tqdm:
    """A tqdm bar on stderr that removes itself when finished and does not appear where nobody looks."""
    return tqdm(total=total, initial=done, unit=unit, desc=label, leave=False, disable=not somebody_looks())


def count_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU may round float32 factors to TF32 in matrix products and convolutions; put back at the end.

    torch by itself allows it in convolutions only. A CPU is not concerned.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        flags = [(place, "allow_tf32", place.allow_tf32) for place in (matmul, cudnn)]
        value: bool | str = allowed
    except RuntimeError:  # somebody has used torch's newer flags, which do not go with these
        flags = [(place, "fp32_precision", place.fp32_precision) for place in (matmul, cudnn.conv)]
        value = "tf32" if allowed else "ieee"
    try:
        for place, name, _ in flags:
            setattr(place, name, value)
        yield
    finally:
        for place, name, was in flags:
            setattr(place, name, was)


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; ``"auto"`` is the GPU where there is one, each process's own under a launcher.

    Raises:
        ValueError: a CUDA device is asked for and there is none.
    """
    if name == "auto":
        own = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun and accelerate launch
        return torch.device("cuda", own) if torch.cuda.is_available() else torch.device("cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no GPU here; use device='auto' or 'cpu'")
    return torch.device(name)
