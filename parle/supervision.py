"""Start MPI ranks, supervise them, and end all of them if one fails."""

import contextlib
import ctypes
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

from parle import launcher
from parle.streams import ignore_write_errors

TERMINAL_WIDTH = "PARLE_TERMINAL_WIDTH"  # set for the ranks, which write to a pipe, if this program runs in a terminal
RUN, RESUME = "run", "resume"  # files beside the status pipes: the output directory, and the command that resumes it
STARTED = "started"  # a rank's first notice, with its process number
FINISHED, EXITED, FAILED = "finished", "exited", "failed"  # its last, with its exit status; if killed, it sends none
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

    Signals are forwarded. If a rank is killed, the last line on stderr gives its number and the command that
    resumes the run.

    Args:
        max_restarts: how often all ranks are started again, from the newest checkpoint, if one is killed or raises.

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
        start = "srun --mpi=pmi2" if "SLURM_JOB_ID" in os.environ else "mpiexec"
        raise OSError(f"this job has {nodes} nodes: start its ranks with {start} -n {count} python {sys.argv[0]}")
    os.environ.update(launcher.settings_for_own_ranks(nodes))
    if sys.stdout.isatty():
        os.environ[TERMINAL_WIDTH] = str(shutil.get_terminal_size().columns)
    sys.stdout.flush()
    command, forwarder = [command, "-n", str(count), sys.executable, *sys.argv], SignalForwarder()
    run, resume, restarts = _given_run(), [], 0
    while True:
        with tempfile.TemporaryDirectory(prefix="parle-") as folder:
            status, failed = _supervise([*command, *resume], Path(folder), count, forwarder)
            if Path(folder, RUN).exists():
                run = _read_text(Path(folder, RUN))
        if not failed or forwarder.asked_to_stop or restarts == max_restarts:
            return status
        restarts += 1
        with ignore_write_errors(sys.stderr):
            if run is None:
                sys.stderr.write("not restarted: there is no checkpoint yet\n")
            else:
                sys.stderr.write(f"restart {restarts} of {max_restarts}, from the newest checkpoint in {run}\n")
            sys.stderr.flush()
        if run is None:
            return status
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
        for number in (*unignored(STOP_SIGNALS), signal.SIGUSR1):
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

    @property
    def asked_to_stop(self) -> bool:
        return bool(set(STOP_SIGNALS) & set(self.received))

    @property
    def asked_to_stop_at_once(self) -> bool:
        return self.received.count(signal.SIGINT) > 1


