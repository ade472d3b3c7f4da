"""The pages of the rendered book, for what is made from them: a PDF and slides."""

import posixpath
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from bs4 import BeautifulSoup, Tag
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parent.parent
HTML = ROOT / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless browser; a `FileNotFoundError` says that there is none."""
    program = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if program is None:
        raise FileNotFoundError(f"no browser to look at the book with; install one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def names(toc: Path = ROOT / "_toc.yml") -> list[str]:
    """All pages in reading order, as `notebooks/01_long_tailed_clients`."""
    contents = yaml.safe_load(toc.read_text(encoding="utf-8"))
    return [contents["root"], *(entry["file"] for part in contents["parts"] for entry in part["chapters"])]


def article(html: Path, name: str) -> tuple[Tag, Tag]:
    """A page's article and its head. Links to the site's files are from its root; each id begins with its page's."""
    soup = BeautifulSoup((html / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
    found, head = soup.select_one("article.bd-article"), soup.head
    assert found and head, f"{name} is not a page of the book"
    for useless in found.select("a.headerlink, button, script"):
        useless.decompose()
    for tag in [*found.find_all(True), *head.find_all(True)]:
        if tag.get("id"):
            tag["id"] = f"{name}:{tag['id']}"
        for key in {"src", "href"} & tag.attrs.keys():
            tag[key] = from_root(name, tag[key])
    return found, head


def from_root(name: str, link: str) -> str:
    """A link of a page, seen from the site's root; links to other pages become links inside one document."""
    if re.match(r"[a-z]+:", link):
        return link
    path, _, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else f"{name}.html"
    if target.endswith(".html"):
        page = target.removesuffix(".html")
        return f"#{page}:{anchor}" if anchor else f"#{page}"
    return target
