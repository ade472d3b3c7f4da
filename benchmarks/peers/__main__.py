"""Run one variant in this process and write what it leaves: `python -m peers flower.tutorial --width 16 ...`."""

import argparse
import importlib
import os

import torch

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", help="module.function of this package")
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--equal", action="store_true")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    module, function = args.variant.split(".")
    stamps, state = getattr(importlib.import_module(f"peers.{module}"), function)(args.width, args.rounds, args.equal)
    if os.environ.get("PFL_WORKER_RANK", "0") == "0":
        torch.save((stamps, state), args.out)
