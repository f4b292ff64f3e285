"""Where do coupled replicas win? One network and data set, and what changes when one setting of Parle does.

    python benchmarks/claim.py --data DIR                  # all trials that have not been run, on all cores: hours
    python benchmarks/claim.py --data DIR method rho       # those of two panels
    python benchmarks/claim.py --table                     # what results/claim.jsonl says
    python benchmarks/claim.py --plot                      # figures/claim.png and sweeps.png

A trial trains its replicas one after another on one thread, by parle_gpu.Parle on the CPU, and as many trials run at
once as there are cores: errors are compared here, not seconds. SGD is there with as many mini-batches as a replica has
and with as many gradients as the three have together. What was chosen by SEEDS, the panel "fresh" tries with others.
One replica with rho 0.3 has the c_k and so the outer step of three with 0.1, as have two and six with the rho named
here: what those differ by is not the step. Averaging is SGD whose weights become their mean every L mini-batches, and
DiLoCo takes an outer Nesterov step of 0.7 towards that mean instead.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))


import engine
import loader
import models
import ranks
from benchmarks import record
from parle import PRESETS, PULL_CAP
from parle_gpu import Parle

SEEDS, FRESH = (42, 43, 44), (45, 46, 47)
BATCH = 128
DROPS, DECAY = (0.5, 0.75), 0.2  # of lr, at shares of a run; the same for all
NEVER = 10**9  # mini-batches an epoch, with which nothing grows
LENGTHS, TABLED = (1, 4, 12), (1, 3, 4, 12, 36)
CURVE = (0.1, 0.2, 0.4, 0.6, 0.8)  # shares of a run after which the master is tested, besides the end


class Task(NamedTuple):
    """A network and data of which one core trains three replicas in a minute."""

    dataset: str
    images: int  # for training: the first of one shuffle
    shrink: int  # of height and width, by averaging
    build: Callable[[loader.Dataset], nn.Module]
    augment: bool
    weight_decay: float
    batches: int  # of each replica


def lenet(data: loader.Dataset) -> nn.Module:
    return models.build("lenet", data.channels, data.size, data.classes)


def narrow_allcnn(data: loader.Dataset) -> nn.Module:
    """A sixth of the width, and no dropout."""
    model = models.AllCNN(data.channels, data.size, data.classes, dropout=0.0, width=16)
    return model.to(memory_format=torch.channels_last)


TASKS = {
    "cifar-5000": Task("cifar10", 5000, 2, narrow_allcnn, True, 1e-3, 1000),
    "mnist-2000": Task("mnist", 2000, 1, lenet, False, 0.0, 600),
}

# What a trial has unless its setting says otherwise. Besides Parle's own hyper-parameters: how much longer it is, how
# fast scoping goes, whether the inner lr drops, whether the inner momentum outlives a sync, and whether a sync makes
# all replicas the master. outer_step is the step itself, which stays when lr drops, or "lr", as Parle's default is.
USUAL = {
    **PRESETS["parle"],
    **dict(replicas=3, alpha=0.75, lr=0.1, momentum=0.9, outer_step="lr", outer_momentum=0.9),
    **dict(longer=1, scoping=1, frac=1.0, inner_drops=True, keeps_momentum=True, collapses=False),
}
SGD = PRESETS["sgd"] | dict(outer_step="lr", outer_momentum=0.9)
FAST = dict(outer_step=0.5, outer_momentum=0.5)
AVERAGED = dict(gamma=0.0, alpha=0.0, rho=PULL_CAP, collapses=True)  # c is at its cap, so the master moves by 11 steps
METHODS: dict[str, dict[str, Any]] = {
    "SGD": SGD,
    "Entropy-SGD": PRESETS["entropy-sgd"],
    "Elastic-SGD": PRESETS["elastic-sgd"] | dict(replicas=3, rho=1 / 3),
    "Parle": {},
    "Parle, rho 0.1": dict(rho=0.1),
    "One replica, rho 0.3": dict(replicas=1, rho=0.3),
    "Two replicas, rho 0.15": dict(replicas=2, rho=0.15),
    "Six replicas, rho 0.05": dict(replicas=6, rho=0.05),
    "Averaging": AVERAGED | dict(outer_step=1 / (1 + PULL_CAP), outer_momentum=0.0),
    "DiLoCo": AVERAGED | dict(outer_step=0.7 / (1 + PULL_CAP), outer_momentum=0.9),
    "Parle, s lr 0.5": FAST,
    "Parle, s lr 0.5, no scoping": FAST | dict(scoping=0),
}
COLORS = {
    "SGD": "gray",
    "Averaging": "tab:brown",
    "Elastic-SGD": "tab:green",
    "Parle": "tab:blue",
    "Parle, rho 0.1": "tab:purple",
    "One replica, rho 0.3": "tab:pink",
    "Parle, s lr 0.5": "tab:orange",
}
# What is changed, to which values, around which methods.
SWEEPS: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "outer_step": ((0.1, 0.25, 0.5, 0.7), ("Parle, s lr 0.5",)),
    "outer_momentum": ((0.0, 0.5, 0.7, 0.9), ("Parle, s lr 0.5",)),
    "gamma": ((0.0, 0.001, 0.003, 0.01, 0.03, 0.1), ("Parle", "Parle, s lr 0.5")),
    "rho": ((0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3), ("Parle", "Parle, s lr 0.5")),
    "alpha": ((0.0, 0.75, 0.9), ("Parle, s lr 0.5",)),
    "sync_every": ((5, 10, 25, 50, 100, "auto"), ("Parle, s lr 0.5",)),
    "replicas": ((1, 2, 3, 6, 8), ("Parle, s lr 0.5",)),
    "scoping": ((0, 1, 4), ("Parle, s lr 0.5",)),
    "weight_decay": ((0.0, 1e-3, 3e-3), ("Parle, s lr 0.5",)),
    "frac": ((0.34, 0.5, 1.0), ("SGD", "Parle", "Parle, s lr 0.5")),
    "inner_drops": ((False, True), ("Parle",)),
    "keeps_momentum": ((False, True), ("Parle", "Parle, s lr 0.5")),
}
PANELS: dict[str, list[dict[str, Any]]] = {
    "method": [SGD, SGD | dict(longer=3), *list(METHODS.values())[1:]],
    "longer": [SGD | dict(longer=12), *(METHODS[name] | dict(longer=4) for name in METHODS if name != "Entropy-SGD")],
}
PANELS |= {
    changed: [METHODS[method] | {changed: value} for method in methods for value in values]
    for changed, (values, methods) in SWEEPS.items()
}
CHOSEN, CONTROL = METHODS["Parle, rho 0.1"], METHODS["One replica, rho 0.3"]
AVERAGING = METHODS["Averaging"]
PANELS["longest"] = [setting | dict(longer=12) for setting in ({}, CHOSEN, CONTROL, AVERAGING)]
PANELS["longest"] += [SGD | dict(longer=36)]
PANELS["fresh"] = [setting | dict(longer=longer) for longer in (4, 12) for setting in (SGD, CONTROL, CHOSEN)]
PANELS["fresh"] += [AVERAGING | dict(longer=4)]


def load(task: Task, raw: Path | None, proc: Path) -> loader.Dataset:
    data = loader.load(task.dataset, raw, proc)
    kept = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))[: task.images]

    def shrink(images: torch.Tensor) -> torch.Tensor:
        small = F.avg_pool2d(images.permute(0, 3, 1, 2).float(), task.shrink)
        return small.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    return data._replace(
        train_images=shrink(data.train_images[kept]),
        train_labels=data.train_labels[kept],
        test_images=shrink(data.test_images),
    )


def trial(task_name: str, setting: dict[str, Any], seed: int, raw: Path | None, proc: Path) -> dict[str, Any]:
    """Train once, on one thread. Gives the row to keep."""
    torch.set_num_threads(1)
    task, values, began = TASKS[task_name], usual(task_name) | setting, time.perf_counter()
    data, n = load(task, raw, proc), values["replicas"]
    networks, sources, optimizer = build(task, values, seed, data)
    model, batches = task.build(data), values["longer"] * task.batches
    drops, points = ([round(share * batches) for share in shares] for shares in (DROPS, CURVE))
    curve, losses, lost = [], [], 0
    row = dict(task=task_name, setting=setting, seed=seed, batches=batches, gradients=batches * n)
    for done in range(1, batches + 1):
        losses += gradients(networks, sources)
        try:
            optimizer.step()
            if done == batches:
                optimizer.sync()
        except FloatingPointError:
            losses.append(math.nan)
            break
        if optimizer.batches == 0:  # a round has ended
            lost += len(optimizer.lost)
            if not values["keeps_momentum"]:
                for vectors in optimizer.vectors:
                    vectors["inner_momentum_buffer"].zero_()
            if values["collapses"]:
                for vectors in optimizer.vectors:
                    for name in ("weights", "anchor", "inner_avg"):
                        vectors[name].copy_(optimizer.master)
        if done in drops:
            drop(optimizer, values)
        if done in points:
            optimizer.copy_master_to(model)
            curve.append((done, test(model, data)))
    train_loss = statistics.mean(losses[-100 * n :])
    if not train_loss <= math.log(data.classes):  # no better than guessing
        return row | dict(error=None, diverged=done, curve=curve)
    last = engine.evaluate(optimizer, model, data, batch_size=BATCH, replicas=list(range(n)))
    return row | dict(
        error=last["master_error"],
        loss=last["master_loss"],
        replica_errors=last["replica_errors"],
        ensemble_error=last["ensemble_error"],
        distance=statistics.mean(last["distances"]),
        train_loss=train_loss,
        lost=lost,
        curve=curve,
        seconds=round(time.perf_counter() - began, 1),
    )


def build(
    task: Task, values: dict[str, Any], seed: int, data: loader.Dataset
) -> tuple[list[nn.Module], list[loader.Batches], Parle]:
    """The replicas, which start alike, the mini-batches of each, and what couples them."""
    networks, sources = [], []
    for replica in range(values["replicas"]):
        torch.manual_seed(seed)
        networks.append(task.build(data).train())
        shares = dict(replica=replica, replicas=values["replicas"], frac=values["frac"])
        sources.append(loader.Batches(data, batch_size=BATCH, seed=seed, augment=task.augment, **shares))
    names = ("lr", "momentum", "weight_decay", "sync_every", "gamma", "rho", "alpha", "outer_momentum")
    scoping = values["scoping"]
    optimizer = Parle(
        [network.parameters() for network in networks],
        batches_per_epoch=round(sources[0].per_epoch / scoping) if scoping else NEVER,
        outer_step=1.0 if values["outer_step"] == "lr" else values["outer_step"] / values["lr"],
        **{name: values[name] for name in names},
    )
    return networks, sources, optimizer


def gradients(networks: list[nn.Module], sources: list[loader.Batches]) -> list[float]:
    """Of the next mini-batch of every replica, left in its parameters. Gives the losses."""
    losses = []
    for network, source in zip(networks, sources, strict=True):
        network.zero_grad()
        inputs, targets = next(source)
        engine.seed(torch.device("cpu"), source.dropout_seed())
        loss = F.cross_entropy(network(inputs), targets)
        loss.backward()
        losses.append(loss.item())
    return losses


def drop(optimizer: Parle, values: dict[str, Any]) -> None:
    """lr falls, or not, and the outer step falls, or not, which the optimizer has in units of lr."""
    inner = DECAY if values["inner_drops"] else 1.0
    outer = DECAY if values["outer_step"] == "lr" else 1.0
    for group in optimizer.param_groups:
        group["lr"] *= inner
        group["outer_step"] *= outer / inner


def test(model: nn.Module, data: loader.Dataset) -> float:
    """Error in percent, batch-norm statistics recomputed."""
    engine.recalibrate_batch_norm(model, engine.calibration_batches(data, BATCH))
    wrong = engine.predict(model, data.test_images, data).argmax(1) != data.test_labels
    return 100 * wrong.float().mean().item()


def usual(task: str) -> dict[str, Any]:
    return USUAL | dict(weight_decay=TASKS[task].weight_decay)


def same(task: str, setting: dict[str, Any]) -> str:
    """A key that settings of a task share that mean the same."""
    return json.dumps([task, usual(task) | setting], sort_keys=True)


def missing(panels: Iterable[str]) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Trials without a row, seed by seed; on MNIST the methods alone."""
    known = {(same(row["task"], row["setting"]), row["seed"]) for row in record.read("claim")}
    for seed in SEEDS + FRESH:
        for task in TASKS:
            for panel in panels:
                skipped = (panel == "fresh") != (seed in FRESH) or (task.startswith("mnist") and panel != "method")
                for setting in [] if skipped else PANELS[panel]:
                    if (same(task, setting), seed) not in known:
                        known.add((same(task, setting), seed))
                        yield task, setting, seed


