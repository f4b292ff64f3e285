"""Compare Parle with data-parallel SGD, post-local SGD, DiLoCo and others: LeNet on MNIST, error against time.

    python benchmarks/baselines.py --data DIR --tune        # tune the settings; DIR in torchvision's layout
    python benchmarks/baselines.py --data DIR               # then run the final trials, on an idle machine
    python benchmarks/baselines.py --data DIR parle diloco  # two methods only
    python benchmarks/baselines.py --table --plot           # print the table and draw figures/baselines.png

The script starts its own ranks, one thread each. Network, data, ranks, threads and seeds are the same for all methods,
and so is the number of gradients: STEPS mini-batches of 128 images per rank. Data-parallel methods split a mini-batch
of 128 over the ranks, so they make n times the number of updates on n ranks. The mean of the ranks' weights is
evaluated; at the end of a round it is Parle's master.

Tuning: one hyperparameter after another, in the order of the method's grid, is set to the value with the lowest error
on the last 10,000 training images, after a shorter run on the other images with one seed. The final trials train on
all images with SEEDS. lr drops at fractions of the run; DiLoCo's outer lr stays constant.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import loader
from benchmarks import results, trials
from benchmarks.baseline_optimizers import GRID, Method, average, first_settings, flatten, methods
from parle import evaluation, launcher, rank_exit, supervision, training
from parle.cores import count_cores
from parle.distributed import MPIGroup

NAME = Path(__file__).stem
BATCH_SIZE, STEPS = 128, 2000
SEEDS = [42, 43, 44]
TUNING_SEED, TUNING_STEPS, NUM_HELD_OUT = 41, 1000, 10_000
EVAL_STEPS = [*range(50, 500, 50), *range(500, STEPS + 1, 100)]  # mini-batches of 128 images per rank
TARGET_ERRORS = [1.0, 0.7, 0.6, 0.5]  # percent
LABELS = {
    "parle": "Parle",
    "ddp": "data-parallel SGD (DDP)",
    "sgd": "data-parallel SGD (ours)",
    "entropy-sgd": "Entropy-SGD",
    "elastic-sgd": "Elastic-SGD",
    "postlocal-sgd": "post-local SGD",
    "diloco": "DiLoCo",
    "published script": "published Parle script",
}


# One trial


def train(
    method: Method,
    settings: dict[str, Any],
    seed: int,
    data: loader.Dataset,
    world: MPIGroup,
    eval_steps: list[int],
    *,
    build_model: Callable[[loader.Dataset], nn.Module] = trials.lenet,
    augment: bool = False,
    amp: bool = False,
    average_decay: float = 0.0,
    target: float = 0.0,
) -> dict[str, Any]:
    """Train until the last of `eval_steps`. A point of the curve is [steps, seconds of training, test error].

    `cpu_seconds` belong to this rank. If they are much less than `seconds`, the rank waited or shared its core.

    Args:
        amp: train and evaluate in bfloat16.
        average_decay: per 25 mini-batches, of an average of the weights, whose error is the fourth element of a point.
        target: stop once all errors are at most this.
    """
    hyperparameters = dict(settings)
    lr, drops, decay = hyperparameters["lr"], hyperparameters.pop("lr_drops"), hyperparameters.pop("lr_decay")
    evaluate = make_evaluator(data, world, build_model, amp)
    torch.manual_seed(seed)
    model = build_model(data)
    updates_per_step = world.size if method.data_parallel else 1
    updates_per_round = settings.get("sync_every", 1)
    average_decay = average_decay ** (updates_per_round / updates_per_step / 25)
    networks = [model]
    if average_decay:
        time_average = build_model(data).requires_grad_(False)
        networks.append(time_average)
    share = dict(replica=world.rank, replicas=world.size)
    if method.data_parallel:
        share = dict(shard=(world.rank, world.size))
    batches = loader.BatchLoader(data, batch_size=BATCH_SIZE, seed=seed, augment=augment, **share)
    network, optimizer = method.build(model, world, batches.per_epoch, **hyperparameters)
    total, done, seconds, cpu_seconds, curve = eval_steps[-1] * updates_per_step, 0, 0.0, 0.0, []
    for stop in eval_steps:
        world.all_gather(None)  # the clock runs from the common start until the last rank arrives
        start, cpu_start = time.perf_counter(), time.process_time()
        while done < stop * updates_per_step:
            for group in optimizer.param_groups:
                group["lr"] = lr * decay ** sum(done >= drop * total for drop in drops)
            inputs, targets = next(batches)
            training.seed_device(inputs.device, batches.dropout_seed())
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                logits = network(inputs)
            F.cross_entropy(logits.float(), targets).backward()
            optimizer.step()
            done += 1
            if average_decay and done % updates_per_round == 0:
                weight = (1 - average_decay) / (1 - average_decay ** (done // updates_per_round))
                torch._foreach_lerp_(list(time_average.parameters()), [p.detach() for p in model.parameters()], weight)
        world.all_gather(None)
        seconds, cpu_seconds = seconds + time.perf_counter() - start, cpu_seconds + time.process_time() - cpu_start
        errors = list(map(evaluate, networks))
        curve.append([stop, round(seconds, 3), *errors])
        if max(errors) <= target:
            break
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    return dict(
        error=curve[-1][2],
        seconds=curve[-1][1],
        cpu_seconds=round(cpu_seconds, 3),
        bytes_sent=size * method.num_messages(done, settings),
        curve=curve,
    )


def make_evaluator(
    data: loader.Dataset, world: MPIGroup, build_model: Callable[[loader.Dataset], nn.Module], amp: bool
) -> Callable[[nn.Module], float]:
    """Return a function that averages the ranks' weights, recalibrates batch norm and returns the test error in %."""
    mean_model = build_model(data)
    weights = flatten(mean_model).weights

    @torch.no_grad()
    @torch.autocast("cpu", torch.bfloat16, enabled=amp)
    def evaluate(model: nn.Module) -> float:
        for mean, own in zip(mean_model.parameters(), model.parameters(), strict=True):
            mean.copy_(own)
        average(world, weights)
        evaluation.recalibrate_batch_norm(mean_model, evaluation.calibration_batches(data, BATCH_SIZE, world), world)
        total = len(data.test_labels)
        shard = world.shard(total)
        wrong = evaluation.predict(mean_model, data.test_images[shard], data).argmax(1) != data.test_labels[shard]
        count = wrong.double().sum().reshape(1)
        world.all_reduce(count)
        return 100 * float(count) / total

    return evaluate


