"""What --doctor tells: what a run would find here, what a synchronization costs, and from which L on that is little."""

import argparse
import contextlib
import importlib.metadata
import math
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

import loader
from parle import cli, distributed, launcher, training
from parle.algorithm import round_length
from parle.optimizer import ReplicaOptimizer

if TYPE_CHECKING:
    from mpi4py import MPI

SHARE = 0.01  # of the time, what synchronization may take
SECONDS = 3.0  # to measure mini-batches, but two at least
SYNCS = 10
PATIENCE = 60  # seconds for an MPI library to load
STILL = dict(lr=0.0, sync_every=2)  # weights stay as they are, and a round ends when the doctor says so

Row = tuple[str, str, bool]  # label, value, whether a run can do with that


def tell(rows: Iterable[Row], first: bool) -> bool:
    """Print rows as they come, on the first rank. Whether all are well."""
    well = True
    for label, value, sound in rows:
        if first:
            print(f"{label:12}{value}", flush=True)
        well &= sound
    return well


# What is here


def examine(given: argparse.Namespace, mpi: bool) -> bool:
    """Tell what a run needs and whether it is here. Raises: Mistake."""
    rank, size = launcher.launched() or (0, None)
    args = cli.resolve(given, size)
    cli.check(args, size)
    return tell(_parts(args, mpi), rank == 0)


def _parts(args: argparse.Namespace, mpi: bool) -> Iterator[Row]:
    yield "python", f"{platform.python_version()}, {sys.executable}", True
    for package in ("torch", "torchvision", "numpy", *(["mpi4py"] if mpi else [])):
        try:
            yield package, importlib.metadata.version(package), True
        except importlib.metadata.PackageNotFoundError:
            yield package, f"missing: pip install {package}", False
    if mpi:
        yield "MPI", *_library()
        mpiexec, started_by = launcher.mpiexec(), launcher.launcher()
        missing = "none beside this Python or on the PATH: pip install mpich"
        yield "mpiexec", mpiexec or missing, bool(mpiexec or started_by)
        yield "launcher", started_by or "none: this program starts its ranks by mpiexec", True
    yield "data", *_data(args)


def _library() -> tuple[str, bool]:
    """Whose MPI mpi4py finds. Asked of another process, since importing it starts MPI and a broken one may crash."""
    program = "import mpi4py; mpi4py.rc.initialize = False; from parle import distributed; print(distributed.library())"
    command = [sys.executable, "-c", program]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return f"none that mpi4py could load within {PATIENCE} s", False
    if done.returncode == 0:
        return done.stdout.strip(), True
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return f"none that mpi4py could load ({reason}): pip install mpich", False


def _data(args: argparse.Namespace) -> tuple[str, bool]:
    name, below = args.dataset, loader.SOURCES[args.dataset].raw
    folder = loader.cache(name, args.proc, args.whiten)
    origin = None if args.data is None or below is None else str(args.data.resolve())
    try:
        if loader.is_current(folder, origin):
            return f"{name}, pre-processed in {folder}", True
    except loader.DataError as error:
        return str(error), False
    if below is None:
        return f"{name}, part of scikit-learn; the first run writes {folder}", True
    raw = (args.proc / "raw" if args.data is None else args.data) / below
    if raw.is_file() or (raw.is_dir() and any(raw.iterdir())):  # a download that fails leaves an empty folder
        return f"{name}, raw in {raw}; the first run writes {folder}", True
    if args.data is not None:
        return f"{name} is missing: there is no {raw}", False
    return f"{name} is not here: the first run downloads it to {raw}", True


# What it takes


def synthetic(args: argparse.Namespace) -> loader.Dataset:
    """Noise in the shape of the data set, as much as the first mini-batch of a replica needs."""
    source = loader.SOURCES[args.dataset]
    random = torch.Generator().manual_seed(args.seed)
    count = math.ceil(args.batch_size / args.frac) + 1
    images = torch.randint(
        0, 256, (count, source.size, source.size, source.channels), dtype=torch.uint8, generator=random
    )
    labels = torch.randint(0, source.classes, (count,), generator=random)
    mean, std = torch.full((source.channels,), 128.0), torch.full((source.channels,), 74.0)
    return loader.Dataset(args.dataset, images, labels, images[:1], labels[:1], mean, std, source.classes)


