"""Measure and predict the cost of synchronization on a slow network: Parle against data-parallel SGD.

    python benchmarks/bandwidth.py             # measure; needs root on Linux with iproute2
    python benchmarks/bandwidth.py --table     # print the tables; --plot draws figures/bandwidth.png

Two ranks run in two network namespaces that a rate-limited veth pair connects. They communicate by MPICH over TCP, and
the interface counts the bytes. Both methods are this project's, over MPI, with 128 images per rank and step: Parle
sends its weights once per 25 steps, in float32 or float16, and `--method sgd` its gradients in every step. LeNet
computes real gradients. For WRN-28-10 only messages and updates are real: a sleep of STEP_SECONDS stands for the
gradient.
"""

import argparse
import contextlib
import functools
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import loader
import models
from benchmarks import results
from parle import distributed, launcher, rank_exit
from parle.algorithm import PRESETS
from parle.distributed import MPIGroup
from parle_mpi import Parle

if TYPE_CHECKING:
    from mpi4py import MPI

NAME = Path(__file__).stem
SEED = 42
LINK = "veth"
MBITS = (1000, 100)
BATCH_SIZE = models.COMMON["batch_size"]
LABELS = {"parle": "Parle, L = 25", "parle-float16": "Parle, L = 25, float16", "sgd": "data-parallel SGD"}
METHODS = {"parle": dict(PRESETS["parle"], replicas=2), "sgd": PRESETS["sgd"]}
METHODS["parle-float16"] = METHODS["parle"] | dict(message_dtype=torch.float16)
# network, method, steps to measure: complete rounds, and about half a minute for WRN-28-10
MEASURED = [
    *(("lenet", "parle", 250), ("lenet", "parle-float16", 250), ("lenet", "sgd", 100)),
    *(("wrn-28-10", "parle", 25), ("wrn-28-10", "parle-float16", 25), ("wrn-28-10", "sgd", 3)),
]

# One step (128 images) on a GPU of the authors, derived from the seconds per round of 25 steps that their plots use.
# LeNet is measured here, on a CPU.
STEP_SECONDS = {"allcnn": 1.29 / 25, "wrn-28-10": 12.5 / 25, "wrn-16-4": 1.88 / 25}
LATENCY = 50e-6  # seconds per message; assumed, typical of TCP within a data center


# Prediction


@functools.cache
def num_parameters(network: str) -> int:
    spec = loader.DATASETS[models.RECIPES[network]["dataset"]]
    with torch.device("meta"):
        model = models.build(network, spec.channels, spec.size, spec.classes)
    return sum(parameter.numel() for parameter in model.parameters())


def allreduce_seconds(size: float, count: int, bandwidth: float, latency: float) -> float:
    """Return the time of an all-reduce of `size` bytes over `count` ranks, by recursive halving and doubling.

    A ring sends the same number of bytes in more messages.

    Args:
        bandwidth: bits per second of each rank's link, in each direction.
        latency: seconds per message, however short.
    """
    return 2 * (count - 1) / count * 8 * size / bandwidth + 2 * math.ceil(math.log2(count)) * latency


def step_seconds(compute: float, sync: float, sync_every: int) -> float:
    return compute + sync / sync_every


def sync_fraction(compute: float, sync: float, sync_every: int) -> float:
    """Return the fraction of the time spent in synchronization."""
    return sync / sync_every / step_seconds(compute, sync, sync_every)


# Measurement


class NamespacesUnavailable(Exception):
    """This process may not create network namespaces."""


@contextlib.contextmanager
def namespaces(mbits: int | None) -> Iterator[list[str]]:
    """Create two network namespaces connected by LINK, yield their names, and delete them afterwards.

    Args:
        mbits: rate of the link in each direction; None: as fast as the kernel copies.
    """
    names = [f"parle-{os.getpid()}-{number}" for number in range(2)]

    def execute(*command: Any) -> str:
        try:
            return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
        except FileNotFoundError as error:
            raise NamespacesUnavailable(f"{command[0]} is not installed: install iproute2") from error
        except subprocess.CalledProcessError as error:
            raise NamespacesUnavailable(error.stderr.strip()) from error

    with contextlib.ExitStack() as stack:
        for name in names:
            execute("ip", "netns", "add", name)
            stack.callback(execute, "ip", "netns", "delete", name)
        execute("ip", "link", "add", LINK, "netns", names[0], "type", "veth", "peer", "name", LINK, "netns", names[1])
        for number, name in enumerate(names):
            execute("ip", "-n", name, "address", "add", f"10.99.0.{number + 1}/24", "dev", LINK)
            execute("ip", "-n", name, "link", "set", LINK, "up")
            bucket = ("tbf", "rate", f"{mbits}mbit", "burst", "128kb", "latency", "50ms")
            if mbits is not None:
                execute("tc", "-n", name, "qdisc", "add", "dev", LINK, "root", *bucket)
        while not all("state UP" in execute("ip", "-n", name, "link", "show", LINK) for name in names):
            time.sleep(0.01)  # the link may take a second to come up
        yield names


