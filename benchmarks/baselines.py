"""Parle and its peers, LeNet on MNIST: same network, data, ranks, threads and seeds; test error against seconds.

    python benchmarks/peers.py --data DIR --choose      # settings; DIR as torchvision lays it out
    python benchmarks/peers.py --data DIR               # then the runs that count, on a quiet machine
    python benchmarks/peers.py --data DIR parle diloco  # of two methods alone
    python benchmarks/peers.py --table --plot           # of the rows that are kept

Starts its own ranks, one thread each. Every method computes the gradients of as many images: BATCHES mini-batches of
128 on each rank. Where ranks share a mini-batch (data-parallel), 128 is the whole of it, so they make as many times
more updates as there are ranks. What is tested is the mean of the ranks' weights, which at a round's end is the master.

Each method's settings are chosen one after the other, in the order of its grid, by the error on the last 10,000
training images after a shorter run on the others with one seed. Then it trains on all with SEEDS. The lr that drops at
shares of the run is the local one; DiLoCo's outer lr stays.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine
import launch
import loader
import models
import ranks
from benchmarks import record
from benchmarks.rules import GRID, Method, first_settings, flatten, mean, methods

if TYPE_CHECKING:
    from mpi4py import MPI

BATCH, BATCHES = 128, 2000
SEEDS = [42, 43, 44]
CHOICE_SEED, CHOICE_BATCHES, HELD_OUT = 41, 1000, 10_000
TEST_AT = [*range(50, 500, 50), *range(500, BATCHES + 1, 100)]  # mini-batches on each rank
GOALS = [1.0, 0.7, 0.6, 0.5]  # test error in percent
QUESTION = "peers"


def train(
    method: Method, settings: dict[str, Any], seed: int, data: loader.Dataset, comm: "MPI.Comm", test_at: list[int]
) -> dict[str, Any]:
    """Train until the last of `test_at`. `curve` has of each [mini-batches, seconds of training, test error].

    `cpu_seconds` are this rank's. Where they are much less than `seconds`, others had its core or it waited.
    """
    own = dict(settings)
    lr, drops, decay = own["lr"], own.pop("drops"), own.pop("decay")
    test = tester(data, comm)
    torch.manual_seed(seed)
    model = models.build("lenet", data.channels, data.size, data.classes)
    sharers = comm.size if method.shares else 1
    whose = dict(part=(comm.rank, comm.size)) if method.shares else dict(replica=comm.rank, replicas=comm.size)
    source = loader.Batches(data, batch_size=BATCH, seed=seed, **whose)
    network, optimizer = method.build(model, comm, source.per_epoch, **own)
    steps, done, seconds, cpu_seconds, curve = test_at[-1] * sharers, 0, 0.0, 0.0, []
    for stop in test_at:
        ranks.gather(comm, None)  # all start together, and the last to arrive stops the clock
        began, cpu_began = time.perf_counter(), time.process_time()
        while done < stop * sharers:
            for group in optimizer.param_groups:
                group["lr"] = lr * decay ** sum(done >= drop * steps for drop in drops)
            inputs, targets = next(source)
            engine.seed(inputs.device, source.dropout_seed())
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), targets).backward()
            optimizer.step()
            done += 1
        ranks.gather(comm, None)
        seconds, cpu_seconds = seconds + time.perf_counter() - began, cpu_seconds + time.process_time() - cpu_began
        curve.append([stop, round(seconds, 3), test(model)])
    sent = 4 * sum(parameter.numel() for parameter in model.parameters()) * method.messages(steps, settings)
    last = dict(error=curve[-1][2], seconds=curve[-1][1], cpu_seconds=round(cpu_seconds, 3))
    return last | dict(bytes=sent, curve=curve)


def tester(data: loader.Dataset, comm: "MPI.Comm") -> Callable[[nn.Module], float]:
    """What gives the test error in percent of the mean of the ranks' weights, its batch-norm statistics recomputed."""
    team = engine.Team(comm.rank, comm.size, functools.partial(ranks.add, comm))
    average = models.build("lenet", data.channels, data.size, data.classes)
    weights = flatten(average).weights

    @torch.no_grad()
    def test(model: nn.Module) -> float:
        for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
        mean(comm, weights)
        engine.recalibrate_batch_norm(average, engine.calibration_batches(data, BATCH, team), team)
        rows, total = team.part(len(data.test_labels)), len(data.test_labels)
        wrong = engine.predict(average, data.test_images[rows], data).argmax(1) != data.test_labels[rows]
        share = wrong.double().sum().reshape(1)
        team.add(share)
        return 100 * float(share) / total

    return test


