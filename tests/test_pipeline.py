import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mllmfl_lite import pipeline as module
from mllmfl_lite.data import load_images
from mllmfl_lite.federated.methods import FedSettings
from mllmfl_lite.models import load_model
from mllmfl_lite.runs.experiment import Experiment
from mllmfl_lite.runs.pipeline import Pipeline, run_pipeline
from mllmfl_lite.runs.results import ResultError, load_result, load_results, save_result
from mllmfl_lite.stages.align import AlignSettings
from mllmfl_lite.stages.pretrain import PretrainSettings
from mllmfl_lite.stages.records import bundled_annotations
from mllmfl_lite.teachers.clip import ClipTeacher

ROUNDS = FedSettings(rounds=3, clients_per_round=2, local_epochs=1, batch_size=64, report_rounds=1)
ALIGN = AlignSettings(per_class=3, epochs=2, teacher="clip")
TINY = Pipeline(
    Experiment("cifar10_mini", num_clients=4, width=2, settings=ROUNDS, align=ALIGN),
    PretrainSettings(epochs=1, batch_size=16, checkpoint_every=1),
)


def few_pictures(experiment):
    """A pool of 120 pictures of all kinds, so that a run takes seconds."""
    return load_images(experiment.pool, "web").subset(np.arange(0, 3000, 25))


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch.setattr)


def make_small(put):
    few = few_pictures(TINY.experiment)
    mine = {f"{25 * k:04d}": f"{k:03d}" for k in range(len(few))}
    records = [replace(r, id=mine[r.id]) for r in bundled_annotations() if r.id in mine]
    put(module, "load_pool", lambda experiment: few)
    put(module, "bundled_annotations", lambda: records)
    put(sys.modules["mllmfl_lite.experiment"], "load_pool", lambda experiment: few)


@pytest.mark.filterwarnings("ignore:the pool has fewer")
def test_all_stages_in_one_folder(tmp_path, small):
    result = run_pipeline(TINY, tmp_path, "cpu")
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert {"stage1/resnet8_seed0.safetensors", "stage1/resnet8_seed0.json", "fedavg_seed0.json"} <= files
    assert any(name.startswith("told/tiny_clip-") for name in files)
    assert result["parameters"]["start"] == "stage1/resnet8_seed0.safetensors" and result["aligned"]["metrics"]
    (only,) = load_results(tmp_path)
    assert only["summary"] == result["summary"]


@pytest.mark.filterwarnings("ignore:the pool has fewer")
def test_what_is_there_is_not_made_again(tmp_path, small, monkeypatch):
    first = run_pipeline(TINY, tmp_path, "cpu")
    monkeypatch.setattr(module, "pretrain", None)  # whoever calls it now fails
    assert run_pipeline(TINY, tmp_path, "cpu") == load_results(tmp_path)[0]
    other = run_pipeline(replace(TINY, experiment=replace(TINY.experiment, align=None)), tmp_path, "cpu", "stage12")
    assert other["history"] == first["history"] and "aligned" not in other


@pytest.mark.filterwarnings("ignore:the pool has fewer")
def test_a_folder_carried_elsewhere_goes_on(tmp_path, small, monkeypatch):
    first = run_pipeline(TINY, tmp_path / "here", "cpu")
    os.rename(tmp_path / "here", tmp_path / "there")
    (tmp_path / "there" / "fedavg_seed0.json").unlink()
    monkeypatch.setattr(module, "pretrain", None)
    again = run_pipeline(TINY, tmp_path / "there", "cpu")
    assert again["summary"] == first["summary"] and again["history"] == first["history"]


@pytest.mark.filterwarnings("ignore:the pool has fewer")
def test_weights_of_other_settings_are_refused(tmp_path, small):
    run_pipeline(TINY, tmp_path, "cpu")
    with pytest.raises(ResultError, match=r"made with other settings \(pretrain.lr there 0.002, now 0.1\); set them"):
        run_pipeline(replace(TINY, pretrain=replace(TINY.pretrain, lr=0.1)), tmp_path, "cpu")
    wider = replace(TINY.experiment, width=4)
    with pytest.raises(ResultError, match=r"\(width there 2, now 4\)"):
        run_pipeline(replace(TINY, experiment=wider), tmp_path, "cpu")
    with pytest.raises(ValueError, match=r"annotations must be 'bundled', 'new' or a .jsonl file; got 'old'"):
        replace(TINY, annotations="old")