def errors(task: str, setting: dict[str, Any], seeds: Iterable[int] = SEEDS) -> list[float]:
    """Of the trials kept, seed by seed; NaN where one diverged."""
    found = kept(record.digest("claim")).get(same(task, setting), {})
    return [found[seed] for seed in seeds if seed in found]


@functools.cache
def kept(digest: str) -> dict[str, dict[int, float]]:
    """Errors by setting and seed, of the rows that have this digest."""
    found: dict[str, dict[int, float]] = {}
    for row in record.read("claim"):
        error = math.nan if row["error"] is None else row["error"]
        found.setdefault(same(row["task"], row["setting"]), {})[row["seed"]] = error
    return found


def verdict(ours: list[float], theirs: list[float]) -> str:
    """The difference of the means; a tie unless Welch's t-test finds it significant at 5 %."""
    if not theirs:
        return "not run"
    if any(map(math.isnan, [*ours, *theirs])):
        return "diverged"
    difference = statistics.mean(ours) - statistics.mean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return f"one seed, {difference:+.2f}"
    p = stats.ttest_ind(ours, theirs, equal_var=False).pvalue
    word = "ties" if p >= 0.05 else "wins" if difference < 0 else "loses"
    return f"{word}, {difference:+.2f} (p {p:.3g})"


