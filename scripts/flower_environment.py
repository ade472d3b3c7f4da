"""Make an environment with Flower and Ray (its simulation) in which everything else is found in this one.

    .venv/bin/python scripts/flower_environment.py .venv-flower

Flower asks for older versions of packages that this project uses (fastapi, typer, rich, packaging, ...). What it needs
is installed into the new environment and found there first; torch and the rest, several GB, are looked up in the
environment that runs this script.
"""

import argparse
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

FLOWER = "flwr[simulation]>=1.42,<2"
ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if sys.version_info < (3, 11):
        sys.exit("Flower needs Python 3.11 or later; make .venv with one (make setup PYTHON=python3.12)")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", FLOWER], check=True)
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    place = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    (place / "project.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
