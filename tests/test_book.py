"""The rendered book in a real headless browser: it must be whole, quiet, readable and at home on a phone."""

from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urlparse

import pytest
from pages import HTML
from visits import Visit

PAGES = sorted(str(p.relative_to(HTML)) for folder in ("book", "notebooks") for p in (HTML / folder).glob("*.html"))

pytestmark = pytest.mark.browser


def test_the_pages_are_there():
    """Fails where the book was not built; the tests below are one each page."""
    assert {"book/intro.html", "notebooks/01_long_tailed_clients.html"} <= set(PAGES)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_a_page(browser, site, name, width, scheme):
    with Visit(browser, site + name, width, scheme) as visit:
        assert visit.complaints == []
        assert [url for url in visit.requests if not url.startswith((site, "data:"))] == []
        visit.wait(f"document.documentElement.dataset.theme === '{scheme}'")
        visit.wait("[...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))")
        assert visit.ask("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        pictures = visit.ask("[...document.querySelectorAll('.bd-article img')].map(i => [i.naturalWidth, i.alt])")
        assert all(size > 0 and len(alt) > 20 for size, alt in pictures), pictures
        assert visit.ask("document.querySelectorAll('mjx-merror').length") == 0
        small = visit.ask(
            "[...document.querySelectorAll('.bd-article p, .bd-article li, .bd-article td')]"
            ".filter(e => e.innerText.trim() && parseFloat(getComputedStyle(e).fontSize) < 12).length"
        )
        assert small == 0, "text under 12 px"


def test_chapters_have_equations_and_pictures(browser, site):
    own = ("notebooks/00_", "notebooks/a2_", "notebooks/a3_")  # the tour, the tables and the cases have few
    for name in (page for page in PAGES if page.startswith("notebooks/") and not page.startswith(own)):
        with Visit(browser, site + name) as visit:
            visit.wait("document.querySelectorAll('mjx-container').length > 5")
            assert visit.ask("document.querySelectorAll('.bd-article img').length") >= 3


def test_text_can_be_read_in_both_themes(browser, site):
    """WCAG contrast of body text, links and captions against their background: at least 4.5."""
    for scheme in ("light", "dark"):
        with Visit(browser, site + "book/intro.html", scheme=scheme) as visit:
            visit.wait(f"document.documentElement.dataset.theme === '{scheme}'")
            for selector in (".bd-article p", ".bd-article p a", "figcaption", ".bd-article h1"):
                colours = visit.page.evaluate(CONTRAST_SCRIPT, selector)
                assert contrast(*colours) >= 4.5, (scheme, selector, colours)


CONTRAST_SCRIPT = """selector => {
  const element = document.querySelector(selector);
  let behind = element, colour;
  do { colour = getComputedStyle(behind).backgroundColor; behind = behind.parentElement }
  while (behind && colour === 'rgba(0, 0, 0, 0)');
  const numbers = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  return [numbers(getComputedStyle(element).color), numbers(colour)];
}"""


def contrast(front, back):
    def luminance(colour):
        parts = [c / 255 / 12.92 if c <= 10.3 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(front), luminance(back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_it_opens_from_the_file_system(browser):
    with Visit(browser, (HTML / "index.html").as_uri()) as visit:
        visit.page.wait_for_url("**/book/intro.html")
        visit.page.wait_for_load_state("networkidle")
        assert "multimodal LLM" in visit.page.title() or "multimodal LLM" in visit.ask("document.body.innerText")
        assert [url for url in visit.requests if not url.startswith(("file:", "data:"))] == []
        assert visit.complaints == []


def test_a_solution_opens(browser, site):
    with Visit(browser, site + "notebooks/01_long_tailed_clients.html") as visit:
        solution = visit.page.locator(".solution.dropdown").first
        code = solution.locator(".cell_input").first
        assert not code.is_visible()
        solution.locator(".toggle-button, summary, button").first.click()
        code.wait_for(state="visible", timeout=3000)


def test_an_option_shows_its_feedback_by_mouse_and_by_keyboard(browser, site):
    with Visit(browser, site + "notebooks/01_long_tailed_clients.html") as visit:
        options = visit.page.locator("#five-questions details.option")
        for number in (0, 1):
            feedback, summary = options.nth(number).locator("b").first, options.nth(number).locator("summary")
            assert not feedback.is_visible()
            if number == 0:
                summary.click()
            else:
                summary.focus()
                visit.page.keyboard.press("Enter")
            feedback.wait_for(state="visible", timeout=3000)
            assert feedback.inner_text() in ("Right.", "Wrong.")


def turned(visit):
    """What the tour's bars show: the label, and the numbers beside the bars."""
    return visit.ask("[document.querySelector('figure output').innerText, ...[...document.querySelectorAll("
                     "'figure .bar :last-child')].map(e => e.textContent)]")  # fmt: skip


@pytest.mark.parametrize("width", [390, 1280])
def test_the_tours_bars_are_turned_by_keyboard_touch_and_mouse(browser, width):
    """From the file system, as a reader without a server has it."""
    page = HTML / "notebooks" / "00_ten_minute_tour.html"
    with Visit(browser, page.as_uri(), width) as visit:
        assert visit.complaints == []
        slider, last = visit.page.locator("figure input"), turned(visit)
        slider.focus()
        visit.page.keyboard.press("ArrowLeft")
        before = turned(visit)
        assert before[0] != last[0] and before[0] == slider.get_attribute("aria-valuetext")
        visit.page.keyboard.press("End")
        assert turned(visit) == last
        box = slider.bounding_box()
        visit.page.mouse.click(box["x"] + 3, box["y"] + box["height"] / 2)
        first = turned(visit)
        assert first != last and slider.input_value() == "0" and "round 0 " in first[0]
        visit.page.locator("figure button").click()
        visit.wait("document.querySelector('figure input').value > 1")
        assert box["height"] >= 40, "a finger finds it"


def test_the_tours_bars_stand_there_without_scripts_and_on_paper(browser, site):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site + "notebooks/00_ten_minute_tour.html")
    assert not page.locator("figure .turn").is_visible() and page.locator("figure .bar").count() == 20
    assert "after round 20" in page.locator("figure output").inner_text()
    context.close()
    with Visit(browser, site + "notebooks/00_ten_minute_tour.html") as visit:
        assert visit.page.locator("figure .turn").is_visible()
        visit.page.emulate_media(media="print")
        assert not visit.page.locator("figure .turn").is_visible()


def test_search_finds_a_term(browser, site):
    with Visit(browser, site + "search.html?q=dirichlet") as visit:
        visit.page.wait_for_selector("#search-results li", timeout=10_000)
        assert visit.complaints == []


# ------------------------------------------------------------------------------------------------ links, no browser


class Links(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}


def test_every_link_inside_the_book_leads_somewhere():
    pages = {page: Links(HTML / page) for page in PAGES}
    for page, content in pages.items():
        for link in content.links:
            address, anchor = urldefrag(link)
            if urlparse(address).scheme or link == "#":
                continue
            target = (HTML / page).parent / unquote(address) if address else HTML / page
            assert target.resolve().is_file(), f"{page} links to {link}"
            name = str(target.resolve().relative_to(HTML))
            if anchor and name in pages:
                assert unquote(anchor) in pages[name].anchors, f"{page} links to {link}"
