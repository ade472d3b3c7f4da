"""A small book with the real configuration, built with and without an address: buttons, guard cell, card, 404."""

import importlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from visits import Visit, serve

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/someone/their-book"
SITE = "https://someone.github.io/their-book"
ADDRESS = {
    "MLLMFL_REPOSITORY": f"{REPOSITORY}.git",
    "MLLMFL_BRANCH": "trunk",
    "MLLMFL_COLAB": "colab",
    "MLLMFL_SITE": f"{SITE}/",
}
CHAPTER = "notebooks/01_first"


def build(folder: Path, **address: str) -> Path:
    """The HTML of a book of one page and one chapter, as the Makefile renders the real one."""
    source = folder / "source"
    shutil.copytree(ROOT / "book", source / "book", ignore=shutil.ignore_patterns("*.md"))
    for name in ("_config.yml", "references.bib"):
        shutil.copy(ROOT / name, source)
    contents = {"format": "jb-book", "root": "book/intro", "chapters": [{"file": CHAPTER}]}
    (source / "_toc.yml").write_text(yaml.safe_dump(contents), encoding="utf-8")
    (source / "book" / "intro.md").write_text(
        "# The first page\n\nA plain sentence about this page.\n", encoding="utf-8"
    )
    cells = [
        nbformat.v4.new_markdown_cell("# 1 · A chapter\n\n**A claim** of the chapter."),
        nbformat.v4.new_code_cell("1"),
    ]
    (source / "notebooks").mkdir()
    python = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=python), source / f"{CHAPTER}.ipynb")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", "-W", "-n", "--keep-going", "--quiet"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MLLMFL_")}
    done = subprocess.run([*command, "--path-output", str(folder), str(source)], env=clean | address,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "_build" / "html"


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    return build(tmp_path_factory.mktemp("online"), **ADDRESS)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    return build(tmp_path_factory.mktemp("offline"))


def page(html, name):
    return BeautifulSoup((html / f"{name}.html").read_text(encoding="utf-8"), "html.parser")


def buttons(html, name):
    return {link["href"] for link in page(html, name).select(".header-article-items a[href^='https:']")}


def test_buttons_lead_to_the_repository_that_builds(online):
    chapter = f"{CHAPTER}.ipynb"
    assert buttons(online, CHAPTER) == {
        REPOSITORY, f"{REPOSITORY}/blob/trunk/{chapter}?plain=1", f"{REPOSITORY}/edit/trunk/{chapter}",
        f"https://mybinder.org/v2/gh/someone/their-book/trunk?urlpath=lab/tree/{chapter}",
        f"https://colab.research.google.com/github/someone/their-book/blob/colab/{chapter}",
    }  # fmt: skip
    assert f"{REPOSITORY}/edit/trunk/book/intro.md" in buttons(online, "book/intro")


def test_without_an_address_there_is_no_button_no_card_and_no_sitemap(offline):
    assert buttons(offline, CHAPTER) == buttons(offline, "book/intro") == set()
    assert not (offline / "sitemap.xml").exists()
    text = (offline / f"{CHAPTER}.html").read_text(encoding="utf-8")
    assert "github.com/" not in text.replace("github.com/executablebooks", "") and "og:image" not in text
    assert len(nbformat.read(offline / "_sources" / f"{CHAPTER}.ipynb", as_version=4).cells) == 2


def test_pages_describe_themselves(online, offline):
    for html in (online, offline):
        for name, words in (("book/intro", "A plain sentence about this page."), (CHAPTER, "A claim of the chapter.")):
            assert page(html, name).select_one("meta[name=description]")["content"] == words
    card = page(online, CHAPTER).select_one("meta[property='og:image']")["content"]
    assert card.startswith(SITE + "/") and (online / card.removeprefix(SITE + "/")).stat().st_size > 5000
    assert page(online, CHAPTER).select_one("meta[property='og:url']")["content"] == f"{SITE}/{CHAPTER}.html"


def test_the_sitemap_lists_the_pages(online):
    places = [place.text for place in ElementTree.parse(online / "sitemap.xml").findall(".//{*}loc")]
    assert places == [f"{SITE}/book/intro.html", f"{SITE}/{CHAPTER}.html"]
    assert all((online / place.removeprefix(SITE + "/")).exists() for place in places)


def test_the_footer_names_licence_version_and_commit(online, offline):
    for html in (online, offline):
        footer = page(html, "book/intro").select_one("footer.bd-footer-content").get_text()
        assert "MIT" in footer and f"mllmfl_lite {version('mllmfl-lite')}" in footer


def test_the_commit_is_the_one_that_is_checked_out(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "book" / "_extensions")
    commit = importlib.import_module("online").commit
    assert commit(tmp_path) == ""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    log = subprocess.run([*git, "log", "--format=%h"], capture_output=True, text=True, check=True)
    assert commit(tmp_path) == f", commit {log.stdout.strip()}"


@pytest.mark.browser
def test_the_404_page_works_at_any_depth(browser, online, tmp_path):
    (tmp_path / "their-book").symlink_to(online)
    with (
        serve(tmp_path, missing="their-book/404.html") as site,
        Visit(browser, f"{site}their-book/a/b/c/lost") as visit,
    ):
        assert [c for c in visit.complaints if "/lost" not in c and "404" not in c] == []
        assert all(url.startswith((site, "data:")) for url in visit.requests)
        assert visit.ask("getComputedStyle(document.querySelector('.bd-article')).display") == "block"
        assert visit.page.locator("article a").first.get_attribute("href").startswith("/their-book/")


# ------------------------------------------------------------------------------------------------ the guard cell


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """A folder like a fresh machine's: no package to import, and a pip that only writes down what it is asked for."""
    stub = tmp_path / "stub" / "pip"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    (stub / "__main__.py").write_text("import sys\nopen('pip.txt', 'a').write(' '.join(sys.argv[1:]) + '\\n')\n")
    return tmp_path, {"PATH": os.environ["PATH"], "PYTHONPATH": str(stub.parent), "HOME": str(tmp_path)}


def run_guard(online, folder, environment, after, **replace):
    """Run the guard cell of the chapter that is offered for download, without site packages."""
    guard, title, _ = nbformat.read(online / "_sources" / f"{CHAPTER}.ipynb", as_version=4).cells
    assert guard.cell_type == "code" and title.source.startswith("# 1")
    source = guard.source.replace(REPOSITORY, replace.get("repository", REPOSITORY))
    return subprocess.run([sys.executable, "-S", "-c", f"{source}\n{after}"], cwd=folder, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip


def test_the_guard_cell_fetches_and_installs_where_the_package_is_missing(online, colab):
    folder, environment = colab
    theirs = folder / "theirs"
    (theirs / "notebooks").mkdir(parents=True)
    (theirs / "notebooks" / "here.txt").touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(theirs)]
    for command in (["init", "-q", "-b", "trunk"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    for _ in range(2):  # again after a restart: what is there is not fetched anew
        done = run_guard(online, folder, environment, "print(os.path.exists('here.txt'))", repository=theirs.as_uri())
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
        environment["PYTHONPATH"] += f":{folder / 'installed'}"
        (folder / "installed" / "mllmfl_lite").mkdir(parents=True, exist_ok=True)
    assert (folder / "pip.txt").read_text() == "install --quiet ./their-book\n"


def test_the_guard_cell_does_nothing_where_the_package_is_there(online, colab):
    folder, environment = colab
    environment["PYTHONPATH"] += f":{ROOT}"
    done = run_guard(online, folder, environment, "print(os.getcwd())")
    assert (done.returncode, done.stdout) == (0, f"{folder}\n"), done.stderr
    assert not (folder / "pip.txt").exists() and not (folder / "their-book").exists()


def test_binder_installs_the_package():
    script = ROOT / ".binder" / "postBuild"
    assert os.access(script, os.X_OK) and "pip install" in script.read_text()
    python = (ROOT / ".binder" / "runtime.txt").read_text().strip().removeprefix("python-")
    assert python in ("3.10", "3.11", "3.12", "3.13")
