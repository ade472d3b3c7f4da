"""The command line: ``mllmfl annotate``, ``mllmfl run``, ``mllmfl plan``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from mllmfl_lite.checkpoint import CheckpointError
from mllmfl_lite.federated import ClientDiverged
from mllmfl_lite.runs import command
from mllmfl_lite.stages import annotate_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0 done, 1 failed in part, 2 wrong input, 3 something is missing."""
    parser = argparse.ArgumentParser(prog="mllmfl", description="A multimodal LLM on the server, federated learning")
    subparsers = parser.add_subparsers(required=True)
    annotate_command.add_command(subparsers)
    command.add_commands(subparsers)
    chosen = parser.parse_args(arguments)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # several would wait for each other on a busy machine
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        return chosen.function(chosen)
    except (ValueError, OSError, CheckpointError, ClientDiverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
