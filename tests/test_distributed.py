import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from parle import distributed, launcher

ROOT = Path(distributed.__file__).parent


@pytest.fixture
def script(tmp_path):
    """A program that has `ranks`."""

    def write(body):
        path = tmp_path / "script.py"
        path.write_text(f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport ranks\n{body}")
        return path

    return write


def test_import_loads_no_mpi_or_torch(python, script):
    done = python(script("print({'mpi4py', 'torch'} & set(sys.modules))"))
    assert (done.stdout, done.stderr) == ("set()\n", "")


RAISE = """
from mpi4py import MPI
comm = MPI.COMM_WORLD

def main():
    if comm.rank == 1:
        time.sleep({delay})
        print(time.time())
        raise {error}
    time.sleep(0.3 - {delay})
    {wait}

launcher.run_or_abort(main)
"""


@pytest.mark.parametrize(
    ("delay", "wait", "error"),
    [
        (0.3, "comm.Barrier()", "ValueError('wrong')"),
        (0.0, "time.sleep(50)", "ValueError('wrong\\n  in the second line')"),
        (0.3, "distributed.all_gather(comm, 1)", "KeyboardInterrupt('wrong')"),
    ],
    ids=["in MPI", "asleep", "in gather"],
)
def test_exception_on_one_rank_ends_all_at_once(delay, wait, error, python, script):
    done = python(script(RAISE.format(delay=delay, wait=wait, error=error)), ranks=3, PYTHONUNBUFFERED="")
    ended = time.time()
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"rank 1: {error.partition('(')[0]}: wrong")
    assert ended - float(done.stdout.split()[0]) < 10, "a second, and more on a busy machine"


def test_exception_before_mpi_import_propagates(monkeypatch):
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)

    def main():
        raise ValueError("wrong")

    with pytest.raises(ValueError, match=r"^wrong$"):
        launcher.run_or_abort(main)


@pytest.mark.parametrize(("initialized", "finalized"), [(False, False), (True, True)])
def test_exception_outside_mpi_propagates(initialized, finalized, monkeypatch):
    mpi = SimpleNamespace(Is_initialized=lambda: initialized, Is_finalized=lambda: finalized)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)

    def main():
        raise KeyError("wrong")

    with pytest.raises(KeyError, match="wrong"):
        launcher.run_or_abort(main)


def test_run_returns_after_main():
    called = []
    launcher.run_or_abort(lambda: called.append(1))
    assert called == [1]


def test_exception_without_launcher_names_rank_0(python, script):
    body = "from mpi4py import MPI\ndef main():\n    raise OSError('alone')\nranks.run(main)\n"
    done = python(script(body))
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == "rank 0: OSError: alone"


EXIT = """
from mpi4py import MPI
comm = MPI.COMM_WORLD

def main():
    if comm.rank in {ranks}:
        sys.exit(2)
    distributed.all_gather(comm, 1)

launcher.run_or_abort(main)
"""


def test_exit_code_of_all_ranks_is_kept(python, script):
    done = python(script(EXIT.format(ranks=(0, 1, 2))), ranks=3)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_exit_of_one_rank_ends_all(python, script):
    done = python(script(EXIT.format(ranks=(1,))), ranks=3)
    assert done.returncode != 0


