"""Open pictures in, words out: an MLLM annotates images, one JSON line for each image and kind of text.

    python -m mllmfl_lite.annotate my_pictures --out annotations

writes `annotations.jsonl` (every record, with model, prompt hash and time), `annotations.llava.json` (what passed the
filters, in LLaVA's own format) and `annotations.rejected.json` (images that could not be used, and why). The same code
annotates with the bundled stand-in, with LLaVA-1.5-7B on a GPU, or through any endpoint that speaks OpenAI's protocol.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import io
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import filelock

from mllmfl_lite.captions import KINDS
from mllmfl_lite.pictures import BadPictureError, PictureSource, cc595k_source, folder_source
from mllmfl_lite.repro import progress_bar, write_json
from mllmfl_lite.teacher import ASSETS, ClipTeacher, MllmTeacher, TeacherError, load_clip, load_mllm

PROMPTS = ASSETS / "prompts"
WEB_ANNOTATIONS = ASSETS / "web_annotations.jsonl.gz"


class AnnotationError(RuntimeError):
    """Annotation cannot start or go on; the message says why and what to do. Records already written are kept."""


def load_prompts(folder: str | Path | None = None) -> dict[str, str]:
    """The prompts of a folder, one text file a kind, ``detailed_description.txt``, ...: edit them, or name another.

    Raises:
        AnnotationError: no prompt there, or an empty one.
    """
    folder = folder or PROMPTS
    prompts = {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(Path(folder).glob("*.txt"))}
    empty = [kind for kind, prompt in prompts.items() if not prompt]
    if empty or not prompts:
        raise AnnotationError(
            f"{folder} must hold a text file for each kind ({', '.join(KINDS)}), none of them empty; "
            + (f"empty: {', '.join(empty)}" if empty else "it holds none")
        )
    return prompts


def prompt_hash(prompt: str) -> str:
    """The first 16 digits of the prompt's sha256: two records with the same hash answered the same question."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------- records


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


# -------------------------------------------------------------------------------------------------------- backends


@dataclass(frozen=True)
class Answer:
    """A model's text, and whether it ended by itself."""

    text: str
    finished: bool


class Backend(Protocol):
    """Whatever answers prompts about pictures.

    Attributes:
        model: the name that goes into each record.
        batch_size: how many questions `answer` is given at a time.
    """

    model: str
    batch_size: int

    def answer(self, images: Sequence, prompts: Sequence[str]) -> list[Answer]:
        """One answer for each picture and prompt."""

    def count_tokens(self, prompt: str) -> int:
        """Tokens of one question, its picture included."""


class TransformersBackend:
    """Answers from a model in this process: batched, padded on the left, greedy, so that the same run says the same.

    Args:
        teacher: from `mllmfl_lite.teacher.load_mllm`: any device and precision.
        max_new_tokens: where an answer is cut off.
    """

    def __init__(self, teacher: MllmTeacher, max_new_tokens: int = 128):
        self.teacher, self.max_new_tokens = teacher, max_new_tokens
        self.model, self.batch_size = teacher.identity, teacher.batch_size

    def answer(self, images: Sequence, prompts: Sequence[str]) -> list[Answer]:
        """One answer for each picture and prompt."""
        import torch

        inputs = self.teacher.inputs(images, prompts)
        tokenizer = self.teacher.processor.tokenizer
        ends = self.teacher.model.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [ends])
        with torch.inference_mode():
            out = self.teacher.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :].cpu()
        return [
            Answer(tokenizer.decode(row, skip_special_tokens=True).strip(), bool(torch.isin(row, ends).any()))
            for row in new
        ]

    def count_tokens(self, prompt: str) -> int:
        """Tokens of one question, its picture included."""
        from PIL import Image

        return self.teacher.inputs([Image.new("RGB", (32, 32))], [prompt])["input_ids"].shape[1]


