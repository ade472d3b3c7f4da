"""How the method fails, at laptop scale: every condition, every seed, one file each.

    python scripts/measure_failures.py                      # about half an hour of one core
    python scripts/measure_failures.py --only wrong_40 --seeds 0

One world for all: imbalance factor 10, eight clients that all take part, 10 rounds of 2 epochs, width 8. All
conditions of a seed start from its honest rounds, whose weights are kept beside the results. Files that are there are
kept.
"""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from controls import corner, make_wrong, poisoned, send, swap_words, without_classes
from PIL import Image
from sweep import RESULTS, options

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.longtail import long_tail_subset
from mllmfl_lite.data.metrics import evaluate_model, predict
from mllmfl_lite.data.names import SUPERCLASSES
from mllmfl_lite.federated import METHODS, FedAvg, FedSettings, Task, client_step, run_federated
from mllmfl_lite.measure.transfer import embed, linear_probe
from mllmfl_lite.models import build_model, load_model, save_model, with_head
from mllmfl_lite.repro import Execution
from mllmfl_lite.runs import Experiment, load_federation, load_pool, parameters_of, provenance, save_result
from mllmfl_lite.stages.align import AlignSettings, align
from mllmfl_lite.stages.filters import similarities
from mllmfl_lite.stages.pretrain import PretrainSettings, pretrain
from mllmfl_lite.stages.records import bundled_annotations
from mllmfl_lite.stages.server_set import draw_server_set
from mllmfl_lite.stages.texts import Views, read_texts
from mllmfl_lite.teachers import load_clip, load_mllm
from mllmfl_lite.teachers.answers import PoolLabels, ask_teacher

ROUNDS, MORE, WIDTH, CLIENTS = 10, 3, 8, 8
DOOR_ROUNDS = 8  # a back door needs more
SETTINGS = FedSettings(ROUNDS, CLIENTS, 2, eval_every=5, report_rounds=1)
DOOR_SETTINGS = replace(SETTINGS, local_epochs=5)  # a liar with a back door trains longer
ALIGN = AlignSettings(beta=0.0, epochs=6)
WORDS = PretrainSettings(epochs=4, schedule="constant")  # a short stage 1, by words alone
MISSING = ("truck", "airplane", "horse", "bird", "dog")
RULES = {
    "fedavg": FedAvg(),
    "clipped_norm": METHODS["clipped_norm"](),
    "median": METHODS["median"](),
    "trimmed_mean": METHODS["trimmed_mean"](liars=2),
}
ONE_PROCESS = Execution(device="cpu", workers=1)


@functools.cache
def world(seed, out):
    """The experiment, its federation, and the model after the honest rounds."""
    experiment = Experiment("cifar10_mini", imbalance_factor=10.0, num_clients=CLIENTS, width=WIDTH,
                            federated=SETTINGS, seed=seed)  # fmt: skip
    here, path = load_federation(experiment), out / f"rounds_seed{seed}.safetensors"
    if not path.exists():
        model = build_model("resnet8", here.train.num_classes, WIDTH, seed)
        done = run_federated(model, here, None, SETTINGS, seed, ONE_PROCESS)
        model.load_state_dict(done.deployed)
        save_model(path, model, "resnet8", WIDTH)
        keep(out, "rounds", seed, experiment, {"metrics": done.history[-1]["metrics"], "history": done.history})
    return experiment, here, load_model(path)


def keep(out, name, seed, experiment, found):
    """Write a result; `found` holds its figures."""
    data = {
        "train_sha256": load_federation(experiment).train.checksum(),
        "pool_sha256": load_pool(experiment).checksum(),
    }
    parameters = {**parameters_of(experiment), "align": ALIGN.__dict__, "condition": name}
    result = {"label": name, "parameters": parameters, "data": data, "provenance": provenance("cpu"), **found}
    save_result(out / f"{name}_seed{seed}.json", result)


# ------------------------------------------------------------------------------------------------ the server's pictures


@functools.cache
def mllm():
    return load_mllm(device="cpu", dtype="float32")


def as_grey(image):
    return image.convert("L").convert("RGB")


def as_coarse(image):
    return image.resize((8, 8), Image.BOX).resize(image.size, Image.BILINEAR)


def restyled(pool, change):
    images = np.stack([np.asarray(change(Image.fromarray(image))) for image in pool.images])
    return ImageSet(images, pool.labels, pool.names, f"{pool.origin}, {change.__name__}")


def own(pool, names):
    """Whether each picture shows one of the clients' classes."""
    return np.isin(np.array(pool.names)[pool.labels], names)


