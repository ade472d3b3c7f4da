"""Rounds of FedAvg by this package, Flower's simulation, pfl-research and the ordinary loop: time, memory, weights.

    make bench-peers

The same model, images, clients, batch size and step size for all (`peers` has each engine's part); nobody evaluates.
First, in float64 and without augmentation, all must end two rounds with the same weights. Then each variant runs in
processes of its own: once watched, for its memory, then several times for its speed. Timings on shared machines are
noisy, so every repeat runs all variants, and ratios are taken within a repeat. Linux only: memory is read from /proc.
"""

import argparse
import contextlib
import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from bench_rounds import CLIENTS, CORES, IMAGES, work
from torch.profiler import ProfilerActivity, profile

from mllmfl_lite.data.batches import Batches
from mllmfl_lite.federated import FedAvg, Task, train_client

HERE = Path(__file__).resolve().parent
OURS = "ours"
VARIANTS = {  # name -> the function in `peers`, and its processes (Flower and we start our own workers)
    OURS: ("ours.engine", 1),
    "ordinary loop": ("ours.ordinary", 1),
    "Flower, tutorial's client": ("flower.tutorial", 1),
    "Flower, our client": ("flower.engine", 1),
    "pfl, DataLoader": ("pfl.loader", 1),
    f"pfl, DataLoader, {CORES} processes": ("pfl.loader", CORES),
    "pfl, plain tensors": ("pfl.tensors", 1),
    f"pfl, plain tensors, {CORES} processes": ("pfl.tensors", CORES),
    "pfl, our batches": ("pfl.engine", 1),
    f"pfl, our batches, {CORES} processes": ("pfl.engine", CORES),
}
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
TOLERANCE = 1e-6  # pfl sends its updates in float32
LIMIT = 1800  # seconds that one run may take


@dataclass(frozen=True)
class Run:
    """What a run leaves.

    Attributes:
        started: the clock when its processes were started.
        stamps: the clock before the first round and after each.
        state: the weights at the end.
        memory: MB that its processes held at most, if watched: the sum of what each holds, and shared pages once.
    """

    started: float
    stamps: list[float]
    state: dict
    memory: tuple[float, ...]

    @property
    def first(self):
        """Seconds of the first round."""
        return self.stamps[1] - self.stamps[0]

    @property
    def later(self):
        """Seconds of each round after the first."""
        return [end - begin for begin, end in itertools.pairwise(self.stamps[1:])]

    @property
    def start_up(self):
        """Seconds until the first round has ended, less what a round takes."""
        return self.stamps[1] - self.started - statistics.median(self.later)


def run(name, width, rounds, equal=False, watch=False):
    function, count = VARIANTS[name]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out, log = Path(folder, "out"), Path(folder, "log")
        command = [sys.executable, "-m", "peers", function, f"--width={width}", f"--rounds={rounds}", f"--out={out}"]
        started = time.monotonic()
        with open(log, "w") as file:
            processes = start(command + equal * ["--equal"], count, {"RAY_TMPDIR": folder}, file)
            memory = wait(processes, started, watch)
        if any(process.returncode for process in processes):
            raise RuntimeError(f"{name} failed:\n{log.read_text()}")
        return Run(started, *torch.load(out), memory)


