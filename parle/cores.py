"""Cores that the processes of a machine may use, and how they share them."""

import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from parle.distributed import Group


def available_cores() -> set[int]:
    """Return the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cpu_quota(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return how many cores' worth of time the cgroups of this process allow, as in containers; infinity if unlimited.

    Args:
        process: the file that lists the process's cgroups.
        root: the directory where versions 1 and 2 of cgroups are mounted.
    """
    try:
        memberships = [line.split(":", 2) for line in process.read_text().splitlines()]
    except OSError:  # not Linux
        return math.inf
    quotas = [math.inf]
    for _, controllers, path in memberships:
        if not controllers:
            quotas += [_quota(*text.split()) for (text,) in _limits(root, path, "cpu.max")]
        elif "cpu" in controllers.split(","):
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quotas += [_quota(*texts) for texts in _limits(root / "cpu", path, *names)]
    return min(quotas)


def _limits(root: Path, group: str, *names: str) -> Iterator[list[str]]:
    """Yield the contents of these files of a cgroup and of its ancestors, each of which limits it, where they exist.

    In a container the root may be the cgroup itself, while `group` is its path on the host.
    """
    path = PurePosixPath(group.lstrip("/"))
    for folder in (path, *path.parents):
        try:
            yield [(root / folder / name).read_text() for name in names]
        except OSError:
            continue


def _quota(quota: str, period: str) -> float:
    """Return a quota in cores from its microseconds per period; "max" (version 2) and -1 (version 1) are no limit."""
    return math.inf if quota.strip() in ("max", "-1") else int(quota) / int(period)


def count_cores(node: Group = Group()) -> int:
    """Return the number of cores that the ranks of a machine may use together. Collective.

    Launchers may bind each rank to its own cores, while a quota is taken to be for all ranks. A quota of 1.5 cores
    counts as 2: two threads use all of it, one thread would leave a third.
    """
    cores, quotas = zip(*node.all_gather((available_cores(), cpu_quota())), strict=True)
    return math.ceil(min(len(set().union(*cores)), max(quotas)))


def threads_per_rank(cores: int, ranks: int) -> int:
    """Return the number of threads for each of `ranks` processes on `cores` cores; OMP_NUM_THREADS overrides it."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given.split(",")[0]) if given else max(1, cores // ranks)


def describe_hosts(world: Group, node: Group, threads: int) -> list[dict[str, Any]]:
    """Return the name, ranks, cores and threads per rank of each machine. Collective.

    Args:
        node: the ranks of this machine.
        threads: number of threads of this process.
    """
    host = dict(name=socket.gethostname(), ranks=node.size, cores=count_cores(node), threads_per_rank=threads)
    return [host for host, is_first in world.all_gather((host, node.rank == 0)) if is_first]
