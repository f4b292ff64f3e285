"""How many cores a process may use, and how many threads it starts."""

import math
import os

import pytest

from parle import cores


@pytest.mark.parametrize("value", ["3", "3,2"])
def test_threads_follow_omp_num_threads(value, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert cores.threads_per_rank(64, 2) == 3


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize(
    ("count", "ranks", "threads"), [(1, 1, 1), (8, 1, 8), (13, 3, 4), (6, 3, 2), (2, 3, 1), (1, 100, 1)]
)
def test_cores_are_divided_among_ranks(count, ranks, threads, value, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert cores.threads_per_rank(count, ranks) == threads


def test_available_cores_follow_the_affinity_mask(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0: {2, 5}}[process], raising=False)
    assert cores.available_cores() == {2, 5}


@pytest.mark.parametrize(("count", "expected"), [(4, {0, 1, 2, 3}), (None, {0})])
def test_all_cores_are_available_without_affinity_mask(count, expected, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert cores.available_cores() == expected


V1 = "12:cpuset:/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a\n"


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000"}, 4),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, math.inf),
        ("0::/../a\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/a\n", {}, math.inf),
        (
            V1,
            {
                f"cpu/docker/a/cpu.cfs_{name}_us": value
                for name, value in (("quota", "250000\n"), ("period", "100000\n"))
            },
            2.5,
        ),
        (V1, {"cpu/docker/a/cpu.cfs_quota_us": "-1\n", "cpu/docker/a/cpu.cfs_period_us": "100000\n"}, math.inf),
        # in a container: the path is the host's, the files are at the root
        (V1 + "0::/docker/a\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2),
        (V1, {}, math.inf),
        (None, {"cpu.max": "200000 100000"}, math.inf),
    ],
)
def test_quota_is_the_lowest_of_the_cgroups(membership, files, quota, tmp_path):
    if membership is not None:
        (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(text)
    assert cores.cpu_quota(tmp_path / "cgroup", tmp_path / "mounted") == quota


def test_quota_counts_as_cores_and_half_a_core_as_one(monkeypatch):
    monkeypatch.setattr(cores, "available_cores", lambda: set(range(8)))
    counts = []
    for quota in (math.inf, 0.2, 1.0, 1.5, 100.0):
        monkeypatch.setattr(cores, "cpu_quota", lambda quota=quota: quota)
        counts.append(cores.count_cores())
    assert counts == [8, 1, 1, 2, 8]
