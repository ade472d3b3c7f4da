"""Federated learning: methods, the client's half, the server's loop."""

from mllmfl_lite.federated.aggregate import ClientResult, State, weighted_mean
from mllmfl_lite.federated.clients import ClientDiverged, Task, Workers, client_step, train_client
from mllmfl_lite.federated.clip2fl import CLIP2FL
from mllmfl_lite.federated.creff import CReFF
from mllmfl_lite.federated.federation import Federation, choose_clients
from mllmfl_lite.federated.fedyoyo import FedYoYo
from mllmfl_lite.federated.methods import BalancedSoftmax, FedAvg, FedAvgM, FedProx, FedSettings
from mllmfl_lite.federated.robust import ClippedNorm, CoordinateMedian, TrimmedMean
from mllmfl_lite.federated.rounds import Ask, FedResult, run_federated
from mllmfl_lite.federated.server_steps import AlignEachRound, FedDF, FedNPC

METHODS: dict[str, type[FedAvg]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "creff": CReFF,
    "clip2fl": CLIP2FL,
    "balanced_softmax": BalancedSoftmax,
    "fedyoyo": FedYoYo,
    "fednpc": FedNPC,
    "feddf": FedDF,
    "clipped_norm": ClippedNorm,
    "median": CoordinateMedian,
    "trimmed_mean": TrimmedMean,
}

__all__ = [
    "CLIP2FL", "METHODS", "AlignEachRound", "Ask", "BalancedSoftmax", "CReFF", "ClientDiverged", "ClientResult",
    "ClippedNorm", "CoordinateMedian", "FedAvg", "FedAvgM", "FedDF", "FedNPC", "FedProx", "FedResult",
    "FedSettings", "FedYoYo", "Federation", "State", "Task", "TrimmedMean", "Workers", "choose_clients",
    "client_step", "run_federated", "train_client", "weighted_mean",
]  # fmt: skip