def table() -> str:
    """Each method against SGD with as many mini-batches of a replica, and with as many gradients in all."""
    header = ["task", "method", "mini-batches", "gradients", "test error", "seeds"]
    header += ["against SGD, as many mini-batches", "against SGD, as many gradients"]
    lines = []
    for task in TASKS:
        lengths = [setting | dict(longer=longer) for setting in METHODS.values() for longer in TABLED]
        for setting in sorted(lengths, key=length):
            if found := errors(task, setting):
                values, method = USUAL | setting, method_name(setting)
                batches, n = values["longer"] * TASKS[task].batches, values["replicas"]
                others = (errors(task, SGD | dict(longer=values["longer"] * times)) for times in (1, n))
                words = ["" if method == "SGD" else verdict(found, other) for other in others]
                lines.append([task, method, f"{batches:,}", f"{batches * n:,}", spread(found), len(found), *words])
    return record.table(header, lines)


def fresh(task: str = "cifar-5000") -> str:
    """What was chosen by SEEDS, with FRESH ones: against others of as many mini-batches, and of as many gradients."""
    lines = []
    for longer, times in ((4, 1), (4, 3), (12, 1)):
        ours = errors(task, CHOSEN | dict(longer=longer), FRESH)
        for other in (SGD, CONTROL, AVERAGING):
            theirs = errors(task, other | dict(longer=longer * times), FRESH)
            batches = [f"{count * TASKS[task].batches:,}" for count in (longer, longer * times)]
            if ours and theirs:
                against = [method_name(other), batches[1], spread(theirs), verdict(ours, theirs)]
                lines.append([batches[0], spread(ours), *against, len(theirs)])
    header = ["mini-batches", "Parle, rho 0.1", "other method", "its mini-batches", "its error", "Parle", "seeds"]
    return record.table(header, lines)


