"""Plot runs from their logs: test errors, training loss, distances between replicas and coupling coefficients.

python -m parle.plot runs/...                       # writes runs/.../plot.png
python -m parle.plot runs/a runs/b -o both.svg      # overlaid, one color per run
"""

import argparse
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # matplotlib may not have the backend of a notebook, and files need none
    os.environ.pop("MPLBACKEND", None)

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, LogLocator, NullLocator
from PIL import Image

from parle import cli, experiment, streams

MAX_POINTS = 200  # of a curve; with more events, each point is the mean of neighbors
MAX_MARKERS = 30  # of a curve; with more points, none has a marker
MASTER = dict(linewidth=2.0, marker="o", markersize=4)
ENSEMBLE = dict(linewidth=1.2, linestyle="--", marker="D", markersize=2.5)
REPLICA = dict(linewidth=0.7, marker=".", markersize=4, alpha=0.5)
SOLID = dict(linewidth=1.4, marker=".")
DASHED = SOLID | dict(linestyle="--")
NONFINITE = dict(linewidth=0, marker="x", markersize=5)
SUFFIXES = (".png", ".svg", ".pdf")
SYMBOLS = {"replicas": "n", "sync_every": "L", "gamma": "γ", "rho": "ρ", "alpha": "α"}
UNLABELED = ("model", "dataset", "method")  # their values need no name beside them

# Names of version 1 of the log that version 2 changed
VERSION_1_EVENTS = {"lost": "nonfinite"}
VERSION_1_ARGUMENTS = {"outer_step": "outer_lr_scale", "whiten": "zca"}
VERSION_1_KEYS = {
    "seconds": "train_seconds",
    "loss": "train_loss",
    "gamma": "gamma_k",
    "rho": "coupling_k",
    "spread": "replica_distance_rms",
    "distances": "replica_distances",
}

Columns = dict[str, np.ndarray]


class Run(NamedTuple):
    """The contents of a log. Columns have one element per event; null, which stands for NaN or infinity, is NaN."""

    folder: Path
    arguments: dict[str, Any]
    rounds: Columns
    evals: Columns  # per-replica columns are (evaluations, n), NaN where a run had fewer replicas
    nonfinite: np.ndarray  # rounds in which a replica was not finite


def read(folder: Path) -> Run:
    """Return the log of a run, which may still be running. Raises: UsageError."""
    path = folder / "log.jsonl"
    try:
        *lines, _ = path.read_text().split("\n")  # the part after the last newline is being written
        events = _upgrade([json.loads(line) for line in lines])
        by_kind = {
            kind: [event for event in events if event["event"] == kind] for kind in ("round", "eval", "nonfinite")
        }
        if not by_kind["round"]:
            raise cli.UsageError(f"{path} has no round yet: wait for one, or leave this run out")
        starts = [event["arguments"] for event in events if event["event"] in ("start", "resume")]
        common = ("round", "epoch", "train_seconds")
        return Run(
            folder,
            dict(starts[-1]),
            _columns(by_kind["round"], *common, "train_loss", "gamma_k", "coupling_k", "replica_distance_rms"),
            _columns(by_kind["eval"], *common, "master_error", "replica_errors", "ensemble_error", "replica_distances"),
            np.array([event["round"] for event in by_kind["nonfinite"]], dtype=float),
        )
    except OSError as error:
        raise cli.UsageError(f"{path}: {error.strerror}; use the output directory of a run") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise cli.UsageError(f"{path} is not the log of a run ({type(error).__name__}: {error})") from error