def tail_of(pool, names, seed):
    """Rows of a pool with ten times as many pictures of the first class as of the last; all of other things stay."""
    rows = np.flatnonzero(own(pool, names))
    label = np.array([names.index(pool.names[c]) for c in pool.labels[rows]])
    kept = rows[long_tail_subset(label, len(names), 10.0, seed)]
    return np.sort(np.concatenate([kept, np.flatnonzero(~own(pool, names))]))


def set_for(name, seed, out):
    """The pool as this condition has it, and the server set that is drawn from it."""
    experiment, here, _ = world(seed, out)
    pool, names = load_pool(experiment), here.train.names
    kind, _, number = name.partition("_")
    if kind == "wrong":
        share, filtered = int(number[:2]), number.endswith("filtered")
        chosen = draw_server_set(pool, PoolLabels(pool).class_probabilities(pool.images, names), names, ALIGN.per_class)
        answers = make_wrong(chosen.probabilities, share / 100, seed)
        labels = answers.argmax(1).numpy()
        chosen = replace(chosen, images=replace(chosen.images, labels=labels), probabilities=answers)
        return pool, clip_agrees(chosen, names) if filtered else chosen
    if kind in ("grey", "coarse"):
        pool = restyled(pool, {"grey": as_grey, "coarse": as_coarse}[kind])
    answers = ask_teacher(mllm(), pool, names, out / "answers", "class_logits").softmax(1)
    rows = {
        "foreign": lambda: np.flatnonzero(~own(pool, names)),
        "no": lambda: np.flatnonzero(own(pool, names)),
        "long": lambda: tail_of(pool, names, seed),
    }.get(kind, lambda: np.arange(len(pool)))()
    pool, answers = pool.subset(rows), answers[torch.from_numpy(rows)]
    chosen = draw_server_set(pool, answers, names, ALIGN.per_class)
    return pool, without_classes(chosen, MISSING[: int(number)]) if kind == "missing" else chosen


def clip_agrees(chosen, names):
    """The pictures whose label is also CLIP's first choice."""
    second = load_clip(device="cpu").class_probabilities(chosen.images.images, names).argmax(1).numpy()
    rows = np.flatnonzero(second == chosen.images.labels)
    probabilities = chosen.probabilities[torch.from_numpy(rows)]
    return replace(chosen, images=chosen.images.subset(rows), probabilities=probabilities, rows=chosen.rows[rows])


def aligned(name, seed, out):
    """Stage 3 after the honest rounds, on this condition's set.

    `alone`: without clients, from random weights of this width, or from those that stage 1 learned from words.
    """
    experiment, here, model = world(seed, out)
    pool, chosen = set_for(name, seed, out)
    if name.startswith("alone"):
        model = build_model("resnet8", here.train.num_classes, int(name.split("_")[1]), seed)
    if name.endswith("words"):
        words = RESULTS / "laptop" / "pretraining" / f"dwp_linear_seed{seed}.safetensors"
        model = with_head(load_model(words), here.train.num_classes, seed)
    done = align(model, chosen, ALIGN, seed).model
    if name == "teacher":
        save_model(out / "models" / f"aligned_seed{seed}.safetensors", done, "resnet8", WIDTH)
    true = np.array(pool.names)[pool.labels[chosen.rows]]
    wrong, foreign = true != np.array(here.train.names)[chosen.images.labels], ~own(pool, here.train.names)[chosen.rows]
    figures = {"images": len(chosen), "wrong": int(wrong.sum()), "foreign": int((wrong & foreign).sum()),
               "per_class": chosen.images.class_counts().tolist()}  # fmt: skip
    rows = {"rows": chosen.rows.tolist(), "labels": chosen.images.labels.tolist()} if name == "teacher" else {}
    metrics = evaluate_model(done, here.test, here.train.class_counts())
    keep(out, name, seed, experiment, {"metrics": metrics, "server_set": {**figures, **rows}})


def clip_keeps(texts, pool):
    """Texts without the fifth that fits its picture worst."""
    fit = np.array(similarities(texts, pool, load_clip(device="cpu")))
    return [text for text, cosine in zip(texts, fit, strict=True) if cosine >= np.quantile(fit, 0.2)]


