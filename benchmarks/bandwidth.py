"""A slow network: what synchronizing costs over it, Parle against data-parallel SGD, measured and on paper.

    python benchmarks/network.py             # as root of a Linux with iproute2
    python benchmarks/network.py --table     # of what has been measured, and --plot

Two ranks, each in a network namespace of its own, joined by a veth pair that a token bucket limits, talk by MPICH over
TCP; the interface's counters tell what went over it. Both methods are this project's, over MPI, with 128 images on
each rank a mini-batch: Parle sends its weights once in 25, `--method sgd` its gradients every time. LeNet computes.
A vector of WRN-28-10's size sleeps instead, as long as STEP_SECONDS says, and only updates.
"""

import argparse
import contextlib
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

import launch
import loader
import models
import ranks
from benchmarks import record
from optimizer import TAIL
from parle import PRESETS
from parle_mpi import Parle

if TYPE_CHECKING:
    from mpi4py import MPI

QUESTION = "network"
SEED = 42
LINK = "veth"
MBITS = (1000, 100)
BATCH = models.COMMON["batch_size"]
METHODS = {"parle": dict(PRESETS["parle"], replicas=2), "sgd": PRESETS["sgd"]}
# network, method, mini-batches that are measured: whole rounds, and with WRN-28-10 what takes half a minute
MEASURED = [("lenet", "parle", 250), ("lenet", "sgd", 100), ("wrn-28-10", "parle", 25), ("wrn-28-10", "sgd", 3)]

# A mini-batch of 128 on one GPU of the authors, derived from the seconds of a round of 25 that their plots use.
# LeNet's is measured here, on a CPU.
STEP_SECONDS = {"allcnn": 1.29 / 25, "wrn-28-10": 12.5 / 25, "wrn-16-4": 1.88 / 25}
LATENCY = 50e-6  # seconds a message takes however short it is; assumed, as of TCP within a data centre


# The model on paper


def parameters(network: str) -> int:
    source = loader.SOURCES[models.RECIPES[network]["dataset"]]
    with torch.device("meta"):
        model = models.build(network, source.channels, source.size, source.classes)
    return sum(parameter.numel() for parameter in model.parameters())


def allreduce_seconds(size: float, count: int, bandwidth: float, latency: float) -> float:
    """Of `size` bytes over `count` ranks, by recursive halving and doubling; a ring sends as much in more messages.

    Args:
        bandwidth: bits per second of each rank's link, in each direction.
        latency: seconds that the shortest message takes.
    """
    return 2 * (count - 1) / count * 8 * size / bandwidth + 2 * math.ceil(math.log2(count)) * latency


def minibatch_seconds(compute: float, sync: float, sync_every: int) -> float:
    return compute + sync / sync_every


def sync_share(compute: float, sync: float, sync_every: int) -> float:
    """Of the time."""
    return sync / sync_every / minibatch_seconds(compute, sync, sync_every)


# The measurement


class Refused(Exception):
    """This machine does not let us make network namespaces."""


@contextlib.contextmanager
def namespaces(mbits: int) -> Iterator[list[str]]:
    """The names of two network namespaces, joined by LINK. They are gone afterwards."""
    names = [f"parle-{os.getpid()}-{number}" for number in range(2)]

    def call(*command: Any) -> str:
        try:
            return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
        except FileNotFoundError as error:
            raise Refused(f"{command[0]} is not installed: it comes with iproute2") from error
        except subprocess.CalledProcessError as error:
            raise Refused(error.stderr.strip()) from error

    with contextlib.ExitStack() as stack:
        for name in names:
            call("ip", "netns", "add", name)
            stack.callback(call, "ip", "netns", "delete", name)
        call("ip", "link", "add", LINK, "netns", names[0], "type", "veth", "peer", "name", LINK, "netns", names[1])
        for number, name in enumerate(names):
            call("ip", "-n", name, "address", "add", f"10.99.0.{number + 1}/24", "dev", LINK)
            call("ip", "-n", name, "link", "set", LINK, "up")
            bucket = ("tbf", "rate", f"{mbits}mbit", "burst", "128kb", "latency", "50ms")
            call("tc", "-n", name, "qdisc", "add", "dev", LINK, "root", *bucket)
        while not all("state UP" in call("ip", "-n", name, "link", "show", LINK) for name in names):
            time.sleep(0.01)  # the kernel may take a second to notice
        yield names


