"""Chapters with other parameters: they run to their end, or say in one sentence which values they take. Minutes."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parent.parent
CHAPTERS = {path.name.split("_")[0]: path for path in (ROOT / "notebooks").glob("*.ipynb")}
SMALL = {"language_samples": 400, "projector_samples": 400, "both_samples": 400}
RUNS = [
    ("00", {"rounds": 2, "finetune_rounds": 1, "server_epochs": 1}),
    ("00", {"num_clients": 20, "rounds": 3, "finetune_rounds": 2, "server_epochs": 2, "lr": 0.05, "seed": 3}),
    ("01", {"num_clients": 10, "num_draws": 2, "alpha": 0.1}),
    ("01", {"num_clients": 50, "imbalance_factor": 500, "seed": 3}),
    ("02", {"num_images": 20, "batch_size": 7, "drop_share": 0.3}),
    ("02", {"num_images": 30, "max_new_tokens": 8, "drop_share": 0.0}),
    ("03", {"kind": "conversation", "epochs": 1, "width": 4, "schedule": "constant"}),
    ("03", {"batch_size": 64, "epochs": 1, "lr": 0.001, "ramp": 1.0, "seed": 5}),
    ("04", {"num_clients": 20, "clients_per_round": 8, "rounds": 2, "width": 4, "num_seeds": 2, "alpha": 0.1,
            "split": "dirichlet"}),
    ("04", {"rounds": 3, "imbalance_factor": 1, "eval_every": 10, "num_seeds": 2, "width": 4, "alpha": 100.0}),
    ("05", {"rounds": 2, "per_class": 10, "beta": 0.0, "align_epochs": 2, "width": 8}),
    ("05", {"rounds": 3, "per_class": 200, "temperature": 1.0, "align_epochs": 3, "num_clients": 5,
            "clients_per_round": 5, "seed": 4}),
    ("06", {"rounds": 2, "local_epochs": 1, "width": 8, "align_epochs": 2}),
    ("06", {"num_clients": 4, "clients_per_round": 2, "rounds": 5, "width": 4, "align_epochs": 1, "seed": 3,
            "imbalance_factor": 100}),
    ("07", {"shares": [0.05], "epochs": 3, "num_seeds": 1, "num_test": 100}),
    ("07", {"shares": [0.002, 0.5, 1.0], "epochs": 2, "max_steps": 20, "batch_size": 64, "num_seeds": 2}),
    ("08", {"seed": 1, "liars": 3, "boost": 9.0, "left_out": "airplane", "align_epochs": 1, "wrong_texts": 0.8}),
    ("08", {"seed": 2, "liars": 0, "boost": 0.0, "clip_factor": 0.1, "drop_share": 0.0, "wrong_texts": 0.0}),
    ("09", {"rounds": 1, "local_epochs": 1, "width": 4, "pairs": 3, "inversion_steps": 5, "num_clients": 4, "seed": 3}),
    ("09", {"num_clients": 20, "clip": 1.0, "epsilon": 1.0, "delta": 1.0e-6, "inversion_steps": 10, "watts": 300.0}),
    ("10", {"scale": "laptop", "benchmark": "cifar10_mini_lt_if10", "method": "fedavg", "seed": 4, "kill_at": [3]}),
    ("10", {"benchmark": "imagenet_lt", "method": "creff", "machine": "a100", "power": 0.9, "rounds": 3, "seed": 7,
            "kill_at": [1]}),
    ("a1", {"hidden_size": 32, "layers": 1, "num_test": 50, **SMALL}),
    ("a1", {"batch_size": 8, "num_test": 100, "seed": 9, **SMALL}),
    ("a2", {"seed": 2}),
    ("a3", {"rounds": 1, "epochs": 1}),
    ("a3", {"rounds": 2, "epochs": 2, "seed": 4}),
]  # fmt: skip
REFUSED = [
    ("00", {"lr": 5.0}, "lr must be a number from 0.001 to 0.5; got 5.0"),
    ("01", {"num_clients": 8}, "num_clients must be a whole number from 10 to 50; got 8"),
    ("02", {"drop_share": 1.0}, "drop_share must be a number from 0.0 to 0.9; got 1.0"),
    ("03", {"schedule": "straight"}, "schedule must be one of 'constant', 'cosine', 'linear', 'step'; got 'straight'"),
    ("04", {"num_clients": 5}, "num_clients must be a whole number from 10 to 50; got 5"),
    ("05", {"clients_per_round": 11}, "clients_per_round must be a whole number from 1 to 10; got 11"),
    ("06", {"rounds": 0}, "rounds must be a whole number from 1 to 10000; got 0"),
    ("07", {"shares": 0.05}, "shares must be a list of numbers from 0.002 to 1.0; got 0.05"),
    ("08", {"liars": 4}, "liars must be a whole number from 0 to 3; got 4"),
    ("08", {"clip_factor": 0.0}, "clip_factor must be a number from 0.01 to 100.0; got 0.0"),
    ("08", {"left_out": "lorry"}, "left_out must be one of 'airplane', 'automobile', "),
    ("09", {"epsilon": 0.0}, "epsilon must be a number from 0.2 to 10000.0; got 0.0"),
    ("09", {"clip": 0.0}, "clip must be a number from 1e-06 to 1000000.0; got 0.0"),
    ("10", {"kill_at": "early"}, "kill_at must be a list of whole numbers from 1 to 5; got 'early'"),
    ("10", {"benchmark": "cifar"}, "benchmark must be one of 'cifar100_lt_if10', "),
    ("a2", {"seed": 3}, "seed must be a whole number from 0 to 2; got 3"),
    ("a3", {"epochs": 0}, "epochs must be a whole number from 1 to 100; got 0"),
    ("a1", {"both_samples": 10}, "both_samples must be a whole number from 320 to 10000000; got 10"),
]


@pytest.fixture(autouse=True)
def asked_for(request):
    if "slow" not in request.config.option.markexpr:
        pytest.skip("minutes; pytest -m slow runs it")


def execute(chapter: str, parameters: dict, folder: Path, **environment: str):
    """Execute a chapter; return the process and the notebook."""
    out = folder / "out.ipynb"
    command = [sys.executable, "-m", "papermill", "--kernel", "python3", "--no-progress-bar", "--log-level", "ERROR"]
    done = subprocess.run(
        [*command, str(CHAPTERS[chapter]), str(out), "-y", yaml.safe_dump(parameters)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done, nbformat.read(out, as_version=4)


def pictures(notebook) -> int:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize(("chapter", "parameters"), RUNS, ids=str)
def test_a_chapter_runs_with_other_parameters(chapter, parameters, tmp_path):
    """With a backend in the environment that shows nothing: pictures are there all the same."""
    done, notebook = execute(chapter, parameters, tmp_path, MPLBACKEND="Agg")
    assert done.returncode == 0, done.stderr[-2000:]
    assert pictures(notebook) == pictures(nbformat.read(CHAPTERS[chapter], as_version=4))


@pytest.mark.slow
@pytest.mark.parametrize(("chapter", "parameters", "sentence"), REFUSED, ids=str)
def test_a_chapter_refuses_other_values_at_its_top(chapter, parameters, sentence, tmp_path):
    done, notebook = execute(chapter, parameters, tmp_path)
    assert done.returncode != 0 and f"ValueError: {sentence}" in done.stderr
    assert pictures(notebook) == 0


def test_every_chapter_is_tried():
    assert {chapter for chapter, _ in RUNS} == {chapter for chapter, *_ in REFUSED} == set(CHAPTERS)
