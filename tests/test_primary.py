"""The primary differences: Holm's correction by hand, pairs of seeds, rows that share images; committed files hold."""

import evidence
import numpy as np
import primary
import pytest
import tune
from scipy import stats

from mllmfl_lite.runs.results import result_path, save_result
from mllmfl_lite.runs.run import finished


def test_holms_correction_by_hand():
    """The smallest times 5, the next times 4, ..., never falling, at most 1."""
    assert primary.holm([0.04, 0.001, 0.02, 0.5, 0.03]) == pytest.approx([0.09, 0.005, 0.08, 0.5, 0.09])
    assert primary.holm([0.6, 0.7]) == [1.0, 1.0] and primary.holm([0.01]) == [0.01]


def test_no_p_value_is_printed_as_zero():
    printed = [primary.Primary([], None, p).chance for p in (0.0132, 0.001, 0.00003)]
    assert printed == ["0.013", "0.001", "under 0.001"]


@pytest.fixture
def world(tmp_path):
    def write(label, seed, top1, overlap=0):
        groups = dict.fromkeys(("head", "middle", "tail"), top1)
        save_result(
            tmp_path / "laptop/tuned/cifar10_mini_lt_if10_long" / f"{label}_seed{seed}.json",
            {
                "label": label, "parameters": {"seed": seed}, "history": [], "provenance": {},
                "summary": {"top1": top1, "groups": groups}, "data": {"overlap": {"clients and pool": overlap}},
            },
        )  # fmt: skip

    for seed, (ours, theirs) in enumerate([(0.40, 0.36), (0.42, 0.37), (0.41, 0.38)]):
        write("stage3", seed, ours)
        write("server_only", seed, theirs)
    write("stage3", 3, 0.9)  # without a partner
    write("fedyoyo", 0, 0.3)
    return tmp_path, write


def test_a_difference_is_over_seeds_that_both_rows_have(world):
    rows = primary.read(world[0] / "laptop/tuned/cifar10_mini_lt_if10_long")
    (name, found), *more = primary.primary(rows).items()
    p = stats.ttest_rel([0.40, 0.42, 0.41], [0.36, 0.37, 0.38]).pvalue
    assert (name, more, found.seeds) == ("Q5", [], [0, 1, 2])
    assert found.found.mean == pytest.approx(0.04) and found.p == pytest.approx(min(5 * p, 1))
    lines = "\n".join(primary.tables(world[0]))
    assert "| FedYoYo | 1 | 30.0 | 30.0 |" in lines and "| 3 | +4.0 (" in lines and "Medium" not in lines
    assert "| stages 2 and 3 | 4 |" in lines and "The first series" not in lines, "nothing was asked again yet"


def test_the_second_series_asks_the_same_of_longer_rows(world):
    for seed, (ours, theirs) in enumerate([(0.50, 0.47), (0.52, 0.51)]):
        world[1]("stage3_100", seed, ours)
        world[1]("server_only_100", seed, theirs)
    rows = primary.read(world[0] / "laptop/tuned/cifar10_mini_lt_if10_long")
    assert list(primary.primary(rows, primary.AGAIN)) == ["Q5"]
    assert primary.primary(rows, primary.AGAIN)["Q5"].found.mean == pytest.approx(0.02)
    assert primary.AGAIN["Q2"][1:] == ("fedyoyo_stage3_100", "fedyoyo")
    lines = "\n".join(primary.tables(world[0]))
    assert "The first series" in lines and "| 0 | – | 1.000 | not run |" in lines
    p = [primary.difference(rows, *pair).p for pair in (("stage3", "server_only"), ("stage3_100", "server_only_100"))]
    assert primary.over_both(rows) == dict.fromkeys(("Q1", "Q2", "Q3", "Q4"), 1.0) | {
        "Q5": primary.holm([*p, *[1.0] * 8])[1]
    }
    for row in primary.FIRST:
        for file in (world[0] / "laptop/tuned/cifar10_mini_lt_if10_long").glob(f"{row}_seed*.json"):
            file.unlink()
    alone = "\n".join(primary.tables(world[0]))
    assert "| stages 2 and 3 | 2 |" in alone and "The first series" not in alone, "the second alone"


