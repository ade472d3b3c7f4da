"""Runs from files: every file of the book, wrong lines, missing weights, kill and resume, the sweep."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from mllmfl_lite import runs
from mllmfl_lite.federated.methods import FedSettings
from mllmfl_lite.models import load_model
from mllmfl_lite.runs.experiment import Experiment
from mllmfl_lite.runs.launch import (
    NOTEBOOK,
    RUNS,
    RunError,
    find_files,
    main,
    notebook_parameters,
    pipeline_of,
    read_run,
)
from mllmfl_lite.runs.results import differences, load_result, save_result

FILES = sorted(RUNS.rglob("*.yaml"))
ROOT = Path(__file__).parent.parent
PYTHON = {"str": str, "int": int, "float": (int, float), "bool": bool}
TINY = {
    "rounds": 4, "report_rounds": 1, "width": 4, "batch_size": 64, "local_epochs": 1, "num_clients": 4,
    "clients_per_round": 2, "align": True, "align_teacher": "clip", "align_epochs": 1, "align_per_class": 5,
}  # fmt: skip


def write(path, **values):
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def tiny(tmp_path):
    return write(tmp_path / "tiny.yaml", label="tiny", folder=str(tmp_path / "out"), **TINY)


# ------------------------------------------------------------------------------------------------------- the files


def test_there_is_a_file_for_every_scale_benchmark_and_method():
    names = {path.relative_to(RUNS).as_posix() for path in FILES}
    paper = [f"{d}_lt_if{f}" for d in ("cifar10", "cifar100") for f in (10, 50, 100)] + ["imagenet_lt"]
    wanted = {"paper": paper, "medium": paper, "laptop": [f"cifar10_mini_lt_if{f}" for f in (10, 50, 100)]}
    methods = ("fedavg", "fedavgm", "fedprox", "creff", "clip2fl", "mllm_llava_fl", "stage1", "stage3", "stage3_ce",
               "server_only", "creff_stage3", "clip2fl_stage3", "mllm_llava_fl_ce")  # fmt: skip
    lacking = {f"{s}/{b}/{m}.yaml" for s, found in wanted.items() for b in found for m in methods} - names
    assert not lacking


@pytest.mark.parametrize("benchmark", runs.benchmarks())
def test_every_key_is_a_parameter_of_the_notebook_with_its_type(benchmark):
    """Looked up in the notebook itself, not by the code that reads runs."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    (source,) = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    typed = {
        line.split(":")[0]: line.split(":")[1].split("=")[0].strip() for line in source.splitlines() if "=" in line
    }
    for path in (RUNS / benchmark).glob("*.yaml"):
        given = yaml.safe_load(path.read_text())
        assert all(isinstance(value, PYTHON[typed[key]]) for key, value in given.items()), path
        assert given["folder"] == f"results/{benchmark}" and given["label"] == path.stem
        read_run(path)


def test_the_files_are_what_the_script_writes(tmp_path):
    sys.path.insert(0, str(ROOT / "scripts"))
    import write_runs

    write_runs.write_all(tmp_path)
    written = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*.yaml")}
    assert written == {p.relative_to(RUNS): p.read_text() for p in FILES}


def test_the_papers_protocol_is_the_packages_default():
    """`Experiment` and `FedSettings` have the benchmark's numbers as defaults; the files say the same."""
    fedavg = pipeline_of(read_run(RUNS / "paper/cifar10_lt_if100/fedavg.yaml")).experiment
    assert fedavg.settings == FedSettings()
    own = asdict(Experiment())
    there = {k: v for k, v in asdict(fedavg).items() if k not in ("mllm", "mllm_dtype", "clip", "pool", "image_size")}
    assert there == {k: own[k] for k in there}


