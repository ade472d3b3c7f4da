"""The questions that got no text, and why: ``NAME.rejected.json`` beside the records."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mllmfl_lite.repro import write_json
from mllmfl_lite.stages.backends import Answer, Backend, Question
from mllmfl_lite.teachers.prompts import prompt_hash


@dataclass(frozen=True)
class Rejection:
    """Why a question got no text.

    Attributes:
        reason: in the server's words, if it gave any.
        model: who was asked.
        prompt: hash of the prompt.
        tokens: how many were too few; 0 if that is not the reason.
        last: the run ended with it: it is asked once more, at the end of the next run.
    """

    reason: str
    model: str
    prompt: str
    tokens: int = 0
    last: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str) or not isinstance(self.tokens, int):
            raise TypeError("reason must be text, tokens a number")


class Rejected:
    """All of them, as ``{id: {kind: Rejection}}``; the file is JSON.

    Args:
        path: the file.
        backend: who is asked now.
        retry: forget the file: all are asked again.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, path: Path, backend: Backend, retry: bool = False):
        self.path, self.backend = path, backend
        self.entries: dict[str, dict[str, Rejection]] = {}
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a regular file; choose another name")
        if retry or not path.exists():
            return
        try:
            for name, kinds in json.loads(path.read_text(encoding="utf-8")).items():
                self.entries[name] = {kind: Rejection(**entry) for kind, entry in kinds.items()}
        except (ValueError, RecursionError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error!r:.100}); remove it: all its questions are asked") from None

    def find(self, question: Question) -> Rejection | None:
        """The entry of a question that need not be asked now: same model, same prompt, no more tokens than then."""
        found = self.entries.get(question.id, {}).get(question.kind)
        if found is None or (found.model, found.prompt) != (self.backend.model, prompt_hash(question.prompt)):
            return None
        return None if 0 < found.tokens < self.backend.max_new_tokens else found

    def had_too_few_tokens(self, question: Question) -> bool:
        """Whether a question got no text for lack of tokens."""
        found = self.entries.get(question.id, {}).get(question.kind)
        return found is not None and found.tokens > 0

    def add(self, question: Question, answer: Answer) -> None:
        """Enter a question that was refused."""
        tokens = self.backend.max_new_tokens if answer.fault == "tokens" else 0
        entry = Rejection(answer.refusal, self.backend.model, prompt_hash(question.prompt), tokens)
        self.entries.setdefault(question.id, {})[question.kind] = entry

    def remove(self, question: Question) -> None:
        """Forget a question that has its text now."""
        if self.entries.get(question.id, {}).pop(question.kind, None) and not self.entries[question.id]:
            del self.entries[question.id]

    def ask_last(self, questions: Collection[Question]) -> None:
        """Let these be asked once more, at the end of the next run."""
        for question in questions:
            entry = self.entries[question.id][question.kind]
            self.entries[question.id][question.kind] = replace(entry, last=True)

    def reasons(self, ids: Collection[str], kinds: Collection[str]) -> dict[str, str]:
        """For each of these images that lacks a text of these kinds, why."""
        found = {i: {e.reason: 0 for kind, e in self.entries.get(i, {}).items() if kind in kinds} for i in ids}
        return {i: "; ".join(reasons) for i, reasons in found.items() if reasons}

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, {name: {k: asdict(e) for k, e in kinds.items()} for name, kinds in self.entries.items()})
