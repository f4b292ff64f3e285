"""Measure the seconds until a test error is reached over a slow network: Parle, DDP, local SGD, DiLoCo.

    python benchmarks/time_to_error.py --data DIR            # all trials that are missing; root on Linux with iproute2
    python benchmarks/time_to_error.py --data DIR lenet      # one workload
    python benchmarks/time_to_error.py --table --plot        # print the tables and draw figures/time_to_error.png

Two ranks of one thread each run in two network namespaces, connected by a link of limited rate (bandwidth.py). All
traffic uses it: MPI over TCP for our methods, gloo for torch's DDP, which overlaps messages with the backward pass.
Training, methods and evaluation are those of baselines.py: mini-batches of 128 images per rank, or of 128 in total for
data-parallel methods, which therefore make twice the number of updates. lr is constant. Both the weights and their
average over time are tested; an average costs no communication. A trial ends when both errors are at most the last
target.
"""

import argparse
import itertools
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import loader
from benchmarks import bandwidth, baselines, results, trials
from benchmarks.baseline_optimizers import Method, build_diloco, first_settings, methods
from parle import distributed, launcher, rank_exit
from parle.distributed import MPIGroup

NAME = Path(__file__).stem
SEEDS = (42, 43, 44)
LINKS = (100, 1000, None)  # Mb/s; None: not limited
RANKS = 2
AVERAGE_DECAY = 0.9  # per 25 mini-batches
LOCAL_SGD = Method(build_diloco, dict(sync_every=25, lr_decay=0.2, outer_lr=1.0, outer_momentum=0.0))
METHODS = {"local-sgd": LOCAL_SGD} | methods(RANKS)
COMPARED = ("parle", "local-sgd", "diloco", "ddp", "sgd")
LABELS = baselines.LABELS | {"local-sgd": "local SGD"}
COLORS = dict(zip(COMPARED, ("tab:purple", "tab:brown", "tab:orange", "black", "gray"), strict=True))
UNAVERAGED, AVERAGED = 2, 3  # positions of the errors in a point of the curve


class Workload(NamedTuple):
    dataset: str
    build_model: Callable[[loader.Dataset], nn.Module]
    augment: bool
    amp: bool
    lr: dict[str, float]  # of methods for which it is not 0.1
    targets: tuple[float, float]  # percent
    eval_steps: list[int]  # mini-batches of 128 images per rank


WORKLOADS = {
    # the lr that baselines.py selected on held-out images
    "lenet": Workload(
        *("mnist", trials.lenet, False, False, dict(ddp=0.05, sgd=0.05, diloco=0.05)),
        *((1.0, 0.8), [*range(100, 1000, 100), 1000, 1250, 1500]),
    ),
    "allcnn-32": Workload(
        *("cifar10", trials.allcnn(32), True, True, {}),
        *((45.0, 35.0), [*range(100, 2001, 100)]),
    ),
}


def missing(link: int | None, workload: str, seed: int) -> list[str]:
    """Return the methods without a row. They run one after another, so that other load affects all of them."""
    known = {(row["mbits"], row["workload"], row["method"], row["seed"]) for row in results.read_rows(NAME)}
    return [method for method in COMPARED if (link, workload, method, seed) not in known]


def settings(workload: str, method: str) -> dict[str, Any]:
    """Return the method's defaults with a constant lr."""
    return first_settings(METHODS[method]) | dict(lr=WORKLOADS[workload].lr.get(method, 0.1), lr_drops=[])


def run_trial(workload_name: str, method: str, seed: int, data: loader.Dataset, world: MPIGroup) -> dict[str, Any]:
    """Train until the last target or the last evaluation. Returns the row, with the bytes that this rank has sent."""
    workload, own = WORKLOADS[workload_name], settings(workload_name, method)
    before = bandwidth.bytes_sent()
    trained = baselines.train(
        *(METHODS[method], own, seed, data, world, workload.eval_steps),
        **dict(build_model=workload.build_model, augment=workload.augment, amp=workload.amp),
        **dict(average_decay=AVERAGE_DECAY, target=workload.targets[-1]),
    )
    on_the_wire = bandwidth.bytes_sent() - before  # with evaluation
    return dict(workload=workload_name, method=method, seed=seed, settings=own) | trained | dict(wire_bytes=on_the_wire)


