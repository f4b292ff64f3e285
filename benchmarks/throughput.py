"""What a rank costs: the training loop against its limit, a step against SGD's, a sync against MPI's own allreduce.

    python benchmarks/throughput.py --data DIR       # DIR as torchvision lays it out, with MNIST
    python benchmarks/throughput.py --table          # of what has been measured

Starts its own ranks: 1, 2, 4 and 12, one thread each, REPEATS times in turn. Within a run the contestants take turns,
all ranks at the same one, so what else the machine does meets all of them.
"""

import argparse
import functools
import itertools
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine
import launch
import loader
import models
import ranks
from benchmarks import record
from parle_mpi import Parle

if TYPE_CHECKING:
    from mpi4py import MPI

QUESTION = "throughput"
RANKS = (1, 2, 4, 12)
REPEATS = 3
SEED = 42
BATCH = models.COMMON["batch_size"]
ROUND = 25  # mini-batches in a turn of a loop
SHAPES = {"lenet": dict(channels=1, size=28, classes=10), "allcnn": dict(channels=3, size=32, classes=10)}

Times = tuple[dict[str, list[float]], dict[str, list[float]]]


def take_turns(comm: "MPI.Comm", contestants: dict[str, Callable[[], Any]], turns: int) -> Times:
    """For each contestant what its turns took: seconds, the mean over the ranks, and core-seconds, their sum."""
    seconds, core_seconds = defaultdict(list), defaultdict(list)
    for turn in range(turns + 1):
        for name, act in contestants.items():
            ranks.gather(comm, None)  # asleep, until the slowest is there too
            comm.Barrier()  # busy, so that all start within microseconds
            wall, core = time.perf_counter(), time.process_time()
            act()
            mine = time.perf_counter() - wall, time.process_time() - core
            walls, cores = zip(*ranks.gather(comm, mine), strict=True)
            if turn > 0:  # the first warms up
                seconds[name].append(statistics.mean(walls))
                core_seconds[name].append(sum(cores))
    return seconds, core_seconds


def loops(comm: "MPI.Comm", raw: Path, proc: Path) -> Times:
    """A round of LeNet on MNIST: the program's loop, its network's forward and backward alone, and the plain loop."""
    data = loader.load("mnist", raw, proc)
    source = functools.partial(loader.Batches, data, batch_size=BATCH, seed=SEED, replicas=comm.size)
    batches = source(replica=comm.rank)
    model = models.build("lenet", **SHAPES["lenet"])
    optimizer = Parle(model.parameters(), comm, lr=0.1, sync_every=ROUND, batches_per_epoch=batches.per_epoch)
    events = engine.train(
        [model],
        [batches],
        optimizer,
        dict,  # never called: an epoch is 469 rounds
        epochs=1,
        lr_drops=[],
        lr_decay=1.0,
        world=engine.Team(
            comm.rank, comm.size, functools.partial(ranks.add, comm), functools.partial(ranks.gather, comm)
        ),
    )

    bare = models.build("lenet", **SHAPES["lenet"]).train()
    inputs, targets = next(source(replica=comm.rank))

    def alone() -> None:
        for _ in range(ROUND):
            bare.zero_grad()
            F.cross_entropy(bare(inputs), targets).backward()

    return take_turns(comm, dict(parle=lambda: next(events), alone=alone, plain=plain_loop(raw)), turns=7)


def plain_loop(raw: Path) -> Callable[[], None]:
    """A round as a tutorial has it: transforms sample by sample, contiguous NCHW, ReLU before pooling, SGD."""
    to_tensor, normalize = torchvision.transforms.ToTensor(), torchvision.transforms.Normalize((0.1307,), (0.3081,))
    dataset = torchvision.datasets.MNIST(raw, transform=torchvision.transforms.Compose([to_tensor, normalize]))
    batches = iter(torch.utils.data.DataLoader(dataset, BATCH, shuffle=True))
    model = nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(3), nn.Dropout(0.25)),
        *(nn.Conv2d(20, 50, 5), nn.BatchNorm2d(50), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten()),
        *(nn.Linear(200, 500), nn.BatchNorm1d(500), nn.ReLU(), nn.Dropout(0.25), nn.Linear(500, 10)),
    )
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def act() -> None:
        for inputs, targets in itertools.islice(batches, ROUND):
            sgd.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            sgd.step()

    return act


