"""Compare methods with and without averaging their weights over time, with settings chosen on validation images.

    python benchmarks/averaging.py --data DIR select    # try every setting on held-out training images
    python benchmarks/averaging.py --data DIR test      # test the selected settings on test images
    python benchmarks/averaging.py --table              # print the tables
    python benchmarks/averaging.py --plot               # draw figures/averaging.png

Every method may use its own hyperparameter, one of the same four lr schedules, and an average of its weights: of the
master after every round, or of SGD's weights after every step, with the same decay per 25 steps. The master and its
average are both evaluated, with separately selected settings. Nothing is selected on test images.
"""

import argparse
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import results, trials
from benchmarks.compare_methods import compare, format_errors
from benchmarks.trials import DEFAULTS, DILOCO, ELASTIC_SGD, LOCAL_SGD, SCHEDULES, SGD, Config, config_key
from parle.algorithm import COUPLING_MAX

NAME = Path(__file__).stem
SELECTION_TASK, SELECTION_SEED, SELECTION_LENGTH = "cifar-5000", 42, 2
# task → lengths of the runs on test images, in units of Task.steps, and their seeds; in the order in which they are run
TESTS: dict[str, dict[int, tuple[int, ...]]] = {
    "cifar-5000": {4: (43, 44, 45, 46, 47, 48), 1: (43, 44, 45), 12: (43, 44, 45)},
    "mnist-2000": {1: (42, 43, 44)},
    "mnist": {3: (42, 43, 44)},
    "cifar-width-32": {2: (42, 43, 44)},
}
AVERAGES = [0.8, 0.9, 0.95, 0.975]  # decays per 25 steps


def constant_outer_step(rho: float) -> Config:
    """Return a config of Parle with constant c_k and an outer step s lr (1 + c_k) of 0.85 at any lr."""
    return dict(rho=rho, outer_lr=0.85 / (1 + rho * DEFAULTS["sync_every"] * DEFAULTS["replicas"]), scoping_rate=0)


# method → the settings tried, each with every schedule
GRIDS: dict[str, list[Config]] = {
    "SGD": [SGD | dict(lr=lr) for lr in (0.05, 0.1, 0.2)],
    "SGD, 3 × the steps": [SGD | dict(lr=lr) for lr in (0.05, 0.1, 0.2)],
    "local SGD": [LOCAL_SGD | dict(lr=lr) for lr in (0.05, 0.1)],
    "DiLoCo": [DILOCO | dict(outer_lr=step / (1 + COUPLING_MAX)) for step in (0.3, 0.5, 0.7)],
    "Elastic-SGD": [ELASTIC_SGD | dict(rho=rho) for rho in (0.1, 1 / 3)],
    "Parle": [dict(rho=rho) for rho in (0.01, 0.03, 0.1)] + [constant_outer_step(rho) for rho in (0.01, 0.03, 0.1)],
}
LENGTH_FACTOR = {"SGD, 3 × the steps": 3}
BASELINES = ("SGD", "SGD, 3 × the steps", "local SGD")
COLORS = dict(zip(GRIDS, ("gray", "black", "tab:brown", "tab:orange", "tab:green", "tab:purple"), strict=True))
Trial = tuple[str, Config, int]


def select_trials() -> Iterator[Trial]:
    """Yield the trials on validation images, schedule by schedule."""
    for schedule, (method, configs) in itertools.product(SCHEDULES, GRIDS.items()):
        for config in configs:
            yield SELECTION_TASK, selection_config(method, config, schedule), SELECTION_SEED


def selection_config(method: str, config: Config, schedule: str) -> Config:
    length = SELECTION_LENGTH * LENGTH_FACTOR.get(method, 1)
    return config | dict(length=length, schedule=schedule, averages=AVERAGES, split="validation", amp=True)


def test_trials(tasks: Iterable[str]) -> Iterator[Trial]:
    """Yield the trials on test images with the selected settings, once all of them have been selected."""
    for task in tasks:
        for length, seeds in TESTS[task].items():
            for seed, method, averaged in itertools.product(seeds, GRIDS, (False, True)):
                yield task, test_config(method, length, averaged), seed


def test_config(method: str, length: int, averaged: bool) -> Config:
    config, schedule, _ = selected(method, averaged)
    length *= LENGTH_FACTOR.get(method, 1)
    return config | dict(length=length, schedule=schedule, averages=AVERAGES, amp=True)


def selected(method: str, averaged: bool) -> tuple[Config, str, float]:
    """Return the setting, the schedule and the decay (0 without averaging) with the lowest validation error."""
    tried = list(validation_errors(method))
    if len(tried) < len(GRIDS[method]) * len(SCHEDULES):
        raise SystemExit(f"Run the selection first: not every setting of {method} has been tried")
    candidates = [
        (math.inf if math.isnan(error) else error, number, schedule, decay)
        for number, schedule, errors in tried
        for decay, error in errors.items()
        if (decay > 0) == averaged
    ]
    _, number, schedule, decay = min(candidates)
    return GRIDS[method][number], schedule, decay


def validation_errors(method: str) -> Iterator[tuple[int, str, dict[float, float]]]:
    """Yield the number of a setting, its schedule and its errors by decay, NaN if it diverged."""
    for (number, config), schedule in itertools.product(enumerate(GRIDS[method]), SCHEDULES):
        rows = rows_of(SELECTION_TASK, selection_config(method, config, schedule))
        if rows:
            yield number, schedule, errors_by_decay(rows[-1])