class EndpointBackend:
    """Answers from any server that speaks OpenAI's chat protocol: vLLM, `transformers serve`, a GPT-4-class service.

    Several requests run at once. The `openai` client retries with growing pauses what may pass (429, 408, 409, 5xx, a
    lost connection, a hang beyond `timeout`) and waits as long as the server's ``Retry-After`` says. Answers that are
    not the protocol's JSON are asked for again here. The key comes from the environment, ``OPENAI_API_KEY``, alone.

    Args:
        url: e.g. ``"http://localhost:8000/v1"``.
        model: the name that the server knows it by.
        max_new_tokens: where an answer is cut off.
        concurrency: requests at once.
        timeout: seconds to wait for one answer.
        retries: further attempts for one answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        max_new_tokens: int = 128,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
    ):
        from openai import OpenAI

        self.model, self.batch_size, self.max_new_tokens = model, concurrency, max_new_tokens
        self._retries = retries
        self._settings = {"max_tokens": max_new_tokens, "temperature": 0}
        self._key = os.environ.get("OPENAI_API_KEY")
        self._client = OpenAI(base_url=url, api_key=self._key or "none", timeout=timeout, max_retries=retries)
        self._pool = ThreadPoolExecutor(concurrency)

    def answer(self, images: Sequence, prompts: Sequence[str]) -> list[Answer]:
        """One answer for each picture and prompt, asked for at the same time.

        Raises:
            AnnotationError: the server still refuses or fails after all attempts.
        """
        return list(self._pool.map(self._ask, images, prompts))

    def _ask(self, image, prompt: str) -> Answer:
        picture = {"type": "image_url", "image_url": {"url": _data_url(image)}}
        message = {"role": "user", "content": [picture, {"type": "text", "text": prompt}]}
        for attempt in range(self._retries + 1):
            try:
                choice = self._create(message).choices[0]
                return Answer((choice.message.content or "").strip(), choice.finish_reason == "stop")
            except Exception as error:
                if attempt == self._retries or not _is_garbage(error):
                    raise AnnotationError(self._explain(error)) from None  # the cause's text may hold the key
                time.sleep(min(8.0, 0.25 * 2**attempt))
        raise AssertionError("unreachable")

    def _create(self, message: dict):
        """One request; settings that this server's model does not take are renamed or left out, once and for all."""
        from openai import BadRequestError

        settings = dict(self._settings)
        try:
            return self._client.chat.completions.create(model=self.model, messages=[message], **settings)
        except BadRequestError as error:
            if "max_completion_tokens" in str(error) and "max_tokens" in settings:
                settings["max_completion_tokens"] = settings.pop("max_tokens")
            elif "temperature" in str(error) and "temperature" in settings:
                del settings["temperature"]
            else:
                raise
        self._settings = settings
        return self._create(message)

    def _explain(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"[:300]
        if self._key:
            text = text.replace(self._key, "***")
        advice = "set OPENAI_API_KEY" if "401" in text else "see that it runs and serves this model"
        where = f"the endpoint {self._client.base_url} gave no answer for model {self.model!r}"
        return f"{where} ({text}); {advice}, then run the same command again: it goes on where it stopped"

    def count_tokens(self, prompt: str) -> int:
        """Roughly: four characters a token, and LLaVA-1.5's 576 tokens for the picture."""
        return 576 + len(prompt) // 4


def _is_garbage(error: Exception) -> bool:
    """Whether a reply came but was not the protocol's JSON; everything else the client has already retried."""
    from openai import APIResponseValidationError

    return isinstance(error, (ValueError, TypeError, AttributeError, IndexError, APIResponseValidationError))


def _data_url(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# --------------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Estimate:
    """What a run will take, from its first batch.

    Attributes:
        records: answers still to be written.
        tokens_in: tokens of prompts and pictures.
        tokens_out: tokens of answers, at most.
        seconds: at the pace of the first batch.
    """

    records: int
    tokens_in: int
    tokens_out: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.records:,} records to write: about {self.tokens_in:,} tokens in, at most {self.tokens_out:,} out, "
            f"{self.seconds / 60:.1f} minutes at the pace of a first batch"
        )