def test_the_mllm_is_asked_where_wanted(tmp_path, monkeypatch):
    some = load_images("cifar10_mini", "web").subset(np.arange(32))
    monkeypatch.setattr(module, "load_pool", lambda experiment: some)
    path = module.stage_one(replace(TINY, annotations="new"), tmp_path, "cpu")
    assert len((tmp_path / "stage1" / "annotations.jsonl").read_text().splitlines()) == 32
    assert load_model(path).num_features == 8


KILLED_RUN = """
import sys, torch, warnings
torch.set_num_threads(1)
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
import test_pipeline
test_pipeline.make_small(setattr)
test_pipeline.run_pipeline(test_pipeline.TINY, {folder!r}, "cpu")
"""


@pytest.mark.filterwarnings("ignore:the pool has fewer")
def test_killed_in_each_stage_it_ends_the_same(tmp_path, small):
    """Kill the process at the first checkpoint of stage 1 and of stage 2, and once more; compare with a quiet run."""
    folder = tmp_path / "killed"
    code = KILLED_RUN.format(tests=str(Path(__file__).parent), folder=str(folder))
    signs = [
        "checkpoints/stage1_seed0/run.json",
        "stage1/resnet8_seed0.safetensors",
        "checkpoints/fedavg-*_seed0/run.json",
    ]
    for sign in signs:
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code])
        while process.poll() is None and not list(folder.glob(sign)):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed = run_pipeline(TINY, folder, "cpu")
    quiet = run_pipeline(TINY, tmp_path / "quiet", "cpu")
    assert killed["aligned"] == quiet["aligned"] and killed["summary"] == quiet["summary"]
    weights = [load_model(tmp_path / name / "stage1" / "resnet8_seed0.safetensors") for name in ("killed", "quiet")]
    assert all(torch.equal(a, b) for a, b in zip(*(w.state_dict().values() for w in weights), strict=True))


SEVERAL_PROCESSES = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, torch
from mllmfl_lite import pipeline
from mllmfl_lite.data import load_images
from mllmfl_lite.teacher import MllmTeacher
sys.path.insert(0, {tests!r})
from test_pipeline import TINY

torch.set_num_threads(1)
some, counts = load_images("cifar10_mini", "web").subset(np.arange(32)), dict(asked=0, looked=0, wrote=0)
pipeline.load_pool = lambda experiment: some

def counted(place, name, what, number):
    real = getattr(place, name)
    def call(*given, **more):
        counts[what] += number(given)
        return real(*given, **more)
    setattr(place, name, call)

