"""What the commands of the README's first screen give here: the master's test error, and seconds of training.

python benchmarks/examples.py --data DIR       # those that have not been run; DIR as torchvision lays it out
python benchmarks/examples.py --table
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import options
from benchmarks import record

ROOT = Path(__file__).parent.parent
SEEDS = (42, 43, 44)
EXAMPLES = {
    "LeNet, digits": "parle_mpi.py -n 3 -d digits",
    "LeNet, MNIST, a quarter of an epoch": "parle_mpi.py -n 3 -d mnist -B 0.25",
    "LeNet, MNIST, the same, ρ ten times as large": "parle_mpi.py -n 3 -d mnist -B 0.25 --rho 0.1",
    "LeNet, MNIST, an epoch": "parle_mpi.py -n 3 -d mnist -B 1",
    "LeNet, MNIST, SGD with as many mini-batches": "parle_mpi.py -d mnist --method sgd -B 25 --lr-drops 12.5 18.75",
}


def run(example: str, seed: int, data: Path | None, proc: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given = [*EXAMPLES[example].split(), "-s", str(seed)]
        where = ["--proc", str(proc), "--out", f"{folder}/run", *(["--data", str(data)] if data else [])]
        subprocess.run([sys.executable, *given, *where], cwd=ROOT, check=True)
        start, *_, end = record.log(Path(folder, "run"))
    record.keep(
        "examples",
        dict(
            example=example,
            command=f"python {' '.join(given)}",
            seed=seed,
            replicas=start["replicas"],
            rounds=start["rounds"],
            error=end["master_error"],
            seconds=end["seconds"],
            wait_seconds=end["wait_seconds"],
            sync_seconds=end["sync_seconds"],
            revision=start["revision"],
            machine=record.machine(),
        ),
    )


def sync_every(command: str) -> int:
    return options.resolve(options.parser("", "").parse_args(command.split()[1:]), None).sync_every


def table() -> str:
    rows = record.read("examples")
    lines = []
    for example, command in EXAMPLES.items():
        own = [row for row in rows if row["example"] == example]
        if own:
            seconds = [row["seconds"] for row in own]
            lines.append(
                [
                    example,
                    own[0]["replicas"],
                    f"{own[0]['rounds'] * sync_every(command):,}",
                    record.spread([row["error"] for row in own]),
                    f"{min(seconds):.0f} to {max(seconds):.0f}",
                    f"`python {command}`",
                    ", ".join(str(row["seed"]) for row in own),
                ]
            )
    header = ["network, data", "n", "mini-batches of each", "test error, %", "seconds", "command", "seeds"]
    return record.table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="raw data, as torchvision lays it out")
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data")
    parser.add_argument("--table", action="store_true", help="print what has been measured, and end")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    kept = {(row["example"], row["seed"]) for row in record.read("examples")}
    missing = [(example, seed) for seed in SEEDS for example in EXAMPLES if (example, seed) not in kept]
    if not missing:
        print(record.complete("examples"))
    for example, seed in missing:
        run(example, seed, args.data, args.proc)


if __name__ == "__main__":
    main()
