"""Measure what messages in half precision change: the master after 500 rounds, against float32 messages.

    python benchmarks/message_precision.py            # run what has no row yet: minutes
    python benchmarks/message_precision.py --table

Three ranks train on digits, 25 steps per round. Logistic regression is convex, so that the difference between two
masters comes from the messages and not from the chaos of training; a perceptron shows whether the test error changes.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import loader
from benchmarks import results
from parle import launcher, rank_exit, supervision
from parle.distributed import MPIGroup
from parle_mpi import Parle

NAME = Path(__file__).stem
SEEDS = (42, 43, 44)
RANKS, ROUNDS, SYNC_EVERY, BATCH_SIZE = 3, 500, 25, 48
DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYERS = {
    "logistic regression": lambda: [nn.Linear(64, 10)],
    "perceptron, 100 hidden units": lambda: [nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)],
}
CASES = [(network, lr) for network in LAYERS for lr in (0.1, 0.001)]


def train(network: str, lr: float, dtype: torch.dtype | None, seed: int, world: MPIGroup) -> dict[str, Any]:
    """Return the master after ROUNDS rounds and its test error in %."""
    data = loader.load("digits")
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), *LAYERS[network]())
    batches = loader.BatchLoader(data, batch_size=BATCH_SIZE, seed=seed, replica=world.rank)
    settings = dict(lr=lr, sync_every=SYNC_EVERY, batches_per_epoch=batches.per_epoch, message_dtype=dtype)
    optimizer = Parle(model.parameters(), world.comm, **settings)
    for _ in range(ROUNDS * SYNC_EVERY):
        inputs, targets = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    with optimizer.master_weights(), torch.no_grad():
        wrong = model(data.inputs(data.test_images)).argmax(1) != data.test_labels
    return dict(master=optimizer.master, test_error=100 * wrong.float().mean().item())


def measure_all() -> None:
    """Train what has no row yet; rank 0 appends the rows."""
    from mpi4py import MPI

    torch.set_num_threads(1)
    world, common = MPIGroup(MPI.COMM_WORLD), results.provenance()
    known = {(row["network"], row["lr"], row["seed"]) for row in results.read_rows(NAME)}
    cases = [(*case, seed) for case in CASES for seed in SEEDS if (*case, seed) not in known]
    for network, lr, seed in world.all_gather(cases)[0]:
        runs = {name: train(network, lr, dtype, seed, world) for name, dtype in DTYPES.items()}
        exact = runs["float32"]["master"]
        for name, run in runs.items() if world.rank == 0 else ():
            difference = ((run["master"] - exact).norm() / exact.norm()).item()
            row = dict(network=network, lr=lr, seed=seed, message_dtype=name, rounds=ROUNDS, ranks=world.size)
            results.append_row(NAME, row | dict(difference=difference, test_error=run["test_error"]) | common)


def table() -> str:
    rows, lines = results.read_rows(NAME), []
    for network, lr in CASES:
        for dtype in DTYPES:
            own = [row for row in rows if (row["network"], row["lr"], row["message_dtype"]) == (network, lr, dtype)]
            if own:
                largest, errors = max(row["difference"] for row in own), [row["test_error"] for row in own]
                spread = f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}" if len(own) > 1 else ""
                lines.append([network, f"{lr:g}", dtype, f"{largest:.0e}" if largest else "0", spread, len(own)])
    header = ["network", "lr", "messages", "largest difference of the masters, relative", "test error, %", "seeds"]
    return results.markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the table and exit")
    args = parser.parse_args()
    if launcher.rank_from_environment():
        measure_all()
        return
    if not args.table and (status := supervision.spawn_ranks(RANKS)):
        sys.exit(status)
    print(table())


if __name__ == "__main__":
    rank_exit.run_or_abort(main)
