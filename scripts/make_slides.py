"""Make slides from the rendered chapters: first sentences, equations, open code, outputs; the prose goes to the notes.

python scripts/make_slides.py [_build/slides]
"""

import base64
import copy
import mimetypes
import re
import shutil
import sys
from itertools import chain
from pathlib import Path
from string import Template

import pages
import sphinx_revealjs
from bs4 import BeautifulSoup, NavigableString, Tag

REVEAL = Path(sphinx_revealjs.__file__).parent / "_static" / "revealjs"
DECK = Template((pages.ROOT / "scripts" / "slides" / "deck.html").read_text(encoding="utf-8"))
FULL = 120  # weight of a full slide, about in words
END = re.compile(r"(?<!\bal)(?<!\bvs)(?<!e\.g)(?<!i\.e)[.?!:](?=\s|$)")


def make_deck(html: Path, name: str) -> str:
    """One chapter as a page of slides that loads nothing but what lies in `_static` beside it."""
    article, _ = pages.article(html, name)
    for folded in article.select("details.hide.above-input, .cell.tag_remove-input .cell_input"):
        folded.decompose()
    for inner in article.select(".admonition section"):
        inner.name = "div"
    for link in article.select("a:not([href^='https:'])"):
        link.unwrap()
    for image in article.select("img:not([src^='data:'])"):
        image["src"] = as_data(html / image["src"])
    slides = chain.from_iterable(map(slides_of, article.select("section")))
    return DECK.substitute(title=article.h1.get_text(), slides="\n".join(slides))


def as_data(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def slides_of(section: Tag) -> list[str]:
    """The slides of one section, less those of the sections inside it; each repeats the heading."""
    heading, *blocks = [block for block in section.find_all(recursive=False) if block.name != "section"]
    slides: list[str] = []
    shown, notes, weight = [], [], 0
    for block in pieces(blocks):
        more = weigh(block)
        if shown and (weight + more > FULL or starts(block)):
            slides.append(slide(heading, shown, notes))
            shown, notes, weight = [], [], 0
        if block.name == "p":
            notes.append(str(block))
            block = first_sentence(block)
        shown.append(str(block))
        weight += more
    return [*slides, slide(heading, shown, notes)] if shown else slides


def slide(heading: Tag, shown: list[str], notes: list[str]) -> str:
    aside = f'<aside class="notes">{"".join(notes)}</aside>' if notes else ""
    return f'<section><div class="fit">{heading}{"".join(shown)}</div>{aside}</section>'


def pieces(blocks: list[Tag]) -> list[Tag]:
    """Blocks; of a cell, its code and its outputs one by one."""
    found: list[Tag] = []
    for block in blocks:
        if "cell" in block.get("class", []):
            found += block.select(":scope > .cell_input")
            found += block.select(":scope > .cell_output > *, :scope > details > .cell_output > *")
        else:
            found.append(block)
    return found


def starts(block: Tag) -> bool:
    """Whether a block opens a slide of its own: an exercise, a solution, a numbered question."""
    classes = set(block.get("class", []))
    numbered = block.name == "p" and re.match(r"\d+\.$", block.strong.get_text() if block.strong else "")
    return bool(classes & {"exercise", "solution"} or numbered)


def weigh(block: Tag) -> int:
    classes = set(block.get("class", []))
    if block.name == "details":
        return 12
    if block.name in ("img", "figure") or block.find("img"):
        return 60
    if "math" in classes:
        return 25
    if block.find("pre"):
        return 4 * (block.get_text().strip().count("\n") + 3)
    if block.find("tr"):
        return 8 * len(block.find_all("tr"))
    return len((first_sentence(block) if block.name == "p" else block).get_text().split())


def first_sentence(paragraph: Tag) -> Tag:
    """A copy that ends with the first sentence; a label, as "Read the plot, of one seed.", does not count as one."""
    short, said = copy.copy(paragraph), 0
    for child in list(short.children):
        text = child.get_text()
        ends = [end.end() for end in END.finditer(text) if said + len(text[: end.end()].split()) > 4]
        if isinstance(child, NavigableString) and ends:
            for later in list(child.next_siblings):
                later.extract()
            child.replace_with(text[: ends[0]])
            break
        said += 0 if isinstance(child, Tag) and child.name in ("b", "strong") else len(text.split())
    return short


def copy_static(html: Path, out: Path) -> None:
    """What all decks share: reveal.js with its speaker's view, MathJax, the colours of code, the decks' own style."""
    static = out / "_static"
    static.mkdir(parents=True, exist_ok=True)
    for file in (REVEAL / "dist/reveal.js", REVEAL / "dist/reveal.css", REVEAL / "plugin/notes/notes.js",
                 html / "_static/pygments.css", pages.ROOT / "scripts/slides/slides.css"):  # fmt: skip
        shutil.copy(file, static)
    for part in ("tex-chtml.js", "output/chtml/fonts/woff-v2"):
        source, copied = html / "_static" / "mathjax" / part, static / "mathjax" / part
        copied.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree(source, copied, dirs_exist_ok=True) if source.is_dir() else shutil.copy(source, copied))


def make_slides(html: Path, out: Path) -> list[Path]:
    copy_static(html, out)
    decks, entries = [], []
    for name in (name for name in pages.names() if name.startswith("notebooks/")):
        deck = out / f"{name.removeprefix('notebooks/').split('_')[0]}.html"
        deck.write_text(make_deck(html, name), encoding="utf-8")
        title = BeautifulSoup(deck.read_text(encoding="utf-8"), "html.parser").title.string
        entries.append(f'<p><a href="{deck.name}">{title}</a></p>')
        decks.append(deck)
    index = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Slides</title><h1>Slides</h1>'
    (out / "index.html").write_text(index + "\n".join(entries), encoding="utf-8")
    return decks


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else pages.ROOT / "_build" / "slides"
    print(f"{len(make_slides(pages.HTML, target))} decks: open {(target / 'index.html').resolve()}")
