"""A round's clients one by one beside all together, in three precisions, compiled and not, interleaved in one run.

    make bench-gpu

The paper's protocol: ResNet-8 of width 64, 20 clients of 620 or 621 images (`dirichlet_equal`), 8 a round, batches of
32; `--epochs 10` is its whole local training. Every repeat runs all variants from the same weights on the same clients,
and ratios are taken within a repeat. *One by one* is one worker; *compiled* is `torch.compile` with CUDA graphs, of one
client's step or of the stack's. Pictures are made up: their content does not change the speed.

Two checks: how far the weights after a round lie from the same round in float64, one by one and together; and the top-1
of short runs on pictures that can be learned, seed by seed. Without a GPU it is a small version that shows that all of
it runs.
"""

import argparse
import copy
import math
import statistics
import sys
import time
from dataclasses import replace

import numpy as np
import torch

from mllmfl_lite.batches import Batches
from mllmfl_lite.data import ImageSet
from mllmfl_lite.experiment import Experiment, run_experiment
from mllmfl_lite.federated import FedAvg, FedSettings, choose_clients, client_step, weighted_mean
from mllmfl_lite.models import build_model
from mllmfl_lite.partition import long_tail_counts, split_clients
from mllmfl_lite.repro import pick_device, tf32
from mllmfl_lite.results import beyond_chance, mean_and_spread, provenance
from mllmfl_lite.together import ClientStack, Together

CLASSES, CLIENTS, DRAWN, SEEDS = 10, 20, 8, (0, 1, 2)
ONE, ALL = "one by one", "together"
SAME = 1e-3  # of the way that a round goes: nearer to float64 than this, or than 10 times one by one, is rounding
FULL = {"width": 64, "images": 620, "epochs": 1, "repeats": 5, "check_rounds": 20}
SMALL = {"width": 4, "images": 62, "epochs": 1, "repeats": 2, "check_rounds": 2}


