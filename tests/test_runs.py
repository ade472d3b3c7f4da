"""One experiment: its configuration, its results file, its stages in one folder, kill and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mllmfl_lite.checkpoint import CheckpointError, RunFolder
from mllmfl_lite.data import load_images
from mllmfl_lite.federated import ClientDiverged, FedProx, FedSettings
from mllmfl_lite.models import load_model, save_model, with_head
from mllmfl_lite.repro import sha256_arrays
from mllmfl_lite.runs import (
    Experiment,
    experiment_of,
    load_federation,
    load_result,
    load_results,
    parameters_of,
    run_experiment,
    save_result,
)
from mllmfl_lite.runs import run as run_module
from mllmfl_lite.runs import stage1 as module
from mllmfl_lite.runs.parts import initial_model, make_method
from mllmfl_lite.runs.results import result_path
from mllmfl_lite.runs.stage1 import stage_one
from mllmfl_lite.stages.align import AlignSettings
from mllmfl_lite.stages.pretrain import PretrainSettings
from mllmfl_lite.stages.records import bundled_annotations
from mllmfl_lite.teachers.clip import ClipTeacher

ROUNDS = FedSettings(rounds=3, clients_per_round=2, local_epochs=1, batch_size=64, report_rounds=1)
QUICK = Experiment("cifar10_mini", num_clients=4, width=2, federated=ROUNDS)
ALL = replace(
    QUICK,
    stages=(1, 2, 3),
    pretrain=PretrainSettings(epochs=1, checkpoint_every=1),
    align=AlignSettings(per_class=3, epochs=2, teacher="clip"),
)
pytestmark = pytest.mark.filterwarnings("ignore:the pool has fewer")


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch.setattr)


def make_small(put):
    """Let 120 images of all kinds be the pool, so that a run takes seconds."""
    few = load_images("cifar10_mini", "web").subset(np.arange(0, 3000, 25))
    mine = {f"{25 * k:04d}": f"{k:03d}" for k in range(len(few))}
    records = [replace(r, id=mine[r.id]) for r in bundled_annotations() if r.id in mine]
    put(module, "load_pool", lambda experiment: few)
    put(run_module, "load_pool", lambda experiment: few)
    put(module, "bundled_annotations", lambda: records)


# ------------------------------------------------------------------------------------------------- the configuration


def test_the_papers_protocol_is_the_default():
    of = Experiment()
    assert (of.dataset, of.imbalance_factor, of.num_clients, of.alpha, of.width) == ("cifar10", 100, 20, 0.5, 64)
    rounds = of.federated
    assert (rounds.rounds, rounds.clients_per_round, rounds.local_epochs, rounds.batch_size, rounds.lr) == (
        200, 8, 10, 32, 0.1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"federated": {"rounds": 2.5}}, "federated.rounds: must be a valid integer"),
        ({"federated": {"rounds": True}}, "federated.rounds: must be a valid integer; got True"),
        ({"federated": {"rounds": 1_000_000_000}}, "federated.rounds: must be less than or equal to 1000000"),
        ({"federated": {"rounds": 0}}, "federated.rounds is 0; run at least one round, or leave 2 out of stages"),
        ({"federated": {"lr": "1e-4"}}, "federated.lr: must be a valid number; got '1e-4'; write 1.0e-4"),
        ({"federated": {"ruonds": 3}}, "federated.ruonds: there is no such setting"),
        ({"federated": {"clients_per_round": 50}}, "clients_per_round is 50, but num_clients is 20; draw at most"),
        ({"width": "16"}, "width: must be a valid integer; got '16'"),
        ({"width": 16.5}, "width: must be a valid integer; got 16.5"),
        ({"balanced": "false"}, "balanced: must be a valid boolean; got 'false'"),
        ({"imbalance_factor": float("nan")}, "imbalance_factor: must be"),
        ({"alpha": float("inf")}, "alpha: must be a finite number"),
        ({"alpha": 0.0}, "alpha: must be greater than 0"),
        ({"pool_images": -5}, "pool_images: must be greater than or equal to 0; got -5"),
        ({"seed": -1}, "seed: must be greater than or equal to 0; got -1"),
        ({"dataset": "cifar11"}, "dataset: must be 'cifar10_mini', 'cifar10', 'cifar100' or 'imagenet_lt'; got"),
        ({"method": "fedevg"}, "fednpc, feddf, clipped_norm, median, trimmed_mean, or 'module:Class'"),
        (
            {"method_options": {"mu": float("nan")}},
            "method_options must be finite numbers, switches or text; got {'mu'",
        ),
        ({"method_options": {"mu": {1}}}, "method_options must be finite numbers"),
        ({"method": "fedprox", "method_options": {"mu": [1]}}, "method_options.mu must be a number, not negative"),
        ({"method": "creff", "method_options": {"repeats": 0}}, "method_options.repeats must be a whole number"),
        ({"method": "creff", "method_options": {"images": 2.5}}, "method_options.images must be a whole number"),
        ({"stages": 2}, "stages: must be a valid tuple; got 2"),
        ({"stages": [[2]]}, "stages.0: must be 1, 2 or 3"),
        ({"stages": [3, 2]}, "stages must name 2, 3 or both, in rising order, each once; got [3, 2]"),
        ({"stages": [1]}, "stages must name 2, 3 or both"),
        ({"align": "false"}, "align: must be a block of settings; got 'false'"),
        ({"align": {"beta": -1.0}}, "align.beta: must be greater than or equal to 0"),
        ({"pretrain": {"order": "shuffled"}}, "pretrain.order: must be 'length' or 'random'"),
        ({"stages": [2, 3], "pool": "cifar10"}, "pool 'cifar10' has no open images; use 'cifar10_mini' or a folder"),
        ({"stages": [1, 2], "pool": "mine"}, "annotations are 'bundled', which describe the whole pool"),
        ({"stages": [1, 2], "pool_images": 9}, "annotations are 'bundled', which describe the whole pool"),
        ({"stages": [1, 2], "annotations": "old"}, "annotations must be 'bundled', 'new' or a .jsonl file; got 'old'"),
        ({"stages": [2, 3], "method": "creff", "align": {"when": "each round"}}, "which is a server step of 'fedavg'"),
        ({"federated": {1: 2}}, "federated.1: there is no such setting"),
        ({"rounds": 5}, "rounds: write it inside federated, pretrain or align"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_with_the_rule_and_the_value(wrong, says):
    with pytest.raises(ValueError) as refused:
        experiment_of(wrong)
    assert says in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ValueError) as refused:
        experiment_of({"width": 2.5, "federated": {"lr": "fast", "rounds": -1}, "align": 1, "lr": 0.1})
    named = {line.split(":")[0] for line in str(refused.value).splitlines()}
    assert named == {"lr", "align", "width", "federated.lr", "federated.rounds"}


def test_settings_of_a_stage_that_is_off_are_refused_in_python_and_dropped_from_files():
    with pytest.raises(ValueError, match="align has no effect without stage 3; add 3 to stages, or leave align out"):
        Experiment(align=AlignSettings(beta=1.0))
    assert experiment_of({"align": {"beta": 1.0}, "start": "x", "something else": 1}) == Experiment()


def test_numbers_of_numpy_are_numbers(tmp_path):
    numbers = {"width": np.int64(2), "alpha": np.float32(0.5), "seed": np.uint8(3), "balanced": np.bool_(True)}
    experiment = experiment_of({**numbers, "stages": [np.int64(2)], "method_options": {"mu": np.float64(0.1)}})
    assert [type(v) for v in (experiment.width, experiment.alpha, experiment.seed)] == [int, float, int]
    save_result(tmp_path / "x.json", {"parameters": parameters_of(experiment)})
    assert load_result(tmp_path / "x.json")["parameters"]["method_options"] == {"mu": 0.1}


def test_parameters_make_the_same_experiment_again():
    assert experiment_of(json.loads(json.dumps(parameters_of(ALL)))) == ALL


# -------------------------------------------------------------------------------------------------- the results file


def test_a_finished_run_is_read_back_and_another_ones_file_refused(tmp_path):
    fresh = run_experiment(QUICK, tmp_path, "cpu")
    assert run_experiment(QUICK, tmp_path, "cpu") == fresh
    with pytest.raises(ValueError, match=r"\(alpha: there 0.5, now 0.1\); set them back, or use another folder"):
        run_experiment(replace(QUICK, alpha=0.1), tmp_path, "cpu")
    with pytest.raises(ValueError, match=r"\(federated.lr: there 0.1, now 0.2\)"):
        run_experiment(replace(QUICK, federated=replace(ROUNDS, lr=0.2)), tmp_path, "cpu")


def test_a_results_file_says_what_was_run_on_what_and_where(tmp_path):
    result = run_experiment(QUICK, tmp_path, "cpu")
    assert load_results(tmp_path) == [result] and result["label"] == "fedavg"
    assert result["parameters"] == json.loads(json.dumps(asdict(QUICK)))
    assert result["data"]["train_images"] == len(load_federation(QUICK).train)
    known = {"date", "revision", "python", "packages", "device", "platform", "seconds_in_this_process"}
    assert known == result["provenance"].keys()
    assert [r["round"] for r in result["history"]] == [1, 2, 3]
    assert result["summary"]["top1"] == result["history"][-1]["metrics"]["top1"]
    model = load_model(tmp_path / "models" / "fedavg_seed0-federated.safetensors")
    assert model.names == load_federation(QUICK).train.names


def test_without_a_folder_nothing_is_kept_and_the_figures_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = [run_experiment(QUICK, folder, "cpu")["summary"] for folder in ("", "here")]
    assert figures[0] == figures[1] and [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("content", ["", "{}", "[1]", "null", '{"checksum": "", "parameters": 1}', '{"a": 1'])
def test_a_file_that_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x.json is not a results file, or damaged .*; remove it and run again"):
        load_results(tmp_path)


def test_every_flipped_byte_of_a_result_is_found(tmp_path):
    path = tmp_path / "x.json"
    save_result(path, {"label": "x", "parameters": {"lr": 0.1, "ok": True}, "history": [{"top1": 0.25}]})
    whole = path.read_bytes()
    for place, byte in enumerate(whole):
        if bytes([byte]).isspace() and bytes([byte ^ 3]).isspace():  # blanks between words say nothing
            continue
        path.write_bytes(whole[:place] + bytes([byte ^ 3]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"x.json is (not a results file|damaged)"):
            load_result(path)


@pytest.mark.parametrize("label", ["../x", "a/b", "", ".", "..", ".hidden", "a\0b", "a\nb", "x" * 300, 5])
def test_a_label_cannot_leave_the_folder(tmp_path, label):
    with pytest.raises(ValueError, match="label must be a file name without '/'"):
        result_path(tmp_path, label, 0)


def test_a_label_in_any_script(tmp_path):
    path = result_path(tmp_path, "联邦 学习-ß", 3)
    save_result(path, {"parameters": {}, "label": "联邦 学习-ß"})
    assert path.name == "联邦 学习-ß_seed3.json" and load_result(path)["label"] == "联邦 学习-ß"


def test_a_full_disk_and_a_folder_that_is_none_are_one_sentence(tmp_path):
    (tmp_path / "x.json.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"x.json cannot be written \(.*No space left on device.*\); make room or choose"):
        save_result(tmp_path / "x.json", {"parameters": {}})
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"x.json cannot be written"):
        save_result(tmp_path / "file" / "x.json", {"parameters": {}})
    with pytest.raises(CheckpointError, match=r"cannot be written .*; choose a folder that can be"):
        run_experiment(QUICK, tmp_path / "file", "cpu")


def test_two_that_would_write_one_file_are_refused(tmp_path):
    with (
        RunFolder(tmp_path / "checkpoints" / "fedavg_seed0", {}),
        pytest.raises(CheckpointError, match=r"fedavg_seed0 is in use by another run; wait for it, or use another"),
    ):
        run_experiment(QUICK, tmp_path, "cpu")


# -------------------------------------------------------------------------------------------------------- the parts


def test_controls_have_as_many_images():
    longtail, balanced = (load_federation(replace(QUICK, balanced=of)).train for of in (False, True))
    assert len(longtail) == len(balanced)
    assert balanced.class_counts().max() - balanced.class_counts().min() <= 1


def test_seeds_change_images_and_split():
    one, same, other = (load_federation(replace(QUICK, seed=seed)) for seed in (0, 0, 1))
    assert one.train.checksum() != other.train.checksum()
    assert [rows.tolist() for rows in one.split] == [rows.tolist() for rows in same.split]


def test_methods_by_name():
    train = load_federation(QUICK).train
    assert make_method(replace(QUICK, method="fedprox", method_options={"mu": 0.3}), train) == FedProx(mu=0.3)
    mine = replace(QUICK, method="mllmfl_lite.federated.methods:FedProx")
    assert make_method(mine, train) == FedProx()
    for wrong in ({"method": "nowhere:X"}, {"method_options": {"nu": 1.0}}):
        with pytest.raises(ValueError, match="cannot be made"):
            make_method(replace(QUICK, **wrong), train)


def test_a_start_is_seen_from_a_folder_that_is_not_there_yet(tmp_path):
    model = initial_model(QUICK, 10, None)
    with torch.no_grad():
        model.body[0].weight.fill_(0.25)
    save_model(tmp_path / "mine_1.safetensors", model, "resnet8", 2)
    started = replace(QUICK, stages=(1, 2), start="../mine_{seed}.safetensors", seed=1)
    result = run_experiment(started, tmp_path / "new", "cpu")
    expected = sha256_arrays(t.numpy() for t in with_head(model, 10, 1).state_dict().values())
    assert result["data"]["start_sha256"] == expected
    with pytest.raises(ValueError, match="holds another model than resnet8 of width 4; set model and width"):
        run_experiment(replace(started, width=4), tmp_path / "other", "cpu")


def test_what_would_stop_the_rounds_is_said_before_stage_one(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "stage_one", None)
    with pytest.raises(ValueError, match=r"method 'fedprox' with options {'nu': 1.0} cannot be made"):
        run_experiment(replace(ALL, method="fedprox", method_options={"nu": 1.0}), tmp_path, "cpu")


def test_a_run_that_fails_leaves_no_result(tmp_path):
    wild = replace(QUICK, federated=replace(ROUNDS, lr=1e30))
    for _ in range(2):
        with pytest.raises((ClientDiverged, ValueError)):
            run_experiment(wild, tmp_path, "cpu")
    assert not list(tmp_path.glob("*.json"))
    nobody = {"ask": lambda state, received, round_, chosen: ({}, dict.fromkeys(chosen, "gone"))}
    with pytest.raises(ValueError, match="no client sent a sound result in round 1"):
        run_experiment(QUICK, tmp_path / "nobody", "cpu", **nobody)
    assert not list((tmp_path / "nobody").rglob("*.json"))


# ------------------------------------------------------------------------------------------------------- all stages


def test_all_stages_in_one_folder_and_what_is_there_is_not_made_again(tmp_path, small, monkeypatch):
    first = run_experiment(ALL, tmp_path / "here", "cpu")
    names = {path.relative_to(tmp_path / "here").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"stage1/resnet8_seed0.safetensors", "stage1/resnet8_seed0.json", "fedavg_seed0.json"} <= names
    assert first["aligned"]["metrics"]["top1"] == first["summary"]["top1"] and first["history"]
    monkeypatch.setattr(module, "pretrain", None)  # whoever calls it now fails
    other = run_experiment(
        replace(ALL, stages=(1, 2), align=AlignSettings()), tmp_path / "here", "cpu", label="stage12"
    )
    assert other["history"] == first["history"] and "aligned" not in other
    os.rename(tmp_path / "here", tmp_path / "there")
    (tmp_path / "there" / "fedavg_seed0.json").unlink()
    again = run_experiment(ALL, tmp_path / "there", "cpu")
    assert again["summary"] == first["summary"] and again["history"] == first["history"]
    with pytest.raises(ValueError, match=r"made with other settings \(pretrain.lr: there 0.002, now 0.1\); set them"):
        run_experiment(replace(ALL, pretrain=replace(ALL.pretrain, lr=0.1)), tmp_path / "there", "cpu", label="lr")
    weights = tmp_path / "there" / "stage1" / "resnet8_seed0.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"resnet8_seed0.safetensors is damaged"):
        run_experiment(ALL, tmp_path / "there", "cpu", label="damaged")


def test_stage_three_alone_has_no_rounds(tmp_path, small):
    alone = Experiment("cifar10_mini", num_clients=4, width=2, stages=(3,), align=ALL.align)
    result = run_experiment(alone, tmp_path, "cpu")
    assert result["history"] == [] and result["aligned"]["metrics"]["top1"] == result["summary"]["top1"]


def test_runs_of_several_folders_share_stage_one_and_the_teachers_answers(tmp_path, small, monkeypatch):
    first = run_experiment(ALL, tmp_path / "a", "cpu", shared="..")
    monkeypatch.setattr(module, "pretrain", None)
    monkeypatch.setattr(ClipTeacher, "class_probabilities", None)
    assert run_experiment(ALL, tmp_path / "b", "cpu", shared="..")["summary"] == first["summary"]
    assert (tmp_path / "stage1" / "resnet8_seed0.safetensors").is_file() and (tmp_path / "answers").is_dir()
    assert not {"stage1", "answers"} & {path.name for path in (tmp_path / "b").iterdir()}


KILLED_RUN = """
import sys, torch, warnings
torch.set_num_threads(1)
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
import test_runs
test_runs.make_small(setattr)
test_runs.run_experiment(test_runs.ALL, {folder!r}, "cpu")
"""


def test_killed_in_each_stage_it_ends_the_same(tmp_path, small):
    """Kill the process at the first checkpoint of stage 1 and of stage 2; compare with a quiet run."""
    folder = tmp_path / "killed"
    code = KILLED_RUN.format(tests=str(Path(__file__).parent), folder=str(folder))
    for sign in ("stage1/resnet8_seed0/run.json", "checkpoints/fedavg-*/run.json"):
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code])
        while process.poll() is None and not list(folder.glob(sign)):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert list(folder.glob(sign)) and not list(folder.glob("*.json"))
    killed, quiet = run_experiment(ALL, folder, "cpu"), run_experiment(ALL, tmp_path / "quiet", "cpu")
    assert killed["aligned"] == quiet["aligned"] and killed["summary"] == quiet["summary"]
    for name in ("stage1/resnet8_seed0", "models/fedavg_seed0-federated", "models/fedavg_seed0-aligned"):
        both = [load_model(of / f"{name}.safetensors").state_dict() for of in (folder, tmp_path / "quiet")]
        assert all(map(torch.equal, both[0].values(), both[1].values())), name


SEVERAL_PROCESSES = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, torch
from mllmfl_lite.data import load_images
from mllmfl_lite.runs import stage1
from mllmfl_lite.teachers.llava import MllmTeacher
sys.path.insert(0, {tests!r})
from test_runs import ALL

torch.set_num_threads(1)
some, counts = load_images("cifar10_mini", "web").subset(np.arange(32)), dict(asked=0, looked=0, wrote=0)
stage1.load_pool = lambda experiment: some

def counted(place, name, what, number):
    real = getattr(place, name)
    def call(*given, **more):
        counts[what] += number(given)
        return real(*given, **more)
    setattr(place, name, call)

counted(stage1.TransformersBackend, "answer", "asked", lambda given: len(given[1]))
counted(MllmTeacher, "tokens", "looked", lambda given: len(given[1]))
counted(stage1, "save_result", "wrote", lambda given: 1)
counted(stage1, "save_model", "wrote", lambda given: 1)
experiment = replace(ALL, pretrain=replace(ALL.pretrain, batch_size=4), annotations="new")
path = stage1.stage_one(experiment, Path({folder!r}), "cpu")
counts["there"] = path.is_file()
Path({folder!r}, "rank" + os.environ["RANK"]).write_text(json.dumps(counts))
"""