def run_rank(link: int | None, workload: str, seed: int, raw: Path | None, proc: Path) -> None:
    """Run this rank's part of the missing trials over this link; rank 0 appends the rows."""
    from mpi4py import MPI

    world, provenance = MPIGroup(MPI.COMM_WORLD), results.provenance()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(world.all_gather(folder)[0], "store").as_uri()
        dist.init_process_group("gloo", init_method=store, rank=world.rank, world_size=world.size)
        data = loader.load(WORKLOADS[workload].dataset, raw, proc)
        for method in world.all_gather(missing(link, workload, seed))[0]:
            row = run_trial(workload, method, seed, data, world) | dict(mbits=link)
            if world.rank == 0:
                results.append_row(NAME, row | dict(mpi=distributed.mpi_library()) | provenance)
                steps, seconds, *errors = row["curve"][-1]
                reached = f"{steps} steps, {seconds:.0f} s, {errors} %"
                print(f"{link} Mb/s  {workload}  {method}  {seed}: {reached}", flush=True)
        dist.destroy_process_group()
        world.all_gather(None)


# Tables and figure


def link_name(link: int | None) -> str:
    if link is None:
        return "not limited"
    return f"{link} Mb/s" if link < 1000 else f"{link / 1000:g} Gb/s"


def rows_of(workload: str, link: int | None, method: str) -> list[dict[str, Any]]:
    key = dict(workload=workload, mbits=link, method=method)
    return [row for row in results.read_rows(NAME) if key.items() <= row.items()]


def seconds_to(target: float, row: dict[str, Any], column: int) -> float | None:
    """Return the seconds of training until the error in this column of the curve first is at most `target`."""
    return next((point[1] for point in row["curve"] if point[column] <= target), None)


def ratio_to_parle(workload: str, link: int | None, method: str, target: float, column: int) -> str:
    """Return the seconds to the target divided by Parle's, mean ± over the seeds, if all of them reach it."""
    ours, theirs = (rows_of(workload, link, name) for name in ("parle", method))
    seconds = {row["seed"]: seconds_to(target, row, column) for row in ours}
    pairs = [(seconds.get(row["seed"]), seconds_to(target, row, column)) for row in theirs]
    if not pairs or any(None in pair for pair in pairs):
        return "—"
    return results.mean_std([their / our for our, their in pairs], 1)


def table() -> str:
    """Return the seconds to every target, the ratio to Parle's and the bytes, by workload and link."""
    lines = []
    for name, workload in WORKLOADS.items():
        for link in LINKS:
            for method in COMPARED:
                rows = rows_of(name, link, method)
                if not rows:
                    continue
                cells = []
                for target in workload.targets:
                    for column in (UNAVERAGED, AVERAGED):
                        cells.append(baselines.format_seconds([seconds_to(target, row, column) for row in rows]))
                    cells.append(ratio_to_parle(name, link, method, target, AVERAGED))
                megabytes = rows[0]["bytes_sent"] / 1e6 / rows[0]["curve"][-1][0] * 1000
                targets = " and ".join(f"{target:g} %" for target in workload.targets)
                lines.append([name, link_name(link), LABELS[method], targets, *cells, f"{megabytes:.0f}"])
    header = ["workload", "link", "method", "targets"]
    for which in ("first", "second"):
        header += [f"s to the {which} target", "the same, averaged", "÷ Parle, averaged"]
    return results.markdown_table([*header, "MB per rank and 1,000 mini-batches"], lines)


