"""Stage 1a, annotation: an MLLM is asked about every image of a pool; each answer is written as it comes."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
from PIL import Image

from mllmfl_lite.data.images import ImageFiles, ImageSet
from mllmfl_lite.repro import progress_bar
from mllmfl_lite.stages.backends import Answer, Backend, Question
from mllmfl_lite.stages.records import Journal, Record, Rejection, read_records, read_rejected, write_rejected
from mllmfl_lite.teachers.prompts import KINDS, load_prompts, prompt_hash

SAVE_REJECTED = 10.0  # seconds between two writes of the list of rejected images
PACE = 20  # answers after which a run says how long it takes
LETTERS = 4  # a token, roughly
IN_A_ROW = 5  # failures of the server that end a run


@dataclass
class Summary:
    """What a run did."""

    records: list[Record]  #: every record of the file, in the order of images and kinds
    written: int  #: how many of them this run added
    rejected: dict[str, str]  #: for each image that lacks a text, why
    seconds: float  #: how long this run took


def annotate(
    pool: ImageSet,
    backend: Backend,
    path: str | Path,
    kinds: Sequence[str] = KINDS,
    prompts: dict[str, str] | None = None,
    tell: Callable[[str], object] = lambda _: None,
    retry_rejected: bool = False,
) -> Summary:
    """Ask `backend` about every image, in every kind, and append the answers to a JSON-lines file as they come.

    A run that was stopped resumes: what is in the file is not asked again. What concerns one image (it cannot be
    opened, the server refuses it, its answer is empty) goes into ``....rejected.json`` beside the file and is asked
    again only if `retry_rejected`. `prompts` are the texts by kind, the bundled ones by default. `tell` is called with
    sentences about the run.

    Raises:
        ValueError: no such prompt; a file belongs to another run, is damaged, in use or cannot be written; or nothing
            more can be asked: the sentence says how far the run got.
    """
    path, started, asked = Path(path), time.monotonic(), choose_prompts(kinds, prompts or load_prompts())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock", timeout=0), Journal(path, backend.model, asked) as journal:
            run = _Run(pool, backend, journal, asked, tell, retry_rejected)
            run.go()
    except filelock.Timeout:
        raise ValueError(f"{path} is being written by another run; wait for it, or choose another file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror or error}); choose a place that can be") from error
    keys, found = list(itertools.product(pool.ids, asked)), {record.key: record for record in read_records(path)}
    lacking = itertools.groupby((key for key in keys if key in run.rejected), key=lambda key: key[0])
    reasons = {name: "; ".join(dict.fromkeys(run.rejected[key].reason for key in same)) for name, same in lacking}
    return Summary([found[key] for key in keys if key in found], run.written, reasons, time.monotonic() - started)


def choose_prompts(kinds: Sequence[str], prompts: dict[str, str]) -> dict[str, str]:
    """The prompts of these kinds; `ValueError` if one lacks."""
    if unknown := [kind for kind in kinds if kind not in prompts]:
        raise ValueError(f"no prompt for {', '.join(unknown)}; there are {', '.join(prompts)}")
    return {kind: prompts[kind] for kind in kinds}


class _Run:
    def __init__(
        self, pool: ImageSet, backend: Backend, journal: Journal, prompts: dict[str, str], tell: Callable, retry: bool
    ):
        self.pool, self.backend, self.journal, self.prompts, self.tell = pool, backend, journal, prompts, tell
        self.place = {name: i for i, name in enumerate(pool.ids)}
        self.list = journal.path.with_suffix(".rejected.json")
        self.rejected = {} if retry else read_rejected(self.list)
        questions = (Question(name, kind, prompts[kind]) for kind in prompts for name in self.place)
        found = {question: self._rejection(question) for question in questions if question.key not in journal.done}
        self.wanted = {q: bool(entry) for q, entry in found.items() if not entry or entry.last}  # True: asked last
        self.skipped = len(found) - len(self.wanted)
        self.started, self.written, self.characters = time.monotonic(), 0, 0
        self.streak: list[Question] = []  # those at which the server fails now
        self.reason = self.stopped = ""

    def _rejection(self, question: Question) -> Rejection | None:
        """Why it need not be asked now: it was rejected by the same model, for the same prompt and no fewer tokens."""
        found = self.rejected.get(question.key)
        if found is None or (found.model, found.prompt) != (self.backend.model, prompt_hash(question.prompt)):
            return None
        return None if 0 < found.tokens < self.backend.max_new_tokens else found

    def go(self) -> None:
        """Ask what is wanted; whatever ends the run, say how far it got."""
        if self.skipped:
            self.tell(f"{self.skipped:,} questions were rejected before and are not asked again")
        known = [self.rejected[question.key] for question in self.wanted if question.key in self.rejected]
        if more := sum(entry.tokens > 0 for entry in known):
            self.tell(f"{more:,} questions for which the tokens were too few are asked again, now with more")
        try:
            self._ask()
            write_rejected(self.list, self.rejected)
        except BaseException as error:
            self.rejected |= {q.key: replace(self.rejected[q.key], last=True) for q in self.streak}
            with contextlib.suppress(OSError):
                write_rejected(self.list, self.rejected)
            if not isinstance(error, (ValueError, OSError)):
                raise
            raise ValueError(
                f"{error}. {self.written:,} of {len(self.wanted):,} texts were written in this run, "
                f"{len(self.journal.done):,} are kept; the same command resumes"
            ) from error

    def _ask(self) -> None:
        saved, answers = time.monotonic(), self.backend.answers(self._batches(), self._open)
        with progress_bar(len(self.wanted), "texts", "annotating") as bar, contextlib.closing(answers):
            for question, answer in answers:
                if question in self.wanted and question.key not in self.journal.done:
                    if answer.fault not in ("server", "file") and not self.stopped:
                        self.streak = []
                    (self._keep if answer.text else self._reject)(question, answer)
                    bar.update()
                if time.monotonic() - saved > SAVE_REJECTED:
                    write_rejected(self.list, self.rejected)
                    saved = time.monotonic()
        if self.streak and not self.journal.done:
            self.stopped = self.stopped or f"no request succeeded; the last failed so: {self.reason}"
        if self.stopped:
            raise ValueError(self.stopped)

    def _batches(self) -> Iterator[list[Question]]:
        """Questions of one kind each, short prompts first; batches are cut at the same places in every run."""
        ids, size = list(self.place), self.backend.batch_size
        for last in (False, True):
            for kind in sorted(self.prompts, key=lambda k: len(self.prompts[k])):
                for i in range(0, len(ids), size):
                    batch = [Question(name, kind, self.prompts[kind]) for name in ids[i : i + size]]
                    if not self.stopped and any(self.wanted.get(question) is last for question in batch):
                        yield batch

    def _open(self, name: str) -> Image.Image:
        return self.pool.open(self.place[name])

    def _keep(self, question: Question, answer: Answer) -> None:
        """Write a text."""
        image = question.id if isinstance(self.pool.images, ImageFiles) else f"{question.id}.png"
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        said = (answer.text, answer.finished, self._answerer(answer.model), prompt_hash(question.prompt))
        self.journal.append(Record(question.id, image, question.kind, *said, now))
        self.rejected.pop(question.key, None)
        self.written += 1
        self.characters += len(answer.text)
        left = len(self.wanted) / self.written - 1
        if self.written == PACE and left > 0:
            minutes, tokens = left * (time.monotonic() - self.started) / 60, left * self.characters / LETTERS
            self.tell(f"{PACE} texts written; about {minutes:,.1f} minutes and {tokens:,.0f} tokens to go")

    def _reject(self, question: Question, answer: Answer) -> None:
        """Enter it in the list; end the run if the server fails too often in a row."""
        self.reason = answer.refusal
        if isinstance(self.pool.images, ImageFiles):  # no absolute paths
            for folder in (os.path.abspath(self.pool.images.root), os.path.realpath(self.pool.images.root)):
                self.reason = self.reason.replace(os.path.join(folder, ""), "")
        tokens = self.backend.max_new_tokens if answer.fault == "tokens" else 0
        self.rejected[question.key] = Rejection(self.reason, self.backend.model, prompt_hash(question.prompt), tokens)
        if answer.fault == "server" and not self.wanted[question]:
            self.streak.append(question)
            if len(self.streak) >= IN_A_ROW:
                self.stopped = f"{IN_A_ROW} requests in a row failed in the same way, the last so: {self.reason}"

    def _answerer(self, says: str) -> str:
        """The model's name for a record; another one than in the file ends the run."""
        asked, known = self.backend.model, self.journal.models
        name = asked if says in ("", asked) else f"{says} (asked as {asked})"
        if known and name not in known and not self.written:
            raise ValueError(f"{self.journal.path} holds texts of {known[0]!r}, now {name!r} answers; use another file")
        if name != asked and not self.written:
            self.tell(f"note: {says!r} answers, though {asked!r} is asked")
        return name
