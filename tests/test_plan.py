"""What is missing is named, what is there is found; operations counted in three ways; the results page."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mllmfl_lite.federated import FedAvg, FedSettings
from mllmfl_lite.measure.cost import client_cost
from mllmfl_lite.models import build_model
from mllmfl_lite.runs import Experiment, load_federation, load_result, load_results
from mllmfl_lite.runs import needs as module
from mllmfl_lite.runs.needs import missing
from mllmfl_lite.runs.plan import RATES, estimate, image_operations, in_words, total_hours
from mllmfl_lite.stages.align import AlignSettings
from mllmfl_lite.stages.pretrain import PretrainSettings
from mllmfl_lite.teaching.compare import group_by_label, paired_difference, reported

ROOT = Path(__file__).parent.parent
BUNDLED = Experiment("cifar10_mini", method="clip2fl", stages=(2, 3))
REAL = Experiment(
    "imagenet_lt", stages=(1, 2, 3), method="clip2fl", annotations="new", mllm="llava-hf/llava-1.5-7b-hf",
    pool="cc595k", clip="ViT-B-32-quickgelu:openai",
)  # fmt: skip


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLMFL_DATA", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def names(found):
    return [need.split(" (")[0].split(":")[0].split(",")[0] for need in found]


# ------------------------------------------------------------------------------------------------------ what is missing


def test_the_bundled_parts_need_nothing(empty):
    assert missing(BUNDLED) == [] == missing(replace(BUNDLED, stages=(1, 2, 3)))


def test_what_is_missing_is_named_with_size_terms_and_command(empty):
    found = missing(REAL)
    assert names(found) == ["ImageNet", "the official lists of ImageNet-LT", "CC-595K", "LLaVA-1.5-7B", "CLIP ViT-B/32"]
    for words in ("145 GB", "hf download llava-hf/llava-1.5-7b-hf", "MIT", f"{empty}/cc595k"):
        assert words in "\n".join(found)
    assert list(empty.iterdir()) == []


def test_what_is_there_is_found(empty):
    for folder in ("imagenet", "imagenet_lt", "cc595k"):
        (empty / folder).mkdir()
    for name in ("models--llava-hf--llava-1.5-7b-hf", "models--timm--vit_base_patch32_clip_224.openai"):
        fetched(empty, name, "model.safetensors")
    assert missing(REAL) == []


def fetched(place, model, *files):
    kept = place / "hub" / model / "snapshots" / "abc"
    kept.mkdir(parents=True, exist_ok=True)
    (place / "hub" / model / "refs").mkdir(exist_ok=True)
    (place / "hub" / model / "refs" / "main").write_text("abc")
    for file in files:
        (kept / file).touch()
    return kept


def test_a_model_in_parts_is_there_when_all_of_them_are(empty):
    parts = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    kept = fetched(empty, "models--llava-hf--llava-1.5-7b-hf")
    (kept / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("abc", parts, strict=True))}))
    for part in parts:
        assert "LLaVA-1.5-7B" in names(missing(REAL))
        (kept / part).touch()
    assert "LLaVA-1.5-7B" not in names(missing(REAL))


def test_cifar_in_any_of_its_forms(empty, monkeypatch):
    assert names(missing(Experiment("cifar100"))) == ["CIFAR-100"]
    for form in ("cifar100.npz", "cifar-100-python.tar.gz"):
        (empty / form).touch()
        assert missing(Experiment("cifar100")) == []
        (empty / form).unlink()
    monkeypatch.setenv("MLLMFL_DATA", str(empty / "nowhere"))
    assert names(missing(Experiment("cifar10"))) == ["CIFAR-10"]


def test_models_and_pools_of_ones_own(empty, monkeypatch):
    mine = replace(REAL, dataset="cifar10_mini", mllm=str(empty), clip=str(empty), pool=str(empty))
    assert missing(mine) == []
    assert missing(replace(mine, mllm="some/mllm")) == ["some/mllm: put it there, or fetch it by that name"]
    assert missing(replace(mine, mllm="no such name!")) == ["no such name!: put it there, or fetch it by that name"]
    assert missing(replace(mine, clip="ViT-H-14:laion2b")) == [], "nobody can know from here"
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert names(missing(replace(BUNDLED, align=AlignSettings(teacher="imagenet")))) == ["EfficientNet-lite2"]


def test_files_of_ones_own_are_looked_for(empty, tmp_path):
    start = replace(BUNDLED, stages=(1, 2), start="mine_{seed}.safetensors", seed=4)
    assert missing(start, tmp_path) == ["weights to start from: mine_4.safetensors, a file written by save_model"]
    (tmp_path / "mine_4.safetensors").touch()
    assert missing(start, tmp_path) == []
    texts = replace(BUNDLED, stages=(1, 2), annotations=str(tmp_path / "texts.jsonl"))
    assert names(missing(texts)) == ["annotations"] and "texts.jsonl" in missing(texts)[0]
    (tmp_path / "texts.jsonl").touch()
    assert missing(texts) == []


# ------------------------------------------------------------------------------------------------------- the estimate


def test_operations_are_those_that_a_client_is_counted_on():
    """The plan's count without data against the meter on real clients' steps."""
    experiment = Experiment("cifar10_mini", num_clients=4, width=4, federated=FedSettings(3, 2, 5, report_rounds=1))
    experiment = replace(experiment, federated=replace(experiment.federated, eval_every=100))
    train, split, test = load_federation(experiment)
    metered = [
        client_cost(FedAvg(), build_model("resnet8", 10, 4), train, rows, experiment.federated) for rows in split
    ]
    (rounds,) = estimate(experiment)
    testing = len(test) * image_operations("resnet8", 4, 10, 32)[1]
    assert rounds.compact == pytest.approx(3 * 2 * np.mean([cost.flops for cost in metered]) + testing, rel=0.01)
    assert rounds.large == 0


def test_the_parts_of_a_run_and_how_they_grow():
    whole = replace(REAL, method="fedavg", pretrain=PretrainSettings(epochs=1))
    parts = estimate(whole)
    assert [part.name.split(" ")[2] for part in parts] == ["describe", "pretrain", "200", "score", "align"]
    fewer = estimate(replace(whole, pool_images=59_537))
    for part, few in zip(parts, fewer, strict=True):
        share = 1 if part.name in ("stage 2: 200 rounds", "stage 3: align") else 0.1
        assert few[2:] == pytest.approx([share * number for number in part[2:]], rel=1e-4)
    leaner = estimate(replace(whole, pretrain=PretrainSettings(epochs=1, gradient_checkpointing=True)))
    assert leaner[1].large == pytest.approx(1.5 * parts[1].large)
    assert [part.name for part in estimate(replace(whole, stages=(1, 2), start="x", annotations="bundled"))] == [
        "stage 2: 200 rounds"
    ]
    labels = replace(BUNDLED, stages=(3,), align=AlignSettings(teacher="labels"))
    assert [part.name for part in estimate(labels)] == ["stage 3: align"], "labels ask no model"


def test_a_language_model_reads_with_two_operations_a_weight_and_token():
    """LLaVA-1.5-7B, one text: 6.7e9 weights read 576 visual tokens and 100 words, the tower 576."""
    (described, _), pool = estimate(replace(REAL, stages=(1, 2)))[:2], 595_375
    assert described.large == pytest.approx(pool * 2 * (6.7e9 * 676 + 0.3e9 * 576))
    assert described.hours("h100") == pytest.approx(described.large / RATES["h100"][1] / 3600)


def test_pretraining_takes_about_as_long_as_llavas_did():
    """Its authors' own run had the same model and as many visual tokens; a projector alone was trained."""
    theirs = reported()["llava_1_5_pretraining"]
    lean = PretrainSettings(epochs=1, gradient_checkpointing=True)
    ours = estimate(replace(REAL, stages=(1, 2), pool_images=theirs["texts"], pretrain=lean))[1]
    assert 0.5 < ours.hours("a100") / (8 * theirs["hours"]) < 2


