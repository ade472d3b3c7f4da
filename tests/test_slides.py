"""Slides from the chapters: whole, quiet, offline, nothing lost, nothing cut, what is folded stays away."""

import pytest
from bs4 import BeautifulSoup
from make_slides import END, first_sentence, make_slides, slides_of
from pages import HTML, article, names
from visits import Visit

CHAPTERS = [name for name in names() if name.startswith("notebooks/")]


@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    return {deck.stem: deck for deck in make_slides(HTML, tmp_path_factory.mktemp("slides"))}


def section(html):
    return BeautifulSoup(f"<section><h2>Here</h2>{html}</section>", "html.parser").section


@pytest.mark.parametrize(
    ("paragraph", "short"),
    [
        ("One thing is said here. Another thing.", "One thing is said here."),
        ("<b>x</b> is what Shi et al. call it, i.e. a name. Then more.", "x is what Shi et al. call it, i.e. a name."),
        (
            "<strong>Read the plot.</strong> The tail falls to zero here. Why?",
            "Read the plot. The tail falls to zero here.",
        ),
        (
            "<strong>Read it</strong>, of one seed. The tail falls to zero.",
            "Read it, of one seed. The tail falls to zero.",
        ),
        ("No end in sight", "No end in sight"),
    ],
)
def test_the_first_sentence(paragraph, short):
    whole = section(f"<p>{paragraph}</p>").p
    assert first_sentence(whole).get_text() == short
    assert whole.decode_contents() == paragraph, "the notes keep the whole"
    assert not END.search("et al. and e.g. this")


def test_prose_goes_to_the_notes_and_long_sections_are_split():
    text = "It is so and so and so. The rest is for the speaker. "
    slides = slides_of(section(f"<p>{text}</p>" * 60))
    assert len(slides) > 2 and all("<h2>Here</h2>" in slide for slide in slides)
    assert "".join(slides).count("for the speaker") == 60
    assert all("for the speaker" not in BeautifulSoup(s, "html.parser").select_one(".fit").text for s in slides)


@pytest.mark.browser
def test_each_chapter_has_a_deck_with_all_its_pictures_and_tables(decks):
    assert [f"notebooks/{number}_" in name for number, name in zip(decks, CHAPTERS, strict=True)] == [True] * len(decks)
    for deck, name in zip(decks.values(), CHAPTERS, strict=True):
        made, page = BeautifulSoup(deck.read_text(encoding="utf-8"), "html.parser"), article(HTML, name)[0]
        for kind in ("img", "table", "div.math", ".exercise", ".solution", "details.option"):
            assert len(made.select(f".fit {kind}")) == len(page.select(kind)), kind
        assert {h.text for h in made.select(".fit > h2")} == {h.text for h in page.select("h2")}
        notes = " ".join(note.get_text() for note in made.select("aside.notes"))
        prose = [p.get_text() for p in page.select("section > p") if not p.find_parent(class_="admonition")]
        assert [text for text in prose if text not in notes] == []
        assert not made.select("details.hide.above-input")


@pytest.mark.browser
@pytest.mark.parametrize("number", ["01", "06"])
def test_a_deck_goes_on_by_key_and_asks_for_no_other_site(browser, decks, number):
    with Visit(browser, decks[number].as_uri()) as visit:
        assert visit.complaints == []
        assert [url for url in visit.requests if not url.startswith(("file:", "data:"))] == []
        visit.wait("document.querySelectorAll('mjx-container').length > 5")
        assert visit.ask("document.querySelectorAll('mjx-merror').length") == 0
        assert visit.ask("document.querySelectorAll('.math:not(:has(mjx-container))').length") == 0
        visit.page.keyboard.press("ArrowRight")
        assert visit.ask("deck.getState().indexh") == 1
        low = visit.ask("""(() => {
          const low = []
          for (let i = 0; i < deck.getTotalSlides(); i++) {
            deck.slide(i)
            const fit = deck.getCurrentSlide().querySelector('.fit'), zoom = +fit.style.zoom
            if (zoom < 0.45 || fit.getBoundingClientRect().bottom > innerHeight) low.push([i, zoom])
          }
          return low
        })()""")
        assert low == [], "slides that are too full"