def _upgrade(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the events of a version 1 log the names of version 2."""
    if not events or "log_version" in events[0]:
        return events
    upgraded = []
    for event in events:
        new = {VERSION_1_KEYS.get(key, key): value for key, value in event.items()}
        new["event"] = VERSION_1_EVENTS.get(event["event"], event["event"])
        if "arguments" in event:
            new["arguments"] = {VERSION_1_ARGUMENTS.get(key, key): value for key, value in event["arguments"].items()}
        upgraded.append(new)
    return upgraded


def _columns(events: list[dict[str, Any]], *names: str) -> Columns:
    columns = {}
    for name in names:
        values = [event[name] for event in events]
        if values and isinstance(values[0], list):  # a run may have been resumed with another number of replicas
            values = list(zip(*itertools.zip_longest(*values), strict=True))
        columns[name] = np.array(values, dtype=float)
    return columns


def labels(runs: Sequence[Run]) -> list[str]:
    """Return a label for each run: the fewest arguments that distinguish it, or else its directory."""
    known = dict.fromkeys(name for run in runs for name in run.arguments)
    order = [*UNLABELED, *(name for name in known if name not in UNLABELED and name != "seed")]
    chosen: list[str] = []
    distinct = 1
    for name in [*order, "seed"]:
        kinds = len({_label(run, [*chosen, name]) for run in runs})
        if name not in experiment.LOCAL_ARGUMENTS and kinds > distinct:
            chosen, distinct = [*chosen, name], kinds
    if distinct == len(runs):
        return [_label(run, chosen) for run in runs]
    folders = [os.fsencode(run.folder).decode(errors="replace") for run in runs]  # fonts need valid Unicode
    return [", ".join(filter(None, (_label(run, chosen), folder))) for run, folder in zip(runs, folders, strict=True)]


def _label(run: Run, names: Sequence[str]) -> str:
    def text(name: str) -> str:
        value = run.arguments.get(name)
        value = " ".join(map(_short, value)) or "none" if isinstance(value, list) else _short(value)
        return value if name in UNLABELED else f"{SYMBOLS.get(name, name.replace('_', '-'))}={value}"

    return ", ".join(map(text, names))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot_runs(runs: Sequence[Run]) -> Figure:
    """Plot test error and training loss over epochs and seconds, distances and coefficients over epochs."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    (error, error_time), (loss, loss_time), (distance, coefficient) = figure.subplots(3, 2)
    colors = _colors(len(runs))
    for run, color in zip(runs, colors, strict=True):
        for x, errors, losses in (("epoch", error, loss), ("train_seconds", error_time, loss_time)):
            _curve(errors, run.evals[x], run.evals["replica_errors"], color, REPLICA)
            _curve(errors, run.evals[x], run.evals["ensemble_error"], color, ENSEMBLE)
            _curve(errors, run.evals[x], run.evals["master_error"], color, MASTER)
            _curve(losses, run.rounds[x], run.rounds["train_loss"], color, SOLID)
        epochs = run.rounds["epoch"]
        _curve(distance, run.evals["epoch"], _positive(run.evals["replica_distances"]), color, REPLICA)
        _curve(
            distance, epochs[:-1], _positive(run.rounds["replica_distance_rms"][1:]), color, SOLID
        )  # logged one event late
        _curve(coefficient, epochs, _positive(run.rounds["gamma_k"]), color, SOLID)
        _curve(coefficient, epochs, _positive(run.rounds["coupling_k"]), color, DASHED)

    for here, there in ((error_time, error), (loss_time, loss)):
        here.sharey(there)
        here.tick_params(labelleft=False)
    for here, there in ((error, loss), (error_time, loss_time)):
        here.sharex(there)
        here.tick_params(labelbottom=False)
    _finish(error, "test error (%)")
    _finish(error_time)
    _finish(loss, "training loss", "epochs (L passes over the data each)")
    _finish(loss_time, "", "seconds of training")
    _finish(distance, "relative distance to master", "epochs")
    _finish(coefficient, "coupling coefficient", "epochs")
    _legend(error, master=MASTER, ensemble=ENSEMBLE, replicas=REPLICA)
    _legend(distance, **{"root mean square": SOLID, "replicas": REPLICA})
    _legend(coefficient, **{"γ_k, to the anchor": SOLID, "c_k, to the mean": DASHED})
    for run, color in zip(runs, colors, strict=True):
        if len(run.nonfinite):
            _legend(loss, **{"a replica was NaN or infinite": NONFINITE})
            for axes in (error, error_time, loss, loss_time, distance):
                when = run.rounds["train_seconds" if axes in (error_time, loss_time) else "epoch"]
                when = np.interp(run.nonfinite, run.rounds["round"], when)
                axes.plot(when, 0.03 + 0 * when, color=color, transform=axes.get_xaxis_transform(), **NONFINITE)
    _add_title(figure, runs, colors)
    return figure


def _colors(count: int) -> Sequence[Any]:
    if count <= 10:
        return matplotlib.color_sequences["petroff10"][:count]  # distinguishable with color blindness
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count))


