"""The Flower app. Run by `make flower`, in an environment of its own; elsewhere flwr is absent and all is skipped."""

import json
import math
import re
import threading
import time
from dataclasses import asdict, fields
from pathlib import Path
from uuid import uuid4

import pytest
import tomllib
import torch

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.config import flatten_dict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from mllmfl_lite import flower_app
from mllmfl_lite.federated.methods import FedSettings
from mllmfl_lite.flower_app import RUN_KEYS, GridClients, read_experiment, record_of, state_from
from mllmfl_lite.models import load_model
from mllmfl_lite.runs.experiment import Experiment, run_experiment
from mllmfl_lite.stages.align import AlignSettings


@pytest.fixture(autouse=True)
def _a_task(monkeypatch):
    """Messages belong to a run; outside Flower's own processes there is none."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


CONFIG = {
    "dataset": "cifar10_mini", "num_clients": 4, "width": 2, "settings.rounds": 2, "settings.clients_per_round": 2,
    "settings.local_epochs": 1, "settings.report_rounds": 1, "settings.seed": 3, "wait": 0, "timeout": 1,
}  # fmt: skip


class InProcess:
    """A grid whose nodes are calls: node 100 + k is client k. `spoil` may change a reply, or return None for none."""

    def __init__(self, config, clients=4, spoil=lambda client, round_, reply: reply):
        self.config, self.spoil, self.nodes, self.rounds = config, spoil, [100 + k for k in range(clients)], []
        self.replies = {}

    def get_node_ids(self):
        return self.nodes

    def push_messages(self, messages):
        for message in messages:
            name = str(uuid4())
            message.metadata.__dict__["_message_id"] = name
            reply = self.answer(message, message.metadata.dst_node_id)
            if reply is not None:
                reply.metadata.__dict__["_reply_to_message_id"] = name
                self.replies[name] = reply
        return [message.metadata.message_id for message in messages]

    def answer(self, message, node):
        context = Context(1, node, {"partition-id": node % 100}, RecordDict(), self.config)
        try:
            reply = flower_app.client(message, context)
        except Exception as error:
            reply = Message(Error(0, str(error)), reply_to=message)
        if message.metadata.message_type != "train":
            return reply
        round_ = message.content["round"]["round"]
        self.rounds.append((round_, node % 100))
        return self.spoil(node % 100, round_, reply)

    def pull_messages(self, message_ids):
        return [self.replies.pop(name) for name in message_ids if name in self.replies]


def run(tmp_path, grid):
    config = {**grid.config, "folder": str(tmp_path)}
    flower_app.server(grid, Context(1, 0, {}, RecordDict(), config))
    (path,) = tmp_path.glob("*.json")
    return path


# ------------------------------------------------------------------------------------------------ the experiment


def test_a_config_is_an_experiment():
    experiment = read_experiment({**CONFIG, "align.per_class": 7, "method": "fedprox", "method_options.mu": 0.5})
    settings = FedSettings(2, 2, 1, report_rounds=1, seed=3)
    assert experiment == Experiment(
        "cifar10_mini", num_clients=4, width=2, method="fedprox", method_options={"mu": 0.5}, settings=settings,
        align=AlignSettings(per_class=7, seed=3),
    )  # fmt: skip
    assert read_experiment({}) == Experiment()
    assert read_experiment({"imbalance_factor": 50.5}).imbalance_factor == 50.5
    assert read_experiment({"align.per_class": 7, "stage3": False}).align is None
    assert read_experiment({"method_options": '{"mu": 0.5}', "method_options.nu": 1}).method_options == {
        "mu": 0.5,
        "nu": 1,
    }


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_client": 4}, "unknown key 'num_client'; known are"),
        ({"settings.round": 4}, "unknown key 'settings.round'"),
        ({"settings": 4}, "unknown key 'settings'"),
        ({"num_clients": "4"}, "num_clients must be of type int; the run's config has '4'"),
        ({"method_options": "mu=0.5"}, r"must be a JSON object, such as '{\"mu\": 0.1}' \(Expecting"),
        ({"method_options": "[1]"}, r"must be a JSON object, such as .*; it is '\[1\]'"),
        ({"settings.rounds": True}, "settings.rounds must be of type int"),
        ({"timeout": "soon"}, "timeout must be of type float; the run's config has 'soon'"),
        ({"settings.rounds": 0}, "rounds must be a whole number"),
    ],
)
def test_a_wrong_config_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        read_experiment(wrong)


def apps_own_config():
    text = (Path(__file__).parent.parent / "flower" / "pyproject.toml").read_text()
    return flatten_dict(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])


def test_the_apps_own_config_names_every_key():
    """Flower refuses a key on the command line that the app's own config lacks."""
    own = apps_own_config()
    assert read_experiment(own).settings.rounds == 20 and read_experiment(own).align is None
    assert read_experiment({**own, "stage3": True}).align == AlignSettings()
    names = {field.name for field in fields(Experiment)} - {"settings", "align"}
    names |= {f"settings.{field.name}" for field in fields(FedSettings)}
    names |= {f"align.{field.name}" for field in fields(AlignSettings)} - {"align.seed", "align.without"}
    assert set(own) == names | set(RUN_KEYS)
    assert {key: own[key] for key in RUN_KEYS} == {**RUN_KEYS, "stage3": False}


