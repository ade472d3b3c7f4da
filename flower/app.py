"""The rounds on several machines as a Flower app: each node is a client, the server runs `run_experiment`.

Nodes run `client_step` as threads of one process do, so the same experiment gives the same weights, bit for bit. What
can be set stands in `pyproject.toml`; how to start everything stands in `book/operations.md`.
"""

import functools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_to_proto
from flwr.serverapp import Grid, ServerApp
from run_config import read_config
from secure import check_secure, masked, secure_mean

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.federated import ClientResult, State, Task, client_step
from mllmfl_lite.models import build_model
from mllmfl_lite.runs import load_federation, run_experiment
from mllmfl_lite.runs.parts import make_method

log = logging.getLogger(__name__)
NUMBER = "partition-id"  # a node's client: flower-supernode --node-config 'partition-id=3'
SAY = 60.0  # seconds that a node has to say which client it is
PAUSE = 1.0  # seconds between two looks at who is connected

# ------------------------------------------------------------------------------------------------ a client

client = ClientApp(mods=[masked])


@client.query()
def say_number(message: Message, context: Context) -> Message:
    """Reply with the number of the client that this node is."""
    return Message(RecordDict({"is": ConfigRecord({"client": int(context.node_config[NUMBER])})}), reply_to=message)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Reply with the client's result and its number of images."""
    torch.set_num_threads(1)
    number, content = int(context.node_config[NUMBER]), message.content
    step = open_client(json.dumps(dict(context.run_config), sort_keys=True))
    result, images = step(tensors(content["state"]), tensors(content["received"]), content["round"]["round"], number)
    figures = MetricRecord({"loss": result.loss, "images": images})
    reply = {"state": ArrayRecord(result.state), "extra": ArrayRecord(result.extra), "figures": figures}
    return Message(RecordDict(reply), reply_to=message)


@functools.lru_cache(maxsize=1)  # a process may be asked round after round
def open_client(config: str) -> Callable[[State, State, int, int], tuple[ClientResult, int]]:
    """A function from (weights, broadcast, round, client) to the client's result and number of images."""
    experiment, _ = read_config(json.loads(config))
    images, split, _ = load_federation(experiment)
    model = build_model(experiment.model, images.num_classes, experiment.width).to(memory_format=torch.channels_last)
    parts = open_batches(images), make_method(experiment, images), experiment.federated

    def step(state: State, received: State, round_: int, number: int) -> tuple[ClientResult, int]:
        (batches, method, settings), indices = parts, torch.from_numpy(split[number])
        task = Task(state, received, round_, number, experiment.seed)
        return client_step(model, batches, indices, method, settings, task), len(indices)

    return step


def tensors(record: ArrayRecord) -> State:
    """The tensors of an `ArrayRecord`; names, shapes, types and bits are kept."""
    return dict(record.to_torch_state_dict())


# ------------------------------------------------------------------------------------------------ the server

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment with the grid's nodes as its clients."""
    torch.set_num_threads(1)
    experiment, options = read_config(dict(context.run_config))
    train_images, split, _ = load_federation(experiment)
    if options.secure:
        check_secure(make_method(experiment, train_images))
    if options.traffic:
        grid = Counted(grid, Path(options.folder) / "traffic.jsonl")
    nodes = Nodes(grid, [len(own) for own in split], options.timeout, options.wait, options.secure)
    result = run_experiment(experiment, options.folder, options.device, ask=nodes)
    print(f"top-1 {result['summary']['top1']:.1%}; the results are in {options.folder}", flush=True)


class Counted:
    """A grid that notes what the server sends and gets: a line for each set of messages, with the records' bytes."""

    def __init__(self, grid: Grid, path: Path):
        self.grid, self.path = grid, path
        path.parent.mkdir(parents=True, exist_ok=True)

    def get_node_ids(self):
        """Who is connected."""
        return self.grid.get_node_ids()

    def send_and_receive(self, messages, *, timeout=None):
        """Flower's, and the note."""
        messages, begun = list(messages), time.perf_counter()
        down = sum(_bytes(message) for message in messages)
        replies = list(self.grid.send_and_receive(messages, timeout=timeout))
        note = {"kind": messages[0].metadata.message_type, "messages": len(messages), "down": down}
        note |= {"up": sum(map(_bytes, replies)), "seconds": round(time.perf_counter() - begun, 3)}
        with self.path.open("a", encoding="utf-8") as file:
            print(json.dumps(note), file=file)
        return replies


