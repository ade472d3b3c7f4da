"""Write `book/results.md` from the results files, the runs' files and the figures that others report.

    make results

Nothing is typed by hand: a cell is what files say, or empty, and then the page says what would fill it.
"""

from pathlib import Path

import numpy as np
from mllmfl_lite.runs.experiment import finished
from mllmfl_lite.runs.launch import Run, find_files, own_seconds, read_runs
from mllmfl_lite.runs.memory import GIB
from mllmfl_lite.runs.needs import Need, needs
from write_runs import BENCHMARKS, METHODS, methods_of

from mllmfl_lite.runs.plan import MACHINES, in_words, make_plan
from mllmfl_lite.runs.results import mean_and_spread, reported
from mllmfl_lite.teaching.tables import percent

PAGE = Path(__file__).resolve().parent.parent / "book" / "results.md"
SEEDS = range(10)
SWEPT = range(3)
NAMES = {"cifar10_mini": "CIFAR-10-LT, the bundled pictures", "cifar10": "CIFAR-10-LT", "cifar100": "CIFAR-100-LT"}
SCALES = {
    "paper": "Paper scale",
    "medium": "Medium scale",
    "laptop": "Laptop scale",
}
FIGURES = {"_top1": "top-1, all classes", "_few": "top-1, Few classes"}
PROTOCOL = {
    "dataset": "data", "num_clients": "clients", "clients_per_round": "a round", "rounds": "rounds",
    "local_epochs": "local epochs", "model": "model", "width": "width", "precision": "precision", "mllm": "MLLM",
    "clip": "CLIP", "pool": "open pictures", "pool_images": "how many (0: all)",
}  # fmt: skip

HEAD = """# Results

Every figure that a run from a file has produced, with that file. This page is written by `make results` from the
files in `results/`; a test compares it with them.

- **Ours and others' stand apart.** What the paper and others report is listed before our tables, never in them:
  models, teachers, web pictures and budgets differ.
- **A figure** is top-1 on the whole test set in percent: the mean over a run's last ten tested rounds (laptop:
  five), or that of the aligned model; then mean ± standard deviation over seeds. *head* and *tail* are the thirds
  of the classes with the most and the fewest pictures.
- **Time** is what the rounds of one seed took, in the mean, without stages 1 and 3: here on one core of two that were
  both at work, and with other work beside them at times. Figures with stage 3 are of one aligned model.
- **What they say** is read in [chapter 6](../notebooks/06_three_stages_together.ipynb), beside controls and paired
  tests. With stand-ins that know these classes, they do not test the paper's claim.
- **Below each table** stand device, version and the commits that its runs were made from.
- **Empty cells stay empty** and say what would fill them: what to fetch, and what one run takes on one H100 from
  nothing, by the [cost model](api.md). That is reckoned, not measured.
- **run** is a file in the folder that is named above its table: `make paper SCALE=medium RUN=cifar10_lt_if100/fedavg`
  runs the first of the medium ones.

"""
NOTE = """
The paper's protocol as far as it is known: 20 clients, 8 a round, 200 rounds of 10 local epochs, batch 32, step
size 0.1, ResNet-8 at width 64 (ResNet-50 for ImageNet-LT). How its teachers are asked, which web pictures are used
and how many, and the rounds on ImageNet-LT are our reading. At laptop and medium scale with CIFAR-10 the MLLM and
CLIP are stand-ins that learned these classes from other CIFAR pictures.
"""


def main() -> None:
    PAGE.write_text(page())


def page() -> str:
    """The whole page as Markdown."""
    parts = [
        HEAD,
        "## What the scales differ in\n\n",
        _protocols(),
        "\n## What there is to fetch\n\n",
        _fetched(),
        "\n",
    ]
    for name in dict.fromkeys(benchmark.split("/")[1] for benchmark in BENCHMARKS):
        parts.append(f"## {_title(name)}\n\n{_reported(name)}")
        parts += [_table(f"{scale}/{name}") for scale in SCALES if f"{scale}/{name}" in BENCHMARKS]
    return "".join(parts).rstrip() + "\n"


def _title(name: str) -> str:
    data, _, factor = name.partition("_lt")
    return f"{NAMES[data]}, imbalance {factor.removeprefix('_if')}" if factor else "ImageNet-LT"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _head(*cells: str) -> str:
    return _row(*cells) + _row(*["---"] * len(cells))


