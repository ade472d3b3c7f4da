import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp, ttest_ind

from mllmfl_lite import results
from mllmfl_lite.federated.methods import FedProx, FedSettings
from mllmfl_lite.models import save_model, with_head
from mllmfl_lite.repro import sha256_arrays
from mllmfl_lite.runs.experiment import Experiment, run_experiment
from mllmfl_lite.runs.results import ResultError
from mllmfl_lite.stages.align import AlignSettings

TINY = Experiment(
    "cifar10_mini", 100, num_clients=4, width=2, settings=FedSettings(2, 2, 1, batch_size=64, report_rounds=1)
)


def test_a_finished_run_is_read_back_and_another_ones_file_refused(tmp_path):
    fresh = run_experiment(TINY, tmp_path, "cpu", label="fedavg")
    again = run_experiment(TINY, tmp_path, "cpu", label="fedavg")
    assert again["history"] == fresh["history"] and again["provenance"] == fresh["provenance"]
    with pytest.raises(ResultError, match=r"\(alpha there 0.5, now 0.1\); set them back, or choose another"):
        run_experiment(replace(TINY, alpha=0.1), tmp_path, "cpu", label="fedavg")
    with pytest.raises(ResultError, match=r"\(settings.lr there 0.1, now 0.2\)"):
        run_experiment(replace(TINY, settings=replace(TINY.settings, lr=0.2)), tmp_path, "cpu", label="fedavg")


def test_a_file_older_than_a_parameter_was_made_with_its_default(tmp_path):
    aligned = replace(TINY, align=AlignSettings(per_class=3, epochs=1, teacher="clip"))
    run_experiment(aligned, tmp_path, "cpu", label="old")
    path = tmp_path / "old_seed0.json"
    result = json.loads(path.read_text())
    del (
        result["parameters"]["clip"],
        result["parameters"]["settings"]["precision"],
        result["parameters"]["align"]["when"],
    )
    path.write_text(json.dumps(result))
    assert run_experiment(aligned, tmp_path, "cpu", label="old")["summary"] == result["summary"]
    with pytest.raises(ResultError, match=r"clip there 'tiny_clip', now 'other'"):
        run_experiment(replace(aligned, clip="other"), tmp_path, "cpu", label="old")


def test_a_results_file_says_what_was_run_on_what_and_where(tmp_path):
    run_experiment(TINY, tmp_path, "cpu")
    (result,) = results.load_results(tmp_path)
    assert result["parameters"]["settings"]["rounds"] == 2 and result["parameters"]["width"] == 2
    assert result["data"]["train_images"] == sum(np.bincount(TINY.clients()[0].labels))
    assert len(result["data"]["train_sha256"]) == 64
    assert {"date", "revision", "python", "packages", "device", "seconds_in_this_process"} <= result[
        "provenance"
    ].keys()
    assert [r["round"] for r in result["history"]] == [1, 2]
    assert len(result["history"][0]["metrics"]["per_class"]) == 10
    assert result["summary"]["top1"] == result["history"][-1]["metrics"]["top1"]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_experiment(TINY)
    assert list(tmp_path.iterdir()) == []


def test_controls_have_as_many_images():
    longtail, _ = TINY.clients()
    balanced, _ = replace(TINY, balanced=True).clients()
    assert len(longtail) == len(balanced)
    assert balanced.class_counts().max() - balanced.class_counts().min() <= 1


def test_seeds_change_images_and_split():
    (one, split_one), (two, _) = TINY.clients(), TINY.with_seed(1).clients()
    assert one.checksum() != two.checksum()
    assert [own.tolist() for own in split_one] == [own.tolist() for own in TINY.clients()[1]]


def test_methods_by_name():
    train, _ = TINY.clients()
    assert replace(TINY, method="fedprox", method_options={"mu": 0.3}).build_method(train) == FedProx(mu=0.3)
    with pytest.raises(
        ValueError, match="no method named 'fedsgd'; there are fedavg, fedprox, fedavgm, creff, clip2fl"
    ):
        replace(TINY, method="fedsgd").build_method(train)


@pytest.mark.parametrize("content", ["", "{}", '{"format": 9}', "[1]"])
def test_a_file_that_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ResultError, match=r"x.json is not a results file"):
        results.load_results(tmp_path)


def test_a_start_is_seen_from_a_folder_that_is_not_there_yet(tmp_path):
    model = TINY.build_model(10)
    with torch.no_grad():
        model.body[0].weight.fill_(0.25)
    save_model(tmp_path / "mine.safetensors", model, "resnet8", 2)
    result = run_experiment(replace(TINY, start="../mine.safetensors"), tmp_path / "new", "cpu")
    start = sha256_arrays(t.numpy() for t in with_head(model, 10, 0).state_dict().values())
    assert result["data"]["start_sha256"] == start