def _bytes(message: Message) -> int:
    return 0 if message.has_error() else recorddict_to_proto(message.content).ByteSize()


class Nodes:
    """Client transport for `run_federated`: asks the nodes of a grid.

    Args:
        grid: Flower's way to the nodes.
        sizes: each client's number of images.
        timeout: seconds that clients have for a round.
        wait: seconds to wait for clients that are not connected.
        secure: whether SecAgg+ hides each update from the server.
    """

    def __init__(self, grid: Grid, sizes: list[int], timeout: float, wait: float, secure: bool = False):
        self.grid, self.sizes, self.timeout, self.wait, self.secure = grid, sizes, timeout, wait, secure
        self.node_of: dict[int, int] = {}  # client -> node

    def __call__(
        self, state: State, received: State, round_: int, chosen: list[int]
    ) -> tuple[dict[int, ClientResult], dict[int, str]]:
        """Results by client, and for each other chosen client the reason why it has none."""
        self._connect(chosen)
        missing = {c: f"no node with {NUMBER}={c} is connected" for c in chosen if c not in self.node_of}
        asked = {c: self.node_of[c] for c in chosen if c not in missing}
        if self.secure:
            largest = float(max(self.sizes[c] for c in chosen))
            return secure_mean(self.grid, asked, largest, state, round_, self.timeout), missing
        content = {"state": ArrayRecord(state), "received": ArrayRecord(received)}
        content["round"] = ConfigRecord({"round": round_})
        replies = self._send(asked, "train", content, self.timeout)
        results, left_out = {}, missing
        left_out |= {c: f"no answer within {self.timeout:g} seconds" for c in asked if c not in replies}
        for client_, reply in replies.items():
            try:
                results[client_] = _result(reply, self.sizes[client_])
            except Exception as error:  # it comes from outside: nothing in it may end the run
                left_out[client_] = str(error) if isinstance(error, ValueError) else f"its answer is wrong: {error!r}"
        return results, left_out

    def _connect(self, chosen: list[int]) -> None:
        """Learn which client each node is; wait for those chosen. Of two nodes with one number the first is taken."""
        until, refused = time.monotonic() + self.wait, set()
        while True:
            connected = set(self.grid.get_node_ids())
            self.node_of = {c: node for c, node in self.node_of.items() if node in connected}
            new = sorted(connected - refused - set(self.node_of.values()))
            replies = self._send({node: node for node in new}, "query", {}, SAY)
            for node in new:
                try:
                    self.node_of[self._number(replies.get(node))] = node
                except ValueError as error:
                    refused.add(node)
                    log.warning("node %d is left out: %s", node, error)
            if set(chosen) <= self.node_of.keys() or time.monotonic() >= until:
                return
            time.sleep(PAUSE)

    def _number(self, reply: Message | None) -> int:
        try:
            number = reply.content["is"]["client"]
        except Exception as error:  # no reply, an error in its place, or anything
            raise ValueError(f"it does not say which client it is; start it with {NUMBER}=0, 1, ...") from error
        if type(number) is not int or not 0 <= number < len(self.sizes):
            raise ValueError(f"it says it is client {number!r}; clients are 0 to {len(self.sizes) - 1}")
        if number in self.node_of:
            raise ValueError(f"it says it is client {number}, which is node {self.node_of[number]}")
        return number

    def _send(self, nodes: dict[int, int], kind: str, content: dict, seconds: float) -> dict[int, Message]:
        """Send the same to nodes by key; the replies that come in time, by key."""
        messages = {key: Message(RecordDict(dict(content)), node, kind, ttl=seconds) for key, node in nodes.items()}
        replies = self.grid.send_and_receive(list(messages.values()), timeout=seconds) if messages else []
        key_of = {message.metadata.message_id: key for key, message in messages.items()}
        return {key_of[reply.metadata.reply_to_message_id]: reply for reply in replies}


def _result(reply: Message, images: int) -> ClientResult:
    if reply.has_error():
        raise ValueError(f"its part failed: {reply.error.reason}")
    figures = reply.content["figures"]
    if figures["images"] != images:
        raise ValueError(f"it says it has {figures['images']} images, the split says {images}")
    return ClientResult(tensors(reply.content["state"]), tensors(reply.content["extra"]), float(figures["loss"]))
