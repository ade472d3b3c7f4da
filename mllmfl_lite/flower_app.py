"""The same rounds on more than one machine, as a Flower app: a node is a client, the server is `run_experiment`::

    flower/pyproject.toml    names `client` and `server`, and the experiment; `flwr run flower` starts it

Nothing of the method is here. A node runs `client_step`, as a thread of the in-process rounds does; the server runs
`run_experiment` with `GridClients` in place of those threads, and so checkpoints, goes on after a kill, aligns and
writes its results file as always. Same experiment, same seed, one thread: the same weights, to the bit.

Needs Flower (`flwr`), in an environment of its own: it asks for older versions of several of this package's companions.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from dataclasses import fields, replace

import torch

from mllmfl_lite.data.batches import open_batches
from mllmfl_lite.federated.clients import ClientResult, client_step
from mllmfl_lite.federated.methods import FedSettings, State
from mllmfl_lite.repro import all_finite
from mllmfl_lite.runs.experiment import Experiment, run_experiment
from mllmfl_lite.runs.settings import is_of
from mllmfl_lite.stages.align import AlignSettings

try:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.common.constant import ErrorCode
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:
    raise ImportError(f"the Flower app needs flwr ({error}); `make flower` sets up an environment with it") from error


log = logging.getLogger(__name__)


NODE = "partition-id"  # which client a node is: flower-supernode --node-config 'partition-id=3'


# Keys of a run's config that are not the experiment's: where the server keeps the run, where it tests, how many seconds
# a client has for its round, how many the server waits for clients that are not connected, or no longer, and whether
# the keys of stage 3 mean anything.
RUN_KEYS = {"folder": "runs/flower", "device": "cpu", "timeout": 600.0, "wait": 60.0, "stage3": True}


LOOK = 0.5  # seconds between two looks at what nodes have sent


SAY = 60  # seconds that a node has to say which client it is


def read_experiment(config: dict) -> Experiment:
    """The experiment that a run's config describes.

    Args:
        config: flat keys and values: those of `Experiment`, ``settings.rounds`` and the like for `FedSettings`,
            ``align.per_class`` and the like for stage 3 (which is left out where there is none of them, or ``stage3``
            is false); beside them those of `RUN_KEYS`. The seed is ``settings.seed``, in every stage. The method's own
            numbers may also stand in one key, ``method_options``, as a JSON object.

    Raises:
        ValueError: an unknown key, or a value of another type.
    """
    top, inner = {}, {"settings": {}, "align": {}, "method_options": _options(config.get("method_options"))}
    for key, value in config.items():
        group, _, name = key.partition(".")
        if name and group in inner:
            inner[group][name] = value
        elif key in RUN_KEYS:
            _check_type(key, value, RUN_KEYS[key])
        elif key != "method_options":
            top[key] = value
    settings = _filled(FedSettings(), inner["settings"], "settings.")
    wanted = inner["align"] and config.get("stage3", RUN_KEYS["stage3"])
    align = _filled(AlignSettings(), inner["align"], "align.") if wanted else None
    experiment = _filled(Experiment(), top, "", without=tuple(inner))
    experiment = replace(experiment, settings=settings, align=align, method_options=inner["method_options"])
    return experiment.with_seed(settings.seed)


def _options(text: str | None) -> dict:
    try:
        options = json.loads(text or "{}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"method_options must be a JSON object, such as '{{\"mu\": 0.1}}' ({error})") from error
    if not isinstance(options, dict):
        raise ValueError(f"method_options must be a JSON object, such as '{{\"mu\": 0.1}}'; it is {text!r}")
    return options


def _filled(defaults, values: dict, prefix: str, without: tuple[str, ...] = ()):
    known = {field.name for field in fields(defaults)} - set(without)
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"the run's config has the unknown key {prefix + name!r}; known are {sorted(known)}")
        _check_type(prefix + name, value, getattr(defaults, name))
    return replace(defaults, **values)


def _check_type(key: str, value: object, default: object) -> None:
    if not is_of(value, type(default)):
        raise ValueError(f"{key} must be of type {type(default).__name__}; the run's config has {value!r}")


client = ClientApp()


@client.query()
def who(message: Message, context: Context) -> Message:
    """Which client this node is."""
    number = ConfigRecord({"client": int(context.node_config[NODE])})
    return Message(RecordDict({"who": number}), reply_to=message)


@client.train()
def train(message: Message, context: Context) -> Message:
    """A client's whole part in a round: `client_step` on this node's share of the images."""
    torch.set_num_threads(1)
    number = int(context.node_config[NODE])
    own = client_part(json.dumps(context.run_config, sort_keys=True))
    received = [state_from(message.content[name]) for name in ("state", "received")]
    result = own(*received, int(message.content["round"]["round"]), number)
    told = MetricRecord({"loss": result.loss, "images": own.images(number)})
    return Message(
        RecordDict({"state": record_of(result.state), "beside": record_of(result.beside), "told": told}),
        reply_to=message,
    )


class ClientPart:
    """A client's part of a run, without Flower: state, `broadcast`, round and client to a result."""

    def __init__(self, experiment: Experiment):
        images, self.split = experiment.clients()
        start = replace(experiment, start="").build_model(images.num_classes)  # in each round it is given weights
        self.model, self.method = start.to(memory_format=torch.channels_last), experiment.build_method(images)
        self.settings, self.batches = experiment.settings, open_batches(images)

    def __call__(self, state: State, received: State, round_: int, client_: int) -> ClientResult:
        """`client_step` on the client's images."""
        own = torch.from_numpy(self.split[client_])
        return client_step(self.model, self.batches, own, self.method, self.settings, state, received, round_, client_)

    def images(self, client_: int) -> int:
        """How many images the client holds."""
        return len(self.split[client_])