def _protocols() -> str:
    shown = {"paper": "paper/cifar10_lt_if100", "medium": "medium/cifar10_lt_if100", "medium, CIFAR-100-LT":
             "medium/cifar100_lt_if100", "laptop": "laptop/cifar10_mini_lt_if100"}  # fmt: skip
    runs = {scale: _runs(f"{benchmark}/mllm_llava_fl", [0])[0].values for scale, benchmark in shown.items()}
    text = _head("setting", *runs)
    for key, words in PROTOCOL.items():
        text += _row(words, *(str(values[key]) for values in runs.values()))
    stage1 = ["anew, in the run" if values["pretrain"] else "the book's own weights" for values in runs.values()]
    text += _row("stage 1", *stage1)
    return text + NOTE


def _reported(name: str) -> str:
    lines = []
    for of in reported().values():
        for what, figures in of.items():
            if what.startswith(f"{name}_"):
                listed = ", ".join(
                    f"{METHODS[method][0].split(',')[0]} {value:.2f}" for method, value in figures.items()
                )
                lines.append(f"- {FIGURES[what.removeprefix(name)]}: {listed} ({of['source']})\n")
    return "Reported by others:\n\n" + "".join(lines) + "\n" if lines else ""


def _runs(name: str, seeds) -> list[Run]:
    return read_runs(find_files([name]), list(seeds))


def _table(benchmark: str) -> str:
    done, empty = [], []
    for method, (words, _) in methods_of(benchmark).items():
        runs = _runs(f"{benchmark}/{method}", SEEDS)
        found = [finished(run.result, run.pipeline.started) for run in runs if run.result.exists()]
        (done if found else empty).append((words, runs[0], found))
    text = f"### {SCALES[benchmark.split('/')[0]]}\n\nRuns in `notebooks/runs/{benchmark}`:\n\n"
    if done:
        text += _head("method", "all", "head", "tail", "seeds", "time", "run")
        text += "".join(_filled(*row) for row in done) + "\n" + _made_with(done)
    if empty:
        inner = _head("method", "to fetch", "time on one H100", "GPU memory", "run")
        inner += "".join(_missing(words, run) for words, run, _ in empty) + "\n" + _sweep(benchmark, empty)
        text += f"```{{dropdown}} Not run yet: {len(empty)} of {len(done) + len(empty)}\n{inner}```\n\n"
    return text


def _filled(words: str, run: Run, found: list[dict]) -> str:
    summaries = [result["summary"] for result in found]
    figures = [[s["top1"] for s in summaries], *([s["groups"][g] for s in summaries] for g in ("head", "tail"))]
    spent = np.mean([sum(record["seconds"] for record in result["history"]) for result in found])
    return _row(
        words,
        *(percent(*mean_and_spread(values)) for values in figures),
        str(len(found)),
        "" if run.values["method"] == "server_only" else in_words(spent).replace(" ", "\u00a0"),
        f"`{run.values['label']}`",
    )


def _made_with(done: list[tuple]) -> str:
    """Device, version and commit, and which runs they made."""
    by: dict[str, list[str]] = {}
    for _, run, found in done:
        for made in dict.fromkeys(_device(result["provenance"]) for result in found):
            by.setdefault(made, []).append(f"`{run.values['label']}`")
    return "".join(f"- {made}: {', '.join(labels)}\n" for made, labels in sorted(by.items())) + "\n"


def _device(made: dict) -> str:
    changed = "+" * made["revision"].endswith("+")  # files had changed since that commit
    return f"{made['device']}, torch {made['packages']['torch']}, commit `{made['revision'][:7]}{changed}`"


def _missing(words: str, run: Run) -> str:
    plan = make_plan(run.pipeline, MACHINES["h100"])
    fetch = ", ".join(_short(need) for need in needs(run.pipeline)) or "nothing"
    return _row(words, fetch, in_words(3600 * plan.hours), f"{plan.memory / GIB:.1f} GiB", f"`{run.values['label']}`")


def _sweep(benchmark: str, empty: list[tuple]) -> str:
    """What all that is missing takes, three seeds each, with shared work done once."""
    names, machine = {run.name for _, run, _ in empty}, MACHINES["h100"]
    todo = [run for run in _runs(benchmark, SWEPT) if run.name in names]
    spent = own_seconds(todo, [make_plan(run.pipeline, machine) for run in todo], machine)
    total = in_words(sum(map(sum, spent.values())))
    return f"All of them with {len(SWEPT)} seeds in one sweep, what they share done once: {total}.\n"


def _short(need: Need) -> str:
    return need.what.split(",")[0]


def _fetched() -> str:
    every = {need for name in BENCHMARKS for run in _runs(name, [0]) for need in needs(run.pipeline)}
    rows = sorted((_short(need), f"{need.gigabytes:g}", need.licence) for need in every)
    return _head("what", "GB", "terms") + "".join(_row(*row) for row in rows)


if __name__ == "__main__":
    main()
