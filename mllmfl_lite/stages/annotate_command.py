"""``mllmfl annotate``: annotate a folder of images and say where the JSON is."""

from __future__ import annotations

import argparse
from pathlib import Path

from mllmfl_lite.data.folders import folder_images
from mllmfl_lite.repro import write_json
from mllmfl_lite.stages.annotate import annotate
from mllmfl_lite.stages.backends import TransformersBackend
from mllmfl_lite.stages.endpoint import EndpointBackend
from mllmfl_lite.stages.filters import filter_records
from mllmfl_lite.stages.llava_format import to_llava
from mllmfl_lite.teachers.clip import load_clip
from mllmfl_lite.teachers.llava import load_mllm
from mllmfl_lite.teachers.prompts import KINDS, PROMPTS, load_prompts

HALF_LOST = 3  # exit status if filters took more than half of the texts


def add_command(subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("annotate", help="have an MLLM describe a folder of images")
    add = parser.add_argument
    add("folder", help="images, in folders inside it as well; hidden files are skipped")
    add("--out", default="annotations", help="where to write, without an ending (default: annotations)")
    add("--mllm", help="model folder or hub name (default: the bundled stand-in); with --endpoint the server's name")
    add("--endpoint", help="ask this OpenAI-compatible server, e.g. http://localhost:8000/v1")
    add("--kinds", nargs="+", default=list(KINDS), help=f"default: {' '.join(KINDS)}")
    add("--prompts", default=str(PROMPTS), help="folder with a text file for each kind")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="auto", help="float32, bfloat16, float16 (default: as saved)")
    add("--batch-size", type=int, default=32, help="questions, or requests, at a time")
    add("--max-new-tokens", type=int, default=128, help="where an answer is cut off")
    add("--max-side", type=int, default=1024, help="pixels; larger images are made smaller before they are sent")
    add("--min-similarity", type=float, help="drop texts whose CLIP cosine with their image is smaller")
    add("--clip", default="tiny_clip", help="CLIP that judges: folder or name:weights (default: the bundled stand-in)")
    parser.set_defaults(function=run)


def run(chosen: argparse.Namespace) -> int:
    """Annotate, filter, export; return the exit status."""
    if chosen.endpoint and not chosen.mllm:
        raise ValueError("--endpoint needs --mllm, the name by which the server knows its model")
    if chosen.batch_size < 1 or chosen.max_new_tokens < 1:
        raise ValueError("--batch-size and --max-new-tokens must be at least 1")
    pool, prompts = folder_images(chosen.folder), load_prompts(chosen.prompts)
    if chosen.min_similarity is not None and not -1 <= chosen.min_similarity <= 1:
        raise ValueError(f"--min-similarity is a cosine, between -1 and 1; got {chosen.min_similarity}")
    clip = load_clip(chosen.clip, device=chosen.device) if chosen.min_similarity is not None else None
    summary = annotate(pool, _backend(chosen), f"{chosen.out}.jsonl", chosen.kinds, prompts, tell=print)
    result = filter_records(summary.records, pool, clip, chosen.min_similarity)
    write_json(Path(f"{chosen.out}.llava.json"), to_llava(result.kept, prompts))
    print(f"{len(pool)} images, {summary.written} new records in {summary.seconds:.0f} s; {result.counts}")
    for name, reason in list(summary.rejected.items())[:10]:
        print(f"no text for {name!r}: {reason}")
    if summary.rejected:
        print(f"images without a text: {len(summary.rejected)}, listed in {chosen.out}.rejected.json")
    print(f"records: {chosen.out}.jsonl\nLLaVA's format: {chosen.out}.llava.json")
    if warning := result.warning():
        print(f"warning: {warning}")
        return HALF_LOST
    return 0 if summary.records else 1


def _backend(chosen: argparse.Namespace):
    if chosen.endpoint:
        return EndpointBackend(
            chosen.endpoint, chosen.mllm, chosen.max_new_tokens, chosen.batch_size, max_side=chosen.max_side
        )
    if not chosen.mllm:
        print("note: tiny-llava is a stand-in that saw 32 x 32 pixels of CIFAR's classes; --mllm names a real model")
    teacher = load_mllm(chosen.mllm or "tiny_llava", chosen.device, chosen.dtype, chosen.batch_size)
    return TransformersBackend(teacher, chosen.max_new_tokens)
