"""Figures that describe a client split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mllmfl_lite.data.partition import Split, check_split


@dataclass(frozen=True)
class SplitFigures:
    """What describes a split of images of C classes among K clients."""

    counts: np.ndarray  #: images of each class at each client, int64 (K, C)
    sizes: np.ndarray  #: images at each client (K,)
    classes_per_client: np.ndarray  #: classes of which a client holds an image (K,)
    clients_per_class: np.ndarray  #: clients that hold an image of the class (C,)
    skew: np.ndarray  #: total-variation distance of each client's class mix from the mix of all images (K,)
    effective_classes: np.ndarray  #: exponential of the entropy of each client's class mix (K,); 1 = one class only


def describe_split(labels: np.ndarray, split: Split, num_classes: int) -> SplitFigures:
    """Count and measure a split; an empty client is a `ValueError`."""
    check_split(split)
    counts = np.stack([np.bincount(labels[indices], minlength=num_classes) for indices in split])
    mix = counts / counts.sum(1, keepdims=True)
    overall = counts.sum(0) / counts.sum()
    entropy = -(mix * np.log(mix, where=mix > 0, out=np.zeros_like(mix))).sum(1)
    held, skew = counts > 0, np.abs(mix - overall).sum(1) / 2
    return SplitFigures(counts, counts.sum(1), held.sum(1), held.sum(0), skew, np.exp(entropy))