def from_words(name, seed, out):
    """Stage 1 on texts of which a share names another object; then the rounds, and stage 3 on the teacher's set.

    `filtered`: on the four fifths of them that fit best, in five epochs for four, so with as many steps.
    """
    experiment, here, _ = world(seed, out)
    _, share, *filtered = name.split("_")
    pool, model = load_pool(experiment), build_model("resnet8", 10, WIDTH, seed)
    texts = [record for record in bundled_annotations() if record.kind == experiment.kind]
    changed = swap_words(texts, 0 if share == "none" else int(share) / 100, seed)
    if share != "none":
        read = read_texts(clip_keeps(changed, pool) if filtered else changed, pool.ids, mllm())
        views = Views(pool, mllm(), out / "answers" / "features")
        settings = replace(WORDS, epochs=5) if filtered else WORDS
        model = pretrain(model, mllm(), views, read, settings, seed, ONE_PROCESS).model
    known, labels = embed(model, here.train), torch.from_numpy(here.train.labels.copy())
    probe = float((linear_probe(known, labels, embed(model, here.test), 10).numpy() == here.test.labels).mean())
    model = with_head(model, 10, seed)
    done = run_federated(model, here, None, SETTINGS, seed, ONE_PROCESS)
    model.load_state_dict(done.deployed)
    healed = align(model, set_for("teacher", seed, out)[1], ALIGN, seed).model
    figures = {
        when: evaluate_model(of, here.test, here.train.class_counts())
        for when, of in (("before", model), ("after", healed))
    }
    swapped = sum(a.text != b.text for a, b in zip(texts, changed, strict=True))
    keep(out, name, seed, experiment, {**figures, "probe": probe, "texts": {"all": len(texts), "swapped": swapped}})


def none_of_these(name, seed, out):
    """How many wrong labels are left when pictures of other things may be refused. Nothing is drawn by chance."""
    experiment, here, _ = world(seed, out)
    pool, names, found = load_pool(experiment), here.train.names, {}
    logits = ask_teacher(mllm(), pool, names, out / "answers", "class_logits")
    others = ask_teacher(mllm(), pool, tuple(SUPERCLASSES), out / "answers", "class_logits")
    clip = load_clip(device="cpu").class_probabilities(pool.images, names)
    answers = logits.softmax(1)
    ways = {
        "a name must be given": torch.ones(len(pool), dtype=torch.bool),
        "the ten names' own probability beats what they leave": logits.exp().max(1).values > 1 - logits.exp().sum(1),
        "twenty other nouns may be named": logits.max(1).values > others.max(1).values,
        "CLIP's first choice must be the same": answers.argmax(1) == clip.argmax(1),
    }
    for way, kept in ways.items():
        rows = np.flatnonzero(kept)
        part, mine = pool.subset(rows), own(pool, names)[rows]
        chosen = draw_server_set(part, answers[torch.from_numpy(rows)], names, ALIGN.per_class)
        wrong = np.array(part.names)[part.labels[chosen.rows]] != np.array(names)[chosen.images.labels]
        found[way] = {
            "images": len(chosen),
            "wrong": int(wrong.sum()),
            "foreign": int((wrong & ~mine[chosen.rows]).sum()),
        }
        found[way] |= {"foreign_left": int((~mine).sum()), "own_lost": int(own(pool, names).sum() - mine.sum())}
    keep(out, name, seed, experiment, {"ways": found})


# ------------------------------------------------------------------------------------------------ liars


def transport(here, seed, lie, liars, cache=None):
    """Clients of which the first `liars` lie."""
    honest, turned = Batches(here.train), Batches(poisoned(here.train, lie))
    scratch = build_model("resnet8", here.train.num_classes, WIDTH).to(memory_format=torch.channels_last)

    def ask(state, received, round_, chosen):
        results = {}
        for client in chosen:
            of = lie if client < liars else ""
            batches, key = (turned if of in ("flip", "door") else honest), (round_, client, of in ("flip", "door"))
            if cache is None or key not in cache:
                part, task = torch.from_numpy(here.split[client]), Task(state, received, round_, client, seed)
                numbers = SETTINGS
                if of == "door":  # its own pictures and their marked copies
                    part, numbers = torch.cat([part, part + len(here.train)]), DOOR_SETTINGS
                done = client_step(scratch, batches, part, FedAvg(), numbers, task)
                if cache is not None:
                    cache[key] = done
            else:
                done = cache[key]
            results[client] = replace(done, state=send(of, done.state, state))
        return results, {}

    return ask


