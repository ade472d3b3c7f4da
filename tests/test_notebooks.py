"""What every chapter must have, and what no chapter may have. nbval checks the outputs themselves (make notebooks)."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.name: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
PROSE = {
    path.name: path.read_text(encoding="utf-8") for path in [*sorted((ROOT / "book").glob("*.md")), ROOT / "README.md"]
}
LITERALS = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list}

# These have rhythms of their own.
TOUR, TABLES, CASES = "00_ten_minute_tour.ipynb", "a2_behind_chapter_6.ipynb", "a3_how_we_fooled_ourselves.ipynb"

every_chapter = pytest.mark.parametrize("name", NOTEBOOKS)


def code_cells(name):
    return code_of(NOTEBOOKS[name])


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(name):
    return "\n\n".join(cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == "markdown")


def parameters(name):
    return parameters_of(NOTEBOOKS[name])


def parameters_of(notebook):
    """name -> (type as written, value) of a notebook's parameters cell."""
    (cell,) = [c for c in code_of(notebook) if "parameters" in c.metadata.get("tags", [])]
    return {
        statement.target.id: (ast.unparse(statement.annotation), ast.literal_eval(statement.value))
        for statement in ast.parse(cell.source).body
    }


@every_chapter
def test_the_parameters_are_typed_literals_each_with_a_comment(name):
    found = parameters(name)
    assert 1 <= len(found) <= 12
    assert all(isinstance(value, LITERALS[kind]) for kind, value in found.values())
    assert "parameters" in code_cells(name)[0].metadata.get("tags", []), "the parameters come first"
    assert all("  # " in line for line in code_cells(name)[0].source.splitlines())


@every_chapter
def test_the_parameters_are_checked_before_they_are_used(name):
    """Numbers and lists all of them; of words, those that a chapter chooses from."""
    checked, cells = set(), code_cells(name)
    for number, cell in enumerate(cells):
        calls = [c for c in ast.walk(ast.parse(cell.source)) if isinstance(c, ast.Call)]
        found = {k.arg for c in calls if ast.unparse(c.func) == "check_parameters" for k in c.keywords}
        assert not found or number <= 3, "at the top"
        checked |= found
    every = parameters(name)
    assert {key for key, (kind, _) in every.items() if kind in ("int", "float", "list")} <= checked <= set(every)


@every_chapter
def test_every_parameter_is_read(name):
    """By more than its check, and more than the question whether a run is the text's own."""
    read = set()
    for cell in code_cells(name)[1:]:
        for statement in ast.parse(cell.source).body:
            nodes, source = list(ast.walk(statement)), ast.unparse(statement)
            checks = source.startswith(("check_parameters(", "as_in_the_text ="))
            if not checks and not any(isinstance(node, ast.Assert) for node in nodes):
                read |= {node.id for node in nodes if isinstance(node, ast.Name)}
    assert set(parameters(name)) <= read


@every_chapter
def test_one_torch_thread(name):
    """Work above torch is spread over workers; several threads of torch's own wait for a busy neighbour."""
    source = "\n".join(cell.source for cell in code_cells(name))
    assert set(re.findall(r"set_num_threads\((.*?)\)", source)) <= {"1"}


@every_chapter
def test_outputs_are_committed_complete_and_clean(name):
    """A cell without a count is compared with nothing by nbval; stderr would never compare equal."""
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run `make outputs`"
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert len(outputs) >= 8
    assert not any("papermill" in cell.metadata for cell in NOTEBOOKS[name].cells)


@every_chapter
def test_ignored_outputs_are_the_exception(name):
    tags = [tag for cell in code_cells(name) for tag in cell.metadata.get("tags", [])]
    assert set(tags) <= {"parameters", "nbval-ignore-output", "hide-input", "remove-cell"}
    assert tags.count("nbval-ignore-output") <= len(code_cells(name)) / 3


@every_chapter
def test_a_cell_that_no_page_shows_only_checks(name):
    """Its output would be lost, and a name that a later cell needs could not be found."""
    for cell in code_cells(name):
        if "remove-cell" in cell.metadata.get("tags", []):
            assert "assert" in cell.source and not cell.outputs


