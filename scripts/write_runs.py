"""Write every run's file, `notebooks/runs/<scale>/<benchmark>/<method>.yaml`, from the few tables below.

    python scripts/write_runs.py

What some 250 files have in common is written once, here. For a run of your own, copy a file and edit the copy.
"""

from pathlib import Path

import yaml

from mllmfl_lite.runs.launch import RUNS, notebook_parameters

# ------------------------------------------------------------------------------------------------------- the methods

WORDS = {"start": "dwp_linear"}  # stage 1 from the book's own weights; where models are real, it is done anew
FEATURES = {"start": "features"}  # the same start from CLIP's features, without words
ALIGN = {"align": True}
CE_ONLY = ALIGN | {"align_beta": 0.0}
IMAGENET = ALIGN | {"align_teacher": "imagenet"}  # has never seen CIFAR
CREFF, CLIP2FL = {"method": "creff"}, {"method": "clip2fl"}
ALONE = {"method": "server_only", "rounds": 1, "report_rounds": 1}  # nothing comes of its rounds: one is enough

METHODS = {
    "fedavg": ("FedAvg", {}),
    "fedprox": ("FedProx", {"method": "fedprox"}),
    "fedavgm": ("FedAvgM", {"method": "fedavgm"}),
    "creff": ("CReFF", CREFF),
    "clip2fl": ("CLIP2FL", CLIP2FL),
    "mllm_llava_fl": ("MLLM-LLaVA-FL, all three stages", WORDS | ALIGN),
    "stage1": ("control: stages 1 and 2", WORDS),
    "stage3": ("control: stages 2 and 3", ALIGN),
    "stage3_ce": ("control: stages 2 and 3, cross-entropy alone", CE_ONLY),
    "mllm_llava_fl_ce": ("control: all three stages, cross-entropy alone", WORDS | CE_ONLY),
    "creff_stage3": ("control: CReFF, then stage 3", CREFF | ALIGN),
    "clip2fl_stage3": ("control: CLIP2FL, then stage 3", CLIP2FL | ALIGN),
    "server_only": ("control: stage 3 without any client", ALONE | ALIGN),
    "server_only_stage1": ("control: stages 1 and 3 without any client", ALONE | WORDS | ALIGN),
}
OF_THE_BOOK = {  # they need starts and a teacher that the book's own pictures have
    "stage1_features": ("control: distilled features, then stage 2", FEATURES),
    "mllm_llava_fl_features": ("control: distilled features, then stages 2 and 3", FEATURES | ALIGN),
    "server_only_features": ("control: distilled features, then stage 3 without any client", ALONE | FEATURES | ALIGN),
    "stage1_rescaled": ("control: stages 1 and 2, the start rescaled", WORDS | {"rescale": True}),
    "stage1_features_rescaled": ("control: distilled features rescaled, then stage 2", FEATURES | {"rescale": True}),
    "mllm_llava_fl_rescaled": ("control: all three stages, the start rescaled", WORDS | ALIGN | {"rescale": True}),
    "stage3_imagenet": ("stages 2 and 3, an ImageNet network as the teacher", IMAGENET),
    "mllm_llava_fl_imagenet": ("all three stages, an ImageNet network as the teacher", WORDS | IMAGENET),
    "server_only_imagenet": ("stage 3 without any client, an ImageNet network as the teacher", ALONE | IMAGENET),
    "clip2fl_imagenet": ("CLIP2FL, an ImageNet network in CLIP's place", CLIP2FL | {"clip": "efficientnet_lite2"}),
}

# ------------------------------------------------------------------------------------------- scales and benchmarks

PAPER = {
    "num_clients": 20, "clients_per_round": 8, "rounds": 200, "local_epochs": 10, "width": 64, "eval_every": 1,
    "report_rounds": 10,
}  # fmt: skip
MEDIUM = PAPER | {"rounds": 60, "local_epochs": 2, "width": 16, "eval_every": 10, "precision": "bfloat16"}
REAL = {  # the paper's large models and web data
    "mllm": "llava-hf/llava-1.5-7b-hf", "mllm_dtype": "bfloat16", "clip": "ViT-B-32-quickgelu:openai",
    "pool": "cc595k", "image_size": 32, "shared": "..",
}  # fmt: skip
FEWER = REAL | {"pool_images": 60_000}
# Stage 1 with real models, by LLaVA's own numbers: a batch of 128, one epoch, step size 2e-3. Memory asks for a smaller
# batch with ResNet-50. Runs of a scale share what it makes, and what the MLLM says.
ANEW = {
    "start": "", "pretrain": True, "annotations": "new", "pretrain_epochs": 1, "pretrain_batch_size": 128,
    "pretrain_precision": "bfloat16", "pretrain_gradient_checkpointing": True,
}  # fmt: skip
ANEW_50 = ANEW | {"pixels": 384, "pretrain_batch_size": 32}
RESNET50 = {"dataset": "imagenet_lt", "model": "resnet50"}

CIFAR = {f"{name}_lt_if{f}": {"dataset": name, "imbalance_factor": f}
         for name in ("cifar10", "cifar100") for f in (100, 50, 10)}  # fmt: skip
# for each benchmark: its parameters, what stage 1 is there, whether the book's own starts and teachers do
BENCHMARKS = {
    **{f"paper/{b}": (PAPER | REAL | v, ANEW, False) for b, v in CIFAR.items()},
    "paper/imagenet_lt": (PAPER | REAL | RESNET50 | {"image_size": 224, "eval_every": 10}, ANEW_50, False),
    **{f"medium/{b}": (MEDIUM | v, {}, b == "cifar10_lt_if100") for b, v in CIFAR.items() if "100_lt" not in b},
    **{f"medium/{b}": (MEDIUM | FEWER | v, ANEW, False) for b, v in CIFAR.items() if "100_lt" in b},
    "medium/imagenet_lt": (MEDIUM | FEWER | RESNET50 | {"image_size": 64}, ANEW_50, False),
    **{f"laptop/cifar10_mini_lt_if{f}": ({"imbalance_factor": f}, {}, f == 100) for f in (100, 50, 10)},
}


def methods_of(benchmark: str) -> dict[str, tuple[str, dict]]:
    """The methods and controls of a benchmark: name -> what it is, and what it sets."""
    return METHODS | OF_THE_BOOK if BENCHMARKS[benchmark][2] else METHODS


def parameters_of(benchmark: str, method: str) -> dict:
    """What a run's file says: what it is, and what differs from the notebook's defaults."""
    values, stage1, _ = BENCHMARKS[benchmark]
    own = methods_of(benchmark)[method][1]
    every = values | own | (stage1 if own.get("start") else {})
    known = notebook_parameters()
    always = {"label": method, "folder": f"results/{benchmark}", "dataset": "cifar10_mini", "method": "fedavg"}
    return always | {k: v for k, v in every.items() if k in always or v != known[k].default}


def text_of(benchmark: str, method: str) -> str:
    """A run's file: two comments, then one parameter a line, in the notebook's order."""
    scale, name = benchmark.split("/")
    values = parameters_of(benchmark, method)
    ordered = {key: values[key] for key in notebook_parameters() if key in values}
    command = f"make paper RUN={name}/{method} SEED=0" + ("" if scale == "paper" else f" SCALE={scale}")
    head = f"# {methods_of(benchmark)[method][0]}\n# {command}\n"
    return head + yaml.safe_dump(ordered, sort_keys=False)


def write_all(folder: Path = RUNS) -> None:
    """Write the files, and remove those that the tables no longer have."""
    wanted = {folder / b / f"{m}.yaml": text_of(b, m) for b in BENCHMARKS for m in methods_of(b)}
    for path in set(folder.rglob("*.yaml")) - set(wanted):
        if "\n# make paper RUN=" in path.read_text():  # not a file of the user's own
            path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    write_all()
