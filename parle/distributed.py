"""Ranks: wait for them, act together, end together. Importing this starts no MPI."""

import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from parle import launcher

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch import Tensor


def run(main: Callable[[], None]) -> None:
    """Run `main`; whatever it raises ends every rank, with `rank R: …` as the last line and a non-zero status.

    Without this an exception ends one rank and the others wait for it for ever.
    """
    farewell = launcher.greet()
    try:
        main()
        farewell(launcher.LEFT)
    except BaseException as error:
        farewell(launcher.LEFT if isinstance(error, SystemExit) else launcher.FAILED)
        mpi = sys.modules.get("mpi4py.MPI")
        if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
            raise
        code = 1
        if isinstance(error, SystemExit):
            if error.code in (0, None):
                raise
            code = error.code if isinstance(error.code, int) else 1
        else:
            text = f"rank {mpi.COMM_WORLD.rank}: {type(error).__name__}: {reason(error)}\n"
            sys.stderr.write(traceback.format_exc() + text)
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(0.1)  # or mpiexec may end before it has passed that on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MPI_Abort would print a last line of its own
        mpi.COMM_WORLD.Abort(code)


def reason(error: BaseException) -> str:
    """What `error` says and what has been noted on it, in one line."""
    return "; ".join(" ".join(text.split()) for text in (str(error), *getattr(error, "__notes__", ())))


class Hang(RuntimeError):
    """Some rank has not come where this one waits for it."""


patience = math.inf  # seconds that `wait` waits; the same for every rank
HANG = 4711  # tag of the message by which a rank out of patience tells the others that wait that it does, too


def wait(request: "MPI.Request") -> None:
    """Wait for `request`, asleep most of the time: MPI's own wait keeps a core busy that another rank could use.

    The first tries only yield the core: a message of a few MB is there within milliseconds, and even a sleep of 0 takes
    50 µs. Later ones cost 5 % of a core; a longer sleep would delay the messages in several stages that MPI only moves
    on inside such a call.

    Raises:
        Hang: after `patience`, or when another rank is out of it.
    """
    started = time.perf_counter()
    while not request.Test():
        waited = time.perf_counter() - started
        if waited < 5e-3:
            os.sched_yield()
        else:
            time.sleep(2e-4)
        if waited > 1 and patience < math.inf and (waited > patience or _world().Iprobe(tag=HANG)):
            missing = ", ".join(f"rank {rank}" for rank in _missing()) or "ranks that wait elsewhere"
            raise Hang(f"waited {waited:.0f} s for {missing}")


def _world() -> "MPI.Comm":
    from mpi4py import MPI

    return MPI.COMM_WORLD


def _missing() -> list[int]:
    """The ranks that do not wait: those from which no message of a waiting one comes within a second."""
    world = _world()
    others = set(range(world.size)) - {world.rank}
    notices = [world.isend(None, dest=rank, tag=HANG) for rank in others]  # never completed: the end is near
    until = time.perf_counter() + 1
    while others and time.perf_counter() < until:
        others -= {rank for rank in others if world.iprobe(source=rank, tag=HANG)}
        time.sleep(1e-3)
    del notices
    return sorted(others)


def add(comm: "MPI.Comm", tensor: "Tensor") -> None:
    """Sum a tensor in the host's memory over the ranks of `comm`, in place: one collective, none for one rank."""
    if comm.size > 1:
        from mpi4py import MPI

        wait(comm.Iallreduce(MPI.IN_PLACE, tensor))


def broadcast(comm: "MPI.Comm", tensor: "Tensor") -> None:
    """Give a contiguous tensor in the host's memory the values it has on rank 0, in place."""
    wait(comm.Ibcast(tensor))


class Disagreement(ValueError):
    """A setting differs between ranks."""


def check_same(comm: "MPI.Comm", settings: Mapping[str, Any]) -> None:
    """Raises: Disagreement, on every rank."""
    every = gather(comm, dict(settings))
    for rank, theirs in enumerate(every):
        for name, value in every[0].items():
            if theirs[name] != value:
                raise Disagreement(
                    f"{name} is {value} on rank 0 and {theirs[name]} on rank {rank}: start every rank with the same"
                )


def together(comm: "MPI.Comm", action: Callable[[], Any], here: bool, *failures: type[Exception]) -> Any:
    """Run `action` where `here` says so, while the others wait. One of `failures` anywhere is raised everywhere."""
    result = error = None
    if here:
        try:
            result = action()
        except failures as caught:
            error = caught
    errors = [error for error in gather(comm, error) if error is not None]
    if errors:
        raise errors[0]
    return result


def node(comm: "MPI.Comm") -> "MPI.Comm":
    """The ranks of `comm` on this machine."""
    from mpi4py import MPI

    return comm.Split_type(MPI.COMM_TYPE_SHARED)


def gather(comm: "MPI.Comm", value: Any) -> list[Any]:
    """The small object `value` of every rank, on every rank, waiting asleep for the last one."""
    wait(comm.Ibarrier())
    return comm.allgather(value)


def library() -> str:
    """Whose MPI this is, and its version."""
    from mpi4py import MPI

    vendor, version = MPI.get_vendor()
    return f"{vendor} {'.'.join(map(str, version))}"


def cores() -> set[int]:
    """Those that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def threads(count: int, sharers: int) -> int:
    """Of each one of those who share so many cores, unless OMP_NUM_THREADS says."""
    if "OMP_NUM_THREADS" in os.environ:
        return int(os.environ["OMP_NUM_THREADS"].split(",")[0])
    return max(1, count // sharers)