@dataclass
class Summary:
    """What a run did.

    Attributes:
        records: every record of the file, in the order of images and kinds.
        written: how many of them this run added.
        rejected: for each image that cannot be used, why.
        seconds: how long this run took.
    """

    records: list[Record]
    written: int
    rejected: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def annotate(
    source: PictureSource,
    backend: Backend,
    path: str | Path,
    kinds: Sequence[str] = KINDS,
    prompts: dict[str, str] | None = None,
    tell=None,
) -> Summary:
    """Ask `backend` about every picture, in every kind, and write the answers to a JSON-lines file as they come.

    A run that was killed goes on where it stopped: batches are cut the same way each time, those that are whole in the
    file are not asked again, and no record is lost or written twice. Questions are sorted by length, so that a batch
    holds questions of one kind and little padding. A picture that cannot be read is named in the summary and left out.

    Args:
        source: pictures with ids, see `mllmfl_lite.pictures`.
        backend: who answers.
        path: the .jsonl file; another model's or prompt's records in it are an error.
        kinds: which prompts to ask.
        prompts: the text of each kind; the bundled ones by default.
        tell: called with an `Estimate` before the run, after a first batch was timed.

    Raises:
        AnnotationError: the file belongs to another run, is in use or cannot be written; no such prompt.
    """
    path, prompts = Path(path), prompts or load_prompts()
    unknown = [kind for kind in kinds if kind not in prompts]
    if unknown:
        raise AnnotationError(f"no prompt for {', '.join(unknown)}; there are {', '.join(prompts)}")
    start = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock", timeout=0), _Journal(path, backend.model, prompts) as journal:
            before, rejected = len(journal.done), {}
            _ask_all(source, backend, journal, sorted(kinds, key=lambda k: len(prompts[k])), prompts, rejected, tell)
            written = len(journal.done) - before
    except filelock.Timeout:
        raise AnnotationError(f"{path} is being written by another run; wait for it, or choose another file") from None
    except OSError as error:
        raise AnnotationError(f"{path} cannot be written ({error.strerror}); choose a place that can be") from error
    order = {key: i for i, key in enumerate((i, kind) for i in source.ids for kind in kinds)}
    records = sorted((r for r in read_records(path) if r.key in order), key=lambda record: order[record.key])
    return Summary(records, written, rejected, time.monotonic() - start)


def _ask_all(source, backend, journal, kinds, prompts, rejected, tell) -> None:
    """Batches of one kind each, cut at the same places in every run."""
    work = [
        (kind, source.ids[i : i + backend.batch_size])
        for kind in kinds
        for i in range(0, len(source.ids), backend.batch_size)
    ]
    work = [(kind, ids) for kind, ids in work if any((i, kind) not in journal.done for i in ids)]
    total = sum((i, kind) not in journal.done for kind, ids in work for i in ids)
    with progress_bar(total, "records", "annotating") as bar:
        for number, (kind, ids) in enumerate(work):
            begun = time.monotonic()
            images = _open_all(source, ids, rejected)
            answers = backend.answer(list(images.values()), [prompts[kind]] * len(images)) if images else []
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            fresh = [
                Record(i, source.file(i), kind, a.text, a.finished, backend.model, prompt_hash(prompts[kind]), now)
                for i, a in zip(images, answers, strict=True)
                if (i, kind) not in journal.done
            ]
            journal.append(fresh)
            bar.update(len(fresh))
            if number == 0 and tell:
                pace = (time.monotonic() - begun) / max(1, len(ids))
                tell(_estimate(backend, [prompts[k] for k, ids in work for _ in ids][:total], pace))


def _open_all(source: PictureSource, ids: Sequence[str], rejected: dict[str, str]) -> dict:
    images = {}
    for i in ids:
        try:
            images[i] = source.open(i)
        except BadPictureError as error:
            rejected[i] = str(error)
    return images


def _estimate(backend: Backend, questions: Sequence[str], pace: float) -> Estimate:
    lengths = {question: backend.count_tokens(question) for question in set(questions)}
    limit = getattr(backend, "max_new_tokens", 0)
    return Estimate(len(questions), sum(lengths[q] for q in questions), limit * len(questions), pace * len(questions))


# --------------------------------------------------------------------------------------------------------- filters


def is_empty(record: Record) -> bool:
    """Fewer than three words."""
    return len(re.findall(r"\w+", record.text)) < 3


def is_cut_off(record: Record) -> bool:
    """It ran into the token limit, or does not end like a sentence."""
    return not record.finished or not re.search(r"[.!?][\"')\]]*\s*$", record.text)


