"""The report of --doctor: the environment of a run and the cost of a synchronization.

python -m parle.doctor                    # versions, MPI, launcher and data only
python parle_mpi.py -n 3 --doctor         # ranks, devices and measured costs too
"""

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
from typing import Any

import torch
from torch.nn import functional as F

from parle import cli, launcher, streams
from parle.algorithm import steps_per_round
from parle.cores import count_cores
from parle.distributed import Group
from parle.experiment import Experiment
from parle.logger import pluralize
from parle.optimizer import ParleBase
from parle.training import LocalReplica, network_devices

loader = cli.loader

MAX_SYNC_FRACTION = 0.01  # of the time, for the advice on L
MEASURE_SECONDS = 3.0  # spent on mini-batches, at least two
NUM_SYNCS = 10  # measured
MPI_TIMEOUT = 60  # seconds for an MPI library to load
SETTINGS = dict(lr=0.0, sync_every=2)  # weights do not change, and a round ends only when `measure` calls sync()

Row = tuple[str, str, bool]  # label, value, whether a run can start with it


def print_rows(rows: Iterable[Row], is_first_rank: bool) -> bool:
    """Print rows as they are found, on the first rank. Returns whether a run can start."""
    ok = True
    for label, value, row_ok in rows:
        if is_first_rank:
            print(f"{label:12}{value}", flush=True)
        ok &= row_ok
    return ok


# Environment


def check_environment(args: argparse.Namespace, mpi: bool) -> bool:
    """Print versions, MPI, launcher and data. Returns whether a run can start."""
    return print_rows(_environment(args, mpi), launcher.is_first_rank())


def _environment(args: argparse.Namespace, mpi: bool) -> Iterator[Row]:
    yield "python", f"{platform.python_version()}, {sys.executable}", True
    launcher_name = launcher.launcher_name()
    mpi = mpi and launcher_name != launcher.TORCHRUN
    for package in ("torch", "torchvision", "numpy", *(["mpi4py"] if mpi else [])):
        try:
            yield package, importlib.metadata.version(package), True
        except importlib.metadata.PackageNotFoundError:
            yield package, f"missing: pip install {package}", False
    if launcher_name == launcher.TORCHRUN:
        yield "launcher", launcher_name, True
    if mpi:
        yield "MPI", *_mpi_library()
        mpiexec = launcher.find_mpiexec()
        missing = "none next to this Python or on the PATH: pip install mpich"
        yield "mpiexec", mpiexec or missing, bool(mpiexec or launcher_name)
        yield "launcher", launcher_name or "none: this program starts its ranks with mpiexec", True
    yield "data", *_data(args)


def _mpi_library() -> tuple[str, bool]:
    """Return the MPI implementation that mpi4py loads, in another process: a broken library may crash it."""
    program = (
        "import mpi4py; mpi4py.rc.initialize = False; from parle import distributed; print(distributed.mpi_library())"
    )
    command, root = [sys.executable, "-c", program], Path(__file__).parent.parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, errors="replace", timeout=MPI_TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"mpi4py could not load one within {MPI_TIMEOUT} s", False
    if done.returncode == 0:
        return done.stdout.strip(), True
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return f"mpi4py could not load one ({reason}): pip install mpich", False


def _data(args: argparse.Namespace) -> tuple[str, bool]:
    name, pattern = args.dataset, loader.DATASETS[args.dataset].raw
    folder = loader.cache(name, args.proc, args.zca)
    try:
        if loader.is_current(name, args.data, args.proc, args.zca):
            return f"{name}, pre-processed in {folder}", True
    except loader.DatasetError as error:
        return str(error), False
    if pattern is None:
        return f"{name}, part of scikit-learn; the first run writes {folder}", True
    root = args.proc / "raw" if args.data is None else args.data
    if any(root.glob(pattern)):
        return f"{name}, raw in {root / pattern}; the first run writes {folder}", True
    if args.data is not None:
        return f"{name} is missing: {root / pattern} does not exist", False
    return f"{name} is missing: the first run downloads it to {root / pattern}", True


# Measured costs