@functools.lru_cache(maxsize=1)
def client_part(config: str) -> ClientPart:
    """The part that a run's config (as JSON) describes; kept, since a process may be asked round after round."""
    return ClientPart(read_experiment(json.loads(config)))


def record_of(state: State) -> ArrayRecord:
    """Tensors by name as Flower sends them; names, shapes, types and bits are kept."""
    return ArrayRecord(torch_state_dict=state)


def state_from(record: ArrayRecord) -> State:
    """The tensors of `record_of`."""
    return dict(record.to_torch_state_dict())


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """`run_experiment` with the nodes of `grid` as its clients."""
    torch.set_num_threads(1)
    experiment, run = read_experiment(context.run_config), {**RUN_KEYS, **context.run_config}
    sizes = [len(own) for own in experiment.clients()[1]]
    ask = GridClients(grid, sizes, run["timeout"], run["wait"])
    result = run_experiment(experiment, run["folder"], run["device"], ask=ask)
    log.info("top-1 %.1f %%; the results are in %s", 100 * result["summary"]["top1"], run["folder"])


class BadReply(ValueError):
    """What a client sent, or did not send, cannot go into the mean; the message is the reason."""


class GridClients:
    """Asks clients through Flower, for `run_federated`'s `ask`. Whose answer is not sound is left out, and named.

    Who is gone after having been asked, and comes back while the round is on, is asked again.

    Args:
        grid: Flower's way to the nodes.
        sizes: each client's number of images, as the split says.
        timeout: seconds that a client has for its round.
        wait: seconds to wait for clients that are not connected, or no longer.
    """

    def __init__(self, grid: Grid, sizes: list[int], timeout: float, wait: float):
        self.grid, self.sizes, self.timeout, self.wait = grid, sizes, timeout, wait
        self._client_of: dict[int, int | None] = {}  # of each node that has said which it is
        self._asked_who: dict[str, int] = {}  # the others: message to node

    def __call__(
        self, state: State, received: State, round_: int, chosen: list[int]
    ) -> tuple[dict[int, ClientResult], dict[int, str]]:
        """Results by client, and for each other client of `chosen` the reason why it is left out."""
        content = {
            "state": record_of(state),
            "received": record_of(received),
            "round": ConfigRecord({"round": round_}),
        }
        replies, asked = self._replies(chosen, content)
        results, left_out = {}, {}
        for client_ in chosen:
            try:
                results[client_] = self._read(client_, asked, replies, state)
            except BadReply as reason:
                left_out[client_] = str(reason)
                log.warning("round %d: client %d is left out: %s", round_, client_, reason)
        return results, left_out

    def _replies(self, chosen: list[int], content: dict) -> tuple[dict[int, Message], dict[int, int]]:
        """Replies by client, and the node that each client was asked at; gone ones are not among them."""
        started = time.monotonic()
        until = dict.fromkeys(chosen, started + self.wait)  # when those without a reply are given up
        replies, asked, sent = {}, {}, {}  # client to reply, client to node, message to client
        self._client_of = {node: of for node, of in self._client_of.items() if of is not None}  # try them again
        while until:
            now, found = time.monotonic(), self._connected()
            back = {c: found[c] for c in until if c in found and found[c] != asked.get(c)}
            sent = {message: c for message, c in sent.items() if c in until and c not in back}  # others are too late
            new = self._push({c: self._message(RecordDict(dict(content)), back[c], "train") for c in back})
            sent |= new
            asked |= {c: back[c] for c in new.values()}
            until |= dict.fromkeys(new.values(), min(now, started + self.wait) + self.timeout)
            for client_, reply in self._pull(sent):
                if is_gone(reply):
                    del asked[client_]
                    until[client_] = now + self.wait
                else:
                    replies[client_] = reply
                    del until[client_]
            hope = self._asked_who and now < started + SAY
            until = {c: end for c, end in until.items() if now < end or (hope and c not in asked)}
            time.sleep(LOOK if until else 0)
        return replies, asked

    def _connected(self) -> dict[int, int]:
        """The node of each client that is connected; of two that say they are the same, the one met last."""
        there = set(self.grid.get_node_ids())
        self._client_of = {node: of for node, of in self._client_of.items() if node in there}
        self._asked_who = {message: node for message, node in self._asked_who.items() if node in there}
        new = there - set(self._client_of) - set(self._asked_who.values())
        self._asked_who |= self._push({node: self._message(RecordDict(), node, "query") for node in sorted(new)})
        for node, reply in self._pull(self._asked_who):
            if not is_gone(reply):
                self._client_of[node] = self._known(reply)
        return {of: node for node, of in self._client_of.items() if of is not None}

    def _known(self, reply: Message) -> int | None:
        number = None if reply.has_error() else reply.content.get("who", {}).get("client")
        if isinstance(number, int) and 0 <= number < len(self.sizes):
            return number
        log.warning("a node says it is client %r; clients are 0 to %d", number, len(self.sizes) - 1)
        return None

    def _message(self, content: RecordDict, node: int, kind: str) -> Message:
        lives = float(self.timeout + SAY)  # longer than it is listened for: then it is late, not gone
        return Message(content, dst_node_id=node, message_type=kind, ttl=lives)

    def _push(self, messages: dict[int, Message]) -> dict[str, int]:
        """Send, and give for each message that went out its id and its key."""
        out = set(self.grid.push_messages(list(messages.values()))) if messages else set()
        return {m.metadata.message_id: key for key, m in messages.items() if m.metadata.message_id in out}

    def _pull(self, sent: dict[str, int]) -> list[tuple[int, Message]]:
        """The replies that have come, each with its key; they are taken out of `sent`."""
        replies = self.grid.pull_messages(list(sent)) if sent else []
        return [(sent.pop(reply.metadata.reply_to_message_id), reply) for reply in replies]

    def _read(self, client_: int, asked: dict[int, int], replies: dict[int, Message], state: State) -> ClientResult:
        if client_ not in asked:
            raise BadReply(f"no node with {NODE}={client_} is connected")
        if client_ not in replies:
            raise BadReply(f"no answer within {self.timeout} seconds")
        reply = replies[client_]
        if reply.has_error():
            raise BadReply(f"its part failed: {reply.error.reason}")
        try:
            there, beside = state_from(reply.content["state"]), state_from(reply.content["beside"])
            loss, images = float(reply.content["told"]["loss"]), reply.content["told"]["images"]
        except Exception as error:  # it comes from outside: whatever is wrong with it, it must not end the run
            raise BadReply(f"its answer cannot be read ({type(error).__name__}: {error})") from error
        check_reply(there, beside, loss, images, state, self.sizes[client_])
        return ClientResult(there, beside, loss)


def is_gone(reply: Message) -> bool:
    """Whether the SuperLink says that there will be no answer: the node is gone, or the message with it."""
    return reply.has_error() and reply.error.code in (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE)


def check_reply(there: State, beside: State, loss: float, images: int, state: State, expected: int) -> None:
    """Raise `BadReply` unless a client's answer is sound.

    Args:
        there: its weights.
        beside: what it uploads beside them.
        loss: its training loss.
        images: how many images it says it trained on.
        state: the global weights, whose names, shapes and types its own must have.
        expected: how many images the split gave it: a client cannot give itself a larger weight.
    """
    if images != expected:
        raise BadReply(f"it says it has {images} images, the split says {expected}")
    if there.keys() != state.keys():
        raise BadReply(f"its weights have other names: {sorted(there.keys() ^ state.keys())[:3]}")
    for name, tensor in there.items():
        if (tensor.shape, tensor.dtype) != (state[name].shape, state[name].dtype):
            raise BadReply(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {tuple(state[name].shape)}")
    if not all_finite((*there.values(), *beside.values(), torch.tensor(loss))):
        raise BadReply("it sent a number that is not finite")
