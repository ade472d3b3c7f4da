"""Annotate the web part of `cifar10_mini` with the bundled stand-in: what later chapters read.

    make annotations                                       # two cores: some minutes; goes on after a kill
    python scripts/annotate_web.py --first 60 --out x.gz   # the first pictures only

The texts depend on the bundled weights alone; the file is packed without times: the same texts, the same bytes.
"""

import argparse
import gzip
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from mllmfl_lite.data import load_images
from mllmfl_lite.repro import write_atomically
from mllmfl_lite.stages.annotate import annotate
from mllmfl_lite.stages.backends import TransformersBackend
from mllmfl_lite.stages.records import WEB_ANNOTATIONS
from mllmfl_lite.teachers.llava import load_mllm


def pack(records) -> bytes:
    lines = "".join(json.dumps(asdict(replace(record, time=""))) + "\n" for record in records)
    return gzip.compress(lines.encode(), mtime=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, help="only so many pictures")
    parser.add_argument("--out", type=Path, default=WEB_ANNOTATIONS)
    args = parser.parse_args()

    web = load_images("cifar10_mini", "web")
    pool = web.subset(np.arange(min(args.first or len(web), len(web))))
    backend = TransformersBackend(load_mllm(device="cpu", dtype="float32", batch_size=60), max_new_tokens=64)
    journal = args.out.with_suffix(".jsonl")
    summary = annotate(pool, backend, journal, tell=print)
    write_atomically(args.out, pack(summary.records))
    for left in (journal, Path(f"{journal}.lock"), journal.with_suffix(".rejected.json")):
        left.unlink(missing_ok=True)
    print(f"{len(summary.records)} records in {summary.seconds:.0f} s: {args.out}, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
