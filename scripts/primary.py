"""The runs of results/PROTOCOL.md: each row's accuracy, and the five primary differences with Holm's correction.

    python scripts/primary.py    # prints both tables of each world

All figures come from results/SCALE/tuned. Seeds that one of two rows lacks are left out of their difference.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sweep import RESULTS

from mllmfl_lite.runs.results import load_result
from mllmfl_lite.teaching.compare import Difference, mean_and_spread, paired_difference
from mllmfl_lite.teaching.tables import percent

LAPTOP = """### Laptop: bundled images, imbalance factor 10, 40 rounds of 4 epochs

Chapter 6 calls it the long world: 2,040 images on 10 clients. The reference rows have one seed. The one with balanced
data has 5,000 images.
"""
MEDIUM = """### Medium: CIFAR-10-LT, imbalance factor 100, 60 rounds of 2 epochs

11,165 images on 20 clients. The older tables of this size, at "Older, medium", have another split and another teacher.
Do not compare the two.
"""
WORLDS = {"laptop/tuned/cifar10_mini_lt_if10_long": LAPTOP, "medium/tuned/cifar10_lt_if100_clean": MEDIUM}
QUESTIONS = {
    "Q1": ("Does stage 1 help, with FedAvg's clients?", "mllm_llava_fl", "stage3"),
    "Q2": ("Does stage 3 help FedYoYo?", "fedyoyo_stage3", "fedyoyo"),
    "Q3": ("Does stage 1 help, with FedYoYo's clients?", "fedyoyo_all_three", "fedyoyo_stage3"),
    "Q4": ("Does the KL term help?", "stage3", "stage3_ce"),
    "Q5": ("Do the clients help the server?", "stage3", "server_only"),
}
NAMES = {
    "fedavg": "FedAvg", "fedavg_strong": "FedAvg, strong augmentation", "balanced_softmax": "balanced softmax",
    "fedyoyo": "FedYoYo", "creff": "CReFF", "clip2fl": "CLIP2FL",
    "clip2fl_imagenet": "CLIP2FL, an ImageNet network for CLIP", "feddf": "FedDF", "fednpc": "FedNPC",
    "fedprox": "FedProx", "fedavgm": "FedAvgM", "stage1": "stages 1 and 2", "stage3": "stages 2 and 3",
    "stage3_ce": "stages 2 and 3, cross-entropy alone", "mllm_llava_fl": "all three stages",
    "mllm_llava_fl_ce": "all three stages, cross-entropy alone", "server_only": "stage 3 without clients",
    "server_only_ce": "stage 3 without clients, cross-entropy alone", "fedyoyo_stage3": "FedYoYo, then stage 3",
    "fedyoyo_all_three": "stage 1, FedYoYo, stage 3", "balanced_iid": "reference: balanced IID data, FedAvg",
    "one_place": "reference: all images in one place",
    "server_only_longer": "stage 3 without clients, five times as long",
    "stage3_longer": "stages 2 and 3, stage 3 five times as long",
}  # fmt: skip
AGAIN = {name: (text, f"{row}_100", minus if minus == "fedyoyo" else f"{minus}_100")
         for name, (text, row, minus) in QUESTIONS.items()}  # fmt: skip
NAMES |= {row: NAMES[row[:-4]] for pair in AGAIN.values() for row in pair[1:] if row not in NAMES}
NAMES |= {f"{row}_100": NAMES[row] for row in ("server_only_ce", "mllm_llava_fl_ce")}
NAMES |= {f"{row}_300": f"{NAMES[row]} (300 epochs, exploratory)" for row in ("server_only_ce", "stage3_ce")}
WITHOUT_SET = [
    "fedavg", "fedavg_strong", "fedprox", "fedavgm", "stage1", "balanced_softmax", "fedyoyo", "creff", "clip2fl",
    "clip2fl_imagenet", "feddf", "fednpc",
]  # fmt: skip
REFERENCES = ["balanced_iid", "one_place"]

FIRST = {row for _, *pair in QUESTIONS.values() for row in pair} - {row for _, *pair in AGAIN.values() for row in pair}
FIRST |= {f"{row}_longer" for row in FIRST} | {f"{row}_ce" for row in FIRST}


class Primary(NamedTuple):
    """One primary difference: paired seeds, the difference in [0, 1] and Holm's adjusted p-value."""

    seeds: list[int]
    found: Difference
    p: float

    @property
    def chance(self) -> str:
        """The p-value in words; none is printed as zero."""
        return f"{self.p:.3f}" if self.p >= 0.001 else "under 0.001"


def holm(p_values: list[float]) -> list[float]:
    """Adjust p-values for several questions at once (S. Holm, 1979)."""
    rising = np.argsort(p_values)
    raised = np.asarray(p_values)[rising] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[rising] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return adjusted.tolist()


