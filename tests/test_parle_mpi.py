"""parle_mpi.py and its class in real MPI processes, each run with a time limit. See also test_programs.py."""

import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import loader
import parle_mpi
from parle import cores
from parle.distributed import MPIGroup
from parle_mpi import Parle
from tests.conftest import OFFLINE, ROOT


@pytest.fixture
def train(python, proc, tmp_path):
    """Train on digits; return the events of the log and the printed text."""

    def train(*arguments, ranks=None, **environment):
        out = tmp_path / "run"
        common = ("-d", "digits", "--proc", proc, "--out", out)
        done = python(ROOT / "parle_mpi.py", *common, *arguments, ranks=ranks, **environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()], done.stdout

    return train


def select(log, event):
    return [line for line in log if line["event"] == event]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_every_rank_matches_the_reference_at_each_step(python, ranks):
    done = python(ROOT / "tests" / "lockstep.py", ranks=ranks, timeout=240, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all equal\n")


@pytest.mark.timeout(300)
def test_class_on_four_ranks(python):
    done = python(ROOT / "tests" / "mpi_checks.py", ranks=4, timeout=240, OMP_NUM_THREADS="1")
    assert done.stdout == "all checks passed\n", done.stderr
    assert done.returncode != 0
    for rank in (0, 1, 3):  # rank 2 left out a step
        assert re.search(
            rf"rank {rank}: In the synchronization of round 3, rank {rank} waited \d s for rank 2;", done.stderr
        )


def test_messages_are_of_known_half_precision(comm):
    parameter = nn.Parameter(torch.zeros(3))
    for message_dtype in (torch.float32, torch.int16, "float16"):
        with pytest.raises(ValueError, match=r"message_dtype.*torch\.float16"):
            Parle([parameter], comm, lr=0.1, batches_per_epoch=9, message_dtype=message_dtype)


def test_state_without_message_errors_is_not_loaded_where_they_are_needed(comm):
    plain, half = (
        Parle([nn.Parameter(torch.zeros(3))], comm, lr=0.1, batches_per_epoch=9, message_dtype=dtype)
        for dtype in (None, torch.float16)
    )
    for target, source in ((half, plain), (plain, half)):
        with pytest.raises(ValueError, match="message_error"):
            target.load_state_dict(source.state_dict())
    half.load_state_dict(half.state_dict())


@pytest.mark.parametrize("fails", [False, True])
def test_timeout_does_not_run_while_one_rank_builds_the_data(fails, comm, monkeypatch):
    world, timeouts = MPIGroup(comm, 5.0), []

    def load(*_):
        timeouts.append(world.timeout)
        if fails:
            raise loader.DatasetError("no data")

    monkeypatch.setattr(loader, "load", load)
    args = SimpleNamespace(dataset="mnist", data=None, proc="proc", zca=False)
    if fails:
        with pytest.raises(loader.DatasetError):
            parle_mpi.load_shared(world, world, args)
    else:
        parle_mpi.load_shared(world, world, args)
    assert timeouts == ([math.inf] if fails else [math.inf, math.inf, 5.0])
    assert world.timeout == 5.0


SYNC_ON_ONE_RANK = """
import time
import torch
from mpi4py import MPI
from parle.distributed import CollectiveTimeout
from parle_mpi import Parle

rank, weight = MPI.COMM_WORLD.rank, torch.nn.Parameter(torch.ones(9))
weight.grad = torch.ones(9)
optimizer = Parle([weight], MPI.COMM_WORLD, replicas=1, timeout=1.5, lr=0.1, batches_per_epoch=9)
try:
    optimizer.step()
    if rank == 1:
        optimizer.sync()
    optimizer.step()
except CollectiveTimeout as error:
    print(f"rank {rank}: {error}", flush=True)
    time.sleep(1)  # mpiexec may drop what it has not yet forwarded
    MPI.COMM_WORLD.Abort(3)
"""


def test_gradients_are_never_taken_for_a_synchronization(python, tmp_path):
    (tmp_path / "script.py").write_text(SYNC_ON_ONE_RANK)
    done = python(tmp_path / "script.py", ranks=2, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode != 0
    assert re.search(r"rank \d: In (step 2|the synchronization) of round 1, rank \d waited", done.stdout), done.stderr


CATCHES_SIGHUP = """
import signal, parle_mpi
parle_mpi.world_group()
(line,) = [line for line in open("/proc/self/status") if line.startswith("SigCgt")]
print(bool(int(line.split()[1], 16) >> signal.SIGHUP - 1 & 1))
"""


def test_mpi_does_not_take_over_sighup(python, tmp_path):
    """UCX, in MPICH's wheel, would print its debugging output instead."""
    (tmp_path / "script.py").write_text(CATCHES_SIGHUP)
    done = python(tmp_path / "script.py", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.stdout == "False\n", done.stderr


@pytest.mark.slow
def test_one_replica_per_rank_by_default(train):
    log, _ = train("-B", 0.08, "-L", 2, ranks=3)
    assert log[0]["num_replicas"] == log[0]["num_ranks"] == len(select(log, "eval")[0]["replica_errors"]) == 3
    assert log[0]["threads_per_rank"] == max(1, cores.count_cores() // 3)


@pytest.mark.slow
def test_two_ranks_per_replica_share_its_mini_batches(train):
    log, _ = train("-n", 2, "-B", 0.16, "-L", 5, "-b", 50, ranks=4)
    assert (log[0]["num_replicas"], log[0]["num_ranks"]) == (2, 4)
    rounds = select(log, "round")
    assert log[-1]["images_seen"] == 2 * rounds[-1]["round"] * 5 * 50
    assert 0 < rounds[0]["train_loss"] < 4 and 0 < rounds[0]["train_error"] < 95  # means over whole mini-batches


@pytest.mark.slow
def test_sgd_is_data_parallel_over_all_ranks(train):
    log, _ = train("--method", "sgd", "-B", 2, ranks=3)
    assert (log[0]["num_replicas"], log[0]["num_ranks"], log[0]["sync_every"]) == (1, 3, 1)
    rounds = select(log, "round")
    assert [line["round"] for line in rounds] == [12, 24]  # one line per 25 steps at most
    assert rounds[1]["train_loss"] < rounds[0]["train_loss"] < 2.5  # means over whole mini-batches
    assert len(select(log, "eval")) == 2


def test_settings_that_differ_between_ranks_exit_with_2(python, proc):
    command = [ROOT / "parle_mpi.py", "-d", "digits", "--proc", proc, "--lr"]
    done = python(*command, 0.1, ":", "-n", 1, sys.executable, *command, 0.2, ranks=1, timeout=100)
    assert done.returncode == 2
    assert_one_line(done.stderr, "lr", "0.1", "rank 0", "0.2", "rank 1")


USAGE_ERRORS = [
    # arguments of both ranks, further arguments of rank 1, words of the message
    ("-n 3 -d digits", "", ["-n", "1, 2"]),
    ("-b 2000 -d digits", "", ["-b", "1437"]),
    ("-d mnist", "", ["mnist", "--data"]),
    ("-d digits --out /proc/none", "", ["--out", "/proc/none"]),
    ("-d digits", "-s 1", ["seed", "42", "rank 0", "1 on rank 1"]),
    ("-d digits", "--device nonsense", ["--device", "nonsense"]),
]
TWO_RANKS = f"""
import contextlib, io, json, os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import loader, parle_mpi
from mpi4py import MPI

rank, finalize = MPI.COMM_WORLD.rank, MPI.Finalize
common, usage_errors = sys.argv[1:-1], json.loads(sys.argv[-1])
MPI.Finalize = lambda: None  # so that main() can be called again
results = []
for both, second, _ in usage_errors:
    sys.argv = ["parle_mpi.py", *common, *both.split(), *(second.split() if rank == 1 else [])]
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()) as stdout:
        try:
            parle_mpi.main()
            code = 0
        except SystemExit as exit:
            code = exit.code
    results.append([code, stdout.getvalue(), stderr.getvalue()])
with open(f"results-{{rank}}.json", "w") as file:
    json.dump(results, file)

def fail(self):
    raise RuntimeError("no more mini-batches")

MPI.Finalize = finalize
if rank == 1:
    loader.BatchLoader.__next__ = fail
sys.argv = ["parle_mpi.py", *common, "-d", "digits", "--out", "run"]
runpy.run_path({str(ROOT / "parle_mpi.py")!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def two_ranks(python, proc, tmp_path_factory):
    """Run each of USAGE_ERRORS on two ranks, then train until rank 1 raises an exception."""
    folder = tmp_path_factory.mktemp("two_ranks")
    (folder / "script.py").write_text(TWO_RANKS)
    arguments = ("script.py", "--proc", proc, json.dumps(USAGE_ERRORS))
    done = python(*arguments, ranks=2, cwd=folder, timeout=100, OMP_NUM_THREADS="1", **OFFLINE)
    assert (folder / "results-0.json").exists(), done.stderr
    return folder, [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)], done


def assert_one_line(stderr, *words):
    (line,) = stderr.splitlines()
    assert line.startswith("parle_mpi.py: error: ")
    assert all(word in line for word in words), line


@pytest.mark.parametrize("number", range(len(USAGE_ERRORS)), ids=[" ".join(row[:2]) for row in USAGE_ERRORS])
def test_usage_error_prints_one_line_and_ends_every_rank(number, two_ranks):
    folder, results, _ = two_ranks
    (code, out, err), second = (rank[number] for rank in results)
    assert (code, out) == (2, "")
    assert_one_line(err, *USAGE_ERRORS[number][2])
    assert second == [2, "", ""]
    assert not (folder / "runs").exists()


def test_exception_on_one_rank_names_rank_and_round(two_ranks):
    _, _, done = two_ranks
    assert done.returncode not in (0, 2, 75)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("rank 1: RuntimeError: no more mini-batches")
    assert "round 1" in last


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_gpus_matches_the_cpu(train, tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        log, _ = train("-n", 2, "-B", 0.16, "-L", 5, "--dropout", 0, "--device", device)
        losses.append([line["train_loss"] for line in select(log, "round")])
        (tmp_path / "run").rename(tmp_path / device)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_mnist_reaches_the_error_in_the_readme(python, raw, tmp_path):
    command = ("-n", 3, "-B", 0.25, "--data", raw, "--proc", tmp_path / "proc", "--out", tmp_path / "run")
    done = python(ROOT / "parle_mpi.py", *command, timeout=900)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["master_error"] < 0.75


@pytest.mark.parametrize(
    "launched", [dict(PMI_RANK="1", PMI_SIZE="3"), dict(SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="3")]
)
def test_ranks_that_mpi_does_not_see_are_an_error(launched, monkeypatch, no_launcher):
    from mpi4py import MPI

    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    settings = dict(lr=0.1, batches_per_epoch=1)
    with pytest.raises(OSError, match=r"3 ranks|srun --mpi=pmi2"):
        Parle([nn.Parameter(torch.ones(2))], MPI.COMM_WORLD, **settings)
    Parle([nn.Parameter(torch.ones(2))], MPI.COMM_SELF, **settings)