def start(names: list[str], command: list[str]) -> None:
    """A rank of `command` in each namespace."""
    environment = dict(
        MPIR_CVAR_NOLOCAL="1",  # no shared memory
        MPIR_CVAR_CH4_NETMOD="ofi",
        FI_PROVIDER="tcp",
        FI_TCP_IFACE=LINK,
        OMP_NUM_THREADS="1",
    )
    line = [str(Path(sys.executable).with_name("mpiexec"))]
    for name in names:
        line += [":"] * (name != names[0]) + ["-n", "1", "ip", "netns", "exec", name, *command]
    subprocess.run(line, env=os.environ | environment, check=True)


def bytes_sent() -> int:
    """Over LINK by this namespace, headers included."""
    return int(Path(f"/sys/class/net/{LINK}/statistics/tx_bytes").read_text())


def trainee(network: str, comm: "MPI.Comm", method: str) -> tuple[Parle, Callable[[], None]]:
    """An optimizer, and what computes its gradients."""
    settings = METHODS[method] | dict(lr=0.1, batches_per_epoch=469)
    if network == "lenet":
        model = models.build("lenet", channels=1, size=28, classes=10)
        inputs = torch.randn(BATCH, 1, 28, 28).contiguous(memory_format=torch.channels_last)
        targets = torch.randint(10, (BATCH,))
        optimizer = Parle(model.parameters(), comm, **settings)

        def compute() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()

        return optimizer, compute
    vector = nn.Parameter(torch.zeros(parameters(network)))
    optimizer = Parle([vector], comm, **settings)
    vector.grad = torch.zeros_like(vector)
    return optimizer, lambda: time.sleep(STEP_SECONDS[network])


def measure(comm: "MPI.Comm", network: str, method: str, minibatches: int) -> dict[str, Any]:
    torch.manual_seed(SEED)
    optimizer, compute = trainee(network, comm, method)  # sends the first weights, which also opens the connection
    latencies = []
    for _ in range(20):
        comm.Barrier()
        began = time.perf_counter()
        ranks.add(comm, torch.zeros(1))
        latencies.append(time.perf_counter() - began)
    comm.Barrier()
    sent, began = bytes_sent(), time.perf_counter()
    for _ in range(minibatches):
        compute()
        optimizer.step()
    seconds = time.perf_counter() - began
    return dict(
        network=network,
        method=method,
        minibatches=minibatches,
        seconds=seconds,
        sync_seconds=optimizer.sync_seconds,
        bytes_sent=bytes_sent() - sent,
        latency=statistics.median(latencies) / 2,  # two messages one after the other
    )


def kept(mbits: int) -> list[tuple[str, str]]:
    return [(row["network"], row["method"]) for row in record.read(QUESTION) if row["mbits"] == mbits]


def measure_all(mbits: int) -> None:
    """What has not been measured at this rate, on this rank; the first keeps it."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    done = ranks.gather(comm, kept(mbits))[0]
    facts = dict(seed=SEED, mpi=ranks.library()) | record.origin()
    for network, method, minibatches in MEASURED:
        if (network, method) not in done:
            row = dict(mbits=mbits, ranks=comm.size) | measure(comm, network, method, minibatches)
            if comm.rank == 0:
                record.keep(QUESTION, row | facts)


# What is shown


def message_bytes(network: str) -> int:
    return 4 * (parameters(network) + TAIL)


def lenet_seconds() -> float:
    """A mini-batch of LeNet without its synchronization, as measured."""
    rows = [row for row in record.read(QUESTION) if row["network"] == "lenet"]
    return statistics.median((row["seconds"] - row["sync_seconds"]) / row["minibatches"] for row in rows)


def shares(network: str, count: int, bandwidth: float) -> list[float]:
    """Of time spent synchronizing, on paper: Parle's and that of data-parallel SGD."""
    compute = lenet_seconds() if network == "lenet" else STEP_SECONDS[network]
    sync = allreduce_seconds(message_bytes(network), count, bandwidth, LATENCY)
    return [sync_share(compute, sync, METHODS[method]["sync_every"]) for method in ("parle", "sgd")]


