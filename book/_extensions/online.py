"""What an address adds to the book: buttons, a guard cell, a sitemap, a card. Without one these are absent.

MLLMFL_REPOSITORY   the repository, as https://github.com/owner/name; MLLMFL_BRANCH: its branch, else main
MLLMFL_COLAB        the branch that holds the chapters with the guard cell, for Colab's button
MLLMFL_SITE         where the pages are published, as https://owner.github.io/name/
"""

import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlparse
from xml.sax.saxutils import escape

import nbformat
from sphinx.application import Sphinx
from sphinx.config import Config

REPOSITORY = os.environ.get("MLLMFL_REPOSITORY", "").rstrip("/").removesuffix(".git")
BRANCH = os.environ.get("MLLMFL_BRANCH") or "main"
COLAB = os.environ.get("MLLMFL_COLAB", "")
SITE = os.environ.get("MLLMFL_SITE", "").rstrip("/")

GUARD = """\
# This chapter needs its project. Where that is missing, as on Colab, it is fetched and installed, which takes minutes.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("mllmfl_lite") is None:
    clone = ["git", "clone", "--quiet", "--depth", "1", "--branch", "{branch}", "{repository}", "{folder}"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "./{folder}"]
    for command in (clone, install):
        subprocess.run(command, check=True)
    importlib.invalidate_caches()
if os.path.isdir("{folder}/notebooks"):
    os.chdir("{folder}/notebooks")  # the committed results lie above"""


def configure(app: Sphinx, config: Config) -> None:
    """Buttons and addresses, as far as the environment names them; the version and the commit in the footer."""
    options = config.html_theme_options
    if REPOSITORY:
        launch = {"binderhub_url": "https://mybinder.org", "notebook_interface": "jupyterlab"}
        if COLAB:
            launch["colab_url"] = "https://colab.research.google.com"
        options |= {"repository_url": REPOSITORY, "repository_branch": BRANCH, "launch_buttons": launch}
        options |= dict.fromkeys(("use_repository_button", "use_source_button", "use_edit_page_button"), True)
    options["extra_footer"] += f"<br>mllmfl_lite {version('mllmfl-lite')}{commit(app.srcdir)}"
    config.html_baseurl = config.ogp_site_url = f"{SITE}/" if SITE else ""
    config.ogp_social_cards = {"enable": bool(SITE), "image": "book/figures/logo.png"}
    config.notfound_urls_prefix = root = f"{urlparse(SITE).path}/"
    config.notfound_context = {
        "title": "Not found",
        "body": f'<h1>There is no such page</h1><p>It may have moved: <a href="{root}">go to the first page</a>.</p>',
    }


def commit(folder: Path) -> str:
    """The commit that is checked out, or nothing outside a checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    asked = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return f", commit {asked.stdout.strip()}" if asked.returncode == 0 else ""


def lead_colab(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Point Colab's button to the branch whose chapters begin with the guard cell; the theme knows only one branch."""
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", []):
            if button.get("text") == "Colab":
                button["url"] = button["url"].replace(f"/blob/{BRANCH}/", f"/blob/{COLAB}/")


def finish(app: Sphinx, error: Exception | None) -> None:
    """Put the guard cell into the chapters that are offered for download, and write the sitemap."""
    if error or app.builder.name != "html":
        return
    out = Path(app.outdir)
    if REPOSITORY:
        for path in sorted(out.glob("_sources/notebooks/*.ipynb")):
            notebook = nbformat.read(path, as_version=4)
            names = {"repository": REPOSITORY, "branch": BRANCH, "folder": REPOSITORY.rsplit("/", 1)[-1]}
            notebook.cells.insert(0, nbformat.v4.new_code_cell(GUARD.format(**names), id="guard"))
            nbformat.write(notebook, path)
    if SITE:
        pages = (f"<url><loc>{escape(f'{SITE}/{page}.html')}</loc></url>" for page in sorted(app.env.found_docs))
        lines = ['<?xml version="1.0" encoding="utf-8"?>', '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">',
                 *pages, "</urlset>"]  # fmt: skip
        (out / "sitemap.xml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("config-inited", configure, priority=100)
    app.connect("html-page-context", lead_colab, priority=900)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
