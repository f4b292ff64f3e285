"""Reproduce the paper's experiments: the authors' test error, ours where it has been run, and the cost of the rest.

    python benchmarks/reproduce_paper.py                                            # print the table
    python benchmarks/reproduce_paper.py --experiment lenet-mnist-parle --minutes 30  # start or resume it
    python benchmarks/reproduce_paper.py --minutes 600                              # all experiments, cheapest first
    python benchmarks/reproduce_paper.py --time                                     # time one step of each network

The authors' errors are the numbers that the first author's plotting script (pratikac/distributed-ensembles, 2 July
2017) writes into the paper's plots; no ± is known. Their run scripts give most of the schedules; the table marks those
that are assumed. lr starts at 0.1 and is divided by 5 at a drop unless the flags differ; the authors' last drop divides
by 4. Here the inner lr drops too; the authors' stays constant. Their loader whitens CIFAR for all networks, and their
All-CNN has no dropout when images are augmented.
"""

import argparse
import itertools
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import loader
import models
from benchmarks import results
from parle import checkpoint, cli, signals, training

NAME = Path(__file__).stem
ROOT = Path(__file__).parent.parent
SEEDS = [42, 43, 44]  # the authors' seeds
CHECKPOINT_EVERY = 1000  # steps per replica that a crash may lose


class Experiment(NamedTuple):
    authors_error: float  # test error, percent
    flags: str
    schedule: str  # its source


LENET, SVHN = "-m lenet -d mnist", "-m wrn-16-4 -d svhn"
ALLCNN = "-m allcnn -d cifar10 --dropout 0 --augment --zca"
WRN10, WRN100 = (f"-m wrn-28-10 -d {dataset} --augment --zca" for dataset in ("cifar10", "cifar100"))
SGD, ENTROPY, ELASTIC = "--method sgd", "--method entropy-sgd", "--method elastic-sgd"
SCRIPT, PUBLISHED, WRN = "their script", "the published script", "the WRN paper, probably as in their figure"
B25 = "-B 25 --lr-drops 7.5 15 20"
B200 = "-B 200 --lr-drops 60 120 160"
B160 = "-B 160 --lr 0.01 --lr-drops 80 120 --lr-decay 0.1"
B5_PUBLISHED = "-B 5 --lr-drops 1 2 3 4 --lr-decay 0.1"
B5, B6, B10 = "-B 5 --lr-drops 1 2 3", "-B 6 --lr-drops 1 2 3", "-B 10 --lr-drops 2 4 6"
AS_SUBSETS = "assumed: their script for subsets of the data"

EXPERIMENTS = {
    "lenet-mnist-sgd": Experiment(0.50, f"{LENET} {SGD} {B25}", "assumed: the WRN paper's, shortened 8 times"),
    "lenet-mnist-entropy": Experiment(0.49, f"{LENET} {ENTROPY} {B5_PUBLISHED}", PUBLISHED),
    "lenet-mnist-elastic": Experiment(0.48, f"{LENET} {ELASTIC} -n 6 {B25}", "assumed: the same as SGD"),
    "lenet-mnist-parle": Experiment(0.44, f"{LENET} -n 6 {B5_PUBLISHED}", PUBLISHED),
    "allcnn-cifar10-sgd": Experiment(6.15, f"{ALLCNN} {SGD} {B200}", "assumed: their script for Elastic-SGD"),
    "allcnn-cifar10-entropy": Experiment(5.76, f"{ALLCNN} {ENTROPY} {B10}", "assumed: their script for WRN-28-10"),
    "allcnn-cifar10-parle": Experiment(5.18, f"{ALLCNN} -n 3 {B10}", AS_SUBSETS),
    "allcnn-cifar10-half-elastic": Experiment(6.51, f"{ALLCNN} {ELASTIC} -n 3 --frac 0.5 {B200}", SCRIPT),
    "allcnn-cifar10-half-parle": Experiment(5.89, f"{ALLCNN} -n 3 --frac 0.5 {B10}", SCRIPT),
    "allcnn-cifar10-quarter-elastic": Experiment(6.80, f"{ALLCNN} {ELASTIC} -n 6 --frac 0.25 {B200}", SCRIPT),
    "allcnn-cifar10-quarter-parle": Experiment(6.08, f"{ALLCNN} -n 6 --frac 0.25 {B10}", SCRIPT),
    "wrn-28-10-cifar10-sgd": Experiment(4.29, f"{WRN10} {SGD} {B200}", WRN),
    "wrn-28-10-cifar10-entropy": Experiment(4.23, f"{WRN10} {ENTROPY} {B10}", SCRIPT),
    "wrn-28-10-cifar10-elastic": Experiment(
        4.38, f"{WRN10} {ELASTIC} -n 3 {B200}", "assumed: their script for All-CNN"
    ),
    "wrn-28-10-cifar10-parle": Experiment(3.24, f"{WRN10} -n 3 {B5}", SCRIPT),
    "wrn-28-10-cifar100-sgd": Experiment(18.85, f"{WRN100} {SGD} {B200}", WRN),
    "wrn-28-10-cifar100-entropy": Experiment(19.05, f"{WRN100} {ENTROPY} {B10}", SCRIPT),
    "wrn-28-10-cifar100-elastic": Experiment(
        21.36, f"{WRN100} {ELASTIC} -n 3 {B200}", "assumed: their script for All-CNN"
    ),
    "wrn-28-10-cifar100-parle": Experiment(17.64, f"{WRN100} -n 3 {B5}", SCRIPT),
    "wrn-16-4-svhn-sgd": Experiment(1.62, f"{SVHN} {SGD} {B160}", "assumed: the WRN paper"),
    "wrn-16-4-svhn-entropy": Experiment(1.64, f"{SVHN} {ENTROPY} {B6}", SCRIPT),
    "wrn-16-4-svhn-elastic": Experiment(1.57, f"{SVHN} {ELASTIC} -n 3 {B160}", "assumed: the same as SGD"),
    "wrn-16-4-svhn-parle": Experiment(1.68, f"{SVHN} -n 3 {B5}", SCRIPT),
}