def synthetic_data(args: argparse.Namespace) -> loader.Dataset:
    """Return noise in the shape of the data set, enough for the first mini-batch of a replica."""
    spec = loader.DATASETS[args.dataset]
    random = torch.Generator().manual_seed(args.seed)
    shape = (math.ceil(args.batch_size / args.frac) + 1, spec.size, spec.size, spec.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    labels = torch.randint(0, spec.classes, shape[:1], generator=random)
    mean, std = torch.full((spec.channels,), 128.0), torch.full((spec.channels,), 74.0)
    return loader.Dataset(args.dataset, images, labels, images[:1], labels[:1], mean, std, spec.classes)


def report_ranks(experiment: Experiment, device: torch.device, hosts: Sequence[dict[str, Any]]) -> bool:
    """Print where the ranks of an MPI run are and what its steps cost. Returns True. Collective."""
    world, replicas = experiment.groups.world, experiment.args.replicas
    places = world.all_gather((socket.gethostname(), cli.device_name(device)))
    several = len(hosts) > 1
    rows = [
        ("ranks", f"{world.size} on {pluralize(len(hosts), 'machine')}", True),
        ("threads", "; ".join(_threads(host, several) for host in hosts), True),
    ]
    width = world.size // replicas
    for number in range(replicas):
        ranks = range(number * width, (number + 1) * width)
        on = (f"rank {rank} on {' '.join(places[rank][0 if several else 1 :])}" for rank in ranks)
        rows.append((f"replica {number}", ", ".join(on), True))
    print_rows(rows, world.rank == 0)
    return print_rows(_costs(experiment, "allreduce", f"over {world.size} ranks"), world.rank == 0)


def _threads(host: dict[str, Any], with_name: bool) -> str:
    name = f"{host['name']}: " if with_name else ""
    return f"{name}{host['threads_per_rank']} per rank, {pluralize(host['cores'], 'core')}"


def report_devices(experiment: Experiment, device_names: Sequence[str]) -> bool:
    """Print where the replicas of this process are and what its steps cost. Returns True."""
    threads = f"{torch.get_num_threads()}, {pluralize(count_cores(), 'core')}"
    rows = [("threads", threads, True), *((f"replica {a}", name, True) for a, name in enumerate(device_names))]
    print_rows(rows, True)
    count = len({device for network in experiment.networks.values() for device in network_devices(network)[:1]})
    return print_rows(
        _costs(experiment, "messages", f"between {count} devices" if count > 1 else "on one device"), True
    )


def _costs(experiment: Experiment, message: str, between: str) -> list[Row]:
    args, replicas = experiment.args, experiment.replicas
    optimizer, world = experiment.optimizer, experiment.groups.world
    batch = measure_passes(optimizer, replicas, world, args.amp == "bf16")
    sync, gradient = measure_communication(optimizer, world)
    floats = len(optimizer.master)
    several = f", in each of {len(replicas)} replicas" if len(replicas) > 1 else ""
    length = steps_per_round(args.sync_every, args.lr, args.gamma)
    share = 100 * sync / (length * batch + sync)
    rows = {
        "model": f"{args.model}: {floats:,} parameters, {4e-6 * floats:.3g} MB",
        "step": f"{_milliseconds(batch)}, forward and backward, {args.batch_size} images{several}",
    }
    on_cpu = network_devices(replicas[0].network)[0].type == "cpu"
    if args.amp == "off" and all(world.all_gather(on_cpu and cpu_computes_bfloat16())):
        bfloat16 = measure_passes(optimizer, replicas, world, amp=True)
        rows["bfloat16"] = f"{_milliseconds(bfloat16)} with --amp bf16, {batch / bfloat16:.1f} times as fast"
    if args.replicas > 1:
        rows[message] = f"{_milliseconds(sync)}, {floats:,} floats {between}"
        rows["L"] = (
            f"{min_sync_every(batch, sync)} or more keeps synchronization under {100 * MAX_SYNC_FRACTION:g} % of the "
            f"time; {length} takes {share:.2f} %"
        )
    if gradient:
        share = 100 * gradient / (batch + gradient)
        rows["gradient"] = f"{_milliseconds(gradient)} per step, over the ranks of a replica: {share:.2f} % at any L"
    return [(label, value, True) for label, value in rows.items()]


def cpu_computes_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16; if it converts to float32 first, bfloat16 is slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def measure_passes(optimizer: ParleBase, replicas: Sequence[LocalReplica], world: Group, amp: bool) -> float:
    """Return the median of the seconds that the forward and backward passes of a step take on the slowest rank."""
    inputs = [(replica.network, *next(replica.batches)) for replica in replicas]
    devices = [network_devices(replica.network) for replica in replicas]
    accelerators = {device for places in devices for device in places if device.type != "cpu"}
    precision = torch.autocast(devices[0][0].type, torch.bfloat16) if amp else contextlib.nullcontext()

    def forward_backward() -> None:
        optimizer.zero_grad()
        for network, images, targets in inputs:
            with precision:
                logits = network(images)
            F.cross_entropy(logits.float(), targets).backward()
        for device in accelerators:
            torch.accelerator.synchronize(device)

    _seconds(forward_backward)  # the first call allocates memory
    batches = [max(world.all_gather(_seconds(forward_backward)))]
    while sum(batches) < MEASURE_SECONDS:  # the sum is the same on every rank
        batches.append(max(world.all_gather(_seconds(forward_backward))))
    return statistics.median(batches)


def measure_communication(optimizer: ParleBase, world: Group) -> tuple[float, float]:
    """Return the seconds that the communication of a sync and of a step take on the rank that waits for no other.

    Both are medians.
    """

    def communication_seconds(action: Callable[[], Any]) -> float:
        world.all_gather(None)
        before = optimizer.sync_seconds
        action()
        return min(world.all_gather(optimizer.sync_seconds - before))

    pairs = [(communication_seconds(optimizer.step), communication_seconds(optimizer.sync)) for _ in range(NUM_SYNCS)]
    steps, syncs = zip(*pairs, strict=True)
    return statistics.median(syncs), statistics.median(steps)


def _seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _milliseconds(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


def min_sync_every(batch: float, sync: float) -> int:
    """Return the smallest L for which synchronization takes less than MAX_SYNC_FRACTION of the time.

    sync < MAX_SYNC_FRACTION (L batch + sync)
    """
    return math.floor(sync * (1 / MAX_SYNC_FRACTION - 1) / batch) + 1


def main() -> None:
    parser = cli.build_parser("python -m parle.doctor", "Check versions, MPI, launcher and data.")
    try:
        args = cli.complete(cli.parse(parser), None)
    except cli.UsageError as error:
        cli.print_error(parser.prog, error)
        sys.exit(2)
    sys.exit(0 if check_environment(args, mpi=True) else 1)


if __name__ == "__main__":
    streams.prepare_streams()
    main()