def made_up_clients(images):
    """About 20 * `images` random pictures, with CIFAR-10-LT's counts in proportion, and who holds which."""
    labels = np.repeat(np.arange(CLASSES), long_tail_counts(CLASSES, 5000 * images // 620, 100))
    pictures = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    names = tuple(f"class {c}" for c in range(CLASSES))
    return ImageSet(pictures, labels, names, "made up"), split_clients("dirichlet_equal", labels, CLIENTS, 0.5, 0)


def one_by_one(model, batches, split, method, settings):
    """Asks clients as `run_federated` does with one worker."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)

    def ask(state, received, round_, chosen):
        part = (method, settings, state, received, round_)
        return {client: client_step(model, batches, split[client], *part, client) for client in chosen}, {}

    return ask


class InFloat64(FedAvg):
    """For a model in float64: images come in float32."""

    def local_loss(self, model, x, y, rows, anchor):
        return super().local_loss(model, x.double(), y, rows, anchor)


class Bench:
    """All variants on the same clients, from the same weights."""

    def __init__(self, args, device):
        data, split = made_up_clients(args.images)
        model, self.device = build_model("resnet8", CLASSES, args.width).to(device), device
        images = (Batches(data, device), [torch.from_numpy(own).to(device) for own in split])
        self.settings = FedSettings(clients_per_round=DRAWN, local_epochs=args.epochs, lr=0.01)
        self.start = {name: t.clone() for name, t in model.state_dict().items()}
        self.parameters = [name for name, _ in model.named_parameters()]
        self.variants = {}
        for precision in args.precisions:
            settings = replace(self.settings, precision=precision)
            self.variants[precision, ONE] = one_by_one(model, *images, FedAvg(), settings)
            self.variants[precision, ALL] = ClientStack(model, *images, FedAvg(), settings, Together()).ask
            if args.compile:
                for name, at_once in ((ONE, 1), (ALL, None)):
                    how = Together(at_once, compile=args.compile)
                    stack = ClientStack(model, *images, FedAvg(), settings, how)
                    self.variants[precision, f"{name}, compiled"] = stack.ask
        self.exact = self._mean(one_by_one(model.double(), *images, InFloat64(), self.settings), 1)

    def _mean(self, ask, round_):
        results, _ = ask(self.start, {}, round_, choose_clients(CLIENTS, self.settings, round_))
        return weighted_mean([result.state for _, result in sorted(results.items())], [1] * len(results))

    def round(self, variant, round_):
        """One round: its seconds, the MB of GPU memory that it takes, and how far its weights lie from float64's.

        The latter is for round 1, as a share of the way that the weights go.
        """
        gpu, held = self.device.type == "cuda", 0
        if gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            held = torch.cuda.memory_allocated(self.device)
        started = time.perf_counter()
        with tf32(variant[0] == "tf32"):
            mean = self._mean(self.variants[variant], round_)
        if gpu:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - started
        memory = (torch.cuda.max_memory_allocated(self.device) - held) / 2**20 if gpu else float("nan")
        return seconds, memory, self._distance(self.exact, mean) / self._distance(self.exact, self.start)

    def _distance(self, one, other):
        parts = [(one[name].double() - other[name].double()).square().sum() for name in self.parameters]
        return sum(parts).sqrt().item()


def measure(bench, repeats, epochs):
    """Print the table; return whether all variants run and their weights agree within rounding."""
    gaps, memory = {}, {}
    for variant in bench.variants:  # warm up, compile, and compare
        started = time.perf_counter()
        try:
            gaps[variant], done = bench.round(variant, 1)[2], "ready"
        except Exception as error:  # the others are still worth their time
            done = f"FAILED, {type(error).__name__}: {str(error)[:500]}"
        print(f"  {', '.join(variant)}: {done} ({time.perf_counter() - started:.0f} s)", flush=True)
    seconds = {variant: [] for variant in gaps}
    for repeat in range(repeats):
        for variant, taken in seconds.items():
            one, memory[variant], _ = bench.round(variant, 2 + repeat)
            taken.append(one)
    print(f"\n{'':32s} {'':>8s} {'faster than one by one':>24s} {'':>9s} {'from':>8s} {'200 rounds x 10 epochs':>23s}")
    print(f"{'precision':9s} {'clients':22s} {'s/round':>8s} {'in this precision':>17s}", end="")
    print(f" {'float32':>9s} {'memory':>6s} {'float64':>8s} {'would take':>23s}")
    for (precision, name), taken in seconds.items():
        own, plain = (gain(seconds.get((of, ONE), ()), taken) for of in (precision, "float32"))
        middle, whole = statistics.median(taken), 200 * 10 / epochs * statistics.median(taken) / 3600
        print(f"{precision:9s} {name:22s} {middle:8.3f} {own:17.2f} {plain:9.2f}", end="")
        recorded = name.endswith("compiled")  # its graphs have a pool of their own, which is not seen
        held = "  ?" if recorded else f"{memory[precision, name]:3.0f}"
        print(f" {held} MB {gaps[precision, name]:8.1e} {whole:21.2f} h")
    print("from float64: how far the weights after a round lie from it, as a share of the way that they go")
    near = all(gap <= max(SAME, 10 * gaps.get((precision, ONE), 0)) for (precision, _), gap in gaps.items())
    return near and len(gaps) == len(bench.variants)


def gain(base, taken):
    """How many times as fast, the median over repeats; NaN where there is nothing to compare with."""
    return statistics.median(one / other for one, other in zip(base, taken, strict=True)) if base else math.nan


def accuracies(args):
    """Print the top-1 of short runs one by one and together, seed by seed; return whether they differ beyond chance."""
    report = min(5, args.check_rounds)
    numbers = FedSettings(args.check_rounds, DRAWN, args.epochs, eval_every=args.check_rounds, report_rounds=report)
    experiment = Experiment("cifar10_mini", num_clients=CLIENTS, width=args.width, settings=numbers)
    top1 = {
        together: [
            run_experiment(experiment.with_seed(seed), workers=1, together=together)["summary"]["top1"]
            for seed in SEEDS
        ]
        for together in (False, True)
    }
    gains = [b - a for a, b in zip(*top1.values(), strict=True)]
    print(f"\ntop-1 after {args.check_rounds} rounds on cifar10_mini, seeds {SEEDS}, float32:")
    for together, values in top1.items():
        mean, spread = mean_and_spread(values)
        print(
            f"  {ALL if together else ONE:11s} {' '.join(f'{v:.2%}' for v in values)}  mean {mean:.2%} +- {spread:.2%}"
        )
    differ = beyond_chance(gains)
    points = " ".join(f"{100 * gain:+.2f}" for gain in gains)
    print(f"  difference {points} points: {'BEYOND' if differ else 'within'} chance (t-test over seeds)")
    return differ


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in FULL:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, help=f"default {FULL[name]}; no GPU: {SMALL[name]}"
        )
    parser.add_argument("--no-compile", action="store_true", help="leave compiled variants out: they take minutes")
    args, device = parser.parse_args(), pick_device()
    gpu = device.type == "cuda"
    for name, value in (FULL if gpu else SMALL).items():
        setattr(args, name, getattr(args, name) or value)
    args.precisions = ("float32", "tf32", "bfloat16") if gpu else ("float32", "bfloat16")
    args.compile = {"mode": "reduce-overhead"} if gpu else {"backend": "aot_eager"}
    args.compile = None if args.no_compile else args.compile
    where = provenance(device)
    print(f"{where['device']}, torch {where['packages']['torch']}, {where['date'][:10]}")
    if not gpu:
        print(
            "NO GPU HERE: a small version, to show that it runs. What a GPU gains is open; this says nothing about it."
        )
    print(f"ResNet-8, width {args.width}; {DRAWN} of {CLIENTS} clients a round, about {args.images} images each")
    print(f"batches of 32, epochs: {args.epochs}", flush=True)
    fine = measure(Bench(args, device), args.repeats, args.epochs)
    differ = accuracies(args)
    return 0 if fine and not differ else "clients together do not give what clients one by one give"


if __name__ == "__main__":
    sys.exit(main())
