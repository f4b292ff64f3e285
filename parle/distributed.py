"""Groups of processes: sum, gather and broadcast within a time limit; errors and settings agreed on by every rank.

Their ranks communicate by MPI or by torch.distributed. Importing this module loads neither.
"""

import contextlib
import datetime
import math
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch
    from mpi4py import MPI
    from torch import Tensor
    from torch.distributed import ProcessGroup, Work

TIMEOUT_TAG = 4711  # MPI tag of the message by which a rank that timed out notifies the others
TIMEOUT_KEY = "parle-timeout"  # of such notices in the store of a process group
POLL_SECONDS = 2e-4  # between tests of a pending request: 5 % of a core; a longer sleep would delay large messages
MAX_SECONDS = 30 * 86400.0  # of a process group, which needs a limit
NOTICE_SECONDS = 0.5  # between tests whether another rank timed out


_released: list["MPI.Comm"] = []
# Kept: ranks whose garbage collectors free process groups at different times would disagree on the names of new ones
_subgroups: "dict[tuple[ProcessGroup, tuple[int, ...], float], ProcessGroup]" = {}


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
    """The processes that share a piece of work; this base class is a group of one. All methods are collective.

    Args:
        timeout: seconds that a rank waits for the others; must be the same on every rank.
        parent: the group that contains this one; a rank that times out notifies its ranks.
    """

    rank, size = 0, 1

    def __init__(self, timeout: float = math.inf, parent: "Group | None" = None):
        self.timeout, self.parent = timeout, parent

    def accepts(self, device: "torch.device") -> bool:
        """Return whether tensors of this device can be sent; those of others are copied to host memory."""
        return device.type == "cpu"

    def all_reduce(self, tensor: "Tensor") -> None:
        """Sum a tensor over the group, in place."""

    def all_reduce_rounded(self, tensor: "Tensor") -> "tuple[Tensor, slice, Tensor]":
        """Return the sum of a vector in half precision, rounded to it, and for a slice of it the rounding error.

        Each rank sums one slice in float32, in the order of the ranks: MPI has no half precision. The slices of all
        ranks cover the vector.
        """
        import torch

        slices = tensor.new_zeros(self.size, -(-len(tensor) // self.size))
        slices.view(-1)[: len(tensor)] = tensor
        exact = self._exchange_slices(slices).sum(0, dtype=torch.float32)
        rounded = exact.to(tensor.dtype)
        own = slice(self.rank * len(exact), min((self.rank + 1) * len(exact), len(tensor)))
        error = (exact - rounded)[: max(0, own.stop - own.start)]
        return self._gather_slices(rounded).view(-1)[: len(tensor)], own, error

    def _exchange_slices(self, slices: "Tensor") -> "Tensor":
        """Return row `rank` of the tensors of all ranks, in rank order."""
        return slices

    def _gather_slices(self, row: "Tensor") -> "Tensor":
        """Return the rows of all ranks, in rank order."""
        return row[None]

    def broadcast(self, tensor: "Tensor", root: int = 0) -> None:
        """Overwrite a contiguous tensor with its values on rank `root`."""

    def all_gather(self, value: Any) -> list[Any]:
        """Return the small object `value` of every rank, in rank order."""
        return [value]

    def duplicate(self) -> "Group":
        """Return a group of the same ranks for use by one optimizer, which must `release` it."""
        return self

    def split(self, color: int) -> "Group":
        """Return the group of the ranks that pass the same `color`, which the caller must `release`."""
        return Group(self.timeout, parent=self)

    def split_by_node(self) -> "Group":
        """Return the group of the ranks on this machine."""
        return Group(self.timeout, parent=self)

    def release(self) -> None:
        """Free what the group holds. The garbage collector may call this, in the middle of any other call."""

    def close(self) -> None:
        """End communication of this process."""

    def library(self) -> str:
        """Return the name and version of the library that carries messages."""
        return "none"

    @contextlib.contextmanager
    def unlimited(self) -> Iterator[None]:
        """Wait without a time limit: one rank does work that may take hours. Every rank must enter and leave it."""
        timeout, self.timeout = self.timeout, math.inf
        try:
            yield
        finally:
            self.timeout = timeout

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
                error = caught if self.size == 1 else _picklable(caught)
        raised = [error for error in self.all_gather(error) if error is not None]
        try:
            if raised:
                raise raised[0]
            return result
        finally:
            del error, raised  # the traceback refers to this frame: a cycle that would keep `action` in memory

    def _poll(self, is_complete: Callable[[], bool], has_notice: Callable[[], bool]) -> None:
        """Wait until `is_complete`, with short sleeps between calls: MPI's own wait would spin on a core.

        The first 5 ms only yield the core, since a message of a few MB arrives within milliseconds and even a sleep of
        0 takes 50 µs. MPI advances multi-stage messages only inside calls such as Test.

        Args:
            has_notice: whether another rank has timed out.

        Raises:
            CollectiveTimeout: after `timeout` seconds, or when another rank timed out.
        """
        started, next_look = time.perf_counter(), 1.0
        while not is_complete():
            waited = time.perf_counter() - started
            if waited < 5e-3:
                os.sched_yield()
            else:
                time.sleep(POLL_SECONDS)
            looks = waited > next_look and self.timeout < math.inf
            if waited > self.timeout or (looks and has_notice()):
                whole = self.parent or self
                missing = ", ".join(f"rank {rank}" for rank in whole._missing_ranks())
                raise CollectiveTimeout(
                    f"rank {whole.rank} waited {waited:.0f} s for {missing or 'ranks that wait in another call'}; "
                    "if they are only slow, use a larger timeout"
                )
            next_look = waited + NOTICE_SECONDS if looks else next_look

    def _missing_ranks(self) -> list[int]:
        """Return the ranks that are not waiting: those that send no notice within a second."""
        return []


class MPIGroup(Group):
    """The ranks of an MPI communicator. Waiting ranks yield the core instead of spinning in MPI's own wait."""

    def __init__(self, comm: "MPI.Comm", timeout: float = math.inf, parent: Group | None = None):
        super().__init__(timeout, parent)
        self.comm, self.rank, self.size = comm, comm.rank, comm.size

    def all_reduce(self, tensor: "Tensor") -> None:
        if self.size > 1:
            from mpi4py import MPI

            self.wait(self.comm.Iallreduce(MPI.IN_PLACE, tensor))

    def _exchange_slices(self, slices: "Tensor") -> "Tensor":
        received = slices.new_empty(slices.shape)
        self.wait(self.comm.Ialltoall(_as_bytes(slices), _as_bytes(received)))
        return received

    def _gather_slices(self, row: "Tensor") -> "Tensor":
        rows = row.new_empty(self.size, len(row))
        self.wait(self.comm.Iallgather(_as_bytes(row), _as_bytes(rows)))
        return rows

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
        _free_released()
        comm, request = self.comm.Idup()
        self.wait(request)
        return MPIGroup(comm, self.timeout)

    def split(self, color: int) -> "MPIGroup":
        return MPIGroup(self.comm.Split(color), self.timeout, parent=self)

    def split_by_node(self) -> "MPIGroup":
        from mpi4py import MPI

        return MPIGroup(self.comm.Split_type(MPI.COMM_TYPE_SHARED), self.timeout, parent=self)

    def release(self) -> None:
        """Let the next `duplicate` free the communicator: MPI libraries provide only about 2,000.

        MPI's own Free must not be called in the middle of another MPI call, as the garbage collector might.
        """
        _released.append(self.comm)

    def close(self) -> None:
        from mpi4py import MPI

        MPI.Finalize()

    def library(self) -> str:
        return mpi_library()

    def wait(self, request: "MPI.Request") -> None:
        """Wait for `request`. Raises: CollectiveTimeout."""
        notices = (self.parent or self).comm
        self._poll(request.Test, lambda: notices.Iprobe(tag=TIMEOUT_TAG))

    def _missing_ranks(self) -> list[int]:
        others = set(range(self.size)) - {self.rank}
        # never completed: all ranks abort
        notices = [self.comm.isend(None, dest=rank, tag=TIMEOUT_TAG) for rank in others]
        deadline = time.perf_counter() + 1
        while others and time.perf_counter() < deadline:
            others -= {rank for rank in others if self.comm.iprobe(source=rank, tag=TIMEOUT_TAG)}
            time.sleep(1e-3)
        del notices
        return sorted(others)


class TorchGroup(Group):
    """The ranks of a torch.distributed process group, by gloo or NCCL.

    Optimizers share it with the caller, as DistributedDataParallel does: all ranks make the same calls in the same
    order. The time limit of the process group applies as well. For tensors on a GPU it is the only one, since the host
    does not wait for them.
    """

    def __init__(self, group: "ProcessGroup", timeout: float = math.inf, parent: Group | None = None):
        super().__init__(timeout, parent)
        self.comm, self.rank, self.size = group, group.rank(), group.size()
        kinds = sorted(device.type for device in group._device_types)
        self.device_types = ["cpu"] if group.name() == "gloo" else kinds  # gloo would copy to host memory by itself
        self.object_device = "cpu" if "cpu" in self.device_types else self.device_types[0]

    def accepts(self, device: "torch.device") -> bool:
        return device.type in self.device_types

    def all_reduce(self, tensor: "Tensor") -> None:
        from torch import distributed

        self.wait(distributed.all_reduce(tensor, group=self.comm, async_op=True), tensor)

    def _exchange_slices(self, slices: "Tensor") -> "Tensor":
        from torch import distributed

        received = slices.new_empty(slices.shape)
        buffers = _as_bytes(received), _as_bytes(slices)
        self.wait(distributed.all_to_all_single(*buffers, group=self.comm, async_op=True), slices)
        return received

    def _gather_slices(self, row: "Tensor") -> "Tensor":
        from torch import distributed

        rows = row.new_empty(self.size, len(row))
        buffers = list(map(_as_bytes, rows)), _as_bytes(row)
        self.wait(distributed.all_gather(*buffers, group=self.comm, async_op=True), row)
        return rows

    def broadcast(self, tensor: "Tensor", root: int = 0) -> None:
        from torch import distributed

        self.wait(distributed.broadcast(tensor, group_src=root, group=self.comm, async_op=True), tensor)

    def all_gather(self, value: Any) -> list[Any]:
        import torch

        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [int(size) for size in self._all_gather(torch.tensor([len(data)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = data
        parts = zip(self._all_gather(padded), sizes, strict=True)
        return [pickle.loads(part[:size].numpy().tobytes()) for part, size in parts]

    def _all_gather(self, tensor: "Tensor") -> "list[Tensor]":
        from torch import distributed

        tensor = tensor.to(self.object_device)
        parts = [tensor.new_empty(tensor.shape) for _ in range(self.size)]
        self.wait(distributed.all_gather(parts, tensor, group=self.comm, async_op=True), tensor)
        return [part.cpu() for part in parts]

    def duplicate(self) -> "TorchGroup":
        return TorchGroup(self.comm, self.timeout)

    def split(self, color: int) -> "TorchGroup":
        from torch import distributed

        global_ranks = distributed.get_process_group_ranks(self.comm)
        colors, backend = self.all_gather(color), distributed.get_backend(self.comm)
        ranks = tuple(rank for rank, other in zip(global_ranks, colors, strict=True) if other == color)
        key = self.comm, ranks, self.timeout
        if key not in _subgroups:  # also for a single rank: torch numbers the groups on every rank
            settings = dict(backend=backend, timeout=time_limit(self.timeout), use_local_synchronization=True)
            _subgroups[key] = distributed.new_group(ranks, **settings)
        return TorchGroup(_subgroups[key], self.timeout, parent=self) if len(ranks) > 1 else Group(self.timeout, self)

    def split_by_node(self) -> "TorchGroup":
        hosts = self.all_gather(socket.gethostname())
        return self.split(hosts.index(socket.gethostname()))

    def close(self) -> None:
        from torch import distributed

        distributed.destroy_process_group()

    def library(self) -> str:
        import torch

        return f"{torch.distributed.get_backend(self.comm)} of torch {torch.__version__}"

    def wait(self, work: "Work", tensor: "Tensor") -> None:
        """Wait for a tensor in host memory, or let the stream of another device wait. Raises: CollectiveTimeout."""
        if tensor.is_cpu:
            store = (self.parent or self).comm.get_group_store()
            self._poll(work.is_completed, lambda: store.check([TIMEOUT_KEY]))
        work.wait()  # raises if the connection is lost

    def _missing_ranks(self) -> list[int]:
        store, keys = self.comm.get_group_store(), [f"{TIMEOUT_KEY}-{rank}" for rank in range(self.size)]
        for key in (TIMEOUT_KEY, keys[self.rank]):
            store.set(key, "")
        deadline = time.perf_counter() + 1
        while not store.check(keys) and time.perf_counter() < deadline:
            time.sleep(0.01)
        return [rank for rank, key in enumerate(keys) if not store.check([key])]


class Groups(NamedTuple):
    """The groups that this process belongs to."""

    replica: Group = Group()  # the ranks that share its replica, data-parallel
    world: Group = Group()  # all ranks


def _as_bytes(tensor: "Tensor") -> "Tensor":
    """Return the memory of a contiguous tensor as bytes, which every library can send."""
    import torch

    return tensor.view(-1).view(torch.uint8)


def _picklable(error: Exception) -> Exception:
    """Return an error that can be sent to other ranks, with the same message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _free_released() -> None:
    while _released:
        _released.pop().Free()


def group_of(comm: "MPI.Comm | ProcessGroup", timeout: float) -> Group:
    """Return the group of a communicator or process group. Raises: ValueError."""
    if not is_process_group(comm) and not hasattr(comm, "Iallreduce"):  # group.WORLD is None before initialization
        raise ValueError(
            f"Invalid comm value: {comm}; pass an MPI communicator, or a process group that this rank belongs to: "
            "torch.distributed.group.WORLD after init_process_group(), or a DeviceMesh's get_group()"
        )
    if not is_process_group(comm):
        return MPIGroup(comm, timeout) if comm.size > 1 else Group(timeout)
    return TorchGroup(comm, timeout) if comm.size() > 1 else Group(timeout)


def time_limit(timeout: float) -> datetime.timedelta:
    """Return the limit of a process group: for gloo later than our own, which names the missing ranks."""
    return datetime.timedelta(seconds=min(timeout, MAX_SECONDS) + 60)


def is_process_group(comm: Any) -> bool:
    from torch import distributed

    return distributed.is_available() and isinstance(comm, distributed.ProcessGroup)


def mpi_library() -> str:
    """Return the name and version of the MPI implementation."""
    from mpi4py import MPI

    vendor, version = MPI.get_vendor()
    return f"{vendor} {'.'.join(map(str, version))}"