def length(setting: dict[str, Any]) -> int:
    return (USUAL | setting)["longer"]


def method_name(setting: dict[str, Any]) -> str:
    """Which method that is, however long."""
    return next(name for name, known in METHODS.items() if USUAL | known == USUAL | setting | dict(longer=1))


def summary() -> str:
    """The test error of some over how long they were, beside SGD's with three times the mini-batches."""
    shown, lines = ("One replica, rho 0.3", "Averaging", "Elastic-SGD", "Parle", "Parle, rho 0.1"), []
    for task in TASKS:
        for longer in LENGTHS:
            columns = [SGD | dict(longer=longer), SGD | dict(longer=3 * longer)]
            columns += [METHODS[method] | dict(longer=longer) for method in shown]
            cells = [errors(task, setting) for setting in columns]
            if sum(map(bool, cells)) > 1:
                batches = f"{longer * TASKS[task].batches:,}"
                lines.append([task, batches, *(spread(found) if found else "not run" for found in cells)])
    return record.table(["task", "mini-batches", "SGD", "SGD, 3 x as many", *shown], lines)


def sweeps() -> str:
    """The test error for every value of what is changed, around each method."""
    lines = []
    for task in TASKS:
        for changed, (values, methods) in SWEEPS.items():
            for method in methods:
                found = [(value, errors(task, METHODS[method] | {changed: value})) for value in values]
                cells = [f"{value}: {spread(trials)}{seeds(trials)}" for value, trials in found if trials]
                if len(cells) > 1:
                    lines.append([task, changed, method, "; ".join(cells)])
    return record.table(["task", "what is changed", "around", "test error"], lines)


