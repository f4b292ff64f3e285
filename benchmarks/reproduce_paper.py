"""The paper's table, row by row: the authors' test error, ours as far as it has been run, and what the rest would cost.

    python benchmarks/paper.py                                              # the table
    python benchmarks/paper.py --row lenet-mnist-parle --minutes 30         # begin it, or go on with it
    python benchmarks/paper.py --minutes 600                                # all rows, the cheapest first
    python benchmarks/paper.py --time                                       # a mini-batch of each network, here

The authors' figures are those that the first author's plotting script (pratikac/distributed-ensembles, 2 July 2017)
writes into the paper's plots; no ± is known. Their run scripts give the schedules, but not all: what is assumed is
said. lr starts at 0.1 and is divided by 5 at a drop unless the row says otherwise; theirs ends with a division by 4.
The inner lr drops too, where theirs stayed. Their loader whitened CIFAR for all its networks, and
their All-CNN had no dropout where images were augmented.
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

import checkpoint
import engine
import interrupts
import loader
import models
import options
from benchmarks import record

ROOT = Path(__file__).parent.parent
SEEDS = [42, 43, 44]  # the authors'
CHECKPOINT_EVERY = 1000  # mini-batches: what a crash may cost


class Row(NamedTuple):
    authors: float  # test error, percent
    flags: str
    schedule: str  # where it is from


LENET, SVHN = "-m lenet -d mnist", "-m wrn-16-4 -d svhn"
ALLCNN = "-m allcnn -d cifar10 --dropout 0 --augment --whiten"
WRN10, WRN100 = (f"-m wrn-28-10 -d {dataset} --augment --whiten" for dataset in ("cifar10", "cifar100"))
SGD, ENTROPY, ELASTIC = "--method sgd", "--method entropy-sgd", "--method elastic-sgd"
SCRIPT, PUBLISHED, WRN = "their script", "the published script", "the WRN paper, as probably the figure"
B25 = "-B 25 --lr-drops 7.5 15 20"
B200 = "-B 200 --lr-drops 60 120 160"
B160 = "-B 160 --lr 0.01 --lr-drops 80 120 --lr-decay 0.1"
B5_PUBLISHED = "-B 5 --lr-drops 1 2 3 4 --lr-decay 0.1"
B5, B6, B10 = "-B 5 --lr-drops 1 2 3", "-B 6 --lr-drops 1 2 3", "-B 10 --lr-drops 2 4 6"
AS_SHARES = "assumed: their script for shares of the data"

ROWS = {
    "lenet-mnist-sgd": Row(0.50, f"{LENET} {SGD} {B25}", "assumed: the WRN paper's, an eighth as long"),
    "lenet-mnist-entropy": Row(0.49, f"{LENET} {ENTROPY} {B5_PUBLISHED}", PUBLISHED),
    "lenet-mnist-elastic": Row(0.48, f"{LENET} {ELASTIC} -n 6 {B25}", "assumed: as SGD's"),
    "lenet-mnist-parle": Row(0.44, f"{LENET} -n 6 {B5_PUBLISHED}", PUBLISHED),
    "allcnn-cifar10-sgd": Row(6.15, f"{ALLCNN} {SGD} {B200}", "assumed: their script for Elastic-SGD"),
    "allcnn-cifar10-entropy": Row(5.76, f"{ALLCNN} {ENTROPY} {B10}", "assumed: their script for WRN-28-10"),
    "allcnn-cifar10-parle": Row(5.18, f"{ALLCNN} -n 3 {B10}", AS_SHARES),
    "allcnn-cifar10-half-elastic": Row(6.51, f"{ALLCNN} {ELASTIC} -n 3 --frac 0.5 {B200}", SCRIPT),
    "allcnn-cifar10-half-parle": Row(5.89, f"{ALLCNN} -n 3 --frac 0.5 {B10}", SCRIPT),
    "allcnn-cifar10-quarter-elastic": Row(6.80, f"{ALLCNN} {ELASTIC} -n 6 --frac 0.25 {B200}", SCRIPT),
    "allcnn-cifar10-quarter-parle": Row(6.08, f"{ALLCNN} -n 6 --frac 0.25 {B10}", SCRIPT),
    "wrn-28-10-cifar10-sgd": Row(4.29, f"{WRN10} {SGD} {B200}", WRN),
    "wrn-28-10-cifar10-entropy": Row(4.23, f"{WRN10} {ENTROPY} {B10}", SCRIPT),
    "wrn-28-10-cifar10-elastic": Row(4.38, f"{WRN10} {ELASTIC} -n 3 {B200}", "assumed: their script for All-CNN"),
    "wrn-28-10-cifar10-parle": Row(3.24, f"{WRN10} -n 3 {B5}", SCRIPT),
    "wrn-28-10-cifar100-sgd": Row(18.85, f"{WRN100} {SGD} {B200}", WRN),
    "wrn-28-10-cifar100-entropy": Row(19.05, f"{WRN100} {ENTROPY} {B10}", SCRIPT),
    "wrn-28-10-cifar100-elastic": Row(21.36, f"{WRN100} {ELASTIC} -n 3 {B200}", "assumed: their script for All-CNN"),
    "wrn-28-10-cifar100-parle": Row(17.64, f"{WRN100} -n 3 {B5}", SCRIPT),
    "wrn-16-4-svhn-sgd": Row(1.62, f"{SVHN} {SGD} {B160}", "assumed: the WRN paper"),
    "wrn-16-4-svhn-entropy": Row(1.64, f"{SVHN} {ENTROPY} {B6}", SCRIPT),
    "wrn-16-4-svhn-elastic": Row(1.57, f"{SVHN} {ELASTIC} -n 3 {B160}", "assumed: as SGD's"),
    "wrn-16-4-svhn-parle": Row(1.68, f"{SVHN} -n 3 {B5}", SCRIPT),
}


def flags(row: Row, seed: int) -> list[str]:
    """What makes the experiment, as typed."""
    return f"{row.flags} -s {seed}".split()


def resolved(arguments: list[str]) -> argparse.Namespace:
    return options.resolve(options.parser("paper.py", "").parse_args(arguments), None)


def mini_batches(row: Row) -> int:
    """Of all replicas: gradient evaluations of one run."""
    args = resolved(flags(row, SEEDS[0]))
    nb = math.ceil(round(args.frac * loader.SOURCES[args.dataset].images) / args.batch_size)
    return engine.count_rounds(args.epochs, nb) * args.sync_every * args.replicas


def train(program: Path, arguments: list[str], folder: Path, where: list[str], seconds: float | None = None) -> bool:
    """Run a program in `folder`, or go on with what is there, for so many seconds. Whether it has come to its end.

    When they are over it is asked to stop, and takes what it needs to end its mini-batch (or its round) and to save.

    Args:
        arguments: what makes the experiment.
        where: other arguments, which may differ from call to call.
    """
    events = record.log(folder)
    began = events[0]["command"][1 : len(arguments) + 1] if events else arguments
    if began != arguments:
        sys.exit(f"{folder} holds another experiment ({shlex.join(began)}): move it away")
    if events and events[-1]["event"] == "end":
        return True
    command = [sys.executable, str(program), *arguments, "--out", str(folder), *where]
    if checkpoint.found(folder / checkpoint.FOLDER):
        command.append("--resume")
    elif folder.exists():
        shutil.rmtree(folder)  # broken off before there was anything to go on from
    with subprocess.Popen(command) as process:
        try:
            status = process.wait(seconds)
        except BaseException as reason:
            process.send_signal(signal.SIGTERM)
            status = process.wait()
            if not isinstance(reason, subprocess.TimeoutExpired):
                raise
            if not record.log(folder):  # it was still reading its data
                return False
    if status not in (0, interrupts.STOPPED):
        sys.exit(f"{shlex.join(command)} ended with status {status}")
    return status == 0


def run(name: str, seed: int, program: str, folder: Path, where: list[str], seconds: float) -> None:
    """Go on with a row for so many seconds, and keep its error if it comes to its end."""
    row = ROWS[name]
    args = resolved(flags(row, seed))
    saves = ["--checkpoint-every", str(max(1, CHECKPOINT_EVERY // args.sync_every))]
    if not train(ROOT / program, flags(row, seed), folder, [*where, *saves], seconds):
        print(f"{name}, seed {seed}: {done(folder):.1%} done; the same command goes on")
        return
    start, *_, end = events = record.log(folder)
    figures = {key: end[key] for key in ("master_error", "best_master_error", "images")}
    revisions = list(dict.fromkeys(event["revision"] for event in events if "revision" in event))
    facts = dict(row=name, seed=seed, command=shlex.join(["python", program, *flags(row, seed)]), **figures)
    record.keep("paper", facts | dict(machine=record.machine(), devices=start["devices"], revisions=revisions))


def done(folder: Path) -> float:
    """Share of a run's rounds, as its log tells."""
    events = record.log(folder)
    rounds = [event["round"] for event in events if "round" in event]
    return rounds[-1] / events[0]["rounds"] if rounds else 0.0