def test_tensors_travel_to_the_bit():
    state = {
        "w": torch.randn(3, 4, 3, 3).to(memory_format=torch.channels_last), "n": torch.tensor(7),
        "odd": torch.tensor([-0.0, 1e-45, math.inf]), "e": torch.empty(0, 5),
    }  # fmt: skip
    back = state_from(record_of(state))
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert back[name].contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes()


# ------------------------------------------------------------------------------------------------ equality

MORE = [
    {}, {"method": "fedprox"}, {"method": "fedavgm"}, {"method": "creff", "method_options.head_epochs": 2},
    {
        "start": "dwp_linear", "settings.seed": 1, "width": 16,
        "align.teacher": "clip", "align.per_class": 4, "align.epochs": 1,
    },
]  # fmt: skip


@pytest.mark.parametrize("more", MORE, ids=lambda more: more.get("method", more.get("start", "fedavg")))
def test_it_is_the_in_process_run_to_the_bit(tmp_path, more):
    config = {**CONFIG, **more}
    path = run(tmp_path / "flower", InProcess(config))
    plain = run_experiment(read_experiment(config), tmp_path / "plain", "cpu")
    there = json.loads(path.read_text())
    assert there["summary"] == plain["summary"] and there["parameters"] == asdict_json(read_experiment(config))
    assert there.get("aligned") == plain.get("aligned") and ("aligned" in there) == ("start" in more)
    for kept in (tmp_path / "plain" / "models").iterdir():
        mine, theirs = (
            load_model(kept).state_dict(),
            load_model(tmp_path / "flower" / "models" / kept.name).state_dict(),
        )
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def asdict_json(experiment):
    return json.loads(json.dumps(asdict(experiment)))


# ------------------------------------------------------------------------------------------------ faults


def poison(change):
    """Client 0's answers, changed."""

    def spoil(client, round_, reply):
        if client == 0:
            change(reply.content)
        return reply

    return spoil


def set_state(change):
    def of(content):
        state = state_from(content["state"])
        change(state)
        content["state"] = ArrayRecord(torch_state_dict=state)

    return of