def committed():
    """Results files that git knows and that a run's file would have made."""
    listed = subprocess.run(["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True, check=False)
    paths = [ROOT / line for line in listed.stdout.splitlines() if line.endswith(".json")]
    of_runs = {path.relative_to(RUNS).with_suffix("").as_posix() for path in FILES}
    for path in paths:
        name, _, seed = path.relative_to(ROOT / "results").with_suffix("").as_posix().rpartition("_seed")
        if name in of_runs:
            yield name, int(seed), path


def test_committed_results_have_the_parameters_of_their_file():
    there = list(committed())
    assert len(there) >= 100
    for name, seed, path in there:
        (run,) = runs.read_runs(find_files([name]), [seed])
        found = load_result(path)["parameters"]
        expected = json.loads(json.dumps(asdict(run.pipeline.experiment)))
        for of, default in ((found, Experiment()), (found["settings"], FedSettings())):
            of.update({k: v for k, v in json.loads(json.dumps(asdict(default))).items() if k not in of})
        if found["align"]:
            found["align"] = {**expected["align"], **found["align"]}
        assert differences(found, expected) == "", path


# ----------------------------------------------------------------------------------------------------- wrong files


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("ruonds: 20", "'ruonds' is no parameter of run.ipynb; is 'rounds' meant?"),
        ("rounds: 2.5", "rounds must be of type int; got 2.5, of type float"),
        ("rounds: true", "rounds must be of type int; got True, of type bool"),
        ("lr: 1e-4", "lr must be of type float; got '1e-4', of type str; YAML reads 1e-4 as text, write 1.0e-4"),
        ("width: '16'", "width must be of type int; got '16', of type str"),
        ("lr: true", "lr must be of type float; got True, of type bool"),
        ("align: 1", "align must be of type bool; got 1, of type int"),
        ("dataset: 10", "dataset must be of type str; got 10, of type int"),
        ("rounds: 5\nrounds: 6", "the key 'rounds' stands twice"),
        ("- rounds", "must hold lines of the form `name: value`; it holds a list"),
        ("rounds: [", "cannot be read"),
        ("", "it holds a NoneType"),
        ("rounds: 0", "rounds must be a whole number of at least 1; got 0"),
        ("dataset: cifar11", "dataset must be one of cifar10_mini, cifar10, cifar100, imagenet_lt; got 'cifar11'"),
        ("method: fedevg", "no method named 'fedevg'; there are fedavg"),
        ("align: true\nalign_beta: -1.0", "beta must be at least 0"),
        ("pretrain: true\npool: my_pictures", "set annotations to 'new'"),
        ("align_beta: 1.0", "align_beta has no effect without `align: true`"),
        ("pretrain: true\nstart: dwp_linear", "stage 1 makes the weights that the rounds start from"),
        ("imbalance_factor: .nan", "imbalance_factor must be at least 1 and finite; got nan"),
        ("alpha: 0.0", "alpha must be positive and finite; got 0.0"),
        ("clients_per_round: 50", "clients_per_round is 50, but there are only 10 clients"),
        ("pool_images: -5", "pool_images must be a whole number of at least 0; got -5"),
        ("pool: cifar10", "cifar10 has no open pictures"),
        ("label: 2024-02-30", "cannot be read"),
        ("? [a]\n: 1\n? [a]\n: 2", "stands twice"),
    ],
)
def test_a_wrong_file_is_refused_with_the_rule_the_value_and_the_fix(tmp_path, line, says):
    path = tmp_path / "wrong.yaml"
    path.write_text(line + "\n")
    with pytest.raises(RunError) as refused:
        read_run(path)
    assert says in str(refused.value) and "wrong.yaml" in str(refused.value)


def test_all_wrong_lines_of_all_files_are_named_and_nothing_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "run_pipeline", None)
    write(tmp_path / "a.yaml", ruonds=3, width=2.5)
    write(tmp_path / "b.yaml", lr="fast")
    assert main([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]) == 2
    said = capsys.readouterr().err
    assert "ruonds" in said and "width" in said and "lr must be" in said
    assert main(["paper/cifar11"]) == 2
    assert "there is no run 'paper/cifar11'; there are" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- running


