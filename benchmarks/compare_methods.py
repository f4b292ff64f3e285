"""Compare Parle with SGD, local SGD, DiLoCo and Elastic-SGD on small tasks, and sweep Parle's hyperparameters.

    python benchmarks/compare_methods.py --data DIR                # run all missing trials, on all cores: hours
    python benchmarks/compare_methods.py --data DIR methods rho    # run two panels only
    python benchmarks/compare_methods.py --table                   # print the tables
    python benchmarks/compare_methods.py --plot                    # draw figures/compare_methods.png and sweeps.png

SGD runs with matched steps (the steps of one replica) and with matched compute (the total gradient evaluations of three
replicas). The panel "new-seeds" repeats the selected setting with seeds that were not used to select it. trials.py runs
the trials.

The controls "1 replica, ρ = 0.3", "2 replicas, ρ = 0.15" and "6 replicas, ρ = 0.05" have the same c_k, and therefore
the same outer step, as three replicas with ρ = 0.1: they differ in the number of replicas only.
"""

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import results, trials
from benchmarks.trials import DEFAULTS, ELASTIC_SGD, SGD, Config, config_key
from parle.algorithm import COUPLING_MAX, PRESETS

NAME = Path(__file__).stem
SEEDS, NEW_SEEDS = (42, 43, 44), (45, 46, 47)
SUMMARY_LENGTHS, TABLE_LENGTHS = (1, 4, 12), (1, 3, 4, 12, 36)  # in units of Task.steps

TASKS = ("cifar-5000", "mnist-2000")

LARGE_OUTER_LR: Config = dict(outer_lr=0.5, outer_momentum=0.5)
METHODS: dict[str, Config] = {
    "SGD": SGD,
    "Entropy-SGD": PRESETS["entropy-sgd"],
    "Elastic-SGD": ELASTIC_SGD,
    "Parle": {},
    "Parle, ρ = 0.1": dict(rho=0.1),
    "Parle, 1 replica, ρ = 0.3": dict(replicas=1, rho=0.3),
    "Parle, 2 replicas, ρ = 0.15": dict(replicas=2, rho=0.15),
    "Parle, 6 replicas, ρ = 0.05": dict(replicas=6, rho=0.05),
    "local SGD": trials.LOCAL_SGD,
    "DiLoCo": trials.DILOCO,
    "Parle, outer lr 0.5": LARGE_OUTER_LR,
    "Parle, outer lr 0.5, no scoping": LARGE_OUTER_LR | dict(scoping_rate=0),
}
SELECTED, ONE_REPLICA, LOCAL_SGD = "Parle, ρ = 0.1", "Parle, 1 replica, ρ = 0.3", "local SGD"
COLORS = {
    "SGD": "gray",
    LOCAL_SGD: "tab:brown",
    "Elastic-SGD": "tab:green",
    "Parle": "tab:blue",
    SELECTED: "tab:purple",
    ONE_REPLICA: "tab:pink",
    "Parle, outer lr 0.5": "tab:orange",
}
# hyperparameter → its values, and the methods in which it is changed
SWEEPS: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "outer_lr": ((0.1, 0.25, 0.5, 0.7), ("Parle, outer lr 0.5",)),
    "outer_momentum": ((0.0, 0.5, 0.7, 0.9), ("Parle, outer lr 0.5",)),
    "gamma": ((0.0, 0.001, 0.003, 0.01, 0.03, 0.1), ("Parle", "Parle, outer lr 0.5")),
    "rho": ((0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3), ("Parle", "Parle, outer lr 0.5")),
    "alpha": ((0.0, 0.75, 0.9), ("Parle, outer lr 0.5",)),
    "sync_every": ((5, 10, 25, 50, 100, "auto"), ("Parle, outer lr 0.5",)),
    "replicas": ((1, 2, 3, 6, 8), ("Parle, outer lr 0.5",)),
    "scoping_rate": ((0, 1, 4), ("Parle, outer lr 0.5",)),
    "weight_decay": ((0.0, 1e-3, 3e-3), ("Parle, outer lr 0.5",)),
    "frac": ((0.34, 0.5, 1.0), ("SGD", "Parle", "Parle, outer lr 0.5")),
    "decay_inner_lr": ((False, True), ("Parle",)),
    "keep_inner_momentum": ((False, True), ("Parle", "Parle, outer lr 0.5")),
}
PANELS: dict[str, list[Config]] = {
    "methods": [SGD, SGD | dict(length=3), *list(METHODS.values())[1:]],
    "long": [SGD | dict(length=12), *(METHODS[name] | dict(length=4) for name in METHODS if name != "Entropy-SGD")],
    "longest": [METHODS[name] | dict(length=12) for name in ("Parle", SELECTED, ONE_REPLICA, LOCAL_SGD)],
    "new-seeds": [METHODS[name] | dict(length=n) for n in (4, 12) for name in ("SGD", ONE_REPLICA, SELECTED)],
}
PANELS["longest"] += [SGD | dict(length=36)]
PANELS["new-seeds"] += [METHODS[LOCAL_SGD] | dict(length=4)]
PANELS |= {
    parameter: [METHODS[method] | {parameter: value} for method in methods for value in values]
    for parameter, (values, methods) in SWEEPS.items()
}