FAULTS = {
    "nan": (set_state(lambda s: s["head.bias"].fill_(math.nan)), "not finite"),
    "shape": (set_state(lambda s: s.update({"head.bias": torch.zeros(11)})), r"head.bias is torch.float32 \(11,\)"),
    "type": (set_state(lambda s: s.update({"head.bias": torch.zeros(10, dtype=torch.float64)})), "float64"),
    "names": (set_state(lambda s: s.pop("head.bias")), "other names: .'head.bias'"),
    "size": (lambda c: c["told"].update({"images": 10**9}), "says it has 1000000000 images, the split says"),
    "loss": (lambda c: c["told"].update({"loss": math.inf}), "not finite"),
    "missing": (lambda c: c.pop("told"), r"cannot be read \(KeyError"),
    "kind": (lambda c: c.update({"told": ConfigRecord({"loss": "low", "images": 3})}), "cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_answer_is_left_out_and_named(tmp_path, caplog, fault):
    """All clients are drawn; the run goes on without client 0, as if it were not there."""
    change, says = FAULTS[fault]
    config = {**CONFIG, "settings.clients_per_round": 4, "settings.rounds": 1}
    result = json.loads(run(tmp_path, InProcess(config, spoil=poison(change))).read_text())
    (record,) = result["history"]
    assert record["clients"] == [1, 2, 3] and list(record["left_out"]) == ["0"]
    assert re.search(says, record["left_out"]["0"]), record["left_out"]
    assert "round 1: client 0 is left out" in caplog.text
    calm = json.loads(
        run(tmp_path / "other", InProcess(config, spoil=lambda c, r, reply: None if c == 0 else reply)).read_text()
    )
    assert calm["history"][0]["metrics"] == record["metrics"]
    assert "no answer within 1 seconds" in calm["history"][0]["left_out"]["0"]


def test_what_comes_beside_the_weights_must_be_finite_too(tmp_path):
    def spoil(client, round_, reply):
        if client == 0:
            beside = state_from(reply.content["beside"])
            beside["gradients"][0] = math.nan
            reply.content["beside"] = record_of(beside)
        return reply

    more = {"method": "creff", "method_options.head_epochs": 1, "method_options.match_steps": 1}
    config = {**CONFIG, **more, "settings.clients_per_round": 4, "settings.rounds": 1}
    result = json.loads(run(tmp_path, InProcess(config, spoil=spoil)).read_text())
    assert result["history"][0]["left_out"] == {"0": "it sent a number that is not finite"}


BESIDE = {
    "shape": (lambda b: b.update({"gradients": b["gradients"][:, :3]}), "gradients must be torch.float32"),
    "range": (lambda b: b["classes"].fill_(10), "classes must be whole numbers from 0 to 9"),
    "twice": (lambda b: b["classes"].fill_(b["classes"][0]), "a class stands twice; each has one vote"),
    "missing": (lambda b: b.pop("classes"), "classes and gradients are wanted"),
    "floats": (lambda b: b.update({"classes": b["classes"].float()}), "classes must be whole numbers"),
    "type": (lambda b: b.update({"gradients": b["gradients"].double()}), "it sent torch.float64"),
}


@pytest.mark.parametrize("fault", BESIDE)
def test_what_comes_beside_the_weights_must_be_the_methods(tmp_path, caplog, fault):
    change, says = BESIDE[fault]

    def of(content):
        beside = state_from(content["beside"])
        change(beside)
        content["beside"] = record_of(beside)

    more = {"method": "creff", "method_options.head_epochs": 1, "method_options.match_steps": 1}
    config = {**CONFIG, **more, "settings.clients_per_round": 4, "settings.rounds": 1}
    (record,) = json.loads(run(tmp_path, InProcess(config, spoil=poison(of))).read_text())["history"]
    assert record["clients"] == [1, 2, 3] and says in record["left_out"]["0"]
    assert "client 0 is left out: beside its weights" in caplog.text


def test_fedavg_has_nothing_beside_the_weights(tmp_path):
    spoil = poison(lambda content: content.update({"beside": record_of({"more": torch.zeros(3)})}))
    config = {**CONFIG, "settings.clients_per_round": 4}
    record, _ = json.loads(run(tmp_path, InProcess(config, spoil=spoil)).read_text())["history"]
    assert "FedAvg has nothing beside the weights; it sent ['more']" in record["left_out"]["0"]


class Late(InProcess):
    """Client 0 answers after 1.5 seconds, client 3 connects after two."""

    def __init__(self, config):
        super().__init__(config, clients=3)
        self.ready = {}
        threading.Timer(2, self.nodes.append, [103]).start()

    def push_messages(self, messages):
        names = super().push_messages(messages)
        late = [m.metadata.dst_node_id == 100 and m.metadata.message_type == "train" for m in messages]
        self.ready |= {name: time.monotonic() + 1.5 * slow for name, slow in zip(names, late, strict=True)}
        return names

    def pull_messages(self, message_ids):
        return super().pull_messages([name for name in message_ids if self.ready[name] <= time.monotonic()])


def test_an_answer_that_comes_too_late_is_not_listened_to(tmp_path):
    config = {**CONFIG, "settings.clients_per_round": 4, "settings.rounds": 1, "wait": 20, "timeout": 1}
    (record,) = json.loads(run(tmp_path, Late(config)).read_text())["history"]
    assert record["clients"] == [1, 2, 3] and record["left_out"] == {"0": "no answer within 1 seconds"}


def test_a_node_that_does_not_say_who_it_is_is_no_client(caplog):
    class Silent(InProcess):
        def answer(self, message, node):
            return Message(RecordDict(), reply_to=message) if node == 100 else super().answer(message, node)

    assert GridClients(Silent(CONFIG), [1] * 4, 5, 0)._connected() == {1: 101, 2: 102, 3: 103}
    assert "a node says it is client None" in caplog.text


def test_a_node_that_is_no_client_is_named(caplog):
    grid = InProcess(CONFIG, clients=5)  # the split has four
    ask = GridClients(grid, [1] * 4, 5, 0)
    assert ask._connected() == {0: 100, 1: 101, 2: 102, 3: 103}
    assert "a node says it is client 4; clients are 0 to 3" in caplog.text and 4 not in ask._client_of.values()


def test_a_client_that_fails_says_why(tmp_path):
    def fail(client, round_, reply):
        return Message(Error(0, "out of memory"), reply_to=reply) if client == 0 else reply

    config = {**CONFIG, "settings.clients_per_round": 4, "settings.rounds": 1}
    result = json.loads(run(tmp_path, InProcess(config, spoil=fail)).read_text())
    assert result["history"][0]["left_out"] == {"0": "its part failed: out of memory"}


def test_nobody_answers_and_the_weights_stay(tmp_path):
    result = json.loads(run(tmp_path, InProcess(CONFIG, spoil=lambda *_: None)).read_text())
    assert [record["clients"] for record in result["history"]] == [[], []]
    assert [record["train_loss"] for record in result["history"]] == [None, None]
    experiment = read_experiment(CONFIG)
    start = experiment.build_model(10).state_dict()
    kept = load_model(next((tmp_path / "models").iterdir())).state_dict()
    assert all(torch.equal(start[name], kept[name]) for name in start)


def test_a_client_that_is_not_connected_is_waited_for_then_left_out(tmp_path):
    config = {**CONFIG, "settings.clients_per_round": 4, "settings.rounds": 1, "wait": 1}
    result = json.loads(run(tmp_path, InProcess(config, clients=3)).read_text())
    assert result["history"][0]["left_out"] == {"3": "no node with partition-id=3 is connected"}


def test_a_node_that_comes_back_takes_its_place():
    grid = InProcess(CONFIG)
    ask = GridClients(grid, [1] * 4, 5, 0)
    assert ask._connected() == {0: 100, 1: 101, 2: 102, 3: 103}
    grid.nodes = [100, 101, 102, 203]
    assert ask._connected() == {0: 100, 1: 101, 2: 102, 3: 203} and 103 not in ask._client_of


class Interrupted(InProcess):
    """When client 1 is first asked to train, its node dies without an answer, and `then` happens."""

    def __init__(self, config, then):
        super().__init__(config)
        self.then, self.killed = then, False

    def answer(self, message, node):
        if node == 101 and message.metadata.message_type == "train" and not self.killed:
            self.killed = True
            return self.then(self, message)
        return super().answer(message, node)


def comes_back_as_another(grid, message):
    grid.nodes.append(201)  # the SuperLink has not noticed yet that the old one is gone


def is_missed_and_comes_back(grid, message):
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, "no heartbeat"), reply_to=message)  # same key, same node