def seeds(found: list[float]) -> str:
    """How many there are, where that needs to be said."""
    return "" if len(found) == len(SEEDS) else f" ({len(found)} of {len(SEEDS)} seeds)"


def spread(found: list[float]) -> str:
    diverged = sum(map(math.isnan, found))
    return f"diverged ({diverged} of {len(found)})" if diverged else record.spread(found)


def first_outer_step(setting: dict[str, Any]) -> float:
    """By how much of x - z the master moves in the first round, momentum aside: s lr (1 + c_0)."""
    values = USUAL | setting
    step = values["lr"] if values["outer_step"] == "lr" else values["outer_step"]
    return step * (1 + min(values["rho"] * values["sync_every"] * values["replicas"], PULL_CAP))


def points(
    axis: Axes, places: Iterable[float], settings: list[dict[str, Any]], method: str, style: str, task: str
) -> None:
    """Mean and ± of trials, and a cross at the upper edge for those of which one diverged."""
    found = [(place, errors(task, setting)) for place, setting in zip(places, settings, strict=True)]
    diverged = [place for place, values in found if any(map(math.isnan, values))]
    found = [(place, values) for place, values in found if values and place not in diverged]
    means = [statistics.mean(values) for _, values in found]
    spreads = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in found]
    look = dict(color=COLORS[method], markersize=4, linewidth=1, capsize=2, label=method)
    axis.errorbar([place for place, _ in found], means, spreads, fmt=style, **look)
    axis.plot(diverged, [axis.get_ylim()[1] - 0.7] * len(diverged), "x", color=COLORS[method])


def draw() -> None:
    """figures/claim.png and figures/sweeps.png."""
    record.save(draw_methods(), "claim", "claim", dpi=90)
    record.save(draw_sweeps(), "sweeps", "claim", dpi=76)


