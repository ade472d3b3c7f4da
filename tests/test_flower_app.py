"""The Flower app without processes. Run by `make flower`, in an environment of its own; elsewhere flwr is absent."""

import copy
import json
import math
import re
import sys
from importlib import metadata
from pathlib import Path
from uuid import uuid4

import pytest
import torch

pytest.importorskip("flwr")
if not (1, 42) <= tuple(map(int, metadata.version("flwr").split(".")[:2])) < (2, 0):
    pytest.skip("made for flwr 1.42 and later of version 1", allow_module_level=True)
TaskIdentity = pytest.importorskip("flwr.supercore.task_identity", reason="this flwr is too new").TaskIdentity

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict  # noqa: E402
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS  # noqa: E402

sys.path.append(str(Path(__file__).parent.parent / "flower"))

import app  # noqa: E402
import secure  # noqa: E402
from run_config import read_config  # noqa: E402

from mllmfl_lite.models import build_model, load_model, save_model  # noqa: E402
from mllmfl_lite.runs import run_experiment  # noqa: E402

CONFIG = {
    "dataset": "cifar10_mini", "num_clients": 4, "width": 2, "seed": 3, "federated.rounds": 2,
    "federated.clients_per_round": 2, "federated.local_epochs": 1, "federated.report_rounds": 1, "wait": 0,
}  # fmt: skip
ALL_ONCE = {**CONFIG, "federated.clients_per_round": 4, "federated.rounds": 1}