def over_ranks(
    args: argparse.Namespace,
    optimizer: ReplicaOptimizer,
    replica: tuple[nn.Module, loader.Batches],
    device: torch.device,
    comm: "MPI.Comm",
    node: "MPI.Comm",
) -> bool:
    """Tell where the ranks are, and what they take. Collective."""
    world = training.Team(comm.rank, comm.size, gather=lambda value: distributed.gather(comm, value))
    places = world.gather((socket.gethostname(), cli.name(device)))
    machines = sum(world.gather(node.rank == 0))
    several = len({host for host, _ in places}) > 1
    where = f"{comm.size} on {machines} machine{'s' * (machines > 1)}"
    rows = [("ranks", f"{where}, {torch.get_num_threads()} of {len(distributed.cores())} cores each", True)]
    width = comm.size // args.replicas
    for number in range(args.replicas):
        own = range(number * width, (number + 1) * width)
        on = (f"rank {rank} on {' '.join(places[rank][0 if several else 1 :])}" for rank in own)
        rows.append((f"replica {number}", ", ".join(on), True))
    tell(rows, comm.rank == 0)
    return tell(_costs(args, optimizer, [replica], world, ("allreduce", f"over {comm.size} ranks")), comm.rank == 0)


def over_devices(
    args: argparse.Namespace,
    optimizer: ReplicaOptimizer,
    replicas: Sequence[tuple[nn.Module, loader.Batches]],
    places: Sequence[str],
) -> bool:
    """Tell where the replicas of this process are, and what they take."""
    threads = f"{torch.get_num_threads()} of {len(distributed.cores())} cores"
    tell([("threads", threads, True), *((f"replica {a}", place, True) for a, place in enumerate(places))], True)
    count = len({place for network, _ in replicas for place in training.devices(network)[:1]})
    between = f"between {count} devices" if count > 1 else "on one device"
    return tell(_costs(args, optimizer, replicas, training.ALONE, ("messages", between)), True)


def _costs(
    args: argparse.Namespace,
    optimizer: ReplicaOptimizer,
    replicas: Sequence[tuple[nn.Module, loader.Batches]],
    world: training.Team,
    message: tuple[str, str],
) -> list[Row]:
    """`message` is what a synchronization sends, and between whom."""
    batch, sync, team = measure(optimizer, replicas, world, args.amp == "bf16")
    floats = len(optimizer.master)
    several = f", of each of {len(replicas)} replicas" if len(replicas) > 1 else ""
    least = smallest_length(batch, sync)
    length = round_length(args.sync_every, args.lr, args.gamma)
    share = 100 * sync / (length * batch + sync)
    told = {
        "model": f"{args.model}: {floats:,} parameters, {4e-6 * floats:.3g} MB",
        "mini-batch": f"{_duration(batch)}, forward and backward, {args.batch_size} images{several}",
    }
    if args.replicas > 1:
        told[message[0]] = f"{_duration(sync)}, {floats:,} floats {message[1]}"
        told["L"] = f"{least} or more keeps synchronization under {100 * SHARE:g} % of the time; "
        told["L"] += f"{length} takes {share:.2f} %"
    if team:
        share = 100 * team / (batch + team)
        told["gradient"] = f"{_duration(team)} a mini-batch, over the ranks of a replica: {share:.2f} %, whatever L"
    return [(label, value, True) for label, value in told.items()]


def measure(
    optimizer: ReplicaOptimizer, replicas: Sequence[tuple[nn.Module, loader.Batches]], world: training.Team, amp: bool
) -> tuple[float, float, float]:
    """Seconds of a mini-batch of every replica here, forward and backward; and of communication, at a sync and a step.

    Medians: of the slowest rank's mini-batches, and of what the rank communicates that waits for no other.
    """
    drawn = [(network, *next(source)) for network, source in replicas]
    places = {place for network, *_ in drawn for place in training.devices(network) if place.type != "cpu"}
    precision = contextlib.nullcontext()
    if amp:
        precision = torch.autocast(training.devices(replicas[0][0])[0].type, torch.bfloat16)

    def mini_batch() -> None:
        optimizer.zero_grad()
        for network, inputs, targets in drawn:
            with precision:
                logits = network(inputs)
            F.cross_entropy(logits.float(), targets).backward()
        for place in places:
            torch.accelerator.synchronize(place)

    _seconds(mini_batch)  # the first allocates
    batches = [max(world.gather(_seconds(mini_batch)))]
    while sum(batches) < SECONDS:  # the same sum on every rank
        batches.append(max(world.gather(_seconds(mini_batch))))

    def communicated(action: Callable[[], Any]) -> float:
        world.gather(None)
        before = optimizer.sync_seconds
        action()
        return min(world.gather(optimizer.sync_seconds - before))

    steps, syncs = zip(
        *((communicated(optimizer.step), communicated(optimizer.sync)) for _ in range(SYNCS)), strict=True
    )
    return statistics.median(batches), statistics.median(syncs), statistics.median(steps)


def _seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _duration(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


def smallest_length(batch: float, sync: float) -> int:
    """The least L with which synchronization takes less than SHARE of the time: sync < SHARE (L batch + sync)."""
    return math.floor(sync * (1 / SHARE - 1) / batch) + 1
