"""Flower's simulation: its FedAvg, its Ray actors, one core a client, so as many clients at once as there are cores.

`tutorial` has the client that Flower's PyTorch tutorials have: a new model, a DataLoader over torchvision transforms.
`engine` gives Flower's client our batches and our training, so that what still differs is the framework.
"""

import copy
import functools
import logging
import time

import torch
from bench_rounds import CLIENTS, CORES, ordinary_training, shuffled
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from mllmfl_lite import federated
from peers import batches_of, in_order, job

ONE_CORE = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": CORES}}
app = ClientApp()
client_job = functools.cache(job)  # what an actor loads once
our_batches = functools.cache(lambda width, equal: batches_of(client_job(width, 1, equal)[1], equal))


def train_as_tutorial(state, client, round_, width, equal):
    model, data, split, settings = client_job(width, 1, equal)
    load = functools.partial(in_order, round_=round_) if equal else shuffled
    local = copy.deepcopy(model)
    local.load_state_dict(state)
    ordinary_training(local, load(data, split[client], settings, client), settings)
    return local.state_dict()


def train_as_engine(state, client, round_, width, equal):
    model, _, split, settings = client_job(width, 1, equal)
    model.to(memory_format=torch.channels_last)
    own, batches = torch.as_tensor(split[client]), our_batches(width, equal)
    federated.train_client(model, batches, own, federated.FedAvg(), settings, federated.Task(state, {}, round_, client))
    return model.state_dict()


@app.train()
def train(message, context):
    config, client = message.content["config"], context.node_config["partition-id"]
    width, equal = config["width"], config["equal"]
    step = train_as_engine if config["engine"] else train_as_tutorial
    state = step(message.content["arrays"].to_torch_state_dict(), client, config["server-round"], width, equal)
    count = MetricRecord({"num-examples": len(client_job(width, 1, equal)[2][client])})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": count}), reply_to=message)


def all_answered(records, key):
    if len(records) != CLIENTS:
        raise RuntimeError(f"{len(records)} of {CLIENTS} clients answered")
    return MetricRecord()


def simulate(width, rounds, equal, engine):
    stamps, final, server = [], [], ServerApp()
    config = ConfigRecord({"width": width, "equal": equal, "engine": engine})

    @server.main()
    def main(grid, context):
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=CLIENTS, train_metrics_aggr_fn=all_answered)
        start = ArrayRecord(job(width, rounds, equal)[0].state_dict())
        result = strategy.start(
            grid, start, rounds, train_config=config, evaluate_fn=lambda *_: stamps.append(time.monotonic())
        )
        final.append(result.arrays.to_torch_state_dict())

    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(server, app, CLIENTS, backend_config=ONE_CORE)
    return stamps, final[0]


tutorial = functools.partial(simulate, engine=False)
engine = functools.partial(simulate, engine=True)
