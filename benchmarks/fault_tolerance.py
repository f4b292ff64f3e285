"""Measure what a fault costs: kill, stop or hang a rank, or turn a replica's weights into NaN, then resume the run.

    python benchmarks/fault_tolerance.py             # run the trials that have no row yet: minutes
    python benchmarks/fault_tolerance.py --table

Each trial runs three replicas of LeNet on a part of digits, 15 rounds of 5 mini-batches, with a checkpoint after each
round. The trial's seed draws the replica and the round of the fault. If the run stops, it is resumed, and its master is
compared with the master of a fault-free run.
"""

import argparse
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
SEEDS = (1, 2, 3, 5, 7)  # together they draw every replica, and never the last round
REPLICAS, ROUNDS = 3, 15
FLAGS = "-n 3 -d digits --device cpu -L 5 -b 48 --frac 0.15 -B 3 --checkpoint-every 1"
TIME_LIMIT = 120  # seconds per run


class Fault(NamedTuple):
    kind: str | signal.Signals  # a kind of PARLE_FAULT, or a signal to send to the program
    flags: str = ""
    program: str = "parle_mpi.py"


FAULTS = {
    "a rank is killed (SIGKILL)": Fault("kill"),
    "a rank raises": Fault("raise"),
    "a rank hangs, `--timeout 2`": Fault("hang", "--timeout 2"),
    "NaN in one replica": Fault("nan"),
    "SIGTERM": Fault(signal.SIGTERM),
    "SIGINT": Fault(signal.SIGINT),
    "SIGUSR1": Fault(signal.SIGUSR1),
    "SIGTERM, `parle_gpu.py`": Fault(signal.SIGTERM, program="parle_gpu.py"),
}


def start(program: str, flags: str, proc: Path, out: Path, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, program, *FLAGS.split(), *flags.split(), "--proc", str(proc), "--out", str(out)]
    environment = os.environ | dict(OMP_NUM_THREADS="1", PARLE_TESTING="1") | environment
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def latest_checkpoint(out: Path) -> Path | None:
    checkpoints = checkpoint.list_checkpoints(out / checkpoint.FOLDER)
    return checkpoints[0] if checkpoints else None


def run_trial(fault: Fault, seed: int, proc: Path, out: Path) -> dict[str, Any]:
    """Inject one fault and resume. `seconds` run from the signal, or the last checkpoint before the fault, to the exit.

    The fault happens in the round after `fault_after_round`; `saved_round` is the round of the latest checkpoint.
    """
    rng = random.Random(seed)
    replica, rounds = rng.randrange(REPLICAS), rng.randrange(2, ROUNDS)
    signaled = None
    if isinstance(fault.kind, str):
        process = start(fault.program, fault.flags, proc, out, PARLE_FAULT=f"{fault.kind}:{replica}:{rounds + 1}")
    else:
        process = start(fault.program, fault.flags, proc, out)
        while process.poll() is None and (
            latest_checkpoint(out) is None or latest_checkpoint(out).name < f"{rounds:08}"
        ):
            time.sleep(0.002)
        signaled = time.time()
        process.send_signal(fault.kind)
    exit_status, exited = process.wait(TIME_LIMIT), time.time()
    last = latest_checkpoint(out)
    row = dict(seed=seed, replica=replica, fault_after_round=rounds, exit_status=exit_status)
    row |= dict(saved_round=int(last.name.partition("-")[0]), seconds=exited - (signaled or last.stat().st_mtime))
    if exit_status:
        resumed = start(fault.program, f"{fault.flags} --resume", proc, out)
        row |= dict(resumed_exit_status=resumed.wait(TIME_LIMIT))
    return row


def load_master(out: Path) -> list[torch.Tensor]:
    return list(torch.load(out / "master.pt").values())


def table() -> str:
    lines = []
    for name in FAULTS:
        if rows := [row for row in results.read_rows(NAME) if row["fault"] == name]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data")
    parser.add_argument("--table", action="store_true", help="print the table and exit")
    args = parser.parse_args()
    if not args.table:
        known = {(row["fault"], row["seed"]) for row in results.read_rows(NAME)}
        missing = [(name, seed) for seed in SEEDS for name in FAULTS if (name, seed) not in known]
        if not missing:
            print(results.nothing_to_run(NAME))
        provenance = results.provenance()
        with tempfile.TemporaryDirectory() as folder:
            fault_free = {program: Path(folder, program) for program in ("parle_mpi.py", "parle_gpu.py")}
            for program, out in fault_free.items() if missing else ():
                if start(program, "", args.proc, out).wait(TIME_LIMIT):
                    sys.exit(f"{program} failed without a fault")
            for number, (name, seed) in enumerate(missing):
                out = Path(folder, str(number))
                row = dict(fault=name) | run_trial(FAULTS[name], seed, args.proc, out)
                pairs = zip(load_master(out), load_master(fault_free[FAULTS[name].program]), strict=True)
                row["bitwise_identical"] = all(torch.equal(*pair) for pair in pairs)
                print(row, flush=True)
                results.append_row(NAME, row | provenance)
    print(table())


if __name__ == "__main__":
    main()