def run_trial(
    name: str, settings: dict[str, Any], seed: int, data: loader.Dataset, world: MPIGroup, eval_steps: list[int]
) -> dict[str, Any]:
    """Return the row of a trial. Train only if there is no such row yet."""
    method = methods(world.size)[name]
    key = dict(method=name, settings=settings, seed=seed, ranks=world.size, steps=eval_steps[-1])
    key |= dict(num_train_images=len(data.train_labels))
    known = [row for row in results.read_rows(NAME) if key.items() <= row.items()] if world.rank == 0 else []
    known = world.all_gather(known)[0]
    if known:
        return known[-1]
    provenance = results.provenance()
    row = key | train(method, settings, seed, data, world, eval_steps)
    if world.rank == 0:
        print(f"{name} seed {seed}: {row['error']:.2f} % after {row['seconds']:.1f} s  {settings}", flush=True)
        results.append_row(NAME, row | provenance)
    return row


def tune(name: str, data: loader.Dataset, world: MPIGroup) -> dict[str, Any]:
    """Return a method's settings, tuned one hyperparameter after another on held-out training images."""
    method = methods(world.size)[name]
    if method.tuned_as:
        other = tune(method.tuned_as, data, world)
        return method.fixed | {parameter: other[parameter] for parameter in method.grid}
    images, labels = data.train_images, data.train_labels
    split = data._replace(
        train_images=images[:-NUM_HELD_OUT],
        train_labels=labels[:-NUM_HELD_OUT],
        test_images=images[-NUM_HELD_OUT:],
        test_labels=labels[-NUM_HELD_OUT:],
    )

    def error(settings: dict[str, Any]) -> float:
        return run_trial(name, settings, TUNING_SEED, split, world, [TUNING_STEPS])["error"]

    settings = first_settings(method)
    for parameter, values in method.grid.items():
        settings = min((settings | {parameter: value} for value in values), key=error)
    return settings


# Table and figure


def latest_rows() -> dict[str, list[dict[str, Any]]]:
    """Return each method's final rows with its latest settings, the method with the lowest mean error first."""
    rows = [row for row in results.read_rows(NAME) if row["seed"] in SEEDS]
    key = ("method", "settings", "ranks", "steps")
    latest = {row["method"]: [row[part] for part in key] for row in rows}
    groups = {name: [row for row in rows if [row[part] for part in key] == last] for name, last in latest.items()}
    return dict(sorted(groups.items(), key=lambda group: statistics.mean(row["error"] for row in group[1])))


def error_at_time(row: dict[str, Any], limit: float) -> float:
    """Return the last test error measured within `limit` seconds of training."""
    return [error for _, seconds, error in row["curve"] if seconds <= limit][-1]


def time_to_error(target: float, rows: list[dict[str, Any]]) -> str:
    """Format the seconds until the test error first reaches `target`."""
    return format_seconds(
        [next((seconds for _, seconds, error in row["curve"] if error <= target), None) for row in rows]
    )


def format_seconds(seconds: list[float | None]) -> str:
    """Format mean ± over the seeds that reached a target, and their number if it is not all."""
    reached = [value for value in seconds if value is not None]
    if not reached:
        return "—"
    count = f" ({len(reached)} of {len(seconds)})" if len(reached) < len(seconds) else ""
    return results.mean_std(reached, 1) + count


