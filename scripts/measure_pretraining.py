"""What each part of Dynamic Weighted Pretraining is worth, at laptop scale: every condition, every seed, one file each.

    python scripts/measure_pretraining.py                          # all of it, about an hour on two cores
    python scripts/measure_pretraining.py --only dwp_linear --seeds 0

Every trained condition gets the same number of floating-point operations, counted by torch and not timed. Files
that are there are kept; a run that was killed goes on from its checkpoint. The settings were chosen with a fifth of the
training part held out, never on the test part.
"""

import argparse
import multiprocessing
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from mllmfl_lite.data import load_images
from mllmfl_lite.data.longtail import few_labels
from mllmfl_lite.measure.transfer import FINETUNING, best, embed, finetune, linear_probe
from mllmfl_lite.models import build_model, save_model, with_head
from mllmfl_lite.repro import Execution, count_cores
from mllmfl_lite.runs.results import provenance, save_result
from mllmfl_lite.stages.mixture import CompactEncoder, FrozenReader, TextBatch, mixed_loss
from mllmfl_lite.stages.pretrain import pretrain
from mllmfl_lite.stages.pretrain_settings import PretrainSettings
from mllmfl_lite.stages.records import bundled_annotations
from mllmfl_lite.stages.texts import read_texts
from mllmfl_lite.stages.views import Views
from mllmfl_lite.teachers.llava import load_mllm

RESULTS = Path(__file__).parent.parent / "results"
KIND = "detailed_description"
SETTINGS = PretrainSettings()
FEATURES = {"language_weight": 0.0, "feature_weight": 1.0, "schedule": "constant"}
CONDITIONS = {
    "dwp_linear": {},
    "random": None,
    "alpha_1": {"schedule": "constant"},
    "shuffled": {},
    "features": FEATURES,
    "dwp_cosine": {"schedule": "cosine"},
    "dwp_step": {"schedule": "step"},
    "dwp_features": {"feature_weight": 1.0},
    "dwp_quick": {"ramp": 0.05},
}
WIDTH, LABELS = 16, 0.02
KEPT = ("dwp_linear", "features")  # their weights stay, for the chapters that go on from them


def operations(settings, mllm, views, texts):
    """Floating-point operations of one view, forward and backward."""
    encoder = CompactEncoder(build_model("resnet8", 10, WIDTH), 8, 128)
    rows = texts.batches(settings.batch_size, 0, 0)[0]
    images = texts.image[rows]
    x, tokens = views.compact(images, None), views.tokens(images)
    with FlopCounterMode(display=False) as counter:
        batch = TextBatch(x, tokens, *texts.tokens(rows, 128))
        weights = settings.language_weight, settings.feature_weight
        loss, _ = mixed_loss(encoder, FrozenReader(mllm), 0.5, batch, *weights)
        loss.backward()
    return counter.get_total_flops() / len(rows)


def measure(condition, seed, out):
    torch.set_num_threads(1)
    path = out / f"{condition}_seed{seed}.json"
    if path.exists():
        return
    web, train, test = (load_images("cifar10_mini", part) for part in ("web", "train", "test"))
    mllm = load_mllm(device="cpu", dtype="float32")
    records = [record for record in bundled_annotations() if record.kind == KIND]
    texts = read_texts(records, web.ids, mllm)
    views = Views(web, mllm, out / "checkpoints" / "features")
    model, result = build_model("resnet8", 10, WIDTH, seed), {"pretraining": None}
    if CONDITIONS[condition] is not None:
        settings = replace(SETTINGS, **CONDITIONS[condition])
        mine, full = operations(settings, mllm, views, texts), operations(SETTINGS, mllm, views, texts)
        settings = replace(settings, epochs=round(settings.epochs * full / mine))
        given = texts.shuffled(seed) if condition == "shuffled" else texts
        done = pretrain(model, mllm, views, given, settings, seed, Execution(out / "checkpoints" / path.stem, "cpu"))
        model = done.model
        if condition in KEPT:
            save_model(path.with_suffix(".safetensors"), model, "resnet8", WIDTH)
        result["pretraining"] = {
            **asdict(settings),
            "seed": seed,
            "teraflops": round(mine * settings.epochs * len(texts) / 1e12, 2),
        }
        result["seconds"] = round(done.seconds, 1)
        result["history"] = done.history[:: max(1, len(done.history) // 100)]
    guess = linear_probe(embed(model, train), torch.from_numpy(train.labels.copy()), embed(model, test), 10)
    labelled = few_labels(train.labels, 10, LABELS, seed)
    tuned = finetune(with_head(model, 10, seed), train, labelled, test, replace(FINETUNING, eval_every=3), seed)
    save_result(
        path,
        {
            "label": condition,
            "parameters": {"condition": condition, "seed": seed, "width": WIDTH, "kind": KIND,
                           "labels": len(labelled)},
            "summary": {"probe": float((guess.numpy() == test.labels).mean()), "few_best": best(tuned.history),
                        "few_last": tuned.history[-1]["metrics"]["top1"]},
            "data": {"web_sha256": web.checksum(), "train_sha256": train.checksum(), "test_sha256": test.checksum()},
            "provenance": provenance("cpu"),
            **result,
        },
    )  # fmt: skip
    print(f"{path.name}: probe {100 * (guess.numpy() == test.labels).mean():.1f} %", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(CONDITIONS), choices=CONDITIONS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "laptop" / "pretraining")
    chosen = parser.parse_args()
    jobs = [(condition, seed, chosen.out) for condition in chosen.only for seed in chosen.seeds]
    with multiprocessing.get_context("spawn").Pool(count_cores()) as pool:
        pool.starmap(measure, jobs, chunksize=1)
