"""Small tables, galleries and questions for chapters."""

from __future__ import annotations

import base64
import html
import io
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image


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
        header, *rows = [[_cell(cell) for cell in line] for line in (self.header, *self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def _cell(text: str) -> str:
    """A cell of a Markdown table: no line breaks, and nothing that could become a tag or a link."""
    flat = " ".join(str(text).split(" ")).replace("\n", " ").replace("\r", " ")
    escaped = "".join(f"&#{ord(c)};" if c in "<>[]`\\" else c for c in flat if c == "\u00a0" or c.isprintable())
    return escaped.replace("|", "\\|")


def percent(mean: float | None, spread: float | None = None) -> str:
    """An accuracy in [0, 1] as per cent, unbreakable, with its spread where there is one; a dash for None."""
    if mean is None:
        return "–"
    return f"{100 * mean:.1f}" if spread is None else f"{100 * mean:.1f}\u00a0±\u00a0{100 * spread:.1f}"


def safe(text: str, limit: int = 400) -> str:
    """Somebody else's text, fit for HTML and Markdown: control characters gone, the rest escaped, cut at `limit`.

    What a model or a web page wrote must not become part of the page; line breaks stay as they are.
    """
    cut = f" … ({len(text):,} characters)" if len(text) > limit else ""
    shown = "".join(c for c in text[:limit] if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))
    return "".join(f"&#{ord(c)};" if c in "\\`*_[]|$<>&\"'#~!" else c for c in shown) + cut


class Gallery:
    """Pictures with what was said of them: HTML in a notebook, in a book, and plain text elsewhere.

    Args:
        images: uint8 arrays (H, W, 3).
        texts: for each picture a caption and its text, or several: ``{"caption": "text", ...}``.
        alts: for each picture what it really shows: written below it, and read to those who do not see it.
        size: pixels on the screen, a side.
    """

    def __init__(
        self, images: Sequence[np.ndarray], texts: Sequence[dict[str, str]], alts: Sequence[str], size: int = 96
    ):
        if not len(images) == len(texts) == len(alts):
            raise ValueError(
                f"one dictionary of texts and one alt text a picture: {len(images)} pictures, {len(texts)}, {len(alts)}"
            )
        self.images, self.texts, self.alts, self.size = images, texts, alts, size

    def __repr__(self) -> str:
        return "\n".join(f"[{alt}] {texts}" for alt, texts in zip(self.alts, self.texts, strict=True))

    def _repr_html_(self) -> str:
        return "".join(map(self._card, self.images, self.texts, self.alts))

    def _card(self, image: np.ndarray, texts: dict[str, str], alt: str) -> str:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        paragraphs = "".join(
            f'<p style="margin:0 0 .4em 0"><b>{safe(name)}</b><br>{safe(text).replace(chr(10), "<br>")}</p>'
            for name, text in texts.items()
        )
        return (
            '<div style="display:flex;gap:1em;align-items:flex-start;margin:0 0 1em 0">'
            '<figure style="flex:none;margin:0">'
            f'<img src="{source}" alt="{html.escape(alt)}" width="{self.size}" height="{self.size}" '
            'style="image-rendering:pixelated;border-radius:4px;display:block">'
            f'<figcaption style="width:{self.size}px;font-size:.85em;color:inherit">{safe(alt)}</figcaption></figure>'
            f"<div>{paragraphs}</div></div>"
        )