@every_chapter
def test_every_picture_has_a_description(name):
    for cell in code_cells(name):
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert len(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")) > 40, cell.source


@every_chapter
def test_cells_are_short(name):
    lengths = [len(cell.source.splitlines()) for cell in code_cells(name)]
    assert sorted(lengths)[len(lengths) // 2] <= 9 and max(lengths) <= 20
    assert max(len(line) for cell in code_cells(name) for line in cell.source.splitlines()) <= 88


@pytest.mark.parametrize("name", sorted(NOTEBOOKS.keys() - {TOUR, TABLES, CASES}))
def test_the_rhythm_of_a_chapter(name):
    text = prose(name)
    assert text.startswith("# ") and "```{figure}" in text.split("## ")[0], "a title, a claim and a drawing"
    for heading in (
        "At a glance",
        "Set-up",
        "Check yourself",
        "At full scale",
        "Summary",
        "Exercises",
        "Five questions",
        "Further reading",
    ):
        assert f"\n## {heading}\n" in text, heading
    assert text.count("Predict first") == 1
    assert text.count("{exercise-start}") == text.count("{solution-start}") == text.count(":class: dropdown") == 4
    assert "torch.testing.assert_close(" in "\n".join(cell.source for cell in code_cells(name)), "define, then trust"
    assert len(NOTEBOOKS[name].cells) > 2 * 12 and 800 <= words_before_a_click(text) <= 3500


def words_before_a_click(text):
    return len(re.findall(r"\w+", re.sub(r"## Five questions.*?(?=\n## )|<details.*?</details>", "", text, flags=re.S)))


def test_the_rhythm_of_the_tour():
    """It is read before everything else, also where no directive of the book is known."""
    text = prose(TOUR)
    assert text.startswith("# ") and "](../book/figures/" in text.split("## ")[0]
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings[:2] == ["At a glance", "Set-up"] and headings[-2:] == ["What we found", "Where to go next"]
    assert not re.search(r"\{[a-z:-]+\}`|```\{", text), "roles and directives are the book's"
    assert 900 <= words_before_a_click(text) <= 1500


def explorables(name):
    """The outputs that a reader can turn."""
    pages = [output.get("data", {}).get("text/html", "") for cell in code_cells(name) for output in cell.outputs]
    return [page for page in pages if '<figure class="explorable">' in page]


@every_chapter
def test_what_a_reader_turns_is_light_and_has_the_packages_script(name):
    found = explorables(name)
    assert len("".join(found)) < 300_000
    for page in found:
        for kind in ("js", "css"):
            text = (ROOT / f"mllmfl_lite/assets/turn/turn.{kind}").read_text(encoding="utf-8")
            assert text in page, "run `make outputs`"


@pytest.mark.parametrize(
    ("name", "pattern", "sentence"),
    [
        (TOUR, r"\nlong tail +\S+ +\S+ +\S+ +(\d+)\.\d", r"{0}% of the tail"),
        ("01_long_tailed_clients.ipynb", r"\ndirichlet +(\d+) ", r"{0} of them hold a truck"),
        ("01_long_tailed_clients.ipynb", r"\ndirichlet +(0\.\d+) ", r"its skew is {0}"),
        ("02_annotating_with_llava.ipynb", r"caught: ([\d.]+)% of the wrong", r"Caught: {0} % of the wrong ones"),
        ("02_annotating_with_llava.ipynb", r"lost: ([\d.]+)% of the right", r"Lost: {0} % of the right ones"),
    ],
)
def test_what_a_reader_turns_starts_with_the_numbers_of_the_cells_beside_it(name, pattern, sentence):
    outputs = [output for cell in code_cells(name) for output in cell.outputs]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    (found,) = re.findall(pattern, "\n".join(texts))
    (page,) = explorables(name)
    assert sentence.format(found) in re.search("<output>(.*?)</output>", page)[1]


def test_the_rhythm_of_the_cases():
    text = prose(CASES)
    cases = re.findall(r"^## Case \d.*?(?=^## |\Z)", text, re.M | re.S)
    assert len(cases) == 5
    for case in cases:
        parts = [case.find(f"**{part}") for part in ("What we believed.**", "What showed the error", "The habit.**")]
        assert -1 not in parts and parts == sorted(parts), case
    for heading in ("At a glance", "Set-up", "Check yourself", "Summary", "Five questions", "Further reading"):
        assert f"\n## {heading}\n" in text, heading
    assert 1000 <= words_before_a_click(text) <= 1800
    assert sum(cell.source.count("assert ") for cell in code_cells(CASES)) >= 2 * len(cases)


def test_the_rhythm_of_the_tables():
    text = prose(TABLES)
    for heading in ("At a glance", "Set-up", "Check yourself", "Summary", "Five questions", "Further reading"):
        assert f"\n## {heading}\n" in text, heading
    assert 1000 <= words_before_a_click(text) <= 2500
    checked = sum("assert " in cell.source for cell in code_cells(TABLES))
    assert checked >= text.count("**Read the table") >= 5, "a cell checks what is said of a table"


@every_chapter
def test_the_voice_of_a_chapter(name):
    words = re.findall(r"\b(simply|obviously|trivially|of course)\b", prose(name), re.I)
    assert words == []


def papermill_commands():
    texts = {**PROSE, **{name: prose(name) for name in NOTEBOOKS}}
    for where, text in texts.items():
        for command in re.findall(r"papermill notebooks/(?:[^`]*?\\\n)*[^`\n]*", text):
            yield where, shlex.split(command.replace("\\\n", " "))


@pytest.mark.parametrize(("where", "words"), list(papermill_commands()), ids=str)
def test_papermill_commands_in_the_text_name_real_parameters(where, words):
    known = parameters_of(nbformat.read(ROOT / words[1], as_version=4))
    given = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "-p"}
    for key, value in given.items():
        kind, _ = known[key]
        {"int": int, "float": float, "str": str, "bool": bool}[kind](value)
    assert given


def test_there_are_such_commands():
    assert len(list(papermill_commands())) >= 3


def test_the_table_of_contents_lists_every_page():
    toc = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"(?:file|root): (\S+)", toc))
    there = {f"book/{Path(n).stem}" for n in PROSE if n != "README.md"} | {
        f"notebooks/{Path(n).stem}" for n in NOTEBOOKS
    }
    assert listed == there


