"""How hard the book is to read, how long its chapters are, and that the letters of their formulas are explained.

`python tests/test_readable.py` prints the first two.

The measure is the Flesch-Kincaid grade: the years of school that a text asks for, from the lengths of its sentences
and words. It cannot tell whether a text is clear. A paragraph of prose is one of a page, a list, a box or an answer
behind a click. Code, tables, headings, captions, other directives and lists of terms are not prose. A formula or a name
in code counts as one short word.
"""

import re
import statistics
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
import textstat
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.myst_role import myst_role_plugin

ROOT = Path(__file__).parent.parent
GENERATED = {
    "results.md": "`make results` writes it",
    "api.md": "it lists docstrings",
    "bibliography.md": "it lists references",
}
BOXES = ("{admonition", "{note", "{tip", "{warning", "{important")
SHORTEST = 10  # words of a paragraph that has a grade
MEDIAN, HARDEST = 9, 15  # the largest grades of a page: of its median paragraph, and of any
MOST, TARGET = 2500, (1500, 2500)  # words of a chapter

GREEK = {"alpha", "beta", "gamma", "delta", "Delta", "varepsilon", "eta", "theta", "kappa", "lambda", "Lambda", "mu",
         "xi", "nu", "pi", "rho", "sigma", "tau", "phi", "omega"}  # fmt: skip

PARSER = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin).use(myst_role_plugin)


def source(path: Path) -> str:
    """A page's markdown; of a notebook its markdown cells."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    text = re.sub(r"^:::.*$|^:\w+:.*$", "", path.read_text(encoding="utf-8"), flags=re.M)  # grids and cards hold prose
    return re.sub(r"<!-- (\w+): make \w+ writes.*?<!-- end of \1 -->", "", text, flags=re.S)


PAGES = {
    path.relative_to(ROOT).as_posix(): source(path)
    for path in sorted([*ROOT.glob("book/*.md"), *ROOT.glob("notebooks/*.ipynb")])
    if path.name not in GENERATED
}
CHAPTERS = [name for name in PAGES if re.match(r"notebooks/(0[1-9]|10)_", name)]


def paragraphs(text: str) -> list[str]:
    """The paragraphs of prose in a text, as plain words."""
    found, table = [], False
    for before, token in pairwise(PARSER.parse(text)):
        if token.type in ("table_open", "table_close"):
            table = token.type == "table_open"
        elif token.type == "inline" and before.type == "paragraph_open" and not table:
            found.append(plain(token.children))
        elif token.type == "fence" and token.info.split("}")[0] in BOXES:
            found += paragraphs(re.sub(r"^(:\w+:.*\n)+", "", token.content))
        elif token.type == "fence" and token.info == "{glossary}":
            meanings = re.sub(r"^\S.*$", "", token.content, flags=re.M)
            found += paragraphs(re.sub(r"^ +", "", meanings, flags=re.M))
    return [words for words in found if words and not words.startswith("Terms:")]


def plain(children: list) -> str:
    """The words of a paragraph: links without their targets, terms as they are shown, no citations."""
    shown = []
    for child in children:
        role = child.meta.get("name")
        if child.type == "text":
            shown.append(child.content)
        elif child.type == "softbreak":
            shown.append(" ")
        elif role == "term":
            shown.append(re.sub(r"\s*<.*>$", "", child.content))
        elif child.type in ("code_inline", "math_inline") or role not in (None, "cite"):
            shown.append("it")
    words = re.sub(r"(?<=\d)[.,](?=\d)", "", "".join(shown))  # 12,406 and 0.5 are one word, and no end of a sentence
    return re.sub(r"\bet al\.", "et al", " ".join(words.split()))


def formulas(text: str) -> list[str]:
    """All formulas of a text, in lines, boxes and captions as well."""
    found = []
    for token in PARSER.parse(text):
        found += [child.content for child in token.children or [] if child.type == "math_inline"]
        if token.type == "fence" and token.info.startswith("{"):
            inside = re.sub(r"^(:\w+:.*\n)+", "", token.content)
            found += [inside] if token.info == "{math}" else formulas(inside)
    return found


def letters(formula: str) -> set[str]:
    """Its Latin and Greek letters, without those of words such as `\\text{question}` and commands such as `\\log`."""
    rest = re.sub(r"\\(text|mathrm)\{[^}]*\}", " ", formula)
    greek = {name for name in re.findall(r"\\([a-zA-Z]+)", rest) if name in GREEK}
    return greek | set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", rest)))


def grades(text: str) -> dict[str, float]:
    """The grade of each paragraph that is long enough to have one."""
    long = [words for words in paragraphs(text) if len(words.split()) >= SHORTEST]
    return {words: textstat.flesch_kincaid_grade(words) for words in long}


def length(text: str) -> int:
    """Words of a chapter's prose without its questions, solutions and answers behind a click."""
    text = re.sub(r"^## Five questions$.*?(?=^## )", "", text, flags=re.M | re.S)
    text = re.sub(r"```\{solution-start\}.*?```\{solution-end\}|<details.*?</details>", "", text, flags=re.S)
    return sum(len(words.split()) for words in paragraphs(text))


