"""Figures that a reader turns in a page without a kernel: a cell computes all states, `assets/turn` shows one."""

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from mllmfl_lite.repro import ASSETS

_SCRIPT, _STYLE = ((ASSETS / "turn" / f"turn.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))


class Explorable:
    """A sentence and drawings that a reader turns by mouse, touch or keyboard.

    `knobs` are positions by name; up to four become buttons, more a slider. ``at(*positions)`` is called once for each
    combination; it returns a sentence, and what each drawing takes. `drawings` return HTML with the same elements for
    all states; what differs is an attribute, or the text of an element without others inside, and is escaped. `start`
    are the positions that are shown first, on paper and without scripts: by default the last ones.
    """

    def __init__(
        self,
        knobs: Mapping[str, Sequence],
        at: Callable[..., Sequence[Any]],
        drawings: Sequence[Callable[[Any], str]],
        caption: str = "",
        start: Sequence = (),
    ):
        states = list(product(*knobs.values()))
        self.says, *columns = zip(*(at(*state) for state in states), strict=True)
        self.start = states.index(tuple(start)) if start else len(states) - 1
        drawn = [map(draw, of) for draw, of in zip(drawings, columns, strict=True)]
        tokens = [re.split(r'([<>"])', "".join(parts)) for parts in zip(*drawn, strict=True)]
        if len(set(map(len, tokens))) != 1:
            raise ValueError("a drawing must have the same elements in each state; only numbers and texts may differ")
        differ = [k for k, column in enumerate(zip(*tokens, strict=True)) if len(set(column)) > 1]
        ends = zip([-1, *differ], [*differ, len(tokens[0])], strict=True)
        self.caption, self.picture = caption, "".join(tokens[self.start])
        self.data = {
            "knobs": [{"name": name, "positions": list(map(str, of))} for name, of in knobs.items()],
            "start": self.start,
            "says": self.says,
            "shared": ["".join(tokens[0][before + 1 : end]) for before, end in ends],
            "values": [[of[k] for k in differ] for of in tokens],
        }

    def __repr__(self) -> str:
        return self.says[self.start]

    def _repr_html_(self) -> str:
        data = json.dumps(self.data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
        return (
            f'<figure class="explorable"><style>\n{_STYLE}</style><output>{html.escape(self.says[self.start])}</output>'
            f'<div class="picture">{self.picture}</div><figcaption>{html.escape(self.caption)}</figcaption>'
            f'<script type="application/json">{data}</script><script>\n{_SCRIPT}</script></figure>'
        )


def bars(title: str, names: Sequence[str], colours: Sequence[str], top: float = 100) -> Callable[[Sequence], str]:
    """Draw a number for each name, as a bar and in figures; from `top` on a bar is full, and NaN is a dash."""

    def draw(values: Sequence) -> str:
        rows = (
            f'<div class="line bar"><span>{html.escape(name)}</span><svg aria-hidden="true"><rect height="100%" '
            f'fill="{colour}" width="{np.clip(np.nan_to_num(100 * value / top), 0, 100):.3g}%"/></svg>'
            f"<span>{'–' if np.isnan(value) else f'{value:,g}'}</span></div>"
            for name, colour, value in zip(names, colours, values, strict=True)
        )
        return f"<div><b>{html.escape(title)}</b>{''.join(rows)}</div>"

    return draw


def bubbles(names: Sequence[str], colours: Sequence[str], columns: int, top: float) -> Callable[[np.ndarray], str]:
    """Draw a row of bubbles for each name, at most so many; their areas are as the square roots of the numbers."""

    def draw(values: np.ndarray) -> str:  # (names, K)
        padded = np.pad(values, ((0, 0), (0, columns - values.shape[1])))
        x = np.minimum(100, 100 * (np.arange(columns) + 0.5) / values.shape[1])
        rows = (
            f'<div class="line"><span>{html.escape(name)}</span><svg height="24" role="img" aria-label="'
            f'{", ".join(map(str, row))}">{"".join(map(circle.format, x, 11 * (more / top) ** 0.25))}</svg></div>'
            for name, circle, row, more in zip(names, circles, values, padded, strict=True)
        )
        return f"<div>{''.join(rows)}</div>"

    circles = [f'<circle cy="12" fill="{colour}" cx="{{:.3g}}%" r="{{:.2g}}"/>' for colour in colours]
    return draw
