"""Compare the flatness of Parle's and SGD's minima: loss under weight noise, and on lines between networks.

    python benchmarks/flatness.py         # train LeNet on MNIST (Parle and SGD, three seeds), measure and draw
    python benchmarks/flatness.py --table # print the tables; --plot draws figures/flatness.png

Noise of relative norm r moves every parameter tensor w by r |w|, for every network in the same three random directions.
Scaling by |w| makes the measure independent of the scale of a layer, which batch norm cancels. A line is
(1 - t) w + t w'. Batch-norm statistics are recalibrated for every point, on 100 mini-batches of training images, as the
programs do before an evaluation; statistics of another point would dominate the loss. The training loss is computed on
the first 5,000 training images, with dropout off.

Parle has its default settings, but the run is so short that its lr does not drop. SGD runs with matched steps (those of
one replica) and with matched compute (the gradient evaluations of all three); its lr drops at 0.6 and 0.8 of each run.
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

import loader
import models
from benchmarks import reproduce_paper, results
from parle import checkpoint, evaluation, experiment
from parle_gpu import Parle

NAME = Path(__file__).stem
SEEDS = [42, 43, 44]
PARLE = "-m lenet -d mnist -n 3 -B 0.1"  # 47 rounds of 25 steps
SGD = "-m lenet -d mnist --method sgd -B 2.505 --lr-drops 1.5 2"  # matched steps
SGD_LONG = "-m lenet -d mnist --method sgd -B 7.516 --lr-drops 4.5 6"  # matched compute (3 replicas)
RUNS = {"parle": PARLE, "sgd": SGD, "sgd-long": SGD_LONG}
NOISE_LEVELS = [0.0, 0.1, 0.2, 0.3, 0.4]
NUM_DIRECTIONS = 3
LINE_POINTS = [i / 6 for i in range(7)]  # t
NUM_TRAIN_IMAGES = 5_000
MATCHED_STEPS, MATCHED_COMPUTE = "SGD, matched steps", "SGD, matched compute"
NETWORKS = ["master", "replica", MATCHED_STEPS, MATCHED_COMPUTE]
LINES = {
    "replica to replica": ("replica", "another replica"),
    "replica to master": ("replica", "master"),
    f"master to {MATCHED_COMPUTE}": ("master", MATCHED_COMPUTE),
}
# (network, noise) or (line, None), for each seed
MEASUREMENTS = [(name, noise) for name in NETWORKS for noise in NOISE_LEVELS] + [(name, None) for name in LINES]

Weights = list[Tensor]  # the parameters of a network


def load_networks(folder: Path, data: loader.Dataset) -> tuple[Weights, list[Weights]]:
    """Return the master and the replicas of a run's latest valid checkpoint."""
    path, manifest, _ = checkpoint.latest_valid(checkpoint.list_checkpoints(folder / checkpoint.FOLDER))
    args = argparse.Namespace(**manifest["arguments"])
    master, *replicas = (experiment.build_model(args, data) for _ in range(args.replicas + 1))
    settings = experiment.hyperparameters(args, batches_per_epoch=1)
    optimizer = Parle([replica.parameters() for replica in replicas], **settings)
    checkpoint.restore(path, manifest, optimizer, dict(enumerate(replicas)))
    optimizer.copy_master_to(master)
    first, *others = ([parameter.detach() for parameter in model.parameters()] for model in (master, *replicas))
    return first, others


