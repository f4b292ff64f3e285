"""What does a fault cost? Ranks are killed, raise, stall and lose their numbers, programs are asked to stop.

    python benchmarks/survival.py             # the trials that have not been made: minutes
    python benchmarks/survival.py --table

Three replicas of LeNet on a share of digits, 15 rounds of 5 mini-batches, a checkpoint after each. A fault strikes one
of them, both drawn from the trial's seed. What was stopped is resumed, and its master compared with that of a run that
nothing struck.
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

import checkpoint
from benchmarks import record

ROOT = Path(__file__).parent.parent
SEEDS = (1, 2, 3, 5, 7)  # between them they draw every replica, and no last round
REPLICAS, ROUNDS = 3, 15
RUN = "-n 3 -d digits --device cpu -L 5 -b 48 --frac 0.15 -B 3 --checkpoint-every 1"
LIMIT = 120  # seconds for any run


class Fault(NamedTuple):
    strikes: str | signal.Signals  # a kind of faults.py, or a signal to the program
    flags: str = ""
    program: str = "parle_mpi.py"


FAULTS = {
    "a rank is killed (SIGKILL)": Fault("kill"),
    "a rank raises": Fault("raise"),
    "a rank stalls, `--timeout 2`": Fault("stall", "--timeout 2"),
    "NaN in one replica": Fault("poison"),
    "SIGTERM": Fault(signal.SIGTERM),
    "SIGINT": Fault(signal.SIGINT),
    "SIGUSR1": Fault(signal.SIGUSR1),
    "SIGTERM to `parle_gpu.py`": Fault(signal.SIGTERM, program="parle_gpu.py"),
}


def start(program: str, flags: str, proc: Path, out: Path, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, program, *RUN.split(), *flags.split(), "--proc", str(proc), "--out", str(out)]
    surroundings = os.environ | dict(OMP_NUM_THREADS="1") | environment
    return subprocess.Popen(command, cwd=ROOT, env=surroundings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def newest(out: Path) -> Path | None:
    """The newest checkpoint of a run."""
    found = checkpoint.found(out / checkpoint.FOLDER)
    return found[0] if found else None


def trial(fault: Fault, seed: int, proc: Path, folder: Path) -> dict[str, Any]:
    """Strike once. Seconds are from the strike, or the checkpoint just before it, to the end of all."""
    drawn = random.Random(seed)
    replica, rounds = drawn.randrange(REPLICAS), drawn.randrange(2, ROUNDS)
    struck = None
    if isinstance(fault.strikes, str):
        process = start(fault.program, fault.flags, proc, folder, PARLE_FAULT=f"{fault.strikes}:{replica}:{rounds + 1}")
    else:
        process = start(fault.program, fault.flags, proc, folder)
        while process.poll() is None and (newest(folder) is None or newest(folder).name < f"{rounds:08}"):
            time.sleep(0.002)
        struck = time.time()
        process.send_signal(fault.strikes)
    status, ended = process.wait(LIMIT), time.time()
    last = newest(folder)
    row = dict(seed=seed, replica=replica, round=rounds, status=status, saved=int(last.name.partition("-")[0]))
    row |= dict(seconds=ended - (struck or last.stat().st_mtime))
    if status:
        resumed = start(fault.program, f"{fault.flags} --resume", proc, folder).wait(LIMIT)
        row |= dict(resumed=resumed)
    return row


def master(out: Path) -> list[torch.Tensor]:
    return list(torch.load(out / "master.pt").values())


def table() -> str:
    lines = []
    for name in FAULTS:
        rows = [row for row in record.read("survival") if row["fault"] == name]
        if rows:
            seconds = [row["seconds"] for row in rows]
            stopped = any(row["status"] for row in rows)
            lost = [row["round"] - row["saved"] for row in rows]
            after = f"{min(seconds):.1f} to {max(seconds):.1f}" if stopped else "goes on"
            same = sum(row["same"] for row in rows)
            lines.append(
                [
                    name,
                    len(rows),
                    ", ".join(sorted({str(row["status"]) for row in rows})),
                    after,
                    max(0, *lost) if stopped else "",
                    f"{same} of {len(rows)}",
                ]
            )
    header = [
        "fault",
        "tried",
        "exit status",
        "all ended after, s",
        "whole rounds lost",
        "in the end as if never struck",
    ]
    return record.table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proc", type=Path, default=Path("proc"), metavar="DIR", help="pre-processed data")
    parser.add_argument("--table", action="store_true", help="print what has been found, and end")
    args = parser.parse_args()
    if not args.table:
        kept = {(row["fault"], row["seed"]) for row in record.read("survival")}
        missing = [(name, seed) for seed in SEEDS for name in FAULTS if (name, seed) not in kept]
        origin = record.origin()
        with tempfile.TemporaryDirectory() as folder:
            whole = {program: Path(folder, program) for program in ("parle_mpi.py", "parle_gpu.py")}
            for program, out in whole.items() if missing else ():
                if start(program, "", args.proc, out).wait(LIMIT):
                    sys.exit(f"{program} failed, which nothing struck")
            for number, (name, seed) in enumerate(missing):
                out = Path(folder, str(number))
                row = dict(fault=name) | trial(FAULTS[name], seed, args.proc, out)
                pairs = zip(master(out), master(whole[FAULTS[name].program]), strict=True)
                row["same"] = all(torch.equal(*pair) for pair in pairs)
                print(row, flush=True)
                record.keep("survival", row | origin)
    print(table())


if __name__ == "__main__":
    main()
