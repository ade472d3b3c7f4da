"""What chapters need beside the method: questions that answer back, and small tables."""

from __future__ import annotations

from collections.abc import Callable


def check(answer: object, is_right: Callable[[object], bool], hint: str) -> str:
    """Tell the reader whether an answer is right. ``None`` means that there is none yet; a wrong one gets the hint."""
    if answer is None:
        return "Your turn: write your answer in place of None and run the cell again."
    return "Right!" if is_right(answer) else f"Not yet. {hint}"


class Table:
    """A small table that shows as HTML in a notebook and as aligned text elsewhere.

    Args:
        header: column names.
        rows: cells, already formatted as text.
    """

    def __init__(self, header: list[str], rows: list[list[str]]):
        wrong = [row for row in rows if len(row) != len(header)]
        if wrong:
            raise ValueError(f"each row needs {len(header)} cells, as the header has; {wrong[0]} has {len(wrong[0])}")
        self.header, self.rows = header, rows

    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    def _repr_markdown_(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def percent(mean: float | None, spread: float | None = None) -> str:
    """An accuracy in [0, 1] as per cent, unbreakable, with its spread where there is one; a dash for None."""
    if mean is None:
        return "–"
    return f"{100 * mean:.1f}" if spread is None else f"{100 * mean:.1f}\u00a0±\u00a0{100 * spread:.1f}"
