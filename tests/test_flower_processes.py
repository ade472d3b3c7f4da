"""The Flower app on real processes: a SuperLink and three SuperNodes on this machine, one of them killed and restarted.

Run by `make flower`; where flwr is absent all is skipped.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")

from mllmfl_lite.experiment import run_experiment
from mllmfl_lite.flower_app import client_part, read_experiment
from mllmfl_lite.models import load_model

ROOT = Path(__file__).parent.parent
CONFIG = {
    "dataset": "cifar10_mini", "num_clients": 3, "width": 2, "settings.rounds": 4, "settings.clients_per_round": 3,
    "settings.local_epochs": 1, "settings.report_rounds": 1, "settings.eval_every": 4, "timeout": 60, "wait": 120,
}  # fmt: skip
PATIENCE = 400  # seconds for anything


class Machines:
    """Processes in groups of their own, on free ports of this machine; all are killed at the end."""

    def __init__(self, folder: Path):
        self.folder, self.running, self.tls = folder, {}, ()
        self.environment = {
            **os.environ, "FLWR_HOME": str(folder / "home"), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        self.port = free_port()

    def start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, cwd=self.folder, start_new_session=True
            )

    def superlink(self) -> None:
        secure = self.tls and (
            "--ssl-ca-certfile", self.tls[0], "--ssl-certfile", self.tls[1], "--ssl-keyfile", self.tls[2]
        )  # fmt: skip
        self.start(
            "superlink", "flower-superlink", *(secure or ["--insecure"]), "--host", "127.0.0.1", "--port",
            str(self.port), "--disable-runtime-dependency-installation",
        )  # fmt: skip
        self.wait_for(lambda: answers(self.port), "the SuperLink")

    def supernode(self, client: int) -> None:
        secure = self.tls and ("--root-certificates", self.tls[0])
        self.start(
            f"node{client}", "flower-supernode", *(secure or ["--insecure"]), "--superlink", f"127.0.0.1:{self.port}",
            "--host", "127.0.0.1", "--port", str(free_port()), "--node-config", f"partition-id={client}",
        )  # fmt: skip

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        for number in descendants(process.pid):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait(30)

    def run(self, config: dict) -> None:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        how = f'root-certificates = "{self.tls[0]}"' if self.tls else "insecure = true"
        (home / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{self.port}"\n{how}\n')
        shutil.copytree(ROOT / "flower", self.folder / "app", dirs_exist_ok=True)
        given = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        command = ["flwr", "run", "app", "here", "--run-config", given]
        options = {"env": self.environment, "cwd": self.folder, "timeout": PATIENCE, "check": False}
        done = subprocess.run(command, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stdout + done.stderr

    def wait_for(self, ready, what: str):
        give_up = time.monotonic() + PATIENCE
        while not (found := ready()):
            logs = "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in self.folder.glob("*.log"))
            assert time.monotonic() < give_up, f"no sign of {what}\n{logs}"
            time.sleep(0.2)
        return found


def descendants(pid: int) -> list[int]:
    """A process and all that it started, sessions of their own included."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    below = children.read_text().split() if children.exists() else []
    return [pid, *(number for child in below for number in descendants(int(child)))]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def machines(tmp_path):
    there = Machines(tmp_path)
    yield there
    for name in list(there.running):
        there.kill(name)


def rounds_done(folder: Path) -> int:
    return max((int(path.stem.split("-")[1]) for path in folder.rglob("weights-*.safetensors")), default=0)


def without(left_out: set[tuple[int, int]]):
    """In-process clients, of which some say nothing in some rounds: (round, client)."""

    def ask(state, received, round_, chosen):
        present = [client for client in chosen if (round_, client) not in left_out]
        own = client_part(json.dumps(CONFIG))
        return {client: own(state, received, round_, client) for client in present}, {
            client: "left out" for client in chosen if client not in present
        }

    return ask


def weights(folder: Path) -> dict:
    return load_model(next((folder / "models").glob("*-federated.safetensors"))).state_dict()


def compare_with_in_process(folder: Path, tmp_path: Path) -> dict:
    """The results, once it is shown that the in-process rounds without whoever was missed end with the same bits."""
    result = json.loads((folder / "fedavg_seed0.json").read_text())
    missed = {(record["round"], int(c)) for record in result["history"] for c in record.get("left_out", ())}
    ask = without(missed) if missed else None
    plain = run_experiment(read_experiment(CONFIG), tmp_path / "plain", "cpu", ask=ask)
    assert plain["summary"] == result["summary"]
    mine, theirs = weights(folder), weights(tmp_path / "plain")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    return {"missed": missed, **result}


def test_a_node_is_killed_and_comes_back(machines, tmp_path):
    out = tmp_path / "out"
    machines.superlink()
    for client in range(3):
        machines.supernode(client)
    machines.run({**CONFIG, "folder": str(out)})
    machines.wait_for(lambda: rounds_done(out) >= 1, "the first round")
    machines.kill("node1")
    machines.supernode(1)
    machines.wait_for(lambda: (out / "fedavg_seed0.json").exists(), "the results")
    result = compare_with_in_process(out, tmp_path)
    assert [record["round"] for record in result["history"]] == [1, 2, 3, 4]
    assert {client for _, client in result["missed"]} <= {1} and len(result["missed"]) <= 2
    assert 1 in result["history"][-1]["clients"], "it is back"


def test_with_tls(machines, tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make certificates with")
    machines.tls = certificates(tmp_path)
    config = {**CONFIG, "settings.rounds": 1, "folder": str(tmp_path / "out")}
    machines.superlink()
    for client in range(3):
        machines.supernode(client)
    machines.run(config)
    machines.wait_for(lambda: (tmp_path / "out" / "fedavg_seed0.json").exists(), "the results")
    result = json.loads((tmp_path / "out" / "fedavg_seed0.json").read_text())
    plain = run_experiment(read_experiment(config), tmp_path / "plain", "cpu")
    assert result["summary"] == plain["summary"]


def certificates(folder: Path) -> tuple[str, str, str]:
    """An authority, and the server's certificate and key: the commands of the book, for 127.0.0.1."""
    (folder / "san.txt").write_text("subjectAltName = IP:127.0.0.1, DNS:localhost\n")
    for command in (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.pem",
        "openssl req -newkey rsa:2048 -nodes -subj /CN=127.0.0.1 -keyout server.key -out server.csr",
        "openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san.txt "
        "-out server.pem",
    ):
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return tuple(str(folder / name) for name in ("ca.pem", "server.pem", "server.key"))
