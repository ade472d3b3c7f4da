"""Execute a notebook into another file, as papermill does; several can be executed at the same time.

    .venv/bin/python scripts/execute.py notebooks/X.ipynb _build/executed/X.ipynb

Jupyter picks free TCP ports, and a kernel opens them a second later: two kernels that start together can get the same
one. So each kernel gets socket files instead, in a folder of its own under /tmp, since their paths must be short.
"""

import argparse
import sys
import tempfile

from nbclient.exceptions import DeadKernelError
from papermill import PapermillExecutionError, execute_notebook
from traitlets.config import Config


def execute(source: str, target: str) -> None:
    with tempfile.TemporaryDirectory(prefix="kernel-", dir="/tmp") as folder:
        sockets = Config(KernelManager={"transport": "ipc", "ip": f"{folder}/socket"})
        execute_notebook(source, target, kernel_name="python3", progress_bar=False, config=sockets)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("target")
    given = parser.parse_args()
    try:
        execute(given.source, given.target)
    except (PapermillExecutionError, DeadKernelError) as error:
        sys.exit(f"{given.source}: {error}")
