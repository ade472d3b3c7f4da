"""Runs from files: every file of the book, wrong files, the commands, the notebook, committed results."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from mllmfl_lite import __main__ as module
from mllmfl_lite.__main__ import main
from mllmfl_lite.data.metrics import summarise
from mllmfl_lite.measure.transfer import best
from mllmfl_lite.models import load_model
from mllmfl_lite.runs import experiment_of, load_result, load_results, parameters_of, run_experiment, save_result
from mllmfl_lite.runs.files import read_runs, read_settings
from mllmfl_lite.runs.run import finished

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "notebooks" / "runs"
NOTEBOOK = RUNS / "run.ipynb"
BENCHMARKS = sorted(path for scale in ("laptop", "medium", "paper") for path in (RUNS / scale).glob("*.yaml"))
METHODS = sorted((RUNS / "methods").glob("*.yaml"))
FEW = sorted((RUNS / "methods").glob("*/*.yaml"))
TINY = {
    "dataset": "cifar10_mini", "num_clients": 4, "width": 4, "stages": [2, 3],
    "federated": {"rounds": 4, "clients_per_round": 2, "local_epochs": 1, "batch_size": 64, "report_rounds": 1},
    "align": {"per_class": 5, "epochs": 1, "teacher": "clip"},
}  # fmt: skip


def write(path, **values):
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture
def tiny(tmp_path):
    return write(tmp_path / "tiny.yaml", **TINY)


# --------------------------------------------------------------------------------------------------- the book's files


def test_there_is_a_file_for_every_scale_benchmark_and_method():
    full = [f"{data}_lt_if{factor}" for data in ("cifar10", "cifar100") for factor in (10, 50, 100)] + ["imagenet_lt"]
    clean, laptop = "cifar10_lt_if100_clean", [f"cifar10_mini_lt_if{factor}" for factor in (10, 50, 100)]
    wanted = {"paper": full, "medium": [*full, clean], "laptop": [*laptop, "cifar10_mini_lt_if10_long"]}
    assert {(s, b) for s, names in wanted.items() for b in names} == {(p.parent.name, p.stem) for p in BENCHMARKS}
    methods = {"fedavg", "fedavgm", "fedprox", "creff", "clip2fl", "mllm_llava_fl", "stage1", "stage3", "stage3_ce",
               "server_only", "creff_stage3", "clip2fl_stage3", "mllm_llava_fl_ce"}  # fmt: skip
    assert methods <= {path.stem for path in METHODS}


def notebook_defaults():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    (source,) = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    return {line.target.id: ast.literal_eval(line.value) for line in ast.parse(source).body}


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_notebook_and_the_command_read_the_same_runs(benchmark):
    """Papermill replaces keys of the notebook's own parameters, which are those at laptop scale."""
    runs = read_runs([benchmark], METHODS + FEW, [1])
    assert len(runs) == len(METHODS + FEW)
    for run, path in zip(runs, METHODS + FEW, strict=True):
        assert run.label == path.stem
        assert experiment_of({**notebook_defaults(), **read_settings([benchmark, path]), "seed": 1}) == run.experiment


def test_every_setting_is_a_parameter_of_the_notebook():
    (run,) = read_runs(BENCHMARKS[:1])
    assert parameters_of(run.experiment).keys() <= notebook_defaults().keys()


# --------------------------------------------------------------------------------------------------- committed results


