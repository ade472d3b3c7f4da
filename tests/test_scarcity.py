"""Few labels: the step size is the best trial's, a start without trials stops, and the committed files keep to it."""

import json

import measure_scarcity as scarcity
import pytest

from mllmfl_lite.runs import load_results


def write(folder, start, values):
    (folder / "tuning").mkdir(exist_ok=True)
    for lr, last in zip(scarcity.TRIED, values, strict=False):
        (folder / "tuning" / f"{start}_{lr}.json").write_text(json.dumps({"start": start, "lr": lr, "last": last}))


def test_the_step_size_is_that_of_the_best_trial_and_the_smaller_of_two(tmp_path):
    write(tmp_path, "words", [0.3, 0.5, 0.4, 0.2])
    write(tmp_path, "random", [0.1, 0.3, 0.3, 0.2])
    assert [scarcity.step_size(start, tmp_path) for start in ("words", "random")] == [0.05, 0.05]


def test_a_start_without_its_trials_stops(tmp_path):
    write(tmp_path, "words", [0.3, 0.5, 0.4])
    with pytest.raises(ValueError, match=r"has 3 trials of 'words'; 4 are needed: --choose-lr"):
        scarcity.step_size("words", tmp_path)


def test_committed_runs_have_their_trials_step_size_and_share_no_image_with_the_server():
    found = load_results(scarcity.OUT)
    runs = {(one["parameters"]["start"], one["parameters"]["share"], one["parameters"]["seed"]) for one in found}
    assert runs == {(start, share, k) for start in scarcity.STARTS for share in scarcity.SHARES for k in range(3)}
    for one in found:
        assert one["parameters"]["lr"] == scarcity.step_size(one["parameters"]["start"], scarcity.OUT)
        shared = {pair for pair, images in one["data"]["overlap"].items() if images}
        assert not [pair for pair in shared if {"clients", "test"} & set(pair.split(" and "))]
        assert one["parameters"]["seed"] != scarcity.TRIAL_SEED
