"""What stage 1 learns from: annotations as token ids, and what each model is shown of the images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.data.images import ImageFiles, ImageSet
from mllmfl_lite.repro import numpy_generator, pick_device
from mllmfl_lite.stages.records import Record
from mllmfl_lite.teachers.answers import StoredAnswers
from mllmfl_lite.teachers.llava import MllmTeacher
from mllmfl_lite.teachers.prompts import load_prompts, prompt_hash


@dataclass(frozen=True)
class Texts:
    """Annotations as token ids, one row a text, sorted by image and kind."""

    image: np.ndarray  #: int64 (R,), the number of each text's image among `ids`
    kind: np.ndarray  #: int64 (R,), into `questions`
    questions: list[list[int]]  #: for each kind the ids of chat, image places and prompt
    answers: list[list[int]]  #: for each text the ids of the answer, its end included
    ids: list[str]  #: the names of the images

    def __len__(self) -> int:
        return len(self.image)

    def shuffled(self, seed: int) -> Texts:
        """A control: every image is given another image's texts."""
        images = np.unique(self.image)
        order = numpy_generator(seed, "shuffled texts").permutation(len(images))
        other = dict(zip(images[order].tolist(), images[np.roll(order, 1)].tolist(), strict=True))
        return replace(self, image=np.array([other[i] for i in self.image.tolist()], np.int64))

    def batches(self, size: int, seed: int, epoch: int, by_length: bool = True) -> list[np.ndarray]:
        """One epoch's row numbers in batches of `size` rows of one kind. Rows that fill no batch are left out.

        `by_length` puts texts of similar length together, which is faster; but length goes with content.
        """
        rng, batches = numpy_generator(seed, "texts", epoch), []
        for kind in np.unique(self.kind):
            rows = rng.permutation(np.flatnonzero(self.kind == kind))
            for chunk in np.split(rows, range(16 * size, len(rows), 16 * size)):
                if by_length:
                    chunk = chunk[np.argsort([len(self.answers[row]) for row in chunk], kind="stable")]
                whole = len(chunk) // size * size
                batches += np.split(chunk[:whole], whole // size) if whole else []
        return [batches[i] for i in rng.permutation(len(batches))]

    def tokens(self, rows: np.ndarray, longest: int) -> tuple[Tensor, Tensor]:
        """Input ids and labels of rows of one kind: int64 (B, L). Labels are -100 outside the answers.

        Answers are cut at `longest` tokens and padded on the right: under a causal mask no learned token sees padding.
        """
        question = torch.tensor(self.questions[self.kind[rows[0]]])
        answers = [torch.tensor(self.answers[row][:longest]) for row in rows]
        ids = pad_sequence([torch.cat([question, answer]) for answer in answers], batch_first=True)
        learned = pad_sequence(answers, batch_first=True, padding_value=-100)
        return ids, torch.cat([torch.full((len(rows), len(question)), -100), learned], 1)


def read_texts(
    records: Sequence[Record], ids: Sequence[str], mllm: MllmTeacher, prompts: dict[str, str] | None = None
) -> Texts:
    """Tokenise annotations as this MLLM reads them. Their order in the file changes nothing.

    `ids` are the names of the pool's images. `prompts` are the questions by kind; the bundled ones by default.

    Raises:
        ValueError: no record, a record about an image that is not in the pool, or of a kind without a prompt.
    """
    prompts, place = prompts or load_prompts(), {name: i for i, name in enumerate(ids)}
    if not records:
        raise ValueError("there is no text to learn from: the annotation file is empty, or filters took every record")
    if missing := [record.id for record in records if record.id not in place]:
        strange = f"{len(missing)} of {len(records)} records are about images that are not in the pool"
        raise ValueError(f"{strange}, such as {missing[0]!r}; use the pool that was annotated")
    kinds = sorted({record.kind for record in records})
    if unknown := [kind for kind in kinds if kind not in prompts]:
        raise ValueError(f"there is no prompt for records of kind {unknown[0]!r}; prompts: {', '.join(prompts)}")
    hashes = {kind: prompt_hash(prompts[kind]) for kind in kinds}
    if other := sum(record.prompt != hashes[record.kind] for record in records):
        warnings.warn(f"{other} of {len(records)} texts answered another prompt than the one given here", stacklevel=2)
    records = sorted(records, key=lambda record: (place[record.id], record.kind))
    return Texts(
        np.array([place[record.id] for record in records]),
        np.array([kinds.index(record.kind) for record in records]),
        [mllm.question_ids(prompts[kind]) for kind in kinds],
        [mllm.answer_ids(record.text) for record in records],
        list(ids),
    )


class Views:
    """Views of a pool's images, in memory or in files.

    `folder` caches the tokens of the MLLM's vision tower; "" computes them each time. Those of images in files are not
    stored: LLaVA-1.5's tokens of 595,000 images are 700 GB. `device`: where the compact model trains.
    """

    def __init__(self, pool: ImageSet, mllm: MllmTeacher, folder: str | Path = "", device: torch.device | str = "cpu"):
        self.pool, self.mllm, self.device = pool, mllm, pick_device(device)
        self._batches = open_batches(pool, self.device)
        stored = folder and not isinstance(pool.images, ImageFiles)
        self._stored = StoredAnswers(mllm, "tokens", pool, folder) if stored else None

    def __len__(self) -> int:
        return len(self.pool)

    def compact(self, indices: np.ndarray, generator: torch.Generator | None) -> Tensor:
        """For the compact model: float (B, 3, H, W), normalised; cropped and flipped if there is a generator."""
        rows = torch.from_numpy(indices).to(self.device)
        return self._batches.augmented(rows, generator) if generator else self._batches.plain(rows)

    def tokens(self, indices: np.ndarray) -> Tensor:
        """For the MLLM's projector: float (B, P, D)."""
        if self._stored:
            return torch.from_numpy(self._stored[indices])
        return self.mllm.tokens(cast(Sequence, self.pool.subset(indices).images))