def rows_of(task: str, config: Config) -> list[dict[str, Any]]:
    """Return the rows of a config, in the order of their seeds."""
    rows = rows_by_key(results.digest(NAME)) if results.exists(NAME) else {}
    return sorted(rows.get(config_key(task, config), []), key=lambda row: row["seed"])


@functools.cache
def rows_by_key(digest: str) -> dict[str, list[dict[str, Any]]]:
    """Return config key → rows, cached by the checksum of the rows."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in results.read_rows(NAME):
        rows.setdefault(config_key(row["task"], row["config"]), []).append(row)
    return rows


def errors_by_decay(row: dict[str, Any]) -> dict[float, float]:
    if row["error"] is None:
        return dict.fromkeys([0.0, *row["config"]["averages"]], math.nan)
    return {0.0: row["error"]} | {float(decay): error for decay, error in row["averaged_errors"].items()}


def test_errors(task: str, method: str, length: int, averaged: bool) -> list[float]:
    """Return the test errors of the seeds that have been run with the selected setting."""
    _, _, decay = selected(method, averaged)
    return [errors_by_decay(row)[decay] for row in rows_of(task, test_config(method, length, averaged))]


# Tables and figure


def describe(method: str, config: Config) -> str:
    """Return what distinguishes a setting from the others of its method."""
    if method in ("SGD", "SGD, 3 × the steps", "local SGD"):
        return f"lr {config['lr']}"
    if method == "DiLoCo":
        return f"outer lr {config['outer_lr'] * (1 + COUPLING_MAX):.1f}"
    return f"ρ = {config['rho']:.2g}" + (", outer step 0.85" if "outer_lr" in config else "")


def selection() -> str:
    """Return the validation error of every setting that was tried, without and with each average."""
    lines = []
    for method, configs in GRIDS.items():
        for number, schedule, errors in validation_errors(method):
            cells = ["diverged" if math.isnan(error) else f"{error:.2f}" for error in errors.values()]
            lines.append([method, describe(method, configs[number]), schedule, *cells])
    header = ["method", "setting", "lr schedule", "not averaged, %", *(f"decay {decay}, %" for decay in AVERAGES)]
    return results.markdown_table(header, lines)


def table() -> str:
    """Return the test errors with the selected settings, compared with SGD of matched steps and matched compute."""
    lines = []
    for task, lengths in TESTS.items():
        for length, averaged, method in itertools.product(sorted(lengths), (False, True), GRIDS):
            errors = test_errors(task, method, length, averaged)
            if not errors:
                continue
            config, schedule, decay = selected(method, averaged)
            setting = f"{describe(method, config)}, {schedule}" + (f", decay {decay}" if averaged else "")
            against = [compare_with(name, task, method, length, averaged) for name in BASELINES]
            steps = f"{length * trials.TASKS[task].steps:,}"
            cells = [task, steps, "yes" if averaged else "no", method, setting, format_errors(errors), len(errors)]
            lines.append([*cells, *against])
    header = ["task", "steps per replica", "averaged", "method", "selected setting", "test error, %", "seeds"]
    return results.markdown_table([*header, *(f"against {name}" for name in BASELINES)], lines)


def compare_with(baseline: str, task: str, method: str, length: int, averaged: bool) -> str:
    """Format the difference to a baseline that is averaged as the method is."""
    if method == baseline:
        return ""
    return compare(*(test_errors(task, name, length, averaged) for name in (method, baseline)))


def draw() -> None:
    results.save_figure(draw_errors(), NAME, NAME, dpi=90)


def draw_errors(task: str = SELECTION_TASK) -> Figure:
    """Plot test error against steps per replica, without and with averaging."""
    lengths, unit = sorted(TESTS[task]), trials.TASKS[task].steps
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axis, averaged in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for method, color in COLORS.items():
            errors = {length: test_errors(task, method, length, averaged) for length in lengths}
            points = [
                (length * unit, values)
                for length, values in errors.items()
                if values and not any(map(math.isnan, values))
            ]
            means = [statistics.mean(values) for _, values in points]
            deviations = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points]
            style = dict(color=color, capsize=2, markersize=4, label=method)
            axis.errorbar([steps for steps, _ in points], means, deviations, fmt="o-", **style)
        axis.set(xscale="log", xlabel="steps per replica")
        axis.set_title("averaged over time" if averaged else "not averaged", fontsize=10)
        axis.set_xticks([length * unit for length in lengths], [f"{length * unit:,}" for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test error (%)")
    figure.axes[1].legend(fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("select", "test"), nargs="?", help="what to run (default: both)")
    parser.add_argument("--tasks", nargs="+", choices=TESTS, default=TESTS, metavar="TASK", help="tasks to test")
    parser.add_argument("--data", type=Path, metavar="DIR", help="raw data in torchvision's layout (else downloaded)")
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="checkpoints, from which a later call resumes")
    parser.add_argument("--table", action="store_true", help="print the tables and exit")
    parser.add_argument("--plot", action="store_true", help="draw the figure and exit")
    args = parser.parse_args()
    if args.table:
        print(selection(), end="\n\n", flush=True)  # which may be incomplete
        print(table())
    if args.plot:
        draw()
    if args.table or args.plot:
        return
    if args.stage != "test":
        trials.run_missing(NAME, select_trials(), args.data, args.proc, args.checkpoints)
    if args.stage != "select":
        trials.run_missing(NAME, test_trials(args.tasks), args.data, args.proc, args.checkpoints)


if __name__ == "__main__":
    main()
