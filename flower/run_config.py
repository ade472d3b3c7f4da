"""From Flower's flat configuration of a run to the experiment and the server's options."""

import json
from dataclasses import fields
from typing import Annotated, Any

from pydantic import Field

from mllmfl_lite.repro import settings_class
from mllmfl_lite.runs import Experiment, experiment_of
from mllmfl_lite.runs.config import all_of

BLOCKS = ("federated", "pretrain", "align")


@settings_class
class ServerOptions:
    """What the server needs to know beside the experiment."""

    folder: str = "runs/flower"  # of checkpoints, models and the results file
    device: str = "cpu"  # where the server tests and aligns
    timeout: Annotated[float, Field(gt=0)] = 600.0  # seconds that clients have for a round
    wait: Annotated[float, Field(ge=0)] = 60.0  # seconds to wait for clients that are not connected
    secure: bool = False  # SecAgg+: the server learns the clients' mean, no single update
    traffic: bool = False  # note the bytes and seconds of each set of messages in traffic.jsonl; writes each twice


def read_config(config: dict[str, Any]) -> tuple[Experiment, ServerOptions]:
    """The experiment and the server's options from flat keys, e.g. ``federated.rounds`` or ``seed``.

    Flower knows no lists and dictionaries: `stages` is text such as ``"2,3"``, `method_options` a JSON object.

    Raises:
        ValueError: names every unknown key and every wrong value.
    """
    known, options = ({f.name for f in fields(cls)} for cls in (Experiment, ServerOptions))
    values, given, problems = {block: {} for block in BLOCKS}, {}, []
    for key, value in config.items():
        block, _, name = key.partition(".")
        if name and block in BLOCKS:
            values[block][name] = value
        elif key in options:
            given[key] = value
        elif key in known - set(BLOCKS):
            values[key] = value
        else:
            problems.append(f"{key}: there is no such setting")
    text = values.pop("method_options", "")
    try:
        values["method_options"] = json.loads(text or "{}")
    except (TypeError, ValueError):
        problems.append(f"method_options: must be a JSON object, such as '{{\"mu\": 0.1}}'; got {text!r}")
    if "stages" in values:
        values["stages"] = [int(n) if n.strip().isdecimal() else n for n in str(values["stages"]).split(",")]
    return tuple(all_of(lambda: experiment_of(values), lambda: ServerOptions(**given), known=problems))
