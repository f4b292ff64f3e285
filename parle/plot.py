"""Draw runs from their logs: errors, training loss, how far apart the replicas are and how tightly they are held.

python plot.py runs/…                       # into runs/…/plot.png
python plot.py runs/a runs/b -o both.svg    # overlaid, a colour each
"""

import argparse
import io
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, LogLocator, NullLocator
from PIL import Image

from parle import cli, experiment

MOST = 200  # points of a curve; with more of them each is the mean of neighbours
FEW = 30  # points that a curve shows as such
MASTER = dict(linewidth=2.0, marker="o", markersize=4)
ENSEMBLE = dict(linewidth=1.2, linestyle="--", marker="D", markersize=2.5)
REPLICA = dict(linewidth=0.7, marker=".", markersize=4, alpha=0.5)
SOLID = dict(linewidth=1.4, marker=".")
DASHED = SOLID | dict(linestyle="--")
LOST = dict(linewidth=0, marker="x", markersize=5)
SUFFIXES = (".png", ".svg", ".pdf")
SIGNS = {"replicas": "n", "sync_every": "L", "gamma": "γ", "rho": "ρ", "alpha": "α"}
SPEAK_FOR_THEMSELVES = ("model", "dataset", "method")

Columns = dict[str, np.ndarray]


class Run(NamedTuple):
    """What a log tells. Columns are by name, an element an event; what is null there, having diverged, is NaN."""

    folder: Path
    arguments: dict[str, Any]
    rounds: Columns
    evals: Columns  # those of the replicas, (evaluations, n), are NaN where there was no such replica then
    lost: np.ndarray  # rounds in which a replica was


def read(folder: Path) -> Run:
    """The log of a run, be it still running. Raises: Mistake."""
    path = folder / "log.jsonl"
    try:
        *lines, _ = path.read_text().split("\n")  # behind the last newline is what is being written
        events = [json.loads(line) for line in lines]
        told = {kind: [event for event in events if event["event"] == kind] for kind in ("round", "eval", "lost")}
        if not told["round"]:
            raise cli.Mistake(f"{path} has no round yet: wait for one, or leave this run out")
        starts = [event["arguments"] for event in events if event["event"] in ("start", "resume")]
        common = ("round", "epoch", "seconds")
        return Run(
            folder,
            dict(starts[-1]),
            _columns(told["round"], *common, "loss", "gamma", "rho", "spread"),
            _columns(told["eval"], *common, "master_error", "replica_errors", "ensemble_error", "distances"),
            np.array([event["round"] for event in told["lost"]], dtype=float),
        )
    except OSError as error:
        raise cli.Mistake(f"{error}: name the folder of a run") from error
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise cli.Mistake(f"{path} is not the log of a run ({type(error).__name__}: {error})") from error


def _columns(events: list[dict[str, Any]], *names: str) -> Columns:
    columns = {}
    for name in names:
        values = [event[name] for event in events]
        if values and isinstance(values[0], list):  # a run may have been resumed with another number of replicas
            values = list(zip(*itertools.zip_longest(*values), strict=True))
        columns[name] = np.array(values, dtype=float)
    return columns


def labels(runs: Sequence[Run]) -> list[str]:
    """For each run what tells it from the others: as few arguments as do, and its folder where they do not."""
    known = dict.fromkeys(name for run in runs for name in run.arguments)
    order = [*SPEAK_FOR_THEMSELVES, *(name for name in known if name not in SPEAK_FOR_THEMSELVES and name != "seed")]
    chosen: list[str] = []
    apart = 1
    for name in [*order, "seed"]:
        kinds = len({_label(run, [*chosen, name]) for run in runs})
        if name not in experiment.MACHINE and kinds > apart:
            chosen, apart = [*chosen, name], kinds
    if apart == len(runs):
        return [_label(run, chosen) for run in runs]
    return [", ".join(filter(None, (_label(run, chosen), str(run.folder)))) for run in runs]