def start(command, count, environment, log):
    """As many processes of a command; several find each other as pfl wants it."""
    environment = os.environ | QUIET | environment
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(count))
    ranks = [{"PFL_WORKER_RANK": str(rank), "PFL_WORKER_ADDRESSES": addresses} for rank in range(count)]
    environments = [environment | rank for rank in ranks] if count > 1 else [environment]
    return [subprocess.Popen(command, cwd=HERE, env=own, stdout=log, stderr=log) for own in environments]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait(processes, started, watch):
    """Wait for processes, and look every 0.2 s at their memory if asked; none is left running."""
    peak = (0.0, 0.0)
    try:
        while None in (codes := [process.poll() for process in processes]):
            if any(codes):
                break
            if time.monotonic() - started > LIMIT:
                raise TimeoutError(f"a run took more than {LIMIT} s")
            if watch:
                peak = tuple(map(max, peak, memory_of([process.pid for process in processes])))
            time.sleep(0.2)
    finally:
        for pid in family([process.pid for process in processes if process.poll() is None]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.wait()
    return peak


def family(roots):
    """Processes and all below them."""
    children, found = {}, list(roots)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        for text in read(stat):
            children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    for pid in found:
        found += children.get(pid, [])
    return found


def memory_of(roots):
    """MB that processes and all below them hold: the sum of what each holds, and with shared pages counted once."""
    texts = [text for pid in family(roots) for text in read(f"/proc/{pid}/smaps_rollup")]
    lines = [line.split() for text in texts for line in text.splitlines()]
    return tuple(sum(int(line[1]) for line in lines if line[0] == kind) / 1024 for kind in ("Rss:", "Pss:"))


def read(path):
    """A file's text in a list, empty if its process has ended."""
    try:
        return [Path(path).read_text()]
    except OSError:
        return []


def differences(state, ours):
    """The largest difference from our weights, and what was compared.

    Raises:
        AssertionError: it is too large.
    """
    same = {name: ours[name] for name in state}
    torch.testing.assert_close(state, same, rtol=0, atol=TOLERANCE, check_dtype=False, check_stride=False)
    largest = max((tensor.double() - same[name].double()).abs().max().item() for name, tensor in state.items())
    return largest, "all" if len(state) == len(ours) else "parameters alone: it averages no BatchNorm statistics"


def compare_weights(names):
    """Print how far each variant's weights are from ours; whether all agree."""
    ours = run(OURS, min(IMAGES), 2, equal=True).state
    print(f"\nlargest difference from our weights after 2 rounds, float64 (equal: at most {TOLERANCE:g})")
    agree = True
    for name in names:
        try:
            largest, what = differences(run(name, min(IMAGES), 2, equal=True).state, ours)
            print(f"{name:36s} {largest:8.1e}  {what}", flush=True)
        except AssertionError as error:
            agree = False
            print(f"{name:36s} DIFFERENT: {error}", flush=True)
    return agree


def faster(runs, ours):
    """How many times longer a variant's rounds take than ours: the median over the repeats, the least and the most."""
    ratios = [statistics.median(r.later) / statistics.median(o.later) for r, o in zip(runs, ours, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def row(name, runs, ours, memory):
    """A line of the table: runs of a variant, ours of the same repeats, and the variant's memory."""
    later = [seconds for one in runs for seconds in one.later]
    first, start_up = (statistics.median(getattr(one, part) for one in runs) for part in ("first", "start_up"))
    gain = "" if name == OURS else faster(runs, ours)
    return (
        f"{name:36s} {statistics.median(later):6.2f} {min(later):6.2f} {gain:>19s}"
        f" {first:8.2f} {start_up:9.1f} {memory[0]:7.0f} {memory[1]:7.0f}"
    )


def floor(width):
    """Seconds a round that the convolutions take in torch, forward and backward, shared out over the cores.

    What is left of a round if all else took no time, and each core were as fast as one alone.
    """
    model, data, split, settings = work(width)
    model.to(memory_format=torch.channels_last)
    anchor, batches = {name: tensor.clone() for name, tensor in model.state_dict().items()}, Batches(data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for client, own in enumerate(split):
            train_client(model, batches, torch.as_tensor(own), FedAvg(), settings, Task(anchor, {}, 1, client))
    torch.set_num_threads(threads)
    convolutions = [e for e in profiled.key_averages() if e.key.startswith("aten::") and "conv" in e.key]
    return sum(event.self_cpu_time_total for event in convolutions) / 1e6 / CORES


HEAD = f"""\
{"":36s} {"s a round":>13s} {"ours is":>19s} {"first":>8s} {"start-up":>9s} {"MB, sum":>7s} {"shared":>7s}
{"":36s} {"median":>6s} {"best":>6s} {"faster by":>19s} {"round, s":>8s} {"s":>9s} {"of all":>7s} {"once":>7s}"""


def report(names, width, rounds, repeats):
    memory = {name: run(name, width, 2, watch=True).memory for name in names}
    runs = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            runs[name].append(run(name, width, rounds))
    print(f"\nResNet-8, width {width}: {CLIENTS} clients, {CLIENTS * IMAGES[width]} images a round, {CORES} cores")
    print(f"{repeats} runs of {rounds} rounds, the first round of each apart\n{HEAD}")
    for name in names:
        print(row(name, runs[name], runs[OURS], memory[name]), flush=True)
    print(f"{'the convolutions alone':36s} {floor(width):6.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--equal", action="store_true", help="compare the weights alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4, help="of a run, at least 2; the first is reported apart")
    parser.add_argument("--width", type=int, choices=IMAGES, nargs="+", default=list(IMAGES))
    parser.add_argument("--only", default="", help="only variants whose name has this in it, and ours")
    args = parser.parse_args()
    names = [name for name in VARIANTS if name == OURS or args.only in name]
    print(", ".join(f"{package} {version(package)}" for package in ("torch", "flwr", "ray", "pfl")))
    agree = compare_weights(names)
    for width in [] if args.equal else args.width:
        report(names, width, args.rounds, args.repeats)
    return 0 if agree else "variants end with other weights than ours"


if __name__ == "__main__":
    sys.exit(main())
