"""Open pictures in, words out: an MLLM annotates images, one JSON line for each image and kind of text.

    python -m mllmfl_lite.annotate my_pictures --out annotations

writes `annotations.jsonl` (every record, with model, prompt hash and time), `annotations.llava.json` (what passed the
filters, in LLaVA's own format) and `annotations.rejected.json` (images that could not be used, and why). The same code
annotates with the bundled stand-in, with LLaVA-1.5-7B on a GPU, or through any endpoint that speaks OpenAI's protocol.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import filelock

from mllmfl_lite.data.cc595k import cc595k_source
from mllmfl_lite.data.folders import PictureSource, folder_source
from mllmfl_lite.data.pictures import BadPictureError
from mllmfl_lite.repro import progress_bar, write_json
from mllmfl_lite.stages.backends import Backend, EndpointBackend, TransformersBackend
from mllmfl_lite.stages.filters import filter_records
from mllmfl_lite.stages.llava_format import to_llava
from mllmfl_lite.stages.records import AnnotationError, Record, _Journal, read_records
from mllmfl_lite.teachers.base import TeacherError
from mllmfl_lite.teachers.clip import load_clip
from mllmfl_lite.teachers.llava import KINDS, PROMPTS, load_mllm, load_prompts, prompt_hash


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
