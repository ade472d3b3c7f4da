"""Write the table of results/real/README.md from the results files; rows without a file are left out.

python scripts/table_real_parts.py
"""

from pathlib import Path
from statistics import mean

from real_parts.stage1 import CONDITIONS
from sweep import RESULTS

from mllmfl_lite.repro import write_atomically
from mllmfl_lite.runs.results import load_result
from mllmfl_lite.teaching.compare import paired_difference

WHAT = {
    "words": "words, alpha = 1",
    "features": "the encoder's pooled features, cosine",
    "choices": "the encoder's first ImageNet class, cross-entropy",
    "words_ramp": "words, alpha rises over 20 % of the steps",
    "shuffled": "words of other pictures, alpha = 1",
    "words_features": "words and features together",
    "words_ramp_longer": "words, alpha rises, then 6,000 steps at alpha = 1",
}
PROBED = (500, 1500, 2500)
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def percent(values: list[float]) -> str:
    """Each seed's value, and their mean."""
    if not values:
        return ""
    return ", ".join(f"{100 * v:.1f}" for v in values) + (f" ({100 * mean(values):.1f})" if len(values) > 1 else "")


def of_method(folder: Path, label: str) -> list[float]:
    """Top-1 of each seed's results file."""
    return [load_result(path)["summary"]["top1"] for path in sorted(folder.glob(f"{label}_seed*.json"))]


def random_row(results: Path) -> str:
    """The start without stage 1, from the laptop's results."""
    world, start = (
        results / "laptop" / "cifar10_mini_lt_if100",
        results / "laptop" / "pretraining" / "random_seed0.json",
    )
    cells = ["", "", "", "", percent([load_result(start)["summary"]["probe"]])]
    return row(
        "random weights",
        [*cells, percent(of_method(world, "fedavg")), percent(of_method(world, "stage3_imagenet")), ""],
    )


def condition_row(path: Path, results: Path) -> str:
    """One pretraining run, and the federations that start from it."""
    found = load_result(path)
    parameters, steps = found["parameters"], {record["step"]: record for record in found["history"]}
    name, seed, last = parameters["condition"]["name"], parameters["seed"], found["history"][-1]
    gaps = "; ".join(f"{part['right']:.2f} / {part['other']:.2f}" for part in last["held_out"].values())
    probes = [percent([steps[step]["probe"]]) if step in steps else "" for step in PROBED]
    ends = [of_method(results / "real" / "federated", f"{name}{seed}_{end}") for end in ("fedavg", "stage3_imagenet")]
    gain = against(ends[1], of_method(results / "laptop" / "cifar10_mini_lt_if100", "stage3_imagenet"))
    return row(f"{WHAT[name]}; seed {seed}", [gaps, *probes, percent([last["probe"]]), *map(percent, ends), gain])


def against(ours: list[float], random: list[float]) -> str:
    """Mean difference from random weights over the federation's seeds, and its 95 % interval, in points."""
    if len(ours) != len(random) or len(ours) < 2:
        return ""
    return paired_difference(ours, random).points


def row(first: str, cells: list[str]) -> str:
    return "| " + " | ".join([first, *cells]) + " |"


def table(results: Path) -> list[str]:
    """The lines of the table."""
    head = ["learned from", "held-out loss, own / another picture", *(f"probe at {step:,}" for step in PROBED)]
    head += ["probe at the end", "FedAvg", "after stage 3", "less random weights, 95 % interval"]
    rows = [row(head[0], head[1:]), "|" + "---|" * len(head), random_row(results)]
    for name in CONDITIONS:
        paths = sorted((results / "real" / "pretraining").glob(f"{name}_seed*.json"))
        rows += [condition_row(path, results) for path in paths]
    return rows


def main() -> None:
    page = RESULTS / "real" / "README.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    text = "\n".join([f"{before}{BEGIN}", "", *table(RESULTS), "", f"{END}{after}"])
    write_atomically(page, text.encode())


if __name__ == "__main__":
    main()