def is_looping(record: Record, length: int = 4, times: int = 3) -> bool:
    """The same `length` words come at least `times` times."""
    words = re.findall(r"\w+", record.text.lower())
    runs = Counter(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
    return bool(runs) and max(runs.values()) >= times


FILTERS = {"empty": is_empty, "cut-off": is_cut_off, "looping": is_looping}


@dataclass(frozen=True)
class Filtered:
    """What passed, and how many records each filter took (the first that objects counts).

    Attributes:
        kept: the records that passed.
        dropped: for each filter the records that it took out.
    """

    kept: list[Record]
    dropped: dict[str, list[Record]]

    @property
    def counts(self) -> dict[str, int]:
        """How many records were kept, and how many each filter took."""
        return {"kept": len(self.kept)} | {reason: len(records) for reason, records in self.dropped.items()}


def filter_records(
    records: Sequence[Record],
    source: PictureSource | None = None,
    clip: ClipTeacher | None = None,
    min_similarity: float | None = None,
) -> Filtered:
    """Leave out what is empty, cut off, looping or, by CLIP, not about its picture.

    Args:
        records: what was written.
        source: where the pictures are; needed for the last filter, as are the two below.
        clip: who compares picture and text.
        min_similarity: the smallest cosine that passes; None turns the filter off.
    """
    kept, dropped = [], {reason: [] for reason in FILTERS}
    for record in records:
        reason = next((reason for reason, objects in FILTERS.items() if objects(record)), None)
        (dropped[reason] if reason else kept).append(record)
    if min_similarity is not None:
        if clip is None or source is None:
            raise ValueError("the off-image filter needs clip= and source=; or leave min_similarity at None")
        cosines = similarities(kept, source, clip)
        dropped["off-image"] = [r for r, cosine in zip(kept, cosines, strict=True) if cosine < min_similarity]
        kept = [r for r, cosine in zip(kept, cosines, strict=True) if cosine >= min_similarity]
    return Filtered(kept, dropped)


def similarities(records: Sequence[Record], source: PictureSource, clip: ClipTeacher) -> list[float]:
    """CLIP's cosine between each record's text and its picture; each picture is encoded once."""
    ids = list(dict.fromkeys(record.id for record in records))
    if not ids:
        return []
    features = dict(zip(ids, clip.features([source.open(i) for i in ids]), strict=True))
    texts = clip.text_features([record.text for record in records])
    return [float(features[record.id] @ text) for record, text in zip(records, texts, strict=True)]


# ----------------------------------------------------------------------------------------------- LLaVA's own format

_TURN = re.compile(r"Question:\s*(.+?)\s*\n\s*Answer:\s*(.+?)\s*(?=\nQuestion:|\Z)", re.S)


def to_llava(records: Sequence[Record], prompts: dict[str, str] | None = None) -> list[dict]:
    """Records as LLaVA's instruction data: ``{"id", "image", "conversations": [{"from", "value"}, ...]}``.

    A conversation that follows "Question: ... Answer: ..." becomes one turn each; any other text answers its prompt.
    ``<image>`` stands once, at the start of the first human turn. Source: the LLaVA repository's data format.
    """
    prompts = prompts or load_prompts()
    return [
        {
            "id": f"{record.id}-{record.kind}",
            "image": record.image,
            "conversations": _turns(_without_markers(record.text), prompts[record.kind]),
        }
        for record in records
    ]


def _turns(text: str, prompt: str) -> list[dict]:
    pairs = _TURN.findall(text) or [(prompt, text)]
    turns = [{"from": who, "value": value} for pair in pairs for who, value in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return turns


def _without_markers(text: str) -> str:
    return text.replace("<image>", "").strip()


def check_llava(entries: Sequence[dict], images: Sequence[str] | None = None) -> list[str]:
    """What is wrong with entries in LLaVA's format, a sentence each; an empty list where nothing is.

    Args:
        entries: from `to_llava`, or a file of LLaVA's.
        images: the names that exist; None: do not look.
    """
    problems, seen, there = [], set(), None if images is None else set(images)
    for number, entry in enumerate(entries):
        where = f"entry {number} ({entry.get('id')!r})" if isinstance(entry, dict) else f"entry {number}"
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns):
            problems.append(f"{where} has no list of conversations with 'from' and 'value'")
            continue
        if entry.get("id") in seen:
            problems.append(f"{where}: the id stands twice")
        seen.add(entry.get("id"))
        if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
            problems.append(f"{where}: turns must alternate, human first, gpt last")
        if sum(turn["value"].count("<image>") for turn in turns) != 1 or "<image>" not in turns[0]["value"]:
            problems.append(f"{where}: <image> must stand once, in the first human turn")
        if there is not None and entry.get("image") not in there:
            problems.append(f"{where}: image {entry.get('image')!r} does not exist")
    return problems


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)


