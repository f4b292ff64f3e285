"""Run the commands that README.md and docs/results.md report: test error of the master, and training time.

    python benchmarks/readme_results.py --data DIR     # run what has no row yet; DIR in torchvision's layout
    python benchmarks/readme_results.py --table

The table of README.md also shows results of compare_methods.py.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import compare_methods, results, trials
from parle import cli

NAME = Path(__file__).stem
ROOT = Path(__file__).parent.parent
SEEDS = (42, 43, 44)
DIGITS, MNIST = "parle_mpi.py -n 3 -d digits", "parle_mpi.py -n 3 -d mnist -B 1"
MNIST_SGD = "parle_mpi.py -d mnist --method sgd -B 25 --lr-drops 12.5 18.75"
EXPERIMENTS = {
    "LeNet, digits": DIGITS,
    "LeNet, MNIST, 0.25 epochs (6.2 passes)": "parle_mpi.py -n 3 -d mnist -B 0.25",
    "LeNet, MNIST, 0.25 epochs, ρ = 0.1": "parle_mpi.py -n 3 -d mnist -B 0.25 --rho 0.1",
    "LeNet, MNIST, 1 epoch (25 passes)": MNIST,
    "LeNet, MNIST, SGD, 25 passes": MNIST_SGD,
}


def command_line(flags: str, seed: int) -> str:
    return f"python {flags} -s {seed}"


def run(flags: str, seed: int, data: Path | None, proc: Path) -> None:
    command = command_line(flags, seed)
    with tempfile.TemporaryDirectory() as folder:
        paths = ["--proc", str(proc), "--out", f"{folder}/run", *(["--data", str(data)] if data else [])]
        subprocess.run([sys.executable, *command.split()[1:], *paths], cwd=ROOT, check=True)
        start, *_, finish = results.read_log(Path(folder, "run"))
    row = dict(
        command=command,
        seed=seed,
        num_replicas=start["num_replicas"],
        num_rounds=start["num_rounds"],
        error=finish["master_error"],
        train_seconds=finish["train_seconds"],
        straggler_seconds=finish["straggler_seconds"],
        sync_seconds=finish["sync_seconds"],
        revision=start["revision"],
        machine=results.machine(),
    )
    results.append_row(NAME, row)


def num_steps(rows: list[dict], flags: str) -> str:
    """Format the steps of each replica."""
    args = cli.apply_defaults(cli.build_parser("", "").parse_args(flags.split()[1:]), None)
    return f"{rows[0]['num_rounds'] * args.sync_every:,}" if rows else "not run"


def finished() -> dict[str, dict]:
    """Return the rows by command."""
    return {row["command"]: row for row in results.read_rows(NAME)}


def rows_of(flags: str) -> list[dict]:
    """Return the rows of a command, by seed."""
    rows = finished()
    return [rows[command] for seed in SEEDS if (command := command_line(flags, seed)) in rows]


def table() -> str:
    lines = []
    for experiment, flags in EXPERIMENTS.items():
        if own := rows_of(flags):
            seconds = [row["train_seconds"] for row in own]
            lines.append(
                [
                    experiment,
                    own[0]["num_replicas"],
                    num_steps(own, flags),
                    results.mean_std([row["error"] for row in own]),
                    f"{min(seconds):.0f} to {max(seconds):.0f}",
                    f"`python {flags}`",
                    ", ".join(str(row["seed"]) for row in own),
                ]
            )
    header = ["network, data", "replicas", "steps per replica", "test error, %", "training, s", "command", "seeds"]
    return results.markdown_table(header, lines)


def headline() -> str:
    """Return the table of README.md: Parle against SGD and local SGD, and below it the commands of its rows."""
    task, length = "cifar-5000", 4
    panel = "python benchmarks/compare_methods.py --data DIR long"
    commands = [f"python {DIGITS}", f"python {MNIST}` and `python {MNIST_SGD}", panel]

    def cell(errors: list[float]) -> str:
        return compare_methods.format_errors(errors) if errors else "not run"

    def compared(name: str, length: int = length) -> str:
        return cell(compare_methods.test_errors(task, compare_methods.METHODS[name] | dict(length=length)))

    lines = []
    for name, flags, sgd, note in (
        ("LeNet, digits", DIGITS, None, 1),
        ("LeNet, MNIST, one epoch", MNIST, MNIST_SGD, 2),
    ):
        errors, sgd_errors = ([row["error"] for row in rows_of(each)] if each else [] for each in (flags, sgd))
        steps = num_steps(rows_of(flags), flags)
        lines.append([f"{name} <sup>{note}</sup>", steps, cell(errors), cell(sgd_errors), "not run", "not run"])
    for name, method in (
        ("narrow All-CNN, 5,000 CIFAR-10 images, ρ = 0.1", compare_methods.SELECTED),
        ("the same with the default ρ = 0.01", "Parle"),
    ):
        columns = [compared(method), compared("SGD"), compared("SGD", 3 * length), compared(compare_methods.LOCAL_SGD)]
        steps = f"{length * trials.TASKS[task].steps:,}"
        lines.append([f"{name} <sup>3</sup>", steps, *columns])
    header = [f"test error, % (seeds {', '.join(map(str, SEEDS))})", "steps per replica", "Parle, 3 replicas"]
    header += ["SGD, matched steps", "SGD, matched compute", "local SGD, 3 replicas"]
    notes = ", ".join(f"<sup>{number}</sup> `{command}`" for number, command in enumerate(commands, 1))
    return f"{results.markdown_table(header, lines)}\n\n{notes}"


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