# Rows


def missing_trials(panels: Iterable[str]) -> Iterator[tuple[str, Config, int]]:
    """Yield the trials without a row, seed by seed. MNIST has the panel "methods" only."""
    return trials.missing(
        NAME,
        (
            (task, config, seed)
            for seed in SEEDS + NEW_SEEDS
            for task in TASKS
            for panel in panels
            for config in PANELS[panel]
            if (panel == "new-seeds") == (seed in NEW_SEEDS) and not (task == "mnist-2000" and panel != "methods")
        ),
    )


def test_errors(task: str, config: Config, seeds: Iterable[int] = SEEDS) -> list[float]:
    """Return the test errors of the seeds that have been run; NaN stands for a trial that diverged."""
    by_seed = errors_by_config(results.digest(NAME)).get(config_key(task, config), {})
    return [by_seed[seed] for seed in seeds if seed in by_seed]


@functools.cache
def errors_by_config(digest: str) -> dict[str, dict[int, float]]:
    """Return config key → seed → test error, cached by the checksum of the rows."""
    errors: dict[str, dict[int, float]] = {}
    for row in results.read_rows(NAME):
        error = math.nan if row["error"] is None else row["error"]
        errors.setdefault(config_key(row["task"], row["config"]), {})[row["seed"]] = error
    return errors


# Tables


def compare(ours: list[float], theirs: list[float], digits: int = 2) -> str:
    """Format the difference of the means with the p value of Welch's t-test; below 5 % it is significant."""
    if not theirs:
        return "not run"
    if any(map(math.isnan, [*ours, *theirs])):
        return "diverged"
    difference = statistics.mean(ours) - statistics.mean(theirs)
    n = f"n = {len(ours)}, {len(theirs)}"
    if min(len(ours), len(theirs)) < 2:
        return f"{difference:+.{digits}f} ({n})"
    p = stats.ttest_ind(ours, theirs, equal_var=False).pvalue
    result = "not significant" if p >= 0.05 else "better" if difference < 0 else "worse"
    return f"{difference:+.{digits}f}, {result} (p = {p:.3g}, {n})"


def format_errors(errors: list[float]) -> str:
    diverged = sum(map(math.isnan, errors))
    return f"diverged ({diverged} of {len(errors)})" if diverged else results.mean_std(errors)


def method_name(config: Config) -> str:
    """Return the name of a config's method, whatever its length."""
    return next(name for name, known in METHODS.items() if DEFAULTS | known == DEFAULTS | config | dict(length=1))


def table() -> str:
    """Compare every method with SGD at matched steps and at matched compute."""
    header = ["task", "method", "steps per replica", "total gradient evaluations", "test error, %", "seeds"]
    header += ["against SGD, matched steps", "against SGD, matched compute"]
    lines = []
    for task in TASKS:
        for length in TABLE_LENGTHS:
            for name, method in METHODS.items():
                errors = test_errors(task, method | dict(length=length))
                if not errors:
                    continue
                steps, n = length * trials.TASKS[task].steps, (DEFAULTS | method)["replicas"]
                sgd = [test_errors(task, SGD | dict(length=factor * length)) for factor in (1, n)]
                against = ["" if name == "SGD" else compare(errors, baseline) for baseline in sgd]
                lines.append([task, name, f"{steps:,}", f"{steps * n:,}", format_errors(errors), len(errors), *against])
    return results.markdown_table(header, lines)


