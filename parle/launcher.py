"""Start ranks and see which is killed; find out whether a launcher has started this process."""

import contextlib
import ctypes
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

# Where the ranks that a launcher starts find their number and how many there are; PMIx does not tell the latter
LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "PMIx": ("PMIX_RANK", None),
}
STARTED = "PARLE_STARTED"  # set for the ranks that this program starts: a folder where they leave word for it
LEFT, FAILED = b"left", b"failed"  # a rank's last word, unless it is killed
GRACE = 10.0  # seconds from the end of the first rank to that of the others
TERMINAL = "PARLE_TERMINAL"  # and where that is done from a terminal: its width, since their own output is a pipe


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int | None] | None:
    """Rank and number of ranks (None: not told) where a launcher started this process, else None."""
    found = _launcher(environment)
    return found and found[1:]


def launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    """Whose launcher started this process."""
    found = _launcher(environment)
    return found and found[0]


def _launcher(environment: Mapping[str, str]) -> tuple[str, int, int | None] | None:
    for name, (rank, size) in LAUNCHERS.items():
        if all(environment.get(variable, "").isdecimal() for variable in (rank, size) if variable):
            ranks = None if size is None else int(environment[size])
            # a step of one task may be a shell (srun --pty bash), and what is typed there is not launched
            if environment.get("SLURM_STEP_NUM_TASKS") != "1" or ranks not in (1, None):
                return name, int(environment[rank]), ranks
    return None


def python() -> str:
    """What runs this program again: its Python, by the name that a shell finds it under if there is one."""
    return "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable)


def mpiexec() -> str | None:
    """The one beside this Python, also where the environment is not activated, or else on the PATH."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


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
    command = mpiexec()
    if command is None:
        raise FileNotFoundError("no mpiexec beside this Python or on the PATH: pip install mpich")
    if sys.stdout and sys.stdout.isatty():
        os.environ[TERMINAL] = str(shutil.get_terminal_size().columns)
    # Open MPI refuses more ranks than cores, and root, unless told; other launchers do not read these
    os.environ.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    if sys.stdout is None:  # closed before the program began
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="parle-") as folder:
        return _watch([command, "-n", str(count), sys.executable, *sys.argv], Path(folder), count)


def _watch(command: list[str], folder: Path, count: int) -> int:
    """Run mpiexec to its end, pass on what it says, and see which rank is gone first without a farewell."""
    streams = selectors.DefaultSelector()
    for rank in range(count):  # the kernel tells of their ends in the order in which they came
        os.mkfifo(folder / str(rank))
        streams.register(os.open(folder / str(rank), os.O_RDONLY | os.O_NONBLOCK), selectors.EVENT_READ, rank)
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
    streams.register(mpiexec.stdout, selectors.EVENT_READ, sys.stdout)
    streams.register(mpiexec.stderr, selectors.EVENT_READ, sys.stderr)
    talking, gone, farewells, deadline = 2, [], {}, None
    while talking:
        if 0 < len(gone) < count:
            deadline = deadline or time.monotonic() + GRACE
            if time.monotonic() > deadline:  # as when MPI starts on some ranks and not on others, which wait for ever
                mpiexec.terminate()
        for key, _ in streams.select(1 if deadline else None):
            chunk = os.read(key.fd, 65536)
            if not chunk:
                streams.unregister(key.fileobj)
            if not isinstance(key.data, int):
                talking -= not chunk
                with contextlib.suppress(OSError):  # nobody reads any more, or the disk is full; the run goes on
                    key.data.buffer.write(chunk)
                    key.data.flush()
            elif chunk:
                farewells[key.data] = chunk
            else:
                gone.append(key.data)
    status = mpiexec.wait()
    culprit = next((f"rank {rank}: killed" for rank in gone if rank not in farewells), None)
    if deadline is not None and time.monotonic() > deadline:
        culprit = f"rank {gone[0]}: ended before the others"
    elif status < 0:
        culprit = "mpiexec: killed"
    if culprit is not None and FAILED not in farewells.values():
        resume = folder / "resume"
        hint = f"; go on with: {resume.read_text()}" if resume.exists() else ""
        sys.stderr.write(f"{culprit}{hint}\n")
        status = status or 1
    return status if status >= 0 else 128 - status


def _die_with_parent() -> None:
    """mpiexec gets SIGTERM, and its ranks from it, when this process is killed itself: Linux's PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def greet() -> Callable[[bytes], None]:
    """Tell the process that has started this rank, if it is this program's, that it lives. Gives what says farewell."""
    rank = launched()
    if STARTED not in os.environ or rank is None:
        return lambda word: None
    line = os.open(Path(os.environ[STARTED], str(rank[0])), os.O_WRONLY)  # open as long as the rank lives
    return lambda word: (os.write(line, word), os.close(line))


def leave_word(resume: str) -> None:
    """Leave the command that resumes the run for the process that has started the ranks, if it is this program's."""
    if STARTED in os.environ and launched() is not None:
        folder, rank = Path(os.environ[STARTED]), launched()[0]
        with contextlib.suppress(OSError):  # without room for it the last line says less
            (folder / f".resume-{rank}").write_text(resume)
            os.replace(folder / f".resume-{rank}", folder / "resume")  # whole at any moment
