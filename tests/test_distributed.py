import pickle
import re
import time
from types import SimpleNamespace

import pytest
import torch

from parle import distributed
from parle.distributed import Group, MPIGroup
from tests.conftest import ROOT


@pytest.fixture
def script(tmp_path):
    """A function that writes a program which imports the package, and returns its path."""

    def write(body):
        path = tmp_path / "script.py"
        imports = "from parle import cores, distributed, launcher, rank_exit\nfrom parle.distributed import MPIGroup\n"
        path.write_text(f"import math, os, socket, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n{imports}{body}")
        return path

    return write


def test_import_loads_no_mpi(python, script):
    done = python(script("print('mpi4py' in sys.modules)"))
    assert (done.stdout, done.stderr) == ("False\n", "")


# With arrays: to import torch takes seconds per rank, and tests/test_parle_mpi.py reduces tensors
THREE_RANKS = """
import numpy as np
from mpi4py import MPI


def message_of(kind, action):
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind}")


def check_size(world):
    assert (world.rank, world.size) == (MPI.COMM_WORLD.rank, 3)


def check_all_reduce_sums_in_place(world):
    for dtype in ("float32", "float64"):
        array = np.arange(5, dtype=dtype) * 10**world.rank
        world.all_reduce(array)
        assert array.dtype == dtype and array.tolist() == [0, 111, 222, 333, 444], array
    whole = np.ones(6)
    world.all_reduce(whole[2:4])
    assert whole.tolist() == [1, 1, 3, 3, 1, 1], whole


def check_all_gather_returns_rank_order(world):
    assert world.all_gather({"rank": world.rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]


def check_broadcast_sends_values_of_rank_0(world):
    for dtype in ("float32", "float64", "int64"):
        array = np.full((2, 3), 7 + world.rank, dtype=dtype)
        world.broadcast(array)
        assert array.tolist() == [[7] * 3] * 2, array


def check_split(world):
    group = world.split(world.rank // 2)
    assert (group.rank, group.size) == [(0, 2), (1, 2), (0, 1)][world.rank]
    assert group.all_gather(world.rank) == [[0, 1], [0, 1], [2]][world.rank]


def check_waiting_takes_little_cpu_time(world):
    for action in (
        lambda: world.wait(world.comm.Ibarrier()),
        lambda: world.all_gather(1),
        lambda: world.all_reduce(np.ones(1000)),
        lambda: world.broadcast(np.ones(1000)),
    ):
        world.comm.Barrier()
        start, cpu_start = time.perf_counter(), time.process_time()
        if world.rank == 0:
            time.sleep(0.3)
        action()
        waited, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        assert waited > 0.25, waited
        assert cpu_seconds < 0.2 * waited, (cpu_seconds, waited)


def check_small_messages_are_fast(world):
    world.comm.Barrier()
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        world.all_reduce(np.ones(10))
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[25] < 0.04, seconds


def check_late_rank_is_no_timeout(world):
    world.timeout = 30
    if world.rank == 1:
        time.sleep(1.3)  # after a second, waiting ranks check whether another one timed out
    world.all_gather(1)
    world.timeout = float("inf")


def check_mismatch_is_raised_on_every_rank(world):
    world.check_consistent({"lr": 0.1, "L": "auto"})
    settings = {"L": 25, "rho": 0.5 if world.rank == 2 else 0.25}
    message = message_of(distributed.SettingsMismatch, lambda: world.check_consistent(settings))
    assert all(word in message for word in ("rho", "0.25", "rank 0", "0.5", "rank 2")), message
    message = message_of(ValueError, lambda: world.check_consistent({"seed": world.rank}))
    assert all(word in message for word in ("seed", "rank 0", "rank 1")), message


def check_action_runs_on_one_rank_only(world):
    ran_on = []
    run = lambda: ran_on.append(world.rank) or "done"
    result = world.run_and_propagate_errors(run, only_if=world.rank == 1)
    assert (ran_on, result) == (([1], "done") if world.rank == 1 else ([], None)), (ran_on, result)


def check_action_runs_on_every_rank_by_default(world):
    assert world.run_and_propagate_errors(lambda: world.rank) == world.rank


def check_listed_errors_are_raised_on_every_rank(world):
    def fail():
        raise FileNotFoundError(2, f"not on rank {world.rank}", "a file")

    for rank in (0, 2):
        run = lambda: world.run_and_propagate_errors(fail, KeyError, OSError, only_if=world.rank == rank)
        assert message_of(OSError, run) == f"[Errno 2] not on rank {rank}: 'a file'"


def check_ranks_of_a_node_share_its_cores(world):
    node = world.split_by_node()
    assert (node.size, node.rank) == (3, world.rank)
    for affinity, quota, count in [
        (set(range(13)), math.inf, 13),
        ({0, 1}, math.inf, 2),
        ({2 * world.rank, 2 * world.rank + 1}, math.inf, 6),
        ({2 * world.rank, 2 * world.rank + 1}, 3.5, 4),
        (set(range(13)), 0.5, 1),
        (set(range(13)), 20.0, 13),
    ]:
        cores.available_cores, cores.cpu_quota = lambda: affinity, lambda: quota
        assert cores.count_cores(node) == count, (affinity, quota)


def check_hosts_are_described_with_their_own_threads(world):
    cores.available_cores, cores.cpu_quota = lambda: set(range(8 >> world.rank)), lambda: math.inf
    node = world.split(world.rank == 2)  # as if rank 2 were on another host
    found = cores.describe_hosts(world, node, 1 + (world.rank == 2))
    name = socket.gethostname()
    first, second = (dict(name=name, ranks=2, cores=8), dict(name=name, ranks=1, cores=2))
    assert found == [first | dict(threads_per_rank=1), second | dict(threads_per_rank=2)], found


def main():
    world = MPIGroup(MPI.COMM_WORLD)
    for check in CHECKS:
        check(world)
        world.comm.Barrier()
    sys.stdout.write(f"{world.rank} is done\\n")


rank_exit.run_or_abort(main)
"""


