"""The same rounds of FedAvg run by several engines: ours, the ordinary loop, Flower's simulation, pfl's.

A variant is a function ``(width, rounds, equal) -> (stamps, state)``: the clock (time.monotonic) before the first round
and after each, and the weights at the end. ``python -m peers`` runs one variant.

With `equal` all must end with the same weights: nobody augments, all see a client's images in the same order, and in
float64, since a rounding error of float32 grows by some thousand times in a few steps with lr 0.1.
"""

import torch
from bench_rounds import work
from torch.utils.data import DataLoader, TensorDataset

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.repro import torch_generator

EQUAL_IMAGES = 48  # a client's: two steps a round


class PlainBatches(Batches):
    """Our batches, not augmented, in float64."""

    def plain(self, indices):
        return super().plain(indices).double()

    def augmented(self, indices, generator):
        self.cropped(indices, generator)  # as many draws as with augmentation
        return self.plain(indices)

    def stream(self, parts, generator):
        return [self.augmented(part, generator) for part in parts]


def batches_of(data, equal):
    return (PlainBatches if equal else Batches)(data)


def job(width, rounds, equal):
    """Model, images, split and settings of a run."""
    model, data, split, settings = work(width, rounds, EQUAL_IMAGES if equal else None)
    return model.double() if equal else model, data, split, settings


def epoch_order(own, settings, round_, client):
    """A client's images in the order in which `train_client` shows them, and the generator that drew it."""
    generator = torch_generator(0, "batches", round_, client, 0)
    return torch.as_tensor(own)[torch.randperm(len(own), generator=generator)], generator


def in_order(data, own, settings, client, round_):
    """A loader of a client's plain images in that order."""
    order, _ = epoch_order(own, settings, round_, client)
    batches = PlainBatches(data)
    return DataLoader(TensorDataset(batches.plain(order), batches.labels[order]), settings.batch_size)