def add_noise(weights: Weights, noise: float, seed: int) -> Weights:
    """Move each tensor by `noise` times its norm, in a random direction that depends on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(tensor.shape, generator=generator) for tensor in weights]
    return [
        tensor + direction * (noise * tensor.norm() / direction.norm())
        for tensor, direction in zip(weights, directions, strict=True)
    ]


def interpolate(first: Weights, second: Weights, t: float) -> Weights:
    return [torch.lerp(start, end, t) for start, end in zip(first, second, strict=True)]


def relative_distance(first: Weights, second: Weights) -> float:
    """Return the distance in units of the norm of the first network."""
    steps = [end - start for start, end in zip(first, second, strict=True)]
    moved, norm = (torch.stack([tensor.norm() for tensor in tensors]).norm() for tensors in (steps, first))
    return float(moved / norm)


@torch.no_grad()
def evaluate(model: nn.Module, weights: Weights, data: loader.Dataset) -> dict[str, float]:
    """Return the losses and the test error in percent, after recalibrating batch norm for these weights."""
    for parameter, value in zip(model.parameters(), weights, strict=True):
        parameter.copy_(value)
    evaluation.recalibrate_batch_norm(model, evaluation.calibration_batches(data, batch_size=128))
    training = evaluation.predict(model, data.train_images[:NUM_TRAIN_IMAGES], data)
    test = evaluation.predict(model, data.test_images, data)
    return {
        "train_loss": float(F.cross_entropy(training, data.train_labels[:NUM_TRAIN_IMAGES])),
        "test_loss": float(F.cross_entropy(test, data.test_labels)),
        "test_error": 100 * float((test.argmax(1) != data.test_labels).double().mean()),
    }


def train(seed: int, folder: Path, paths: list[str], data: loader.Dataset) -> dict[str, Weights]:
    """Run what is missing of a seed's runs, and return the trained networks."""
    outs = [folder / f"{name}-{seed}" for name in RUNS]
    for flags, out in zip(RUNS.values(), outs, strict=True):
        program = reproduce_paper.ROOT / "parle_mpi.py"
        if not reproduce_paper.train(program, [*flags.split(), "-s", str(seed)], out, paths):
            sys.exit(f"{out} was interrupted; run the same command to resume")
    (master, (replica, other, *_)), (sgd, _), (sgd_long, _) = (load_networks(out, data) for out in outs)
    networks = {"master": master, "replica": replica, "another replica": other}
    return networks | {MATCHED_STEPS: sgd, MATCHED_COMPUTE: sgd_long}


def measure(
    subject: str, noise: float | None, networks: dict[str, Weights], model: nn.Module, data: loader.Dataset
) -> dict[str, Any]:
    """Return lists of losses and errors: for each direction of the noise, or (noise None) for each point of a line."""
    extra = {}
    if noise is None:
        ends = [networks[name] for name in LINES[subject]]
        points = [interpolate(*ends, t) for t in LINE_POINTS]
        extra["distance"] = relative_distance(*ends)
    else:
        points = [add_noise(networks[subject], noise, seed) for seed in range(NUM_DIRECTIONS if noise else 1)]
    values = [evaluate(model, weights, data) for weights in points]
    return extra | {name: [value[name] for value in values] for name in values[0]}


def measured() -> dict[tuple[int, str, float | None], dict[str, Any]]:
    """Return the rows of the runs as defined now, by seed, network or line, and noise."""
    rows = [row for row in results.read_rows(NAME) if row["runs"] == list(RUNS.values())]
    return {(row["seed"], row["subject"], row["noise"]): row for row in rows}


class Measurements:
    """The measurements of all seeds that are complete."""

    def __init__(self) -> None:
        self.rows = measured()
        self.seeds = [seed for seed in SEEDS if all((seed, *each) in self.rows for each in MEASUREMENTS)]

    def get(self, key: str, subject: str, noise: float | None = None) -> np.ndarray:
        """Return an array of (seeds, directions or points of the line), or of (seeds,) for a distance."""
        return np.array([self.rows[seed, subject, noise][key] for seed in self.seeds])


def loss_increase(measurements: Measurements, network: str, noise: float) -> np.ndarray:
    """Return by how much noise increases the training loss, averaged over directions: (seeds,)."""
    with_noise, without = (measurements.get("train_loss", network, level).mean(1) for level in (noise, 0.0))
    return with_noise - without


def linear_baseline(losses: np.ndarray) -> np.ndarray:
    """Interpolate linearly between the losses at the two ends of a line: (seeds, points)."""
    t = np.array(LINE_POINTS)
    return (1 - t) * losses[:, :1] + t * losses[:, -1:]


def table() -> str:
    """Return two Markdown tables, for noise and for lines; ± is the standard deviation over seeds."""
    measurements = Measurements()
    if not measurements.seeds:
        return "No seed has been measured completely yet."
    return "\n\n".join(
        [
            f"Seeds {', '.join(map(str, measurements.seeds))}. Noise and lengths are relative to the norm of the "
            "weights. Loss increase: training loss with noise minus training loss without. The ratio compares it with "
            f"that of {MATCHED_COMPUTE}, seed by seed: below 1 is flatter.",
            noise_table(measurements),
            "Barrier: how far the training loss on the line exceeds, at most, the linear interpolation between "
            "its ends. A line that is short compared with the noise above is flat in any case.",
            line_table(measurements),
        ]
    )