def summary() -> str:
    """Return test errors by number of steps, next to those of SGD with three times the steps."""
    shown, lines = (ONE_REPLICA, LOCAL_SGD, "Elastic-SGD", "Parle", SELECTED), []
    for task in TASKS:
        for length in SUMMARY_LENGTHS:
            configs = [SGD | dict(length=length), SGD | dict(length=3 * length)]
            configs += [METHODS[name] | dict(length=length) for name in shown]
            columns = [test_errors(task, config) for config in configs]
            if sum(map(bool, columns)) > 1:
                cells = [format_errors(errors) if errors else "not run" for errors in columns]
                lines.append([task, f"{length * trials.TASKS[task].steps:,}", *cells])
    return results.markdown_table(["task", "steps per replica", "SGD", "SGD, 3 × the steps", *shown], lines)


def new_seeds(task: str = "cifar-5000") -> str:
    """Compare the selected setting with other methods on NEW_SEEDS, at matched steps and at matched compute."""
    lines = []
    for length, factor in ((4, 1), (4, 3), (12, 1)):
        ours = test_errors(task, METHODS[SELECTED] | dict(length=length), NEW_SEEDS)
        for name in ("SGD", ONE_REPLICA, LOCAL_SGD):
            theirs = test_errors(task, METHODS[name] | dict(length=length * factor), NEW_SEEDS)
            steps, their_steps = (f"{count * trials.TASKS[task].steps:,}" for count in (length, length * factor))
            if ours and theirs:
                comparison = [name, their_steps, format_errors(theirs), compare(ours, theirs)]
                lines.append([steps, format_errors(ours), *comparison])
    header = ["steps per replica", f"{SELECTED}: test error, %", "other method", "its steps", "its test error, %"]
    return results.markdown_table([*header, f"{SELECTED} against it"], lines)


def sweeps() -> str:
    """Return the test error for every value of every swept hyperparameter."""
    lines = []
    for task in TASKS:
        for parameter, (values, methods) in SWEEPS.items():
            for method in methods:
                errors = [(value, test_errors(task, METHODS[method] | {parameter: value})) for value in values]
                cells = [f"{value}: {format_errors(each)}{seed_count(each)}" for value, each in errors if each]
                if len(cells) > 1:
                    lines.append([task, parameter, method, "; ".join(cells)])
    return results.markdown_table(["task", "hyperparameter", "method", "value: test error, %"], lines)


def seed_count(errors: list[float]) -> str:
    """Return the number of seeds, if it is not that of SEEDS."""
    return "" if len(errors) == len(SEEDS) else f" ({len(errors)} of {len(SEEDS)} seeds)"


# Figures


def first_outer_step(config: Config) -> float:
    """Return how far the first round moves the master along x − z, without momentum: outer_lr (1 + c_0)."""
    full = DEFAULTS | config
    outer_lr = full["lr"] if full["outer_lr"] == "lr" else full["outer_lr"]
    return outer_lr * (1 + min(full["rho"] * full["sync_every"] * full["replicas"], COUPLING_MAX))


def plot_errors(
    axis: Axes, x: Iterable[float], configs: list[Config], task: str, *, method: str, fmt: str, **style: Any
) -> None:
    """Plot mean ± standard deviation, and a cross at the upper edge where a trial diverged."""
    errors = [(place, test_errors(task, config)) for place, config in zip(x, configs, strict=True)]
    diverged = [place for place, values in errors if any(map(math.isnan, values))]
    errors = [(place, values) for place, values in errors if values and place not in diverged]
    means = [statistics.mean(values) for _, values in errors]
    deviations = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in errors]
    style = dict(color=COLORS[method], markersize=4, linewidth=1, capsize=2, label=method) | style
    axis.errorbar([place for place, _ in errors], means, deviations, fmt=fmt, **style)
    axis.plot(diverged, [axis.get_ylim()[1] - 0.7] * len(diverged), "x", color=COLORS[method])


def draw() -> None:
    results.save_figure(draw_comparison(), "compare_methods", NAME, dpi=90)
    results.save_figure(draw_sweeps(), "sweeps", NAME, dpi=76)


