"""Write what `book/for_teachers.md` takes from the chapters: needs, running times, questions with their answers.

    make quizzes

The rest of the page is written by hand; comments in it mark the two parts that stand here.
"""

import re
from pathlib import Path
from typing import NamedTuple

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "book" / "for_teachers.md"
CHAPTERS = [
    path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if not path.name.startswith("00_")
]  # the tour
HEADING = "## Five questions"
OPTION = re.compile(
    r'<details class="option"><summary>(?P<words>.+?)</summary><b>(?P<verdict>Right|Wrong)\.</b> (?P<why>.+?)</details>'
)


class Option(NamedTuple):
    """An answer to choose: its words, whether it is right, and the feedback."""

    words: str
    right: bool
    why: str


class Question(NamedTuple):
    """One question of a chapter and its options, in the order of the page."""

    words: str
    options: list[Option]


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def page(text: str) -> str:
    """The page with both marked parts written anew."""
    for name, lines in {"chapters": _chapters(), "questions": _questions()}.items():
        begin, end = f"<!-- {name}: make quizzes writes them -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{PAGE.name} must hold {begin!r} and {end!r} once each")
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n\n{lines}\n\n{end}{after}"
    return text


def prose(chapter: Path) -> list[str]:
    """The markdown cells of a chapter."""
    cells = nbformat.read(chapter, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "markdown"]


def questions(cells: list[str]) -> list[Question]:
    """The questions of a chapter's only cell with the heading; a line of another form is an error that shows it."""
    (quiz,) = [cell for cell in cells if cell.startswith(HEADING)]
    _, _, *blocks = quiz.split("\n\n")
    found = []
    for number, (asked, options) in enumerate(zip(blocks[::2], blocks[1::2], strict=True), 1):
        if not asked.startswith(f"**{number}.** "):
            raise ValueError(f"question {number} must begin with **{number}.**; got {asked!r}")
        found.append(Question(asked.partition(" ")[2], [_option(line) for line in options.splitlines()]))
    return found


def _option(line: str) -> Option:
    match = OPTION.fullmatch(line)
    if match is None:
        raise ValueError(f"an option must look like {OPTION.pattern}; got {line!r}")
    return Option(match["words"], match["verdict"] == "Right", match["why"])


def _title(chapter: Path) -> str:
    words = prose(chapter)[0].splitlines()[0].removeprefix("# ")
    return f"[{words}](../notebooks/{chapter.name})"


def _chapters() -> str:
    rows = ["| chapter | you need | time to run it all |", "|---|---|---|"]
    for chapter in CHAPTERS:
        (glance,) = [cell for cell in prose(chapter) if cell.startswith("## At a glance")]
        needs, time = (re.search(rf"^\| \*\*{what}\*\* \| (.*) \|$", glance, re.M)[1] for what in ("You need", "Time"))
        rows.append(f"| {_title(chapter)} | {_from_the_book(needs)} | {_from_the_book(time)} |")
    return "\n".join(rows)


def _from_the_book(text: str) -> str:
    """Links of a chapter, as they read from a page in `book/`."""
    return re.sub(r"\]\((\w+\.ipynb)", r"](../notebooks/\1", text).replace("](../book/", "](")


def _questions() -> str:
    parts = []
    for chapter in CHAPTERS:
        parts.append(f"### {_title(chapter)}")
        for number, (asked, options) in enumerate(questions(prose(chapter)), 1):
            letters = dict(zip("abcd", options, strict=False))
            parts.append(f"**{number}.** {asked}")
            parts.append("\n".join(f"- **{letter}** {option.words}" for letter, option in letters.items()))
            whys = [f"<b>{letter}: {'right' if of.right else 'wrong'}.</b> {of.why}" for letter, of in letters.items()]
            parts.append(f'<details class="answer"><summary>Answer</summary>{"<br>".join(whys)}</details>')
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