def test_a_small_models_steps_cannot_go_faster_than_their_floor():
    (rounds,) = estimate(Experiment("cifar10", width=4))
    steps = 200 * 8 * 10 * 12_406 / 20 / 32
    assert rounds.steps == pytest.approx(steps) and rounds.hours("h100") == pytest.approx(steps * 2.5e-3 / 3600)
    assert rounds.hours("laptop") == pytest.approx(rounds.compact / 67e9 / 3600)


def test_work_that_runs_share_is_counted_once():
    base = replace(REAL, dataset="cifar10", method="fedavg", model="resnet8", image_size=32)
    fedavg = replace(base, stages=(2,), annotations="bundled")
    stage3, everything = replace(fedavg, stages=(2, 3)), base
    hours = {part.name: part.hours("h100") for part in estimate(everything)}
    rounds, score, align = (hours[name] for name in list(hours)[2:])

    def total(*experiments):
        return total_hours(experiments, "h100")

    assert total(fedavg, stage3) == pytest.approx(rounds + score + align), "the rounds are the same"
    assert total(fedavg, fedavg) == pytest.approx(rounds) and total(fedavg, replace(fedavg, seed=1)) == 2 * rounds
    assert total(stage3, everything) == pytest.approx(sum(hours.values()) + rounds + align), "rounds start elsewhere"
    again = replace(everything, seed=1)  # images are described once, their class names scored once
    pretrain = hours["stage 1: pretrain on 4,763,000 texts"]
    assert total(everything, again) - total(everything) == pytest.approx(pretrain + rounds + align)
    other = replace(everything, imbalance_factor=50.0)  # finds all of stage 1 and the answers
    assert total(everything, other) - total(everything) < 2 * rounds