def report() -> str:
    lines = [f"{'page':48s} paragraphs  median grade  hardest  words ({TARGET[0]:,} to {TARGET[1]:,} are meant)"]
    for name, text in PAGES.items():
        every = grades(text).values()
        words = f"{length(text):6d}" if name in CHAPTERS else ""
        figures = f"{len(every):10d}  {statistics.median(every):12.1f}  {max(every):7.1f}"
        lines.append(f"{name:48s} {figures}  {words}".rstrip())
    return "\n".join(lines)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read(name):
    every = grades(PAGES[name])
    print(name, *(f"{grade:5.1f} {words[:60]}" for words, grade in every.items()), sep="\n")
    assert statistics.median(every.values()) <= MEDIAN
    assert max(every.values()) <= HARDEST


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_is_not_long(name):
    assert length(PAGES[name]) <= MOST


@pytest.mark.parametrize("name", CHAPTERS)
def test_each_letter_of_a_formula_is_in_the_table_of_notation(name):
    """It stands there with a meaning; whether the chapter uses it with this one, a reader must say."""
    rows = re.findall(r"^\| (\$.*?) \|", PAGES["book/notation.md"], re.M)
    known = set().union(*(letters(formula) for row in rows for formula in formulas(row)))
    used = formulas(PAGES[name])
    assert len(used) > 2
    assert {formula: letters(formula) - known for formula in used if letters(formula) - known} == {}


def test_letters_of_a_formula():
    assert letters(r"z_c(x) = \log \pi_c + \text{const}(x), \mathcal{L}") == {"z", "c", "x", "pi", "L"}


def test_what_is_prose():
    text = """# A heading of many words that is not a paragraph of prose at all

The [server](../a/very/long/link.html) takes `weighted_mean` of what comes back, $w_k$, {cite}`mcmahan2017`.

| a table with | many words in its cells, more than ten of them, so that they would count |
|---|---|

```{admonition} Its title
:class: tip
- In a box there is prose, too: this is a list of one.
```

```python
code = "has many words of its own, which nobody reads as if they were prose"
```

```{figure} picture.svg
A caption is not a paragraph, since a directive other than a box is left out.
```
"""
    assert paragraphs(text) == [
        "The server takes it of what comes back, it, .",
        "In a box there is prose, too: this is a list of one.",
    ]


def test_hard_words_and_long_sentences_get_a_higher_grade():
    easy = "The server sends the model. The clients train it. Each sends its weights back."
    hard = (
        "Heterogeneous participants individually optimise parametrisations, whose aggregation necessitates a barrier."
    )
    (low,), (high,) = grades(easy).values(), grades(hard).values()
    assert low < 5 and high > 15


if __name__ == "__main__":
    print(report())