def comes_back_while_it_is_missed(grid, message):
    grid.nodes.remove(101)
    threading.Timer(1.0, grid.nodes.append, [201]).start()
    return Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "removed"), reply_to=message)


@pytest.mark.parametrize("then", [comes_back_as_another, is_missed_and_comes_back, comes_back_while_it_is_missed])
def test_who_comes_back_in_mid_round_is_asked_again(tmp_path, then):
    config = {**CONFIG, "settings.clients_per_round": 4, "settings.rounds": 1, "wait": 30, "timeout": 30}
    grid = Interrupted(config, then)
    there = json.loads(run(tmp_path / "flower", grid).read_text())
    assert grid.killed and [record["clients"] for record in there["history"]] == [[0, 1, 2, 3]]
    plain = run_experiment(read_experiment(config), tmp_path / "plain", "cpu")
    assert there["summary"] == plain["summary"]


def test_who_is_gone_and_stays_away_is_waited_for_then_left_out(tmp_path):
    def leaves(grid, message):
        grid.nodes.remove(101)
        return Message(Error(ErrorCode.NODE_UNAVAILABLE, "no heartbeat"), reply_to=message)

    config = {**CONFIG, "settings.clients_per_round": 4, "settings.rounds": 1, "wait": 1, "timeout": 60}
    result = json.loads(run(tmp_path, Interrupted(config, leaves)).read_text())
    assert result["history"][0]["left_out"] == {"1": "no node with partition-id=1 is connected"}
    assert 1 < result["history"][0]["seconds"] < 30


