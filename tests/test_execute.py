"""Several notebooks are executed at a time: their kernels do not meet, and a fault in one stops the book."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]


def write(path: Path, source: str) -> Path:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=kernel), path)
    return path


def start(source: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "execute.py"), str(source), str(source.with_suffix(".out.ipynb"))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_kernels_that_start_together_share_no_socket(tmp_path):
    source = "from ipykernel.connect import get_connection_info; print(get_connection_info())"
    sources = [write(tmp_path / f"{i}.ipynb", source) for i in range(3)]
    for process in [start(source) for source in sources]:
        shown = process.communicate(timeout=120)
        assert process.returncode == 0, shown
    executed = [nbformat.read(source.with_suffix(".out.ipynb"), as_version=4) for source in sources]
    given = [json.loads(notebook.cells[0].outputs[0].text) for notebook in executed]
    assert [kernel["transport"] for kernel in given] == ["ipc"] * 3
    assert len({kernel["ip"] for kernel in given}) == 3 and all(len(kernel["ip"]) < 60 for kernel in given)
    assert not any(Path(kernel["ip"]).parent.exists() for kernel in given), "nothing is left behind"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [("1 / 0", "ZeroDivisionError: division by zero"), ("import os; os._exit(3)", "Kernel died")],
)
def test_a_fault_is_an_exit_status_and_a_message_that_names_the_notebook(source, sentence, tmp_path):
    process = start(write(tmp_path / "chapter.ipynb", source))
    _, message = process.communicate(timeout=120)
    assert process.returncode == 1 and f"{tmp_path}/chapter.ipynb: " in message and sentence in message


# ------------------------------------------------------------------------------------------------ the Makefile

# Naps until $AT_ONCE have started; beside a fault, until it has happened: a busy machine changes nothing.
PYTHON = """#!/bin/bash
echo "start $2" >> log
until [ "$(grep -c start log)" -ge "$AT_ONCE" ]; do sleep 0.02; done
if [ "$2" = "notebooks/$FAULT" ]; then touch fault; echo "$2: a fault" >&2; exit 1; fi
while [ -n "$FAULT" -a ! -e fault ]; do sleep 0.02; done
sleep 0.2
cp "$2" "$3"
echo "end $2" >> log
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Runs make in a folder where executing a notebook is a nap; gives the process and the log."""
    for folder in ("mllmfl_lite", "results", "book", "notebooks", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in CHAPTERS:
        (tmp_path / "notebooks" / name).touch()
    (tmp_path / ".venv" / "bin" / "python").write_text(PYTHON)
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # about threads inside a process; make counts processes
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "NEWEST")}

    def run(*words, fault="", at_once=1):
        command = ["make", "executed", *words]
        environment.update(FAULT=fault, AT_ONCE=str(at_once))
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        log = tmp_path / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return done, [line.replace("notebooks/", "").split() for line in lines]

    return run


def most_at_once(log) -> int:
    running = [sum(1 if what == "start" else -1 for what, _ in log[: i + 1]) for i in range(len(log))]
    return max(running)


def test_the_longest_notebooks_are_executed_first_two_at_a_time(make):
    done, log = make("AT_A_TIME=-j2", at_once=2)
    assert done.returncode == 0 and done.stderr == ""
    started = [name for what, name in log if what == "start"]
    assert sorted(started) == CHAPTERS and most_at_once(log) == 2
    assert {name[:2] for name in started[:2]} == {"03", "06"}
    assert len(make("AT_A_TIME=-j2")[1]) == len(log), "a second call executes nothing"


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="this system does not say which cores a process may use"
)
def test_as_many_at_a_time_as_cores_and_at_most_four(make):
    done, _ = make("-n")
    assert f"-j{min(len(os.sched_getaffinity(0)), 4)} _build/executed/03_" in done.stdout


def test_one_at_a_time_on_demand(make):
    done, log = make("-j1")
    assert done.returncode == 0 and done.stderr == "" and most_at_once(log) == 1


def test_a_fault_in_one_notebook_stops_make(make):
    done, log = make("AT_A_TIME=-j2", fault=CHAPTERS[6], at_once=2)
    assert done.returncode == 2 and f"notebooks/{CHAPTERS[6]}: a fault" in done.stderr
    assert len([name for what, name in log if what == "start"]) < 8, "what ran beside it ends, nothing else begins"
