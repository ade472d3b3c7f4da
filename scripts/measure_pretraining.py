"""What each part of Dynamic Weighted Pretraining is worth, at laptop scale: every condition, every seed, one file each.

    python scripts/measure_pretraining.py                          # all of it, about an hour on two cores
    python scripts/measure_pretraining.py --only dwp_linear --seeds 0

Every trained condition gets the same number of epochs, or as many as cost the same operations as torch counts them (its
versions count differently); `features_equal_steps` stays with the epochs. Files that are there are kept; a run that was
killed goes on from its checkpoint. The settings were chosen with a fifth of the training part held out, never on the
test part.
"""

from dataclasses import asdict, replace

import torch
from sweep import RESULTS, in_processes, options
from torch.utils.flop_counter import FlopCounterMode

from mllmfl_lite.data import load_images
from mllmfl_lite.data.longtail import few_labels
from mllmfl_lite.measure.transfer import FINETUNING, best, embed, finetune, linear_probe
from mllmfl_lite.models import build_model, save_model, with_head
from mllmfl_lite.repro import Execution
from mllmfl_lite.runs.results import provenance, save_result
from mllmfl_lite.stages.mixture import CompactEncoder, FrozenReader, TextBatch, mixed_loss
from mllmfl_lite.stages.pretrain import PretrainSettings, pretrain
from mllmfl_lite.stages.records import bundled_annotations
from mllmfl_lite.stages.texts import Views, read_texts
from mllmfl_lite.teachers.llava import load_mllm

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
    "dwp_quick": {"ramp": 0.05},
    "features_equal_steps": FEATURES,
}
WIDTH, LABELS = 16, 0.02
KEPT = ("dwp_linear", "features")  # their weights stay, for the chapters that go on from them


def measure(condition, seed, out):
    path = out / f"{condition}_seed{seed}.json"
    if path.exists():
        return
    web, train, test = (load_images("cifar10_mini", part) for part in ("web", "train", "test"))
    model, made = build_model("resnet8", 10, WIDTH, seed), {"pretraining": None}
    if CONDITIONS[condition] is not None:
        model, made = pretrained(condition, seed, model, web, path)
    guess = linear_probe(embed(model, train), torch.from_numpy(train.labels.copy()), embed(model, test), 10)
    probe = float((guess.numpy() == test.labels).mean())
    labelled = few_labels(train.labels, 10, LABELS, seed)
    tuned = finetune(with_head(model, 10, seed), train, labelled, test, replace(FINETUNING, eval_every=3), seed).history
    result = {
        "label": condition,
        "parameters": {"condition": condition, "seed": seed, "width": WIDTH, "kind": KIND, "labels": len(labelled)},
        "summary": {"probe": probe, "few_best": best(tuned), "few_last": tuned[-1]["metrics"]["top1"]},
        "data": {"web_sha256": web.checksum(), "train_sha256": train.checksum(), "test_sha256": test.checksum()},
        "provenance": provenance("cpu"),
        **made,
    }
    save_result(path, result)
    print(f"{path.stem}: probe {100 * probe:.1f} %", flush=True)


def pretrained(condition, seed, model, web, path):
    """The pretrained model, and what its results file says of the pretraining."""
    mllm = load_mllm(device="cpu", dtype="float32")
    texts = read_texts([record for record in bundled_annotations() if record.kind == KIND], web.ids, mllm)
    views = Views(web, mllm, path.parent / "checkpoints" / "features")
    settings = replace(SETTINGS, **CONDITIONS[condition])
    spent, full = operations(settings, mllm, views, texts), operations(SETTINGS, mllm, views, texts)
    if condition != "features_equal_steps":
        settings = replace(settings, epochs=round(settings.epochs * full / spent))
    given = texts.shuffled(seed) if condition == "shuffled" else texts
    execution = Execution(path.parent / "checkpoints" / path.stem, "cpu")
    done = pretrain(model, mllm, views, given, settings, seed, execution)
    if condition in KEPT:
        save_model(path.with_suffix(".safetensors"), done.model, "resnet8", WIDTH)
    teraflops = round(spent * settings.epochs * len(texts) / 1e12, 2)
    return done.model, {
        "pretraining": {**asdict(settings), "seed": seed, "teraflops": teraflops},
        "seconds": round(done.seconds, 1),
        "history": done.history[:: max(1, len(done.history) // 100)],
    }


def operations(settings, mllm, views, texts):
    """Floating-point operations of one view, forward and backward."""
    encoder = CompactEncoder(build_model("resnet8", 10, WIDTH), 8, 128)
    rows = texts.batches(settings.batch_size, 0, 0)[0]
    images = texts.image[rows]
    batch = TextBatch(views.compact(images, None), views.tokens(images), *texts.tokens(rows, 128))
    weights = settings.language_weight, settings.feature_weight
    with FlopCounterMode(display=False) as counter:
        loss, _ = mixed_loss(encoder, FrozenReader(mllm), 0.5, batch, *weights)
        loss.backward()
    return counter.get_total_flops() / len(rows)


if __name__ == "__main__":
    chosen = options(__doc__, CONDITIONS, RESULTS / "laptop" / "pretraining").parse_args()
    in_processes(measure, [(condition, seed, chosen.out) for condition in chosen.only for seed in chosen.seeds])
