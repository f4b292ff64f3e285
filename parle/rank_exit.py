"""How a rank ends, and what it tells the process that supervises it.

A rank that `supervision.spawn_ranks` has started sends notices through a pipe: that it has started, and how it ends.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from parle import launcher
from parle.streams import ignore_write_errors

STARTED = "started"  # a rank's first notice, with its process number
FINISHED, EXITED, FAILED = "finished", "exited", "failed"  # its last, with its exit status; if killed, it sends none
RUN, RESUME = "run", "resume"  # files beside the pipes: the output directory, and the command that resumes it


def run_or_abort(main: Callable[[], None]) -> None:
    """Run `main`; any exception ends every rank, with `rank R: …` as the last line and a non-zero exit status.

    Otherwise an exception ends one rank, and the others wait for it forever.
    """
    end_with_launcher()
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


def end_with_launcher() -> None:
    """Make Linux send SIGTERM when the launcher's process that has started this one dies (PR_SET_PDEATHSIG).

    MPICH's mpiexec would not notice, and the ranks would train unseen. Slurm kills its ranks itself.
    """
    if sys.platform == "linux" and launcher.launcher_name() not in (None, "Slurm"):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


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
