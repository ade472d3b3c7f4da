"""Stage 1b, Dynamic Weighted Pretraining: a compact model takes a frozen CLIP's place in front of a frozen LLM::

    mllm  = load_mllm()
    texts = read_texts(bundled_annotations(), array_source(web).ids, mllm)
    views = ArrayViews(web, mllm, folder="runs/features")
    done  = pretrain(build_model("resnet8", 10, width=16), mllm, views, texts, PretrainSettings(epochs=8))
    done.model                                     # what goes to the clients

The language model sees ``H(x) = (1 - alpha) * P_clip(f_clip(x)) + alpha * P_s(g(x))`` in the places of the picture,
with alpha rising from 0 to 1, and its loss on the annotation's tokens trains g and P_s alone. The mixture is the
paper's; this equation, the schedules and the start of P_s are our reading of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mllmfl_lite.repro import numpy_generator
from mllmfl_lite.stages.mixture import PretrainError
from mllmfl_lite.stages.records import Record
from mllmfl_lite.teachers.llava import MllmTeacher, load_prompts


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
        """The control: the same texts and pictures, but every picture is given another picture's texts."""
        there = np.unique(self.image)
        turned = numpy_generator(seed, "shuffled texts").permutation(len(there))
        followed_by = dict(zip(there[turned].tolist(), there[np.roll(turned, 1)].tolist(), strict=True))
        return replace(self, image=np.array([followed_by[i] for i in self.image.tolist()], np.int64))

    def batches(self, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """One epoch: row numbers in batches of one kind and similar length, in an order that seed and epoch decide.

        Rows that do not fill a batch are left out; other epochs leave out others.
        """
        rng = numpy_generator(seed, "texts", epoch)
        batches = []
        for kind in np.unique(self.kind):
            rows = rng.permutation(np.flatnonzero(self.kind == kind))
            for chunk in np.split(rows, range(16 * size, len(rows), 16 * size)):  # sorted by length within a chunk
                chunk = chunk[np.argsort([len(self.answers[row]) for row in chunk], kind="stable")]
                whole = len(chunk) // size * size
                batches += np.split(chunk[:whole], whole // size) if whole else []
        return [batches[i] for i in rng.permutation(len(batches))]

    def tokens(self, rows: np.ndarray, longest: int) -> tuple[Tensor, Tensor]:
        """Input ids and labels of rows of one kind: int64 (B, L); -100 wherever nothing is to be learned.

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
    """Annotations as what the language model reads and says, whatever their order in the file.

    Args:
        records: what passed the filters.
        ids: the names of the images, as their source numbers them.
        mllm: whose tokenizer and chat form are used.
        prompts: what is asked for each kind; default the bundled prompts.

    Raises:
        PretrainError: no record, a record of an image that is not there, or of a kind without a prompt.
    """
    prompts = prompts or load_prompts()
    place = {name: i for i, name in enumerate(ids)}
    if not records:
        raise PretrainError(
            "there is no text to learn from: the annotation file is empty, or filters took every record"
        )
    missing = [record.id for record in records if record.id not in place]
    if missing:
        raise PretrainError(
            f"{len(missing)} of {len(records)} records are about images that are not there, such as {missing[0]!r}; "
            f"give the images that were annotated ({len(place)} are here, such as {next(iter(place), None)!r})"
        )
    kinds = sorted({record.kind for record in records})
    if unknown := [kind for kind in kinds if kind not in prompts]:
        raise PretrainError(f"there is no prompt for records of kind {unknown[0]!r}; prompts: {', '.join(prompts)}")
    ordered = sorted(records, key=lambda record: (place[record.id], record.kind))
    return Texts(
        np.array([place[record.id] for record in ordered]),
        np.array([kinds.index(record.kind) for record in ordered]),
        [mllm.question_ids(prompts[kind]) for kind in kinds],
        [mllm.answer_ids(record.text) for record in ordered],
        list(ids),
    )
