"""The files of an annotation: records as JSON lines, written one by one as they come; and what got no text."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mllmfl_lite.repro import ASSETS, write_json
from mllmfl_lite.teachers.prompts import prompt_hash

WEB_ANNOTATIONS = ASSETS / "web_annotations.jsonl.gz"
UNUSABLE = (ValueError, TypeError, AttributeError, RecursionError)  # what a line may raise that is no record


@dataclass(frozen=True)
class Record:
    """What a model said of one image, in one kind."""

    id: str  #: of the image, unique in its pool
    image: str  #: the file's name, or the image's number
    kind: str  #: which prompt was answered
    text: str  #: the answer
    finished: bool  #: False if it was cut off
    model: str  #: who answered, see `Backend`
    prompt: str  #: its hash, see `prompt_hash`
    time: str  #: UTC, ISO 8601

    @property
    def key(self) -> tuple[str, str]:
        """Image and kind; a file holds one record of each."""
        return self.id, self.kind

    def line(self) -> bytes:
        """The record as a line of the file, with a checksum. Characters that are no UTF-8 are escaped."""
        return json.dumps(asdict(self) | {"crc": _checksum(asdict(self))}).encode() + b"\n"


def _checksum(values: dict) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _parse(line: bytes) -> Record:
    values = json.loads(line.decode("utf-8-sig"))
    expected = values.pop("crc", None)
    record = Record(**values)
    wrong = [k for k, v in values.items() if not isinstance(v, bool if k == "finished" else str)]
    if wrong:
        raise TypeError(f"{wrong[0]} is of the wrong type")
    if expected is not None and expected != _checksum(values):
        raise ValueError("its checksum does not fit: it was damaged, or edited (then remove its crc entry)")
    return record


def _whole_lines(content: bytes) -> bytes:
    """The lines of a file; what follows the last line break was cut off by a kill, unless it is a record."""
    tail = content.rpartition(b"\n")[2]
    try:
        _parse(tail)
    except UNUSABLE:
        return content[: len(content) - len(tail)]
    return content + b"\n"


def read_records(path: str | Path) -> list[Record]:
    """Read the records of a JSON-lines file, or of one packed by gzip. A last line that a kill cut off is left out.

    Raises:
        ValueError: no such file, a line that is no record, or the same image and kind twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; annotate first, or give the path of an existing .jsonl file")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it, or take it again from its source") from error
    records: dict[tuple[str, str], Record] = {}
    for number, line in enumerate(_whole_lines(content).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = _parse(line)
            if record.key in records:
                raise ValueError(f"image {record.id!r} has two records of kind {record.kind!r}")
        except UNUSABLE as error:
            problem = f"{path}, line {number}, is no record to go on with ({str(error)[:200]})"
            raise ValueError(f"{problem}; correct that line, or remove it") from error
        records[record.key] = record
    return list(records.values())


def bundled_annotations() -> list[Record]:
    """What the bundled stand-in says of `cifar10_mini`'s web part, in all kinds; `make annotations` writes it."""
    return read_records(WEB_ANNOTATIONS)


class Journal:
    """The open .jsonl file of a run: records are appended one by one, whole lines or none.

    Records of another model or prompt in it are a `ValueError`. `prompts` are the texts of each kind.
    """

    def __init__(self, path: Path, model: str, prompts: dict[str, str]):
        self.path, self._synced = path, time.monotonic()
        require_regular(path)
        records = read_records(path) if path.exists() else []
        for record in records:
            if record.model != model and not record.model.endswith(f"(asked as {model})"):
                raise ValueError(f"{path} holds records of {record.model!r}, now {model!r} is asked; use another file")
            if record.kind in prompts and record.prompt != prompt_hash(prompts[record.kind]):
                raise ValueError(
                    f"{path} answers another prompt of kind {record.kind!r}; use another file or that prompt"
                )
        self.done = {record.key for record in records}
        self.models = list(dict.fromkeys(record.model for record in records))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by __exit__)
        content = path.read_bytes()
        whole = _whole_lines(content)
        self._file.truncate(min(len(whole), len(content)))
        self._file.write(whole[len(content) :])

    def append(self, record: Record) -> None:
        """Write one record."""
        end = self._file.seek(0, os.SEEK_END)
        try:
            self._write(record.line())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise ValueError(f"{self.path} cannot be written ({error.strerror or error}); make room") from error
        self.done.add(record.key)

    def _write(self, line: bytes) -> None:
        if self._file.write(line) != len(line):
            raise OSError("No space left on device")
        if time.monotonic() - self._synced > 1:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            os.fsync(self._file.fileno())


@dataclass(frozen=True)
class Rejection:
    """Why a question got no text."""

    reason: str  #: in the server's words, if it gave any
    model: str  #: who was asked
    prompt: str  #: its hash, see `prompt_hash`
    tokens: int = 0  #: how many were too few; 0 if that is not the reason
    last: bool = False  #: the run ended with it, so it is asked once more, at the end of the next run


def read_rejected(path: Path) -> dict[tuple[str, str], Rejection]:
    """The list of what got no text, by image and kind; empty if there is no file. A damaged one is a `ValueError`."""
    require_regular(path)
    try:
        images = json.loads(path.read_text(encoding="utf-8")).items() if path.exists() else ()
        return {(name, kind): Rejection(**entry) for name, kinds in images for kind, entry in kinds.items()}
    except UNUSABLE as error:
        raise ValueError(f"{path} is damaged ({error!r:.100}); remove it: all its questions are asked") from None


def write_rejected(path: Path, entries: Mapping[tuple[str, str], Rejection]) -> None:
    """Write the list as JSON: ``{image: {kind: entry}}``."""
    by_image: dict[str, dict] = {}
    for (name, kind), entry in entries.items():
        by_image.setdefault(name, {})[kind] = asdict(entry)
    write_json(path, by_image)


def require_regular(path: Path) -> None:
    """Raise `ValueError` if something else than a file, such as a folder, has this name."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; choose another name")