def noise_table(measurements: Measurements) -> str:
    lines = []
    for name in NETWORKS:
        for noise in NOISE_LEVELS:
            error = measurements.get("test_error", name, noise).mean(1)
            increase, reference = (loss_increase(measurements, each, noise) for each in (name, MATCHED_COMPUTE))
            ratio = results.mean_std((increase / reference).tolist()) if noise and name != MATCHED_COMPUTE else ""
            losses = (measurements.get(key, name, noise).mean(1) for key in ("train_loss", "test_loss"))
            cells = [results.mean_std(column.tolist(), 4) for column in (*losses, increase)]
            lines.append([name, noise, *cells, ratio, results.mean_std(error.tolist())])
    header = ["network", "noise", "training loss", "test loss", "loss increase", f"ratio to {MATCHED_COMPUTE}"]
    return results.markdown_table([*header, "test error, %"], lines)


def line_table(measurements: Measurements) -> str:
    lines = []
    for name in LINES:
        losses, errors = (measurements.get(key, name) for key in ("train_loss", "test_error"))
        barrier = (losses - linear_baseline(losses)).max(1)
        columns = measurements.get("distance", name), losses[:, 0], losses[:, -1], barrier
        cells = [results.mean_std(column.tolist(), 4) for column in columns]
        points = (errors[:, i] for i in (0, len(LINE_POINTS) // 2, -1))
        lines.append([name, *cells, *(results.mean_std(column.tolist()) for column in points)])
    header = ["line", "length", "training loss: start", "end", "barrier", "test error, %: start", "middle", "end"]
    return results.markdown_table(header, lines)


def draw() -> None:
    """Plot means over seeds and directions; a band spans the lowest to the highest test loss."""
    measurements, figure = Measurements(), Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, names, positions in ((left, NETWORKS, NOISE_LEVELS), (right, LINES, LINE_POINTS)):
        for number, name in enumerate(names):
            color = f"C{number}" if axes is left else f"C{number + len(NETWORKS)}"
            label = name if axes is left else f"{name} (length {measurements.get('distance', name).mean():.2f})"
            training, test = (
                measurements.get(key, name).T
                if axes is right
                else [measurements.get(key, name, noise).ravel() for noise in NOISE_LEVELS]
                for key in ("train_loss", "test_loss")
            )
            axes.plot(positions, [losses.mean() for losses in training], "--", color=color)
            rings = dict(marker="o", fillstyle="none", markersize=9 - 2 * number)  # visible where lines overlap
            axes.plot(positions, [losses.mean() for losses in test], color=color, label=label, **rings)
            low, high = ([end(losses) for losses in test] for end in (np.min, np.max))
            axes.fill_between(positions, low, high, color=color, alpha=0.15, linewidth=0)
        axes.legend(loc="upper left")
    left.set_ylim(bottom=0)
    left.set_title("Loss under weight noise", fontsize=10)
    left.set_xlabel("norm of the noise / norm of each tensor")
    left.set_ylabel("loss (solid: test, dashed: training)")
    right.set_title("Loss on a line between two networks", fontsize=10)
    right.set_xlabel("position on the line (0: first network, 1: second)")
    results.save_figure(figure, NAME, NAME, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the tables and exit")
    parser.add_argument("--plot", action="store_true", help="draw the figure and exit")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/flatness"), metavar="DIR", help="output directories (%(default)s)"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="raw data in torchvision's layout (else downloaded)")
    parser.add_argument(
        "--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data (%(default)s)"
    )
    args = parser.parse_args()
    if args.table:
        print(table())
    if args.plot:
        draw()
    if args.table or args.plot:
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the running program is stopped
    provenance = results.provenance()
    paths = ["--proc", str(args.proc), *(["--data", str(args.data)] if args.data else [])]
    rows = measured()
    if all((seed, *each) in rows for seed in SEEDS for each in MEASUREMENTS):
        print(results.nothing_to_run(NAME))
    for seed in SEEDS:
        missing = [each for each in MEASUREMENTS if (seed, *each) not in rows]
        if not missing:
            continue
        data = loader.load("mnist", args.data, args.proc)
        networks = train(seed, args.runs, paths, data)
        model = models.build("lenet", data.channels, data.size, data.classes)
        for subject, noise in missing:
            row = dict(seed=seed, subject=subject, noise=noise, runs=list(RUNS.values()))
            results.append_row(NAME, row | measure(subject, noise, networks, model, data) | provenance)
    draw()
    print(table())


if __name__ == "__main__":
    main()
