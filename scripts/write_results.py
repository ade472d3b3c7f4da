"""Write `book/results.md` from the results files, the runs' files and the figures that others report.

    make results

Nothing is typed by hand: a row is what files say. What has not been run stands in one table with what it takes.
"""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import primary

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
SCALES = ("laptop", "medium", "paper")
BENCHMARKS = ("cifar10_lt_if100", "cifar10_lt_if50", "cifar10_lt_if10", "cifar100_lt_if100", "cifar100_lt_if50",
              "cifar100_lt_if10", "imagenet_lt", "cifar10_mini_lt_if100", "cifar10_mini_lt_if50",
              "cifar10_mini_lt_if10")  # fmt: skip
FIGURES = {"top1": "all classes", "few": "classes with few images"}
ORDER = ("fedavg", "fedprox", "fedavgm", "creff", "clip2fl", "mllm_llava_fl", "mllm_llava_fl_ce", "stage1", "stage3",
         "stage3_ce")  # fmt: skip
# A benchmark's first rows; its other rows are behind a click.
MAIN = {*ORDER[:6], "stage3", "server_only", "creff_stage3", "clip2fl_stage3"}
PROTOCOL = {
    "dataset": "data", "imbalance_factor": "imbalance factor", "num_clients": "clients",
    "federated.clients_per_round": "clients in a round", "federated.rounds": "rounds",
    "federated.local_epochs": "local epochs", "width": "width of ResNet-8", "pool": "open images",
}  # fmt: skip

