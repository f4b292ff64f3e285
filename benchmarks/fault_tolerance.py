"""Measure what a fault costs: kill, stop or hang a rank, or turn a replica's weights into NaN, then resume the run.

    python benchmarks/fault_tolerance.py                              # run the trials that have no row yet: an hour
    python benchmarks/fault_tolerance.py --launcher "mpiexec -n 3"    # one trial of each fault under this launcher
    python benchmarks/fault_tolerance.py --launcher ""                # the same, with ranks that the program starts
    python benchmarks/fault_tolerance.py --table

Each trial runs three replicas of LeNet on a part of digits, 15 rounds of 5 mini-batches, with a checkpoint after each
round. The trial's seed draws the replica and the round of the fault. If the run stops, it is resumed, and its master is
compared with the master of a fault-free run.

To try another MPI library, use the Python of an environment in which mpi4py finds it.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import results
from parle import checkpoint

NAME = Path(__file__).stem
ROOT = Path(__file__).parent.parent
SEEDS = range(1, 21)
REPLICAS, ROUNDS = 3, 15
LAST_ROUND = 12  # after which a fault may happen: a signal must not arrive when the run has ended
FLAGS = "-n 3 -d digits --device cpu -L 5 -b 48 --frac 0.15 -B 3 --checkpoint-every 1"
TIME_LIMIT = 120  # seconds per run


class Fault(NamedTuple):
    kind: str | signal.Signals | None  # a kind of PARLE_FAULT, or a signal to the program; SIGKILL: to the rank
    flags: str = ""
    program: str = "parle_mpi.py"


FAULTS = {
    "a rank is killed (SIGKILL)": Fault("kill"),
    "a rank is killed (SIGKILL), `--max-restarts 1`": Fault(signal.SIGKILL, "--max-restarts 1"),
    "a rank raises": Fault("raise"),
    "a rank hangs, `--timeout 5`": Fault("hang", "--timeout 5"),
    "NaN in one replica": Fault("nan"),
    "SIGTERM": Fault(signal.SIGTERM),
    "SIGINT": Fault(signal.SIGINT),
    "SIGUSR1": Fault(signal.SIGUSR1),
    "SIGTERM, `parle_gpu.py`": Fault(signal.SIGTERM, program="parle_gpu.py"),
}
LAUNCHER_FAULTS = {"no fault": Fault(None)} | {
    name: FAULTS[name]
    for name in ("a rank raises", "a rank is killed (SIGKILL)", "a rank hangs, `--timeout 5`", "SIGTERM")
}


def start(
    program: str, flags: str, proc: Path, out: Path, launcher: str = "", **environment: str
) -> subprocess.Popen[bytes]:
    """Start a run, whose output is added to the file OUT.txt."""
    command = [*launcher.split(), sys.executable, program, *FLAGS.split(), *flags.split()]
    command += ["--proc", str(proc), "--out", str(out)]
    environment = os.environ | dict(OMP_NUM_THREADS="1", PARLE_TESTING="1") | environment
    with open(f"{out}.txt", "a") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def send_signal(number: signal.Signals, process: subprocess.Popen[bytes], rank: int, out: Path, launcher: str) -> None:
    """Send SIGKILL to a rank, any other signal to the program or its launcher; srun would kill the ranks."""
    if number == signal.SIGKILL:
        os.kill(pid_of_rank(rank, out), number)
    elif launcher.startswith("srun"):
        subprocess.run(["scancel", f"--signal={number.name[3:]}", "--user=root"], check=True)
    else:
        process.send_signal(number)


def pid_of_rank(rank: int, out: Path) -> int:
    """Return the process of this rank of the run in `out`, which the program itself has started. Linux only."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (folder / "environ").read_bytes().split(b"\0")
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if f"PMI_RANK={rank}".encode() in environment and str(out).encode() in arguments:
                return int(folder.name)
    raise ProcessLookupError(f"rank {rank} of {out}")


def latest_checkpoint(out: Path) -> Path | None:
    checkpoints = checkpoint.list_checkpoints(out / checkpoint.FOLDER)
    return checkpoints[0] if checkpoints else None


def run_trial(fault: Fault, seed: int, proc: Path, out: Path, launcher: str = "") -> dict[str, Any]:
    """Inject one fault and resume. `seconds` run from the signal, or the last checkpoint before the fault, to the exit.

    The fault happens in the round after `fault_after_round`; `saved_round` is the round of the latest checkpoint.
    """
    rng = random.Random(seed)
    replica, rounds = rng.randrange(REPLICAS), rng.randint(2, LAST_ROUND)
    signaled = None
    environment = {} if fault.kind is None else dict(PARLE_FAULT=f"{fault.kind}:{replica}:{rounds + 1}")
    if not isinstance(fault.kind, signal.Signals):
        process = start(fault.program, fault.flags, proc, out, launcher, **environment)
    else:
        process = start(fault.program, fault.flags, proc, out, launcher)
        while process.poll() is None and (
            latest_checkpoint(out) is None or latest_checkpoint(out).name < f"{rounds:08}"
        ):
            time.sleep(0.002)
        signaled = time.time()
        send_signal(fault.kind, process, replica, out, launcher)
    try:
        exit_status = process.wait(TIME_LIMIT)
    except subprocess.TimeoutExpired:
        exit_status = "hangs"
        process.kill()
    exited = time.time()
    last = latest_checkpoint(out)
    row = dict(seed=seed, replica=replica, fault_after_round=rounds, exit_status=exit_status)
    row |= dict(saved_round=int(last.name.partition("-")[0]), seconds=exited - (signaled or last.stat().st_mtime))
    row |= dict(resume_command_printed="--resume" in Path(f"{out}.txt").read_text())
    if exit_status:
        resumed = start(fault.program, f"{fault.flags} --resume", proc, out, launcher)
        row |= dict(resumed_exit_status=resumed.wait(TIME_LIMIT))
    return row