def from_llava(path: str | Path) -> list[dict]:
    """The entries of a file in LLaVA's format; fields beside id, image and conversations are left out.

    Raises:
        AnnotationError: it is no JSON list, or an entry breaks the format (the first five are named).
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(entries, list):
        raise AnnotationError(f"{path} must hold one JSON list of entries; it holds a {type(entries).__name__}")
    problems = check_llava(entries)
    if problems:
        raise AnnotationError(f"{path}: {len(problems)} entries break LLaVA's format; {'; '.join(problems[:5])}")
    return [{key: entry[key] for key in ("id", "image", "conversations") if key in entry} for entry in entries]


# ---------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m mllmfl_lite.annotate FOLDER``: annotate a folder of pictures and say where the JSON is."""
    parser = argparse.ArgumentParser(prog="python -m mllmfl_lite.annotate", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="pictures: JPEG, PNG, WebP, ...; folders inside it are read too")
    parser.add_argument("--chat", help="CC-595K's chat.json; FOLDER is then its images.zip, read in place")
    parser.add_argument("--out", default="annotations", help="where to write, without an ending (default: annotations)")
    parser.add_argument("--mllm", default="tiny_llava", help="model folder or hub name (default: the bundled stand-in)")
    parser.add_argument("--endpoint", help="ask this OpenAI-compatible server instead, e.g. http://localhost:8000/v1")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help=f"default: {' '.join(KINDS)}")
    parser.add_argument("--prompts", default=str(PROMPTS), help="folder with a text file for each kind")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (default: as saved)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions (requests) at once")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--min-similarity", type=float, help="drop texts whose CLIP cosine is smaller")
    chosen = parser.parse_args(arguments)
    try:
        return _run(chosen)
    except (AnnotationError, TeacherError, BadPictureError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(chosen: argparse.Namespace) -> int:
    source = cc595k_source(chosen.chat, chosen.folder) if chosen.chat else folder_source(chosen.folder)
    if source.problems:
        print(f"{len(source.problems)} problems in {chosen.chat}; the first: {source.problems[0]}")
    prompts = load_prompts(chosen.prompts)
    if chosen.endpoint:
        backend = EndpointBackend(chosen.endpoint, chosen.mllm, chosen.max_new_tokens, chosen.batch_size)
    else:
        teacher = load_mllm(chosen.mllm, chosen.device, chosen.dtype, chosen.batch_size)
        backend = TransformersBackend(teacher, chosen.max_new_tokens)
    if chosen.mllm == "tiny_llava":
        print("note: tiny-llava is a stand-in that saw 32 x 32 pixels of CIFAR's classes; --mllm names a real model")
    summary = annotate(source, backend, f"{chosen.out}.jsonl", chosen.kinds, prompts, tell=print)
    clip = load_clip(device=chosen.device) if chosen.min_similarity is not None else None
    result = filter_records(summary.records, source, clip, chosen.min_similarity)
    write_json(Path(f"{chosen.out}.llava.json"), to_llava(result.kept, prompts))
    write_json(Path(f"{chosen.out}.rejected.json"), summary.rejected)
    print(f"{len(source.ids)} images, {summary.written} new records in {summary.seconds:.0f} s; {result.counts}")
    for why in list(summary.rejected.values())[:10]:
        print(f"not used: {why}")
    print(f"records: {Path(chosen.out).resolve()}.jsonl")
    print(f"LLaVA's format: {Path(chosen.out).resolve()}.llava.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