counted(pipeline.TransformersBackend, "answer", "asked", lambda given: len(given[1]))
counted(MllmTeacher, "tokens", "looked", lambda given: len(given[1]))
counted(pipeline, "save_result", "wrote", lambda given: 1)
counted(pipeline, "save_model", "wrote", lambda given: 1)
settings = replace(TINY.pretrain, batch_size=4)
path = pipeline.stage_one(replace(TINY, pretrain=settings, annotations="new"), Path({folder!r}), "cpu")
counts["there"] = path.is_file()
Path({folder!r}, "rank" + os.environ["RANK"]).write_text(json.dumps(counts))
"""


def test_stage_one_under_two_processes_does_each_thing_once(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SEVERAL_PROCESSES.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    for asked, looked, wrote in ((32, 32, 2), (0, 0, 0)):  # the second time it is found done
        job = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert job.returncode == 0, job.stderr[-3000:]
        ranks = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
        assert all(counts["there"] for counts in ranks)
        assert sorted(counts["asked"] for counts in ranks) == [0, asked], "whoever came first asked the MLLM"
        assert sorted(counts["looked"] for counts in ranks) == [0, looked], "features were computed once"
        assert [counts["wrote"] for counts in ranks] == [wrote, 0], "the first process wrote"
    result = load_result(tmp_path / "stage1" / "resnet8_seed0.json")
    assert result["provenance"]["processes"] == 2 and len(result["history"]) == result["data"]["texts"] // (2 * 4)
    assert load_model(tmp_path / "stage1" / "resnet8_seed0.safetensors").num_features == 8


# ------------------------------------------------------------------------------------- a folder of pictures as the pool


@pytest.fixture
def pictures(tmp_path):
    """Eighteen pictures of several sizes, as a server finds them on the web."""
    folder = tmp_path / "web"
    folder.mkdir()
    web = load_images("cifar10_mini", "web")
    for i in range(18):
        Image.fromarray(web.images[100 * i]).resize((40 + i, 36)).save(folder / f"{i:02d}.png")
    return folder


def of_folder(pictures, annotations):
    experiment = replace(TINY.experiment, pool=str(pictures), image_size=32, align=replace(ALIGN, per_class=1))
    return Pipeline(experiment, replace(TINY.pretrain, batch_size=4), annotations=annotations)


@pytest.mark.filterwarnings("ignore:the pool has fewer")
def test_all_stages_on_a_folder_of_pictures(tmp_path, pictures):
    result = run_pipeline(of_folder(pictures, "new"), tmp_path / "run", "cpu")
    records = (tmp_path / "run" / "stage1" / "annotations.jsonl").read_text().splitlines()
    assert len(records) == 18 and '"00.png"' in records[0]
    assert result["aligned"]["server_set"]["labels_right"] is None and result["aligned"]["server_set"]["images"] >= 1
    other = replace(
        of_folder(pictures, "new"), experiment=replace(of_folder(pictures, "new").experiment, pool_images=9)
    )
    with pytest.raises(ResultError, match="pool_images there 0, now 9"):
        run_pipeline(other, tmp_path / "run", "cpu")


def test_texts_that_were_written_elsewhere(tmp_path, pictures, monkeypatch):
    """Of the pictures that are used, and of the wanted kind; cut-off ones are left out."""
    module.stage_one(of_folder(pictures, "new"), tmp_path / "first", "cpu")
    texts = tmp_path / "texts.jsonl"
    (tmp_path / "first" / "stage1" / "annotations.jsonl").rename(texts)
    monkeypatch.setattr(module, "annotate", None)
    monkeypatch.setattr(module, "pretrain", lambda model, mllm, views, texts, *_, **__: seen.append((views, texts)))
    seen = []
    pipeline = of_folder(pictures, str(texts))
    for few in (0, 9):
        fewer = replace(pipeline, experiment=replace(pipeline.experiment, pool_images=few))
        with pytest.raises(AttributeError):  # of the pretraining that did not take place
            module.stage_one(fewer, tmp_path / f"second{few}", "cpu")
    (whole, all_texts), (part, fewer_texts) = seen
    assert len(whole) == 18 and len(part) == 9 and 0 < len(fewer_texts) < len(all_texts) <= 18
    torch.testing.assert_close(whole.compact(np.arange(3), None), part.compact(np.arange(3), None))
    with pytest.raises(ValueError, match="the bundled annotations are of the pool 'cifar10_mini'"):
        of_folder(pictures, "bundled")


@pytest.mark.filterwarnings("ignore:the pool has fewer")
def test_runs_of_several_folders_share_stage_one_and_the_teachers_answers(tmp_path, small, monkeypatch):
    shared = replace(TINY, shared="..")
    run_pipeline(shared, tmp_path / "a", "cpu")
    monkeypatch.setattr(module, "pretrain", None)
    monkeypatch.setattr(ClipTeacher, "class_probabilities", None)
    again = run_pipeline(shared, tmp_path / "b", "cpu")
    assert again["parameters"]["start"] == "../stage1/resnet8_seed0.safetensors"
    assert (tmp_path / "stage1" / "resnet8_seed0.safetensors").is_file()
    assert len(list((tmp_path / "told").glob("*.safetensors"))) == 1
    assert not {"stage1", "told"} & {path.name for path in (tmp_path / "b").iterdir()}
    run_pipeline(replace(shared, pretrain=None), tmp_path / "c", "cpu")  # nothing has made its folder before


def test_stage_one_of_another_view_is_another(tmp_path, small, monkeypatch):
    """In a shared folder weights made at 32 pixels are not taken for those at 64."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(folder / "a.png")
    experiment = replace(TINY.experiment, pool=str(folder), image_size=32)
    of_folder = replace(TINY, experiment=experiment, annotations="new", shared="..")

    def pretend(pipeline, folder, path, asked, device):
        path.touch()
        save_result(path.with_suffix(".json"), {"parameters": asked})

    monkeypatch.setattr(module, "_pretrain", pretend)
    module.stage_one(of_folder, tmp_path / "a")
    module.stage_one(of_folder, tmp_path / "b")
    with pytest.raises(ResultError, match=r"pixels there 32, now 64.*another one to share"):
        module.stage_one(replace(of_folder, experiment=replace(experiment, image_size=64)), tmp_path / "c")
