"""The cache of what frozen teachers say of images: computed once, kept on disk, verified when read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import filelock
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.repro import progress_bar, write_atomically
from mllmfl_lite.teachers.base import Teacher

CHUNK = 1024  # images a file, at most
BLOCK = 1 << 20  # bytes read at a time
HALF = ("features", "tokens")  # kept as float16; class scores as float32


class PoolLabels:
    """A control in a teacher's place: the labels of a pool of open images, which no server has."""

    identity = "labels"

    def __init__(self, pool: ImageSet):
        self.pool = pool

    def asked(self, names: Sequence[str]) -> str:
        """The class names, and the pool's."""
        return str((*names, self.pool.names))

    def images_at_once(self, names: Sequence[str]) -> int:
        """All of them."""
        return len(self.pool)

    def class_probabilities(self, images: np.ndarray, names: Sequence[str]) -> Tensor:
        """One for the label's name, the same for all names if it is none of them: float32 (N, C)."""
        label = torch.tensor([names.index(n) if n in names else -1 for n in np.take(self.pool.names, self.pool.labels)])
        return torch.where(label[:, None] < 0, 1 / len(names), one_hot(label.clamp(min=0), len(names)).float())


class StoredAnswers:
    """A teacher's features, tokens or class scores of a data set, read by index: ``stored[indices]`` -> (B, ...).

    A file holds up to 1,024 images and is written atomically, so a killed run resumes. Its name ends in a checksum of
    content, images, model and question, so neither damaged answers nor another model's are read.

    Args:
        teacher: computes what is missing.
        what: ``"features"``, ``"tokens"``, ``"class_logits"`` or ``"class_probabilities"``.
        data: the images.
        folder: of the cache.
        names: the class names, for the last two.

    Raises:
        ValueError: no such thing; an index outside the data; answers that are not finite; a damaged file (named).
    """

    def __init__(
        self, teacher: Teacher | PoolLabels, what: str, data: ImageSet, folder: str | Path, names: Sequence[str] = ()
    ):
        if what not in (*HALF, "class_logits", "class_probabilities"):
            raise ValueError(f"what must be features, tokens, class_logits or class_probabilities; got {what!r}")
        self.teacher, self.what, self.data, self.names = teacher, what, data, tuple(names)
        at_once = max(1, teacher.images_at_once(names))
        self.chunk = max(1, CHUNK // at_once) * at_once  # batches are cut as without a cache
        images = f"{data.origin[-60:].replace('/', '-')}-{data.checksum()[:12]}"
        question = hashlib.sha256(teacher.asked(names).encode()).hexdigest()[:12] if names else ""
        self.place = Path(folder) / images / "-".join(part for part in (teacher.identity, what, question) if part)
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
            missing = [c for c in chunks if not self._files(c)]
            with progress_bar(len(missing) * self.chunk, "images", self.what) as bar:
                for c in missing:
                    content = self._compute(c)
                    write_atomically(self.place / f"{self._range(c)}-{self._checksum(c, [content])}.npy", content)
                    bar.update(self.chunk)
        self._open |= {c: self._read(c) for c in chunks}

    def _compute(self, chunk: int) -> bytes:
        images = self.data.images[chunk * self.chunk : (chunk + 1) * self.chunk]
        ask = getattr(self.teacher, self.what)
        values = ask(images, self.names) if self.names else ask(images)
        values = values.half() if self.what in HALF else values.float()
        if not values.isfinite().all():
            raise ValueError(f"the {self.what} of {self.teacher.identity} are not finite; take another dtype")
        buffer = io.BytesIO()
        np.save(buffer, values.numpy())
        return buffer.getvalue()

    def _read(self, chunk: int) -> np.ndarray:
        path = self._files(chunk)[0]
        with open(path, "rb") as file:
            found = self._checksum(chunk, iter(lambda: file.read(BLOCK), b""))
        if found != path.stem.rpartition("-")[2]:
            raise ValueError(f"{path} is damaged: its checksum is not {found}; remove it to compute it again")
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def _files(self, chunk: int) -> list[Path]:
        return sorted(self.place.glob(f"{self._range(chunk)}-*.npy"))

    def _range(self, chunk: int) -> str:
        return f"{chunk * self.chunk:07d}-{min((chunk + 1) * self.chunk, len(self.data)):07d}"

    def _checksum(self, chunk: int, content: Iterable[bytes]) -> str:
        digest = hashlib.sha256(f"{self.place.parent.name} {self.place.name} {self._range(chunk)}".encode())
        for block in content:
            digest.update(block)
        return digest.hexdigest()[:16]


def ask_teacher(
    teacher: Teacher | PoolLabels,
    pool: ImageSet,
    names: Sequence[str],
    folder: str | Path = "",
    what: str = "class_probabilities",
) -> Tensor:
    """The teacher's ``class_probabilities`` or ``class_logits`` (N, C) of the images; an empty folder: no cache."""
    if not folder:
        return getattr(teacher, what)(pool.images, names)
    return torch.from_numpy(StoredAnswers(teacher, what, pool, folder, names)[np.arange(len(pool))])