def with_gradients(network: str) -> nn.Module:
    model = models.build(network, **SHAPES[network])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def steps(comm: "MPI.Comm", network: str) -> Times:
    """25 steps of each, their gradients given; Parle's end with one sync."""
    settings = dict(lr=1e-6, momentum=0.9)
    parle = Parle(with_gradients(network).parameters(), comm, sync_every=ROUND, batches_per_epoch=469, **settings)
    sgd = torch.optim.SGD(with_gradients(network).parameters(), nesterov=True, fused=True, **settings)

    def act(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(ROUND):
            optimizer.step()

    return take_turns(comm, dict(parle=functools.partial(act, parle), sgd=functools.partial(act, sgd)), turns=40)


def syncs(comm: "MPI.Comm", network: str) -> Times:
    """One sync, the communication in it, and a bare allreduce of as many bytes."""
    from mpi4py import MPI

    model = with_gradients(network)
    optimizer = Parle(model.parameters(), comm, lr=1e-6, sync_every=10**9, batches_per_epoch=469)
    vector = torch.zeros_like(optimizer._home.message)
    messages = []

    def sync() -> None:
        before = optimizer.sync_seconds
        optimizer.sync()
        messages.append(optimizer.sync_seconds - before)

    contestants = dict(step=optimizer.step, allreduce=lambda: comm.Allreduce(MPI.IN_PLACE, vector), sync=sync)
    seconds, core_seconds = take_turns(comm, contestants, turns=40)
    seconds["message"] = [statistics.mean(each) for each in zip(*ranks.gather(comm, messages[1:]), strict=True)]
    return seconds, core_seconds


def measure(raw: Path, proc: Path) -> None:
    """What there is to measure with so many ranks; the first keeps it."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    torch.manual_seed(SEED + comm.rank)
    facts = dict(seed=SEED, mpi=ranks.library()) | record.origin()
    parts = [("loop", "lenet", functools.partial(loops, comm, raw, proc))]
    other = ("step", steps) if comm.size == 1 else ("sync", syncs)
    parts += [(other[0], network, functools.partial(other[1], comm, network)) for network in SHAPES]
    measured = [(part, network, *act()) for part, network, act in parts]
    if comm.rank == 0:
        for part, network, seconds, core_seconds in measured:
            row = dict(part=part, network=network, ranks=comm.size, seconds=seconds, core_seconds=core_seconds)
            record.keep(QUESTION, row | facts)


def ratios(rows: Sequence[dict[str, Any]], kind: str, above: str, below: str) -> list[float]:
    """Of two contestants' times, turn by turn."""
    return [x / y for row in rows for x, y in zip(row[kind][above], row[kind][below], strict=True)]


def middle(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the quartiles."""
    low, median, high = (f"{value:.{digits}f}" for value in statistics.quantiles(values, n=4))
    return f"{median} ({low} to {high})"


def table() -> str:
    kept = defaultdict(list)
    for row in record.read(QUESTION):
        kept[row["part"], row["network"], row["ranks"]].append(row)
    loop_rows, step_rows, sync_rows = [], [], []
    for (part, network, count), rows in sorted(kept.items()):
        walls = {name: [t for row in rows for t in row["seconds"][name]] for name in rows[0]["seconds"]}
        milliseconds = {name: f"{1e3 * statistics.median(times):.2f}" for name, times in walls.items()}
        if part == "loop":
            images = ROUND * BATCH
            cores = [t for row in rows for t in row["core_seconds"]["parle"]]
            loop_rows.append(
                [
                    count,
                    f"{images / statistics.median(walls['parle']):,.0f}",
                    middle(ratios(rows, "seconds", "alone", "parle")),
                    middle(ratios(rows, "core_seconds", "alone", "parle")),
                    middle(ratios(rows, "seconds", "plain", "parle")),
                    middle([1e3 * value / (images * count) for value in cores], 3),
                ]
            )
        elif part == "step":
            per_step = [f"{1e3 * statistics.median(walls[name]) / ROUND:.3f}" for name in ("parle", "sgd")]
            step_rows.append([network, *per_step, middle(ratios(rows, "seconds", "parle", "sgd"))])
        else:
            sync_rows.append(
                [
                    network,
                    count,
                    *(milliseconds[name] for name in ("allreduce", "message", "sync")),
                    middle(ratios(rows, "seconds", "message", "allreduce")),
                    middle(ratios(rows, "seconds", "sync", "allreduce")),
                ]
            )
    loop = ["ranks", "images/s per rank", "of the limit", "the same by core-seconds", "of the plain loop"]
    loop += ["core-seconds per 1,000 images"]
    step = ["network", "Parle, ms a step", "SGD (fused), ms", "ratio"]
    sync = ["network", "ranks", "bare allreduce, ms", "communication of a sync, ms", "whole sync, ms"]
    sync += ["communication / bare", "whole / bare"]
    pairs = ((loop, loop_rows), (step, step_rows), (sync, sync_rows))
    return "\n\n".join(record.table(header, rows) for header, rows in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("proc/raw"), metavar="DIR", help="raw MNIST (%(default)s)")
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    args = parser.parse_args()
    if args.table:
        print(table())
    elif launch.launched():
        measure(args.data, args.proc)
    else:
        mpiexec = Path(sys.executable).with_name("mpiexec")
        for repeat, count in itertools.product(range(REPEATS), RANKS):
            if sum(row["part"] == "loop" and row["ranks"] == count for row in record.read(QUESTION)) <= repeat:
                subprocess.run([mpiexec, "-n", str(count), sys.executable, *sys.argv], check=True)
        print(table())


if __name__ == "__main__":
    ranks.run(main)