def test_stage_one_under_two_processes_does_each_thing_once(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SEVERAL_PROCESSES.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    for asked, looked, wrote in ((32, 32, 2), (0, 0, 0)):  # the second time it is found done
        job = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert job.returncode == 0, job.stderr[-3000:]
        ranks = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
        assert all(counts["there"] for counts in ranks)
        assert sorted(counts["asked"] for counts in ranks) == [0, asked], "whoever came first asked the MLLM"
        probe = 1 if looked else 0  # each process looks at one image, for the shape
        assert sorted(counts["looked"] for counts in ranks) == [probe, looked + probe], "features were computed once"
        assert [counts["wrote"] for counts in ranks] == [wrote, 0], "the first process wrote"
    result = load_result(tmp_path / "stage1" / "resnet8_seed0.json")
    assert result["provenance"]["processes"] == 2 and len(result["history"]) == result["data"]["texts"] // (2 * 4)


# --------------------------------------------------------------------------------------- a folder of images as the pool


@pytest.fixture
def folder_of_images(tmp_path):
    """Eighteen images of several sizes, as a server finds them on the web."""
    folder = tmp_path / "web"
    folder.mkdir()
    web = load_images("cifar10_mini", "web")
    for i in range(18):
        Image.fromarray(web.images[100 * i]).resize((40 + i, 36)).save(folder / f"{i:02d}.png")
    return folder


def of_folder(folder, annotations):
    pretrain, align = replace(ALL.pretrain, batch_size=4), replace(ALL.align, per_class=1)
    return replace(
        ALL, pool=str(folder), image_size=32, pretrain=pretrain, align=align, annotations=annotations
    )  # fmt: skip


def test_all_stages_on_a_folder_of_images(tmp_path, folder_of_images):
    experiment = of_folder(folder_of_images, "new")
    result = run_experiment(experiment, tmp_path / "run", "cpu")
    records = (tmp_path / "run" / "stage1" / "annotations.jsonl").read_text().splitlines()
    assert len(records) == 18 and any('"00.png"' in record for record in records)
    assert result["aligned"]["server_set"]["labels_right"] is None and result["aligned"]["server_set"]["images"] >= 1
    for other, says in (
        ({"pool_images": 9}, "pool_images: there 0, now 9"),
        ({"pixels": 64}, "pixels: there 32, now 64"),
    ):
        with pytest.raises(ValueError, match=says):
            stage_one(replace(experiment, **other), tmp_path / "run")


def test_texts_that_were_written_elsewhere(tmp_path, folder_of_images, monkeypatch):
    """Of the images that are used, and of the wanted kind; cut-off ones are left out."""
    stage_one(of_folder(folder_of_images, "new"), tmp_path / "first", "cpu")
    texts = tmp_path / "texts.jsonl"
    (tmp_path / "first" / "stage1" / "annotations.jsonl").rename(texts)
    monkeypatch.setattr(module, "annotate", None)
    monkeypatch.setattr(module, "pretrain", lambda model, mllm, views, texts, *_, **__: seen.append((views, texts)))
    seen = []
    for few in (0, 9):
        with pytest.raises(AttributeError):  # of the pretraining that did not take place
            fewer = replace(of_folder(folder_of_images, str(texts)), pool_images=few)
            stage_one(fewer, tmp_path / f"second{few}", "cpu")
    (whole, all_texts), (part, fewer_texts) = seen
    assert len(whole) == 18 and len(part) == 9 and 0 < len(fewer_texts) < len(all_texts) <= 18
    torch.testing.assert_close(whole.compact(np.arange(3), None), part.compact(np.arange(3), None))