def trial(
    name: str, settings: dict[str, Any], seed: int, data: loader.Dataset, comm: "MPI.Comm", test_at: list[int]
) -> dict[str, Any]:
    """The row of one run, kept or new."""
    method = methods(comm.size)[name]
    key = dict(method=name, settings=settings, seed=seed, ranks=comm.size, batches=test_at[-1])
    key |= dict(train_images=len(data.train_labels))
    kept = [row for row in record.read(QUESTION) if key.items() <= row.items()] if comm.rank == 0 else []
    kept = ranks.gather(comm, kept)[0]
    if kept:
        return kept[-1]
    origin = record.origin()
    row = key | train(method, settings, seed, data, comm, test_at)
    if comm.rank == 0:
        print(f"{name} seed {seed}: {row['error']:.2f} % after {row['seconds']:.1f} s  {settings}", flush=True)
        record.keep(QUESTION, row | origin)
    return row


def choose(name: str, data: loader.Dataset, comm: "MPI.Comm") -> dict[str, Any]:
    """The method's settings: one after the other is set to what gives the least error on the held-out images."""
    method = methods(comm.size)[name]
    if method.chosen_as:
        other = choose(method.chosen_as, data, comm)
        return method.settings | {knob: other[knob] for knob in method.grid}
    images, labels = data.train_images, data.train_labels
    split = data._replace(
        train_images=images[:-HELD_OUT],
        train_labels=labels[:-HELD_OUT],
        test_images=images[-HELD_OUT:],
        test_labels=labels[-HELD_OUT:],
    )

    def error(settings: dict[str, Any]) -> float:
        return trial(name, settings, CHOICE_SEED, split, comm, [CHOICE_BATCHES])["error"]

    settings = first_settings(method)
    for knob, values in method.grid.items():
        settings = min((settings | {knob: value} for value in values), key=error)
    return settings


def results() -> dict[str, list[dict[str, Any]]]:
    """The rows of every method that has been tested, those as its newest one, best method first."""
    rows = [row for row in record.read(QUESTION) if row["seed"] in SEEDS]
    alike = ("method", "settings", "ranks", "batches")
    newest = {row["method"]: [row[name] for name in alike] for row in rows}
    groups = {name: [row for row in rows if [row[name] for name in alike] == last] for name, last in newest.items()}
    return dict(sorted(groups.items(), key=lambda group: statistics.mean(row["error"] for row in group[1])))


def error_at(row: dict[str, Any], limit: float) -> float:
    """As last tested by then."""
    return [error for _, seconds, error in row["curve"] if seconds <= limit][-1]


def seconds_to(goal: float, rows: list[dict[str, Any]]) -> str:
    """Until a test first shows that error or less. Where not every seed gets there: of those that do, and how many."""
    first = [next((seconds for _, seconds, error in row["curve"] if error <= goal), None) for row in rows]
    reached = [seconds for seconds in first if seconds is not None]
    if not reached:
        return "—"
    return record.spread(reached, 1) + (f" ({len(reached)} of {len(rows)})" if len(reached) < len(rows) else "")


def chosen(row: dict[str, Any]) -> str:
    """Its settings in words: lr, its drops as shares of the run, and what else its grid has."""
    settings, grid = row["settings"], methods(row["ranks"])[row["method"]].grid
    drops = " and ".join(f"{drop:g}" for drop in settings["drops"])
    more = [f"{knob} {settings[knob]:g}" for knob in grid if knob not in GRID]
    return ", ".join([f"lr {settings['lr']:g} ÷ {1 / settings['decay']:g} at {drops}", *more])


