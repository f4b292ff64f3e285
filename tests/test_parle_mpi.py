"""The program and its class as real MPI processes, each run with a time limit; more of it in test_programs.py."""

import json
import os
import sys

import pytest
import torch

from tests.conftest import OFFLINE, ROOT


@pytest.fixture
def train(python, proc, tmp_path):
    """Train on digits; gives the log, event by event, and what was printed."""

    def train(*arguments, ranks=None, **environment):
        out = tmp_path / "run"
        common = ("-d", "digits", "--proc", proc, "--out", out)
        done = python(ROOT / "parle_mpi.py", *common, *arguments, ranks=ranks, **environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()], done.stdout

    return train


def of(log, event):
    return [line for line in log if line["event"] == event]


@pytest.mark.parametrize("ranks", [pytest.param(3, marks=pytest.mark.slow), 4])  # which try 1 and 2 too
def test_every_rank_in_lockstep_with_the_reference(python, ranks):
    done = python(ROOT / "tests" / "lockstep.py", ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all equal\n")


@pytest.mark.slow
def test_the_ranks_of_a_launcher_are_as_many_replicas(train):
    log, _ = train("-B", 0.08, "-L", 2, ranks=3)
    assert log[0]["replicas"] == log[0]["ranks"] == len(of(log, "eval")[0]["replica_errors"]) == 3
    assert log[0]["threads"] == max(1, len(os.sched_getaffinity(0)) // 3)


@pytest.mark.slow
def test_two_replicas_over_four_ranks_share_their_batches(train):
    log, _ = train("-n", 2, "-B", 0.16, "-L", 5, "-b", 50, ranks=4)
    assert (log[0]["replicas"], log[0]["ranks"]) == (2, 4)
    rounds = of(log, "round")
    assert log[-1]["images"] == 2 * rounds[-1]["round"] * 5 * 50
    assert 0 < rounds[0]["loss"] < 4 and 0 < rounds[0]["error"] < 95  # as those of whole batches


@pytest.mark.slow
def test_sgd_is_data_parallel_over_the_ranks(train):
    log, _ = train("--method", "sgd", "-B", 2, ranks=3)
    assert (log[0]["replicas"], log[0]["ranks"], log[0]["sync_every"]) == (1, 3, 1)
    rounds = of(log, "round")
    assert [line["round"] for line in rounds] == [12, 24]  # one line for up to 25 mini-batches
    assert rounds[1]["loss"] < rounds[0]["loss"] < 2.5  # as that of one whole batch
    assert len(of(log, "eval")) == 2


def test_ranks_with_different_settings_stop_with_one_line(python, proc):
    command = [ROOT / "parle_mpi.py", "-d", "digits", "--proc", proc, "--lr"]
    done = python(*command, 0.1, ":", "-n", 1, sys.executable, *command, 0.2, ranks=1)
    assert done.returncode == 2
    assert done.stderr == (
        "parle_mpi.py: error: lr is 0.1 on rank 0 and 0.2 on rank 1: start every rank with the same\n"
    )


@pytest.mark.parametrize(
    ("arguments", "ranks", "words"),
    [
        (["-n", 3, "-d", "digits"], 2, "use -n with one of 1, 2"),
        (["-b", 2000, "-d", "digits"], 2, "-b 1437 or less"),
        pytest.param(["-d", "mnist", "-n", 2], None, "give --data DIR", marks=pytest.mark.slow),
        pytest.param(
            ["-d", "digits", "--out", "/proc/none", "-n", 2], None, "name a new folder", marks=pytest.mark.slow
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_for_all_ranks(python, proc, tmp_path, arguments, ranks, words):
    done = python(ROOT / "parle_mpi.py", "--proc", proc, *arguments, ranks=ranks, cwd=tmp_path, **OFFLINE)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("parle_mpi.py: error: ")
    assert words in line
    assert not (tmp_path / "runs").exists()


def test_an_exception_in_the_program_ends_every_rank(python, proc, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import loader

def fail(self):
    raise RuntimeError("no more batches")

if os.environ["PMI_RANK"] == "1":
    loader.Batches.__next__ = fail
runpy.run_path({str(ROOT / "parle_mpi.py")!r}, run_name="__main__")
""")
    done = python(script, "-d", "digits", "--proc", proc, "--out", tmp_path / "run", ranks=3)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == "rank 1: RuntimeError: no more batches; in round 1"


def test_a_mistake_of_one_rank_alone_is_told_once_and_ends_all(python, proc):
    command = [ROOT / "parle_mpi.py", "-d", "digits", "--proc", proc, "--device"]
    done = python(*command, "cpu", ":", "-n", 1, sys.executable, *command, "nonsense", ranks=1)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("parle_mpi.py: error: --device nonsense is not to be had here")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ranks_on_gpus_train_as_ranks_on_the_cpu_do(train, tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        log, _ = train("-n", 2, "-B", 0.16, "-L", 5, "--dropout", 0, "--device", device)
        losses.append([line["loss"] for line in of(log, "round")])
        (tmp_path / "run").rename(tmp_path / device)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_mnist_reaches_the_error_that_the_readme_names(python, raw, tmp_path):
    command = ("-n", 3, "-B", 0.25, "--data", raw, "--proc", tmp_path / "proc", "--out", tmp_path / "run")
    done = python(ROOT / "parle_mpi.py", *command, timeout=900)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["master_error"] < 0.75
