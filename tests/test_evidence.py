"""The queue of runs and the trials before them: order, interruption, what is done stays done."""

import json

import evidence
import pytest
import tune
import yaml

from mllmfl_lite.runs.config import experiment_of
from mllmfl_lite.runs.files import merge, read_runs, read_settings

WORLD = {
    "dataset": "cifar10_mini", "imbalance_factor": 100, "num_clients": 10, "width": 4,
    "federated": {"rounds": 1, "clients_per_round": 1, "local_epochs": 1, "eval_every": 5, "report_rounds": 1},
}  # fmt: skip


@pytest.fixture
def queue(tmp_path, monkeypatch):
    for module in (evidence, tune):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(evidence, "RUNS", tmp_path)
    monkeypatch.setattr(evidence, "QUEUE", [("laptop/world", ["fedavg"], range(2))])
    (tmp_path / "laptop").mkdir()
    (tmp_path / "laptop" / "world.yaml").write_text(yaml.safe_dump(WORLD))
    return tmp_path


def test_an_interrupted_queue_goes_on_and_ends(queue, monkeypatch):
    assert [str(job) for job in evidence.undone()] == [
        f"laptop/world: fedavg, {what}" for what in ("six trials", "seed 0", "seed 1")
    ]
    real, rates = tune.trial, []

    def dies_in_the_third(of, *more):
        if len(rates) == 2:
            raise KeyboardInterrupt
        rates.append(of.federated.lr)
        return real(of, *more)

    monkeypatch.setattr(tune, "trial", dies_in_the_third)
    trials = next(evidence.undone())
    with pytest.raises(KeyboardInterrupt):
        evidence.do(trials)
    monkeypatch.setattr(tune, "trial", lambda of, *more: (rates.append(of.federated.lr), of.federated.lr)[1])
    evidence.do(trials)
    assert rates == [0.02, 0.05, 0.1, 0.2, 0.3, 0.5], "none is made twice"
    written = json.loads((queue / "results/laptop/tuning/world/fedavg.json").read_text())
    assert [trial["settings"]["federated"]["lr"] for trial in written] == rates
    assert yaml.safe_load((queue / "laptop/tuned/fedavg.yaml").read_text()) == {"federated": {"lr": 0.5}}

    evidence.do(next(evidence.undone()))
    assert [job.seed for job in evidence.undone()] == [1]
    assert next(evidence.describe()).startswith("laptop/world fedavg: seeds 1: about")
    evidence.do(next(evidence.undone()))
    assert list(evidence.undone()) == [] and len(list((queue / "results/laptop/tuned/world").glob("*.json"))) == 2


def test_trials_and_runs_have_the_benchmarks_settings_and_the_rounds_best_ones(queue, monkeypatch):
    """Whatever a method's own file and its trials change, a block keeps what they do not name."""
    tried, world = [], queue / "laptop/world.yaml"
    monkeypatch.setattr(tune, "trial", lambda of, *more: (tried.append(of), of.federated.lr + of.align.lr)[1])
    for name in ("fedavg", "stage3", "feddf", "fednpc"):
        tune.tune(world, name)
    assert len(tried) == 24 and {(of.federated.rounds, of.federated.local_epochs) for of in tried} == {(1, 1)}
    assert {of.federated.lr for of in tried[6:12]} == {0.5}, "stage 3 goes on from the best rounds"
    assert {of.federated.lr for of in tried[18:]} == {0.5}, "so does FedNPC"
    for name, of in (("fedavg", tried[5]), ("stage3", tried[10]), ("feddf", tried[15])):
        (run,) = read_runs([world], [tune.tuned_file(world, name)], [tune.SEED])
        assert run.experiment == of