def table() -> str:
    measured = []
    for row in record.read(QUESTION):
        count, every = row["minibatches"], METHODS[row["method"]]["sync_every"]
        compute = (row["seconds"] - row["sync_seconds"]) / count
        sync = allreduce_seconds(message_bytes(row["network"]), row["ranks"], 1e6 * row["mbits"], row["latency"])
        measured.append(
            [
                row["network"],
                f"{row['mbits'] / 1000:g}",
                row["method"],
                f"{row['bytes_sent'] / count / 1e6:.3f}",
                f"{1e3 * compute:.0f}",
                f"{1000 * row['seconds'] / count:,.0f}",
                f"{1000 * minibatch_seconds(compute, sync, every):,.0f}",
                f"{100 * row['sync_seconds'] / row['seconds']:.1f}",
                f"{100 * sync_share(compute, sync, every):.1f}",
            ]
        )
    header = ["network", "Gb/s", "method", "MB sent a mini-batch", "computing, ms", "s per 1,000 mini-batches"]
    header += ["predicted", "% synchronizing", "predicted"]
    counts = (2, 32, 1024)
    on_paper = []
    for network in models.RECIPES:
        for gigabits in (1, 10, 100, 400):
            columns = zip(*(shares(network, count, 1e9 * gigabits) for count in counts), strict=True)
            cells = [f"{100 * share:.2g}" for column in columns for share in column]
            on_paper.append([network, f"{parameters(network) / 1e6:.2f}", gigabits, *cells])
    names = [f"{method}, {count:,}" for method in ("Parle", "SGD") for count in counts]
    columns = ["network", "million parameters", "Gb/s", *(f"% {name}" for name in names)]
    return record.table(header, measured) + "\n\n" + record.table(columns, on_paper)


def draw() -> None:
    """Share of time against bandwidth, each network a panel; a band is 2 to 1,024 replicas, a circle was measured."""
    gigabits = [10 ** (exponent / 20) for exponent in range(-20, 53)]  # 0.1 to 400
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots(1, len(models.RECIPES), sharey=True)
    for axis, network in zip(axes, models.RECIPES, strict=True):
        few, many = ([shares(network, count, 1e9 * rate) for rate in gigabits] for count in (2, 1024))
        for index, (label, colour) in enumerate((("Parle, L = 25", "tab:blue"), ("data-parallel SGD", "tab:orange"))):
            low, high = ([100 * pair[index] for pair in pairs] for pairs in (few, many))
            axis.fill_between(gigabits, low, high, color=colour, alpha=0.6, linewidth=0, label=label)
            for row in record.read(QUESTION):
                if (row["network"], row["method"]) == (network, ("parle", "sgd")[index]):
                    share = 100 * row["sync_seconds"] / row["seconds"]
                    axis.plot(row["mbits"] / 1000, share, "o", color=colour, markeredgecolor="black")
        axis.set(xscale="log", yscale="log", xlim=(0.08, 400), ylim=(0.01, 100), xlabel="Gb/s", title=network)
        axis.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
        axis.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of time synchronizing")
    axes[-1].legend(fontsize="small")
    record.save(figure, QUESTION, QUESTION, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbits", type=int, nargs="*", default=MBITS, help="rates of the link, Mb/s (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print what has been measured and predicted")
    parser.add_argument("--plot", action="store_true", help="draw it")
    args = parser.parse_args()
    if launch.launched():
        torch.set_num_threads(1)
        measure_all(*args.mbits)
        return
    if not (args.table or args.plot):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # or the namespaces would stay
        for mbits in args.mbits:
            if len(kept(mbits)) == len(MEASURED):
                continue
            try:
                with namespaces(mbits) as names:
                    start(names, [sys.executable, sys.argv[0], "--mbits", str(mbits)])
            except Refused as reason:
                print(f"skipped: {reason}")
                return
        draw()
    if args.plot:
        draw()
    if args.table or not args.plot:
        print(table())


if __name__ == "__main__":
    ranks.run(main)