def kept(name: str) -> dict[int, dict[str, Any]]:
    """What has been run of a row as it is defined now, by seed."""
    return {
        result["seed"]: result
        for result in record.read("paper")
        if result.get("row") == name and shlex.split(result["command"])[2:] == flags(ROWS[name], result["seed"])
    }


def mini_batch_seconds(network: str) -> float:
    """A forward and a backward pass on one thread: the faster of two, after a first one.

    Seconds are the core's, not the clock's: others may be using it. The optimizer's step is left out: for LeNet,
    where it weighs most, it is 0.6 % of this.
    """
    source, batch_size = loader.SOURCES[models.RECIPES[network]["dataset"]], models.COMMON["batch_size"]
    model = models.build(network, source.channels, source.size, source.classes)
    images = torch.randn(batch_size, source.channels, source.size, source.size).to(memory_format=torch.channels_last)
    targets, seconds = torch.arange(batch_size) % 10, []
    torch.set_num_threads(1)
    for _ in range(3):
        start = time.process_time()
        F.cross_entropy(model(images), targets).backward()
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


def time_networks() -> None:
    """Keep the time of each network that has none yet on this machine."""
    origin = record.origin()
    known = {result.get("network") for result in record.read("paper") if result["machine"] == origin["machine"]}
    for network in models.RECIPES:
        if network not in known:
            row = dict(network=network, mini_batch_seconds=mini_batch_seconds(network))
            record.keep("paper", row | origin)


