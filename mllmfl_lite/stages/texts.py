"""Annotations as token ids, in batches, for the language model of stage 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mllmfl_lite.repro import numpy_generator
from mllmfl_lite.stages.records import Record
from mllmfl_lite.teachers.llava import MllmTeacher
from mllmfl_lite.teachers.prompts import load_prompts


@dataclass(frozen=True)
class Texts:
    """Annotations as token ids, one row a text, sorted by image and kind.

    Attributes:
        image: int64 (R,), the number of each text's image among `ids`.
        kind: int64 (R,), into `questions`.
        questions: for each kind the ids of chat, picture places and prompt.
        answers: for each text the ids of the answer, its end included.
        ids: the names of the images.
    """

    image: np.ndarray
    kind: np.ndarray
    questions: list[list[int]]
    answers: list[list[int]]
    ids: list[str]

    def __len__(self) -> int:
        return len(self.image)

    def shuffled(self, seed: int) -> Texts:
        """A control: every image is given another image's texts."""
        images = np.unique(self.image)
        order = numpy_generator(seed, "shuffled texts").permutation(len(images))
        other = dict(zip(images[order].tolist(), images[np.roll(order, 1)].tolist(), strict=True))
        return replace(self, image=np.array([other[i] for i in self.image.tolist()], np.int64))

    def batches(self, size: int, seed: int, epoch: int, by_length: bool = True) -> list[np.ndarray]:
        """Row numbers of one epoch in batches of one kind, in an order that seed and epoch decide.

        Rows that do not fill a batch are left out; other epochs leave out others.

        Args:
            size: rows a batch.
            seed: of the run.
            epoch: counted from 0.
            by_length: put texts of similar length together, which is faster; length goes with content.
        """
        rng = numpy_generator(seed, "texts", epoch)
        batches = []
        for kind in np.unique(self.kind):
            rows = rng.permutation(np.flatnonzero(self.kind == kind))
            for chunk in np.split(rows, range(16 * size, len(rows), 16 * size)):  # sorted by length within a chunk
                if by_length:
                    chunk = chunk[np.argsort([len(self.answers[row]) for row in chunk], kind="stable")]
                whole = len(chunk) // size * size
                batches += np.split(chunk[:whole], whole // size) if whole else []
        return [batches[i] for i in rng.permutation(len(batches))]

    def tokens(self, rows: np.ndarray, longest: int) -> tuple[Tensor, Tensor]:
        """Input ids and labels of rows of one kind: int64 (B, L). Labels are -100 outside the answers.

        Answers are padded on the right: under a causal mask no learned token sees the padding.
        """
        question = self.questions[self.kind[rows[0]]]
        answers = [self.answers[row][:longest] for row in rows]
        length = len(question) + max(map(len, answers))
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for i, answer in enumerate(answers):
            end = len(question) + len(answer)
            ids[i, :end] = torch.tensor(question + answer)
            labels[i, len(question) : end] = torch.tensor(answer)
        return ids, labels


def read_texts(
    records: Sequence[Record], ids: Sequence[str], mllm: MllmTeacher, prompts: dict[str, str] | None = None
) -> Texts:
    """Tokenise annotations, whatever their order in the file.

    Args:
        records: what passed the filters.
        ids: the names of the images, as the pool numbers them.
        mllm: its tokenizer and chat template are used.
        prompts: the question of each kind; default: the bundled prompts.

    Raises:
        ValueError: no record, a record about an image that is not in the pool, or of a kind without a prompt.
    """
    prompts = prompts or load_prompts()
    place = {name: i for i, name in enumerate(ids)}
    if not records:
        raise ValueError("there is no text to learn from: the annotation file is empty, or filters took every record")
    missing = [record.id for record in records if record.id not in place]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(records)} records are about images that are not in the pool, such as "
            f"{missing[0]!r}; use the pool that was annotated (here: {len(place)}, from {next(iter(place), None)!r} on)"
        )
    kinds = sorted({record.kind for record in records})
    if unknown := [kind for kind in kinds if kind not in prompts]:
        raise ValueError(f"there is no prompt for records of kind {unknown[0]!r}; prompts: {', '.join(prompts)}")
    ordered = sorted(records, key=lambda record: (place[record.id], record.kind))
    return Texts(
        np.array([place[record.id] for record in ordered]),
        np.array([kinds.index(record.kind) for record in ordered]),
        [mllm.question_ids(prompts[kind]) for kind in kinds],
        [mllm.answer_ids(record.text) for record in ordered],
        list(ids),
    )
