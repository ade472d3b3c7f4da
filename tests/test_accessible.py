"""axe-core looks at the pages, in the light and in the dark; what the theme and Sphinx write is theirs to mend."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from pages import HTML, names
from visits import Visit

pytestmark = pytest.mark.browser
THEIRS = {
    "region": ".only-light, .only-dark",  # the theme's logo stands outside any landmark
    "aria-allowed-role": ".citation",  # docutils' bibliography
    "aria-deprecated-role": ".citation",
    "aria-required-children": ".citation-list",
}
FEW = ["notebooks/01_long_tailed_clients", "notebooks/06_three_stages_together", "book/results"]


def faults(visit) -> list[str]:
    """What axe-core finds on a page, as "rule: element", less what is known to be others'."""
    found = []
    for violation in Axe().run(visit.page).response["violations"]:
        for node in violation["nodes"]:
            known = THEIRS.get(violation["id"])
            theirs = known and visit.page.evaluate(
                "([target, known]) => document.querySelector(target)?.matches(known)", [node["target"][0], known]
            )
            found += [] if theirs else [f"{violation['id']}: {node['html'][:120]}"]
    return found


def look(browser, site, name, scheme, width=1280):
    with Visit(browser, f"{site}{name}.html", width, scheme) as visit:
        visit.wait("[...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))")
        visit.page.wait_for_timeout(400)  # the theme looks for what scrolls
        assert faults(visit) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", FEW)
def test_some_pages_have_no_fault(browser, site, name, scheme):
    look(browser, site, name, scheme)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
@pytest.mark.parametrize("name", names())
def test_no_page_has_a_fault(request, browser, site, name, scheme, width):
    if "slow" not in request.config.option.markexpr:
        pytest.skip("minutes; pytest -m slow tests/test_accessible.py runs it")
    look(browser, site, name, scheme, width)


def test_a_fault_is_found(browser, site):
    with Visit(browser, f"{site}book/notation.html") as visit:
        visit.ask(
            "document.querySelector('.bd-article').insertAdjacentHTML('beforeend', '<img src=\"\"><a href=\"#x\"></a>')"
        )
        assert {fault.split(":")[0] for fault in faults(visit)} >= {"image-alt", "link-name"}


def test_no_page_is_heavy():
    """A page with its pictures: at most 1.5 MB, so that it opens on a slow line."""
    from bs4 import BeautifulSoup

    for name in names():
        page = HTML / f"{name}.html"
        images = {
            i["src"] for i in BeautifulSoup(page.read_text("utf-8"), "html.parser").select("img:not([src^='data:'])")
        }
        weight = page.stat().st_size + sum((page.parent / image).stat().st_size for image in images)
        assert weight < 1.5e6, (name, weight)