def test_mean_and_spread():
    assert results.mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert np.isnan(results.mean_and_spread([1.0])[1])


def test_the_t_test_by_hand():
    """Mean 2, deviation 1, three values: t = 3.46 < 4.303; with deviation 0.5 it is 6.93."""
    assert not results.beyond_chance([1.0, 2.0, 3.0])
    assert results.beyond_chance([1.5, 2.0, 2.5]) and results.beyond_chance([-1.5, -2.0, -2.5])
    assert not results.beyond_chance([0.0, 0.0]) and not results.beyond_chance([5.0])
    eleven = [2.2, -2.0] * 5 + [2.2]  # 10 degrees of freedom: 2.228
    assert not results.beyond_chance(eleven) and results.beyond_chance([x + 1.6 for x in eleven])
    with pytest.raises(ValueError, match="needs differences, one for each seed that both methods have; got none"):
        results.beyond_chance([])


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("points", "deviation"), [(5.0, 2.0), (-1.0, 1.5), (0.4, 0.03)])
def test_seeds_needed_find_the_difference_as_often_as_they_should(points, deviation, paired):
    """The same tests run on drawn figures: with n seeds at least 80 % find it, with one fewer not."""
    n = results.seeds_needed(points, deviation**2 if paired else 2 * deviation**2, 0.8, paired)
    draw = np.random.default_rng(0)

    def found(n):
        a, b = draw.normal(0, deviation, (2, 20_000, n))
        test = ttest_1samp(b + points, 0, axis=1) if paired else ttest_ind(b + points, a, axis=1)
        return np.mean(test.pvalue < 0.05)

    assert found(n) > 0.79 and (n == 2 or found(n - 1) < 0.81)


def test_seeds_needed_at_the_ends():
    assert results.seeds_needed(1.0, 0.0) == 2  # no spread: two always do
    assert results.seeds_needed(1e-9, 1.0) == 10_000
    # with one degree of freedom a shift of 32 deviations is found 98.8 times in 100, one of 55.4 nearly always
    assert [results.seeds_needed(p / 2**0.5, 1.0, 0.99, paired=True) for p in (32, 55.4)] == [3, 2]
    assert all(np.isfinite(results._chance_to_find(p, 1.0, n, False)) for p in (0.1, 7.0, 90.0) for n in (2, 3, 21))
    assert results.seeds_needed(30.0, 1.0, 0.99, paired=True) < 5
    for wrong in ((0.0, 1.0, 0.8), (1.0, -1.0, 0.8), (1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match="a difference that is not zero"):
            results.seeds_needed(*wrong)


def test_reported_figures_have_a_source():
    for entry in results.reported().values():
        assert entry["source"]


def test_committed_results_are_whole():
    """Every committed file: summary recomputed from its history, clean revision, three seeds or more a label."""
    from mllmfl_lite.data.metrics import summarise
    from mllmfl_lite.measure.transfer import best

    root = results.RESULTS
    for folder in {path.parent for path in root.rglob("*.json") if "checkpoints" not in path.parts}:
        seeds = {}
        for result in results.load_results(folder):
            numbers = result["parameters"].get("settings", result["parameters"])
            if "rounds" in numbers:
                assert len(result["history"]) == numbers["rounds"]
                reported = [result["aligned"]] if "metrics" in result.get("aligned", ()) else result["history"]
                assert result["summary"] == summarise(reported, numbers["report_rounds"])
            elif "best" in result["summary"]:
                assert result["summary"]["best"] == best(result["history"])
                assert result["summary"]["last"] == result["history"][-1]["metrics"]["top1"]
            assert len(result["provenance"]["revision"]) == 40, "made from uncommitted code"
            if "teacher" not in numbers:  # what a teacher knows by itself has no seed
                seeds.setdefault(result["label"], set()).add(numbers["seed"])
        assert all(len(of) >= 3 for of in seeds.values()), seeds


def test_results_are_plain_json(tmp_path):
    results.save_result(tmp_path / "new" / "x.json", {"a": [1, None]})
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"format": 1, "a": [1, None]}


def test_a_rescaled_start_has_random_norms_and_computes_the_same():
    kept, scaled = (Experiment(width=16, start="dwp_linear", rescale=r).build_model(10).eval() for r in (False, True))
    random = Experiment(width=16).build_model(10)
    norms = [[p.norm().item() for p in of.parameters() if p.ndim == 4] for of in (kept, scaled, random)]
    assert norms[1] == pytest.approx(norms[2], rel=1e-4) and norms[0] != pytest.approx(norms[2], rel=0.1)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kept(x), scaled(x), rtol=1e-2, atol=1e-2)