def command_flags(experiment: Experiment, seed: int) -> list[str]:
    return f"{experiment.flags} -s {seed}".split()


def parse(flags: list[str]) -> argparse.Namespace:
    return cli.apply_defaults(cli.build_parser("reproduce_paper.py", "").parse_args(flags), None)


def gradient_evaluations(experiment: Experiment) -> int:
    """Return the number of mini-batches that all replicas of one run compute."""
    args = parse(command_flags(experiment, SEEDS[0]))
    nb = math.ceil(round(args.frac * loader.DATASETS[args.dataset].num_train_images) / args.batch_size)
    return training.Schedule(args.epochs).num_rounds(nb) * args.sync_every * args.replicas


def train(program: Path, flags: list[str], out: Path, paths: list[str], seconds: float | None = None) -> bool:
    """Start or resume a program for at most this many seconds. Return whether its run has finished.

    After `seconds` the program gets SIGTERM; it then finishes its step (or its round) and saves a checkpoint.

    Args:
        flags: what defines the run. A directory with a run of other flags is an error.
        paths: other arguments, which may differ from call to call.
    """
    events = results.read_log(out)
    started_with = events[0]["command"][1 : len(flags) + 1] if events else flags
    if started_with != flags:
        sys.exit(f"{out} holds a different experiment ({shlex.join(started_with)}): move it away")
    if events and events[-1]["event"] == "finished":
        return True
    command = [sys.executable, str(program), *flags, "--out", str(out), *paths]
    if checkpoint.list_checkpoints(out / checkpoint.FOLDER):
        command.append("--resume")
    elif out.exists():
        shutil.rmtree(out)  # it stopped before its first checkpoint
    with subprocess.Popen(command) as process:
        try:
            status = process.wait(seconds)
        except BaseException as reason:
            process.send_signal(signal.SIGTERM)
            status = process.wait()
            if not isinstance(reason, subprocess.TimeoutExpired):
                raise
            if not results.read_log(out):  # it was still loading its data
                return False
    if status not in (0, signals.EXIT_RESUMABLE):
        sys.exit(f"{shlex.join(command)} exited with status {status}")
    return status == 0