@pytest.fixture(autouse=True)
def _a_task(monkeypatch):
    """Messages belong to a run; outside Flower's own processes there is none."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class InProcess:
    """A grid whose nodes are calls: node 100 + k is client k. `spoil` may change a result, or return None for none."""

    def __init__(self, config, clients=4, spoil=lambda client, round_, reply: reply):
        self.config, self.spoil, self.rounds = config, spoil, []
        self.number = {100 + k: k for k in range(clients)}

    def get_node_ids(self):
        return list(self.number)

    def send_and_receive(self, messages, *, timeout):
        replies = []
        for message in messages:
            assert message.metadata.ttl == timeout
            message.metadata.__dict__["_message_id"] = str(uuid4())
            reply = self.answer(message, message.metadata.dst_node_id)
            if reply is not None:
                reply.metadata.__dict__["_reply_to_message_id"] = message.metadata.message_id
                replies.append(reply)
        return replies

    def answer(self, message, node):
        context = Context(1, node, {"partition-id": self.number[node]}, RecordDict(), self.config)
        try:
            reply = app.client(message, context)
        except Exception as error:
            reply = Message(Error(0, str(error)), reply_to=message)
        if message.metadata.message_type != "train":
            return reply
        self.rounds.append(message.content["round"]["round"])
        return self.spoil(self.number[node], self.rounds[-1], reply)


def run(tmp_path, grid):
    app.server(grid, Context(1, 0, {}, RecordDict(), {**grid.config, "folder": str(tmp_path)}))
    (path,) = tmp_path.glob("*.json")
    return json.loads(path.read_text())


def nodes_of(grid, wait=0):
    return app.Nodes(grid, [1] * 4, 5.0, wait)


def test_tensors_travel_to_the_bit():
    state = {
        "w": torch.randn(3, 4, 3, 3).to(memory_format=torch.channels_last), "n": torch.tensor(7),
        "odd": torch.tensor([-0.0, 1e-45, math.inf]), "e": torch.empty(0, 5),
    }  # fmt: skip
    back = app.tensors(ArrayRecord(state))
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert back[name].contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "fedavgm", "creff", "three stages"])
def test_it_is_the_in_process_run_to_the_bit(tmp_path, method):
    save_model(tmp_path / "start.safetensors", build_model("resnet8", 7, 2, seed=9), "resnet8", 2)
    more = {"method": method} | (
        {"method_options": '{"head_epochs": 2, "match_steps": 2}'} if method == "creff" else {}
    )
    if method == "three stages":
        more = {"stages": "1,2,3", "start": str(tmp_path / "start.safetensors"), "align.teacher": "clip",
                "align.per_class": 4, "align.epochs": 1, "pool_images": 300}  # fmt: skip
    there = run(tmp_path / "flower", InProcess({**CONFIG, **more}))
    here = run_experiment(read_experiment({**CONFIG, **more}), tmp_path / "plain", "cpu")
    for key in ("parameters", "summary", "data", "aligned"):
        assert there.get(key) == json.loads(json.dumps(here.get(key)))
    kept = sorted((tmp_path / "plain" / "models").iterdir())
    assert len(kept) == (2 if method == "three stages" else 1)
    for path in kept:
        mine, other = (load_model(p).state_dict() for p in (path, tmp_path / "flower" / "models" / path.name))
        assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("traffic", [False, True])
def test_traffic_is_noted_on_demand(tmp_path, traffic):
    """Four clients get and send the weights: at least their bytes, at most as much again for names and figures."""
    run(tmp_path, InProcess({**ALL_ONCE, "width": 16, "traffic": traffic}))
    assert (tmp_path / "traffic.jsonl").exists() == traffic
    if traffic:
        notes = [json.loads(line) for line in (tmp_path / "traffic.jsonl").read_text().splitlines()]
        (note,) = [note for note in notes if note["kind"] == "train"]
        weights = 4 * sum(t.nbytes for t in load_model(next((tmp_path / "models").iterdir())).state_dict().values())
        assert note["messages"] == 4 and all(weights <= note[way] <= 2 * weights for way in ("down", "up"))


def read_experiment(config):
    return read_config(config)[0]


# ------------------------------------------------------------------------------------------------ SecAgg+


class Kept(InProcess):
    """Nodes that keep their context from message to message, as SecAgg+ needs; `late` says nothing at this stage."""

    def __init__(self, config, late=None):
        super().__init__({**config, "secure": True})
        self.late, self.replies = late, []
        self.context = {
            node: Context(1, node, {"partition-id": client}, RecordDict(), self.config)
            for node, client in self.number.items()
        }

    def send_and_receive(self, messages, *, timeout):
        for message in messages:
            message.metadata.ttl = timeout
        return super().send_and_receive(messages, timeout=timeout)

    def answer(self, message, node):
        message.content = copy.deepcopy(message.content)  # each node gets bytes of its own
        if (self.number[node], message.content.config_records.get(RECORD_KEY_CONFIGS, {}).get("stage")) == self.late:
            return None
        try:
            self.replies.append(app.client(message, self.context[node]))
        except Exception as error:
            self.replies.append(Message(Error(0, str(error)), reply_to=message))
        return self.replies[-1]


def check_mean(mine, plain):
    """SecAgg+'s mean is FedAvg's within what rounding may move it, for clients with equally many images.

    Each client rounds each number to a neighbour among `LEVELS` between -LARGEST and LARGEST, so by less than a step.
    So the mean moves by less than a step. Equal shares are 1 exactly. Both means are written as float32, each off by up
    to half a unit in the last place.
    """
    step, unit = 2 * secure.LARGEST / secure.LEVELS, torch.finfo(torch.float32).eps
    names = [name for name, tensor in plain.items() if tensor.is_floating_point()]
    for name in names:
        gap = (mine[name].double() - plain[name].double()).abs()
        assert (gap <= step + unit * plain[name].double().abs()).all(), name
    assert any((mine[name] != plain[name]).any() for name in names), "nothing was rounded: was it masked at all?"


@pytest.mark.parametrize("late", [None, (2, "collect_masked_vectors"), (2, "unmask")])
def test_with_secagg_the_mean_is_that_of_fedavg(tmp_path, late):
    """A client that is late before its masked weights arrive is not in the mean; one that is late after them is."""
    grid = Kept(ALL_ONCE, late)
    (record,) = run(tmp_path / "secure", grid)["history"]
    gone = {2} if late and late[1] != "unmask" else set()
    assert set(record["clients"]) == {0, 1, 2, 3} - gone
    plain = InProcess(ALL_ONCE, spoil=lambda client, _, reply: None if client in gone else reply)
    run(tmp_path / "plain", plain)
    mine, theirs = (load_model(next((tmp_path / of / "models").iterdir())) for of in ("secure", "plain"))
    check_mean(mine.state_dict(), theirs.state_dict())
    assert all(t == 0 for t in mine.state_dict().values() if not t.is_floating_point()), "counters stay the server's"
    for reply in grid.replies:  # no weights in clear
        assert reply.has_error() or not any(len(r) for r in reply.content.array_records.values())


def test_secagg_rounds_finely_and_a_thousand_clients_do_not_overflow():
    assert 2 * secure.LARGEST / secure.LEVELS < 1e-4 and 1000 * secure.LEVELS < 2**32


@pytest.mark.parametrize("method", ["median", "creff", "fedyoyo"])
def test_secagg_refuses_methods_that_need_more_than_the_mean(tmp_path, method):
    with pytest.raises(ValueError, match="the server learns the mean of the weights alone"):
        run(tmp_path, Kept({**ALL_ONCE, "method": method}))


def test_secagg_without_a_clients_keys_ends_the_round(tmp_path):
    """Flower's workflow cannot remove the masks of a client that is lost before it has shared its keys."""
    with pytest.raises(ValueError, match="no client sent a sound result"):
        run(tmp_path, Kept(ALL_ONCE, (2, "share_keys")))


def test_secagg_cuts_off_no_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(secure, "LARGEST", 0.25)
    with pytest.raises(ValueError, match="no client sent a sound result"):
        run(tmp_path, grid := Kept(ALL_ONCE))
    assert all("would cut off a weight" in reply.error.reason for reply in grid.replies if reply.has_error())


