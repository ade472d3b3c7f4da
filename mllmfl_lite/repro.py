"""Reproducibility: random generators by name, checked settings, atomic writes, the device, progress bars."""

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import BeforeValidator, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ErrorDetails
from torch import Tensor
from tqdm import tqdm
from typing_extensions import dataclass_transform

tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared with forked processes; one that is killed would block all
warnings.filterwarnings("ignore", message="IProgress not found")  # from tqdm.auto, in a notebook without widgets

T = TypeVar("T")
ASSETS = Path(__file__).parent / "assets"  # bundled images, models, prompts
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Execution:
    """Where and how fast a run is carried out. No field changes a result."""

    folder: str | Path | None = None  #: for checkpoints, from which a run resumes; None keeps nothing
    device: str = "auto"  #: see `pick_device`
    workers: int | None = None  #: threads that train clients, by default one a core, one on a GPU
    label: str = ""  #: text of the progress bar


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, inside lists and dictionaries as well."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _sentence(problem: ErrorDetails) -> str:
    """One of pydantic's problems as ``key: rule; got value``; those of nested settings as ``key.inner: ...``."""
    kind, value, key = problem["type"], problem["input"], ".".join(map(str, problem["loc"]))
    if kind == "unexpected_keyword_argument":
        return f"{key}: there is no such setting"
    if kind == "value_error":
        return "\n".join(f"{key}.{line}" if key else line for line in str(problem["ctx"]["error"]).splitlines())
    rule = problem["msg"].replace("Input should be", "must be")
    if kind.startswith("dataclass"):
        rule = "must be a block of settings"
    number = re.fullmatch(r"([-+]?\d+\.?\d*)e([-+]?\d+)", value, re.I) if isinstance(value, str) else None
    hint = f"; write {float(number[1])}e{int(number[2]):+}" if number and kind == "float_type" else ""  # YAML's rule
    return f"{key}: {rule}; got {value!r:.100}{hint}"


def nested(cls: type) -> BeforeValidator:
    """Let a dictionary stand for settings of that class: ``align: Annotated[AlignSettings, nested(AlignSettings)]``."""
    return BeforeValidator(lambda given: cls(**{str(k): v for k, v in given.items()}) if type(given) is dict else given)


@dataclass_transform(frozen_default=True)
def settings_class(cls: type[T]) -> type[T]:
    """Decorate a class of settings: a frozen dataclass that checks names, types and bounds.

    Whole numbers may stand for floats, NumPy's numbers for Python's. Text never stands for a number or a switch. All
    wrong settings are named in one `ValueError`.
    """
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    checked: Any = pydantic_dataclass(cls, frozen=True, config=config)
    original = checked.__init__

    @functools.wraps(original)
    def init(self: object, *values: object, **named: object) -> None:
        try:
            original(self, *map(_plain, values), **_plain(named))
        except ValidationError as error:
            raise ValueError("\n".join(map(_sentence, error.errors()))) from None

    checked.__init__ = init
    return checked


def stable_seed(*keys: int | str) -> int:
    """One 63-bit integer from any keys, the same on every machine."""
    words = [key if isinstance(key, int) else int.from_bytes(key.encode(), "little") for key in keys]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(*keys: int | str) -> torch.Generator:
    """Return a torch generator that depends on the keys alone: ``torch_generator(seed, "batches", round, client)``.

    Nothing here draws from torch's global generator. So the number of workers and a resume change no result.
    Keys are non-negative integers or short strings.
    """
    return torch.Generator().manual_seed(stable_seed(*keys))


def numpy_generator(*keys: int | str) -> np.random.Generator:
    """Return a NumPy generator that depends on the keys alone."""
    return np.random.default_rng(stable_seed(*keys))


def sha256_arrays(arrays: Iterable[np.ndarray]) -> str:
    """One sha256 over arrays, their shapes and types."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return False if any number is infinite or NaN."""
    return all(tensor.isfinite().all() for tensor in tensors)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write to ``path.part``, fsync, then rename atomically to `path`."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}); make room or choose another folder") from error


def write_json(path: str | Path, value: object) -> None:
    """Write readable JSON atomically; infinite numbers and NaN are refused."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def shows_progress() -> bool:
    """Return True in a terminal or notebook; ``MLLMFL_PROGRESS=0`` or ``1`` decides otherwise."""
    if wish := os.environ.get("MLLMFL_PROGRESS"):
        return wish != "0"
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return sys.stderr.isatty() or getattr(shell, "kernel", None) is not None


def progress_bar(total: int, unit: str, label: str, done: int = 0) -> tqdm:
    """A tqdm bar on stderr that disappears when finished; hidden unless `shows_progress`."""
    return tqdm(total=total, initial=done, unit=unit, desc=label, leave=False, disable=not shows_progress())


def count_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products and convolutions on a GPU; restore the flags at the end."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    flags: list[tuple[Any, str, Any, Any]]  # place, name, value before, value inside
    try:
        flags = [(place, "allow_tf32", place.allow_tf32, allowed) for place in (matmul, cudnn)]
    except RuntimeError:  # torch's newer flags are in use; the two kinds exclude each other
        wanted = "tf32" if allowed else "ieee"
        flags = [(place, "fp32_precision", place.fp32_precision, wanted) for place in (matmul, cudnn.conv)]
    try:
        for place, name, _, new in flags:
            setattr(place, name, new)
        yield
    finally:
        for place, name, old, _ in flags:
            setattr(place, name, old)


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device of that name; ``"auto"`` is the GPU if there is one, each process's own under a launcher."""
    if name == "auto":
        rank = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun and accelerate launch
        return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):  # others lack float64 or other parts
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda'; got {str(name)!r}")
    if str(name) != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device {str(name)!r} was asked for, but torch sees no GPU here; use device='auto' or 'cpu'")
    return torch.device(name)