def committed():
    listed = subprocess.run(["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in listed.stdout.splitlines() if line.endswith(".json")]
    return [ROOT / line for line in lines if not {"tuning", "tuned"} & set(Path(line).parts)]  # see test_evidence.py


def test_committed_results_have_the_parameters_of_their_files():
    methods, checked = {path.stem: path for path in METHODS + FEW}, 0
    for path in committed():
        label, _, seed = path.stem.rpartition("_seed")
        benchmark = RUNS / f"{path.parent.relative_to(ROOT / 'results')}.yaml"
        if benchmark.exists() and label in methods:
            (run,) = read_runs([benchmark], [methods[label]], [int(seed)])
            assert finished(path, run.experiment)["label"] == label
            checked += 1
    assert checked > 150 or not committed()


def test_a_later_file_replaces_single_keys_of_a_block(tmp_path):
    (tmp_path / "world.yaml").write_text("dataset: cifar10_mini\nfederated: {rounds: 3, lr: 0.1}\n")
    (tmp_path / "method.yaml").write_text("method: fedprox\nmethod_options: {mu: 0.5}\nfederated: {lr: 0.3}\n")
    (run,) = read_runs([tmp_path / "world.yaml"], [tmp_path / "method.yaml"])
    assert (run.experiment.federated.rounds, run.experiment.federated.lr) == (3, 0.3)


def test_committed_results_are_whole():
    """Parameters that make an experiment, a summary recomputed from the history, a clean revision, three seeds."""
    seeds = {}
    for path in committed():
        result = load_result(path)
        numbers = result["parameters"]
        if "federated" in numbers and "condition" not in numbers:  # others have a script of their own
            experiment = experiment_of(numbers)
            assert parameters_of(experiment) == {k: v for k, v in numbers.items() if k != "control"}
            assert len(result["history"]) == (experiment.federated.rounds if 2 in experiment.stages else 0)
            final = [result["aligned"]] if "metrics" in result.get("aligned", ()) else result["history"]
            assert result["summary"] == summarise(final, experiment.federated.report_rounds)
        elif "best" in result.get("summary", ()):
            assert result["summary"]["best"] == best(result["history"])
            assert result["summary"]["last"] == result["history"][-1]["metrics"]["top1"]
        assert len(result["provenance"]["revision"]) == 40, "made from uncommitted code"
        once = "ways" in result or path.parent == ROOT / "results" / "real" / "pretraining"  # the page there says so
        if "seed" in numbers and not once:  # what a teacher knows by itself has none
            seeds.setdefault((path.parent, result["label"]), set()).add(numbers["seed"])
    assert all(len(of) >= 3 for of in seeds.values()), seeds


# --------------------------------------------------------------------------------------------------------- wrong files


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("ruonds: 20", "'ruonds' is no setting; there are"),
        ("rounds: 20", "rounds: write it inside federated, pretrain or align"),
        ("federated: {rounds: 2.5}", "federated.rounds: must be a valid integer; got 2.5"),
        ("align: 1", "align: must be a block of settings; got 1"),
        ("dataset: 10", "dataset: must be"),
        ("width: 5\nwidth: 6", "cannot be read: the key 'width' stands twice; keep one of them"),
        ("federated: {lr: 0.1, lr: 0.2}", "the key 'lr' stands twice"),
        ("? [a]\n: 1", "cannot be read"),
        ("federated: {1: 2}", "federated.1: there is no such setting"),
        (
            "method_options: {a: &a [x], "
            + ", ".join(f"{b}: &{b} [*{a}, *{a}]" for a, b in pairwise("abcdefghijklmnopqrstuvwxyz"))
            + "}",
            "aliases (*name) are not allowed; write the value out",
        ),
        ("width: " + "[" * 5_000, "cannot be read"),
        ("width: " + "{a: " * 5_000, "cannot be read"),
        ("- width", "must hold lines of the form `name: value`; it holds a list"),
        ("", "it holds a NoneType"),
        ("width: [", "cannot be read"),
        ("width: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("start: 2024-02-30", "cannot be read"),
        ("start: 2024-02-20", "start: must be a valid string"),
        ("width: " + "9" * 5_000, "cannot be read"),
        ("pool: a\0b", "cannot be read"),
    ],
    ids=lambda value: value[:30],
)
def test_a_wrong_file_is_refused_with_its_name_the_rule_and_the_value(tmp_path, content, says):
    (tmp_path / "wrong.yaml").write_text(content + "\n", encoding="utf-8")
    started = time.perf_counter()
    with pytest.raises(ValueError) as refused:
        read_runs([tmp_path / "wrong.yaml"])
    assert says in str(refused.value) and str(refused.value).startswith(str(tmp_path / "wrong.yaml"))
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 600
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("content", [b"\xff\xfew\0i\0", "pool: Gr\xfc\xdfe".encode("latin-1")])
def test_a_file_that_is_no_utf_8_is_refused(tmp_path, content):
    (tmp_path / "wrong.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"wrong.yaml cannot be read: 'utf-8' codec can't decode"):
        read_settings([tmp_path / "wrong.yaml"])


def test_files_are_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("\ufeffpool: Bilder/Größe-图\nstages: [2, 3]\n".encode())
    code = f"from mllmfl_lite.runs.files import *; print(ascii(read_settings([{str(tmp_path / 'mine.yaml')!r}])))"
    latin = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = subprocess.run([sys.executable, "-c", code], env=latin, capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(said) == {"pool": "Bilder/Größe-图", "stages": [2, 3]}


def test_all_wrong_settings_are_named_each_with_its_file(tmp_path, capsys):
    bench = write(tmp_path / "bench.yaml", width=2.5, federated={"lr": "fast"})
    one = write(tmp_path / "one.yaml", method="fedevg", stages=[2])
    two = write(tmp_path / "two.yaml", ruonds=3)
    out = ["--out", str(tmp_path / "out")]
    assert main(["run", str(bench), "--methods", str(one), str(two), *out]) == 2
    said = capsys.readouterr().err
    assert f"{bench}: width: must be" in said and f"{bench}: federated.lr: must be" in said
    assert f"{two}: 'ruonds' is no setting" in said and said.count("width") <= 2 and not (tmp_path / "out").exists()
    assert main(["run", str(write(bench, width=4)), "--methods", str(one), *out]) == 2
    assert f"{one}: method must be one of" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "no.yaml"), *out]) == 2 and "no.yaml cannot be read" in capsys.readouterr().err


