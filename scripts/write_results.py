"""Write `book/results.md` from the results files, the runs' files and the figures that others report.

    make results

Nothing is typed by hand: a row is what files say. What has not been run stands in one table with what it takes.
"""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mllmfl_lite.runs import load_result
from mllmfl_lite.runs.files import Run, read_runs
from mllmfl_lite.runs.needs import TO_FETCH, needed
from mllmfl_lite.runs.plan import in_words, total_hours
from mllmfl_lite.runs.run import finished
from mllmfl_lite.teaching.compare import mean_and_spread, reported
from mllmfl_lite.teaching.tables import Table, percent

ROOT = Path(__file__).resolve().parent.parent
PAGE, RUNS, RESULTS = ROOT / "book" / "results.md", ROOT / "notebooks" / "runs", ROOT / "results"
SEEDS = range(3)  # of a sweep that has not been run
NAMES = {"cifar10_mini": "CIFAR-10-LT, the bundled images", "cifar10": "CIFAR-10-LT", "cifar100": "CIFAR-100-LT"}
SCALES = ("paper", "medium", "laptop")
BENCHMARKS = ("cifar10_lt_if100", "cifar10_lt_if50", "cifar10_lt_if10", "cifar100_lt_if100", "cifar100_lt_if50",
              "cifar100_lt_if10", "imagenet_lt", "cifar10_mini_lt_if100", "cifar10_mini_lt_if50",
              "cifar10_mini_lt_if10")  # fmt: skip
FIGURES = {"top1": "top-1, all classes", "few": "top-1, classes with few images"}
ORDER = ("fedavg", "fedprox", "fedavgm", "creff", "clip2fl", "mllm_llava_fl", "mllm_llava_fl_ce", "stage1", "stage3",
         "stage3_ce")  # fmt: skip
PROTOCOL = {
    "dataset": "data", "num_clients": "clients", "federated.clients_per_round": "a round", "federated.rounds": "rounds",
    "federated.local_epochs": "local epochs", "model": "model", "width": "width", "federated.precision": "precision",
    "mllm": "MLLM", "clip": "CLIP", "pool": "open images", "pool_images": "how many (0: all)",
}  # fmt: skip

INTRODUCTION = """# Results

Every figure that a run from a file has produced. `make results` writes this page from the files in `results/`; a test
compares it with them.

- **A figure** is top-1 on the whole test set in percent. For a run without stage 3 it is the mean over the last ten
  tested rounds (laptop: five). With stage 3 it is that of the aligned model. Then follow mean ± standard deviation
  over seeds. *head* and *tail* are the thirds of the classes with the most and the fewest images.
- **Time** is the mean time of one seed's rounds, without stages 1 and 3. The runs had one of two cores; both were at
  work, at times with other work beside.
- **Others' figures** stand before our tables, never in them: models, teachers, web images and budgets differ.
- **What ours say** is read in [chapter 6](../notebooks/06_three_stages_together.ipynb), beside controls and paired
  tests. With stand-ins that know these classes, they do not test the paper's claim.
- **run** names a file in `notebooks/runs/methods`, the heading one in `notebooks/runs`:
  `make paper SCALE=medium RUN=cifar10_lt_if100/fedavg` runs the first row of the medium table.

"""
NOTE = """
The paper's protocol as far as it is known has 20 clients, 8 a round, and 200 rounds of 10 local epochs. Batches hold
32 images, the step size is 0.1, the model is ResNet-8 at width 64 (ResNet-50 for ImageNet-LT). The rest is our
reading: how the teachers are asked, which web images are used and how many, and the rounds on ImageNet-LT. At laptop
and medium scale with CIFAR-10 the MLLM and CLIP are stand-ins that learned these classes from CIFAR images.

**The medium tables leak.** About five of six of the clients' images are among those that the stand-ins learned from.
The pool shares 359 to 389 images with the clients. So rows with a teacher or a pool flatter there. The laptop's
images are disjoint. All figures were measured before `results/PROTOCOL.md` was written: they are exploratory.

"""
NOT_RUN = """## Not run yet

Hours are **estimates** for one H100 and three seeds; what runs share counts once. They are counted operations over
rates that no run has checked. CReFF's and CLIP2FL's servers are left out. `make sweep SCALE=paper RUN=cifar10_lt_if100`
runs the methods of `notebooks/runs/methods`; with `PLAN=1` it says more.

"""


