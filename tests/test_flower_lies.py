"""What a lying node sends through Flower is judged as in process: left out with the same reason, or taken."""

import math
import sys
from pathlib import Path

import pytest
from test_flower_app import ALL_ONCE, InProcess, _a_task, app, read_experiment, run  # noqa: F401 (a fixture)

sys.path.insert(0, str(Path(__file__).parent / "slow"))

from flwr.app import ArrayRecord
from liars import LIAR, LIES

from mllmfl_lite.federated.aggregate import ClientResult, accept
from mllmfl_lite.runs import load_federation
from mllmfl_lite.runs.parts import initial_model, make_method

# Flower's records cannot hold these; what takes their place is among the faults of test_flower_app.py.
NO_RECORD = {"arrays in place of tensors", "no weights", "nothing at all", "a loss as text"}
SMALL = {"method_options": '{"per_class": 2, "head_epochs": 1, "match_steps": 1}'}


class Liar:
    """Client 0 lies; keeps what has arrived from each client."""

    def __init__(self, lie, start):
        self.lie, self.start, self.arrived = lie, start, {}

    def __call__(self, client, round_, reply):
        state, extra = (dict(app.tensors(reply.content[name])) for name in ("state", "extra"))
        results = {LIAR: ClientResult(state, extra, reply.content["figures"]["loss"])}
        if client == 0:
            self.lie(results, self.start)
            reply.content["state"], reply.content["extra"] = map(
                ArrayRecord, (results[LIAR].state, results[LIAR].extra)
            )
        self.arrived[client] = results[LIAR]
        return reply


@pytest.mark.parametrize("name", sorted(LIES.keys() - NO_RECORD))
def test_a_lie_through_flower_is_judged_as_in_process(tmp_path, name):
    config = ALL_ONCE | ({"method": "creff"} | SMALL if name.startswith("creff") else {})
    experiment = read_experiment(config)
    images, split, _ = load_federation(experiment)
    start = initial_model(experiment, images.num_classes, None).state_dict()
    liar = Liar(LIES[name], start)
    (record,) = run(tmp_path, InProcess(config, spoil=liar))["history"]
    settings = experiment.federated
    steps = {c: settings.local_epochs * math.ceil(len(split[c]) / settings.batch_size) for c in range(4)}
    accepted, reasons = accept((liar.arrived, {}), steps, start, make_method(experiment, images).check_upload)
    assert record["clients"] == list(accepted)
    assert record.get("left_out", {}) == {str(client): reason for client, reason in reasons.items()}
