"""pfl-research's simulated backend and its FederatedAveraging, in one process or, as pfl splits clients, in several.

`loader` is pfl's dataset around a DataLoader over torchvision transforms. `tensors` is what pfl advises where images
fit into memory: tensors normalised once, which leaves augmentation and shuffling out. `engine` gives pfl our batches,
so that what still differs is the framework. pfl averages parameters alone: its BatchNorm statistics are not compared.
"""

import collections
import functools
import time

import numpy as np
import torch
from bench_rounds import CLIENTS, CORES, shuffled
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchDataDataset, PyTorchTensorDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import nn
from torch.nn.functional import cross_entropy

from peers import batches_of, epoch_order, in_order, job


class WithLoss(nn.Module):
    """A model as pfl wants it. It has no metrics: pfl evaluates clients before its first round."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def loss(self, x, y):
        return cross_entropy(self.train().model(x), y)

    def metrics(self, x, y):
        return {}


class Stamps(TrainingProcessCallback):
    """The clock before the first round and after each."""

    def __init__(self):
        self.times = []

    def on_train_begin(self, *, model):
        self.times.append(time.monotonic())
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.times.append(time.monotonic())
        return False, Metrics()


class OurBatches(PyTorchDataDataset):
    """A client's images from our batches: `raw_data` is (batches, order, generator)."""

    def __len__(self):
        return len(self.raw_data[1])

    def iter(self, batch_size):
        batches, order, generator = self.raw_data
        parts = order.split(batch_size)
        return zip(batches.stream(parts, generator), (batches.labels[part] for part in parts), strict=True)


def loader_dataset(data, equal):
    def dataset(own, settings, client, round_):
        load = functools.partial(in_order, round_=round_) if equal else shuffled
        return PyTorchDataDataset(load(data, own, settings, client).dataset, client, shuffle=not equal)

    return dataset


def tensors_dataset(data, equal):
    batches = batches_of(data, equal)
    images = batches.plain(torch.arange(len(data))).contiguous()

    def dataset(own, settings, client, round_):
        order = epoch_order(own, settings, round_, client)[0] if equal else torch.as_tensor(own)
        return PyTorchTensorDataset((images[order], batches.labels[order]), client)

    return dataset


def engine_dataset(data, equal):
    batches = batches_of(data, equal)

    def dataset(own, settings, client, round_):
        return OurBatches((batches, *epoch_order(own, settings, round_, client)), client)

    return dataset


def simulate(width, rounds, equal, datasets):
    model, data, split, settings = job(width, rounds, equal)
    torch.set_num_threads(max(1, CORES // pytorch_ops.distributed.world_size))
    np.random.seed(0)  # noqa: NPY002  pfl's processes must draw alike
    layout = torch.channels_last if datasets is engine_dataset else torch.contiguous_format
    trained = WithLoss(model.to(memory_format=layout))
    dataset, calls, stamps = datasets(data, equal), collections.Counter(), Stamps()

    def of_user(client):
        calls[client] += 1  # once a round
        return dataset(split[client], settings, client, calls[client])

    users = FederatedDataset(of_user, MinimizeReuseUserSampler(range(CLIENTS)))
    FederatedAveraging().run(
        NNAlgorithmParams(rounds, evaluation_frequency=rounds, train_cohort_size=CLIENTS, val_cohort_size=None),
        SimulatedBackend(users, users, [WeightByDatapoints()]),
        PyTorchModel(trained, torch.optim.SGD, torch.optim.SGD(trained.parameters(), lr=1.0)),
        NNTrainHyperParams(settings.batch_size, settings.local_epochs, settings.lr),
        callbacks=[stamps],
        send_metrics_to_platform=False,
    )
    return stamps.times, {name: p.detach() for name, p in model.named_parameters()}


loader = functools.partial(simulate, datasets=loader_dataset)
tensors = functools.partial(simulate, datasets=tensors_dataset)
engine = functools.partial(simulate, datasets=engine_dataset)