def run_in_namespaces(names: list[str], command: list[str]) -> None:
    """Run `command` under mpiexec with one rank in each namespace."""
    environment = dict(
        MPIR_CVAR_NOLOCAL="1",  # disable shared memory
        MPIR_CVAR_CH4_NETMOD="ofi",
        FI_PROVIDER="tcp",
        FI_TCP_IFACE=LINK,
        GLOO_SOCKET_IFNAME=LINK,
        OMP_NUM_THREADS="1",
    )
    line = [str(Path(sys.executable).with_name("mpiexec"))]
    for name in names:
        line += [":"] * (name != names[0]) + ["-n", "1", "ip", "netns", "exec", name, *command]
    subprocess.run(line, env=os.environ | environment, check=True)


def bytes_sent() -> int:
    """Return the bytes that this namespace has sent over LINK, headers included."""
    return int(Path(f"/sys/class/net/{LINK}/statistics/tx_bytes").read_text())


def build_workload(network: str, comm: "MPI.Comm", method: str) -> tuple[Parle, Callable[[], None]]:
    """Return an optimizer and a function that computes its gradients, or sleeps as long."""
    settings = METHODS[method] | dict(lr=0.1, batches_per_epoch=469)
    if network == "lenet":
        model = models.build("lenet", channels=1, size=28, classes=10)
        inputs = torch.randn(BATCH_SIZE, 1, 28, 28).contiguous(memory_format=torch.channels_last)
        targets = torch.randint(10, (BATCH_SIZE,))
        optimizer = Parle(model.parameters(), comm, **settings)

        def compute() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()

        return optimizer, compute
    vector = nn.Parameter(torch.zeros(num_parameters(network)))
    optimizer = Parle([vector], comm, **settings)
    vector.grad = torch.zeros_like(vector)
    return optimizer, lambda: time.sleep(STEP_SECONDS[network])


