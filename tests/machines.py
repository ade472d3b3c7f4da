"""Flower's programs as processes of this machine: a SuperLink, SuperNodes, runs of the app."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATIENCE = 400  # seconds for anything


class Machines:
    """Processes in groups of their own, on free ports of this machine; all are killed at the end."""

    def __init__(self, folder: Path):
        self.folder, self.running, self.tls = folder, {}, ()
        self.environment = {
            **os.environ, "FLWR_HOME": str(folder / "home"), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        self.port = free_port()

    def start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, cwd=self.folder, start_new_session=True
            )

    def superlink(self, *more: str) -> None:
        secure = self.tls and (
            "--ssl-ca-certfile", self.tls[0], "--ssl-certfile", self.tls[1], "--ssl-keyfile", self.tls[2]
        )  # fmt: skip
        self.start(
            "superlink", "flower-superlink", *(secure or ["--insecure"]), "--host", "127.0.0.1", "--port",
            str(self.port), "--disable-runtime-dependency-installation", *more,
        )  # fmt: skip
        how = f'root-certificates = "{self.tls[0]}"' if self.tls else "insecure = true"
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{self.port}"\n{how}\n')
        self.wait_for(lambda: answers(self.port), "the SuperLink")

    def supernode(self, client: int, *more: str) -> None:
        secure = self.tls and ("--root-certificates", self.tls[0])
        self.start(
            f"node{client}", "flower-supernode", *(secure or ["--insecure"]), "--superlink", f"127.0.0.1:{self.port}",
            "--host", "127.0.0.1", "--port", str(free_port()), "--node-config", f"partition-id={client}", *more,
        )  # fmt: skip

    def says(self, name: str, text: str) -> bool:
        return text in (self.folder / f"{name}.log").read_text()

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        for number in descendants(process.pid):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait(30)

    def run(self, config: dict, *more: str) -> None:
        shutil.copytree(ROOT / "flower", self.folder / "app", dirs_exist_ok=True)
        given = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        self.flwr("run", "app", "here", "--run-config", given, *more)

    def flwr(self, *command: str) -> None:
        options = {"env": self.environment, "cwd": self.folder, "timeout": PATIENCE, "check": False}
        done = subprocess.run(["flwr", *command], capture_output=True, text=True, **options)
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
