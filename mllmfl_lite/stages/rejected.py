"""The questions that got no text, and why: ``NAME.rejected.json`` beside the records."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mllmfl_lite.repro import write_json
from mllmfl_lite.stages.backends import Answer, Backend, Question
from mllmfl_lite.stages.records import UNUSABLE, require_regular
from mllmfl_lite.teachers.prompts import prompt_hash


@dataclass(frozen=True)
class Rejection:
    """Why a question got no text."""

    reason: str  #: in the server's words, if it gave any
    model: str  #: who was asked
    prompt: str  #: its hash, see `prompt_hash`
    tokens: int = 0  #: how many were too few; 0 if that is not the reason
    last: bool = False  #: the run ended with it, so it is asked once more, at the end of the next run


class Rejected:
    """All of them, by image and kind; the file is JSON.

    `backend` is who is asked now; `retry` forgets the file: all are asked again. A damaged file is a `ValueError`.
    """

    def __init__(self, path: Path, backend: Backend, retry: bool = False):
        self.path, self.backend = path, backend
        self.entries: dict[tuple[str, str], Rejection] = {}
        require_regular(path)
        if retry or not path.exists():
            return
        try:
            for name, kinds in json.loads(path.read_text(encoding="utf-8")).items():
                self.entries |= {(name, kind): Rejection(**entry) for kind, entry in kinds.items()}
        except UNUSABLE as error:
            raise ValueError(f"{path} is damaged ({error!r:.100}); remove it: all its questions are asked") from None

    def find(self, question: Question) -> Rejection | None:
        """The entry of a question that need not be asked now: same model, same prompt, no more tokens than then."""
        found = self.entries.get(question.key)
        if found is None or (found.model, found.prompt) != (self.backend.model, prompt_hash(question.prompt)):
            return None
        return None if 0 < found.tokens < self.backend.max_new_tokens else found

    def add(self, question: Question, answer: Answer) -> None:
        """Enter a question that was refused."""
        tokens = self.backend.max_new_tokens if answer.fault == "tokens" else 0
        entry = Rejection(answer.refusal, self.backend.model, prompt_hash(question.prompt), tokens)
        self.entries[question.key] = entry

    def ask_last(self, questions: Collection[Question]) -> None:
        """Let these be asked once more, at the end of the next run."""
        for question in questions:
            self.entries[question.key] = replace(self.entries[question.key], last=True)

    def reasons(self, ids: Collection[str], kinds: Collection[str]) -> dict[str, str]:
        """For each of these images that lacks a text of these kinds, why."""
        found = {i: {self.entries[i, kind].reason: 0 for kind in kinds if (i, kind) in self.entries} for i in ids}
        return {i: "; ".join(reasons) for i, reasons in found.items() if reasons}

    def save(self) -> None:
        """Write the file."""
        by_image: dict[str, dict] = {}
        for (name, kind), entry in self.entries.items():
            by_image.setdefault(name, {})[kind] = asdict(entry)
        write_json(self.path, by_image)