def test_hours_in_words():
    assert [in_words(s / 3600) for s in (0, 4.2, 45, 600, 7200, 86400)] == [
        "0.0 s", "4.2 s", "45 s", "10 min", "2.0 h", "24 h",
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------- the results page


def test_the_results_page_is_what_the_committed_files_say():
    """Results of one's own change the page, by `make results`."""
    import write_results

    listed = subprocess.run(["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True, check=False)
    committed = {ROOT / line for line in listed.stdout.splitlines()}
    folders = [ROOT / "results" / s / b for s in write_results.SCALES for b in write_results.BENCHMARKS]
    folders += [ROOT / "results" / place for place in write_results.primary.WORLDS]
    if {path for folder in folders for path in folder.glob("*.json")} <= committed:
        assert write_results.PAGE.read_text(encoding="utf-8") == write_results.page(), "run `make results`"


def test_rows_of_the_results_page():
    page = (ROOT / "book" / "results.md").read_text(encoding="utf-8")
    table = page.split("`medium/cifar10_lt_if100`")[1].split("##")[0]
    (row,) = [line for line in table.splitlines() if line.endswith("| creff |")]
    found = [load_result(path) for path in (ROOT / "results/medium/cifar10_lt_if100").glob("creff_seed[012].json")]
    top1 = 100 * np.array([result["summary"]["top1"] for result in found])
    assert f"| {top1.mean():.1f}\u00a0±\u00a0{top1.std(ddof=1):.1f} |" in row and "| 3 |" in row
    price = next(line for line in page.splitlines() if line.startswith("| paper | imagenet_lt |"))
    assert all(word in price for word in ("17 of 17", "ImageNet, the official lists", "LLaVA-1.5-7B", "\u00a0h |"))
    assert all(len(set(map(len, block))) == 1 for block in columns(page)), "a cell with a bar that is not escaped"


@pytest.mark.parametrize("factor", [100, 50, 10])
def test_what_the_results_page_says_in_short(factor):
    runs = group_by_label(load_results(ROOT / f"results/laptop/cifar10_mini_lt_if{factor}"))

    def top1(label):
        return [result["summary"]["top1"] for result in runs[label]]

    aligned = {label for label in runs if runs[label][0].get("aligned")}
    lowest, highest = (
        min(np.mean(top1(one)) for one in aligned),
        max(np.mean(top1(one)) for one in runs.keys() - aligned),
    )
    assert lowest > highest + 0.1
    for one, other in (("mllm_llava_fl", "stage3"), ("stage1", "fedavg"), ("stage3", "server_only")):
        assert paired_difference(top1(one), top1(other)).low < 0, f"a gain of {one} over {other} is shown"


def columns(page):
    tables = [part for part in page.split("\n\n") if part.startswith("|")]
    return [[line.replace("\\|", "").split("|") for line in table.strip().splitlines()] for table in tables]
