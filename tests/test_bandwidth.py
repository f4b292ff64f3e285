import math
import os
import subprocess
import sys

import pytest

import models
from benchmarks import network, record

GIGABIT = 1e9
EXCHANGE = """
from mpi4py import MPI
import numpy
from benchmarks import network
before = network.bytes_sent()
vector = numpy.ones(250_000, dtype=numpy.float32)
MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, vector)
assert (vector == 2).all()
MPI.COMM_WORLD.Barrier()
print(f"sent {network.bytes_sent() - before}\\n", end="")  # in one piece
"""


def test_one_rank_has_nothing_to_wait_for():
    assert network.allreduce_seconds(1e9, 1, GIGABIT, 1.0) == 0.0


def test_two_ranks_exchange_the_whole_vector():
    assert network.allreduce_seconds(125e6, 2, GIGABIT, 0.0) == pytest.approx(1.0)


def test_many_ranks_send_it_twice():
    assert network.allreduce_seconds(125e6, 2**20, GIGABIT, 0.0) == pytest.approx(2.0, rel=1e-5)


def test_infinite_bandwidth_leaves_latency():
    assert network.allreduce_seconds(125e6, 8, math.inf, 1e-3) == pytest.approx(6e-3)


def test_an_empty_message_takes_latency_alone():
    assert network.allreduce_seconds(0, 5, GIGABIT, 1e-3) == pytest.approx(6e-3)  # as 8 do


@pytest.mark.parametrize("count", [2, 3, 1024])
def test_without_latency_time_is_proportional(count):
    once = network.allreduce_seconds(1e6, count, GIGABIT, 0.0)
    assert network.allreduce_seconds(2e6, count, GIGABIT, 0.0) == pytest.approx(2 * once)
    assert network.allreduce_seconds(1e6, count, 2 * GIGABIT, 0.0) == pytest.approx(once / 2)


def test_a_round_shares_one_sync():
    assert network.minibatch_seconds(0.5, 5.0, 1) == 5.5
    assert network.minibatch_seconds(0.5, 5.0, 25) == pytest.approx(0.7)


def test_share():
    assert network.sync_share(0.5, 0.0, 1) == 0.0
    assert network.sync_share(0.5, 0.5, 1) == 0.5
    assert network.sync_share(0.5, 0.5, 25) == pytest.approx(1 / 26)


def test_parameters_are_those_of_the_network():
    assert network.parameters("lenet") == sum(p.numel() for p in models.build("lenet", 1, 28, 10).parameters())
    assert network.parameters("wrn-28-10") == pytest.approx(36.5e6, rel=1e-2)


def test_table_sets_measured_beside_predicted(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    # 1 Mb/s, 0.1 s a message: 528,912 bytes in two take 4.431 s; 10 mini-batches that compute for 1 s each
    row = dict(mbits=1, ranks=2, network="lenet", method="sgd", minibatches=10, latency=0.1, bytes_sent=5_300_000)
    record.keep(network.QUESTION, row | dict(seconds=60.0, sync_seconds=50.0))
    assert "| lenet | 0.001 | sgd | 0.530 | 1000 | 6,000 | 5,431 | 83.3 | 81.6 |" in network.table()


@pytest.fixture
def joined():
    """Two namespaces and a gigabit between them."""
    try:
        with network.namespaces(1000) as names:
            yield names
    except network.Refused as reason:
        pytest.skip(f"no network namespaces: {reason}")


def existing():
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_ranks_in_two_namespaces_talk_over_the_link(joined, capfd, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PMI")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    network.start(joined, [sys.executable, "-c", EXCHANGE])
    sent = [int(line.split()[1]) for line in capfd.readouterr().out.splitlines() if line.startswith("sent ")]
    assert len(sent) == 2
    assert all(1_000_000 <= count < 1_100_000 for count in sent)


@pytest.mark.slow
def test_namespaces_are_gone_after_a_failure():
    names = []
    try:
        with network.namespaces(1000) as joined:
            names = joined
            assert all(name in existing() for name in names)
            raise InterruptedError
    except network.Refused as reason:
        pytest.skip(f"no network namespaces: {reason}")
    except InterruptedError:
        assert not any(name in existing() for name in names)


def test_without_permission_the_benchmark_says_so_and_leaves_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["network.py", "--mbits", "7"])
    monkeypatch.setenv("PATH", "")
    network.main()
    assert capsys.readouterr().out.startswith("skipped: ip is not installed")