def test_a_row_whose_sets_share_images_is_refused(world):
    world[1]("fedavg", 0, 0.3, overlap=2)
    with pytest.raises(ValueError, match=r"fedavg_seed0.json: two sets share images .*clients and pool.: 2"):
        list(primary.tables(world[0]))


def test_committed_files_are_of_the_protocol():
    """Each is a row of the queue, with the settings of the best trial and a seed that is not the trials'."""
    for place in primary.WORLDS:
        scale, _, benchmark = place.split("/")
        folder, rows = primary.RESULTS / place, primary.read(primary.RESULTS / place)
        for label, seed in [(label, seed) for label, runs in rows.items() for seed in runs]:
            job = evidence.Job(evidence.RUNS / scale / f"{benchmark}.yaml", label, seed)
            finished(result_path(folder, label, seed), job.run().experiment)
            assert seed != tune.SEED, "no result uses the tuning seed"
        queued = {name for at, methods, _ in evidence.QUEUE if at == f"{scale}/{benchmark}" for name in methods}
        assert rows.keys() <= queued, place
    queued = {name for _, methods, _ in evidence.QUEUE for name in methods}
    assert {label for place in primary.WORLDS for label in primary.read(primary.RESULTS / place)} <= queued
    asked = {name for asked in (primary.QUESTIONS, primary.AGAIN) for _, *pair in asked.values() for name in pair}
    assert asked <= queued <= primary.NAMES.keys()


def test_the_first_page_says_what_the_files_say():
    rows = primary.read(primary.RESULTS / "laptop/tuned/cifar10_mini_lt_if10_long")

    both = primary.shared_seeds(rows, "fedavg", "mllm_llava_fl_100")

    def mean(row, group):
        return round(100 * np.mean([rows[row][seed]["summary"]["groups"][group] for seed in both]))

    page = " ".join((primary.RESULTS.parent / "book" / "intro.md").read_text(encoding="utf-8").split())
    alone, full = ([mean(row, group) for group in ("head", "tail")] for row in ("fedavg", "mllm_llava_fl_100"))
    assert f"averaging alone gets {alone[1]} % of their pictures right, and all three stages get {full[1]} %" in page
    assert f"they fall from {alone[0]} to {full[0]} %" in page
    larger = primary.read(primary.RESULTS / "medium/tuned/cifar10_lt_if100_clean")
    early = primary.difference(larger, "stage1", "fedavg")
    assert early.low > 0, "without stage 3, in the larger world (chapter 6)"
    assert round(100 * np.mean([rows["fedavg"][seed]["summary"]["top1"] for seed in both])) == 30
    assert round(100 * np.mean([rows["mllm_llava_fl_100"][seed]["summary"]["top1"] for seed in both])) == 54
    assert "accuracy rises from 30 to 54 %" in page
    assert "it ends only one to four percentage points lower" in page
    for of, most in ((rows, 0.03), (larger, 0.045)):
        for end in ("", "_ce"):
            found = primary.difference(of, f"stage3{end}_100", f"server_only{end}_100")
            assert 0.01 < found.mean < most and found.low > 0


def test_a_difference_of_a_group_pairs_seeds_not_places(world):
    for seed, value in ((1, 0.2), (2, 0.5)):
        world[1]("fedyoyo", seed, value)
    rows = primary.read(world[0] / "laptop/tuned/cifar10_mini_lt_if10_long")
    assert primary.shared_seeds(rows, "stage3", "fedyoyo") == [0, 1, 2]
    for seed, value in enumerate((0.1, 0.2, 0.4)):
        rows["stage3"][seed]["summary"]["groups"]["tail"] = value
    for group, ours in ((None, (0.40, 0.42, 0.41)), ("tail", (0.1, 0.2, 0.4))):
        expected = np.mean(np.subtract(ours, (0.3, 0.2, 0.5)))
        assert primary.difference(rows, "stage3", "fedyoyo", group).mean == pytest.approx(expected)
    with pytest.raises(ValueError, match="each seed needs a figure"):
        primary.difference(rows, "stage3", "creff")
