"""``mllmfl annotate``: annotate a folder of images, filter the texts, write them in LLaVA's format."""

import argparse
import contextlib
from pathlib import Path

from mllmfl_lite.data.folders import folder_images
from mllmfl_lite.data.pictures import printable
from mllmfl_lite.repro import write_json
from mllmfl_lite.stages.annotate import annotate, choose_prompts
from mllmfl_lite.stages.backends import Backend, TransformersBackend
from mllmfl_lite.stages.endpoint import EndpointBackend
from mllmfl_lite.stages.filters import filter_records
from mllmfl_lite.stages.llava_format import to_llava
from mllmfl_lite.stages.records import require_regular
from mllmfl_lite.teachers.clip import load_clip
from mllmfl_lite.teachers.llava import load_mllm
from mllmfl_lite.teachers.prompts import KINDS, PROMPTS, load_prompts

HALF_LOST = 3  # exit status if filters took more than half of the texts
SHOWN = 10  # rejected images that are printed


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "annotate",
        help="have an MLLM describe a folder of images",
        description="Have an MLLM describe a folder of images. The same command resumes. Exit status: 0 done, "
        f"1 no text, 2 it cannot go on, {HALF_LOST} filters took more than half of the texts.",
    )
    add = parser.add_argument
    add("folder", help="images, in folders inside it as well; hidden files are skipped")
    add("--out", default="annotations", help="where to write, without an ending (default: annotations)")
    add("--mllm", help="model folder or hub name (default: the bundled stand-in); with --endpoint the server's name")
    add("--endpoint", help="ask this OpenAI-compatible server, e.g. http://localhost:8000/v1")
    add("--kinds", nargs="+", help=f"which prompts (default: {' '.join(KINDS)}; with --plain {KINDS[1]})")
    add("--prompts", default=str(PROMPTS), help="folder with a text file for each kind")
    add("--plain", action="store_true", help="export one answer an image, for LLaVA's first stage (plain)")
    add("--retry-rejected", action="store_true", help="ask again about what OUT.rejected.json lists")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="auto", help="float32, bfloat16, float16 (default: as saved)")
    add("--batch-size", type=int, default=32, help="questions, or requests, at a time (default: 32)")
    add("--max-new-tokens", type=int, default=128, help="where an answer is cut off (default: 128)")
    add("--max-side", type=int, default=1024, help="pixels; larger images are sent smaller (default: 1024)")
    add("--timeout", type=float, default=120, help="seconds to wait for one answer of a server (default: 120)")
    add("--min-similarity", type=float, help="drop texts whose CLIP cosine with their image is smaller")
    add("--clip", default="tiny_clip", help="CLIP that judges: folder or name:weights (default: the bundled stand-in)")
    parser.set_defaults(function=run)


def run(chosen: argparse.Namespace) -> int:
    """Annotate, filter, export; return the exit status."""
    _check(chosen)
    pool, prompts = folder_images(chosen.folder), load_prompts(chosen.prompts)
    kinds = choose_prompts(chosen.kinds or ([KINDS[1]] if chosen.plain else KINDS), prompts)
    clip = load_clip(chosen.clip, device=chosen.device) if chosen.min_similarity is not None else None
    summary = annotate(pool, _backend(chosen), f"{chosen.out}.jsonl", [*kinds], prompts, print, chosen.retry_rejected)
    print(f"{len(pool)} images, {summary.written} new records in {summary.seconds:.0f} s")
    for name, reason in list(summary.rejected.items())[:SHOWN]:
        print(f"no text for {printable(name)}: {reason}")
    if lacking := len(summary.rejected):
        print(f"images that lack a text: {lacking}, see {chosen.out}.rejected.json; --retry-rejected asks again")
    result = filter_records(summary.records, pool, clip, chosen.min_similarity)
    print(f"filters: {result.counts}")
    try:
        write_json(Path(f"{chosen.out}.llava.json"), to_llava(result.kept, prompts, chosen.plain))
    except OSError as error:
        where = f"all {len(summary.records)} records are in {chosen.out}.jsonl: make room and run it again"
        raise ValueError(f"{chosen.out}.llava.json cannot be written ({error.strerror or error}); {where}") from error
    print(f"records: {chosen.out}.jsonl\nLLaVA's format: {chosen.out}.llava.json")
    if warning := result.warning():
        print(f"warning: {warning}")
        return HALF_LOST
    return 0 if summary.records else 1


def _check(chosen: argparse.Namespace) -> None:
    """Raise `ValueError` for what can be known before a model is loaded or a server is asked."""
    if chosen.endpoint is not None and not (chosen.mllm or "").strip():
        raise ValueError("--endpoint needs --mllm, the name by which the server knows its model")
    if chosen.batch_size < 1 or chosen.max_new_tokens < 1:
        raise ValueError("--batch-size and --max-new-tokens must be at least 1")
    if chosen.min_similarity is not None and not -1 <= chosen.min_similarity <= 1:
        raise ValueError(f"--min-similarity is a cosine, between -1 and 1; got {chosen.min_similarity}")
    if not Path(chosen.out).name or chosen.out.endswith("/"):
        raise ValueError(f"--out must end in a name, such as my_folder/annotations; got {chosen.out!r}")
    with contextlib.suppress(OSError):  # a name that is too long is said when it is written
        require_regular(Path(f"{chosen.out}.llava.json"))


def _backend(chosen: argparse.Namespace) -> Backend:
    if chosen.endpoint is not None:
        limits = {"timeout": chosen.timeout, "max_side": chosen.max_side}
        return EndpointBackend(chosen.endpoint, chosen.mllm, chosen.max_new_tokens, chosen.batch_size, **limits)
    if not chosen.mllm:
        print("note: tiny-llava is a stand-in that saw 32 x 32 pixels of CIFAR's classes; --mllm names a real model")
    teacher = load_mllm(chosen.mllm or "tiny_llava", chosen.device, chosen.dtype, chosen.batch_size)
    return TransformersBackend(teacher, chosen.max_new_tokens)
