"""Are Parle's minima flatter than SGD's? Loss under noise on the weights, and along lines from one network to another.

    python benchmarks/flatness.py         # trains LeNet on MNIST, three seeds of Parle and of SGD; measures; draws

Noise of radius r moves every parameter tensor w by r |w|, every network in the same three random directions: a layer
may be scaled, which batch norm undoes, and nothing changes. A line is (1 - t) w + t w'. Every network that is measured
has its batch-norm statistics recomputed first, on 100 mini-batches of training images, as the programs do before a
test; another network's would dominate the loss. Training loss is that of the first 5,000
training images, dropout off.

Parle runs with its defaults, only shorter, so that its lr does not drop. SGD has as many mini-batches as one replica,
and once more as many gradients as all three; its lr drops at 0.6 and 0.8 of both.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import engine
import experiment
import loader
import models
from benchmarks import paper, record
from parle_gpu import Parle

SEEDS = [42, 43, 44]
PARLE = "-m lenet -d mnist -n 3 -B 0.1"  # 47 rounds of 25 mini-batches
SGD = "-m lenet -d mnist --method sgd -B 2.505 --lr-drops 1.5 2"  # as many mini-batches
LONG = "-m lenet -d mnist --method sgd -B 7.516 --lr-drops 4.5 6"  # as many as three replicas
RUNS = {"parle": PARLE, "sgd": SGD, "sgd-long": LONG}
RADII = [0.0, 0.1, 0.2, 0.3, 0.4]
DRAWS = 3
SHARES = [i / 6 for i in range(7)]  # t
TRAINING_IMAGES = 5_000
AGAINST = "SGD, as many gradients"
NETWORKS = ["master", "replica", "SGD", AGAINST]
LINES = {
    "replica to replica": ("replica", "another replica"),
    "replica to master": ("replica", "master"),
    f"master to {AGAINST}": ("master", AGAINST),
}
QUESTIONS = [(of, radius) for of in NETWORKS for radius in RADII] + [(of, None) for of in LINES]  # of each seed

Weights = list[Tensor]  # a network's parameters


def read(folder: Path, data: loader.Dataset) -> tuple[Weights, list[Weights]]:
    """The master and the replicas of a run, from its newest good checkpoint."""
    path, manifest, _ = checkpoint.newest(checkpoint.found(folder / checkpoint.FOLDER))
    args = argparse.Namespace(**manifest["arguments"])
    master, *replicas = (experiment.model(args, data) for _ in range(args.replicas + 1))
    settings = experiment.hyperparameters(args, batches_per_epoch=1)
    optimizer = Parle([replica.parameters() for replica in replicas], **settings)
    checkpoint.load(path, manifest, optimizer, list(range(args.replicas)))
    optimizer.copy_master_to(master)
    first, *others = ([parameter.detach() for parameter in model.parameters()] for model in (master, *replicas))
    return first, others


def noisy(weights: Weights, radius: float, seed: int) -> Weights:
    """Each tensor moved by `radius` times its norm, in a direction that the seed draws."""
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.randn(tensor.shape, generator=generator) for tensor in weights]
    return [
        tensor + noise * (radius * tensor.norm() / noise.norm()) for tensor, noise in zip(weights, noises, strict=True)
    ]


def between(first: Weights, second: Weights, share: float) -> Weights:
    return [torch.lerp(start, end, share) for start, end in zip(first, second, strict=True)]


def distance(first: Weights, second: Weights) -> float:
    """In units of the first one's norm."""
    steps = [end - start for start, end in zip(first, second, strict=True)]
    moved, norm = (torch.stack([tensor.norm() for tensor in tensors]).norm() for tensors in (steps, first))
    return float(moved / norm)


