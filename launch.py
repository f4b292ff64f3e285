"""Start ranks, find out whether a launcher has started this process, and say which rank was killed."""

import contextlib
import ctypes
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

# Where the ranks that a launcher starts find their number and how many there are; PMIx does not tell the latter
LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "PMIx": ("PMIX_RANK", None),
}
STARTED = "PARLE_STARTED"  # set for the ranks that this program starts: a folder where they leave word for it
TERMINAL = "PARLE_TERMINAL"  # and where that is done from a terminal: its width, since their own output is a pipe


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int | None] | None:
    """Rank and number of ranks (None: not told) where a launcher started this process, else None."""
    for rank, size in LAUNCHERS.values():
        if rank in environment and (size is None or size in environment):
            ranks = None if size is None else int(environment[size])
            # a step of one task may be a shell (srun --pty bash), and what is typed there is not launched
            if environment.get("SLURM_STEP_NUM_TASKS") != "1" or ranks not in (1, None):
                return int(environment[rank]), ranks
    return None


def start(count: int) -> int | None:
    """Run this very command again as `count` ranks and give their exit status. None where one rank is enough.

    Signals are passed on. When a rank was killed, the last line says which, and how to resume.

    Raises:
        OSError: no mpiexec, or one whose ranks do not know that they were launched.
    """
    if count == 1:
        return None
    if STARTED in os.environ:
        raise OSError("this mpiexec does not tell its ranks their number: start them with the launcher of your MPI")
    beside = Path(sys.executable).with_name("mpiexec")  # the wheel's, also where the environment is not activated
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise FileNotFoundError("no mpiexec beside this Python or on the PATH: pip install mpich")
    if sys.stderr.isatty():
        os.environ[TERMINAL] = str(shutil.get_terminal_size().columns)
    # Open MPI refuses more ranks than cores, and root, unless told; other launchers do not read these
    os.environ.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="parle-") as folder:
        command = [mpiexec, "-n", str(count), sys.executable, *sys.argv]
        return _watch(command, Path(folder))


def _watch(command: list[str], folder: Path) -> int:
    """Run mpiexec to its end and pass on what it says, on whichever stream it says that a rank was killed."""
    # A group of its own: Ctrl-C reaches it from here, once. Its standard input is not the terminal's, then.
    mpiexec = subprocess.Popen(
        command,
        env=os.environ | {STARTED: str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: mpiexec.send_signal(number))
    streams = selectors.DefaultSelector()
    streams.register(mpiexec.stdout, selectors.EVENT_READ, sys.stdout)
    streams.register(mpiexec.stderr, selectors.EVENT_READ, sys.stderr)
    said = b""
    while streams.get_map():
        for key, _ in streams.select():
            chunk = os.read(key.fd, 65536)
            if not chunk:
                streams.unregister(key.fileobj)
            said = (said + chunk)[-65536:]
            with contextlib.suppress(BrokenPipeError):  # nobody reads any more; the run goes on
                key.data.buffer.write(chunk)
                key.data.flush()
    status = mpiexec.wait()
    ranks = {path.read_text(): path.name for path in folder.glob("rank-*")}
    killed = re.search(rb"PID (\d+) RUNNING AT|with PID (\d+) on node", said)
    if status and killed:
        rank = ranks.get((killed[1] or killed[2]).decode(), "a rank").replace("-", " ")
        resume = folder / "resume"
        hint = f"; go on with: {resume.read_text()}" if resume.exists() else ""
        sys.stderr.write(f"{rank}: killed{hint}\n")
    return status if status >= 0 else 128 - status


def _die_with_parent() -> None:
    """mpiexec gets SIGTERM, and its ranks from it, when this process is killed itself: Linux's PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def leave(name: str, text: str) -> None:
    """Leave word for the process that has started the ranks, if it is this program's. `rank` is each one's own."""
    rank = launched()
    if STARTED in os.environ and rank is not None:
        name = f"rank-{rank[0]}" if name == "rank" else name
        Path(os.environ[STARTED], name).write_text(text)