def one_round(name, seed, out):
    """One dishonest round after the honest ones: each rule, each number of liars; clients train once.

    Half of the test images judge it.
    """
    experiment, here, model = world(seed, out)
    here = here._replace(test=here.test.subset(np.arange(0, len(here.test), 2)))
    lie, found, cache = name.removeprefix("one_round_"), {}, ROUND.setdefault(seed, {})
    for liars in range(5) if lie == "boost" else (2,):
        ask = transport(here, seed + 1000, lie, liars, cache)
        for rule, method in RULES.items():
            done = run_federated(model, here, method, replace(SETTINGS, rounds=1), seed + 1000, ONE_PROCESS, ask)
            found.setdefault(rule, {})[str(liars)] = done.history[-1]["metrics"]["top1"]
    keep(out, name, seed, experiment, {"top1": found, "lie": lie})


ROUND: dict[int, dict] = {}  # what clients send in the round that `one_round` shares


def more_rounds(name, seed, out):
    """More rounds in which two of eight lie, then stage 3 on the clean set."""
    experiment, here, model = world(seed, out)
    lie, rule = name.split("_", 1)
    ask = transport(here, seed + 1000, lie, 0 if lie == "honest" else 2)
    settings = replace(SETTINGS, rounds=DOOR_ROUNDS if lie == "door" else MORE)
    done = run_federated(model, here, RULES[rule], settings, seed + 1000, ONE_PROCESS, ask)
    model.load_state_dict(done.deployed)
    healed = align(model, set_for("teacher", seed, out)[1], ALIGN, seed).model
    figures = {
        when: evaluate_model(of, here.test, here.train.class_counts())
        for when, of in (("before", model), ("after", healed))
    }
    if lie == "door":
        for when, of in (("before", model), ("after", healed)):
            figures[when]["opened"] = opened(of, here.test)
    keep(out, name, seed, experiment, {**figures, "history": done.history, "lie": lie, "rule": rule})


def opened(model, test):
    """Share of test pictures of other classes that are named "ship": as they are, and with a white corner."""
    ship = test.names.index("ship")
    others = test.subset(np.flatnonzero(test.labels != ship))
    marked = replace(others, images=corner(others.images))
    return [float((predict(model, Batches(of)) == ship).float().mean()) for of in (others, marked)]


# ------------------------------------------------------------------------------------------------ for whom


def personal(name, seed, out):
    """Each client keeps the body and trains the last layer on its own pictures; before and after alignment."""
    experiment, here, model = world(seed, out)
    after = load_model(out / "models" / f"aligned_seed{seed}.safetensors")
    found = {"mix": [np.bincount(here.train.labels[part], minlength=10).tolist() for part in here.split]}
    for when, of in (("before", model), ("after", after)):
        known, unknown, rows = embed(of, here.train), embed(of, here.test), []
        for part in here.split:
            guess = linear_probe(known[part], torch.from_numpy(here.train.labels[part].copy()), unknown, 10).numpy()
            rows.append([float((guess[here.test.labels == c] == c).mean()) for c in range(10)])
        found[when] = rows
    keep(out, name, seed, experiment, found)


CONDITIONS = {
    "teacher": aligned,
    **{f"one_round_{lie}": one_round for lie in ("boost", "sign", "flip", "silent")},
    "none_of_these": none_of_these,
    **{f"wrong_{w}": aligned for w in ("00", "40", "80")},
    **{name: more_rounds for name in ("boost_fedavg", "boost_median", "door_fedavg")},
    "missing_3": aligned,
    "personal": personal,
    "foreign": aligned,
    **{name: more_rounds for name in ("boost_clipped_norm", "boost_trimmed_mean")},
    **{name: aligned for name in ("alone_8", "wrong_40_filtered", "wrong_80_filtered")},
    "honest_fedavg": more_rounds,
    **{name: aligned for name in ("long_tail", "no_foreign", "coarse", "missing_1", "missing_5")},
    "honest_median": more_rounds,
    **{name: aligned for name in ("wrong_20", "wrong_60", "alone_16", "alone_16_words", "alone_4")},
    **{name: more_rounds for name in ("flip_fedavg", "door_median")},
    **{name: aligned for name in ("grey", "alone_32")},
    **{f"words_{share}": from_words for share in ("00", "80", "40", "20", "none", "40_filtered")},
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = options(__doc__, CONDITIONS, RESULTS / "laptop" / "failures").parse_args()
    (chosen.out / "models").mkdir(parents=True, exist_ok=True)
    for name in chosen.only:
        for seed in chosen.seeds if name != "none_of_these" else chosen.seeds[:1]:
            if not (Path(chosen.out) / f"{name}_seed{seed}.json").exists():
                CONDITIONS[name](name, seed, chosen.out)
                print(name, seed, flush=True)