def test_two_runs_never_write_one_file_and_a_file_and_a_seed_count_once(tmp_path, tiny):
    (tmp_path / "other").mkdir()
    same = write(tmp_path / "other" / "tiny.yaml", method="fedprox")
    with pytest.raises(
        ValueError, match=r"tiny.yaml and .*other/tiny.yaml would write the same results files; rename one"
    ):
        read_runs([tiny], [tiny, same])
    assert [run.experiment.seed for run in read_runs([tiny], [tiny, tiny], [1, 0, 1])] == [0, 1]
    assert [run.experiment.seed for run in read_runs([write(tmp_path / "a.yaml", seed=7)])] == [7]
    with pytest.raises(ValueError, match=r"tiny.yaml: seed: must be greater than or equal to 0; got -1"):
        read_runs([tiny], seeds=[-1])
    with pytest.raises(ValueError, match="label must be a file name"):
        read_runs([write(tmp_path / ".hidden.yaml", width=4)])


# ------------------------------------------------------------------------------------------------------- the commands


def strip(record):
    return {key: value for key, value in record.items() if key != "seconds"}


@pytest.mark.filterwarnings("ignore:the pool has fewer")
def test_killed_twice_it_ends_as_if_it_had_not_been_and_the_report_shows_it(tmp_path, tiny):
    out = tmp_path / "out"
    words = ["run", str(tiny), "--out", str(out), "--device", "cpu"]

    def steps():
        found = [json.loads(p.read_text())["step"] for p in out.glob("checkpoints/*/run.json")]
        return found[0] if found else 0

    for rounds in (1, 2):
        process = subprocess.Popen([sys.executable, "-m", "mllmfl_lite", *words], stdout=subprocess.DEVNULL)
        while process.poll() is None and steps() < rounds:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 0 < steps() <= 4 and not (out / "tiny_seed0.json").exists()
    assert main([*words, "--report", str(NOTEBOOK)]) == 0
    killed, (run,) = load_result(out / "tiny_seed0.json"), read_runs([tiny])
    quiet = run_experiment(run.experiment, tmp_path / "quiet", "cpu", label="tiny")
    assert [strip(record) for record in killed["history"]] == [strip(record) for record in quiet["history"]]
    assert killed["summary"] == quiet["summary"] and killed["aligned"] == quiet["aligned"]
    for stage in ("federated", "aligned"):
        both = [load_model(f / "models" / f"tiny_seed0-{stage}.safetensors") for f in (out, tmp_path / "quiet")]
        assert all(map(torch.equal, *(model.state_dict().values() for model in both)))
    report = json.loads((out / "reports" / "tiny_seed0.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in report["cells"] for output in cell.get("outputs", ())]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.filterwarnings("ignore:the pool has fewer")
def test_papermill_takes_the_files_without_us_and_makes_the_same_run(tmp_path, tiny):
    method = write(tmp_path / "y.yaml", method="fedprox", stages=[2])
    words = [
        "--kernel",
        "python3",
        "--no-progress-bar",
        "--log-level",
        "ERROR",
        str(NOTEBOOK),
        str(tmp_path / "o.ipynb"),
    ]
    words += ["-f", str(tiny), "-f", str(method), "-p", "label", "y", "-p", "seed", "3", "-p", "folder", str(tmp_path)]
    papermill = [sys.executable, "-m", "papermill", *words]
    subprocess.run(papermill, check=True, capture_output=True)
    (run,) = read_runs([tiny], [method], [3])
    (result,) = load_results(tmp_path)
    assert finished(run.result(tmp_path), run.experiment) == result and result["label"] == "y"
    refused = subprocess.run([*papermill, "-p", "align", "false"], capture_output=True, text=True, check=False)
    assert refused.returncode and "align: must be a block of settings; got 'false'" in refused.stderr


def test_a_sweep_skips_what_is_done_and_goes_on_after_a_failure(tmp_path, capsys, monkeypatch):
    ran = []

    def run(experiment, folder, device, label, shared):
        ran.append((label, experiment.seed))
        if label == "bad":
            raise ModuleNotFoundError("whatever it is")
        result = {"label": label, "parameters": asdict(experiment), "summary": {"top1": 0.5}}
        save_result(Path(folder) / f"{label}_seed{experiment.seed}.json", result)
        return result

    monkeypatch.setattr(module, "run_experiment", run)
    methods = [str(write(tmp_path / f"{name}.yaml", method="fedprox")) for name in ("bad", "good")]
    words = [str(write(tmp_path / "tiny.yaml", **TINY)), "--methods", *methods, "--out", str(tmp_path / "out")]
    assert main(["run", *words, "--seeds", "0", "1"]) == 1
    assert ran == [("bad", 0), ("good", 0), ("bad", 1), ("good", 1)]
    said = capsys.readouterr()
    assert "4 runs, 0 of them done" in said.out and said.out.count("top-1 50.0% in") == 2
    assert "ModuleNotFoundError: whatever it is" in said.err and "started again: bad, seed 0; bad, seed 1" in said.err
    assert "nothing was started" not in said.err and "[1/4] bad, seed 0\n[2/4]" in said.out, "bad is not called done"
    assert main(["run", *words, "--seeds", "0", "1"]) == 1 and ran[4:] == [("bad", 0), ("bad", 1)]
    assert main(["plan", *words, "--on", "h100"]) == 0 and len(ran) == 6
    said = capsys.readouterr().out
    assert "2 runs, 1 of them done" in said and "bad, seed 0: about" in said and "estimated from operations" in said


def test_a_file_of_the_right_name_is_not_enough_to_be_done(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.setattr(module, "run_experiment", None)
    (run,) = read_runs([tiny])
    words = ["run", str(tiny), "--out", str(tmp_path)]
    save_result(run.result(tmp_path), {"parameters": asdict(run.experiment)})
    assert main(words) == 0 and "1 runs, 1 of them done" in capsys.readouterr().out
    write(tiny, **{**TINY, "alpha": 0.9})
    assert main(words) == 2 and "alpha: there 0.5, now 0.9" in capsys.readouterr().err
    run.result(tmp_path).write_text('{"hist')
    assert main(words) == 2 and "tiny_seed0.json is not a results file" in capsys.readouterr().err


def test_without_its_data_and_models_a_run_stops_and_says_what_to_fetch(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLLMFL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    method = str(RUNS / "methods" / "mllm_llava_fl.yaml")
    words = [str(RUNS / "paper" / "cifar10_lt_if100.yaml"), "--methods", method, "--out", str(tmp_path / "out")]
    assert main(["run", *words]) == 3
    said = capsys.readouterr().err
    assert "missing, and not fetched for you; nothing was started" in said
    for words_ in ("CIFAR-10 (0.17 GB", "CC-595K", "LLaVA-1.5-7B (14 GB; Llama 2", "hf download llava-hf/llava-1.5-7b"):
        assert words_ in said
    assert list(tmp_path.iterdir()) == []


def test_several_processes_may_do_stage_one_only(tmp_path, capsys, monkeypatch):
    words = ["run", str(write(tmp_path / "x.yaml", **{**TINY, "stages": [1, 2]})), "--out", str(tmp_path / "out")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2 and "add --stage1" in capsys.readouterr().err
    monkeypatch.setattr(module, "run_experiment", None)
    monkeypatch.setattr(module, "stage_one", lambda experiment, folder, device, shared: Path(folder) / shared / "here")
    assert main([*words, "--stage1", "--shared", ".."]) == 0 and "stage 1 in " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--report", "no.ipynb"], "there is no notebook no.ipynb"),
        (["--device", "mps"], "device must be 'auto', 'cpu'"),
    ],
)
def test_what_can_be_known_is_said_before_the_first_run(tmp_path, tiny, capsys, monkeypatch, words, says):
    monkeypatch.setattr(module, "run_experiment", None)
    assert main(["run", str(tiny), "--out", str(tmp_path / "out"), *words]) == 2 and says in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- make


def make(*words):
    return subprocess.run(
        ["make", "-o", ".venv/.installed", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip


def test_make_plans_a_run_and_names_what_there_is():
    planned = make("paper", "RUN=cifar10_lt_if100/mllm_llava_fl", "SEED=987654", "PLAN=1", "ON=h100")
    assert planned.returncode == 0, planned.stderr
    assert "1 runs, 0 of them done" in planned.stdout and "mllm_llava_fl, seed 987654: about" in planned.stdout
    few = make("paper", "RUN=cifar10_mini_lt_if100/stage3_imagenet", "SCALE=laptop", "PLAN=1")
    assert few.returncode == 0 and "1 runs, " in few.stdout, few.stderr
    for words, says in (
        (("paper", "RUN=cifar11/fedavg"), "no benchmark 'cifar11' at SCALE=paper, but: cifar100_lt_if10 cifar100_lt_"),
        (("paper", "RUN=cifar10_lt_if10/fedevg"), "there is no method 'fedevg', but: balanced_softmax clip2fl"),
        (("paper", "RUN=cifar10_lt_if10"), "there is no method '', but: balanced_softmax"),
        (("sweep",), "there is no benchmark ''"),
    ):
        refused = make(*words)
        assert refused.returncode and says in refused.stdout, refused.stdout
