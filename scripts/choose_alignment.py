"""The grid by which the defaults of stage 3 were chosen: on held-out training images, never on the test part.

    python scripts/choose_alignment.py          # about an hour on one core

Each line is a trial of `scripts/tune.py`, from random weights and from stage 1's. (Then, another fifth was held out.)
"""

import itertools

import torch
from sweep import RESULTS, laptop_run
from tune import SEED, trial

from mllmfl_lite.runs.config import experiment_of, parameters_of

GRID = {
    "teacher": ("mllm", "clip"),
    "per_class": (40, 60, 100),
    "beta": (0.0, 1.0, 4.0),
    "temperature": (1.0, 2.0),
    "lr": (0.02, 0.05),
    "epochs": (20,),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    done = {}
    for method, values in itertools.product(("stage3", "mllm_llava_fl"), itertools.product(*GRID.values())):
        numbers = dict(zip(GRID, values, strict=True))
        if numbers["beta"] or numbers["temperature"] == 1:  # T is in the KL term only
            of = experiment_of({**parameters_of(laptop_run(method, SEED).experiment), "align": numbers})
            print(f"{method} {numbers}: {100 * trial(of, RESULTS / 'laptop' / 'answers', done):.1f} %", flush=True)
