"""The cache of what frozen teachers say of images: computed once, kept on disk, verified when read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import filelock
import numpy as np
import torch
from torch import Tensor

from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.repro import progress_bar, write_atomically
from mllmfl_lite.teachers.base import Teacher
from mllmfl_lite.teachers.labels import PoolLabels

CHUNK = 1024  # images a file, at most
HALF = ("features", "tokens")  # kept as float16; class scores as float32


class StoredAnswers:
    """A teacher's features, tokens or class scores of a data set, read by index: ``stored[indices]`` -> (B, ...).

    A file holds up to 1,024 images and has its own checksum in its name; it is written whole or not at all, so a killed
    run resumes. The folder's name holds the checksums of images and model, so nobody else's answers are read.

    Args:
        teacher: computes what is missing.
        what: ``"features"``, ``"tokens"``, ``"class_logits"`` or ``"class_probabilities"``.
        data: the images.
        folder: of the cache.
        names: the class names, for the last two.

    Raises:
        ValueError: no such thing; an index outside the data; a damaged file, which is named.
    """

    def __init__(
        self, teacher: Teacher | PoolLabels, what: str, data: ImageSet, folder: str | Path, names: Sequence[str] = ()
    ):
        if what not in (*HALF, "class_logits", "class_probabilities"):
            raise ValueError(
                f"what must be features, tokens, class_logits or class_probabilities; got {what!r}"
            )
        self.teacher, self.what, self.data, self.names = teacher, what, data, tuple(names)
        step = teacher.images_at_once(names)
        self.chunk = max(1, CHUNK // step) * step  # batches are cut as without a cache
        images = f"{data.origin.replace('/', '-')}-{data.checksum()[:12]}"
        asked = hashlib.sha256("\n".join(names).encode()).hexdigest()[:12] if names else ""
        self.place = Path(folder) / images / "-".join(part for part in (teacher.identity, what, asked) if part)
        self._open: dict[int, np.ndarray] = {}

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices)
        if not len(indices):
            return np.empty((0,), np.float16 if self.what in HALF else np.float32)
        if not 0 <= indices.min() <= indices.max() < len(self.data):
            raise ValueError(
                f"indices must lie in 0..{len(self.data) - 1}; these run from {indices.min()} to {indices.max()}"
            )
        numbers = indices // self.chunk
        self._prepare(sorted({int(c) for c in numbers} - set(self._open)))
        first = self._open[int(numbers[0])]
        out = np.empty((len(indices), *first.shape[1:]), first.dtype)
        for c in np.unique(numbers).tolist():
            out[numbers == c] = self._open[c][indices[numbers == c] % self.chunk]
        return out

    def _prepare(self, chunks: list[int]) -> None:
        """Open these files; compute the missing ones. The first of several runs computes, the others wait."""
        if not chunks:
            return
        self.place.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.place / ".lock"):
            missing = [c for c in chunks if not self._file(c)]
            with progress_bar(len(missing) * self.chunk, "images", self.what) as bar:
                for c in missing:
                    content = self._compute(c)
                    name = f"{c:05d}-{hashlib.sha256(content).hexdigest()[:16]}.npy"
                    write_atomically(self.place / name, content)
                    bar.update(self.chunk)
        for c in chunks:
            self._open[c] = _read(self._file(c), min(self.chunk, len(self.data) - c * self.chunk))

    def _compute(self, chunk: int) -> bytes:
        images = self.data.images[chunk * self.chunk : (chunk + 1) * self.chunk]
        ask = getattr(self.teacher, self.what)
        values = ask(images, self.names) if self.names else ask(images)
        buffer = io.BytesIO()
        np.save(buffer, (values.half() if self.what in HALF else values.float()).numpy())
        return buffer.getvalue()

    def _file(self, chunk: int) -> Path | None:
        return next(iter(sorted(self.place.glob(f"{chunk:05d}-*.npy"))), None)


def _read(path: Path, length: int) -> np.ndarray:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest()[:16] != path.stem.partition("-")[2]:
        raise ValueError(f"{path} is damaged: its checksum is not the one in its name; remove it to compute it again")
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    if len(values) != length:
        raise ValueError(f"{path} holds {len(values)} images, not {length}; remove it to compute it again")
    return values


def ask_teacher(
    teacher: Teacher | PoolLabels,
    pool: ImageSet,
    names: Sequence[str],
    folder: str | Path = "",
    what: str = "class_probabilities",
) -> Tensor:
    """The teacher's scores of the class names for each image, float32 (N, C).

    Args:
        teacher: see `mllmfl_lite.teachers`.
        pool: the images.
        names: the class names.
        folder: cache; empty keeps nothing.
        what: ``"class_probabilities"`` or ``"class_logits"``.
    """
    if not folder:
        return getattr(teacher, what)(pool.images, names)
    return torch.from_numpy(StoredAnswers(teacher, what, pool, folder, names)[np.arange(len(pool))])
