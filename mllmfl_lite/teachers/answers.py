"""The frozen models on the server behind one small interface: features, visual tokens, class probabilities::

    clip = load_clip()                               # the bundled stand-in; or ("ViT-L-14", "openai")
    mllm = load_mllm()                               # the bundled stand-in; or ("llava-hf/llava-1.5-7b-hf")
    clip.features(images)                            # (N, D), unit length
    mllm.tokens(images)                              # (N, P, D): what its projector is given
    clip.class_probabilities(images, names)          # (N, C): zero-shot, from text prompts
    mllm.class_probabilities(images, names)          # (N, C): likelihood of each name as its answer
    stored(clip, "features", data, folder)           # computed once, kept on disk

Images are uint8 arrays (N, H, W, 3), or lists of PIL images of any size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import filelock
import numpy as np
import safetensors.torch
from torch import Tensor

from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.repro import progress_bar, write_atomically, write_json
from mllmfl_lite.teachers.base import Teacher, TeacherError

CHUNK = 1024  # images in one file of stored features


class StoredFeatures:
    """Features or tokens of a data set, computed once, read by index: ``stored[indices]`` -> float16 (B, ...).

    One file holds 1,024 images, written whole or not at all, so that a killed run goes on where it was. Files are
    mapped, not loaded. The folder's name is made of the data's checksum and the model's, so that no other images' or
    model's numbers are ever read.

    Args:
        teacher: computes what is missing.
        what: ``"features"`` or ``"tokens"``.
        data: the images.
        folder: where features are kept.

    Raises:
        ValueError: no such thing to store; when read, an index beyond the data.
        TeacherError: when read, a file is damaged or belongs to another model or other images.
    """

    def __init__(self, teacher: Teacher, what: str, data: ImageSet, folder: str | Path):
        if what not in ("features", "tokens"):
            raise ValueError(f"what is 'features' or 'tokens'; got {what!r}")
        self.teacher, self.what, self.data = teacher, what, data
        self._key = {"model": teacher.identity, "data": data.checksum(), "what": what}
        images = f"{data.origin.replace('/', '-')}-{self._key['data'][:12]}"
        self.place = Path(folder) / images / f"{teacher.identity}-{what}"
        self._open: dict[int, np.ndarray] = {}

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices)
        if not len(indices):
            return np.empty((0,), np.float16)
        if not 0 <= indices.min() <= indices.max() < len(self.data):
            raise ValueError(
                f"indices must lie in 0..{len(self.data) - 1}; these run from {indices.min()} to {indices.max()}"
            )
        self._compute(sorted({int(c) for c in indices // CHUNK} - set(self._open)))
        out = None
        for c in np.unique(indices // CHUNK).tolist():
            mine = np.flatnonzero(indices // CHUNK == c)
            out = np.empty((len(indices), *self._open[c].shape[1:]), np.float16) if out is None else out
            out[mine] = self._open[c][indices[mine] % CHUNK]
        return out

    def _compute(self, chunks: list[int]) -> None:
        """Open these files; compute those that are not there."""
        if not chunks:
            return
        self.place.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.place / ".lock"):
            self._same_key()
            missing = [c for c in chunks if not self._path(c).exists()]
            with progress_bar(len(missing) * CHUNK, "images", self.what) as bar:
                for c in missing:
                    values = getattr(self.teacher, self.what)(self.data.images[c * CHUNK : (c + 1) * CHUNK])
                    write_atomically(self._path(c), _as_npy(values.half().numpy()))
                    bar.update(CHUNK)
        for c in chunks:
            self._open[c] = _read_npy(self._path(c), min(CHUNK, len(self.data) - c * CHUNK))

    def _same_key(self) -> None:
        """The folder's name could have been given by hand: what made its files is written inside, too."""
        made_by = self.place / "made_by.json"
        if not made_by.exists():
            write_json(made_by, self._key)
        elif (found := json.loads(made_by.read_text())) != self._key:
            other = "; ".join(f"{k}: {found.get(k)}, now {v}" for k, v in self._key.items() if found.get(k) != v)
            raise TeacherError(
                f"{self.place} holds features of another origin ({other}); remove the folder, and they are computed "
                "again, or name another one"
            )

    def _path(self, chunk: int) -> Path:
        return self.place / f"{chunk:05d}.npy"


def stored(
    teacher: Teacher, what: str, data: ImageSet, folder: str | Path, indices: np.ndarray | None = None
) -> np.ndarray:
    """All of them at once: float16 (len(indices), ...), in the order of `indices`, by default of the data.

    Raises:
        ValueError: as `StoredFeatures`.
        TeacherError: as `StoredFeatures`.
    """
    return StoredFeatures(teacher, what, data, folder)[np.arange(len(data)) if indices is None else indices]


def _as_npy(values: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def _read_npy(path: Path, length: int) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise TeacherError(f"{path} is damaged ({error}); remove it, and it is computed again") from error
    if len(values) != length:
        raise TeacherError(f"{path} holds {len(values)} images, not {length}; remove it, and it is computed again")
    return values


def ask_teacher(
    teacher: Teacher, pool: ImageSet, names: Sequence[str], folder: str | Path = "", what: str = "class_probabilities"
) -> Tensor:
    """The teacher's distribution over the class names for each image of the pool, float32 (N, C).

    Args:
        teacher: anything with `identity` and `class_probabilities`, see `mllmfl_lite.teacher`.
        pool: open images on the server.
        names: the clients' class names.
        folder: where answers are kept, a file for each teacher, pool and list of names; empty keeps nothing.
        what: ``"class_logits"`` for logits in place of probabilities.
    """
    ask = getattr(teacher, what)
    if not folder:
        return ask(pool.images, names)
    asked = [teacher.identity, pool.checksum(), *names, *([what] if what != "class_probabilities" else [])]
    digest = hashlib.sha256("\n".join(asked).encode()).hexdigest()
    path = Path(folder) / f"{teacher.identity}-{digest[:12]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)  # before hours of answers
    with filelock.FileLock(path.with_suffix(".turn")):  # of several runs the first asks, the others wait and read
        if not path.exists():
            write_atomically(path, safetensors.torch.save({"told": ask(pool.images, names).contiguous()}))
    try:
        return safetensors.torch.load_file(path)["told"]
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the teacher is asked again") from error
