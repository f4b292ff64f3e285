import math
import os
import subprocess
import sys

import pytest

import models
from benchmarks import bandwidth, results

GIGABIT = 1e9
EXCHANGE = """
from mpi4py import MPI
import numpy
from benchmarks import bandwidth
before = bandwidth.bytes_sent()
vector = numpy.ones(250_000, dtype=numpy.float32)
MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, vector)
assert (vector == 2).all()
MPI.COMM_WORLD.Barrier()
print(f"sent {bandwidth.bytes_sent() - before}\\n", end="")  # one write, so that lines of ranks do not mix
"""


@pytest.mark.parametrize(
    ("size", "count", "rate", "latency", "seconds"),
    [
        (1e9, 1, GIGABIT, 1.0, 0.0),  # one rank does not communicate
        (125e6, 2, GIGABIT, 0.0, 1.0),  # two ranks exchange the vector
        (125e6, 2**20, GIGABIT, 0.0, 2.0),  # many ranks send it twice
        (125e6, 8, math.inf, 1e-3, 6e-3),  # 2 log2(8) messages
        (0, 5, GIGABIT, 1e-3, 6e-3),  # log2 is rounded up
    ],
)
def test_allreduce_time_in_limiting_cases(size, count, rate, latency, seconds):
    assert bandwidth.allreduce_seconds(size, count, rate, latency) == pytest.approx(seconds, rel=1e-5)


def test_a_sync_is_shared_by_the_steps_of_a_round():
    assert bandwidth.step_seconds(0.5, 5.0, 1) == 5.5
    assert bandwidth.step_seconds(0.5, 5.0, 25) == pytest.approx(0.7)
    assert bandwidth.sync_fraction(0.5, 0.0, 1) == 0.0
    assert bandwidth.sync_fraction(0.5, 0.5, 25) == pytest.approx(1 / 26)


def test_num_parameters_is_that_of_the_network():
    expected = sum(parameter.numel() for parameter in models.build("lenet", 1, 28, 10).parameters())
    assert bandwidth.num_parameters("lenet") == expected


def test_table_shows_measurement_next_to_prediction(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    # 1 Mb/s, 0.1 s per message: 528,912 bytes in two messages take 4.431 s; 10 steps compute for 1 s each
    row = dict(mbits=1, ranks=2, network="lenet", method="sgd", steps=10, latency=0.1, bytes_sent=5_300_000)
    results.append_row("bandwidth", row | dict(seconds=60.0, sync_seconds=50.0))
    cells = bandwidth.measurement_table().splitlines()[-1].split(" | ")[3:]
    assert cells == ["0.530", "1000", "6,000", "5,431", "83.3", "81.6 |"]


@pytest.fixture
def joined():
    """Two namespaces connected by 1 Gb/s."""
    try:
        with bandwidth.namespaces(1000) as names:
            yield names
    except bandwidth.NamespacesUnavailable as reason:
        pytest.skip(f"no network namespaces: {reason}")


def existing():
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_ranks_in_two_namespaces_communicate_over_the_link(joined, capfd, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PMI")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    bandwidth.run_in_namespaces(joined, [sys.executable, "-c", EXCHANGE])
    sent = [int(line.split()[1]) for line in capfd.readouterr().out.splitlines() if line.startswith("sent ")]
    assert len(sent) == 2
    assert all(1_000_000 <= count < 1_100_000 for count in sent)


@pytest.mark.slow
def test_namespaces_are_deleted_after_a_failure():
    names = []
    try:
        with bandwidth.namespaces(1000) as joined:
            names = joined
            assert all(name in existing() for name in names)
            raise InterruptedError
    except bandwidth.NamespacesUnavailable as reason:
        pytest.skip(f"no network namespaces: {reason}")
    except InterruptedError:
        assert not any(name in existing() for name in names)


def test_without_iproute2_the_benchmark_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bandwidth.py", "--mbits", "7"])
    monkeypatch.setenv("PATH", "")
    bandwidth.main()
    output = capsys.readouterr().out
    assert "skipped" in output and "iproute2" in output
