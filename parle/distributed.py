"""Groups of processes: sum, gather and broadcast within a time limit; errors and settings agreed on by every rank.

Importing this module does not start MPI.
"""

import contextlib
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch import Tensor

TIMEOUT_TAG = 4711  # MPI tag of the message by which a rank that timed out notifies the others
POLL_SECONDS = 2e-4  # between tests of a pending request: 5 % of a core; a longer sleep would delay large messages


_released: list["MPI.Comm"] = []


class SettingsMismatch(ValueError):
    """A setting differs between ranks."""


class CollectiveTimeout(RuntimeError):
    """Some rank has not reached a collective call within the time limit."""


def first_difference(settings: Sequence[dict[str, Any]], owner: str = "rank") -> str | None:
    """Return the first setting that differs and its values, as a clause; None if all are equal.

    Args:
        settings: those of each `owner`, by name.
    """
    first, *others = settings
    for number, theirs in enumerate(others, start=1):
        for name in first | theirs:
            ours, other = first.get(name, "missing"), theirs.get(name, "missing")
            if ours != other:
                return f"{name} is {ours} on {owner} 0 and {other} on {owner} {number}"
    return None


class Group:
    """The processes that share a piece of work; this base class is a group of one. All methods are collective."""

    rank, size = 0, 1

    def all_reduce(self, tensor: "Tensor") -> None:
        """Sum a tensor in host memory over the group, in place."""

    def broadcast(self, tensor: "Tensor", root: int = 0) -> None:
        """Overwrite a contiguous tensor in host memory with its values on rank `root`."""

    def all_gather(self, value: Any) -> list[Any]:
        """Return the small object `value` of every rank, in rank order."""
        return [value]

    def shard(self, total: int) -> slice:
        """Return this rank's share of `total` rows."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def check_consistent(self, settings: Mapping[str, Any]) -> None:
        """Check that all ranks have the same settings. Raises: SettingsMismatch, on every rank."""
        found = first_difference(self.all_gather(dict(settings)))
        if found:
            raise SettingsMismatch(f"{found}: start every rank with the same value")

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
        try:
            if raised:
                raise raised[0]
            return result
        finally:
            del error, raised  # the traceback refers to this frame: a cycle that would keep `action` in memory


class MPIGroup(Group):
    """The ranks of an MPI communicator. Waiting ranks yield the core instead of spinning in MPI's own wait.

    Args:
        timeout: seconds that a rank waits for the others; must be the same on every rank.
        parent: the group that contains this one; a rank that times out notifies its ranks.
    """

    def __init__(self, comm: "MPI.Comm", timeout: float = math.inf, parent: "MPIGroup | None" = None):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.timeout, self.parent = timeout, parent

    def all_reduce(self, tensor: "Tensor") -> None:
        if self.size > 1:
            from mpi4py import MPI

            self.wait(self.comm.Iallreduce(MPI.IN_PLACE, tensor))

    def broadcast(self, tensor: "Tensor", root: int = 0) -> None:
        self.wait(self.comm.Ibcast(tensor, root))

    def all_gather(self, value: Any) -> list[Any]:
        # mpi4py's allgather would spin until the last rank arrives, without a time limit
        data, sizes = np.frombuffer(pickle.dumps(value), np.uint8), np.empty(self.size, np.int64)
        self.wait(self.comm.Iallgather(np.array([len(data)]), sizes))
        gathered = np.empty(sizes.sum(), np.uint8)
        self.wait(self.comm.Iallgatherv(data, (gathered, sizes)))
        return [pickle.loads(part) for part in np.split(gathered, np.cumsum(sizes)[:-1])]

    def duplicate(self) -> "MPIGroup":
        """Return a group of the same ranks with a communicator of its own, which the caller must `release`."""
        _free_released()
        comm, request = self.comm.Idup()
        self.wait(request)
        return MPIGroup(comm, self.timeout)

    def split(self, color: int) -> "MPIGroup":
        """Return the group of the ranks that pass the same `color`, which the caller must `release`."""
        return MPIGroup(self.comm.Split(color), self.timeout, parent=self)

    def split_by_node(self) -> "MPIGroup":
        """Return the group of the ranks on this machine."""
        from mpi4py import MPI

        return MPIGroup(self.comm.Split_type(MPI.COMM_TYPE_SHARED), self.timeout, parent=self)

    def release(self) -> None:
        """Let the next `duplicate` free the communicator: MPI libraries provide only about 2,000.

        Unlike MPI's Free this may be called by the garbage collector, which can run in the middle of an MPI call.
        """
        _released.append(self.comm)

    @contextlib.contextmanager
    def unlimited(self) -> Iterator[None]:
        """Wait without a time limit: one rank does work that may take hours. Every rank must enter and leave it."""
        timeout, self.timeout = self.timeout, math.inf
        try:
            yield
        finally:
            self.timeout = timeout

    def wait(self, request: "MPI.Request") -> None:
        """Wait for `request`, polling with short sleeps: MPI's own wait spins on a core that another rank could use.

        The first 5 ms only yield the core, since a message of a few MB arrives within milliseconds and even a sleep of
        0 takes 50 µs. MPI advances multi-stage messages only inside calls such as Test.

        Raises:
            CollectiveTimeout: after `timeout` seconds, or when another rank timed out.
        """
        notices = (self.parent or self).comm
        started = time.perf_counter()
        while not request.Test():
            waited = time.perf_counter() - started
            if waited < 5e-3:
                os.sched_yield()
            else:
                time.sleep(POLL_SECONDS)
            if waited > 1 and self.timeout < math.inf and (waited > self.timeout or notices.Iprobe(tag=TIMEOUT_TAG)):
                missing = ", ".join(f"rank {rank}" for rank in _missing_ranks(notices))
                raise CollectiveTimeout(
                    f"rank {notices.rank} waited {waited:.0f} s for {missing or 'ranks that wait in another call'}; "
                    "if they are only slow, use a larger timeout"
                )


class Groups(NamedTuple):
    """The groups that this process belongs to."""

    replica: Group = Group()  # the ranks that share its replica, data-parallel
    world: Group = Group()  # all ranks


def _free_released() -> None:
    while _released:
        _released.pop().Free()


def _missing_ranks(comm: "MPI.Comm") -> list[int]:
    """Return the ranks that are not waiting: those that send no notice within a second."""
    others = set(range(comm.size)) - {comm.rank}
    notices = [comm.isend(None, dest=rank, tag=TIMEOUT_TAG) for rank in others]  # never completed: all ranks abort
    deadline = time.perf_counter() + 1
    while others and time.perf_counter() < deadline:
        others -= {rank for rank in others if comm.iprobe(source=rank, tag=TIMEOUT_TAG)}
        time.sleep(1e-3)
    del notices
    return sorted(others)


def mpi_library() -> str:
    """Return the name and version of the MPI implementation."""
    from mpi4py import MPI

    vendor, version = MPI.get_vendor()
    return f"{vendor} {'.'.join(map(str, version))}"