def _label(run: Run, names: Sequence[str]) -> str:
    def told(name: str) -> str:
        value = run.arguments.get(name)
        value = " ".join(map(_short, value)) or "none" if isinstance(value, list) else _short(value)
        return value if name in SPEAK_FOR_THEMSELVES else f"{SIGNS.get(name, name.replace('_', '-'))}={value}"

    return ", ".join(map(told, names))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(runs: Sequence[Run]) -> Figure:
    """Test error and training loss against epochs and seconds; distances and coefficients against epochs."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    (error, error_time), (loss, loss_time), (distance, coefficient) = figure.subplots(3, 2)
    colors = _colors(len(runs))
    for run, color in zip(runs, colors, strict=True):
        for against, errors, losses in (("epoch", error, loss), ("seconds", error_time, loss_time)):
            _curve(errors, run.evals[against], run.evals["replica_errors"], color, REPLICA)
            _curve(errors, run.evals[against], run.evals["ensemble_error"], color, ENSEMBLE)
            _curve(errors, run.evals[against], run.evals["master_error"], color, MASTER)
            _curve(losses, run.rounds[against], run.rounds["loss"], color, SOLID)
        epochs = run.rounds["epoch"]
        _curve(distance, run.evals["epoch"], _positive(run.evals["distances"]), color, REPLICA)
        _curve(distance, epochs[:-1], _positive(run.rounds["spread"][1:]), color, SOLID)  # logged a line late
        _curve(coefficient, epochs, _positive(run.rounds["gamma"]), color, SOLID)
        _curve(coefficient, epochs, _positive(run.rounds["rho"]), color, DASHED)

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
    _legend(coefficient, **{"γ, to the anchor": SOLID, "ρ L n, to the mean": DASHED})
    for run, color in zip(runs, colors, strict=True):
        if len(run.lost):
            _legend(loss, **{"a replica was lost": LOST})
            for axes in (error, error_time, loss, loss_time, distance):
                when = run.rounds["seconds" if axes in (error_time, loss_time) else "epoch"]
                when = np.interp(run.lost, run.rounds["round"], when)
                axes.plot(when, 0.03 + 0 * when, color=color, transform=axes.get_xaxis_transform(), **LOST)
    _name(figure, runs, colors)
    return figure


def _colors(count: int) -> Sequence[Any]:
    if count <= 10:
        return matplotlib.color_sequences["petroff10"][:count]  # made to be told apart by everybody
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count))


def _name(figure: Figure, runs: Sequence[Run], colors: Sequence[Any]) -> None:
    """One run by a title, several by a legend of what tells them apart."""
    if len(runs) == 1:
        figure.suptitle(_label(runs[0], [*SPEAK_FOR_THEMSELVES, "replicas", "sync_every", "seed"]))
        return
    shared = [name for name in SPEAK_FOR_THEMSELVES if len({_label(run, [name]) for run in runs}) == 1]
    figure.suptitle(_label(runs[0], shared))
    names = labels(runs)
    ncols = max(1, 110 // (8 + max(map(len, names))))  # of the 110 letters that the figure is wide
    figure.set_figheight(8 + 0.2 * math.ceil(len(names) / ncols))
    lines = [Line2D([], [], color=color, linewidth=3) for color in colors]
    figure.legend(lines, names, loc="outside lower center", ncols=ncols, frameon=False, fontsize="small")


def save(figure: Figure, path: Path) -> None:
    """Raises: OSError."""
    if path.suffix != ".png":
        with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters, not their outlines
            figure.savefig(path)
        return
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=120)
    Image.open(pixels).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the bytes, for a repository


def _positive(values: np.ndarray) -> np.ndarray:
    """Without zeros, which no logarithmic scale can show: a replica that is where the master is, and no coupling."""
    return np.where(values > 0, values, np.nan)


def _curve(axes: Axes, xs: np.ndarray, ys: np.ndarray, color: Any, style: dict[str, Any]) -> None:
    if len(xs) > MOST:
        xs, ys = (np.array([part.mean(0) for part in np.array_split(values, MOST)]) for values in (xs, ys))
    axes.plot(xs, ys, color=color, **style | ({} if len(xs) <= FEW else {"marker": None}))


def _finish(axes: Axes, ylabel: str = "", xlabel: str = "") -> None:
    """Labels, and a logarithmic scale where every value allows it."""
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
    """What a style means, whatever the colour."""
    lines = [Line2D([], [], color="dimgray", **style) for style in styles.values()]
    axes.legend(lines, list(styles), frameon=False, fontsize="small")


def main() -> None:
    parser = cli.Parser(prog="plot.py", description="Draw runs, from their logs.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder; several are overlaid")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help=".png, .svg or .pdf (plot.png in the first RUN)")
    try:
        run(parser.parse_args())
    except cli.Mistake as error:
        cli.tell(parser.prog, error)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    out = args.out or args.runs[0] / "plot.png"
    if out.suffix not in SUFFIXES:
        raise cli.Mistake(f"-o {out}: use a name that ends in {', '.join(SUFFIXES)}")
    figure = draw([read(folder) for folder in args.runs])
    try:
        save(figure, out)
    except OSError as error:
        raise cli.Mistake(f"-o: {error}; name another file") from error
    print(out)


if __name__ == "__main__":
    main()
