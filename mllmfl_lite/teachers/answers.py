"""The cache of what frozen teachers say of images: computed once, kept on disk, verified when read."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import filelock
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.repro import progress_bar, write_atomically
from mllmfl_lite.teachers.base import Images, Teacher

CHUNK = 1024  # images a file, at most
KEPT = {"tokens": torch.float16, "class_logits": torch.float32, "class_probabilities": torch.float32}


class PoolLabels:
    """A control in a teacher's place: the labels of a pool of open images, which no server has."""

    def __init__(self, pool: ImageSet):
        self.pool = pool

    def class_probabilities(self, images: Images, names: Sequence[str]) -> Tensor:
        """One for the label's name, the same for all names if it is none of them: float32 (N, C), of the whole pool."""
        label = torch.tensor([names.index(n) if n in names else -1 for n in np.take(self.pool.names, self.pool.labels)])
        return torch.where(label[:, None] < 0, 1 / len(names), one_hot(label.clamp(min=0), len(names)).float())


class StoredAnswers:
    """A teacher's tokens or class scores of a data set, read by index: ``stored[indices]`` -> (B, ...).

    A file holds up to 1,024 images and is written atomically, so a killed run resumes. Its name ends in a checksum of
    content, images, model and question, so neither damaged answers nor another model's are read. `what` is one of
    `KEPT`; class scores need the class names.

    Raises:
        ValueError: no such thing; an index outside the data; answers that are not finite; a damaged file (named).
    """

    def __init__(self, teacher: Teacher, what: str, data: ImageSet, folder: str | Path, names: Sequence[str] = ()):
        if what not in KEPT:
            raise ValueError(f"what must be {', '.join(KEPT)}; got {what!r}")
        self.teacher, self.what, self.data, self.names = teacher, what, data, tuple(names)
        at_once = max(1, teacher.images_at_once(names))
        self.chunk = max(1, CHUNK // at_once) * at_once  # batches are cut as without a cache
        images = f"{data.origin[-60:].replace('/', '-')}-{data.checksum()[:12]}"
        question = hashlib.sha256(teacher.asked(names).encode()).hexdigest()[:12] if names else ""
        self.place = Path(folder) / images / "-".join(part for part in (teacher.identity, what, question) if part)
        self._open: dict[int, np.ndarray] = {}

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        low, high = np.min(indices), np.max(indices)
        if low < 0 or high >= len(self.data):
            raise ValueError(f"indices must lie in 0..{len(self.data) - 1}; these run from {low} to {high}")
        chunks, rows = np.divmod(indices, self.chunk)
        self._prepare(sorted({*chunks.tolist()} - {*self._open}))
        return np.stack([self._open[chunk][row] for chunk, row in zip(chunks.tolist(), rows, strict=True)])

    def _prepare(self, chunks: list[int]) -> None:
        """Open these files; compute the missing ones. The first of several runs computes, the others wait."""
        if not chunks:
            return
        self.place.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.place / ".lock"):
            missing = [chunk for chunk in chunks if not self._files(chunk)]
            with progress_bar(len(missing) * self.chunk, "images", self.what) as bar:
                for chunk in missing:
                    content = self._compute(chunk)
                    path = self.place / f"{self._range(chunk)}-{self._checksum(chunk, content)}.npy"
                    write_atomically(path, content)
                    bar.update(self.chunk)
        for chunk in chunks:
            path = self._files(chunk)[0]
            found = self._checksum(chunk, path.read_bytes())
            if not path.stem.endswith(found):
                raise ValueError(f"{path} is damaged: its checksum is not {found}; remove it to compute it again")
            self._open[chunk] = np.load(path, mmap_mode="r", allow_pickle=False)

    def _compute(self, chunk: int) -> bytes:
        images = self.data.images[chunk * self.chunk : (chunk + 1) * self.chunk]
        ask = getattr(self.teacher, self.what)
        values = (ask(images, self.names) if self.names else ask(images)).to(KEPT[self.what])
        if not values.isfinite().all():
            raise ValueError(f"the {self.what} of {self.teacher.identity} are not finite; take another dtype")
        buffer = io.BytesIO()
        np.save(buffer, values.numpy())
        return buffer.getvalue()

    def _files(self, chunk: int) -> list[Path]:
        return sorted(self.place.glob(f"{self._range(chunk)}-*.npy"))

    def _range(self, chunk: int) -> str:
        return f"{chunk * self.chunk:07d}-{min((chunk + 1) * self.chunk, len(self.data)):07d}"

    def _checksum(self, chunk: int, content: bytes) -> str:
        digest = hashlib.sha256(f"{self.place.parent.name} {self.place.name} {self._range(chunk)}".encode())
        digest.update(content)
        return digest.hexdigest()[:16]


def ask_teacher(
    teacher: Teacher | PoolLabels,
    pool: ImageSet,
    names: Sequence[str],
    folder: str | Path = "",
    what: str = "class_probabilities",
) -> Tensor:
    """The teacher's ``class_probabilities`` or ``class_logits`` (N, C) of the images; an empty folder: no cache."""
    if not folder or isinstance(teacher, PoolLabels):
        return getattr(teacher, what)(pool.images, names)
    return torch.from_numpy(StoredAnswers(teacher, what, pool, folder, names)[np.arange(len(pool))])