@torch.no_grad()
def measure(model: nn.Module, weights: Weights, data: loader.Dataset) -> dict[str, float]:
    """Losses, and the test error in percent, with batch-norm statistics of these weights' own."""
    for parameter, value in zip(model.parameters(), weights, strict=True):
        parameter.copy_(value)
    engine.recalibrate_batch_norm(model, engine.calibration_batches(data, batch_size=128))
    training = engine.predict(model, data.train_images[:TRAINING_IMAGES], data)
    test = engine.predict(model, data.test_images, data)
    return {
        "train_loss": float(F.cross_entropy(training, data.train_labels[:TRAINING_IMAGES])),
        "test_loss": float(F.cross_entropy(test, data.test_labels)),
        "test_error": 100 * float((test.argmax(1) != data.test_labels).double().mean()),
    }


def train(seed: int, folder: Path, where: list[str], data: loader.Dataset) -> dict[str, Weights]:
    """The runs of a seed, unless they have been made: the networks that they have found."""
    folders = [folder / f"{name}-{seed}" for name in RUNS]
    for flags, own in zip(RUNS.values(), folders, strict=True):
        if not paper.train(paper.ROOT / "parle_mpi.py", [*flags.split(), "-s", str(seed)], own, where):
            sys.exit(f"{own} was stopped; the same command goes on")
    (master, replicas), (sgd, _), (long, _) = (read(own, data) for own in folders)
    return {"master": master, "replica": replicas[0], "another replica": replicas[1], "SGD": sgd, AGAINST: long}


def answer(
    of: str, radius: float | None, networks: dict[str, Weights], model: nn.Module, data: loader.Dataset
) -> dict[str, Any]:
    """Lists of figures: of the draws of noise of that radius, or (None) of the points of a line."""
    facts = {}
    if radius is None:
        ends = [networks[name] for name in LINES[of]]
        points = [between(*ends, share) for share in SHARES]
        facts["distance"] = distance(*ends)
    else:
        points = [noisy(networks[of], radius, draw) for draw in range(DRAWS if radius else 1)]
    figures = [measure(model, weights, data) for weights in points]
    return facts | {name: [point[name] for point in figures] for name in figures[0]}


def kept() -> dict[tuple[int, str, float | None], dict[str, Any]]:
    """What has been measured of the runs as they are defined now, by seed and question."""
    rows = [row for row in record.read("flatness") if row["runs"] == list(RUNS.values())]
    return {(row["seed"], row["of"], row["radius"]): row for row in rows}


class Figures:
    """What has been measured, over the seeds of which nothing is missing."""

    def __init__(self) -> None:
        self.rows = kept()
        self.seeds = [seed for seed in SEEDS if all((seed, *question) in self.rows for question in QUESTIONS)]

    def __call__(self, name: str, of: str, radius: float | None = None) -> np.ndarray:
        """(seeds, draws or points of the line); of a distance (seeds,)."""
        return np.array([self.rows[seed, of, radius][name] for seed in self.seeds])


def rise(figures: Figures, of: str, radius: float) -> np.ndarray:
    """Of the training loss under noise, the mean over the draws, (seeds,)."""
    return figures("train_loss", of, radius).mean(1) - figures("train_loss", of, 0.0).mean(1)


def chord(losses: np.ndarray) -> np.ndarray:
    """(seeds, points): straight from the loss at a line's start to that at its end."""
    shares = np.array(SHARES)
    return (1 - shares) * losses[:, :1] + shares * losses[:, -1:]


def table() -> str:
    """Two, in Markdown: under noise, and on the lines; mean ± standard deviation over the seeds."""
    figures = Figures()
    if not figures.seeds:
        return "Nothing has been measured yet."
    return "\n\n".join(
        [
            f"Seeds {', '.join(map(str, figures.seeds))}. Noise and lengths are relative to the norm of the weights. "
            "Rise: of the training loss, over that without noise; divided by that of SGD with as many gradients, "
            "seed by seed: below 1 is flatter.",
            noise_table(figures),
            "Barrier: the most by which the training loss on a line exceeds what lies straight between its ends. A "
            "line that is short against the noise above is flat in any case.",
            line_table(figures),
        ]
    )


