"""Real use, for minutes: kills, damaged files, hostile inputs, lying clients, odd servers. Prints a table.

python tests/slow/harness.py [--seed N] [PART ...]
"""

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

PARTS = ("kills", "damage", "hostile", "liars", "servers")
SHOWN = 8  # sentences of a row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    failed = 0
    for part in chosen.parts or PARTS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            rows = importlib.import_module(part).check(Path(place), chosen.seed)
        for row in rows:
            print(f"{row.name:44} {row.bound:34} {row.tried:5} tried {len(row.broken):4} broken", flush=True)
            for sentence in list(dict.fromkeys(row.broken))[:SHOWN]:
                print(f"    {sentence}")
            failed += bool(row.broken)
        print(f"    {part}: {time.monotonic() - started:.0f} s", flush=True)
    print("a bound is broken" if failed else "every bound holds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
