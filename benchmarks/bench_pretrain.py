"""What stored features save in Dynamic Weighted Pretraining, and where its time goes: interleaved in one run.

    make bench

The same texts, the same steps, alpha below 1 throughout, so that CLIP's tokens are needed in each. *Stored*: read from
the disk, computed before the clock starts. *Recomputed*: the frozen tower runs for each batch. The language model's
share is what a step takes beyond the same step without words (feature distillation).
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch

from mllmfl_lite.data import load_images
from mllmfl_lite.models import build_model
from mllmfl_lite.repro import count_cores
from mllmfl_lite.stages.pretrain import PretrainSettings, pretrain
from mllmfl_lite.stages.records import bundled_annotations
from mllmfl_lite.stages.texts import Views, read_texts
from mllmfl_lite.teachers.llava import load_mllm

PICTURES = 320


def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    web, mllm = load_images("cifar10_mini", "web"), load_mllm(device="cpu", dtype="float32")
    some, ids = web.subset(np.arange(PICTURES)), web.ids[:PICTURES]
    records = [r for r in bundled_annotations() if r.kind == "detailed_description" and int(r.id) < PICTURES]
    texts = read_texts(records, ids, mllm)
    words = PretrainSettings(epochs=1, batch_size=16, schedule="linear", ramp=1.0)
    without = replace(words, language_weight=0.0, feature_weight=1.0)
    with tempfile.TemporaryDirectory() as folder:
        stored, live = Views(some, mllm, folder), Views(some, mllm)
        everything = np.arange(PICTURES)
        stored.tokens(everything)
        work = {
            "read stored tokens": lambda: [stored.tokens(part) for part in np.split(everything, PICTURES // 16)],
            "compute tokens": lambda: [live.tokens(part) for part in np.split(everything, PICTURES // 16)],
            "an epoch, stored": lambda: train(stored, words),
            "an epoch, recomputed": lambda: train(live, words),
            "an epoch without words, stored": lambda: train(stored, without),
            "an epoch without words, recomputed": lambda: train(live, without),
        }

        def train(views, settings):
            pretrain(build_model("resnet8", 10, 16), mllm, views, texts, settings)

        took = {name: [] for name in work}
        for repeat in range(repeats + 1):
            for name, task in work.items():
                spent = seconds(task)
                if repeat:  # the first round warms up
                    took[name].append(spent)
    print(f"\nPretraining ResNet-8, width 16, {PICTURES} pictures and texts an epoch, {count_cores()} cores")
    for name, spent in took.items():
        print(f"{name:36s} {PICTURES / statistics.median(spent):8.0f} pictures/s")
    for slow, fast in (
        ("compute tokens", "read stored tokens"),
        ("an epoch, recomputed", "an epoch, stored"),
        ("an epoch without words, recomputed", "an epoch without words, stored"),
    ):
        ratios = [s / f for s, f in zip(took[slow], took[fast], strict=True)]
        print(f"{fast}: faster by {statistics.median(ratios):.2f} (best {max(ratios):.2f})")
    shares = [1 - f / w for w, f in zip(took["an epoch, stored"], took["an epoch without words, stored"], strict=True)]
    print(f"share of an epoch spent in the language model: {statistics.median(shares):.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
