"""The rendered book in a real headless browser: it must be whole, quiet, readable and at home on a phone."""

import json
import re
from html.parser import HTMLParser
from itertools import product
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
            visit.wait("document.querySelectorAll('mjx-container').length > 4")
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


# ------------------------------------------------------------------------------------------- what a reader turns

TURNED = [name for name in PAGES if '<figure class="explorable">' in (HTML / name).read_text(encoding="utf-8")]


def seen(figure):
    """What an explorable shows: its sentence, and the drawing."""
    return figure.locator("output").inner_text(), figure.locator(".picture").inner_html()


def turn(visit, figure, k, knob, hand):
    """Turn one knob to its second position, then to its first; say what was seen at each."""
    buttons, shown = len(knob["positions"]) <= 4, []
    group = figure.locator(".knob").nth(k)
    for position in (1, 0):
        if buttons:
            target, share = group.locator("button").nth(position), 0.5
        else:
            target, share = group.locator("input"), position / (len(knob["positions"]) - 1)
        box = target.bounding_box()
        assert box["height"] >= 40, "a finger finds it"
        if hand == "keyboard":
            target.focus()
            for key in ["Enter" if position else "Space"] if buttons else ["Home"] + ["ArrowRight"] * position:
                visit.page.keyboard.press(key)
        else:
            inside = {"x": 8 + share * (box["width"] - 16), "y": box["height"] / 2}  # 8 px: half of a slider's thumb
            (target.click if hand == "mouse" else target.tap)(position=inside)
        shown.append(seen(figure))
        told = target.get_attribute("aria-pressed" if buttons else "aria-valuetext")
        assert told == ("true" if buttons else knob["positions"][position])
    return shown


def test_most_chapters_have_something_to_turn():
    assert len(TURNED) >= 1


@pytest.mark.parametrize(("hand", "width"), [("keyboard", 390), ("touch", 390), ("keyboard", 1280), ("mouse", 1280)])
@pytest.mark.parametrize("name", TURNED)
def test_each_knob_is_turned(browser, name, hand, width):
    """From the file system, as a reader without a server has it; each state is the one that its cell computed."""
    with Visit(browser, (HTML / name).as_uri(), width, has_touch=hand == "touch") as visit:
        for figure in visit.page.locator(".explorable").all():
            data = json.loads(figure.locator("[type='application/json']").inner_text())
            states = dict(zip(product(*(knob["positions"] for knob in data["knobs"])), data["says"], strict=True))
            at = list(list(states)[data["start"]])
            assert seen(figure)[0] == states[tuple(at)]
            for k, knob in enumerate(data["knobs"]):
                (second, drawn), (first, other) = turn(visit, figure, k, knob, hand)
                assert second == states[(*at[:k], knob["positions"][1], *at[k + 1 :])]
                at[k] = knob["positions"][0]
                assert first == states[tuple(at)]
                assert re.findall(r"\d+", first) != re.findall(r"\d+", second) and drawn != other
                assert visit.ask("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        assert visit.complaints == [] and all(url.startswith(("file:", "data:")) for url in visit.requests)


@pytest.mark.parametrize("name", TURNED)
def test_what_can_be_turned_stands_there_without_scripts_and_on_paper(browser, site, name):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site + name)
    still = [seen(figure) for figure in page.locator(".explorable").all()]
    assert all(len(say) > 20 for say, _ in still) and page.locator(".explorable .turn").count() == 0
    assert all(svg.bounding_box()["height"] > 8 for svg in page.locator(".explorable svg").all())
    context.close()
    with Visit(browser, site + name) as visit:
        figures = visit.page.locator(".explorable")
        assert [seen(figure)[0] for figure in figures.all()] == [say for say, _ in still], "it starts with the same"
        assert figures.locator(".turn").count() == len(still)
        visit.page.emulate_media(media="print")
        assert not any(turn.is_visible() for turn in figures.locator(".turn").all())
        assert all(output.is_visible() for output in figures.locator("output").all())


def test_play_goes_on_to_the_last_round_and_stops(browser, site):
    with Visit(browser, site + "notebooks/00_ten_minute_tour.html") as visit:
        figure = visit.page.locator(".explorable")
        play, end = figure.locator("button"), seen(figure)
        assert play.inner_text() == "Play" and "after round 20" in end[0].lower()
        play.click()
        assert play.inner_text() == "Stop" and figure.locator("output").get_attribute("aria-live") == "off"
        visit.wait("document.querySelector('.explorable input').value > 1")
        play.click()
        stopped = seen(figure)
        visit.page.wait_for_timeout(700)
        assert seen(figure) == stopped != end and play.inner_text() == "Play"
        play.click()
        visit.wait("document.querySelector('.explorable button').textContent === 'Play'")
        assert seen(figure) == end and figure.locator("output").get_attribute("aria-live") is None


@pytest.mark.parametrize(("motion", "lasts"), [("reduce", 0), ("no-preference", 0.25)])
def test_nothing_moves_for_those_who_ask_for_that(browser, site, motion, lasts):
    with Visit(browser, site + "notebooks/00_ten_minute_tour.html", reduced_motion=motion) as visit:
        times = visit.ask("getComputedStyle(document.querySelector('.explorable rect')).transitionDuration").split(",")
        assert {float(time.strip(" s")) for time in times} == {lasts}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_can_be_turned_can_be_read_and_shows_its_focus(browser, site, scheme):
    with Visit(browser, site + "notebooks/01_long_tailed_clients.html", scheme=scheme) as visit:
        visit.wait(f"document.documentElement.dataset.theme === '{scheme}'")
        for part in ("output", "label span", "button[aria-pressed=true]", "button[aria-pressed=false]", "figcaption"):
            colours = visit.page.evaluate(CONTRAST_SCRIPT, f".explorable {part}")
            assert contrast(*colours) >= 4.5, (scheme, part, colours)
        for kind in ("input", "button"):
            visit.page.locator(f".explorable {kind}").first.focus()
            visit.page.keyboard.press("Shift")  # the browser shows a focus to those who use keys
            assert visit.ask("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2


def test_an_output_starts_where_it_is_put_in_later(browser, site):
    """As in Jupyter: HTML without its scripts, made anew and put into the page; two of them, and keys of its own."""
    with Visit(browser, site + "notebooks/01_long_tailed_clients.html") as visit:
        visit.page.evaluate("""() => {
          addEventListener("keydown", event => {
            if (!event.target.hasAttribute("data-lm-suppress-shortcuts")) event.preventDefault()
          }, true)
          const output = document.querySelector(".explorable").cloneNode(true)
          output.querySelector(".turn").remove()
          delete output.dataset.on
          document.body.replaceChildren()
          for (const times of [1, 2]) {
            const box = document.createElement("div")
            box.innerHTML = output.outerHTML
            for (const old of box.querySelectorAll("script")) {
              const script = document.createElement("script")
              for (const {name, value} of old.attributes) script.setAttribute(name, value)
              script.textContent = old.textContent
              old.replaceWith(script)
            }
            document.body.append(box)
          }
        }""")
        one, other = visit.page.locator(".explorable").all()
        before = seen(other)
        assert one.locator(".turn").count() == other.locator(".turn").count() == 1
        one.locator("input").focus()
        visit.page.keyboard.press("Home")
        assert seen(one) != before == seen(other) and visit.complaints == []


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