def tuned_settings(row: dict[str, Any]) -> str:
    """Format lr, its drops as fractions of the run, and the method's own hyperparameter."""
    settings, grid = row["settings"], methods(row["ranks"])[row["method"]].grid
    drops = " and ".join(f"{drop:g}" for drop in settings["lr_drops"])
    own = [f"{parameter} {settings[parameter]:g}" for parameter in grid if parameter not in GRID]
    return ", ".join([f"lr {settings['lr']:g} ÷ {1 / settings['lr_decay']:g} at {drops}", *own])


def table() -> str:
    """Return errors ± over seeds. MB are those a rank passes to all-reduce; a ring sends 2 (n − 1) / n of them."""
    groups = latest_rows()
    limit = min(statistics.mean(row["seconds"] for row in rows) for rows in groups.values())
    header = ["method", "test error at matched compute, %", f"test error after {limit:.0f} s, %"]
    header += ["training, s", "core-seconds per rank", *(f"s to {target:g} %" for target in TARGET_ERRORS)]
    header += ["MB per rank and 1,000 mini-batches", "tuned settings", "seeds"]
    lines = [
        [
            LABELS[name],
            results.mean_std([row["error"] for row in rows]),
            results.mean_std([error_at_time(row, limit) for row in rows]),
            results.mean_std([row["seconds"] for row in rows], 1),
            results.mean_std([row["cpu_seconds"] for row in rows], 1),
            *(time_to_error(target, rows) for target in TARGET_ERRORS),
            f"{rows[0]['bytes_sent'] / 1e6 * 1000 / rows[0]['steps']:.0f}",
            tuned_settings(rows[0]),
            ", ".join(str(row["seed"]) for row in rows),
        ]
        for name, rows in groups.items()
    ]
    return results.markdown_table(header, lines)


def draw() -> None:
    """Plot the mean test error against training time, with ± one standard deviation as a band."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, rows in latest_rows().items():
        curves = torch.tensor([row["curve"] for row in rows], dtype=torch.float64)  # (seeds, tests, 3)
        _, seconds, error = curves.mean(0).T
        deviation = curves[..., 2].std(0)
        label, width = f"{error[-1]:.2f} %  {LABELS[name]}", 2.5 if name == "parle" else 1
        (line,) = axes.plot(seconds, error, label=label, linewidth=width)
        low, high = error - deviation, error + deviation
        axes.fill_between(seconds, low, high, color=line.get_color(), alpha=0.1, linewidth=0)
    axes.set(yscale="log", ylim=(0.5, 3), xlabel="training time (s)", ylabel="test error of the averaged weights (%)")
    axes.set_title("LeNet on MNIST, 2 ranks, the same number of gradients", fontsize=10)
    ticks = [0.5, 0.6, 0.7, 1, 2, 3]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="final test error", fontsize=8)
    results.save_figure(figure, NAME, NAME, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "methods", nargs="*", metavar="METHOD", help=f"choose from {', '.join(methods(2))} (default: all)"
    )
    parser.add_argument(
        "-n",
        "--ranks",
        type=int,
        default=count_cores(),
        metavar="N",
        help="number of ranks (%(default)s)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="raw MNIST in torchvision's layout (else downloaded)")
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data")
    parser.add_argument("--tune", action="store_true", help="tune the settings only; this needs no idle machine")
    parser.add_argument("--table", action="store_true", help="print the table and exit")
    parser.add_argument("--plot", action="store_true", help="draw the figure and exit")
    args = parser.parse_args()
    if unknown := set(args.methods) - set(methods(2)):
        parser.error(f"unknown method {', '.join(unknown)}; choose from {', '.join(methods(2))}")
    if args.table:
        print(table())
    if args.plot:
        draw()
    if args.table or args.plot:
        return
    status = None if launcher.rank_from_environment() else supervision.spawn_ranks(args.ranks)
    if status is not None:
        sys.exit(status)

    from mpi4py import MPI

    world = MPIGroup(MPI.COMM_WORLD)
    torch.set_num_threads(1)
    load = functools.partial(loader.load, "mnist", args.data, args.proc)
    world.run_and_propagate_errors(load, loader.DatasetError, only_if=world.rank == 0)
    data = load()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(world.all_gather(folder)[0], "store").as_uri()
        dist.init_process_group("gloo", init_method=store, rank=world.rank, world_size=world.size)
        sgd = methods(world.size)["sgd"]
        train(sgd, first_settings(sgd), 0, data, world, [10])  # warm-up: a process is slower at first
        settings = {name: tune(name, data, world) for name in args.methods or methods(world.size)}
        for seed in [] if args.tune else SEEDS:  # methods are interleaved, so that other load affects all of them
            for name in settings:
                run_trial(name, settings[name], seed, data, world, EVAL_STEPS)
        dist.destroy_process_group()
        world.all_gather(None)
    if world.rank == 0:
        print(table())


if __name__ == "__main__":
    rank_exit.run_or_abort(main)