def read(folder: Path) -> dict[str, dict[int, dict]]:
    """The results of a world, by row and seed. One whose sets share an image is a ValueError."""
    found: dict[str, dict[int, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        result = load_result(path)
        if shared := {pair: n for pair, n in result["data"].get("overlap", {}).items() if n}:
            raise ValueError(f"{path}: two sets share images ({shared}); such a row is not used")
        found.setdefault(result["label"], {})[result["parameters"]["seed"]] = result
    return found


def difference(rows: dict[str, dict[int, dict]], ours: str, theirs: str, group: str | None = None) -> Difference:
    """Two rows' accuracy, in all classes or a group, over the seeds that both have; without one a ValueError."""
    both = shared_seeds(rows, ours, theirs)
    found = [[rows[row][seed]["summary"] for seed in both] for row in (ours, theirs)]
    return paired_difference(*([s["groups"][group] if group else s["top1"] for s in of] for of in found))


def shared_seeds(rows: dict[str, dict[int, dict]], *names: str) -> list[int]:
    """The seeds that all of these rows have, rising."""
    return sorted(set.intersection(*(set(rows.get(name, {})) for name in names)))


def primary(rows: dict[str, dict[int, dict]], questions: dict = QUESTIONS) -> dict[str, Primary]:
    """The differences of a round's questions that have two seeds or more; Holm's correction is over all five."""
    differences, seeds = {}, {}
    for name, (_, ours, theirs) in questions.items():
        if len(both := shared_seeds(rows, ours, theirs)) > 1:
            seeds[name], differences[name] = both, difference(rows, ours, theirs)
    missing = [1.0] * (len(questions) - len(differences))
    adjusted = holm([found.p for found in differences.values()] + missing)
    return {
        name: Primary(seeds[name], found, p)
        for (name, found), p in zip(differences.items(), adjusted, strict=False)
    }  # fmt: skip


def over_both(rows: dict[str, dict[int, dict]]) -> dict[str, float]:
    """The p-values of the second series, with Holm's correction over both; a question without runs counts as 1."""
    answered = [primary(rows, asked).get(name) for asked in (QUESTIONS, AGAIN) for name in asked]
    adjusted = holm([one.found.p if one else 1.0 for one in answered])
    return dict(zip(AGAIN, adjusted[len(QUESTIONS) :], strict=True))


def tables(results: Path = RESULTS) -> Iterator[str]:
    """Lines of Markdown: for each world that has runs, its primary differences and its rows, the last series first."""
    for place, title in WORLDS.items():
        if rows := read(results / place):
            before = {name: of for name, of in rows.items() if name in FIRST}
            repeated = primary(rows, AGAIN)
            now = {name: of for name, of in rows.items() if name not in before} if repeated else rows
            questions = AGAIN if repeated else QUESTIONS
            both = over_both(rows) if repeated and before else {}
            yield from (title, *table_of_answers(rows, questions, both), "", *table_of_rows(now), "")
            if both:
                note = 'Rows "five times as long" have 100 epochs, and the settings of this series.'
                first = [*table_of_answers(rows), "", *table_of_rows(before), "", note]
                yield from folded("The first series, with 20 epochs of stage 3", first)


def folded(title: str, lines: Iterable[str]) -> Iterator[str]:
    """Lines of Markdown behind a click."""
    yield from (f"````{{admonition}} {title}", ":class: dropdown", "", *lines, "", "````", "")


def table_of_rows(rows: dict[str, dict[int, dict]]) -> Iterator[str]:
    """Each row's accuracy, in per cent: mean and standard deviation over its seeds; four groups of rows."""
    yield from ("| row | seeds | all classes | head | middle | tail |", "|---" * 6 + "|")
    alone = [name for name in NAMES if name.startswith("server_only")]
    with_set = [name for name in NAMES if name not in (*WITHOUT_SET, *alone, *REFERENCES)]
    groups = {"without the server set": WITHOUT_SET, "with the server set": with_set,
              "the server set and no clients": alone, "references": REFERENCES}  # fmt: skip
    for title, names in groups.items():
        if found := [name for name in names if name in rows]:
            yield f"| **{title}** | | | | | |"
            yield from (row(NAMES[name], list(rows[name].values())) for name in found)


def table_of_answers(
    rows: dict[str, dict[int, dict]], questions: dict = QUESTIONS, both: dict[str, float] | None = None
) -> Iterator[str]:
    """The difference of each question; one with fewer than two seeds is called "not run"."""
    yield from ("| question | compared rows | seeds | points (95 %) | p, corrected | answer |", "|---" * 6 + "|")
    answered = primary(rows, questions)
    for name in questions:
        yield answer(name, answered.get(name), (both or {}).get(name, 0.0))


def row(name: str, results: list[dict]) -> str:
    """A row's line: mean and spread over its seeds."""
    all_classes = [result["summary"]["top1"] for result in results]
    groups = [[result["summary"]["groups"][part] for result in results] for part in ("head", "middle", "tail")]
    cells = [percent(*mean_and_spread(values)) for values in (all_classes, *groups)]
    return f"| {name} | {len(results)} | {' | '.join(cells)} |"


def answer(name: str, asked: Primary | None, both: float = 0.0) -> str:
    """A question's line; `both` is its p-value, corrected over two series."""
    question, *pair = QUESTIONS[name]
    compared = " − ".join(NAMES[row] for row in pair)
    if asked is None:
        return f"| {question} | {compared} | 0 | – | 1.000 | not run |"
    verdict = "not shown" if asked.p >= 0.05 else "yes" if asked.found.mean > 0 else "no: it costs points"
    if asked.p < 0.05 <= both:
        verdict = f"borderline (both series: {both:.2f})"
    return f"| {question} | {compared} | {len(asked.seeds)} | {asked.found.points} | {asked.chance} | {verdict} |"


if __name__ == "__main__":
    print(*tables(), sep="\n")
