"""Show tables and galleries in chapters, check parameters and the reader's guesses. All text is escaped."""

import base64
import html
import io
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

_MARKUP = set("\\`*_[]|$<>&\"'#~!")  # of HTML, Markdown or mathematics


def check(answer: object, is_right: Callable[[object], bool], hint: str) -> str:
    """Tell the reader whether an answer is right; a wrong one gets the hint, None an invitation."""
    if answer is None:
        return "Your turn: write your answer in place of None and run the cell again."
    return "Right!" if is_right(answer) else f"Not yet. {hint}"


def check_parameters(values: dict, **allowed: tuple | list | set) -> None:
    """Refuse a chapter's parameters in one sentence.

    A rule is a set of choices, or two bounds: a tuple for a number, a list for a list. Whole bounds ask for whole ones.
    """
    for name, rule in allowed.items():
        value, many = values[name], isinstance(rule, list)
        if isinstance(rule, set):
            fits, words = value in list(rule), "one of " + ", ".join(map(repr, sorted(rule)))
        else:
            (low, high), kinds = rule, (int,) if isinstance(rule[0], int) else (int, float)
            numbers = value if many and isinstance(value, list) else [value]
            fits = isinstance(value, list) == many and all(type(n) in kinds and low <= n <= high for n in numbers)
            number = f"{' whole' * (len(kinds) == 1)} number{'s' * many}"
            words = f"{'a list of' if many else 'a'}{number} from {low} to {high}"
        if not fits or value == []:
            raise ValueError(f"{name} must be {words}; got {value!r}")


def percent(mean: float | None, spread: float | None = None) -> str:
    """Write an accuracy in [0, 1] as per cent, with its spread if there is one; a dash for None."""
    shown = "–" if mean is None else f"{100 * mean:.1f}"
    return shown if spread is None or np.isnan(spread) else f"{shown}\u00a0±\u00a0{100 * spread:.1f}"


def _visible(text: object) -> str:
    """Line breaks stay, other control and format characters go."""
    kept = (c if unicodedata.category(c)[0] != "C" else "\n" if c == "\n" else "" for c in str(text))
    return "".join(kept).replace("\u2028", "\n").replace("\u2029", "\n")


def safe(text: str, limit: int = 400) -> str:
    """Escape text from a model or a user for HTML and Markdown; cut it at `limit` characters. Line breaks stay."""
    cut = f" … ({len(text):,} characters)" if len(text) > limit else ""
    escaped = "".join(f"&#{ord(c)};" if c in _MARKUP else c for c in _visible(text[:limit]))
    return escaped.replace("://", "&#58;//") + cut  # a bare address would become a link


class Table:
    """A small table of cells that are text already: Markdown in a notebook, aligned text elsewhere."""

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[str]]):
        if not all(header):
            raise ValueError(f"each column needs a name, which screen readers say; got {list(header)}")
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"each row needs {len(header)} cells, as the header has; {row} has {len(row)}")
        self.lines = [[" ".join(_visible(cell).split("\n")) for cell in line] for line in (header, *rows)]

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in self.lines)

    def _repr_markdown_(self) -> str:
        header, *rows = [[safe(cell, len(cell)) for cell in line] for line in self.lines]
        return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


class Gallery:
    """Images, uint8 (H, W, 3), with texts about them: HTML in a notebook, plain text elsewhere.

    `texts` are ``{"caption": "text", ...}`` for each image; `alts` say what it shows, below it and to screen readers.
    """

    def __init__(self, images: Sequence[np.ndarray], texts: Sequence[dict[str, str]], alts: Sequence[str]):
        if not len(images) == len(texts) == len(alts):
            raise ValueError(f"each image needs texts and an alt text; got {len(images)}, {len(texts)}, {len(alts)}")
        self.cards = list(zip(images, texts, alts, strict=True))

    def __repr__(self) -> str:
        return "\n".join(f"[{alt}] {texts}" for _, texts, alt in self.cards)

    def _repr_html_(self) -> str:
        return "".join(_card(*card) for card in self.cards)


def _card(image: np.ndarray, texts: dict[str, str], alt: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    lines = {safe(name): safe(text).replace("\n", "<br>") for name, text in texts.items()}
    paragraphs = (f'<p style="margin:0 0 .4em 0"><b>{name}</b><br>{line}</p>' for name, line in lines.items())
    return (
        '<div style="display:flex;gap:1em;align-items:flex-start;margin:0 0 1em 0">'
        '<figure style="flex:none;margin:0">'
        f'<img src="{source}" alt="{html.escape(_visible(alt))}" width="96" height="96" '
        'style="image-rendering:pixelated;border-radius:4px;display:block">'
        f'<figcaption style="width:96px;font-size:.85em;color:inherit">{safe(alt)}</figcaption></figure>'
        f"<div>{''.join(paragraphs)}</div></div>"
    )
