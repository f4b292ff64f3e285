"""Ranks: start them, find them, wait for them, and end them together. Importing this starts no MPI."""

import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch import Tensor

# What each launcher tells the ranks it starts: where a rank finds its number and how many there are. PMIx gives no
# size. Slurm sets its names in a job step; one of a single task may be a shell, so that one launches nothing.
LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "PMIx": ("PMIX_RANK", None),
}
TERMINAL = "PARLE_TERMINAL"  # set for the ranks that this program starts from a terminal, whose output is a pipe


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int | None] | None:
    """Rank and number of ranks (None: not told) where a launcher started this process, else None."""
    for name, (rank, size) in LAUNCHERS.items():
        if rank in environment and (size is None or size in environment):
            ranks = None if size is None else int(environment[size])
            if not (name == "Slurm" and ranks == 1):
                return int(environment[rank]), ranks
    return None


def start(count: int) -> None:
    """Run this very command again as `count` ranks, in this process's place. Returns where one rank is enough.

    Raises:
        FileNotFoundError: no mpiexec.
    """
    if count == 1:
        return
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
    os.execv(mpiexec, [mpiexec, "-n", str(count), sys.executable, *sys.argv])


def run(main: Callable[[], None]) -> None:
    """Run `main`; whatever it raises ends every rank, with `rank R: …` as the last line and a non-zero status.

    Without this an exception ends one rank and the others wait for it for ever.
    """
    try:
        main()
    except BaseException as error:
        mpi = sys.modules.get("mpi4py.MPI")
        if isinstance(error, SystemExit) or mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
            raise
        rank = mpi.COMM_WORLD.rank
        sys.stdout.flush()
        sys.stderr.write(traceback.format_exc() + f"rank {rank}: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MPI_Abort would print a last line of its own
        mpi.COMM_WORLD.Abort(1)


def wait(request: "MPI.Request") -> None:
    """Wait for `request`, asleep most of the time: MPI's own wait keeps a core busy that another rank could use.

    The first tries only yield, since a message of a few MB is there within a millisecond.
    """
    started = time.perf_counter()
    while not request.Test():
        waited = time.perf_counter() - started
        time.sleep(0 if waited < 1e-3 else min(waited / 10, 1e-3))


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


def threads(node: "MPI.Comm") -> int:
    """Threads for each rank of `node`: the cores its ranks may use, over the ranks, unless OMP_NUM_THREADS says."""
    if "OMP_NUM_THREADS" in os.environ:
        return int(os.environ["OMP_NUM_THREADS"])
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set().union(*gather(node, set(affinity)))  # a launcher may have bound each rank to cores of its own
    return max(1, len(cores) // node.size)
