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
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine
import launch
import loader
import models
import options
import ranks
from benchmarks import record
from optimizer import Replica
from parle import GAMMA_CAP, PULL_CAP, nesterov, scope
from parle_mpi import Parle

if TYPE_CHECKING:
    from mpi4py import MPI

BATCH, BATCHES = 128, 2000
SEEDS = [42, 43, 44]
CHOICE_SEED, CHOICE_BATCHES, HELD_OUT = 41, 1000, 10_000
GRID = {"lr": [0.1, 0.05], "drops": [[0.5, 0.75], [0.7, 0.9]]}  # drops are shares of the run
TEST_AT = [*range(50, 500, 50), *range(500, BATCHES + 1, 100)]  # mini-batches on each rank
GOALS = [1.0, 0.7, 0.6, 0.5]  # test error in percent
NESTEROV = dict(momentum=0.9, nesterov=True)
QUESTION = "peers"
FIGURE = Path(__file__).parent / "figures" / "peers.png"


# Each method is built from the model: what computes its output, and what has step(). `nb` is of one pass over the data.


def parle(model: nn.Module, comm: "MPI.Comm", nb: int, **settings: Any) -> tuple[nn.Module, Parle]:
    return model, Parle(model.parameters(), comm, batches_per_epoch=nb, **settings)


def ddp(model: nn.Module, comm: "MPI.Comm", nb: int, *, lr: float) -> tuple[nn.Module, torch.optim.SGD]:
    return data_parallel(model), torch.optim.SGD(model.parameters(), lr, fused=True, **NESTEROV)


def postlocal(
    model: nn.Module, comm: "MPI.Comm", nb: int, *, lr: float, sync_every: int, warmup: int
) -> tuple[nn.Module, PostLocalSGDOptimizer]:
    """As torch's documentation has it: for `warmup` steps gradients are averaged, then weights every `sync_every`."""
    model.to(memory_format=torch.contiguous_format)  # the averager makes weights so, but not their momenta
    warnings.filterwarnings("ignore", "Grad strides do not match")  # along a dimension of size 1
    network, sgd = ddp(model, comm, nb, lr=lr)
    alone = PostLocalSGDState(None, None, start_localSGD_iter=warmup, post_local_gradient_allreduce=False)
    network.register_comm_hook(alone, post_localSGD_hook)
    return network, PostLocalSGDOptimizer(sgd, PeriodicModelAverager(period=sync_every, warmup_steps=warmup))