def test_a_node_that_cannot_say_who_it_is_is_asked_once_a_round():
    class Mute(InProcess):
        asked = 0

        def answer(self, message, node):
            if node == 103:
                self.asked += 1
                return Message(Error(0, "no partition-id"), reply_to=message)
            return super().answer(message, node)

    grid = Mute(CONFIG)
    ask = GridClients(grid, [1] * 4, 5, 2)
    replies, asked = ask._replies([3], {})
    assert (replies, asked, grid.asked) == ({}, {}, 1)
    ask._replies([3], {})
    assert grid.asked == 2


def test_a_message_that_cannot_be_sent_is_sent_later():
    class Full(InProcess):
        refused = 0

        def push_messages(self, messages):
            if messages and messages[0].metadata.message_type == "train" and not self.refused:
                self.refused += 1
                return [None] * len(messages)
            return super().push_messages(messages)

    grid = Full(CONFIG)
    replies, asked = GridClients(grid, [1] * 4, 5, 5)._replies([1], {"round": ConfigRecord({"round": 1})})
    assert grid.refused == 1 and list(replies) == [1] and asked == {1: 101}


def test_a_killed_server_goes_on_where_it_was(tmp_path):
    class Stop(Exception):
        pass

    def stop(client, round_, reply):
        if round_ == 2:
            raise Stop
        return reply

    with pytest.raises(Stop):
        run(tmp_path / "stopped", InProcess(CONFIG, spoil=stop))
    again = InProcess(CONFIG)
    path = run(tmp_path / "stopped", again)
    assert {round_ for round_, _ in again.rounds} == {2}, "the first round was not asked for again"
    whole = run(tmp_path / "whole", InProcess(CONFIG))
    left, right = (json.loads(p.read_text()) for p in (path, whole))
    assert left["summary"] == right["summary"]
