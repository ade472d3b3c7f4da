"""The Flower app on real processes: a SuperLink and SuperNodes on this machine, killed, refused, simulated.

Run by `make flower`; where flwr is absent all is skipped.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from machines import PATIENCE, Machines

pytest.importorskip("flwr")
if shutil.which("flower-superlink", path=str(Path(sys.executable).parent)) is None:
    pytest.skip("this flwr has no flower-superlink", allow_module_level=True)

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "flower"))

import app  # noqa: E402
from run_config import read_config  # noqa: E402
from test_flower_app import check_mean  # noqa: E402

from mllmfl_lite.models import build_model, load_model, save_model  # noqa: E402
from mllmfl_lite.runs import run_experiment  # noqa: E402

CONFIG = {
    "dataset": "cifar10_mini", "num_clients": 3, "width": 2, "federated.rounds": 2, "federated.clients_per_round": 3,
    "federated.local_epochs": 1, "federated.report_rounds": 1, "federated.eval_every": 2, "timeout": 300, "wait": 120,
}  # fmt: skip
ONE_ROUND = {"federated.rounds": 1, "federated.eval_every": 1}


@pytest.fixture
def machines(tmp_path):
    there = Machines(tmp_path)
    yield there
    for name in list(there.running):
        there.kill(name)


def without(left_out: set[tuple[int, int]], config: dict):
    """In-process clients, of which some say nothing in some rounds: (round, client)."""
    step = app.open_client(json.dumps(config))

    def ask(state, received, round_, chosen):
        present = [client for client in chosen if (round_, client) not in left_out]
        return {client: step(state, received, round_, client)[0] for client in present}, {}

    return ask


def compare_with_in_process(folder: Path, tmp_path: Path, config: dict) -> dict:
    """The results, once it is shown that the in-process rounds without whoever was missed end with the same bits."""
    result = json.loads((folder / "fedavg_seed0.json").read_text())
    missed = {(record["round"], int(c)) for record in result["history"] for c in record.get("left_out", ())}
    plain = run_experiment(read_config(config)[0], tmp_path / "plain", "cpu", ask=without(missed, config))
    assert plain["summary"] == result["summary"] and plain.get("aligned") == result.get("aligned")
    kept = sorted(path.name for path in (tmp_path / "plain" / "models").iterdir())
    assert len(kept) == (2 if "start" in config else 1)
    for name in kept:
        mine, theirs = (load_model(f / "models" / name).state_dict() for f in (folder, tmp_path / "plain"))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    return result


def test_a_node_that_is_killed_in_mid_round_and_comes_back_takes_part_in_the_next(machines, tmp_path):
    out = tmp_path / "out"
    machines.superlink()
    for client in range(3):
        machines.supernode(client)
    machines.run({**CONFIG, "folder": str(out)})
    machines.wait_for(lambda: machines.says("node1", "Receiving: train message"), "client 1's first round")
    machines.kill("node1")
    machines.supernode(1)
    machines.wait_for(lambda: (out / "fedavg_seed0.json").exists(), "the results")
    first, second = compare_with_in_process(out, tmp_path, CONFIG)["history"]
    assert first["clients"] == [0, 2] and list(first["left_out"]) == ["1"] and second["clients"] == [0, 1, 2]


def test_with_tls_only_nodes_with_registered_keys_take_part(machines, tmp_path):
    if not (shutil.which("openssl") and shutil.which("ssh-keygen")):
        pytest.skip("no openssl or no ssh-keygen to make certificates and keys with")
    machines.tls = certificates(tmp_path)
    config, out = {**CONFIG, **ONE_ROUND, "wait": 20}, tmp_path / "out"
    machines.superlink("--enable-supernode-auth")
    for client in range(3):
        key = f"ssh-keygen -q -t ecdsa -b 384 -C client{client} -f client{client}.key -N"
        subprocess.run([*key.split(), ""], cwd=tmp_path, check=True)
    for client in (0, 1):
        machines.flwr("supernode", "register", f"client{client}.key.pub", "here")
    for client in range(3):
        machines.supernode(client, "--auth-supernode-private-key", f"client{client}.key")
    machines.supernode(3)  # without any key
    for client in (2, 3):
        assert machines.running[f"node{client}"].wait(PATIENCE) != 0
    machines.wait_for(lambda: machines.says("node0", "SuperNode ID") and machines.says("node1", "SuperNode ID"), "both")
    machines.run({**config, "folder": str(out)})
    machines.wait_for(lambda: (out / "fedavg_seed0.json").exists(), "the results")
    (record,) = compare_with_in_process(out, tmp_path, config)["history"]
    assert record["clients"] == [0, 1] and record["left_out"] == {"2": "no node with partition-id=2 is connected"}
    assert machines.says("node2", "Failed to activate SuperNode")
    assert machines.says("node3", "SuperNode authentication is enabled")


def test_with_secagg_the_mean_is_that_of_fedavg_on_real_processes(machines, tmp_path):
    config, out = {**CONFIG, **ONE_ROUND}, tmp_path / "out"
    machines.superlink()
    for client in range(3):
        machines.supernode(client)
    machines.run({**config, "secure": True, "folder": str(out)})
    machines.wait_for(lambda: (out / "fedavg_seed0.json").exists(), "the results")
    (record,) = json.loads((out / "fedavg_seed0.json").read_text())["history"]
    assert record["clients"] == [0, 1, 2]
    run_experiment(read_config(config)[0], tmp_path / "plain", "cpu")
    mine, plain = (load_model(next((f / "models").iterdir())).state_dict() for f in (out, tmp_path / "plain"))
    check_mean(mine, plain)


def test_in_simulation_all_three_stages_are_the_in_process_ones(machines, tmp_path):
    pytest.importorskip("ray")
    save_model(tmp_path / "start.safetensors", build_model("resnet8", 7, 2, seed=9), "resnet8", 2)
    more = {
        "stages": "1,2,3", "start": str(tmp_path / "start.safetensors"), "align.teacher": "clip",
        "align.per_class": 4, "align.epochs": 1, "pool_images": 300,
    }  # fmt: skip
    config, out = {**CONFIG, **ONE_ROUND, **more}, tmp_path / "out"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as short:  # a socket's path has at most 107 letters
        machines.environment["RAY_TMPDIR"] = short
        machines.superlink("--simulation")
        simulated = "num-supernodes=3 client-resources-num-cpus=1"
        machines.run({**config, "folder": str(out)}, "--federation-config", simulated)
        machines.wait_for(lambda: (out / "fedavg_seed0.json").exists(), "the results")
        machines.wait_for(lambda: machines.says("superlink", "Finished task"), "the end")
    result = compare_with_in_process(out, tmp_path, config)
    assert [record["clients"] for record in result["history"]] == [[0, 1, 2]]


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
