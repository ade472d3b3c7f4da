"""Make an environment with Flower, or with all that the engine is measured beside; the rest is found in this one.

    .venv/bin/python scripts/make_environment.py .venv-flower
    .venv/bin/python scripts/make_environment.py .venv-peers

Flower and pfl-research ask for older versions of packages that this project uses (fastapi, typer, rich, packaging,
...). What they need is installed into the new environment and found there first; torch and the rest, several GB, are
looked up in the environment that runs this script.
"""

import argparse
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ENVIRONMENTS = {  # what is installed, and the newest Python that it all works with
    ".venv-flower": (["flwr[simulation]>=1.42,<2"], (3, 13)),
    ".venv-peers": (["flwr[simulation]>=1.42,<2", "pfl>=0.6,<1"], (3, 12)),
}
ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", choices=ENVIRONMENTS)
    folder = parser.parse_args().folder
    packages, newest = ENVIRONMENTS[folder]
    if not (3, 11) <= sys.version_info[:2] <= newest:
        sys.exit(f"{folder} needs Python 3.11 to 3.{newest[1]}; make .venv with one (make setup PYTHON=python3.12)")
    venv.create(folder, with_pip=True)
    python = Path(folder, "bin", "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    place = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    (place / "project.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
