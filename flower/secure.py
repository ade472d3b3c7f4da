"""SecAgg+ for the app's rounds, by Flower's own workflow: the server learns the clients' mean, no single update.

It hides neither the mean nor each client's number of images and loss, which Flower sends in clear.
"""

import json
from types import SimpleNamespace

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.compat.common.recorddict_compat import (
    fitres_to_recorddict,
    parameters_to_arrayrecord,
    recorddict_to_fitins,
)
from flwr.server import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key

from mllmfl_lite.federated import ClientResult, FedAvg, State

LARGEST = 64.0  # numbers between -LARGEST and LARGEST are sent, as one of LEVELS
LEVELS = 2**22  # so that the sum of a thousand clients stays below 2^32
THRESHOLD = 2 / 3  # of the clients drawn have to answer to the end


def check_secure(method: FedAvg) -> None:
    """Refuse a method whose server compares updates, or sends and gets more than weights."""
    changed = [
        name
        for name in ("aggregate", "upload", "broadcast")
        if getattr(type(method), name) is not getattr(FedAvg, name)
    ]
    if changed:
        raise ValueError(
            f"with SecAgg+ the server learns the mean of the weights alone; {type(method).__name__} needs more "
            f"({', '.join(changed)})"
        )


# ------------------------------------------------------------------------------------------------ a client


def masked(message: Message, context: Context, train) -> Message:
    """Client mod: Flower's SecAgg+ around `train`, for messages that ask for it."""
    if RECORD_KEY_CONFIGS not in message.content.config_records:
        return train(message, context)
    return secaggplus_mod(message, context, lambda *asked: _train(train, *asked))


def _train(train, message: Message, context: Context) -> Message:
    """Flower's own records in and out; what is quantised is float64, so that rounding adds nothing to it."""
    asked = recorddict_to_fitins(message.content, keep_input=True)
    names = json.loads(asked.config["names"])
    arrays = {n: Array(a) for n, a in zip(names, parameters_to_ndarrays(asked.parameters), strict=True)}
    content = {"state": ArrayRecord(arrays), "received": ArrayRecord()}
    message.content = RecordDict({**content, "round": ConfigRecord({"round": asked.config["round"]})})
    reply = train(message, context)
    state, figures = reply.content["state"].to_torch_state_dict(), reply.content["figures"]
    sent = [t.double().numpy() for t in state.values() if t.is_floating_point()]
    if (far := max(abs(a).max() for a in sent)) >= LARGEST:
        raise ValueError(f"SecAgg+ would cut off a weight of {far:.3g}; the largest is {LARGEST:g}")
    done = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(sent), figures["images"], {"loss": figures["loss"]})
    reply.content = fitres_to_recorddict(done, keep_input=False)
    return reply


# ------------------------------------------------------------------------------------------------ the server


class OneRound:
    """What the workflow asks of a strategy: whom to ask for what, and where the mean goes."""

    def __init__(self, nodes: list[int], config: dict):
        self.nodes, self.config, self.answers = nodes, config, {}

    def configure_fit(self, _round, parameters, _manager):
        """Each node gets the same."""
        return [(SimpleNamespace(node_id=node), FitIns(parameters, self.config)) for node in self.nodes]

    def aggregate_fit(self, _round, results, _failures):
        """Each answer holds the mean."""
        self.answers = {proxy.node_id: answer for proxy, answer in results}
        return None, {}


def secure_mean(grid, node_of: dict[int, int], weight: float, state: State, round_: int, timeout: float):
    """The mean of the clients' weights, weighted by images, as the result of each client that answered to the end.

    Integers (BatchNorm's step counters) stay the server's. `weight`: the most images that a client has.
    """
    strategy = OneRound(list(node_of.values()), {"round": round_, "names": json.dumps(list(state))})
    context = LegacyContext(Context(1, 0, {}, RecordDict(), {}), strategy=strategy)
    weights = ndarrays_to_parameters([t.numpy() for t in state.values()])
    context.state.array_records[MAIN_PARAMS_RECORD] = parameters_to_arrayrecord(weights, keep_input=False)
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: round_})
    SecAggPlusWorkflow(
        1.0, THRESHOLD, max_weight=weight, clipping_range=LARGEST, quantization_range=LEVELS, timeout=timeout
    )(grid, context)
    results = {}
    for client, node in node_of.items():
        if answer := strategy.answers.get(node):
            mean = iter(parameters_to_ndarrays(answer.parameters))
            own = {
                n: torch.from_numpy(next(mean)).to(t.dtype) if t.is_floating_point() else t for n, t in state.items()
            }
            results[client] = ClientResult(own, {}, float(answer.metrics["loss"]))
    return results
