"""Stage 1a, annotation: an MLLM is asked about every image of a pool; each answer is written as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import filelock

from mllmfl_lite.data.images import ImageFiles, ImageSet
from mllmfl_lite.repro import progress_bar, write_json
from mllmfl_lite.stages.backends import Answer, Backend, Question
from mllmfl_lite.stages.records import Journal, Record, read_records
from mllmfl_lite.teachers.prompts import KINDS, load_prompts, prompt_hash

SAVE_REJECTED = 10.0  # seconds between two writes of the list of rejected images


@dataclass
class Summary:
    """What a run did.

    Attributes:
        records: every record of the file, in the order of images and kinds.
        written: how many of them this run added.
        rejected: for each image that has no record, why.
        seconds: how long this run took.
    """

    records: list[Record]
    written: int
    rejected: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def annotate(
    pool: ImageSet,
    backend: Backend,
    path: str | Path,
    kinds: Sequence[str] = KINDS,
    prompts: dict[str, str] | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> Summary:
    """Ask `backend` about every image, in every kind, and write the answers to a JSON-lines file as they come.

    A run that was stopped resumes: what is in the file is not asked again. What concerns one image (it cannot be
    opened, the server refuses it, its answer is empty) goes into ``....rejected.json`` beside the file, and is asked
    again the next time.

    Args:
        pool: the images.
        backend: who answers.
        path: the .jsonl file.
        kinds: which prompts to ask.
        prompts: the text of each kind; the bundled ones by default.
        tell: called with sentences about the run.

    Raises:
        ValueError: no such prompt; the file belongs to another run, is in use or cannot be written; or nothing more can
            be asked: the sentence says how far the run got.
    """
    path, prompts, started = Path(path), prompts or load_prompts(), time.monotonic()
    if unknown := [kind for kind in kinds if kind not in prompts]:
        raise ValueError(f"no prompt for {', '.join(unknown)}; there are {', '.join(prompts)}")
    kinds = list(dict.fromkeys(kinds))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a regular file; choose another name")
        with filelock.FileLock(f"{path}.lock", timeout=0), Journal(path, backend.model, prompts) as journal:
            run = _Run(pool, backend, journal, {kind: prompts[kind] for kind in kinds}, tell)
            run.go()
    except filelock.Timeout:
        raise ValueError(f"{path} is being written by another run; wait for it, or choose another file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); choose a place that can be") from error
    order = {key: i for i, key in enumerate((i, kind) for i in pool.ids for kind in kinds)}
    records = sorted((r for r in read_records(path) if r.key in order), key=lambda record: order[record.key])
    return Summary(records, run.written, run.rejected, time.monotonic() - started)


class _Run:
    def __init__(self, pool: ImageSet, backend: Backend, journal: Journal, prompts: dict[str, str], tell: Callable):
        self.pool, self.backend, self.journal, self.prompts, self.tell = pool, backend, journal, prompts, tell
        self.place = {name: i for i, name in enumerate(pool.ids)}
        self.ending = "" if isinstance(pool.images, ImageFiles) else ".png"
        self.total = sum((i, kind) not in journal.done for kind in prompts for i in self.place)
        self.written, self.rejected, self.saved = 0, {}, time.monotonic()

    def go(self) -> None:
        list_path = self.journal.path.with_suffix(".rejected.json")
        started = time.monotonic()
        try:
            with progress_bar(self.total, "records", "annotating") as bar:
                for question, answer in self.backend.answers(self._batches(), self._open):
                    self._keep(question, answer)
                    bar.update()
                    if self.written == self.backend.batch_size and self.total > self.written:
                        left = (time.monotonic() - started) * (self.total / self.written - 1)
                        self.tell(f"{self.total - self.written:,} records to write, about {left / 60:.1f} minutes")
                    if time.monotonic() - self.saved > SAVE_REJECTED:
                        write_json(list_path, self.rejected)
                        self.saved = time.monotonic()
        except ValueError as error:
            done = (
                f"{self.written} of {self.total} records were written in this run, {len(self.rejected)} images rejected"
            )
            raise ValueError(f"{error}. {done}; run the same command again, and it resumes") from None
        finally:
            write_json(list_path, self.rejected)

    def _batches(self) -> Iterator[list[Question]]:
        """Questions of one kind each, short prompts first; batches are cut at the same places in every run."""
        ids, size = list(self.place), self.backend.batch_size
        for kind in sorted(self.prompts, key=lambda k: len(self.prompts[k])):
            for i in range(0, len(ids), size):
                batch = [Question(name, kind, self.prompts[kind]) for name in ids[i : i + size]]
                if any((q.id, q.kind) not in self.journal.done for q in batch):
                    yield batch

    def _open(self, name: str):
        return self.pool.open(self.place[name])

    def _keep(self, question: Question, answer: Answer) -> None:
        if (question.id, question.kind) in self.journal.done:
            return
        if answer.refusal or not answer.text:
            known = self.rejected.get(question.id)
            reason = answer.refusal or "the model gave an empty answer"
            self.rejected[question.id] = f"{known}; {reason}" if known and reason not in known else reason
            return
        model = self.backend.model
        if answer.model and answer.model != model:
            if not self.written:
                self.tell(f"note: {answer.model!r} answers, though {model!r} is asked")
            model = f"{answer.model} (asked as {model})"
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        digest = prompt_hash(question.prompt)
        name = f"{question.id}{self.ending}"
        self.journal.append(Record(question.id, name, question.kind, answer.text, answer.finished, model, digest, now))
        self.written += 1
