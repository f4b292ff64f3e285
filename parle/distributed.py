"""Groups of processes: sum, gather and broadcast within a time limit; errors and settings agreed on by every rank.

Importing this module does not start MPI.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch import Tensor

timeout = math.inf  # seconds that a rank waits for the others; must be the same on every rank
TIMEOUT_TAG = 4711  # MPI tag of the message by which a rank that timed out notifies the others
POLL_SECONDS = 2e-4  # between tests of a pending request: 5 % of a core; a longer sleep would delay large messages


class SettingsMismatch(ValueError):
    """A setting differs between ranks."""


class CollectiveTimeout(RuntimeError):
    """Some rank has not reached a collective call within the time limit."""


class Group:
    """The processes that share a piece of work; this base class is a group of one. All methods are collective."""

    rank, size = 0, 1

    def all_reduce(self, tensor: "Tensor") -> None:
        """Sum a tensor in host memory over the group, in place."""

    def broadcast(self, tensor: "Tensor") -> None:
        """Overwrite a contiguous tensor in host memory with its values on rank 0."""

    def all_gather(self, value: Any) -> list[Any]:
        """Return the small object `value` of every rank, in rank order."""
        return [value]

    def shard(self, total: int) -> slice:
        """Return this rank's share of `total` rows."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def check_consistent(self, settings: Mapping[str, Any]) -> None:
        """Check that all ranks have the same settings. Raises: SettingsMismatch, on every rank."""
        first, *others = self.all_gather(dict(settings))
        for rank, theirs in enumerate(others, start=1):
            for name, value in first.items():
                if theirs[name] != value:
                    raise SettingsMismatch(
                        f"{name} is {value} on rank 0 and {theirs[name]} on rank {rank}: start every rank with the same"
                    )

    def run_and_propagate_errors(
        self, action: Callable[[], Any], *errors: type[Exception], only_if: bool = True
    ) -> Any:
        """Return what `action` returns on the ranks where `only_if` is true; the others wait and return None.

        If it raises one of `errors` on any rank, that error is raised on every rank.
        """
        result = error = None
        if only_if:
            try:
                result = action()
            except errors as caught:
                error = caught
        raised = [error for error in self.all_gather(error) if error is not None]
        if raised:
            raise raised[0]
        return result


class MPIGroup(Group):
    """The ranks of an MPI communicator. Waiting ranks yield the core instead of spinning in MPI's own wait."""

    def __init__(self, comm: "MPI.Comm"):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size

    def all_reduce(self, tensor: "Tensor") -> None:
        if self.size > 1:
            from mpi4py import MPI

            wait_with_timeout(self.comm.Iallreduce(MPI.IN_PLACE, tensor))

    def broadcast(self, tensor: "Tensor") -> None:
        wait_with_timeout(self.comm.Ibcast(tensor))

    def all_gather(self, value: Any) -> list[Any]:
        wait_with_timeout(self.comm.Ibarrier())  # allgather itself would spin until the last rank arrives
        return self.comm.allgather(value)

    def split(self, color: int) -> "MPIGroup":
        """Return the group of the ranks that pass the same `color`."""
        return MPIGroup(self.comm.Split(color))

    def split_by_node(self) -> "MPIGroup":
        """Return the group of the ranks on this machine."""
        from mpi4py import MPI

        return MPIGroup(self.comm.Split_type(MPI.COMM_TYPE_SHARED))


class Groups(NamedTuple):
    """The groups that this process belongs to."""

    replica: Group = Group()  # the ranks that share its replica, data-parallel
    world: Group = Group()  # all ranks


def wait_with_timeout(request: "MPI.Request") -> None:
    """Wait for `request`, polling with short sleeps: MPI's own wait spins on a core that another rank could use.

    The first 5 ms only yield the core, since a message of a few MB arrives within milliseconds and even a sleep of 0
    takes 50 µs. MPI advances multi-stage messages only inside calls such as Test.

    Raises:
        CollectiveTimeout: after `timeout` seconds, or when another rank timed out.
    """
    started = time.perf_counter()
    while not request.Test():
        waited = time.perf_counter() - started
        if waited < 5e-3:
            os.sched_yield()
        else:
            time.sleep(POLL_SECONDS)
        if waited > 1 and timeout < math.inf and (waited > timeout or _world().Iprobe(tag=TIMEOUT_TAG)):
            missing = ", ".join(f"rank {rank}" for rank in _missing_ranks()) or "ranks that wait in another call"
            raise CollectiveTimeout(f"waited {waited:.0f} s for {missing}; if it is only slow, use a larger --timeout")


def _world() -> "MPI.Comm":
    from mpi4py import MPI

    return MPI.COMM_WORLD


def _missing_ranks() -> list[int]:
    """Return the ranks that are not waiting: those that send no notice within a second."""
    world = _world()
    others = set(range(world.size)) - {world.rank}
    notices = [world.isend(None, dest=rank, tag=TIMEOUT_TAG) for rank in others]  # never completed: all ranks abort
    deadline = time.perf_counter() + 1
    while others and time.perf_counter() < deadline:
        others -= {rank for rank in others if world.iprobe(source=rank, tag=TIMEOUT_TAG)}
        time.sleep(1e-3)
    del notices
    return sorted(others)


def mpi_library() -> str:
    """Return the name and version of the MPI implementation."""
    from mpi4py import MPI

    vendor, version = MPI.get_vendor()
    return f"{vendor} {'.'.join(map(str, version))}"


def available_cores() -> set[int]:
    """Return the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def threads_per_rank(cores: int, ranks: int) -> int:
    """Return the number of threads for each of `ranks` processes on `cores` cores; OMP_NUM_THREADS overrides it."""
    if "OMP_NUM_THREADS" in os.environ:
        return int(os.environ["OMP_NUM_THREADS"].split(",")[0])
    return max(1, cores // ranks)
