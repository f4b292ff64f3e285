"""Start MPI ranks, supervise them, and end all of them if one fails."""

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

from parle import launcher
from parle.rank_exit import EXITED, FAILED, FINISHED, RESUME, RUN, STARTED
from parle.streams import ignore_write_errors

TERMINAL_WIDTH = "PARLE_TERMINAL_WIDTH"  # set for the ranks, which write to a pipe, if this program runs in a terminal
START_TIMEOUT = 300.0  # seconds for the first rank to start, with Python on a slow file system
GRACE_PERIOD = 10.0  # seconds that the others have to exit after a rank that did not finish
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # save and stop
FORWARDED_AS = {signal.SIGHUP: signal.SIGTERM}  # to mpiexec, which would exit on SIGHUP

# Asks Linux to send SIGTERM when the parent dies (PR_SET_PDEATHSIG), then becomes the command unless it is dead already
BECOME_COMMAND = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
    signal.signal(number, signal.SIG_DFL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def spawn_ranks(count: int, max_restarts: int = 0) -> int | None:
    """Run this command again as `count` ranks and return their exit status; return None if this process is enough.

    Signals are forwarded, and ignored after the ranks have ended. If a rank is killed, the last line on stderr gives
    its number and the command that resumes the run.

    Args:
        max_restarts: how many times all ranks are restarted from the newest checkpoint if one is killed or raises.

    Raises:
        OSError: there is no mpiexec, its ranks cannot detect that they were launched, or it would use several nodes.
    """
    if count == 1 and not max_restarts:
        return None
    if launcher.is_started_by_parle():
        raise OSError("this mpiexec does not pass rank numbers to its processes: use the launcher of your MPI")
    command = launcher.find_mpiexec()
    if command is None:
        raise FileNotFoundError("no mpiexec next to this Python or on the PATH: pip install mpich")
    nodes = launcher.allocated_nodes()
    if nodes > 1:
        is_slurm = "SLURM_JOB_ID" in os.environ
        start, otherwise = ("srun --mpi=pmi2", " (with Open MPI: --mpi=pmix)") if is_slurm else ("mpiexec", "")
        raise OSError(
            f"this job has {nodes} nodes: start its ranks with {start} -n {count} python {sys.argv[0]}{otherwise}"
        )
    os.environ.update(launcher.settings_for_own_ranks(nodes))
    if sys.stdout.isatty():
        os.environ[TERMINAL_WIDTH] = str(shutil.get_terminal_size().columns)
    sys.stdout.flush()
    forwarder = SignalForwarder()
    try:
        return _run_with_restarts(
            [command, "-n", str(count), sys.executable, *sys.argv], count, forwarder, max_restarts
        )
    finally:
        forwarder.ignore_signals()  # which could otherwise change the exit status while Python exits


def _run_with_restarts(command: list[str], count: int, forwarder: "SignalForwarder", max_restarts: int) -> int:
    run, resume, restarts = _given_run(), [], 0
    while True:
        with tempfile.TemporaryDirectory(prefix="parle-") as folder:
            status, failed = Attempt([*command, *resume], Path(folder), count, forwarder).supervise()
            if Path(folder, RUN).exists():
                run = _read_text(Path(folder, RUN))
        if not failed or forwarder.asked_to_stop or restarts == max_restarts:
            return status
        restarts += 1
        if run is None:
            _write_line("not restarted: there is no checkpoint yet")
            return status
        _write_line(f"restart {restarts} of {max_restarts}, from the newest checkpoint in {run}")
        resume = ["--resume", run]


class SignalForwarder:
    """Passes the signals that this process gets to the ranks, or to the mpiexec that is starting or ending them.

    Open MPI's mpirun gives its ranks one second after SIGTERM, which may be too short to save, and drops their output.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.mpiexec: subprocess.Popen[bytes] | None = None
        self.all_started = False
        self.pids: dict[int, int] = {}  # of the ranks that are running
        self.numbers = (*unignored(STOP_SIGNALS), signal.SIGUSR1)
        for number in self.numbers:
            signal.signal(number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self.all_started and self.pids:
            self.signal_ranks(number)
        elif self.mpiexec is not None:
            self.mpiexec.send_signal(FORWARDED_AS.get(number, number))

    def signal_ranks(self, number: int) -> None:
        for pid in list(self.pids.values()):
            with contextlib.suppress(OSError):  # it has just ended
                os.kill(pid, number)

    def ignore_signals(self) -> None:
        for number in self.numbers:
            signal.signal(number, signal.SIG_IGN)

    @property
    def first_stop_signal(self) -> int | None:
        return next((number for number in self.received if number in STOP_SIGNALS), None)

    @property
    def asked_to_stop(self) -> bool:
        return self.first_stop_signal is not None

    @property
    def asked_to_stop_at_once(self) -> bool:
        return self.received.count(signal.SIGINT) > 1


class Attempt:
    """One mpiexec and its ranks: forwards their output, and detects which rank exits first without an exit notice.

    Args:
        folder: an empty directory for the ranks' pipes.
        forwarder: is given mpiexec and the ranks' process numbers.
    """

    def __init__(self, command: list[str], folder: Path, count: int, forwarder: SignalForwarder):
        self.folder, self.count, self.forwarder = folder, count, forwarder
        self.exited: list[int] = []  # ranks, in the order in which they exited
        self.exits: dict[int, tuple[str, int]] = {}  # rank → exit notice and status
        self.complaint: str | None = None  # the last line on stderr
        self.streams, self.open_outputs, self.any_started = selectors.DefaultSelector(), 2, False
        self.kill_time: float | None = None
        for rank in range(count):  # the kernel reports closed pipes in the order in which they were closed
            os.mkfifo(folder / str(rank))
            pipe = os.open(folder / str(rank), os.O_RDONLY | os.O_NONBLOCK)
            self.streams.register(pipe, selectors.EVENT_READ, rank)
        # mpiexec has its own process group, so that Ctrl-C reaches it once, through this process; it cannot read from
        # the terminal then.
        self.mpiexec = subprocess.Popen(
            [*_end_with_parent(), *command],
            env=os.environ | {launcher.STATUS_DIR: str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        self.streams.register(self.mpiexec.stdout, selectors.EVENT_READ, sys.stdout)
        self.streams.register(self.mpiexec.stderr, selectors.EVENT_READ, sys.stderr)
        forwarder.mpiexec, forwarder.all_started, forwarder.pids = self.mpiexec, False, {}
        if forwarder.asked_to_stop:  # while nothing was running
            self.mpiexec.terminate()

    def supervise(self) -> tuple[int, bool]:
        """Wait until all have ended. Returns the exit status, and whether a rank was killed or raised."""
        start_deadline = time.monotonic() + START_TIMEOUT
        while self.open_outputs:
            if not self.any_started and time.monotonic() > start_deadline:
                self.complaint = f"no rank started within {START_TIMEOUT:.0f} s: mpiexec may wait for another program"
                os.killpg(self.mpiexec.pid, signal.SIGKILL)  # also the other program, for example srun
                break
            self._end_ranks_that_wait()
            for key, _ in self.streams.select(1):
                if isinstance(key.data, int):
                    self._read_notices(key.fd, key.data)
                else:
                    self._forward_output(key)
        status = self.mpiexec.wait()
        self.forwarder.signal_ranks(signal.SIGKILL)  # if mpiexec was killed
        for key in self.streams.get_map().values():
            if isinstance(key.data, int):
                os.close(key.fd)
        for stream in (self.streams, self.mpiexec.stdout, self.mpiexec.stderr):
            stream.close()
        return self._judge(status)

    def _read_notices(self, pipe: int, rank: int) -> None:
        chunk = os.read(pipe, 65536)
        if not chunk:
            self.streams.unregister(pipe)
            os.close(pipe)
            self.exited.append(rank)
            self.forwarder.pids.pop(rank, None)
        for line in chunk.decode().splitlines():
            self.any_started = True
            notice, number = line.split()
            if notice == STARTED:
                self.forwarder.pids[rank] = int(number)
                self.forwarder.all_started = len(self.forwarder.pids) == self.count
            else:
                self.exits[rank] = notice, int(number)

    def _forward_output(self, key: selectors.SelectorKey) -> None:
        chunk = os.read(key.fd, 65536)
        if not chunk:
            self.streams.unregister(key.fileobj)
            self.open_outputs -= 1
        self.any_started |= bool(chunk) and key.data is sys.stdout  # of ranks on another node, without pipes
        with ignore_write_errors(key.data):
            key.data.buffer.write(chunk)
            key.data.flush()

    def _end_ranks_that_wait(self) -> None:
        """Kill the ranks that remain after the grace period: those of an MPI that started on some ranks only."""
        unfinished = [rank for rank in self.exited if rank not in self.exits or self.exits[rank][0] != FINISHED]
        if not self.forwarder.asked_to_stop_at_once and (not unfinished or len(self.exited) == self.count):
            return
        self.kill_time = self.kill_time or time.monotonic() + GRACE_PERIOD
        if time.monotonic() > self.kill_time:
            if unfinished:
                self.complaint = f"rank {unfinished[0]} exited before the others, which were ended"
            self.forwarder.signal_ranks(signal.SIGKILL)
            self.mpiexec.terminate()

    def _was_stopped_before_training(self, status: int) -> bool:
        has_trained = (self.folder / RUN).exists() or status == os.EX_TEMPFAIL
        return self.forwarder.asked_to_stop and len(self.exits) < self.count and not has_trained

    def _judge(self, status: int) -> tuple[int, bool]:
        """Return the exit status, and whether a rank was killed or raised. Prints the complaint if no rank gave one.

        Args:
            status: of mpiexec, which counts unless the ranks agree on another one.
        """
        killed = [rank for rank in self.exited if rank not in self.exits]
        notices = {notice for notice, _ in self.exits.values()}
        statuses = {number for _, number in self.exits.values()}
        if self._was_stopped_before_training(status):
            expected = status_before_training(self.forwarder.first_stop_signal)
            if statuses <= {expected}:  # no rank failed before the signal
                return expected, False
        if self.complaint is None and killed:
            self.complaint = f"rank {killed[0]}: killed"
        elif self.complaint is None and status < 0:
            self.complaint = "mpiexec: killed"
        status = status if status >= 0 else 128 - status
        if FAILED in notices:
            return status or 1, True
        if len(self.exits) == self.count and len(statuses) == 1 and statuses != {0}:
            return statuses.pop(), False
        if self.complaint is None:
            return status, False
        resume = self.folder / RESUME
        _write_line(self.complaint + (f"; resume with: {_read_text(resume)}" if resume.exists() else ""))
        return status or 1, EXITED not in notices


def _end_with_parent() -> list[str]:
    """Return the command that makes Linux send SIGTERM to mpiexec, which ends its ranks, if this process is killed.

    It is a program that becomes mpiexec: between fork and exec, as with preexec_fn, Python may find a lock held by a
    thread that does not exist in the child.
    """
    return [sys.executable, "-I", "-S", "-c", BECOME_COMMAND, str(os.getpid())] if sys.platform == "linux" else []


def _given_run() -> str | None:
    """Return the directory that --resume names, from which ranks can be restarted before they report it."""
    words = iter(sys.argv)
    for word in words:
        name, _, value = word.partition("=")
        if name == "--resume":
            value = value or next(words, "-")
            return None if value.startswith("-") else value
    return None


def _read_text(path: Path) -> str:
    """Return what a rank has written, which may hold a path that is not UTF-8."""
    return os.fsdecode(path.read_bytes())


def unignored(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return the signals that this process does not ignore: nohup and background jobs of a shell ignore some."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def status_before_training(number: int) -> int:
    """Return the exit status of a program that a signal ends before it trains: a resumed run can be resumed again."""
    return os.EX_TEMPFAIL if any(word.startswith("--resume") for word in sys.argv) else 128 + number


def _write_line(text: str) -> None:
    with ignore_write_errors(sys.stderr):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