def test_the_api_page_lists_every_module():
    package = ROOT / "mllmfl_lite"
    modules = {path.relative_to(package).with_suffix("").as_posix().replace("/", ".") for path in package.rglob("*.py")}
    rooms = {name for name in modules if name.endswith(".__init__")}
    listed = re.findall(r"automodule:: mllmfl_lite\.([\w.]+)", PROSE["api.md"])
    assert len(listed) == len(set(listed)) and modules - rooms - {"__init__"} <= set(listed)
    assert set(listed) <= modules | {name.removesuffix(".__init__") for name in rooms}


@pytest.mark.parametrize(("change", "says"), [(None, ""), ("output", "outputs differ"), ("source", "another version")])
def test_outputs_that_differ_from_the_executed_ones_are_found(tmp_path, change, says):
    cell = nbformat.v4.new_code_cell("print(1)", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", text="1\n")]
    book = nbformat.v4.new_notebook(cells=[cell])
    for folder in ("notebooks", "_build/executed"):
        (tmp_path / folder).mkdir(parents=True)
        nbformat.write(book, tmp_path / folder / "one.ipynb")
        if change == "output":
            cell.outputs[0].text = "2\n"
        elif change == "source":
            cell.source = "print(2)"
    (tmp_path / "notebooks" / "conftest.py").write_text(
        (ROOT / "notebooks" / "conftest.py").read_text(encoding="utf-8")
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "notebooks"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (found.returncode != 0) == bool(change) and says in found.stdout, found.stdout