class Row(NamedTuple):
    """A method's runs of one benchmark: its words, label, experiment and results."""

    words: str
    run: Run
    found: list[dict]


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page as Markdown."""
    parts = [INTRODUCTION, "## What the scales differ in\n\n", _protocols(), NOTE]
    lacking = []
    for name in BENCHMARKS:
        tables = []
        for scale in SCALES:
            if (RUNS / scale / f"{name}.yaml").exists():
                rows = rows_of(scale, name)
                tables += (
                    [_results(scale, name, [row for row in rows if row.found])] if any(r.found for r in rows) else []
                )
                lacking.append((scale, name, [row.run for row in rows if not row.found], len(rows)))
        if tables or _reported(name):
            parts += [f"## {_title(name)}\n\n", _reported(name), *tables]
    lacking.sort(key=lambda line: SCALES.index(line[0]))
    parts += [NOT_RUN, _prices(lacking), "\nWhat there is to fetch, none of it by us:\n\n", _fetched(lacking)]
    return "".join(parts).rstrip() + "\n"


def rows_of(scale: str, name: str) -> list[Row]:
    """A row for each method; those for few benchmarks only where they were run."""
    every = sorted((RUNS / "methods").glob("*.yaml"), key=_place)
    few = sorted((RUNS / "methods").glob("*/*.yaml"))
    rows = []
    for path in [*every, *few]:
        files = sorted((RESULTS / scale / name).glob(f"{path.stem}_seed*.json"))
        files = [file for file in files if file.stem.rpartition("_seed")[0] == path.stem]
        seeds = sorted(load_result(file)["parameters"]["seed"] for file in files)
        runs = read_runs([RUNS / scale / f"{name}.yaml"], [path], seeds)
        found = [finished(run.result(RESULTS / scale / name), run.experiment) for run in runs] if seeds else []
        if found or path in every:
            rows.append(Row(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "), runs[0], found))
    return rows


def _place(path: Path) -> tuple:
    return (ORDER.index(path.stem) if path.stem in ORDER else len(ORDER), path.stem)


def _title(name: str) -> str:
    data, _, factor = name.partition("_lt")
    return f"{NAMES[data]}, imbalance {factor.removeprefix('_if')}" if factor else "ImageNet-LT"


def _table(header: list[str], rows: list[list[str]]) -> str:
    escaped = Table(header, rows)._repr_markdown_()
    return escaped.replace("&#95;", "_").replace("&#39;", "'") + "\n"  # harmless inside words, and easier to read


def _protocols() -> str:
    shown = {"paper": "paper/cifar10_lt_if100", "medium": "medium/cifar10_lt_if100", "medium, CIFAR-100-LT":
             "medium/cifar100_lt_if100", "laptop": "laptop/cifar10_mini_lt_if100"}  # fmt: skip
    whole = RUNS / "methods" / "mllm_llava_fl.yaml"
    runs = [read_runs([RUNS / f"{benchmark}.yaml"], [whole])[0].experiment for benchmark in shown.values()]
    values = [{**asdict(run), **{f"federated.{k}": v for k, v in asdict(run.federated).items()}} for run in runs]
    rows = [[words, *(str(of[key]) for of in values)] for key, words in PROTOCOL.items()]
    rows.append(["stage 1", *("the book's own weights" if run.start else "anew, in the run" for run in runs)])
    return _table(["setting", *shown], rows)


def _reported(name: str) -> str:
    lines = [
        f"- {FIGURES[what.removeprefix(f'{name}_')]}: "
        + ", ".join(f"{_words(method)} {value:.2f}" for method, value in figures.items())
        + f" ({of['source']})\n"
        for of in reported().values()
        for what, figures in of.items()
        if what.removeprefix(f"{name}_") in FIGURES
    ]
    return "Reported by others:\n\n" + "".join(lines) + "\n" if lines else ""


def _words(method: str) -> str:
    return (RUNS / "methods" / f"{method}.yaml").read_text(encoding="utf-8").splitlines()[0][2:].split(",")[0]


def _results(scale: str, name: str, rows: list[Row]) -> str:
    header = ["method", "all", "head", "tail", "seeds", "time", "run"]
    table = _table(header, [_filled(row) for row in rows])
    return f"### {scale.capitalize()} scale: `{scale}/{name}`\n\n{table}\n{_made_with(rows)}\n"


def _filled(row: Row) -> list[str]:
    summaries = [result["summary"] for result in row.found]
    figures = [[s["top1"] for s in summaries], *([s["groups"][group] for s in summaries] for group in ("head", "tail"))]
    spent = np.mean([sum(record["seconds"] for record in result["history"]) for result in row.found])
    time = in_words(spent / 3600).replace(" ", "\u00a0") if spent else "–"
    cells = [percent(*mean_and_spread(values)) for values in figures]
    return [row.words, *cells, str(len(row.found)), time, row.run.label]


def _made_with(rows: list[Row]) -> str:
    """Device, version and commit, and which runs they made."""
    by: dict[str, list[str]] = {}
    for row in rows:
        for made in dict.fromkeys(_device(result["provenance"]) for result in row.found):
            by.setdefault(made, []).append(row.run.label)
    return "".join(f"- {made}: {', '.join(f'`{label}`' for label in labels)}\n" for made, labels in sorted(by.items()))


def _device(made: dict) -> str:
    changed = "+" * made["revision"].endswith("+")  # files had changed since that commit
    return f"{made['device']}, torch {made['packages']['torch']}, commit `{made['revision'][:7]}{changed}`"


def _prices(lacking: list[tuple]) -> str:
    rows = []
    for scale, name, runs, of in lacking:
        if runs:
            methods = [RUNS / "methods" / f"{run.label}.yaml" for run in runs]
            every = [run.experiment for run in read_runs([RUNS / scale / f"{name}.yaml"], methods, SEEDS)]
            fetch = ", ".join(dict.fromkeys(_short(need) for one in every for need in needed(one))) or "nothing"
            hours = in_words(total_hours(every, "h100")).replace(" ", "\u00a0")
            rows.append([scale, name, f"{len(runs)} of {of}", fetch, hours])
    return _table(["scale", "benchmark", "methods", "to fetch", "one H100, estimate"], rows)


def _short(need: str) -> str:
    return TO_FETCH[need].split(" (")[0].split(",")[0]


def _fetched(lacking: list[tuple]) -> str:
    every = dict.fromkeys(need for _, _, runs, _ in lacking for run in runs for need in needed(run.experiment))
    rows = []
    for need in every:
        size, _, terms = TO_FETCH[need].split("(", 1)[1].partition("): ")[0].partition("; ")
        rows.append([_short(need), size if terms else "", terms or size])
    return _table(["what", "size", "terms"], sorted(rows))


if __name__ == "__main__":
    main()