def timed() -> dict[str, dict[str, Any]]:
    """Where each network's mini-batch was timed last."""
    return {result["network"]: result for result in record.read("paper") if "network" in result}


def core_seconds(name: str) -> float:
    """Of one run; infinite where its network has not been timed."""
    row = ROWS[name]
    one = timed().get(resolved(flags(row, SEEDS[0])).model, {})
    return mini_batches(row) * one.get("mini_batch_seconds", math.inf)


def table() -> str:
    """In Markdown: every row, and what a run costs where its network was timed last."""
    lines = []
    for name, row in ROWS.items():
        errors = [result["master_error"] for result in kept(name).values()]
        ours = record.spread(errors) if errors else "not run"
        seconds = core_seconds(name)
        hours = f"{seconds / 3600:,.1f}" if math.isfinite(seconds) else "not timed"
        cost = [f"{mini_batches(row):,}", hours]
        lines.append([name, f"{row.authors:.2f}", ours, len(errors), *cost, f"`{row.flags}`", row.schedule])
    header = ["row", "authors", "here", "seeds", "mini-batches", "core-hours a seed", "flags", "the schedule is from"]
    notes = [f"- {network}: {one['mini_batch_seconds']:.3g} s on {one['machine']}" for network, one in timed().items()]
    title = "Core-hours are mini-batches, those of all replicas, times what one takes of a core:"
    return "\n".join([record.table(header, lines), *(["", title, "", *notes] if notes else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the table, which is done in any case")
    parser.add_argument("--time", action="store_true", help="time a mini-batch of each network that has not been timed")
    parser.add_argument("--row", choices=ROWS, metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help="(%(default)s)")
    parser.add_argument("--minutes", type=float, metavar="M", help="for all that is run (10 for a row, none without)")
    parser.add_argument("--gpu", action="store_true", help="run it by parle_gpu.py, not by parle_mpi.py")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/paper"), metavar="DIR", help="their folders (%(default)s)"
    )
    parser.add_argument("--data", metavar="DIR", help="raw data, as torchvision lays it out (downloaded)")
    parser.add_argument("--proc", default="proc", metavar="DIR", help="pre-processed data (%(default)s)")
    args = parser.parse_args()
    if args.time:
        time_networks()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # or its run would go on
    names = [args.row] if args.row else sorted(ROWS, key=core_seconds) if args.minutes else []
    deadline = time.monotonic() + 60 * (args.minutes or 10)
    where = ["--proc", args.proc, *(["--data", args.data] if args.data else [])]
    program = "parle_gpu.py" if args.gpu else "parle_mpi.py"
    for name, seed in itertools.product(names, args.seeds):
        left = deadline - time.monotonic()
        if left > 0 and seed not in kept(name):
            run(name, seed, program, args.runs / f"{name}-{seed}", where, left)
    print(table())


if __name__ == "__main__":
    main()