def data_parallel(model: nn.Module) -> DistributedDataParallel:
    """Without its broadcast of batch-norm statistics: they are recomputed before every test."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # the flag's new name is of torch 2.15
        return DistributedDataParallel(model, broadcast_buffers=False)


class DiLoCo(torch.optim.SGD):
    """Douillard et al., 2023, with SGD inside: every L steps x ← x − outer_lr · Nesterov(mean over a of (x − y^a))."""

    def __init__(
        self, model: nn.Module, comm: "MPI.Comm", *, lr: float, sync_every: int, outer_lr: float, outer_momentum: float
    ):
        self.comm, self.sync_every, self.batches = comm, sync_every, 0
        self.outer = dict(lr=outer_lr, momentum=outer_momentum)
        self.weights = flatten(model).weights
        self.start, self.outer_buffer = self.weights.clone(), torch.zeros_like(self.weights)
        super().__init__(model.parameters(), lr, fused=True, **NESTEROV)

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        self.batches += 1
        if self.batches % self.sync_every == 0:
            nesterov(self.start, mean(self.comm, self.start - self.weights), self.outer_buffer, **self.outer)
            self.weights.copy_(self.start)


class Published(torch.optim.Optimizer):
    """The update of the authors' parle_mpi.py of 2018, on flat vectors and without its aliasing on a CPU.

    Kept: the scoping counter grows once per tensor, momentum is not Nesterov's, the outer step starts from y, z^a is
    never reset, and the second message of a round serves the test alone. But the replicas start alike.
    """

    MOMENTUM, ALPHA = 0.9, 0.75  # not to be chosen there

    def __init__(
        self, model: nn.Module, comm: "MPI.Comm", nb: int, *, lr: float, sync_every: int, gamma: float, rho: float
    ):
        super().__init__(model.parameters(), dict(lr=lr))
        self.comm, self.nb, self.sync_every = comm, nb, sync_every
        self.gamma, self.pull = gamma, rho * sync_every * comm.size
        self.replica = flatten(model)
        self.replica.use(torch.zeros_like(self.replica.weights))
        self.y, self.batches = self.replica.weights, 0
        self.anchor, self.z, self.master = self.y.clone(), self.y.clone(), self.y.clone()
        self.u, self.v = torch.zeros_like(self.y), torch.zeros_like(self.y)

    @torch.no_grad()
    def step(self) -> None:
        self.replica.gather_gradient()
        gamma = scope(self.gamma, self._count(), self.nb, GAMMA_CAP)
        self._descend(self.replica.gradient + gamma * (self.y - self.anchor), self.u)
        self.z.lerp_(self.y, 1 - self.ALPHA)
        self.batches += 1
        if self.batches % self.sync_every == 0:
            pull = scope(self.pull, self._count(), self.nb, PULL_CAP)
            z = mean(self.comm, self.z.clone())
            self._descend((self.anchor - self.z) + pull * (self.anchor - z), self.v)
            self.anchor.copy_(self.y)
            self.master = mean(self.comm, self.anchor.clone())

    def _count(self) -> int:
        return self.batches * len(self.replica.parameters) // self.sync_every

    def _descend(self, gradient: Tensor, buffer: Tensor) -> None:
        buffer.mul_(self.MOMENTUM).add_(gradient)
        self.y.sub_(gradient + buffer, alpha=self.param_groups[0]["lr"])


@torch.no_grad()
def flatten(model: nn.Module) -> Replica:
    """Its weights become views of one vector."""
    return Replica(list(model.parameters()), has_inner_loop=False)


def mean(comm: "MPI.Comm", vector: Tensor) -> Tensor:
    """Over the ranks, in place."""
    ranks.add(comm, vector)
    return vector.div_(comm.size)


def each_round(steps: int, settings: dict[str, Any]) -> int:
    return steps // settings["sync_every"]


class Method(NamedTuple):
    build: Callable[..., tuple[nn.Module, torch.optim.Optimizer]]
    settings: dict[str, Any]  # what is not chosen
    grid: dict[str, list[Any]] = GRID
    messages: Callable[[int, dict[str, Any]], int] = each_round  # vectors of P floats from each rank, in so many steps
    shares: bool = False  # the ranks share each mini-batch
    chosen_as: str | None = None  # the grid is that other method's, whose equations are the same


def methods(n: int) -> dict[str, Method]:
    """Each for n ranks. Those of our own class have the settings that the program's flags give."""

    def ours(*flags: str, **more: Any) -> Method:
        args = options.resolve(options.parser("", "").parse_args(flags), n)
        names = ["replicas", "momentum", "weight_decay", "sync_every", "gamma", "rho", "alpha"]
        names += ["outer_step", "outer_momentum"]
        return Method(parle, {name: getattr(args, name) for name in names} | dict(decay=args.lr_decay), **more)

    shared = dict(messages=lambda steps, settings: steps, shares=True)
    rule = dict(sync_every=25, decay=0.2)
    return {
        "parle": ours(),
        "ddp": Method(ddp, dict(decay=0.2), **shared),
        "sgd": ours("--method", "sgd", **shared, chosen_as="ddp"),
        "entropy-sgd": ours("--method", "entropy-sgd", **shared),
        "elastic-sgd": ours("--method", "elastic-sgd", grid=GRID | {"rho": [1 / n, 0.1 / n]}),
        "postlocal-sgd": Method(
            postlocal,
            rule,
            GRID | {"warmup": [100, 500]},
            lambda steps, own: own["warmup"] + math.ceil((steps - own["warmup"]) / own["sync_every"]),
        ),
        "diloco": Method(
            lambda model, comm, nb, **settings: (model, DiLoCo(model, comm, **settings)),
            rule | dict(outer_lr=0.7),
            GRID | {"outer_momentum": [0.9, 0.5]},
        ),
        "published": Method(
            lambda model, comm, nb, **settings: (model, Published(model, comm, nb, **settings)),
            rule | dict(gamma=0.01, rho=0.01, decay=0.1),
            messages=lambda steps, settings: 2 * each_round(steps, settings),
        ),
    }


# The loop, one and the same for all


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
    row = key | train(method, settings, seed, data, comm, test_at)
    if comm.rank == 0:
        print(f"{name} seed {seed}: {row['error']:.2f} % after {row['seconds']:.1f} s  {settings}", flush=True)
        record.keep(QUESTION, row | dict(command=record.command(), machine=record.machine()))
    return row


def first(method: Method) -> dict[str, Any]:
    """Where its grid starts."""
    return method.settings | {knob: values[0] for knob, values in method.grid.items()}


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

    settings = first(method)
    for knob, values in method.grid.items():
        settings = min((settings | {knob: value} for value in values), key=error)
    return settings


# What came out


def results() -> dict[str, list[dict[str, Any]]]:
    """The rows of every method that has been tested, with its newest settings, best method first."""
    rows = [row for row in record.read(QUESTION) if row["seed"] in SEEDS]
    newest = {row["method"]: row["settings"] for row in rows}
    groups = {name: [row for row in rows if row["settings"] == settings] for name, settings in newest.items()}
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


def plot() -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
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
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"{', '.join(methods(2))} (all)")
    parser.add_argument("-n", "--ranks", type=int, default=len(ranks.cores()), metavar="N", help="(%(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="raw MNIST, as torchvision lays it out (downloaded)")
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data")
    parser.add_argument("--choose", action="store_true", help="choose the settings, which need no quiet machine, alone")
    parser.add_argument("--table", action="store_true", help="print what has been measured, in Markdown, and end")
    parser.add_argument("--plot", action="store_true", help=f"draw it, in {FIGURE.name}, and end")
    args = parser.parse_args()
    if unknown := set(args.methods) - set(methods(2)):
        parser.error(f"there is no {', '.join(unknown)}")
    if args.table:
        print(table())
    if args.plot:
        plot()
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
        train(warm, first(warm), 0, data, comm, [10])  # a process is slower at first
        settings = {name: choose(name, data, comm) for name in args.methods or methods(comm.size)}
        for seed in [] if args.choose else SEEDS:  # in turn, so that a busy minute is not one method's alone
            for name in settings:
                trial(name, settings[name], seed, data, comm, TEST_AT)
        dist.destroy_process_group()
        ranks.gather(comm, None)


if __name__ == "__main__":
    ranks.run(main)
