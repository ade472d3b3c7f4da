"""Print the rendered book as one PDF, with bookmarks and page numbers, by the browser that is there.

python scripts/print_book.py [_build/book.pdf]
"""

import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pages
from bs4 import Tag
from playwright.sync_api import Browser
from pypdf import PdfWriter
from pypdf.generic import Destination, NameObject, TextStringObject

logging.getLogger("pypdf").setLevel(logging.ERROR)  # Chromium's count of objects is off by a few
FOOTER = """<div style="width:100%;font:8pt sans-serif;color:#444;text-align:center">
<span class="pageNumber"></span></div>"""


def one_document(html: Path, names: list[str]) -> str:
    """All articles in one HTML document that stands in the site's root; of the scripts only MathJax stays."""
    articles, links = [], {}
    for name in names:
        found, head = pages.article(html, name)
        found["id"] = name
        for details in found.select("details.answer, details.sd-dropdown"):
            details["open"] = ""
        for link in found.select("a[href]:not([href^='#'], [href^='https:'])"):
            del link["href"]
        articles.append(str(found))
        links |= {str(tag): None for tag in head.select('link[rel="stylesheet"], script') if needed(tag)}
        title = head.title.string.split("—")[-1].strip()
    start = f'<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf-8"><title>{title}</title>'
    return "\n".join([start, *links, '</head><body class="whole-book">', *articles, "</body></html>"])


def needed(tag: Tag) -> bool:
    return tag.name == "link" or "mathjax" in str(tag).lower()


def print_book(browser: Browser, html: Path, out: Path, names: list[str]) -> list[str]:
    """Write the PDF; return the addresses that the browser asked for."""
    asked: list[str] = []
    page = browser.new_page()
    page.set_default_timeout(300_000)
    page.on("request", lambda request: asked.append(request.url))
    with tempfile.NamedTemporaryFile("w", dir=html, suffix=".html", encoding="utf-8") as document:
        document.write(one_document(html, names))
        document.flush()
        page.goto(Path(document.name).as_uri())
        page.evaluate("window.MathJax && MathJax.startup.promise")
        out.parent.mkdir(parents=True, exist_ok=True)
        page.pdf(path=out, format="A4", outline=True, tagged=True, print_background=True, display_header_footer=True,
                 header_template="<span></span>", footer_template=FOOTER,
                 margin={"top": "18mm", "bottom": "20mm", "left": "18mm", "right": "18mm"})  # fmt: skip
    headings = page.locator("h1, h2, h3, h4, h5, h6").all_inner_texts()
    page.close()
    mend_bookmarks(out, headings)
    return asked


def mend_bookmarks(pdf: Path, headings: list[str]) -> None:
    """Give bookmarks the words of their headings: Chromium repeats lines of those that it moves to the next page."""

    def squeezed(text: str) -> str:
        return "".join(text.split())

    known = {squeezed(heading): " ".join(heading.split()) for heading in headings}
    writer = PdfWriter(clone_from=pdf)
    for mark in bookmarks(writer.outline):
        title = squeezed(mark.title)
        words = [h for h in known if title.endswith(h) and h.startswith(title.removesuffix(h))]
        mark.node[NameObject("/Title")] = TextStringObject(known[max(words, key=len)])
    writer.write(pdf)


def bookmarks(outline: list) -> Iterator[Destination]:
    for entry in outline:
        yield from bookmarks(entry) if isinstance(entry, list) else [entry]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else pages.ROOT / "_build" / "book.pdf"
    with pages.open_browser() as chromium:
        print_book(chromium, pages.HTML, target, pages.names())
    print(f"open {target.resolve()}")