def draw_methods(task: str = "cifar-5000") -> Figure:
    """Test error against the mini-batches of a replica, and against the gradients of all."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, of_all in zip(axes, (False, True), strict=True):
        for method in ("SGD", "One replica, rho 0.3", "Averaging", "Elastic-SGD", "Parle", "Parle, rho 0.1"):
            settings = [METHODS[method] | dict(longer=longer) for longer in TABLED]
            replicas = (USUAL | METHODS[method])["replicas"] if of_all else 1
            places = [length(setting) * TASKS[task].batches * replicas for setting in settings]
            points(axis, places, settings, method, "o-", task)
        axis.set(xscale="log", ylim=(30, 50))
        ticks = [1000, 3000, 10_000, 30_000]
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(xlabel="mini-batches of each replica", ylabel="test error, %")
    axes[1].set(xlabel="gradients, of all replicas")
    axes[1].legend(fontsize=9)
    return figure


def draw_sweeps(task: str = "cifar-5000") -> Figure:
    """Small multiples: test error against the size of the outer step, and against each thing that is changed."""
    figure = Figure(figsize=(14, 5.6), layout="constrained")
    first, *others = figure.subplots(2, 6, sharey=True).flat
    first.set_ylim(34, 67)
    first.set_title("s lr (1 + c), first round", fontsize=10)
    first.set_xscale("log")
    first.minorticks_off()
    first.set_xticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    for method in ("Parle", "Parle, s lr 0.5"):
        swept = [changed for changed in ("outer_step", "rho") if method in SWEEPS[changed][1]]
        settings = [METHODS[method] | {changed: value} for changed in swept for value in SWEEPS[changed][0]]
        points(first, map(first_outer_step, settings), settings, method, "o", task)
    changes = [changed for changed in SWEEPS if changed != "outer_step"]
    for axis, changed in zip(others, changes, strict=True):
        values, methods = SWEEPS[changed]
        for method in methods:
            settings = [METHODS[method] | {changed: value} for value in values]
            points(axis, range(len(values)), settings, method, "o-", task)
        for style, times in (("--", 1), (":", 3)):
            axis.axhline(statistics.mean(errors(task, SGD | dict(longer=times))), color="gray", linestyle=style)
        axis.set_xticks(range(len(values)), [f"{value}" for value in values], fontsize=8)
        axis.set_title(changed, fontsize=10)
    for axis in (first, others[5]):
        axis.set_ylabel("test error, %")
    batches = f"{TASKS[task].batches:,} mini-batches of each replica"
    figure.suptitle(
        f"{task}, {batches}; dashed: SGD, dotted: 3 x as many; x: diverged; above 67 is cut off", fontsize=10
    )
    labelled = {
        label: handle
        for axis in (first, *others)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=len(labelled), fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("panels", nargs="*", metavar="PANEL", help=f"of {', '.join(PANELS)} (all)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="raw data, as torchvision lays it out")
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data")
    parser.add_argument("--table", action="store_true", help="print what has been found")
    parser.add_argument("--plot", action="store_true", help="draw it")
    args = parser.parse_args()
    if unknown := set(args.panels) - set(PANELS):
        parser.error(f"there is no {', '.join(unknown)}")
    if args.table:
        print(f"{table()}\n\n{fresh()}\n\n{sweeps()}")
    if args.plot:
        draw()
    if args.table or args.plot:
        return
    origin = record.origin()
    jobs = [(*job, args.data, args.proc) for job in missing(args.panels or PANELS)]
    if not jobs:
        print(record.complete("claim"))
    with ProcessPoolExecutor(len(ranks.cores()), mp_context=get_context("spawn")) as pool:
        trials = [pool.submit(trial, *job) for job in jobs]
        for number, done in enumerate(as_completed(trials), 1):
            row = done.result()
            record.keep("claim", row | origin)
            print(
                f"{number}/{len(jobs)}  {row['task']}  {row['setting']}  seed {row['seed']}: {row['error']}", flush=True
            )


if __name__ == "__main__":
    main()