def _supervise(command: list[str], folder: Path, count: int, forwarder: SignalForwarder) -> tuple[int, bool]:
    """Run mpiexec until it ends. Returns the exit status, and whether a rank was killed or raised.

    Forwards its output, and detects which rank exits first without an exit notice.
    """
    streams = selectors.DefaultSelector()
    for rank in range(count):  # the kernel reports closed pipes in the order in which they were closed
        os.mkfifo(folder / str(rank))
        streams.register(os.open(folder / str(rank), os.O_RDONLY | os.O_NONBLOCK), selectors.EVENT_READ, rank)
    # mpiexec has its own process group, so that Ctrl-C reaches it once, through this process; it cannot read from
    # the terminal then.
    mpiexec = subprocess.Popen(
        [*_end_with_parent(), *command],
        env=os.environ | {launcher.STATUS_DIR: str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    forwarder.mpiexec, forwarder.all_started, forwarder.pids = mpiexec, False, {}
    if forwarder.asked_to_stop:  # while nothing was running
        mpiexec.terminate()
    streams.register(mpiexec.stdout, selectors.EVENT_READ, sys.stdout)
    streams.register(mpiexec.stderr, selectors.EVENT_READ, sys.stderr)
    open_outputs, deadline, any_started = 2, None, False
    exited_ranks: list[int] = []
    exits: dict[int, tuple[str, int]] = {}  # rank → exit notice and status
    start_deadline, complaint = time.monotonic() + START_TIMEOUT, None
    while open_outputs:
        if not any_started and time.monotonic() > start_deadline:
            complaint = f"no rank started within {START_TIMEOUT:.0f} s: mpiexec may be waiting for another program"
            os.killpg(mpiexec.pid, signal.SIGKILL)  # it may be waiting for another program, as for srun
            break
        unfinished = [rank for rank in exited_ranks if rank not in exits or exits[rank][0] != FINISHED]
        if forwarder.asked_to_stop_at_once or (unfinished and len(exited_ranks) < count):
            deadline = deadline or time.monotonic() + GRACE_PERIOD
            if time.monotonic() > deadline:  # for example if MPI starts on some ranks only and they wait forever
                if unfinished:
                    complaint = f"rank {unfinished[0]} exited before the others, which were ended"
                forwarder.signal_ranks(signal.SIGKILL)
                mpiexec.terminate()
        for key, _ in streams.select(1):
            chunk = os.read(key.fd, 65536)
            if not chunk:
                streams.unregister(key.fileobj)
                if isinstance(key.data, int):
                    os.close(key.fd)
            if not isinstance(key.data, int):
                open_outputs -= not chunk
                any_started |= bool(chunk) and key.data is sys.stdout  # of ranks on another node, without pipes
                with ignore_write_errors(key.data):
                    key.data.buffer.write(chunk)
                    key.data.flush()
            elif chunk:
                any_started = True
                for line in chunk.decode().splitlines():
                    notice, number = line.split()
                    if notice == STARTED:
                        forwarder.pids[key.data] = int(number)
                        forwarder.all_started = len(forwarder.pids) == count
                    else:
                        exits[key.data] = notice, int(number)
            else:
                exited_ranks.append(key.data)
                forwarder.pids.pop(key.data, None)
    status = mpiexec.wait()
    forwarder.signal_ranks(signal.SIGKILL)  # mpiexec was killed
    for key in list(streams.get_map().values()):
        if isinstance(key.data, int):
            os.close(key.fd)
    streams.close()
    killed = [rank for rank in exited_ranks if rank not in exits]
    if complaint is None and killed:
        complaint = f"rank {killed[0]}: killed"
    elif complaint is None and status < 0:
        complaint = "mpiexec: killed"
    if len(exits) < count and forwarder.asked_to_stop and status != os.EX_TEMPFAIL and not (folder / RUN).exists():
        expected = status_before_training(next(number for number in forwarder.received if number in STOP_SIGNALS))
        if {number for _, number in exits.values()} <= {expected}:  # before they could handle the signal
            return expected, False
    hint = f"; resume with: {_read_text(folder / RESUME)}" if (folder / RESUME).exists() else ""
    return _judge(count, exits, status if status >= 0 else 128 - status, complaint and f"{complaint}{hint}")


def _judge(count: int, exits: dict[int, tuple[str, int]], status: int, complaint: str | None) -> tuple[int, bool]:
    """Return the exit status, and whether a rank was killed or raised. Prints the complaint if no rank gave a reason.

    Args:
        exits: rank → exit notice and status.
        status: of mpiexec, which counts unless the ranks agree on another one.
    """
    notices, statuses = {notice for notice, _ in exits.values()}, {number for _, number in exits.values()}
    if FAILED in notices:
        return status or 1, True
    if len(exits) == count and len(statuses) == 1 and statuses != {0}:
        return statuses.pop(), False
    if complaint is None:
        return status, False
    with ignore_write_errors(sys.stderr):
        sys.stderr.write(f"{complaint}\n")
    return status or 1, EXITED not in notices


def _end_with_parent() -> list[str]:
    """Return the command that makes Linux send SIGTERM to mpiexec, which ends its ranks, if this process is killed.

    It is a program that becomes mpiexec: between fork and exec, as with preexec_fn, Python may find a lock held by a
    thread that does not exist in the child.
    """
    return [sys.executable, "-I", "-S", "-c", BECOME_COMMAND, str(os.getpid())] if sys.platform == "linux" else []


def open_status_pipe() -> Callable[[str, int], bool]:
    """Open this rank's pipe to the process that supervises it, if any, and report the start.

    Returns the function that reports the exit, which returns whether that process is alive. Until then, or until the
    rank dies, the pipe stays open.
    """
    rank = launcher.rank_from_environment()
    if not launcher.is_started_by_parle() or rank is None:
        return lambda notice, status: False
    try:
        pipe = os.open(Path(os.environ[launcher.STATUS_DIR], str(rank[0])), os.O_WRONLY | os.O_NONBLOCK)
        os.write(pipe, f"{STARTED} {os.getpid()}\n".encode())
        if sys.platform == "linux":
            # SIGTERM when mpiexec's process that has started this one dies (PR_SET_PDEATHSIG): mpiexec would wait on
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    except OSError:  # on another node there is no pipe, and nobody reads it if that process was killed
        return lambda notice, status: False

    def report_exit(notice: str, status: int) -> bool:
        try:
            os.write(pipe, f"{notice} {status}\n".encode())
        except BrokenPipeError:
            return False
        finally:
            os.close(pipe)
        return True

    return report_exit


def write_resume_command(command: str, run: Path) -> None:
    """Write the command that resumes the run, and its directory, where the supervising process, if any, reads them."""
    if launcher.is_started_by_parle() and launcher.rank_from_environment() is not None:
        folder, rank = Path(os.environ[launcher.STATUS_DIR]), launcher.rank_from_environment()[0]
        with contextlib.suppress(OSError):  # on a full disk the last line lacks this hint
            for name, text in ((RUN, str(run)), (RESUME, command)):
                (folder / f".{name}-{rank}").write_bytes(os.fsencode(text))
                os.replace(folder / f".{name}-{rank}", folder / name)  # atomic


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


def run_or_abort(main: Callable[[], None]) -> None:
    """Run `main`; any exception ends every rank, with `rank R: …` as the last line and a non-zero exit status.

    Otherwise an exception ends one rank, and the others wait for it forever.
    """
    report_exit = open_status_pipe()
    try:
        main()
    except BaseException as error:
        mpi = sys.modules.get("mpi4py.MPI")
        finalized = mpi is not None and mpi.Is_finalized()
        is_exit, status = isinstance(error, SystemExit | KeyboardInterrupt), exit_status(error)
        is_supervised = report_exit((FINISHED if finalized else EXITED) if is_exit else FAILED, status)
        if mpi is None or not mpi.Is_initialized() or finalized:
            if is_supervised and is_exit and not isinstance(getattr(error, "code", None), str):
                # the supervising process exits with the status: Open MPI's mpirun would end the other ranks
                raise SystemExit(0) from None
            raise
        if is_exit and not status:
            raise
        if not is_exit:
            text = f"rank {mpi.COMM_WORLD.rank}: {type(error).__name__}: {describe_error(error)}\n"
            with ignore_write_errors(sys.stderr):
                sys.stderr.write(traceback.format_exc() + text)
        for stream in (sys.stdout, sys.stderr):
            with ignore_write_errors(stream):
                stream.flush()
        time.sleep(0.1)  # otherwise mpiexec may end before it has forwarded the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MPI_Abort would print another last line
        mpi.COMM_WORLD.Abort(status)
    else:
        report_exit(FINISHED, 0)


def exit_status(error: BaseException) -> int:
    """Return the exit status of a process that ends with this exception."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if not isinstance(error, SystemExit):
        return 1
    return int(error.code) if isinstance(error.code, int) else int(error.code is not None)


def describe_error(error: BaseException) -> str:
    """Return an error's message and notes as one line."""
    return "; ".join(" ".join(text.split()) for text in (str(error), *getattr(error, "__notes__", ())))
