"""The promises of README, Makefile and requirements."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
VERBS = re.search(r"^\.PHONY: (.*)$", MAKEFILE.replace("\\\n", ""), re.M)[1].split()


def test_make_help_lists_every_verb():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(VERBS) > 15 and all(f"make {verb} " in listed for verb in VERBS)


def test_every_make_verb_named_in_the_texts_exists():
    texts = README + "".join(page.read_text() for page in (ROOT / "book").glob("*.md"))
    assert set(re.findall(r"(?:^|`)make (\w[\w-]*)", texts, re.M)) <= set(VERBS)


def test_a_python_that_is_too_old_gets_a_sentence(tmp_path):
    """Whatever `make` is told to use is asked for its version first."""
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 'Python 3.10 to 3.13 is needed, this is 3.8' >&2\nexit 1\n")
    old.chmod(0o755)
    for file in ("Makefile", "requirements.txt", "pyproject.toml"):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    for folder in ("mllmfl_lite", "results", "book"):
        (tmp_path / folder).mkdir()
    made = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode != 0 and "3.10 to 3.13 is needed" in made.stderr
    assert not (tmp_path / ".venv").exists()


def test_requirements_have_an_upper_bound():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[\w-]+>=[\d.]+,<\d+", line)] == []


def test_the_readme_fits_a_screen_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 60
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_the_readmes_python_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {})
    summary = ast.literal_eval(capsys.readouterr().out)
    assert 0 <= summary["top1"] <= 1 and set(summary["groups"]) >= {"head", "middle", "tail"}


def test_ci_runs_the_test_command():
    assert (ROOT / ".ci" / "run").read_text().strip().endswith("make test")
    assert "run: .ci/run" in (ROOT / ".github" / "workflows" / "book.yml").read_text()
