"""Measure the overhead of the training loop, of Parle's step against SGD's, and of a sync against a bare all-reduce.

    python benchmarks/throughput.py --data DIR       # MNIST in torchvision's layout
    python benchmarks/throughput.py --table          # print the tables

The script starts its own ranks: 1, 2, 4 and 12 of them, one thread each, REPEATS times round-robin. Within a process
the candidates are interleaved, and all ranks run the same one simultaneously, so that other load affects all equally.
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
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import loader
import models
from benchmarks import results
from parle import distributed, launcher, rank_exit, training
from parle.distributed import MPIGroup
from parle_mpi import Parle

NAME = Path(__file__).stem
RANKS = (1, 2, 4, 12)
REPEATS = 3
SEED = 42
BATCH_SIZE = models.COMMON["batch_size"]
STEPS = 25  # per repetition of a loop: one round
SHAPES = {"lenet": dict(channels=1, size=28, classes=10), "allcnn": dict(channels=3, size=32, classes=10)}

Times = tuple[dict[str, list[float]], dict[str, list[float]]]


def interleave(world: MPIGroup, candidates: dict[str, Callable[[], Any]], repetitions: int) -> Times:
    """Time the candidates in alternation: seconds are means over the ranks, core-seconds sums."""
    seconds, core_seconds = defaultdict(list), defaultdict(list)
    for repetition in range(repetitions + 1):
        for name, call in candidates.items():
            world.all_gather(None)  # wait for the slowest rank without using a core
            world.comm.Barrier()  # spin, so that all ranks start within microseconds
            wall, core = time.perf_counter(), time.process_time()
            call()
            own = time.perf_counter() - wall, time.process_time() - core
            walls, cores = zip(*world.all_gather(own), strict=True)
            if repetition > 0:  # the first is a warm-up
                seconds[name].append(statistics.mean(walls))
                core_seconds[name].append(sum(cores))
    return seconds, core_seconds


def time_loops(world: MPIGroup, raw: Path, proc: Path) -> Times:
    """Time a round of LeNet on MNIST: the program's loop, forward and backward only, and a reference loop."""
    data = loader.load("mnist", raw, proc)
    source = functools.partial(loader.BatchLoader, data, batch_size=BATCH_SIZE, seed=SEED, replicas=world.size)
    batches = source(replica=world.rank)
    model = models.build("lenet", **SHAPES["lenet"])
    optimizer = Parle(model.parameters(), world.comm, lr=0.1, sync_every=STEPS, batches_per_epoch=batches.per_epoch)
    replica = training.LocalReplica(world.rank, model, batches)
    schedule = training.Schedule(epochs=1)  # 469 rounds, before whose end there is no evaluation
    events = training.train([replica], optimizer, schedule, evaluate=dict, groups=optimizer.groups)

    network = models.build("lenet", **SHAPES["lenet"]).train()
    inputs, targets = next(source(replica=world.rank))

    def forward_backward() -> None:
        for _ in range(STEPS):
            network.zero_grad()
            F.cross_entropy(network(inputs), targets).backward()

    candidates = dict(parle=lambda: next(events), forward_backward=forward_backward, reference_loop=reference_loop(raw))
    return interleave(world, candidates, repetitions=7)


def reference_loop(raw: Path) -> Callable[[], None]:
    """Return a loop as tutorials write it: a DataLoader with per-sample transforms, NCHW, ReLU before pooling, SGD."""
    to_tensor, normalize = torchvision.transforms.ToTensor(), torchvision.transforms.Normalize((0.1307,), (0.3081,))
    dataset = torchvision.datasets.MNIST(raw, transform=torchvision.transforms.Compose([to_tensor, normalize]))
    batches = iter(torch.utils.data.DataLoader(dataset, BATCH_SIZE, shuffle=True))
    model = nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(3), nn.Dropout(0.25)),
        *(nn.Conv2d(20, 50, 5), nn.BatchNorm2d(50), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten()),
        *(nn.Linear(200, 500), nn.BatchNorm1d(500), nn.ReLU(), nn.Dropout(0.25), nn.Linear(500, 10)),
    )
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def run_round() -> None:
        for inputs, targets in itertools.islice(batches, STEPS):
            sgd.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            sgd.step()

    return run_round


