"""Plots of the chapters: groups and methods keep their colours, axes say their units."""

import sys
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mllmfl_lite.data.longtail import rank_thirds

# Okabe and Ito's palette, safe for colour-blind readers; cold: many images, hot: few
GROUP_COLOURS = {"head": "#0072B2", "middle": "#56B4E9", "tail": "#D55E00"}
METHOD_STYLES = {  # label, colour, marker
    "fedavg": ("FedAvg", "#444444", "o"),
    "fedprox": ("FedProx", "#009E73", "s"),
    "fedavgm": ("FedAvgM", "#CC79A7", "^"),
    "creff": ("CReFF", "#E69F00", "D"),
    "clip2fl": ("CLIP2FL", "#8C6D31", "v"),
    "stage1": ("stages 1 + 2", "#5b4b8a", "P"),
    "stage3": ("stages 2 + 3", "#56B4E9", "X"),
    "mllm_llava_fl": ("MLLM-LLaVA-FL", "#0072B2", "*"),
}


def use_style() -> None:
    """Set matplotlib's defaults for the book; in a notebook, show figures whatever MPLBACKEND says."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell and plt.get_backend().lower() == "agg":
        shell.run_line_magic("matplotlib", "inline")
    plt.rc("figure", figsize=(7.2, 3.4), dpi=110)
    plt.rc("figure.constrained_layout", use=True)
    plt.rc("savefig", facecolor="white")
    plt.rc("font", size=10)
    plt.rc("axes", titlesize=11, titleweight="bold", titlelocation="left", grid=True, axisbelow=True)
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("grid", color="#dddddd")
    plt.rc("legend", frameon=False)


def colours_by_group(counts: np.ndarray) -> list[str]:
    """The colour of each class by its rank in `counts` (C,): head, middle or tail third."""
    group_of = {c: group for group, classes in rank_thirds(counts).items() for c in classes}
    return [GROUP_COLOURS[group_of[c]] for c in range(len(counts))]


def image_rows(rows: dict[str, np.ndarray], title: str = "") -> Figure:
    """Draw a row of images for each name: uint8 arrays (n, H, W, 3) of one n."""
    columns = len(next(iter(rows.values())))
    fig, axes = plt.subplots(len(rows), columns, figsize=(7.2, 7.2 * len(rows) / columns * 0.95), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(line, images, strict=True):
            ax.imshow(image, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return fig


def band(ax: Axes, histories: Sequence[Sequence[dict]], label: str, colour: str, marker: str) -> None:
    """Draw mean and range of test accuracy, over the rounds that the histories of all seeds tested."""
    tested = [{r["round"]: 100 * r["metrics"]["top1"] for r in history if r["metrics"]} for history in histories]
    rounds = sorted(set.intersection(*map(set, tested)))
    top1 = np.array([[of[r] for r in rounds] for of in tested])
    ax.plot(rounds, top1.mean(0), color=colour, marker=marker, markersize=5, label=label)
    ax.fill_between(rounds, top1.min(0), top1.max(0), color=colour, alpha=0.15, linewidth=0)


def learning_curves(histories: dict[str, list[list[dict]]], title: str) -> Axes:
    """Draw a `band` for each method: the histories of its seeds. An unknown method is black."""
    ax = plt.subplots()[1]
    for method, of in histories.items():
        band(ax, of, *METHOD_STYLES.get(method, (method, "#000000", ".")))
    ax.set(title=title, xlabel="communication round", ylabel="test accuracy (%)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


def group_accuracy_bars(summaries: dict[str, list[dict]], title: str) -> Axes:
    """Draw accuracy by group: for each condition the summaries of its seeds; whiskers: ± one deviation."""
    ax = plt.subplots()[1]
    positions = np.arange(len(summaries))
    for i, (group, colour) in enumerate(GROUP_COLOURS.items()):
        values = [100 * np.array([s["groups"][group] for s in seeds], float) for seeds in summaries.values()]
        spread = [v.std(ddof=1) if len(v) > 1 else 0 for v in values] if max(map(len, values)) > 1 else None
        where = positions + 0.27 * (i - 1)
        bars = ax.bar(where, [v.mean() for v in values], 0.25, yerr=spread, color=colour, label=group, capsize=2)
        ax.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    ax.set_xticks(positions, list(summaries))
    ax.margins(y=0.1)
    ax.grid(axis="x", visible=False)
    ax.set(title=title, ylabel="test accuracy (%)")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax
