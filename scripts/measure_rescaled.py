"""Pretrained starts whose convolutions have the norms of random ones, at laptop scale: one file a seed.

    python scripts/measure_rescaled.py

The rescaled weights compute the same; only the clients' steps turn them as far as random ones. Files that are there
are kept.
"""

from dataclasses import replace
from pathlib import Path

from controls import with_norms_of
from sweep import RESULTS, ROOT, in_processes, laptop_run, options

from mllmfl_lite.models import build_model, load_model, save_model
from mllmfl_lite.runs import load_federation, parameters_of, run_experiment, save_result
from mllmfl_lite.runs.parts import start_file

CONDITIONS = {f"{method}_rescaled": method for method in ("stage1", "stage1_features", "mllm_llava_fl")}


def measure(name: str, seed: int, out: Path) -> None:
    path, work = out / f"{name}_seed{seed}.json", out / "rescaled"
    if path.exists():
        return
    experiment = laptop_run(CONDITIONS[name], seed).experiment
    classes = load_federation(experiment).train.num_classes
    new = build_model(experiment.model, classes, experiment.width, seed)
    start = work.resolve() / f"{name}_start_seed{seed}.safetensors"
    start.parent.mkdir(parents=True, exist_ok=True)
    save_model(start, with_norms_of(load_model(start_file(experiment, ROOT)), new), experiment.model, experiment.width)
    result = run_experiment(replace(experiment, start=str(start)), work, "cpu", 1, name)
    save_result(path, {**result, "parameters": {**parameters_of(experiment), "control": {"rescale": True}}})
    print(path.stem, flush=True)


if __name__ == "__main__":
    chosen = options(__doc__, CONDITIONS, RESULTS / "laptop" / "cifar10_mini_lt_if100").parse_args()
    in_processes(measure, [(name, seed, chosen.out) for name in chosen.only for seed in chosen.seeds])
