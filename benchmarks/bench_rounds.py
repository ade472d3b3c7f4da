"""The engine beside the loop that one would write first: the same round, interleaved in one run.

    make bench

One round of FedAvg, the same clients and images for all. *Engine*: `mllmfl_lite.federated`, one worker a core.
*Ordinary*: one PIL pipeline an image, a DataLoader, a deep copy of the model a client; with one torch thread, and with
torch's default. Timings on shared machines are noisy, so every repeat runs all variants, and ratios are taken within a
repeat. All is measured twice: on the machine as it is, and beside a process that keeps one core busy.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from mllmfl_lite.data import load_images
from mllmfl_lite.data.batches import CHANNEL_MEAN, CHANNEL_STD
from mllmfl_lite.data.partition import iid
from mllmfl_lite.federated import Federation, FedSettings, run_federated, weighted_mean
from mllmfl_lite.models import build_model
from mllmfl_lite.repro import Execution, count_cores

CLIENTS = 8
IMAGES = {16: 200, 64: 48}  # images a client, by width: seconds a variant
CORES = count_cores()
VARIANTS = ("engine", "ordinary, default threads", "ordinary, one thread")


class Pictures(Dataset):
    """The usual torchvision data set: a PIL image through a pipeline of transforms."""

    def __init__(self, data):
        self.images, self.labels = data.images, data.labels
        self.transform = v2.Compose(
            [
                v2.ToPILImage(),
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(CHANNEL_MEAN, CHANNEL_STD),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.images[i]), int(self.labels[i])


def shuffled(data, own, settings, client):
    return DataLoader(Subset(Pictures(data), own.tolist()), settings.batch_size, shuffle=True)


def ordinary_training(local, loader, settings):
    local.train()
    optimizer = torch.optim.SGD(local.parameters(), lr=settings.lr)
    for _ in range(settings.local_epochs):
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(local(x), y).backward()
            optimizer.step()


def ordinary_round(model, data, split, settings, load=shuffled):
    states = []
    for client, own in enumerate(split):
        local = copy.deepcopy(model)
        ordinary_training(local, load(data, own, settings, client), settings)
        states.append(local.state_dict())
    return weighted_mean(states, [len(own) for own in split])


def work(width, rounds=1, images=None):
    images = images or IMAGES[width]
    data = load_images("cifar10_mini", "train").subset(slice(0, None, 5000 // (CLIENTS * images)))
    data = data.subset(slice(0, CLIENTS * images))
    settings = FedSettings(rounds, clients_per_round=CLIENTS, local_epochs=1, eval_every=rounds, report_rounds=1)
    return build_model("resnet8", 10, width), data, iid(data.labels, CLIENTS, 0), settings


def run(variant, width, workers=None):
    """Seconds for one round of a variant, and the state it ends with."""
    model, data, split, settings = work(width)
    torch.set_num_threads(1 if variant == "ordinary, one thread" else CORES)
    started = time.perf_counter()
    if variant == "engine":
        # one test image: both sides are timed on training and averaging
        federation = Federation(data, split, data.subset(slice(0, 1)))
        state = run_federated(model, federation, None, settings, 0, Execution(device="cpu", workers=workers)).state
    else:
        state = ordinary_round(model, data, split, settings)
    return time.perf_counter() - started, state


def flops_per_image(width):
    model, x = build_model("resnet8", 10, width), torch.zeros(8, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        cross_entropy(model(x), torch.zeros(8, dtype=torch.long)).backward()
    return counter.get_total_flops() / len(x)


def matmul_peak():
    """The best float32 matrix product this machine does right now, FLOP/s, all cores."""
    torch.set_num_threads(CORES)
    a, best = torch.randn(2048, 2048), 0.0
    for _ in range(10):
        started = time.perf_counter()
        a @ a
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started))
    return best


def peak_memory(variant, width):
    """MB that a fresh process takes at most for a round, over what it holds after its imports (Linux only)."""
    command = [sys.executable, __file__, "--memory", variant, "--width", str(width)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def high_water_mark():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not tell a process's peak memory")


def memory_of_one_round(variant, width):
    before = high_water_mark()
    run(variant, width)
    return high_water_mark() - before


def report(width, repeats, busy):
    for variant in VARIANTS:
        run(variant, width)  # warm up
    seconds = {variant: [] for variant in VARIANTS}
    peaks = []
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        for _ in range(repeats):
            peaks.append(matmul_peak())
            for variant in VARIANTS:
                seconds[variant].append(run(variant, width)[0])
    finally:
        if other:
            other.kill()
            other.wait()
    images, flops = CLIENTS * IMAGES[width], flops_per_image(width)
    print(
        f"\nResNet-8, width {width}: {images} images a round, {flops / 1e6:.0f} MFLOP an image, {CORES} cores"
        + ", one of them busy" * busy
    )
    print(f"{'variant':27s} {'images/s':>9s} {'engine is faster by':>22s} {'of matmul peak':>15s} {'memory':>8s}")
    for variant, times in seconds.items():
        rate = images / statistics.median(times)
        ratios = [t / e for t, e in zip(times, seconds["engine"], strict=True)]
        gain = f"{statistics.median(ratios):.2f} (best {max(ratios):.2f})" if variant != "engine" else ""
        share = statistics.median(images * flops / t / p for t, p in zip(times, peaks, strict=True))
        print(f"{variant:27s} {rate:9.0f} {gain:>22s} {share:15.0%} {peak_memory(variant, width):6.0f} MB")
    one, two = (run("engine", width, workers)[1] for workers in (1, 2))
    same = all(torch.equal(one[name], two[name]) for name in one)
    print(f"final weights with 1 and 2 workers: {'the same bits' if same else 'DIFFERENT'}")
    return same


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", choices=VARIANTS, help="only print the MB that one round of this variant takes")
    parser.add_argument("--width", type=int, choices=IMAGES, default=16)
    args = parser.parse_args()
    if args.memory:
        print(memory_of_one_round(args.memory, args.width))
        return 0
    reports = [report(width, args.repeats, busy) for busy in (False, True) for width in IMAGES]
    return 0 if all(reports) else "the number of workers changed a result"


if __name__ == "__main__":
    sys.exit(main())