def headline() -> str:
    """Return the seconds to LeNet's first target by link, without averaging over time, and DDP's divided by Parle's."""
    target, lines = WORKLOADS["lenet"].targets[0], []
    shown = [method for method in COMPARED if method != "sgd"]
    for link in LINKS:
        rows = {method: rows_of("lenet", link, method) for method in shown}
        cells = [
            baselines.format_seconds([seconds_to(target, row, UNAVERAGED) for row in rows[name]]) for name in shown
        ]
        lines.append([link_name(link), *cells, ratio_to_parle("lenet", link, "ddp", target, UNAVERAGED)])
    header = [f"s to {target:g} % test error", *(LABELS[method] for method in shown), "DDP ÷ Parle"]
    return results.markdown_table(header, lines)


def draw() -> None:
    results.save_figure(draw_errors(), NAME, NAME, dpi=80)


def draw_errors() -> Figure:
    """Plot mean test error over seconds, a panel per workload and link; dashed lines are of averaged weights."""
    measured = dict.fromkeys(row["workload"] for row in results.read_rows(NAME))
    figure = Figure(figsize=(11, 3.2 * len(measured)), layout="constrained")
    for axes, name in zip(figure.subplots(len(measured), len(LINKS), squeeze=False), measured, strict=True):
        workload = WORKLOADS[name]
        for axis, link in zip(axes, LINKS, strict=True):
            for method in COMPARED:
                rows = rows_of(name, link, method)
                for column, style in ((UNAVERAGED, "-"), (AVERAGED, "--")) if rows else ():
                    length = min(len(row["curve"]) for row in rows)
                    points = [[row["curve"][index] for row in rows] for index in range(length)]
                    seconds = [statistics.mean(point[1] for point in each) for each in points]
                    errors = [statistics.mean(point[column] for point in each) for each in points]
                    label = LABELS[method] if style == "-" else None
                    axis.plot(seconds, errors, style, color=COLORS[method], linewidth=1, label=label)
            for target in workload.targets:
                axis.axhline(target, color="lightgray", linewidth=1, zorder=0)
            axis.set(xscale="log", yscale="log", title=f"{name}, {link_name(link)}", xlabel="seconds of training")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("test error (%)")
    figure.axes[0].legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"{', '.join(WORKLOADS)} (default: all)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="raw data in torchvision's layout (else downloaded)")
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data")
    parser.add_argument("--link", type=int, help=argparse.SUPPRESS)  # of the ranks that this script starts
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)  # likewise
    parser.add_argument("--table", action="store_true", help="print the table and exit")
    parser.add_argument("--plot", action="store_true", help="draw the figure and exit")
    args = parser.parse_args()
    if unknown := set(args.workloads) - set(WORKLOADS):
        parser.error(f"unknown workload {', '.join(unknown)}; choose from {', '.join(WORKLOADS)}")
    workloads = args.workloads or list(WORKLOADS)
    if args.table:
        print(table())
    if args.plot:
        draw()
    if args.table or args.plot:
        return
    if launcher.rank_from_environment():
        run_rank(args.link, workloads[0], args.seed, args.data, args.proc)
        return
    for workload in workloads:  # pre-process, if it has not been done, before ranks are started
        loader.load(WORKLOADS[workload].dataset, args.data, args.proc)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the namespaces are deleted
    paths = ["--proc", str(args.proc), *(["--data", str(args.data)] if args.data else [])]
    for workload, seed, link in itertools.product(workloads, SEEDS, LINKS):
        if missing(link, workload, seed):
            try:
                with bandwidth.namespaces(link) as names:
                    own = [workload, "--seed", str(seed), *(["--link", str(link)] if link else [])]
                    bandwidth.run_in_namespaces(names, [sys.executable, sys.argv[0], *paths, *own])
            except bandwidth.NamespacesUnavailable as reason:
                sys.exit(f"cannot create network namespaces: {reason}")
    print(table())


if __name__ == "__main__":
    rank_exit.run_or_abort(main)