def measure(comm: "MPI.Comm", network: str, method: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(SEED)
    optimizer, compute = build_workload(network, comm, method)  # broadcasts the weights, which opens the connection
    world, latencies = MPIGroup(comm), []
    for _ in range(20):
        comm.Barrier()
        start = time.perf_counter()
        world.all_reduce(torch.zeros(1))
        latencies.append(time.perf_counter() - start)
    comm.Barrier()
    sent, start = bytes_sent(), time.perf_counter()
    for _ in range(steps):
        compute()
        optimizer.step()
    seconds = time.perf_counter() - start
    return dict(
        network=network,
        method=method,
        steps=steps,
        seconds=seconds,
        sync_seconds=optimizer.sync_seconds,
        bytes_sent=bytes_sent() - sent,
        latency=statistics.median(latencies) / 2,  # an all-reduce is two messages in sequence
    )


def measured(mbits: int) -> list[tuple[str, str]]:
    """Return the networks and methods that have been measured at this rate."""
    return [(row["network"], row["method"]) for row in results.read_rows(NAME) if row["mbits"] == mbits]


def measure_all(mbits: int) -> None:
    """Run this rank's part of all missing measurements at this rate; rank 0 appends the rows."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    done = MPIGroup(comm).all_gather(measured(mbits))[0]
    common = dict(seed=SEED, mpi=distributed.mpi_library()) | results.provenance()
    for network, method, steps in MEASURED:
        if (network, method) not in done:
            row = dict(mbits=mbits, ranks=comm.size) | measure(comm, network, method, steps)
            if comm.rank == 0:
                results.append_row(NAME, row | common)


# Tables and figure


def message_bytes(network: str, method: str) -> int:
    return (2 if "message_dtype" in METHODS[method] else 4) * num_parameters(network)


def lenet_seconds() -> float:
    """Return the measured time of one step of LeNet, without synchronization."""
    rows = [row for row in results.read_rows(NAME) if row["network"] == "lenet"]
    return statistics.median((row["seconds"] - row["sync_seconds"]) / row["steps"] for row in rows)


def predicted_fractions(network: str, count: int, bandwidth: float) -> list[float]:
    """Predict the fraction of time that Parle and data-parallel SGD spend in synchronization."""
    compute = lenet_seconds() if network == "lenet" else STEP_SECONDS[network]
    sync = allreduce_seconds(message_bytes(network, "parle"), count, bandwidth, LATENCY)
    return [sync_fraction(compute, sync, METHODS[method]["sync_every"]) for method in ("parle", "sgd")]


def table() -> str:
    return f"{measurement_table()}\n\n{prediction_table()}"


def measurement_table() -> str:
    lines = []
    order = [(network, method) for network, method, _ in MEASURED]
    rows = results.read_rows(NAME)
    for row in sorted(rows, key=lambda row: (-row["mbits"], order.index((row["network"], row["method"])))):
        steps, every = row["steps"], METHODS[row["method"]]["sync_every"]
        compute = (row["seconds"] - row["sync_seconds"]) / steps
        size = message_bytes(row["network"], row["method"])
        sync = allreduce_seconds(size, row["ranks"], 1e6 * row["mbits"], row["latency"])
        lines.append(
            [
                row["network"],
                f"{row['mbits'] / 1000:g}",
                LABELS[row["method"]],
                f"{row['bytes_sent'] / steps / 1e6:.3f}",
                f"{1e3 * compute:.0f}",
                f"{1000 * row['seconds'] / steps:,.0f}",
                f"{1000 * step_seconds(compute, sync, every):,.0f}",
                f"{100 * row['sync_seconds'] / row['seconds']:.1f}",
                f"{100 * sync_fraction(compute, sync, every):.1f}",
            ]
        )
    header = ["network", "Gb/s", "method", "MB sent per step", "compute per step, ms"]
    header += ["s per 1,000 steps: measured", "predicted", "% of time in synchronization: measured", "predicted"]
    return results.markdown_table(header, lines)


def prediction_table() -> str:
    counts, lines = (2, 32, 1024), []
    for network in models.RECIPES:
        for gigabits in (1, 10, 100, 400):
            columns = zip(*(predicted_fractions(network, count, 1e9 * gigabits) for count in counts), strict=True)
            cells = [f"{100 * fraction:.2g}" for column in columns for fraction in column]
            lines.append([network, f"{num_parameters(network) / 1e6:.2f}", gigabits, *cells])
    header = ["network", "million parameters", "Gb/s"]
    header += [f"% of time, {method}, {count:,} ranks" for method in ("Parle", "SGD") for count in counts]
    return results.markdown_table(header, lines)


def draw() -> None:
    """Plot the fraction of time in synchronization against bandwidth, one panel per network.

    A band extends from 2 to 1,024 ranks as predicted; circles are measured.
    """
    gigabits = [10 ** (exponent / 20) for exponent in range(-20, 53)]  # 0.1 to 400
    figure = Figure(figsize=(11, 3.1), layout="constrained")
    axes = figure.subplots(1, len(models.RECIPES), sharey=True)
    for axis, network in zip(axes, models.RECIPES, strict=True):
        few, many = ([predicted_fractions(network, count, 1e9 * rate) for rate in gigabits] for count in (2, 1024))
        for index, (method, color) in enumerate((("parle", "tab:blue"), ("sgd", "tab:orange"))):
            low, high = ([100 * pair[index] for pair in pairs] for pairs in (few, many))
            axis.fill_between(gigabits, low, high, color=color, alpha=0.6, linewidth=0, label=LABELS[method])
            for row in results.read_rows(NAME):
                if (row["network"], row["method"]) == (network, method):
                    percent = 100 * row["sync_seconds"] / row["seconds"]
                    axis.plot(row["mbits"] / 1000, percent, "o", color=color, markeredgecolor="black")
        axis.set(xscale="log", yscale="log", xlim=(0.08, 400), ylim=(0.01, 100), title=network)
        axis.set_xlabel("bandwidth (Gb/s)")
        axis.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
        axis.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of time in synchronization")
    axes[-1].legend(fontsize="small")
    figure.suptitle(
        "Time in synchronization. Bands: predicted for 2 to 1,024 ranks; circles: measured on 2", fontsize=10
    )
    results.save_figure(figure, NAME, NAME, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbits", type=int, nargs="*", default=MBITS, help="rates of the link in Mb/s (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print the tables and exit")
    parser.add_argument("--plot", action="store_true", help="draw the figure and exit")
    args = parser.parse_args()
    if launcher.rank_from_environment():
        torch.set_num_threads(1)
        measure_all(*args.mbits)
        return
    if not (args.table or args.plot):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the namespaces are deleted
        for mbits in args.mbits:
            if len(measured(mbits)) == len(MEASURED):
                continue
            try:
                with namespaces(mbits) as names:
                    run_in_namespaces(names, [sys.executable, sys.argv[0], "--mbits", str(mbits)])
            except NamespacesUnavailable as reason:
                print(f"skipped: {reason}")
                return
        draw()
    if args.plot:
        draw()
    if args.table or not args.plot:
        print(table())


if __name__ == "__main__":
    rank_exit.run_or_abort(main)
