"""The Flower app's configuration. It needs no flwr."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest

from mllmfl_lite.federated import FedSettings
from mllmfl_lite.runs import Experiment
from mllmfl_lite.stages.align import AlignSettings
from mllmfl_lite.stages.pretrain import PretrainSettings

FLOWER = Path(__file__).parent.parent / "flower"
sys.path.append(str(FLOWER))

from run_config import ServerOptions, read_config  # noqa: E402

BLOCKS = {"federated": FedSettings, "pretrain": PretrainSettings, "align": AlignSettings}


def test_flat_keys_are_an_experiment():
    config = {
        "dataset": "cifar10_mini", "num_clients": 4, "imbalance_factor": 50, "seed": 3, "method": "fedprox",
        "method_options": '{"mu": 0.5}', "stages": "2,3", "federated.rounds": 2, "federated.clients_per_round": 2,
        "align.per_class": 7, "timeout": 5,
    }  # fmt: skip
    experiment, options = read_config(config)
    assert experiment == Experiment(
        "cifar10_mini", 50.0, num_clients=4, seed=3, method="fedprox", method_options={"mu": 0.5}, stages=(2, 3),
        federated=FedSettings(2, 2), align=AlignSettings(per_class=7),
    )  # fmt: skip
    assert options == ServerOptions(timeout=5.0)
    assert read_config({}) == (Experiment(), ServerOptions())
    assert read_config({"stages": 2})[0] == Experiment()


def test_all_wrong_keys_are_named_at_once():
    wrong = {
        "num_client": 4, "federated": 4, "federated.round": 4, "num_clients": "4", "federated.rounds": True,
        "stages": "2;3", "method_options": "mu=0.5", "align.beta": "much", "timeout": "soon", "wait": -1,
    }  # fmt: skip
    with pytest.raises(ValueError) as caught:
        read_config(wrong)
    named = dict(line.split(": ", 1) for line in str(caught.value).splitlines())
    assert named.keys() == wrong.keys() - {"stages"} | {"stages.0"}
    assert named["num_client"] == named["federated"] == named["federated.round"] == "there is no such setting"
    assert named["num_clients"] == "must be a valid integer; got '4'"
    assert named["method_options"] == "must be a JSON object, such as '{\"mu\": 0.1}'; got 'mu=0.5'"


def test_the_apps_own_config_names_every_key_and_is_right():
    """Flower refuses a key on the command line that the app's own config lacks."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    config = tomllib.loads((FLOWER / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    flat = {f"{block}.{key}": value for block in BLOCKS for key, value in config.pop(block).items()} | config
    names = {f.name for cls in (Experiment, ServerOptions) for f in fields(cls)} - BLOCKS.keys()
    assert flat.keys() == names | {f"{block}.{f.name}" for block, cls in BLOCKS.items() for f in fields(cls)}
    experiment, options = read_config(flat)
    assert options == ServerOptions() and experiment.dataset == "cifar10_mini"
    everything, _ = read_config({**flat, "stages": "1,2,3"})
    assert (everything.pretrain, everything.align) == (PretrainSettings(), AlignSettings())