INTRODUCTION = """# Results

**In short: a run with stage 3 is far ahead of the same run without it.** The tail gains, and FedAvg's head pays. The
clients add one to four points to a server that trains long: on the laptop this is borderline, in the medium world it is
shown. **No run of the paper's scale has been made, and none with a real LLaVA.** Trust the five questions most: they
were fixed before any of their runs (not so the length of the laptop's second series).
[Chapter 6](../notebooks/06_three_stages_together.ipynb) reads these tables.

Here are all runs that were started from a settings file. Other tables stand in their chapters. First come the five
questions, then older runs, then what others report, then what was not run, with its price.
Most controls are behind a click. `make results` writes the page from the files in `results/`. A test fails if
the two differ.

How to read a table:

- **all** is the accuracy (top-1) on the whole test set, in per cent. **head** is the third of the classes with the
  most training images, **tail** the third with the fewest, **middle** what lies between. Of ten classes, the head
  has four.
- A number is the mean over seeds. After "±" stands the standard deviation over seeds.
- A run without stage 3 reports the mean of its last ten tests. A run of 20 rounds reports its last five. A run with
  stage 3 reports the aligned model.
- Stage 3 uses cross-entropy and KL, unless the row says otherwise.

"""
PLANNED = """## The five questions of the protocol

`results/PROTOCOL.md` has the five questions and the rules. They were written before the first series; the second one's
length was planned after it. Each row had six trials on held-out training images, apart from references and rows that go
on from another. "Points" is the difference of the two compared rows, with its 95 % interval.
Only seeds that both rows have are used. So points can differ a little from a subtraction in the table below.

Suppose two rows were really equally good. Then *p* says how often chance alone would give a difference of this size or
more. With five questions, one p can be small by luck. Holm's correction (1979) makes each p larger to allow for this. A
question without runs counts as p = 1. "Not shown" does not mean "no effect".

There are two series. (The protocol calls a series a round.)

- **The first** had 20 epochs of stage 3. The row without clients was still improving when it stopped. And the best
  settings with KL were at the edge of what we had tried. In it the clients seem to add 11.9 points.
- **The second** has 100 epochs and six new trials for each row. In it they add 1.5 points. It is the better one. But
  we planned it after we had seen the first one's numbers. So the laptop's last column also says if p, corrected
  for the ten questions of both series, is above 0.05. And again the best settings with KL are at an edge.

The protocol promises ten seeds on the laptop. Three to five are done. Where it says "the best client", it means
FedYoYo. `make evidence` goes on with the runs that are left. `python scripts/primary.py` prints these tables.

"""
OLDER = """## Older runs

The tables from here to "What others report" were made before the protocol was written. So they are exploratory.

- **time** is the mean time of the rounds of one seed. Stages 1 and 3 are not in it. Each run had one of two cores,
  and other work ran at the same time.
- **run** names a file in `notebooks/runs/methods`. The code in a heading names a file in `notebooks/runs`. So this
  command makes the first row of the next table again: `make paper SCALE=laptop RUN=cifar10_mini_lt_if100/fedavg`.

"""
WORLDS = {
    "laptop": """### Older, on the laptop: clean

The first table is the short world of chapters 2 to 5. Stage 3 has 20 epochs, so rows without clients may not be trained
to their end. (Such rows do not depend on the imbalance. Between the tables they differ by half a point: they were made
with two versions of PyTorch.) No image is shared between the clients, the server's open images and the test set. The
multimodal LLM and CLIP are stand-ins. They learned the ten classes from other CIFAR images.

""",
    "medium": """### Older, medium: these tables leak

```{warning}
**These tables leak.** The stand-ins learned, with labels, from about five of six of the clients' images. The open
images share 359 to 389 images with the clients. So rows with a teacher or with open images look better than they
should.
```

""",
}
OTHERS = """## What others report

These figures stand apart from ours. Their models, teachers, web images and budgets differ.

"""
NOT_RUN = """## Not run yet

Here is what was not run, with its price. "3 of 30" means that three of thirty methods have no run. The seeds that the
protocol still lacks are not in this table; `make evidence` runs them. Hours are **estimates** for one H100 and three
seeds. What several runs share is counted once. We counted the operations, and divided them by the speed that we expect.
No run has checked this speed. The servers of CReFF and CLIP2FL are not counted. `make sweep SCALE=paper
RUN=cifar10_lt_if100` runs the methods of `notebooks/runs/methods`. With `PLAN=1` it only says what it needs.

"""
SETTINGS = """## The worlds

A world is a data set, its clients and the length of the runs. Compare rows of one world alone. Chapter 6 calls the
first three *long*, *larger* and *short*. "Reserved" images are a part of CIFAR-10 that no client holds, and CIFAR-100.

"""
NOTE = """
The last column is the paper's protocol, as far as it is known. There, batches hold 32 images, and the step size is 0.1.
The rest is our reading: how the teachers are asked, and which web images are used and how many.

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
    lacking = []
    tables: dict[str, list[str]] = {scale: [] for scale in SCALES}
    for scale in SCALES:
        for name in (name for name in BENCHMARKS if (RUNS / scale / f"{name}.yaml").exists()):
            rows = rows_of(scale, name)
            if run := [row for row in rows if row.found]:
                tables[scale].append(_results(scale, name, run))
            lacking.append((scale, name, [row.run for row in rows if not row.found], len(rows)))
    planned = [PLANNED, *(f"{line}\n" for line in primary.tables(RESULTS)), OLDER]
    parts = [INTRODUCTION, SETTINGS, _protocols(), NOTE, *planned]
    parts += [part for scale, of in tables.items() if of for part in (WORLDS[scale], *of)]
    parts += [OTHERS, _reported(), NOT_RUN, _prices(lacking), "\nThis is what you would have to fetch:\n\n"]
    parts += [_fetched(lacking)]
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
    shown = {"five questions, laptop": "laptop/cifar10_mini_lt_if10_long",
             "five questions, medium": "medium/cifar10_lt_if100_clean", "older, laptop": "laptop/cifar10_mini_lt_if100",
             "older, medium": "medium/cifar10_lt_if100", "paper": "paper/cifar10_lt_if100"}  # fmt: skip
    whole = RUNS / "methods" / "mllm_llava_fl.yaml"
    runs = [read_runs([RUNS / f"{benchmark}.yaml"], [whole])[0].experiment for benchmark in shown.values()]
    values = [{**asdict(run), **{f"federated.{k}": v for k, v in asdict(run.federated).items()}} for run in runs]
    cells = {key: [f"{of[key]:g}" if isinstance(of[key], float) else str(of[key]) for of in values] for key in PROTOCOL}
    rows = [[words, *cells[key]] for key, words in PROTOCOL.items()]
    teachers = (run.mllm if run.align.teacher == "mllm" else "an ImageNet network" for run in runs)
    rows.append(["teacher of stage 3", *(name.removeprefix("llava-hf/") for name in teachers)])
    rows.append(["epochs of stage 3", "20, then 100", "100", *(str(run.align.epochs) for run in runs[2:])])
    rows.append(["stage 1", *(_stage_1(run.start) for run in runs)])
    return _table(["setting", *shown], rows)


def _stage_1(start: str) -> str:
    if not start:
        return "trained in the run"
    return "a program's texts" if start.startswith("results/real/") else "texts of tiny_llava"


def _reported() -> str:
    rows = [
        [_title(name), _words(method), f"{value:.2f}", FIGURES[what.removeprefix(f"{name}_")], of["source"]]
        for name in BENCHMARKS
        for of in reported().values()
        for what, figures in of.items()
        if what.removeprefix(f"{name}_") in FIGURES
        for method, value in figures.items()
    ]
    return _table(["benchmark", "method", "top-1 (%)", "of", "source"], rows) + "\n"


def _words(method: str) -> str:
    return (RUNS / "methods" / f"{method}.yaml").read_text(encoding="utf-8").splitlines()[0][2:].split(",")[0]


def _results(scale: str, name: str, rows: list[Row]) -> str:
    header = ["method", "all", "head", "tail", "seeds", "time", "run"]
    heading = f"#### {_title(name)}: `{scale}/{name}`\n\n"
    main = [row for row in rows if row.run.label in MAIN]
    controls = [row for row in rows if row.run.label not in MAIN]
    table = _table(header, [_filled(row) for row in main])
    behind = [_table(header, [_filled(row) for row in controls])] if controls else []
    more = "more: cross-entropy alone, other starts, other teachers"
    title = f"{len(controls)} {more}; and what made the runs" if controls else "What made the runs"
    lines = primary.folded(title, [*behind, _made_with(rows)])
    return heading + table + "\n" + "\n".join(lines) + "\n"


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