THREE = """
import numpy as np
from mpi4py import MPI


def raises(kind, action):
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind}")


def three(comm):
    assert comm.size == 3


def add_sums_in_place(comm):
    for dtype in ("float32", "float64"):
        array = np.arange(5, dtype=dtype) * 10**comm.rank
        distributed.all_reduce(comm, array)
        assert array.dtype == dtype and array.tolist() == [0, 111, 222, 333, 444], array
    whole = np.ones(6)
    distributed.all_reduce(comm, whole[2:4])
    assert whole.tolist() == [1, 1, 3, 3, 1, 1], whole


def gather_gives_every_rank_all_in_order(comm):
    assert distributed.all_gather(comm, {"rank": comm.rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]


def broadcast_gives_every_rank_those_of_rank_0(comm):
    for dtype in ("float32", "float64", "int64"):
        array = np.full((2, 3), 7 + comm.rank, dtype=dtype)
        distributed.broadcast(comm, array)
        assert array.tolist() == [[7] * 3] * 2, array


def waiting_burns_little(comm):
    for action in (
        lambda: distributed.wait_with_timeout(comm.Ibarrier()),
        lambda: distributed.all_gather(comm, 1),
        lambda: distributed.all_reduce(comm, np.ones(1000)),
        lambda: distributed.broadcast(comm, np.ones(1000)),
    ):
        comm.Barrier()
        began, burned = time.perf_counter(), time.process_time()
        if comm.rank == 0:
            time.sleep(0.3)
        action()
        waited, burned = time.perf_counter() - began, time.process_time() - burned
        assert waited > 0.25, waited
        assert burned < 0.2 * waited, (burned, waited)


def a_message_is_not_slept_over(comm):
    comm.Barrier()
    seconds = []
    for _ in range(50):
        began = time.perf_counter()
        distributed.all_reduce(comm, np.ones(10))
        seconds.append(time.perf_counter() - began)
    assert sorted(seconds)[25] < 0.04, seconds


def a_late_rank_is_waited_for(comm):
    distributed.timeout = 30
    if comm.rank == 1:
        time.sleep(1.3)  # waiting ranks look for others out of patience after a second
    distributed.all_gather(comm, 1)
    distributed.timeout = float("inf")


def settings_that_differ_are_told_to_every_rank(comm):
    distributed.check_consistent(comm, {"lr": 0.1, "L": "auto"})
    told = raises(distributed.SettingsMismatch, lambda: distributed.check_consistent(comm, {"L": 25, "rho": 0.5 if comm.rank == 2 else 0.25}))
    assert all(word in told for word in ("rho", "0.25", "rank 0", "0.5", "rank 2")), told
    told = raises(ValueError, lambda: distributed.check_consistent(comm, {"seed": comm.rank}))
    assert all(word in told for word in ("seed", "rank 0", "rank 1")), told


def together_acts_here_alone(comm):
    acted = []
    result = distributed.run_and_propagate_errors(comm, lambda: acted.append(comm.rank) or "done", comm.rank == 1)
    assert (acted, result) == (([1], "done") if comm.rank == 1 else ([], None)), (acted, result)


def together_fails_everywhere(comm):
    def action():
        raise FileNotFoundError(2, f"not on rank {comm.rank}", "a file")

    for here in (0, 2):
        told = raises(OSError, lambda: distributed.run_and_propagate_errors(comm, action, comm.rank == here, KeyError, OSError))
        assert told == f"[Errno 2] not on rank {here}: 'a file'", told


def another_failure_is_raised_there_alone(comm):
    def action():
        raise ZeroDivisionError("here")

    alone = comm.Split(comm.rank)
    assert raises(ZeroDivisionError, lambda: distributed.run_and_propagate_errors(alone, action, True, OSError)) == "here"
    assert distributed.all_gather(comm, 1) == [1, 1, 1]


def cores_are_shared(comm):
    node = distributed.node(comm)
    assert (node.size, node.rank) == (3, comm.rank)
    os.environ.pop("OMP_NUM_THREADS", None)
    for cores, threads in [
        (set(range(13)), 4),
        ({0, 1}, 1),
        ({2 * comm.rank, 2 * comm.rank + 1}, 2),
    ]:
        os.sched_getaffinity = lambda process: cores
        count = len(set().union(*distributed.all_gather(node, distributed.available_cores())))
        assert distributed.threads_per_rank(count, node.size) == threads, (cores, count)


def main():
    for check in CHECKS:
        check(MPI.COMM_WORLD)
        MPI.COMM_WORLD.Barrier()
    sys.stdout.write(f"{MPI.COMM_WORLD.rank} is done\\n")


launcher.run_or_abort(main)
"""


def test_three_ranks_wait_add_compare_and_raise(python, script):
    checks = [name for name in re.findall(r"^def (\w+)\(comm\):", THREE, re.M)]
    assert len(checks) == 12
    done = python(script(THREE.replace("CHECKS", f"[{', '.join(checks)}]")), ranks=3)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["0 is done", "1 is done", "2 is done"]


def test_one_rank_sends_no_message():
    tensor = torch.arange(3.0)
    distributed.all_reduce(SimpleNamespace(size=1), tensor)
    assert tensor.tolist() == [0, 1, 2]


@pytest.mark.parametrize("told", ["3", "3,2"])
def test_threads_follow_omp_num_threads(told, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert distributed.threads_per_rank(64, 2) == 3


@pytest.mark.parametrize(
    ("count", "sharers", "threads"), [(1, 1, 1), (8, 1, 8), (13, 3, 4), (6, 3, 2), (2, 3, 1), (1, 100, 1)]
)
def test_cores_are_divided_by_the_processes_on_them(count, sharers, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert distributed.threads_per_rank(count, sharers) == threads


def test_cores_are_those_of_the_affinity_mask(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0: {2, 5}}[process], raising=False)
    assert distributed.available_cores() == {2, 5}


@pytest.mark.parametrize(("count", "cores"), [(4, {0, 1, 2, 3}), (None, {0})])
def test_cores_are_all_without_an_affinity_mask(count, cores, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert distributed.available_cores() == cores


@pytest.mark.parametrize(
    ("text", "notes", "line"),
    [
        ("wrong", [], "wrong"),
        ("", [], ""),
        ("wrong\n  in the second line\n", [], "wrong in the second line"),
        ("wrong", ["go on with:\n python this.py", "or not"], "wrong; go on with: python this.py; or not"),
    ],
)
def test_reason_is_one_line_with_the_notes(text, notes, line):
    error = ValueError(text)
    for note in notes:
        error.add_note(note)
    assert launcher.describe_error(error) == line


HANG = """
from mpi4py import MPI
comm = MPI.COMM_WORLD

def main():
    distributed.timeout = 1.1
    distributed.all_gather(comm, 1)
    if comm.rank == 1:
        {elsewhere}
    distributed.all_gather(comm, 1)

launcher.run_or_abort(main)
"""


@pytest.mark.parametrize(
    ("elsewhere", "missing"),
    [
        ("time.sleep(50)", ["rank 1"]),
        ("distributed.wait_with_timeout(MPI.COMM_SELF.Irecv(bytearray(1)))", []),
    ],
    ids=["asleep", "waits elsewhere"],
)
def test_timeout_names_the_missing_rank(elsewhere, missing, python, script):
    began = time.perf_counter()
    done = python(script(HANG.format(elsewhere=elsewhere)), ranks=3)
    assert time.perf_counter() - began < 40
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("rank ")]
    assert told and done.stderr.splitlines()[-1] == told[-1]
    for line in told:
        name, _, message = line.partition(distributed.CollectiveTimeout.__name__)
        assert re.fullmatch(r"rank \d: ", name) and re.findall(r"rank \d", message) == missing, line