def build_with_gradients(network: str) -> nn.Module:
    """Build a network whose parameters have random gradients."""
    model = models.build(network, **SHAPES[network])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def time_steps(world: MPIGroup, network: str) -> Times:
    """Time 25 optimizer steps with given gradients; Parle's include one sync."""
    settings = dict(lr=1e-6, momentum=0.9)
    parameters = build_with_gradients(network).parameters()
    parle = Parle(parameters, world.comm, sync_every=STEPS, batches_per_epoch=469, **settings)
    sgd = torch.optim.SGD(build_with_gradients(network).parameters(), nesterov=True, fused=True, **settings)

    def run_steps(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(STEPS):
            optimizer.step()

    candidates = dict(parle=functools.partial(run_steps, parle), sgd=functools.partial(run_steps, sgd))
    return interleave(world, candidates, repetitions=40)


def time_syncs(world: MPIGroup, network: str) -> Times:
    """Time a sync, the communication within it, and a bare all-reduce of the same number of bytes."""
    from mpi4py import MPI

    model = build_with_gradients(network)
    optimizer = Parle(model.parameters(), world.comm, lr=1e-6, sync_every=10**9, batches_per_epoch=469)
    vector = torch.zeros(sum(parameter.numel() for parameter in model.parameters()))
    communication = []

    def sync() -> None:
        before = optimizer.sync_seconds
        optimizer.sync()
        communication.append(optimizer.sync_seconds - before)

    candidates = dict(step=optimizer.step, allreduce=lambda: world.comm.Allreduce(MPI.IN_PLACE, vector), sync=sync)
    seconds, core_seconds = interleave(world, candidates, repetitions=40)
    gathered = world.all_gather(communication[1:])  # without the warm-up
    seconds["communication"] = [statistics.mean(each) for each in zip(*gathered, strict=True)]
    return seconds, core_seconds


def measure(raw: Path, proc: Path) -> None:
    """Run all measurements for this number of ranks; rank 0 appends the rows."""
    from mpi4py import MPI

    world = MPIGroup(MPI.COMM_WORLD)
    torch.set_num_threads(1)
    training.disable_malloc_trim()
    torch.manual_seed(SEED + world.rank)
    common = dict(seed=SEED, mpi=distributed.mpi_library()) | results.provenance()
    jobs = [("loop", "lenet", functools.partial(time_loops, world, raw, proc))]
    name, function = ("step", time_steps) if world.size == 1 else ("sync", time_syncs)
    jobs += [(name, network, functools.partial(function, world, network)) for network in SHAPES]
    measured = [(name, network, *job()) for name, network, job in jobs]
    if world.rank == 0:
        for name, network, seconds, core_seconds in measured:
            row = dict(measurement=name, network=network, ranks=world.size)
            results.append_row(NAME, row | dict(seconds=seconds, core_seconds=core_seconds) | common)


def ratios(rows: Sequence[dict[str, Any]], clock: str, numerator: str, denominator: str) -> list[float]:
    """Return the ratios of two candidates' times, repetition by repetition."""
    return [x / y for row in rows for x, y in zip(row[clock][numerator], row[clock][denominator], strict=True)]


def median_quartiles(values: Sequence[float], digits: int = 2) -> str:
    low, median, high = (f"{value:.{digits}f}" for value in statistics.quantiles(values, n=4))
    return f"{median} ({low} to {high})"


def table() -> str:
    groups = defaultdict(list)
    for row in results.read_rows(NAME):
        groups[row["measurement"], row["network"], row["ranks"]].append(row)
    loop_rows, step_rows, sync_rows = [], [], []
    for (measurement, network, count), rows in sorted(groups.items()):
        walls = {name: [t for row in rows for t in row["seconds"][name]] for name in rows[0]["seconds"]}
        milliseconds = {name: f"{1e3 * statistics.median(times):.2f}" for name, times in walls.items()}
        if measurement == "loop":
            images = STEPS * BATCH_SIZE
            cores = [t for row in rows for t in row["core_seconds"]["parle"]]
            loop_rows.append(
                [
                    count,
                    f"{images / statistics.median(walls['parle']):,.0f}",
                    median_quartiles(ratios(rows, "seconds", "forward_backward", "parle")),
                    median_quartiles(ratios(rows, "core_seconds", "forward_backward", "parle")),
                    median_quartiles(ratios(rows, "seconds", "reference_loop", "parle")),
                    median_quartiles([1e3 * value / (images * count) for value in cores], 3),
                ]
            )
        elif measurement == "step":
            per_step = [f"{1e3 * statistics.median(walls[name]) / STEPS:.3f}" for name in ("parle", "sgd")]
            step_rows.append([network, *per_step, median_quartiles(ratios(rows, "seconds", "parle", "sgd"))])
        else:
            sync_rows.append(
                [
                    network,
                    count,
                    *(milliseconds[name] for name in ("allreduce", "communication", "sync")),
                    median_quartiles(ratios(rows, "seconds", "communication", "allreduce")),
                    median_quartiles(ratios(rows, "seconds", "sync", "allreduce")),
                ]
            )
    loop = ["ranks", "images/s per rank", "speed / forward and backward only", "the same in core-seconds"]
    loop += ["speed / reference loop"]
    loop += ["core-seconds per 1,000 images"]
    step = ["network", "Parle, ms per step", "SGD (fused), ms per step", "ratio"]
    sync = ["network", "ranks", "bare all-reduce, ms", "communication of a sync, ms", "complete sync, ms"]
    sync += ["communication / bare all-reduce", "complete sync / bare all-reduce"]
    pairs = ((loop, loop_rows), (step, step_rows), (sync, sync_rows))
    return "\n\n".join(results.markdown_table(header, rows) for header, rows in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("proc/raw"),
        metavar="DIR",
        help="raw MNIST in torchvision's layout (%(default)s)",
    )
    parser.add_argument(
        "--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data (%(default)s)"
    )
    parser.add_argument("--table", action="store_true", help="print the tables and exit")
    args = parser.parse_args()
    if args.table:
        print(table())
    elif launcher.rank_from_environment():
        measure(args.data, args.proc)
    else:
        mpiexec = Path(sys.executable).with_name("mpiexec")
        for repeat, count in itertools.product(range(REPEATS), RANKS):
            rows = [row for row in results.read_rows(NAME) if (row["measurement"], row["ranks"]) == ("loop", count)]
            if len(rows) <= repeat:
                subprocess.run([mpiexec, "-n", str(count), sys.executable, *sys.argv], check=True)
        print(table())


if __name__ == "__main__":
    rank_exit.run_or_abort(main)
