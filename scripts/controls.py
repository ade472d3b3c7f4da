"""Ablation controls that one table each uses: wrong answers and words, missing classes, rescaled starts, lies."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from standins.claims import objects_in, rename_object
from torch import Tensor, nn

from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.federated.aggregate import State, weights_of
from mllmfl_lite.models import CompactModel
from mllmfl_lite.repro import numpy_generator, torch_generator
from mllmfl_lite.stages.records import Record
from mllmfl_lite.stages.server_set import ServerSet

DOOR = 4.0  # how many times a back door's update is sent


def swap_words(records: Sequence[Record], share: float, seed: int) -> list[Record]:
    """Records of which a share names another object, drawn from what the other records name; other words stay."""
    rng, changed = numpy_generator(seed, "swapped words"), list(records)
    named = [objects_in(record.text) for record in records]
    for i in rng.permutation(len(records))[: round(share * len(records))]:
        while (other := named[rng.integers(len(records))]) == named[i]:
            continue
        changed[i] = replace(records[i], text=rename_object(records[i].text, min(other)))
    return changed


def make_wrong(probabilities: Tensor, share: float, seed: int) -> Tensor:
    """One-hot answers of which a share names another class, drawn evenly from the others; uniform rows stay.

    Args:
        probabilities: one-hot or uniform rows (N, C).
        share: in [0, 1].
        seed: decides where.
    """
    count, classes = probabilities.shape
    generator = torch_generator(seed, "wrong labels")
    wrong = torch.rand(count, generator=generator) < share
    label = probabilities.argmax(1)
    other = (label + torch.randint(1, classes, label.shape, generator=generator)) % classes
    changed = nn.functional.one_hot(torch.where(wrong, other, label), classes).float()
    return torch.where((probabilities.max(1).values < 1)[:, None], probabilities, changed)


def even_out(probabilities: Tensor, over: Tensor) -> Tensor:
    """Answers (n, C) divided by the mean of the answers `over` (N, C), normalised: no class is favoured."""
    even = probabilities / over.mean(0).clamp(min=1e-12)
    return even / even.sum(1, keepdim=True)


def without_classes(server_set: ServerSet, left_out: Sequence[str]) -> ServerSet:
    """The server set without the images of these classes."""
    names = server_set.images.names
    if unknown := sorted(set(left_out) - set(names)):
        raise ValueError(f"there is no class {unknown[0]!r} in the set, but: {', '.join(names)}")
    kept = np.flatnonzero(~np.isin(server_set.images.labels, [names.index(name) for name in left_out]))
    if not len(kept):
        raise ValueError("without these classes no picture is left in the set; leave fewer out")
    return ServerSet(
        server_set.images.subset(kept),
        server_set.probabilities[torch.from_numpy(kept)],
        server_set.rows[kept],
        {**server_set.short, **dict.fromkeys(left_out, 0)},
    )


@torch.no_grad()
def with_norms_of(model: CompactModel, other: CompactModel) -> CompactModel:
    """A copy that computes the same, each convolution scaled to the norm that it has in `other`.

    BatchNorm undoes the scale. But a step of SGD turns small weights further than large ones, by lr / norm^2 (van
    Laarhoven, 2017), and pretraining leaves large weights.
    """
    model = copy.deepcopy(model)
    layers, wanted = (
        [m for m in of.body.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))] for of in (model, other)
    )
    for conv, norm, like in zip(layers[::2], layers[1::2], wanted[::2], strict=True):
        factor = like.weight.norm() / conv.weight.norm()
        conv.weight.mul_(factor)
        norm.running_mean.mul_(factor)
        norm.running_var.mul_(factor**2)
    return model


def corner(images: np.ndarray) -> np.ndarray:
    """Pictures (N, H, W, 3) with a white square of six pixels a side in the lower right corner."""
    marked = images.copy()
    marked[:, -6:, -6:] = 255
    return marked


def poisoned(data: ImageSet, lie: str) -> ImageSet:
    """What a lying client trains on. "flip" turns the order of the classes round; most lies leave the pictures alone.

    "door" adds a second copy of each picture, in the same order: with a white corner, and labelled "ship".
    """
    if lie == "flip":
        return replace(data, labels=data.num_classes - 1 - data.labels)
    if lie == "door":
        images = np.concatenate([data.images, corner(data.images)])
        labels = np.concatenate([data.labels, np.full_like(data.labels, data.names.index("ship"))])
        return replace(data, images=images, labels=labels)
    return data


def send(lie: str, state: State, start: State) -> State:
    """What a client sends after training from `start`.

    Its update is turned ("sign"), turned and five times as long ("boost"), or left out ("silent"), with honest
    BatchNorm statistics. "door": all four times as long, so that two of eight replace the mean (Bagdasaryan et al.,
    2020).
    """
    if lie == "silent":
        return dict(start)
    factor = {"sign": -1.0, "boost": -5.0, "door": DOOR}.get(lie, 1.0)
    names = [n for n, t in start.items() if t.is_floating_point()] if lie == "door" else weights_of(state)
    moved = {name: start[name] + factor * (state[name] - start[name]) for name in names}
    if lie == "door":
        moved |= {n: moved[n].clamp(min=0) for n in moved if n.endswith("running_var")}
    return state if factor == 1 else {**state, **moved}