# ------------------------------------------------------------------------------------------------ faults


def change(**records):
    """Spoil client 0's reply: replace records, or take them out (None)."""

    def spoil(client, round_, reply):
        for name, record in records.items() if client == 0 else ():
            reply.content.pop(name)
            if record is not None:
                reply.content[name] = record
        return reply

    return spoil


def fail(client, round_, reply):
    return Message(Error(0, "out of memory"), reply_to=reply) if client == 0 else reply


FAULTS = {
    "silent": (lambda client, round_, reply: reply if client else None, "no answer within 600 seconds"),
    "failed": (fail, "its part failed: out of memory"),
    "shape": (change(state=ArrayRecord({"w": torch.zeros(3)})), "its weights have other names"),
    "size": (change(figures=ConfigRecord({"loss": 1.0, "images": 10**9})), "it says it has 1000000000 images"),
    "missing": (change(figures=None), r"its answer is wrong: KeyError"),
    "kind": (change(state=ConfigRecord({"loss": 3})), "its answer is wrong"),
    "loss": (change(figures=ConfigRecord({"loss": "low", "images": 1})), "it says it has 1 images"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_answer_is_left_out_and_named(tmp_path, caplog, fault):
    """All clients are drawn; the run goes on without client 0, as if it were not there."""
    spoil, reason = FAULTS[fault]
    (record,) = run(tmp_path, InProcess(ALL_ONCE, spoil=spoil))["history"]
    assert record["clients"] == [1, 2, 3] and list(record["left_out"]) == ["0"]
    assert re.search(reason, record["left_out"]["0"]), record["left_out"]
    assert "round 1: client 0 is left out" in caplog.text


def test_who_is_not_connected_is_waited_for_then_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "PAUSE", 0.01)
    (record,) = run(tmp_path, InProcess({**ALL_ONCE, "wait": 0.05}, clients=3))["history"]
    assert record["left_out"] == {"3": "no node with partition-id=3 is connected"}


def test_who_connects_late_is_waited_for(monkeypatch):
    grid = InProcess(CONFIG, clients=3)
    monkeypatch.setattr(app.time, "sleep", lambda seconds: grid.number.update({103: 3}))
    nodes = nodes_of(grid, wait=60)
    nodes._connect([0, 3])
    assert nodes.node_of == {0: 100, 1: 101, 2: 102, 3: 103}


def test_a_node_that_is_no_client_is_named(caplog):
    """The split has four clients. Node 104 says it is a fifth, 105 says nothing of use, 106 has client 1's number."""

    class Odd(InProcess):
        def answer(self, message, node):
            return Message(RecordDict(), reply_to=message) if node == 105 else super().answer(message, node)

    grid = Odd(CONFIG)
    grid.number |= {104: 4, 105: 5, 106: 1}
    nodes = nodes_of(grid)
    nodes._connect([0])
    assert nodes.node_of == {0: 100, 1: 101, 2: 102, 3: 103}
    assert "node 104 is left out: it says it is client 4; clients are 0 to 3" in caplog.text
    assert "node 105 is left out: it does not say which client it is; start it with partition-id=0" in caplog.text
    assert "node 106 is left out: it says it is client 1, which is node 101" in caplog.text


def test_a_node_that_comes_back_takes_part_again(tmp_path):
    """Client 1's node is gone after the first round; another one of its number is there in the third."""

    def watch(client, round_, reply):
        if client == 3 and round_ == 1:  # all have answered
            del grid.number[101]
        if client == 3 and round_ == 2:
            grid.number[201] = 1
        return reply

    grid = InProcess({**ALL_ONCE, "federated.rounds": 3}, spoil=watch)
    first, second, third = run(tmp_path, grid)["history"]
    assert first["clients"] == third["clients"] == [0, 1, 2, 3] and second["clients"] == [0, 2, 3]
    assert second["left_out"] == {"1": "no node with partition-id=1 is connected"}


def test_a_run_without_one_answer_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no client sent a sound result in round 1"):
        run(tmp_path, InProcess(CONFIG, spoil=lambda *_: None))
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.rglob("run.json"))
    assert run(tmp_path, InProcess(CONFIG))["history"][-1]["round"] == 2


def test_a_killed_server_resumes(tmp_path):
    class Stop(BaseException):
        pass

    def stop(client, round_, reply):
        if round_ == 2:
            raise Stop
        return reply

    with pytest.raises(Stop):
        run(tmp_path / "stopped", InProcess(CONFIG, spoil=stop))
    again = InProcess(CONFIG)
    resumed, whole = run(tmp_path / "stopped", again), run(tmp_path / "whole", InProcess(CONFIG))
    assert set(again.rounds) == {2} and resumed["summary"] == whole["summary"]
