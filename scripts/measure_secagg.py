"""What SecAgg+ costs: one round of the Flower app on real processes of this machine, without it and with it.

    .venv-flower/bin/python scripts/measure_secagg.py       # after `make flower`; two minutes

A server and four clients, each a process. Bytes are those of the messages' content, as Flower writes it. Seconds depend
on what else the machine does; its load stands in the file.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from sweep import RESULTS, ROOT

from mllmfl_lite.models import load_model
from mllmfl_lite.runs.results import provenance, save_result

sys.path.append(str(ROOT / "tests"))
import machines

CLIENTS = 4
CONFIG = {
    "num_clients": CLIENTS, "federated.clients_per_round": CLIENTS, "federated.rounds": 1, "federated.eval_every": 1,
    "federated.report_rounds": 1, "timeout": 900, "wait": 300,
}  # fmt: skip


def run(secure):
    """What a client's round takes, and the weights after it."""
    with tempfile.TemporaryDirectory() as place:
        there, out = machines.Machines(Path(place)), Path(place) / "out"
        try:
            there.superlink()
            for client in range(CLIENTS):
                there.supernode(client)
            there.run({**CONFIG, "secure": secure, "traffic": True, "folder": str(out)})
            there.wait_for(lambda: (out / "fedavg_seed0.json").exists(), "the results")
        finally:
            for name in list(there.running):
                there.kill(name)
        lines = [json.loads(line) for line in (out / "traffic.jsonl").read_text().splitlines()]
        weights = load_model(next((out / "models").iterdir())).state_dict()
    lines = [line for line in lines if line["kind"] == "train"]
    figures = {f"bytes_{way}": sum(line[way] for line in lines) / CLIENTS for way in ("down", "up")}
    figures |= {"messages": len(lines), "seconds": [line["seconds"] for line in lines], "load": os.getloadavg()[0]}
    return figures, weights


def main():
    """One file: both rounds, and the largest difference between their means."""
    machines.PATIENCE = 1800
    (plain, theirs), (secure, mine) = run(False), run(True)
    floats = [name for name, tensor in theirs.items() if tensor.is_floating_point()]
    gap = max((mine[name] - theirs[name]).abs().max().item() for name in floats)
    summary = {"plain": plain, "secure": secure, "largest_gap": gap, "weights": sum(theirs[n].numel() for n in floats)}
    parameters = {"config": CONFIG, "condition": "secagg"}
    result = {"label": "secagg", "parameters": parameters, "summary": summary, "provenance": provenance("cpu")}
    save_result(RESULTS / "laptop" / "leaks" / "secagg.json", result)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