def load_master(out: Path) -> list[torch.Tensor]:
    return list(torch.load(out / "master.pt").values())


def table() -> str:
    lines = []
    for name in FAULTS:
        if rows := [row for row in rows_of("own ranks") if row["fault"] == name]:
            seconds = [row["seconds"] for row in rows]
            stopped = any(row["exit_status"] for row in rows)
            lost = [row["fault_after_round"] - row["saved_round"] for row in rows]
            identical = sum(row["bitwise_identical"] for row in rows)
            lines.append(
                [
                    name,
                    len(rows),
                    ", ".join(sorted({str(row["exit_status"]) for row in rows})),
                    f"{min(seconds):.1f} to {max(seconds):.1f}" if stopped else "continues",
                    max(0, *lost) if stopped else "",
                    f"{identical} of {len(rows)}",
                ]
            )
    header = ["fault", "trials", "exit status", "seconds until all ranks exited", "complete rounds lost"]
    header += ["master bitwise identical to a fault-free run"]
    return results.markdown_table(header, lines)


def rows_of(test: str) -> list[dict[str, Any]]:
    """Return the rows of a test, "own ranks" or "launchers"."""
    return [row for row in results.read_rows(NAME) if row.get("test") == test]


def launcher_table() -> str:
    """Return exit status and seconds by launcher and fault, in parentheses if the output lacks the resume command."""
    cells = {}
    for row in rows_of("launchers"):
        launcher = f"`{row['launcher']}`" if row["launcher"] else "the program itself"
        status = f"{row['exit_status']}"
        if row["fault"] != "no fault":
            status += f", {row['seconds']:.1f} s"
            status = status if row["resume_command_printed"] else f"({status})"
        cells.setdefault((row["mpi"], launcher), {})[row["fault"]] = status
        if not row["bitwise_identical"]:
            cells[row["mpi"], launcher][row["fault"]] += ", another master"
    lines = [[*key, *(faults.get(name, "") for name in LAUNCHER_FAULTS)] for key, faults in sorted(cells.items())]
    return results.markdown_table(["library", "ranks are started by", *LAUNCHER_FAULTS], lines)


def run_trials(trials: list[tuple[str, Fault, int]], proc: Path, launcher: str | None) -> None:
    """Run the trials and append their rows. Without a launcher, the program starts its ranks."""
    provenance = results.provenance()
    test = dict(test="own ranks") if launcher is None else dict(test="launchers", launcher=launcher)
    with tempfile.TemporaryDirectory() as folder:
        fault_free = {program: Path(folder, program) for program in sorted({fault.program for _, fault, _ in trials})}
        for program, out in fault_free.items():
            if start(program, "", proc, out, launcher or "").wait(TIME_LIMIT):
                sys.exit(f"{program} failed without a fault: {Path(f'{out}.txt').read_text()}")
        for number, (name, fault, seed) in enumerate(trials):
            out = Path(folder, str(number))
            row = test | dict(fault=name) | run_trial(fault, seed, proc, out, launcher or "")
            pairs = zip(load_master(out), load_master(fault_free[fault.program]), strict=True)
            row["bitwise_identical"] = all(torch.equal(*pair) for pair in pairs)
            row["mpi"] = results.read_log(out)[0].get("mpi")
            print(row, flush=True)
            results.append_row(NAME, row | provenance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launcher", metavar="COMMAND", help='such as "mpiexec -n 3"; try every fault once under it')
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data")
    parser.add_argument("--table", action="store_true", help="print the tables and exit")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it, and so would their programs
    if args.launcher is not None:
        run_trials([(name, fault, 1) for name, fault in LAUNCHER_FAULTS.items()], args.proc, args.launcher)
    elif not args.table:
        known = {(row["fault"], row["seed"]) for row in rows_of("own ranks")}
        trials = [(name, fault, seed) for seed in SEEDS for name, fault in FAULTS.items()]
        missing = [(name, fault, seed) for name, fault, seed in trials if (name, seed) not in known]
        if not missing:
            print(results.nothing_to_run(NAME))
        run_trials(missing, args.proc, None)
    print(table(), launcher_table(), sep="\n\n")


if __name__ == "__main__":
    main()
