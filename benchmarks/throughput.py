"""One rank on one thread: Parle's step against torch.optim.SGD's, and the training loop against the plain one.

    python benchmarks/throughput.py --data DIR        # DIR as torchvision lays it out, with MNIST

Both of a pair take turns in one process; the ratio is the median over the turns.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import loader
import models
from parle_mpi import Parle

TURNS = 9


def compare(ours: Callable[[], None], theirs: Callable[[], None], calls: int) -> tuple[float, float, float, float]:
    """Median seconds of a call of each, and the median and spread of theirs / ours over the turns."""
    pairs = []
    for _ in range(TURNS + 1):
        pair = []
        for call in (ours, theirs):
            start = time.perf_counter()
            for _ in range(calls):
                call()
            pair.append((time.perf_counter() - start) / calls)
        pairs.append(pair)
    pairs = pairs[1:]  # the first warms up
    ratios = [other / own for own, other in pairs]
    return (
        *(statistics.median(column) for column in zip(*pairs, strict=True)),
        statistics.median(ratios),
        max(ratios) - min(ratios),
    )


def step_time() -> tuple[float, float, float, float]:
    """A step() of each on LeNet, its gradients given; 25 of Parle's include one synchronization of one rank."""
    from mpi4py import MPI

    steps = []
    for build in (
        lambda parameters: Parle(parameters, MPI.COMM_SELF, lr=0.1, batches_per_epoch=469),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    ):
        model = models.build("lenet", channels=1, size=28, classes=10)
        F.cross_entropy(model(torch.randn(128, 1, 28, 28)), torch.arange(128) % 10).backward()
        steps.append(build(model.parameters()).step)
    return compare(*steps, calls=500)


def loop_time(raw: Path, proc: Path) -> tuple[float, float, float, float]:
    """A mini-batch of 128 of MNIST, all of it: data, forward, backward, update, here and in the plain form."""
    from mpi4py import MPI

    batches = loader.Batches(loader.load("mnist", raw, proc), batch_size=128, seed=42)
    model = models.build("lenet", channels=1, size=28, classes=10).train()
    optimizer = Parle(model.parameters(), MPI.COMM_SELF, lr=0.1, batches_per_epoch=batches.per_epoch)

    def ours() -> None:
        inputs, targets = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    to_tensor, normalize = torchvision.transforms.ToTensor(), torchvision.transforms.Normalize((0.1307,), (0.3081,))
    dataset = torchvision.datasets.MNIST(raw, transform=torchvision.transforms.Compose([to_tensor, normalize]))
    plain_batches = iter(torch.utils.data.DataLoader(dataset, batch_size=128, shuffle=True))
    plain_model = nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(3), nn.Dropout(0.25)),
        *(nn.Conv2d(20, 50, 5), nn.BatchNorm2d(50), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten()),
        *(nn.Linear(200, 500), nn.BatchNorm1d(500), nn.ReLU(), nn.Dropout(0.25), nn.Linear(500, 10)),
    )
    sgd = torch.optim.SGD(plain_model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def theirs() -> None:
        inputs, targets = next(plain_batches)
        sgd.zero_grad()
        F.cross_entropy(plain_model(inputs), targets).backward()
        sgd.step()

    return compare(ours, theirs, calls=40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="raw MNIST, as torchvision lays it out")
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(42)

    own, other, ratio, spread = step_time()
    print(f"step, LeNet: Parle {own * 1e3:.3f} ms, SGD(nesterov, fused) {other * 1e3:.3f} ms, ", end="")
    print(f"{1 / ratio:.2f} of it (spread of SGD / Parle {spread:.2f})")
    own, other, ratio, spread = loop_time(args.data, args.proc)
    print(f"mini-batch: {own * 1e3:.1f} ms, plain loop {other * 1e3:.1f} ms; ", end="")
    print(f"{128 / own:,.0f} images/s against {128 / other:,.0f}, {ratio:.2f} x (spread {spread:.2f})")


if __name__ == "__main__":
    main()
