"""Run the commands that README.md and docs/results.md report: test error of the master, and training time.

python benchmarks/readme_results.py --data DIR     # run what has no row yet; DIR in torchvision's layout
python benchmarks/readme_results.py --table
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import options
from benchmarks import results

NAME = Path(__file__).stem
ROOT = Path(__file__).parent.parent
SEEDS = (42, 43, 44)
EXPERIMENTS = {
    "LeNet, digits": "parle_mpi.py -n 3 -d digits",
    "LeNet, MNIST, 0.25 epochs (6.3 passes)": "parle_mpi.py -n 3 -d mnist -B 0.25",
    "LeNet, MNIST, 0.25 epochs, ρ = 0.1": "parle_mpi.py -n 3 -d mnist -B 0.25 --rho 0.1",
    "LeNet, MNIST, 1 epoch (25 passes)": "parle_mpi.py -n 3 -d mnist -B 1",
    "LeNet, MNIST, SGD, 25 passes": "parle_mpi.py -d mnist --method sgd -B 25 --lr-drops 12.5 18.75",
}


def command_line(flags: str, seed: int) -> str:
    return f"python {flags} -s {seed}"


def run(flags: str, seed: int, data: Path | None, proc: Path) -> None:
    command = command_line(flags, seed)
    with tempfile.TemporaryDirectory() as folder:
        paths = ["--proc", str(proc), "--out", f"{folder}/run", *(["--data", str(data)] if data else [])]
        subprocess.run([sys.executable, *command.split()[1:], *paths], cwd=ROOT, check=True)
        start, *_, end = results.read_log(Path(folder, "run"))
    row = dict(
        command=command,
        seed=seed,
        num_replicas=start["replicas"],
        num_rounds=start["rounds"],
        error=end["master_error"],
        train_seconds=end["seconds"],
        straggler_seconds=end["wait_seconds"],
        sync_seconds=end["sync_seconds"],
        revision=start["revision"],
        machine=results.machine(),
    )
    results.append_row(NAME, row)


def steps_per_round(flags: str) -> int:
    return options.resolve(options.parser("", "").parse_args(flags.split()[1:]), None).sync_every


def finished() -> dict[str, dict]:
    """Return the rows by command."""
    return {row["command"]: row for row in results.read_rows(NAME)}


def table() -> str:
    rows, lines = finished(), []
    for experiment, flags in EXPERIMENTS.items():
        if own := [rows[command] for seed in SEEDS if (command := command_line(flags, seed)) in rows]:
            seconds = [row["train_seconds"] for row in own]
            lines.append(
                [
                    experiment,
                    own[0]["num_replicas"],
                    f"{own[0]['num_rounds'] * steps_per_round(flags):,}",
                    results.mean_std([row["error"] for row in own]),
                    f"{min(seconds):.0f} to {max(seconds):.0f}",
                    f"`python {flags}`",
                    ", ".join(str(row["seed"]) for row in own),
                ]
            )
    header = ["network, data", "replicas", "steps per replica", "test error, %", "training, s", "command", "seeds"]
    return results.markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="raw data in torchvision's layout (else downloaded)")
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data")
    parser.add_argument("--table", action="store_true", help="print the table and exit")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    rows = finished()
    missing = [(f, seed) for seed in SEEDS for f in EXPERIMENTS.values() if command_line(f, seed) not in rows]
    if not missing:
        print(results.nothing_to_run(NAME))
    for flags, seed in missing:
        run(flags, seed, args.data, args.proc)


if __name__ == "__main__":
    main()