def run(name: str, seed: int, program: str, out: Path, paths: list[str], seconds: float) -> None:
    """Start or resume an experiment for at most this many seconds, and append its row if it finishes."""
    flags = command_flags(EXPERIMENTS[name], seed)
    interval = ["--checkpoint-every", str(max(1, CHECKPOINT_EVERY // parse(flags).sync_every))]
    if not train(ROOT / program, flags, out, [*paths, *interval], seconds):
        print(f"{name}, seed {seed}: {progress(out):.1%} done; run the same command to resume")
        return
    start, *_, finish = events = results.read_log(out)
    row = dict(experiment=name, seed=seed, command=shlex.join(["python", program, *flags]))
    row |= dict(master_error=finish["master_error"], best_master_error=finish["best_master_error"])
    row |= dict(images_seen=finish["images_seen"], devices=start["devices"], machine=results.machine())
    row |= dict(revisions=list(dict.fromkeys(event["revision"] for event in events if "revision" in event)))
    results.append_row(NAME, row)


def progress(out: Path) -> float:
    """Return the fraction of a run's rounds that its log contains."""
    events = results.read_log(out)
    rounds = [event["round"] for event in events if "round" in event]
    return rounds[-1] / events[0]["num_rounds"] if rounds else 0.0


def finished(name: str) -> dict[int, dict[str, Any]]:
    """Return the rows of an experiment, as defined now, by seed."""
    return {
        row["seed"]: row
        for row in results.read_rows(NAME)
        if row.get("experiment") == name
        and shlex.split(row["command"])[2:] == command_flags(EXPERIMENTS[name], row["seed"])
    }


def step_seconds(network: str) -> float:
    """Time a forward and a backward pass on one thread: the faster of two, after a warm-up.

    The time is core-seconds, since the machine may be shared. It excludes the optimizer's step, which for LeNet, where
    it weighs most, takes 0.6 % of it.
    """
    spec, batch_size = loader.DATASETS[models.RECIPES[network]["dataset"]], models.COMMON["batch_size"]
    model = models.build(network, spec.channels, spec.size, spec.classes)
    images = torch.randn(batch_size, spec.channels, spec.size, spec.size).to(memory_format=torch.channels_last)
    targets, seconds = torch.arange(batch_size) % 10, []
    torch.set_num_threads(1)
    for _ in range(3):
        start = time.process_time()
        F.cross_entropy(model(images), targets).backward()
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


def time_networks() -> None:
    """Append the time of one step of each network that has not been timed on this machine."""
    provenance = results.provenance()
    known = {row.get("network") for row in results.read_rows(NAME) if row["machine"] == provenance["machine"]}
    for network in models.RECIPES:
        if network not in known:
            row = dict(network=network, step_seconds=step_seconds(network))
            results.append_row(NAME, row | provenance)


def timings() -> dict[str, dict[str, Any]]:
    """Return the latest timing of each network."""
    return {row["network"]: row for row in results.read_rows(NAME) if "network" in row}


def core_seconds(name: str) -> float:
    """Return the cost of one run; infinite if its network has not been timed."""
    experiment = EXPERIMENTS[name]
    timing = timings().get(parse(command_flags(experiment, SEEDS[0])).model, {})
    return gradient_evaluations(experiment) * timing.get("step_seconds", math.inf)


def table() -> str:
    lines = []
    for name, experiment in EXPERIMENTS.items():
        errors = [row["master_error"] for row in finished(name).values()]
        ours = results.mean_std(errors) if errors else "not run"
        seconds = core_seconds(name)
        hours = f"{seconds / 3600:,.1f}" if math.isfinite(seconds) else "not timed"
        cost = [f"{gradient_evaluations(experiment):,}", hours]
        lines.append(
            [
                name,
                f"{experiment.authors_error:.2f}",
                ours,
                len(errors),
                *cost,
                f"`{experiment.flags}`",
                experiment.schedule,
            ]
        )
    header = ["experiment", "authors' test error, %", "ours, %", "seeds", "total gradient evaluations"]
    header += ["core-hours per seed", "flags", "source of the schedule"]
    notes = [f"- {network}: {row['step_seconds']:.3g} s on {row['machine']}" for network, row in timings().items()]
    title = "Core-hours are the total gradient evaluations times the time of one on one core:"
    return "\n".join([results.markdown_table(header, lines), *(["", title, "", *notes] if notes else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the table only (it is printed in any case)")
    parser.add_argument("--time", action="store_true", help="time one step of each network not timed here yet")
    parser.add_argument("--experiment", choices=EXPERIMENTS, metavar="NAME", help=f"one of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help="seeds (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="total time limit (10 with --experiment, otherwise nothing is run)"
    )
    parser.add_argument("--gpu", action="store_true", help="run parle_gpu.py instead of parle_mpi.py")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/reproduce_paper"),
        metavar="DIR",
        help="output directories (%(default)s)",
    )
    parser.add_argument("--data", metavar="DIR", help="raw data in torchvision's layout (else downloaded)")
    parser.add_argument("--proc", default="proc", metavar="DIR", help="pre-processed data (%(default)s)")
    args = parser.parse_args()
    if args.time:
        time_networks()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that train() stops its program
    names = [args.experiment] if args.experiment else sorted(EXPERIMENTS, key=core_seconds) if args.minutes else []
    deadline = time.monotonic() + 60 * (args.minutes or 10)
    paths = ["--proc", args.proc, *(["--data", args.data] if args.data else [])]
    program = "parle_gpu.py" if args.gpu else "parle_mpi.py"
    for name, seed in itertools.product(names, args.seeds):
        left = deadline - time.monotonic()
        if left > 0 and seed not in finished(name):
            run(name, seed, program, args.runs / f"{name}-{seed}", paths, left)
    print(table())


if __name__ == "__main__":
    main()