def table() -> str:
    """Errors and ± are of the seeds; MB what a rank gives to allreduces, of which a ring sends 2 (n − 1) / n."""
    groups = results()
    limit = min(statistics.mean(row["seconds"] for row in rows) for rows in groups.values())
    header = ["method", "error at equal gradients", f"error at {limit:.0f} s", "seconds in all", "of a core"]
    header += [*(f"to {goal:g} %" for goal in GOALS), "MB in 1,000 mini-batches", "chosen", "seeds"]
    return record.table(
        header,
        (
            [
                name,
                record.spread([row["error"] for row in rows]),
                record.spread([error_at(row, limit) for row in rows]),
                record.spread([row["seconds"] for row in rows], 1),
                record.spread([row["cpu_seconds"] for row in rows], 1),
                *(seconds_to(goal, rows) for goal in GOALS),
                f"{rows[0]['bytes'] / 1e6 * 1000 / rows[0]['batches']:.0f}",
                chosen(rows[0]),
                ", ".join(str(row["seed"]) for row in rows),
            ]
            for name, rows in groups.items()
        ),
    )


def draw() -> None:
    """Mean test error over seconds, and ± in a band."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, rows in results().items():
        curves = torch.tensor([row["curve"] for row in rows], dtype=torch.float64)  # (seeds, tests, 3)
        _, seconds, error = curves.mean(0).T
        spread = curves[..., 2].std(0)
        (line,) = axes.plot(seconds, error, label=f"{name} {error[-1]:.2f}", linewidth=2.5 if name == "parle" else 1)
        axes.fill_between(seconds, error - spread, error + spread, color=line.get_color(), alpha=0.1, linewidth=0)
    axes.set(yscale="log", ylim=(0.5, 3), xlabel="seconds of training", ylabel="test error of the mean weights (%)")
    ticks = [0.5, 0.6, 0.7, 1, 2, 3]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="error at the end", fontsize=8)
    record.save(figure, QUESTION, QUESTION, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"{', '.join(methods(2))} (all)")
    parser.add_argument("-n", "--ranks", type=int, default=len(ranks.cores()), metavar="N", help="(%(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="raw MNIST, as torchvision lays it out (downloaded)")
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data")
    parser.add_argument("--choose", action="store_true", help="choose the settings, which need no quiet machine, alone")
    parser.add_argument("--table", action="store_true", help="print what has been measured, in Markdown, and end")
    parser.add_argument("--plot", action="store_true", help="draw it, and end")
    args = parser.parse_args()
    if unknown := set(args.methods) - set(methods(2)):
        parser.error(f"there is no {', '.join(unknown)}")
    if args.table:
        print(table())
    if args.plot:
        draw()
    if args.table or args.plot:
        return
    status = None if launch.launched() else launch.start(args.ranks)
    if status is not None:
        sys.exit(status)

    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    load = functools.partial(loader.load, "mnist", args.data, args.proc)
    ranks.together(comm, load, comm.rank == 0, loader.DataError)  # the first builds what all then map
    data = load()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(ranks.gather(comm, folder)[0], "store").as_uri()
        dist.init_process_group("gloo", init_method=store, rank=comm.rank, world_size=comm.size)
        warm = methods(comm.size)["sgd"]
        train(warm, first_settings(warm), 0, data, comm, [10])  # a process is slower at first
        settings = {name: choose(name, data, comm) for name in args.methods or methods(comm.size)}
        for seed in [] if args.choose else SEEDS:  # in turn, so that a busy minute is not one method's alone
            for name in settings:
                trial(name, settings[name], seed, data, comm, TEST_AT)
        dist.destroy_process_group()
        ranks.gather(comm, None)
    if comm.rank == 0:
        print(table())


if __name__ == "__main__":
    ranks.run(main)
