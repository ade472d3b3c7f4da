"""The PDF of the whole book: bookmarks, links inside it, mathematics, nothing folded, nothing cut at the edge."""

import re

import pytest
from pages import HTML, names
from print_book import bookmarks, one_document, print_book
from pypdf import PdfReader
from pypdf.generic import IndirectObject
from visits import Visit

pytestmark = pytest.mark.browser
PRINTED = ["book/intro", "notebooks/01_long_tailed_clients", "book/glossary"]
PAPER = 657  # pixels between the margins of A4


@pytest.fixture(scope="module")
def pdf(browser, tmp_path_factory):
    out = tmp_path_factory.mktemp("print") / "book.pdf"
    asked = print_book(browser, HTML, out, PRINTED)
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    return PdfReader(out)


def test_the_table_of_contents_gives_the_pages_in_order():
    every = names()
    assert every[0] == "book/intro" and len(set(every)) == len(every) > 15
    assert all((HTML / f"{name}.html").exists() for name in every)


def test_bookmarks_are_the_headings_and_lead_to_them(pdf):
    texts = ["".join(page.extract_text().split()) for page in pdf.pages]
    marks = list(bookmarks(pdf.outline))
    assert [entry.title for entry in pdf.outline if not isinstance(entry, list)] == [
        "A multimodal LLM on the server, small models on the clients", "1 · Deal long-tailed images to clients",
        "Glossary"]  # fmt: skip
    assert len(marks) > 15
    for mark in marks:
        assert "".join(mark.title.split()) in texts[pdf.get_destination_page_number(mark)], mark.title


def test_pages_have_numbers(pdf):
    for number, page in enumerate(pdf.pages, 1):
        assert re.search(rf"(^|\s){number}\s*$", page.extract_text()) or f"\n{number}\n" in page.extract_text(), number


def test_links_stay_inside_or_go_to_the_web(pdf):
    inside, addresses = 0, []
    for page in pdf.pages:
        for link in (note.get_object() for note in page.get("/Annots", [])):
            action = link.get("/A", {})
            action = action.get_object() if isinstance(action, IndirectObject) else action
            inside += "/Dest" in link or action.get("/S") == "/GoTo"
            addresses += [str(action["/URI"])] if "/URI" in action else []
    assert inside > 15
    assert [url for url in addresses if not url.startswith("https://")] == []


def test_mathematics_is_set_and_no_menu_is_printed(pdf):
    text = "\n".join(page.extract_text() for page in pdf.pages)
    assert "\\(" not in text and "\\frac" not in text
    assert "Solution" in text and "Contents" not in text and "Previous" not in text


def test_nothing_sticks_out_of_the_paper_and_folds_stay_away(browser):
    """The whole book at the paper's width; a folded cell is put in, in case no chapter has one."""
    document = HTML / "whole.print-test.html"
    fold = '<details class="hide above-input"><summary>Show code</summary><p id="folded">secret</p></details>'
    whole = one_document(HTML, names()).replace("</body>", f'<article class="bd-article">{fold}</article></body>')
    try:
        document.write_text(whole, encoding="utf-8")
        with Visit(browser, document.as_uri(), width=PAPER) as visit:
            visit.page.emulate_media(media="print")
            visit.wait("window.MathJax?.startup?.promise")
            visit.page.evaluate("MathJax.startup.promise")
            assert visit.ask("[...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))")
            assert not any(fold.is_visible() for fold in visit.page.locator("details.hide").all())
            wide = visit.ask(
                "[...document.querySelectorAll('.bd-article :is(table, pre, img, p, mjx-container)')]"
                f".filter(e => e.getBoundingClientRect().right > {PAPER} + 2).map(e => e.outerHTML.slice(0, 200))"
            )
            assert wide == []
    finally:
        document.unlink(missing_ok=True)