def test_without_its_weights_a_paper_run_stops_in_seconds_and_says_what_to_fetch(tmp_path):
    started = time.perf_counter()
    command = [sys.executable, "-m", "mllmfl_lite.runs", "paper/cifar10_lt_if100/mllm_llava_fl", "--seeds", "7"]
    empty = {"MLLMFL_DATA": str(tmp_path), "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, env={**os.environ, **empty}, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and time.perf_counter() - started < 60, done.stderr
    for word in (
        "CIFAR-10 (0.17 GB",
        "CC-595K",
        "LLaVA-1.5-7B (14.1 GB; Llama 2",
        "hf download llava-hf/llava-1.5-7b-hf",
    ):
        assert word in done.stderr
    for word in ("stage 1: the MLLM describes 595,375 pictures", "rounds: 200 x 8 clients x 10 epochs", "in all"):
        assert word in done.stdout
    assert not (ROOT / "results/paper/cifar10_lt_if100/mllm_llava_fl_seed7.json").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:the pool has fewer")
def test_killed_twice_it_ends_as_if_it_had_not_been(tmp_path, tiny):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mllmfl_lite.runs", str(tiny), "--device", "cpu"]
    for rounds in (1, 2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and steps(out) < rounds:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 0 < steps(out) <= 4 and not (out / "tiny_seed0.json").exists()
    assert main([str(tiny), "--device", "cpu"]) == 0
    killed = load_result(out / "tiny_seed0.json")
    quiet = runs.run_pipeline(pipeline_of(read_run(tiny)), tmp_path / "quiet", "cpu", "tiny")
    assert [strip(record) for record in killed["history"]] == [strip(record) for record in quiet["history"]]
    assert killed["summary"] == quiet["summary"] and killed["aligned"] == quiet["aligned"]
    for stage in ("federated", "aligned"):
        both = [load_model(f / "models" / f"tiny_seed0-{stage}.safetensors") for f in (out, tmp_path / "quiet")]
        assert all(map(torch.equal, *(model.state_dict().values() for model in both)))
    report = json.loads((out / "reports" / "tiny_seed0.ipynb").read_text())
    assert not any(o["output_type"] == "error" for c in report["cells"] for o in c.get("outputs", ()))
    assert any("image/png" in o.get("data", {}) for c in report["cells"] for o in c.get("outputs", ()))


def steps(out):
    (found,) = [json.loads(p.read_text())["step"] for p in out.glob("checkpoints/*/run.json")] or [0]
    return found


def strip(record):
    return {key: value for key, value in record.items() if key != "seconds"}


def test_a_sweep_skips_what_is_done_and_goes_on_after_a_failure(tmp_path, capsys, monkeypatch):
    ran = []

    def run(pipeline, folder, device, label, together):
        ran.append((label, pipeline.experiment.settings.seed))
        if label == "bad":
            raise ModuleNotFoundError("whatever it is")
        finish(pipeline, folder / f"{label}_seed{pipeline.experiment.settings.seed}.json")
        return {"summary": {"top1": 0.5}}

    monkeypatch.setattr(runs, "run_pipeline", run)
    monkeypatch.setattr(runs, "write_report", lambda run: None)
    files = [str(write(tmp_path / f"{m}.yaml", label=m, folder=str(tmp_path / "o"), **TINY)) for m in ("bad", "good")]
    assert main([*files, "--seeds", "0", "1"]) == 1
    assert ran == [("bad", 0), ("good", 0), ("bad", 1), ("good", 1)]
    said = capsys.readouterr()
    assert "4 runs, 0 of them done" in said.out and "failed: ModuleNotFoundError: whatever it is" in said.err
    assert main([*files, "--seeds", "0", "1"]) == 1
    assert ran[4:] == [("bad", 0), ("bad", 1)] and "4 runs, 2 of them done" in capsys.readouterr().out


def finish(pipeline, path):
    save_result(path, {"parameters": asdict(pipeline.started)})


def test_a_file_of_the_right_name_is_not_enough_to_be_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "run_pipeline", None)
    own = write(tmp_path / "own.yaml", label="x", folder=str(tmp_path / "o"), **TINY)
    (run,) = runs.read_runs([own])
    finish(run.pipeline, run.result)
    assert main([str(own)]) == 0 and "1 runs, 1 of them done" in capsys.readouterr().out
    write(own, label="x", folder=str(tmp_path / "o"), **{**TINY, "lr": 0.9})
    assert main([str(own)]) == 2 and "settings.lr there 0.1, now 0.9" in capsys.readouterr().err
    run.result.write_text('{"format": 1, "hist')
    assert main([str(own)]) == 2 and "x_seed0.json is not a results file" in capsys.readouterr().err


def test_a_report_that_failed_is_written_the_next_time(tmp_path, capsys, monkeypatch):
    own = write(tmp_path / "own.yaml", label="x", folder=str(tmp_path / "o"), **TINY)
    (run,) = runs.read_runs([own])  # the parameters are read once, here, while the notebook is there
    monkeypatch.setattr(runs, "NOTEBOOK", tmp_path / "gone.ipynb")
    assert main([str(own), "--device", "cpu"]) == 1 and "their report failed" in capsys.readouterr().err
    assert run.result.exists() and not run.is_done() and not run.report.exists()
    monkeypatch.undo()
    assert main([str(own), "--device", "cpu"]) == 0 and run.is_done() and run.report.exists()


def test_two_runs_never_write_one_file_and_a_seed_counts_once(tmp_path):
    files = [write(tmp_path / f"{m}.yaml", label="x", folder=str(tmp_path / "o"), **TINY) for m in ("a", "b")]
    with pytest.raises(RunError, match=r"would both write .*x_seed0.json; give one of them another label"):
        runs.read_runs(files)
    assert [run.values["seed"] for run in runs.read_runs([files[0]] * 2, [1, 0, 1])] == [1, 0]


def test_a_file_may_name_its_seed_and_device_and_must_name_its_place(tmp_path):
    path = write(tmp_path / "a.yaml", label="x", folder="o", seed=7, device="cpu")
    assert [run.values["seed"] for run in runs.read_runs([path])] == [7]
    assert [run.values["seed"] for run in runs.read_runs([path], [1, 2])] == [1, 2]
    for missing in ("label", "folder"):
        other = write(tmp_path / "b.yaml", **{"label": "x", "folder": "o", missing: ""})
        with pytest.raises(RunError, match=f"b.yaml needs a {missing}"):
            runs.read_runs([other])
    with pytest.raises(RunError, match="a seed must be a whole number of at least 0; got -1"):
        runs.read_runs([path], [-1])


def test_what_stops_the_plan_is_one_sentence(tmp_path, capsys):
    asks = {**TINY, "align_teacher": "mllm", "mllm": "some/llm"}
    own = write(tmp_path / "own.yaml", label="x", folder=str(tmp_path / "o"), **asks)
    assert main([str(own), "--plan", "--on", "h100"]) == 2
    said = capsys.readouterr().err
    assert "not here, and not fetched for you:\n  some/llm" in said and "the size of 'some/llm' is not known" in said


def test_what_is_shared_takes_disk_once():
    names = [f"paper/imagenet_lt/{m}" for m in ("stage1", "mllm_llava_fl")]
    todo = runs.read_runs(find_files(names), [0])
    plans = [runs.make_plan(run.pipeline, runs.MACHINES["h100"]) for run in todo]
    both = sum(stage.disk for stages in runs.own_stages(todo, plans) for stage in stages)
    stage_one = sum(stage.disk for stage in plans[0].stages[:2])
    # mllm_llava_fl has all that stage1 has: stages 1 and 2
    assert stage_one > 2**20 and both == plans[1].disk


def test_several_processes_may_do_stage_one_only(tmp_path, capsys, monkeypatch):
    own = write(tmp_path / "own.yaml", label="x", folder=str(tmp_path / "o"), pretrain=True, **TINY)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([str(own)]) == 2 and "add --stage1" in capsys.readouterr().err
    monkeypatch.setattr(runs, "run_pipeline", None)
    monkeypatch.setattr(runs, "stage_one", lambda pipeline, folder, device: folder / pipeline.started.start)
    assert main([str(own), "--stage1"]) == 0 and "stage1/resnet8_seed0.safetensors" in capsys.readouterr().out


def test_a_plan_starts_nothing(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.setattr(runs, "run_pipeline", None)
    assert main([str(tiny), "--plan", "--on", "h100"]) == 0
    assert "on H100 80 GB, reckoned (rates reckoned, not measured)" in capsys.readouterr().out
    assert main(["laptop/cifar10_mini_lt_if100", "--seeds", "9", "--plan", "--on", "8xh100"]) == 0
    assert "in all, one after the other" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_work_that_runs_share_is_counted_once():
    machine = runs.MACHINES["h100"]
    names = [f"paper/cifar10_lt_if{f}/{m}" for f in (100, 50) for m in ("fedavg", "stage3", "mllm_llava_fl")]
    todo = runs.read_runs(find_files(names), [0, 1])
    plans = [runs.make_plan(run.pipeline, machine) for run in todo]
    spent = runs.own_seconds(todo, plans, machine)
    whole, third, other = (3600 * plans[i].hours for i in (0, 2, 5))
    described, learned, scored = (stage.seconds(machine) for stage in plans[2].stages[:3])
    aligned = plans[1].stages[-1].seconds(machine)
    assert spent[names[0]] == pytest.approx([whole, whole])  # another seed has rounds of its own
    # stages 2 and 3: FedAvg's rounds are there, and with the second seed the MLLM's answers, too
    assert spent[names[1]] == pytest.approx([scored + aligned, aligned])
    # all stages: rounds of their own, since they start elsewhere; pictures are described once, for both seeds
    assert spent[names[2]] == pytest.approx([third - scored, third - scored - described])
    # the other imbalance finds all of stage 1 and the answers in the folder that both share, for both seeds
    assert spent[names[4]] == pytest.approx([aligned, aligned])
    assert spent[names[5]] == pytest.approx([other - described - learned - scored] * 2)


def test_models_share_what_the_mllm_says_of_a_pool():
    machine, names = runs.MACHINES["h100"], ["paper/cifar10_lt_if100/stage1", "paper/imagenet_lt/stage1"]
    todo = runs.read_runs(find_files(names), [0])
    plans = [runs.make_plan(run.pipeline, machine) for run in todo]
    described = plans[1].stages[0].seconds(machine)
    (first,), (second,) = runs.own_seconds(todo, plans, machine).values()
    assert first == pytest.approx(3600 * plans[0].hours)
    assert second == pytest.approx(3600 * plans[1].hours - described)  # it still pretrains a model of its own


def test_what_does_not_fit_is_said(capsys):
    (run,) = runs.read_runs(find_files(["paper/cifar10_lt_if100/mllm_llava_fl"]), [7])
    for memory, fits in ((40, False), (80, True)):
        runs.tell_plan([run], replace(runs.MACHINES["h100"], memory=memory * 2**30))
        assert ("This will not fit: 55." in capsys.readouterr().out) == (not fits)


def test_papermill_takes_a_file_without_us(tmp_path, tiny):
    values = {**yaml.safe_load(tiny.read_text()), "align": False, "rounds": 1}
    path, out = write(tmp_path / "own.yaml", **values), tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", "--kernel", "python3", str(NOTEBOOK), str(out), "-f", str(path)]
    subprocess.run([*command, "-p", "seed", "3", "--no-progress-bar"], check=True, capture_output=True)
    assert load_result(tmp_path / "out" / "tiny_seed3.json")["parameters"]["settings"]["rounds"] == 1
    assert notebook_parameters()["rounds"].default == 20


# ------------------------------------------------------------------------------------------------ the results page


def test_the_results_page_is_what_the_files_say_and_names_every_run():
    """The page is of the committed files: results of one's own change it, by `make results`."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import write_results

    text = write_results.PAGE.read_text()
    for benchmark in runs.benchmarks():
        (section,) = [part for part in text.split("\n### ") if f"`notebooks/runs/{benchmark}`:\n" in part]
        assert [p.stem for p in (RUNS / benchmark).glob("*.yaml") if f"| `{p.stem}` |\n" not in section] == []
    of_git = {path for _, _, path in committed()}
    here = {run.result for path in FILES for run in runs.read_runs([path], write_results.SEEDS) if run.result.exists()}
    if here == of_git:
        assert text == write_results.page(), "run `make results`"


def test_a_sweep_on_the_results_page_takes_what_its_plan_says(capsys):
    main(["paper/cifar100_lt_if50", "--seeds", "0", "1", "2", "--plan", "--on", "h100"])
    (total,) = re.findall(r"in all, one after the other +(.*?)  ", capsys.readouterr().out)
    (part,) = [p for p in (ROOT / "book" / "results.md").read_text().split("\n### ") if "paper/cifar100_lt_if50`" in p]
    assert f"All of them with 3 seeds in one sweep, what they share done once: {total}.\n" in part


def test_rows_of_the_results_page():
    page = (ROOT / "book" / "results.md").read_text().split("\n### ")
    (empty,) = [part for part in page if "`notebooks/runs/paper/imagenet_lt`:" in part]
    row = next(line for line in empty.splitlines() if "`mllm_llava_fl`" in line)
    assert "ImageNet, the official lists" in row and "LLaVA-1.5-7B" in row and " h |" in row and "GiB" in row
    (full,) = [part for part in page if "`notebooks/runs/medium/cifar10_lt_if100`:" in part]
    row = next(line for line in full.splitlines() if line.endswith("`creff` |"))
    found = [load_result(path) for name, _, path in committed() if name == "medium/cifar10_lt_if100/creff"]
    of_seeds = [[r["summary"]["top1"], *(r["summary"]["groups"][g] for g in ("head", "tail"))] for r in found]
    means = [100 * sum(values) / len(found) for values in zip(*of_seeds, strict=True)]
    assert [cell.split("\u00a0±")[0] for cell in row.split(" | ")[1:4]] == [f"{mean:.1f}" for mean in means]
    assert f"| {len(found)} |" in row
    assert f"commit `{found[0]['provenance']['revision'][:7]}`: " in full