class Pickling(Group):
    """The first of two ranks; the other one has no error."""

    size = 2

    def all_gather(self, value):
        return [pickle.loads(pickle.dumps(value)), None]


def test_error_that_cannot_be_pickled_keeps_its_message():
    class LocalError(Exception):
        pass

    def fail():
        raise LocalError("wrong")

    with pytest.raises(RuntimeError, match="LocalError: wrong"):
        Pickling().run_and_propagate_errors(fail, LocalError)
    with pytest.raises(LocalError, match="wrong"):
        Group().run_and_propagate_errors(fail, LocalError)


def test_groups_of_three_ranks(python, script):
    checks = re.findall(r"^def (check_\w+)\(world\):", THREE_RANKS, re.M)
    assert len(checks) == 14
    done = python(script(THREE_RANKS.replace("CHECKS", f"[{', '.join(checks)}]")), ranks=3)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["0 is done", "1 is done", "2 is done"]


@pytest.mark.parametrize("group", [Group(), MPIGroup(SimpleNamespace(rank=0, size=1))])
def test_group_of_one_sends_no_sum(group):
    tensor = torch.arange(3.0)
    group.all_reduce(tensor)
    assert tensor.tolist() == [0, 1, 2]


def test_default_group_is_a_group_of_one():
    group = Group()
    group.broadcast(torch.ones(2))
    group.check_consistent({"lr": 0.1})
    assert (group.rank, group.size, group.all_gather("value")) == (0, 1, ["value"])
    assert group.run_and_propagate_errors(lambda: "done") == "done"


@pytest.mark.parametrize(("error", "propagated"), [(KeyError("listed"), True), (ValueError("not listed"), False)])
def test_only_listed_errors_are_propagated(error, propagated):
    gathered = []

    class Recorder(Group):
        def all_gather(self, value):
            gathered.append(value)
            return [value]

    def fail():
        raise error

    with pytest.raises(type(error), match="listed"):
        Recorder().run_and_propagate_errors(fail, OSError, KeyError)
    assert gathered == [error] * propagated


HANG = """
from mpi4py import MPI
world = MPIGroup(MPI.COMM_WORLD)

def main():
    world.timeout = 2
    world.all_gather(1)
    if world.rank == 1:
        {elsewhere}
    if world.rank == 2:
        time.sleep(1.5)  # when rank 0 times out, rank 2 is waiting but within its own time limit
    world.all_gather(1)

rank_exit.run_or_abort(main)
"""


@pytest.mark.parametrize(
    ("elsewhere", "missing"),
    [
        ("time.sleep(50)", ["rank 1"]),
        ("world.wait(MPI.COMM_SELF.Irecv(bytearray(1)))", []),
    ],
    ids=["asleep", "in another call"],
)
def test_timeout_names_the_missing_rank(elsewhere, missing, python, script):
    start = time.perf_counter()
    done = python(script(HANG.format(elsewhere=elsewhere)), ranks=3)
    assert time.perf_counter() - start < 40
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("rank ")]
    assert lines and done.stderr.splitlines()[-1] == lines[-1]
    for line in lines:
        name, _, message = line.partition(distributed.CollectiveTimeout.__name__)
        assert re.fullmatch(r"(rank \d): ", name) and re.findall(r"rank \d", message) == [name[:6], *missing], line