def draw_comparison(task: str = "cifar-5000") -> Figure:
    """Plot test error against steps per replica, and against the total gradient evaluations."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    time_axis, compute_axis = figure.subplots(1, 2, sharey=True)
    main = {"SGD": "SGD, one worker", LOCAL_SGD: "local SGD, 3 replicas", SELECTED: "Parle, 3 replicas, ρ = 0.1"}
    controls = {
        "Parle": "Parle, 3 replicas, ρ = 0.01 (default)",
        ONE_REPLICA: "Parle, 1 replica, ρ = 0.3",
        "Elastic-SGD": "Elastic-SGD, 3 replicas",
    }
    for axis, labels in ((time_axis, main), (compute_axis, main | controls)):
        for method, label in labels.items():
            configs = [METHODS[method] | dict(length=length) for length in TABLE_LENGTHS]
            evaluations = (DEFAULTS | METHODS[method])["replicas"] if axis is compute_axis else 1
            x = [length * trials.TASKS[task].steps * evaluations for length in TABLE_LENGTHS]
            style = dict(linewidth=2, markersize=5) if method in main else dict(linewidth=1, alpha=0.7)
            plot_errors(
                axis,
                x,
                configs,
                task,
                method=method,
                fmt="o-" if method in main else "o--",
                **style | dict(label=label),
            )
        axis.set(xscale="log", ylim=(30, 50))
        ticks = [1000, 3000, 10_000, 30_000]
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set_yticks(range(30, 51, 5))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    figure.suptitle("Do three coupled replicas reach a lower test error than one network trained with SGD?")
    time_axis.set(xlabel="training steps per replica (time)", ylabel="test error (%), lower is better")
    time_axis.set_title("after the same time (one worker per replica)", fontsize=10)
    compute_axis.set(xlabel="gradient evaluations of all replicas (compute)")
    compute_axis.set_title("after the same compute", fontsize=10)
    return figure


def draw_sweeps(task: str = "cifar-5000") -> Figure:
    """Plot test error against the size of the first outer step, and against each swept hyperparameter."""
    figure = Figure(figsize=(14, 5.6), layout="constrained")
    first, *others = figure.subplots(2, 6, sharey=True).flat
    first.set_ylim(34, 67)
    first.set_title("first outer step, s lr (1 + c₀)", fontsize=10)
    first.set_xscale("log")
    first.minorticks_off()
    first.set_xticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    for method in ("Parle", "Parle, outer lr 0.5"):
        swept = [parameter for parameter in ("outer_lr", "rho") if method in SWEEPS[parameter][1]]
        configs = [METHODS[method] | {parameter: value} for parameter in swept for value in SWEEPS[parameter][0]]
        plot_errors(first, map(first_outer_step, configs), configs, task, method=method, fmt="o")
    for axis, parameter in zip(others, [name for name in SWEEPS if name != "outer_lr"], strict=True):
        values, methods = SWEEPS[parameter]
        for method in methods:
            configs = [METHODS[method] | {parameter: value} for value in values]
            plot_errors(axis, range(len(values)), configs, task, method=method, fmt="o-")
        for style, length in (("--", 1), (":", 3)):
            error = statistics.mean(test_errors(task, SGD | dict(length=length)))
            axis.axhline(error, color="gray", linestyle=style)
        axis.set_xticks(range(len(values)), [f"{value}" for value in values], fontsize=8)
        axis.set_title(parameter, fontsize=10)
    for axis in (first, others[5]):
        axis.set_ylabel("test error (%)")
    note = "Dashed: SGD, matched steps; dotted: SGD, matched compute (3 replicas); ×: diverged; cut off at 67 %"
    figure.suptitle(f"{task}, {trials.TASKS[task].steps:,} steps per replica. {note}", fontsize=10)
    labels = {
        label: handle
        for axis in (first, *others)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=len(labels), fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("panels", nargs="*", metavar="PANEL", help=f"choose from {', '.join(PANELS)} (default: all)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="raw data in torchvision's layout (else downloaded)")
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data")
    parser.add_argument("--table", action="store_true", help="print the tables and exit")
    parser.add_argument("--plot", action="store_true", help="draw the figures and exit")
    args = parser.parse_args()
    if unknown := set(args.panels) - set(PANELS):
        parser.error(f"unknown panel {', '.join(unknown)}; choose from {', '.join(PANELS)}")
    if args.table:
        print(f"{table()}\n\n{new_seeds()}\n\n{sweeps()}")
    if args.plot:
        draw()
    if args.table or args.plot:
        return
    trials.run_missing(NAME, missing_trials(args.panels or PANELS), args.data, args.proc)


if __name__ == "__main__":
    main()
