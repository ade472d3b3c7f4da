"""Every script can be imported and says what it does; drawings are what their script draws."""

import importlib
import sys
from pathlib import Path

import draw_figures
import keep_outputs
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])


@pytest.mark.parametrize("name", [path.stem for path in SCRIPTS])
def test_a_script_can_be_imported_and_says_what_it_does(name):
    assert importlib.import_module(name).__doc__


def test_schematics_are_what_the_script_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(draw_figures, "FIGURES", tmp_path)
    draw_figures.draw_all()
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert drawn == {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "book" / "figures").glob("*.svg")}


def test_kept_outputs_do_not_depend_on_how_a_stream_was_cut():
    parts = [
        nbformat.v4.new_output("stream", name=name, text=text) for name, text in (("a", "1"), ("a", "2"), ("b", "3"))
    ]
    assert [(output.name, output.text) for output in keep_outputs.joined(parts)] == [("a", "12"), ("b", "3")]
