"""The installed package, without the checkout: a wheel in an environment of its own, used from another folder."""

import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
SMALL = {
    "dataset": "cifar10_mini", "num_clients": 4, "width": 4,
    "federated": {"rounds": 1, "clients_per_round": 1, "local_epochs": 1, "report_rounds": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The bin folder of an environment that has this package's wheel, and the other packages from here."""
    pytest.importorskip("pip")
    place = tmp_path_factory.mktemp("installed")
    listed = subprocess.run(["git", "ls-files", "mllmfl_lite"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in (*listed.stdout.splitlines(), "pyproject.toml", "README.md", "LICENSE"):
        (place / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "source" / name).write_bytes((ROOT / name).read_bytes())
    venv.create(place / "env", with_pip=False, symlinks=True)
    bin = place / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    (site,) = (place / "env").glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # the .pth files there are not read
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(bin / "python"), "install", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", str(place / "source")], check=True, cwd=place)
    return bin


def run(folder, *words):
    done = subprocess.run(list(map(str, words)), cwd=folder, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readmes_example_runs_anywhere(installed, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    shown = run(tmp_path, installed / "python", "-c", f"{block}\nimport mllmfl_lite; print(mllmfl_lite.__file__)")
    assert "top1" in shown and Path(shown.splitlines()[-1]).is_relative_to(installed.parent), shown
    assert list(tmp_path.iterdir()) == []


def test_the_commands_run_anywhere(installed, tmp_path):
    (tmp_path / "mine").mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "mine" / "a.png")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    run(tmp_path, installed / "mllmfl", "annotate", "mine", "--out", "texts")
    assert len((tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert "small, seed 0: about" in run(tmp_path, installed / "mllmfl", "plan", "small.yaml", "--out", "out")
    assert "top-1" in run(tmp_path, installed / "mllmfl", "run", "small.yaml", "--out", "out")
    assert (tmp_path / "out" / "small_seed0.json").is_file()
