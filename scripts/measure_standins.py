"""Measure the bundled stand-ins on all of `cifar10_mini`'s test part, and write their model cards from the figures.

python scripts/measure_standins.py            # minutes; writes assets/standins.json and two README.md
python scripts/measure_standins.py --cards    # the cards only, from standins.json
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from standins.claims import look, names_class, objects_in, read_claims

from mllmfl_lite.data import load_images
from mllmfl_lite.repro import write_atomically, write_json
from mllmfl_lite.stages.annotate import annotate
from mllmfl_lite.stages.backends import TransformersBackend
from mllmfl_lite.teachers.base import ASSETS, BUNDLED
from mllmfl_lite.teachers.clip import load_clip
from mllmfl_lite.teachers.llava import load_mllm
from mllmfl_lite.teachers.prompts import KINDS

FIGURES, CARDS = ASSETS / "standins.json", Path(__file__).parent / "cards"


def measure_clip(test) -> dict:
    scores = load_clip(device="cpu").class_probabilities(test.images, test.names)
    return {"zero-shot accuracy over the ten classes": float((scores.argmax(1).numpy() == test.labels).mean())}


def measure_llava(test) -> dict:
    teacher = load_mllm(device="cpu", batch_size=250)
    with tempfile.TemporaryDirectory() as folder:
        records = annotate(test, TransformersBackend(teacher, 64), Path(folder) / "test.jsonl").records
    name = {i: test.names[label] for i, label in zip(test.ids, test.labels, strict=True)}
    facts = dict(zip(test.ids, look(test.images), strict=True))
    out = {}
    for kind in KINDS:
        of_kind = [r for r in records if r.kind == kind]
        words = kind.replace("_", " ")
        out[f"class named: {words}"] = float(np.mean([names_class(r.text, name[r.id]) for r in of_kind]))
        out[f"a wrong object named: {words}"] = float(
            np.mean([bool(objects_in(r.text) - {name[r.id]}) for r in of_kind])
        )
    for about in ("colour", "background"):
        said = [(read_claims(r.text).get(about), getattr(facts[r.id], about)) for r in records]
        out[f"claims about {about} right"] = float(np.mean([claim == {fact} for claim, fact in said if claim]))
    scores = teacher.class_probabilities(test.images, test.names)
    out["class by the likelihood of its name"] = float((scores.argmax(1).numpy() == test.labels).mean())
    return out


def size_of(folder: str) -> str:
    return f"{sum(p.stat().st_size for p in Path(folder).iterdir() if p.suffix != '.md') / 1e6:.1f} MB"


def write_cards(figures: dict) -> None:
    for key, of in figures.items():
        folder, card = BUNDLED[key], (CARDS / f"{key}.md").read_text(encoding="utf-8")
        rows = [f"| {what} | {100 * value:.1f} % |" for what, value in of["test"].items()]
        content = card.format(
            size=size_of(folder),
            table="\n".join(["| | |", "|---|---|", *rows]),
            cifar="A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009",
            **of["made"],
        )
        write_atomically(Path(folder) / "README.md", content.encode())
        print(f"{key}: {Path(folder) / 'README.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", action="store_true", help="write the cards from the figures that are there")
    args = parser.parse_args()
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    if not args.cards:
        test = load_images("cifar10_mini", "test")
        figures["tiny_clip"]["test"], figures["tiny_llava"]["test"] = measure_clip(test), measure_llava(test)
        write_json(FIGURES, figures)
    write_cards(figures)


if __name__ == "__main__":
    main()
