"""Train All-CNN at full width on all of CIFAR-10, for one epoch of Parle: 25 passes over the data per replica.

    python benchmarks/full_cifar10.py --minutes 150 --runs DIR    # start or resume the runs, seed by seed
    python benchmarks/full_cifar10.py --table                     # print the table

Each run is one command of parle_mpi.py, which the table gives. All have the same augmentation, weight decay and
dropout, the same three drops of lr, at 0.4, 0.7 and 0.9 of the run, and forward and backward passes in bfloat16. The
average of the master over rounds is tested as well; its decay is 0.9 per 25 steps.
"""

import argparse
import itertools
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import results
from benchmarks.reproduce_paper import ROOT, SEEDS, parse, progress, train

NAME = Path(__file__).stem
COMMON = "-m allcnn -d cifar10 --amp bf16"
AVERAGE = "--master-average 0.9"
AVERAGE_PER_STEP = f"--master-average {0.9 ** (1 / 25):.5f}"
RUNS = {  # in the order in which they are run
    "Parle, ρ = 0.1": f"{COMMON} -n 3 --rho 0.1 -B 1 --lr-drops 0.4 0.7 0.9 {AVERAGE}",
    "SGD": f"{COMMON} --method sgd -B 25 --lr-drops 10 17.5 22.5 {AVERAGE_PER_STEP}",
    "SGD, 3 × the steps": f"{COMMON} --method sgd -B 75 --lr-drops 30 52.5 67.5 {AVERAGE_PER_STEP}",
    "Parle": f"{COMMON} -n 3 -B 1 --lr-drops 0.4 0.7 0.9 {AVERAGE}",
}
CHECKPOINT_EVERY = 125  # steps per replica that a crash may lose, a minute or two


def flags_of(method: str, seed: int) -> list[str]:
    return f"{RUNS[method]} -s {seed}".split()


def rows_of(method: str) -> list[dict[str, Any]]:
    """Return the rows of a method, as defined now, in the order of their seeds."""
    rows = [
        row
        for row in results.read_rows(NAME)
        if row["method"] == method and shlex.split(row["command"])[2:] == flags_of(method, row["seed"])
    ]
    return sorted(rows, key=lambda row: row["seed"])


def run(method: str, seed: int, out: Path, paths: list[str], seconds: float) -> None:
    """Start or resume a run for at most this many seconds, and append its row if it finishes."""
    flags = flags_of(method, seed)
    interval = ["--checkpoint-every", str(CHECKPOINT_EVERY // parse(flags).sync_every)]
    if not train(ROOT / "parle_mpi.py", flags, out, [*paths, *interval], seconds):
        print(f"{method}, seed {seed}: {progress(out):.1%} done; run the same command to resume")
        return
    start, *_, finished = events = results.read_log(out)
    last = [event for event in events if event["event"] == "eval"][-1]
    row = dict(method=method, seed=seed, command=shlex.join(["python", "parle_mpi.py", *flags]))
    row |= {name: last[name] for name in ("master_error", "unaveraged_master_error", "replica_errors", "master_loss")}
    row |= dict(steps_per_replica=start["num_rounds"] * start["sync_every"], num_replicas=start["num_replicas"])
    row |= dict(train_seconds=finished["train_seconds"], num_ranks=start["num_ranks"], machine=results.machine())
    row |= dict(revisions=list(dict.fromkeys(event["revision"] for event in events if "revision" in event)))
    results.append_row(NAME, row)


def table() -> str:
    lines = []
    for method in RUNS:
        rows = rows_of(method)
        if rows:
            errors = [[row[name] for row in rows] for name in ("unaveraged_master_error", "master_error")]
            steps, replicas = rows[0]["steps_per_replica"], rows[0]["num_replicas"]
            cells = [method, f"{steps:,}", f"{steps * replicas:,}", *map(results.mean_std, errors)]
            lines.append([*cells, ", ".join(str(row["seed"]) for row in rows), f"`python parle_mpi.py {RUNS[method]}`"])
    header = ["method", "steps per replica", "total gradient evaluations", "test error, %", "averaged, %", "seeds"]
    return results.markdown_table([*header, "command"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the table and exit")
    parser.add_argument("--methods", nargs="+", choices=RUNS, default=list(RUNS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help="seeds (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10, metavar="M", help="total time limit (%(default)s)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/full_cifar10"), metavar="DIR", help="output directories"
    )
    parser.add_argument("--data", metavar="DIR", help="raw data in torchvision's layout (else downloaded)")
    parser.add_argument("--proc", default="proc", metavar="DIR", help="pre-processed data (%(default)s)")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that train() stops its program
    deadline = time.monotonic() + 60 * args.minutes
    paths = ["--proc", args.proc, *(["--data", args.data] if args.data else [])]
    for seed, method in itertools.product(args.seeds, args.methods):
        left = deadline - time.monotonic()
        if left > 0 and seed not in {row["seed"] for row in rows_of(method)}:
            run(method, seed, args.runs / f"{list(RUNS).index(method)}-{seed}", paths, left)
    print(table())


if __name__ == "__main__":
    main()
