"""A defence on the client: the update of the weights is clipped and noised, BatchNorm statistics are not sent."""

import torch

from mllmfl_lite.federated.aggregate import State, distance, weights_of


def clipped_and_noised(state: State, anchor: State, clip: float, noise: float, generator: torch.Generator) -> State:
    """The state with its update from `anchor` clipped to the norm `clip`, then Gaussian noise on every weight.

    The noise has deviation ``noise * clip`` in each weight (McMahan et al., 2018); 0 only clips. BatchNorm's
    statistics and counters are the anchor's: the client keeps its own.
    """
    if not clip > 0:
        raise ValueError(f"clip is the largest norm of an update, above 0; got {clip}. At 0 nothing would be learned")
    if not noise >= 0:
        raise ValueError(f"noise is a deviation in units of clip, 0 or more; got {noise}")
    factor = min(1.0, clip / max(distance(state, anchor, weights_of(anchor)), 1e-12))
    sent = {name: tensor.clone() for name, tensor in anchor.items()}
    for name in weights_of(anchor):
        drawn = torch.randn(sent[name].shape, generator=generator).to(sent[name])
        sent[name] += factor * (state[name] - anchor[name]) + noise * clip * drawn
    return sent