def noise_table(figures: Figures) -> str:
    lines = []
    for of in NETWORKS:
        for radius in RADII:
            error, rises = figures("test_error", of, radius).mean(1), rise(figures, of, radius)
            ratio = record.spread((rises / rise(figures, AGAINST, radius)).tolist()) if radius and of != AGAINST else ""
            losses = (figures(name, of, radius).mean(1) for name in ("train_loss", "test_loss"))
            cells = [record.spread(column.tolist(), 4) for column in (*losses, rises)]
            lines.append([of, radius, *cells, ratio, record.spread(error.tolist())])
    header = ["network", "noise", "training loss", "test loss", "rise", f"rise / {AGAINST}", "test error"]
    return record.table(header, lines)


def line_table(figures: Figures) -> str:
    lines = []
    for of in LINES:
        losses, errors = figures("train_loss", of), figures("test_error", of)
        columns = figures("distance", of), losses[:, 0], losses[:, -1], (losses - chord(losses)).max(1)
        cells = [record.spread(column.tolist(), 4) for column in columns]
        points = (errors[:, i] for i in (0, len(SHARES) // 2, -1))
        lines.append([of, *cells, *(record.spread(column.tolist()) for column in points)])
    losses, errors = ("training loss: start", "end", "barrier"), ("test error: start", "middle", "end")
    return record.table(["line", "length", *losses, *errors], lines)


def draw() -> None:
    """Means over seeds and draws, and for the test loss a band from the lowest to the highest of them."""
    figures, picture = Figures(), Figure(figsize=(9, 3.6), layout="constrained")
    left, right = picture.subplots(1, 2, sharey=True)
    for axes, names, positions in ((left, NETWORKS, RADII), (right, LINES, SHARES)):
        for number, of in enumerate(names):
            colour = f"C{number}" if axes is left else f"C{number + len(NETWORKS)}"
            label = of if axes is left else f"{of}, {figures('distance', of).mean():.2f} long"
            training, test = (
                figures(name, of).T if axes is right else [figures(name, of, radius).ravel() for radius in RADII]
                for name in ("train_loss", "test_loss")
            )
            axes.plot(positions, [losses.mean() for losses in training], "--", color=colour)
            rings = dict(marker="o", fillstyle="none", markersize=9 - 2 * number)  # where lines hide each other
            axes.plot(positions, [losses.mean() for losses in test], color=colour, label=label, **rings)
            low, high = ([end(losses) for losses in test] for end in (np.min, np.max))
            axes.fill_between(positions, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.legend(loc="upper left")
    left.set_ylim(bottom=0)
    left.set_xlabel("noise, relative to each tensor's norm")
    left.set_ylabel("loss: test (solid), training (dashed)")
    right.set_xlabel("along the line")
    record.save(picture, "flatness", "flatness", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print what has been measured, and end")
    parser.add_argument("--plot", action="store_true", help="draw it, and end")
    parser.add_argument("--runs", type=Path, default=Path("runs/flatness"), metavar="DIR", help="of runs (%(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="raw data, as torchvision lays it out (downloaded)")
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed (%(default)s)")
    args = parser.parse_args()
    if args.table:
        print(table())
    if args.plot:
        draw()
    if args.table or args.plot:
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # or its runs would go on
    origin = record.origin()
    where = ["--proc", str(args.proc), *(["--data", str(args.data)] if args.data else [])]
    if all((seed, *question) in kept() for seed in SEEDS for question in QUESTIONS):
        print(record.complete("flatness"))
    for seed in SEEDS:
        missing = [question for question in QUESTIONS if (seed, *question) not in kept()]
        if not missing:
            continue
        data = loader.load("mnist", args.data, args.proc)
        networks = train(seed, args.runs, where, data)
        model = models.build("lenet", data.channels, data.size, data.classes)
        for of, radius in missing:
            about = dict(seed=seed, of=of, radius=radius, runs=list(RUNS.values()))
            record.keep("flatness", about | answer(of, radius, networks, model, data) | origin)
    draw()
    print(table())


if __name__ == "__main__":
    main()
