"""Open pictures in, words out: an MLLM annotates images, one JSON line for each image and kind of text.

    python -m mllmfl_lite.annotate my_pictures --out annotations

writes `annotations.jsonl` (every record, with model, prompt hash and time), `annotations.llava.json` (what passed the
filters, in LLaVA's own format) and `annotations.rejected.json` (images that could not be used, and why). The same code
annotates with the bundled stand-in, with LLaVA-1.5-7B on a GPU, or through any endpoint that speaks OpenAI's protocol.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mllmfl_lite.teachers.base import ASSETS
from mllmfl_lite.teachers.llava import prompt_hash

WEB_ANNOTATIONS = ASSETS / "web_annotations.jsonl.gz"


class AnnotationError(RuntimeError):
    """Annotation cannot start or go on; the message says why and what to do. Records already written are kept."""


@dataclass(frozen=True)
class Record:
    """What a model said of one image, in one kind.

    Attributes:
        id: of the image, unique in its source.
        image: the file's name in its folder or archive, or the image's number.
        kind: which prompt was answered.
        text: the answer.
        finished: False where the answer was cut off at the token limit.
        model: who answered: name and checksum, or endpoint model.
        prompt: hash of the prompt, see `prompt_hash`.
        time: when, UTC, ISO 8601.
    """

    id: str
    image: str
    kind: str
    text: str
    finished: bool
    model: str
    prompt: str
    time: str

    @property
    def key(self) -> tuple[str, str]:
        """Image and kind, of which a file holds one record each."""
        return self.id, self.kind


def read_records(path: str | Path) -> list[Record]:
    """The records of a JSON-lines file, or of one that gzip packed. A last line that a kill cut off is left out.

    Raises:
        AnnotationError: no such file, a whole line that is no record, or the same image and kind twice.
    """
    path = Path(path)
    if not path.is_file():
        raise AnnotationError(f"{path} is not there; annotate first, or give the path of an existing .jsonl file")
    records, seen = [], set()
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for number, line in enumerate(content.split(b"\n")[:-1], 1):  # what follows the last newline was cut off
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise AnnotationError(f"{path}, line {number}, is no record ({error}); mend or remove that line") from error
        if record.key in seen:
            raise AnnotationError(f"{path}, line {number}: image {record.id!r} has two records of kind {record.kind!r}")
        seen.add(record.key)
        records.append(record)
    return records


def bundled_annotations() -> list[Record]:
    """What the bundled stand-in says of `cifar10_mini`'s web part, in all kinds; `make annotations` writes it anew."""
    return read_records(WEB_ANNOTATIONS)


class _Journal:
    """The open JSON-lines file: appended to a batch at a time, flushed to the disk, whole lines or none."""

    def __init__(self, path: Path, model: str, prompts: dict[str, str]):
        self.path = path
        self.done: set[tuple[str, str]] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            records = read_records(path)
            for record in records:
                self._same_task(record, model, prompts)
            self.done = {record.key for record in records}
        self._file = open(path, "ab")  # noqa: SIM115 (closed by __exit__)
        whole = path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(whole)
        self._end = whole

    def _same_task(self, record: Record, model: str, prompts: dict[str, str]) -> None:
        if record.model != model:
            raise AnnotationError(
                f"{self.path} holds records of {record.model!r}, this run asks {model!r}; choose another file"
            )
        if record.kind in prompts and record.prompt != prompt_hash(prompts[record.kind]):
            raise AnnotationError(
                f"{self.path} answers another prompt of kind {record.kind!r} (hash {record.prompt}, now "
                f"{prompt_hash(prompts[record.kind])}); choose another file, or put the old prompt back"
            )

    def append(self, records: Sequence[Record]) -> None:
        lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records).encode()
        try:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise AnnotationError(
                f"{self.path} cannot be written ({error.strerror}); make room and run the same command again: "
                f"{len(self.done)} records are kept and it goes on from there"
            ) from error
        self._end += len(lines)
        self.done |= {record.key for record in records}

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        except OSError:  # the buffer could not be flushed: cut the file back to whole records
            os.truncate(self.path, self._end)