def _add_title(figure: Figure, runs: Sequence[Run], colors: Sequence[Any]) -> None:
    """Add the title, and for several runs a legend of their differences."""
    if len(runs) == 1:
        figure.suptitle(_label(runs[0], [*UNLABELED, "replicas", "sync_every", "seed"]))
        return
    shared = [name for name in UNLABELED if len({_label(run, [name]) for run in runs}) == 1]
    figure.suptitle(_label(runs[0], shared))
    names = labels(runs)
    ncols = max(1, 110 // (8 + max(map(len, names))))  # the figure is 110 characters wide
    figure.set_figheight(8 + 0.2 * math.ceil(len(names) / ncols))
    lines = [Line2D([], [], color=color, linewidth=3) for color in colors]
    figure.legend(lines, names, loc="outside lower center", ncols=ncols, frameon=False, fontsize="small")


def save(figure: Figure, path: Path) -> None:
    """Raises: OSError."""
    if path.suffix != ".png":
        with matplotlib.rc_context({"svg.fonttype": "none"}):  # text instead of outlines
            figure.savefig(path)
        return
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=120)
    Image.open(pixels).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the bytes


def _positive(values: np.ndarray) -> np.ndarray:
    """Replace zeros, which a logarithmic scale cannot show, by NaN."""
    return np.where(values > 0, values, np.nan)


def _curve(axes: Axes, xs: np.ndarray, ys: np.ndarray, color: Any, style: dict[str, Any]) -> None:
    if len(xs) > MAX_POINTS:
        xs, ys = (np.array([part.mean(0) for part in np.array_split(values, MAX_POINTS)]) for values in (xs, ys))
    axes.plot(xs, ys, color=color, **style | ({} if len(xs) <= MAX_MARKERS else {"marker": None}))


def _finish(axes: Axes, ylabel: str = "", xlabel: str = "") -> None:
    """Set labels, and a logarithmic scale if all values are positive."""
    axes.set_ylabel(ylabel)
    axes.set_xlabel(xlabel)
    axes.grid(linewidth=0.5, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    values = np.concatenate([np.ravel(line.get_ydata()) for line in axes.lines] or [[]])
    values = values[np.isfinite(values)]
    if not len(values):
        axes.set_yticks([])
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="gray")
    elif values.min() > 0:
        axes.set_yscale("log")
        decades = np.log10(values.max() / values.min())
        axes.yaxis.set_major_locator(
            AutoLocator() if decades < 0.6 else LogLocator(subs=(1, 2, 3, 5) if decades < 2 else (1,))
        )
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def _legend(axes: Axes, **styles: dict[str, Any]) -> None:
    """Add a legend of line styles, in gray."""
    lines = [Line2D([], [], color="dimgray", **style) for style in styles.values()]
    axes.legend(lines, list(styles), frameon=False, fontsize="small")


def main() -> None:
    parser = cli.Parser(prog="python -m parle.plot", description="Plot runs from their logs.", allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output directory of a run; several are overlaid"
    )
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="figure, .png, .svg or .pdf (default: plot.png in the first RUN)"
    )
    try:
        run(parser.parse_args())
    except cli.UsageError as error:
        cli.print_error(parser.prog, error)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    out = args.out or args.runs[0] / "plot.png"
    if out.suffix not in SUFFIXES:
        raise cli.UsageError(f"-o {out}: choose a name that ends in {', '.join(SUFFIXES)}")
    runs = [read(folder) for folder in args.runs]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's matplotlibrc may ask for LaTeX or another layout
        matplotlib.rcParams["text.parse_math"] = False  # names of directories may contain $
        figure = plot_runs(runs)
        try:
            save(figure, out)
        except OSError as error:
            raise cli.UsageError(f"-o: {error}; choose another file") from error
    print(out)


if __name__ == "__main__":
    streams.prepare_streams()
    main()