def test_what_a_run_lacks_is_said_first_and_the_others_go_on(queue, monkeypatch, capsys):
    """A method whose trials could not be made gets no runs; nothing is trained before its need is known."""
    monkeypatch.setattr(evidence, "QUEUE", [("laptop/world", ["server_only", "fedavg"], range(2))])
    monkeypatch.setattr(evidence, "missing", lambda of: ["the teacher"] if 3 in of.stages else [])
    monkeypatch.setattr(tune, "trial", lambda of, *more: of.federated.lr)
    assert "missing: the teacher" in list(evidence.describe())
    assert evidence.work() == {"laptop/world: server_only, six trials"}
    assert "ValueError: missing: the teacher" in capsys.readouterr().err
    assert {path.stem for path in (queue / "laptop/tuned").iterdir()} == {"fedavg"}
    assert len(list((queue / "results/laptop/tuned/world").glob("fedavg_*.json"))) == 2


def test_a_trial_runs_half_of_the_rounds():
    assert [
        tune.halved(tune.experiment_of(WORLD | {"federated": {"rounds": n, "clients_per_round": 1}})).federated.rounds
        for n in (1, 2, 5, 40)
    ] == [1, 1, 3, 20]


def test_an_anchor_has_fedavgs_settings_and_no_trials(queue, monkeypatch):
    monkeypatch.setattr(evidence, "QUEUE", [("laptop/world", ["fedavg", "small"], [0])])
    (queue / "laptop/tuned").mkdir()
    (queue / "laptop/tuned/fedavg.yaml").write_text("federated: {lr: 0.5}\n")
    (queue / "laptop/anchors").mkdir()
    (queue / "laptop/anchors/small.yaml").write_text("num_clients: 3\n")
    monkeypatch.setattr(evidence, "ANCHORS", {"small": "fedavg"})
    assert [str(job) for job in evidence.undone()] == [f"laptop/world: {name}, seed 0" for name in ("fedavg", "small")]
    of = list(evidence.undone())[1].run().experiment
    assert (of.num_clients, of.federated.lr, of.federated.rounds) == (3, 0.5, 1)


def test_every_method_has_six_trials_and_none_uses_a_test_image():
    for what, choices in tune.METHODS.values():
        assert len(tune.combinations(choices)) == 6 and not {"seed", "dataset"} & what.keys()
    assert {m for _, methods, _ in evidence.QUEUE for m in methods} <= tune.METHODS.keys() | set(evidence.ANCHORS)
    federation = tune.world(tune.experiment_of(WORLD))
    train, held = ({image.tobytes() for image in part.images} for part in (federation.train, federation.test))
    test = {image.tobytes() for image in tune.load_clients_part(tune.experiment_of(WORLD)).images}
    assert held <= test and not held & train and len(held) == 1000


def test_no_teacher_of_the_clean_world_of_full_cifar_saw_its_labels():
    """The stand-ins learned with labels from most of CIFAR-10's training images: the queue may not ask them there."""
    names = {name for place, methods, _ in evidence.QUEUE if place == evidence.MEDIUM for name in methods}
    world = read_settings([evidence.RUNS / f"{evidence.MEDIUM}.yaml"])
    for name in names:
        of = experiment_of(merge(world, tune.METHODS[name][0]))
        assert 3 not in of.stages or of.align.teacher == "imagenet", name
        assert of.start.split("/")[:2] in ([""], ["results", "real"]), name
        assert of.method != "clip2fl" or of.clip != "tiny_clip", name


def test_committed_settings_are_the_best_of_committed_trials():
    for path in sorted(evidence.RUNS.glob("*/tuned/*.yaml")):
        (trials,) = (evidence.RESULTS / path.parent.parent.name / "tuning").glob(f"*/{path.stem}.json")
        found = json.loads(trials.read_text(encoding="utf-8"))
        what, choices = tune.METHODS[path.stem]
        assert [trial["settings"] for trial in found] == tune.combinations(choices)
        best = max(found, key=lambda one: one["top1"])["settings"]
        chosen = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert (
            all(chosen[key].items() >= block.items() for key, block in best.items()) and what.items() <= chosen.items()
        )
