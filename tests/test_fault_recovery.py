"""Runs in real processes that are killed, stopped or hang, or whose weights become NaN, each with a time limit."""

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from parle import checkpoint
from tests.conftest import MPIEXEC, ROOT, SETTINGS, outside

pytestmark = pytest.mark.timeout(400)  # a test starts Python several times, on a busy machine
MPI, GPU = "parle_mpi.py", "parle_gpu.py"
PATH_WITHOUT_PYTHON = "/usr/bin:/bin"  # without the Python of an environment


def wait_for_exit(process, timeout=150):
    out, err = process.communicate(timeout=timeout)
    return SimpleNamespace(status=process.returncode, out=out, err=err)


def wait_for_success(process):
    done = wait_for_exit(process)
    assert done.status == 0, done.err
    return done


def checkpoint_names(out):
    """Return the names of the checkpoints of the run in `out`, newest first."""
    return [path.name for path in checkpoint.list_checkpoints(out / "checkpoints")]


def wait_until(condition, process, seconds=100):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.01)


def wait_for_rounds(out, process, rounds=2):
    """Wait until the checkpoint of this round is saved."""
    wait_until(lambda: checkpoint_names(out) >= [f"{rounds:08}-0000"], process)


def read_log(out, *events):
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in log if line["event"] in events] if events else log


def find_resume_command(text):
    """Return the command that resumes the run: the end of the last line that contains one."""
    return re.findall(r"(?:mpiexec -n \d+ )?\S+ parle_(?:mpi|gpu)\.py .*--resume .*", text)[-1]


def resumes(command, program, out):
    """Return whether the command runs this Python and resumes the run in `out` with `program`."""
    python, *arguments = shlex.split(command)
    return os.path.samefile(shutil.which(python), sys.executable) and arguments == [program, "--resume", str(out)]


TIMINGS = {"train_seconds", "sync_seconds", "straggler_seconds", "wall_seconds", "images_per_second"}


def read_result(out):
    """Return what must not depend on interruptions: the log except for timings, and the master."""
    events = read_log(out, "round", "nonfinite", "eval", "finished")
    log = [{name: value for name, value in line.items() if name not in TIMINGS} for line in events]
    master = torch.load(out / "master.pt", weights_only=True)
    return log, {name: value.tolist() for name, value in master.items()}


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, proc):
    """Return the result of 15 rounds on this number of ranks without interruption."""

    @functools.cache
    def uninterrupted(ranks):
        out = tmp_path_factory.mktemp("uninterrupted") / "run"
        command = [MPIEXEC, "-n", ranks, sys.executable, MPI, *SETTINGS, "--proc", proc, "--out", out, "-B", 3]
        environment = outside(dict(OMP_NUM_THREADS="1"))
        subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, timeout=150, check=True)
        return read_result(out)

    return uninterrupted


MESSAGES = {
    "kill:1:4": ("rank 1", "killed"),
    "raise:2:3": ("rank 2", "RuntimeError", "round 3"),
    "hang:1:5": ("CollectiveTimeout", "rank 1", "round 5"),
}


@pytest.mark.parametrize(
    ("fault", "ranks", "timeout"),
    [
        ("kill:1:4", 2, 1800),
        pytest.param("raise:2:3", 3, 1800, marks=pytest.mark.slow),
        pytest.param("hang:1:5", 3, 6, marks=pytest.mark.slow),
    ],
)
def test_failed_rank_ends_all_and_resume_is_bitwise_identical(start, uninterrupted, tmp_path, fault, ranks, timeout):
    out, expected = tmp_path / "run", uninterrupted(ranks)  # the data are in place then, which takes longer than 6 s
    done = wait_for_exit(start(MPI, "-n", ranks, "-B", 3, "--timeout", timeout, PARLE_FAULT=fault))
    round = int(fault[-1])
    assert done.status not in (0, 75)
    assert checkpoint_names(out) == [f"{round - 1:08}-0000", f"{round - 2:08}-0000"], done.err
    last = done.err.splitlines()[-1]
    assert all(word in last for word in MESSAGES[fault]), last
    command = find_resume_command(last)
    assert resumes(command, MPI, out)
    wait_for_success(start.shell(command))
    assert read_result(out) == expected
    assert read_log(out, "resume")[0]["round"] == round - 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_killed_rank_is_named(start, rank):
    done = wait_for_exit(start(MPI, "-n", 3, "-B", 1, PARLE_FAULT=f"kill:{rank}:{2 + rank}"))
    last = done.err.splitlines()[-1]
    assert f"rank {rank}" in last and "killed" in last and "--resume" in last


@pytest.mark.slow
def test_kill_before_a_checkpoint_prints_only_the_rank(start, tmp_path):
    done = wait_for_exit(start(MPI, "-n", 2, PARLE_FAULT="kill:1:1"))
    assert done.status not in (0, 75)
    last = done.err.splitlines()[-1]
    assert "rank 1" in last and "killed" in last and "--resume" not in last
    assert checkpoint_names(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill:1:4", "raise:1:4"])
def test_failed_rank_of_a_resumed_run_can_be_resumed(start, uninterrupted, tmp_path, fault):
    out = tmp_path / "run"
    process = start(MPI, "-n", 3, "-B", 3)
    wait_for_rounds(out, process)
    process.terminate()
    wait_for_exit(process)
    rounds = int(checkpoint_names(out)[0][:8]) + 1
    done = wait_for_exit(start(MPI, "--resume", PARLE_FAULT=f"{fault[:-1]}{rounds}"))
    last = done.err.splitlines()[-1]
    assert resumes(find_resume_command(last), MPI, out)
    wait_for_success(start.shell(find_resume_command(last)))
    assert read_result(out) == uninterrupted(3)


@pytest.mark.slow
def test_resume_after_sigterm_is_bitwise_identical(start, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start(MPI, "-n", 3, "-B", 3)
    wait_for_rounds(out, process)
    process.terminate()
    done = wait_for_exit(process)
    assert (done.status, done.err) == (75, "")
    command = find_resume_command(done.out)
    assert command == read_log(out)[-1]["resume_command"] and resumes(command, MPI, out)
    wait_for_success(start.shell(command))
    assert read_result(out) == uninterrupted(3)


def find_rank_pid(rank, out, variable="PMI_RANK"):
    """Return the process number of this rank of the run in `out`."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (folder / "environ").read_bytes().split(b"\0")
            if f"{variable}={rank}".encode() in environment and str(out).encode() in (folder / "cmdline").read_bytes():
                return int(folder.name)
    raise LookupError(rank)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("rank", [0, 2])
def test_signal_to_one_rank_reaches_all(start, tmp_path, number, rank):
    out = tmp_path / "run"
    process = start(MPI, "-B", 1, "--frac", 1, "--checkpoint-every", 1000, ranks=3)  # only the last checkpoint
    wait_until(lambda: (out / "log.jsonl").exists() and len(read_log(out)) > 1, process)
    os.kill(find_rank_pid(rank, out), number)
    done = wait_for_exit(process)
    num_rounds = read_log(out)[0]["num_rounds"]
    rounds = [int(name[:8]) for name in checkpoint_names(out)]
    if number == signal.SIGUSR1:
        assert (done.status, done.err) == (0, "")
        assert read_log(out)[-1]["event"] == "finished"
        assert len(rounds) == 2 and 0 < rounds[1] < rounds[0] == num_rounds
    else:
        assert (done.status, done.err) == (75, "")
        assert rounds == [read_log(out)[-1]["round"]] and 0 < rounds[0] < num_rounds
        assert find_resume_command(done.out) == read_log(out)[-1]["resume_command"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, 3])
def test_signal_to_all_ranks_stops_once(start, tmp_path, ranks):
    """Slurm and mpiexec forward a signal to every rank."""
    process = start(MPI, "-n", 3, "-B", 4, ranks=ranks)
    wait_for_rounds(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM if ranks else signal.SIGINT)
    done = wait_for_exit(process)
    assert done.status == 75
    assert done.out.count("--resume") == 1
    command = find_resume_command(done.out)
    if ranks:
        assert re.search(rf"mpiexec -n 3 \S+ {MPI} -n 3 --resume", done.out)
    else:
        assert resumes(command, MPI, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("program", [MPI, GPU])
def test_second_sigint_stops_at_once(start, tmp_path, program):
    process = start(program, "-n", 3, "-B", 40, PARLE_FAULT="hang:0:3")  # ends neither its step nor its round
    wait_for_rounds(tmp_path / "run", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    done = wait_for_exit(process)
    assert done.status not in (0, 75)
    checkpoint.latest_valid(checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize("program", [MPI, GPU])
def test_resume_command_needs_no_python_on_the_path(start, tmp_path, program):
    out = tmp_path / "run"
    done = wait_for_exit(start(program, "-n", 2, "-B", 1, PARLE_FAULT="raise:1:3", PATH=PATH_WITHOUT_PYTHON))
    assert done.status not in (0, 75)
    command = find_resume_command(done.err)
    assert command == f"{shlex.quote(sys.executable)} {program} --resume {out}"
    wait_for_success(start.shell(command, PATH=PATH_WITHOUT_PYTHON))
    assert [line["round"] for line in read_log(out, "resume")] == [2]
    assert read_log(out)[-1]["event"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("program", [MPI, GPU])
@pytest.mark.parametrize("redirected", ["> /dev/full", "> /dev/full 2>&1", "| true", ">&-"])
def test_full_or_closed_stdout_does_not_end_the_run(start, tmp_path, proc, program, redirected):
    out = tmp_path / "run"
    words = [sys.executable, program, *SETTINGS, "--proc", proc, "--out", out, "-n", 2, "-B", 0.4]
    done = wait_for_exit(start.shell(f"{shlex.join(map(str, words))} {redirected}"))
    assert (done.status, done.out) == (0, ""), done.err
    assert read_log(out)[-1]["event"] == "finished"
    assert checkpoint_names(out) == ["00000002-0000", "00000001-0000"]
    assert (out / "master.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("program", [MPI, GPU])
def test_second_run_in_the_same_directory_is_refused(start, tmp_path, program):
    out = tmp_path / "run"
    first = start(program, "-n", 2, "-B", 4000)
    wait_for_rounds(out, first)
    second = wait_for_exit(start(program, "--resume"))
    assert (second.status, second.out) == (2, "")
    (line,) = second.err.splitlines()
    assert line.startswith(f"{program}: error: ") and "--out" in line and f"{out}/log.jsonl" in line
    first.terminate()
    done = wait_for_exit(first)
    assert (done.status, done.err) == (75, "")
    events = read_log(out, "start", "resume", "interrupted", "checkpoint_failed")
    assert [line["event"] for line in events] == ["start", "interrupted"]
    wait_for_success(start(program, "--resume", "-B", int(checkpoint_names(out)[0][:8]) // 5 + 1))


@pytest.mark.slow
@pytest.mark.parametrize("program", [MPI, GPU])
def test_sigusr1_saves_and_the_run_finishes(start, tmp_path, program):
    out = tmp_path / "run"
    process = start(program, "-n", 2, "-B", 6, "--checkpoint-every", 1000, "--eval-every", 1)
    wait_until(lambda: (out / "log.jsonl").exists() and len(read_log(out, "round")) >= 7, process)
    assert [name[:8] for name in checkpoint_names(out)] == ["00000005"]
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: checkpoint_names(out)[0][:8] > "00000005", process)
    assert int(checkpoint_names(out)[0][:8]) % 5 != 0
    done = wait_for_exit(process)
    assert (done.status, done.err) == (0, "")
    assert read_log(out)[-1]["event"] == "finished"


def test_sigterm_stops_parle_gpu_within_a_round(start, tmp_path):
    out = tmp_path / "run"
    process = start(GPU, "-n", 2, "-L", 100_000)
    wait_until(lambda: (out / "log.jsonl").exists() and read_log(out), process)
    process.terminate()
    done = wait_for_exit(process)
    assert (done.status, done.err) == (75, "")
    assert resumes(find_resume_command(done.out), GPU, out)
    (path,) = checkpoint.list_checkpoints(out / "checkpoints")
    counters = checkpoint.read_manifest(path)["counters"]
    assert counters["rounds_done"] == 0 < counters["step_in_round"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "method", "replica"),
    [(2, "parle", 0), (3, "parle", 1), (2, "elastic-sgd", 1), (3, "elastic-sgd", 0)],
)
def test_replica_with_nan_is_reported_and_restarted(start, tmp_path, n, method, replica):
    sync_every, epochs = (5, 1) if method == "parle" else (1, 8)
    arguments = ("-n", n, "--method", method, "-L", sync_every, "-B", epochs, "--on-nan", "restart")
    done = wait_for_success(start(MPI, *arguments, PARLE_FAULT=f"nan:{replica}:3"))
    (warning,) = [line for line in done.out.splitlines() if "WARNING" in line]
    assert "NaN" in warning and f"replica {replica}" in warning and "round 3" in warning
    log = read_log(tmp_path / "run")
    nonfinite = [line for line in log if line["event"] == "nonfinite"]
    assert nonfinite == [{"event": "nonfinite", "round": 3, "replicas": [replica]}]
    assert "null" not in json.dumps([line for line in log if line["event"] in ("round", "eval", "finished")])
    last = read_log(tmp_path / "run", "eval")[-1]
    assert last["master_error"] < 60
    assert all(error < 80 for error in last["replica_errors"])
    assert all(distance < 1 for distance in last["replica_distances"])


@pytest.mark.slow
@pytest.mark.parametrize(("program", "n", "words"), [(MPI, 3, "replica"), (GPU, 3, "replica"), (MPI, 1, "replicas")])
def test_stop_on_nan_prints_one_line_and_exits_with_1(start, tmp_path, program, n, words):
    done = wait_for_exit(start(program, "-n", n, "-B", 1, "--on-nan", "stop", PARLE_FAULT="nan:0:3"))
    assert done.status == 1
    (line,) = done.err.splitlines()
    assert line.startswith(f"{program}: error: ")
    assert words in line and "round 3" in line
    assert resumes(find_resume_command(line), program, tmp_path / "run")
    assert checkpoint_names(tmp_path / "run") == ["00000002-0000", "00000001-0000"]
    shared = tmp_path / "run" / "checkpoints" / "00000002-0000" / "shared.pt"
    states = torch.load(shared, weights_only=True)  # by parameter
    assert states and all(state["master"].isfinite().all() for state in states.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_launcher_leaves_no_rank_and_resumes(start, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start(MPI, "-n", 3, "-B", 3)
    wait_for_rounds(out, process)
    ranks = [find_rank_pid(rank, out) for rank in range(3)]
    process.kill()
    deadline = time.time() + 60
    while any(os.path.exists(f"/proc/{rank}") for rank in ranks):
        assert time.time() < deadline
        time.sleep(0.05)
    process.communicate()
    wait_for_success(start(MPI, "--resume"))
    assert read_result(out) == uninterrupted(3)


@pytest.mark.slow
def test_resume_from_mpi_to_gpu_and_back(start, tmp_path):
    out = tmp_path / "run"
    wait_for_success(start(MPI, "-n", 3, "-B", 0.6))
    wait_for_success(start(GPU, "-B", 1, "--resume"))
    wait_for_success(start(MPI, "-B", 3, "--resume"))
    wait_for_success(start(MPI, "-n", 3, "-B", 3, out="uninterrupted"))
    (log, master), (expected_log, expected) = read_result(out), read_result(tmp_path / "uninterrupted")
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(master[name]), torch.tensor(value), rtol=1e-3, atol=1e-5)
    assert log[-1]["images_seen"] == expected_log[-1]["images_seen"]
    events = read_log(out, "resume")
    assert [event["num_replicas"] for event in events] == [3, 3]
    assert [event["changes"]["program"] for event in events] == [[MPI, GPU], [GPU, MPI]]
    assert ["num_ranks" in event for event in events] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_resume_with_another_number_of_replicas(start, tmp_path, n):
    out = tmp_path / "run"
    process = start(MPI, "-n", 3, "-B", 3)
    wait_for_rounds(out, process)
    process.terminate()
    assert wait_for_exit(process).status == 75
    done = wait_for_success(start(MPI, "-n", n, "-B", 3, "--resume"))
    assert read_log(out, "resume")[0]["changes"]["replicas"] == [3, n]
    assert "replicas" in done.out
    assert len(read_log(out, "eval")[-1]["replica_errors"]) == n


@pytest.mark.slow
def test_resume_keeps_replicas_of_several_ranks(start, tmp_path):
    out = tmp_path / "run"
    process = start(MPI, "-n", 2, "-B", 4, ranks=4)
    wait_for_rounds(out, process)
    process.terminate()
    done = wait_for_exit(process)
    assert done.status == 75
    path = f"{MPIEXEC.parent}:{os.environ['PATH']}"  # as in the shell of a user who typed mpiexec
    wait_for_success(start.shell(f"{find_resume_command(done.out)} -B 1", PATH=path))
    (event,) = read_log(out, "resume")
    assert (event["num_replicas"], event["num_ranks"], event["changes"].get("replicas")) == (2, 4, None)


@pytest.mark.slow
def test_restarted_ranks_end_with_the_result_of_an_undisturbed_run(start, tmp_path):
    arguments = ("-n", 3, "-B", 6, "--max-restarts", 1)
    wait_for_success(start(MPI, *arguments, out="undisturbed"))
    process = start(MPI, *arguments)
    wait_for_rounds(tmp_path / "run", process)
    os.kill(find_rank_pid(1, tmp_path / "run"), signal.SIGKILL)
    done = wait_for_success(process)
    assert "restart 1 of 1" in done.err and read_log(tmp_path / "run", "resume")
    assert read_result(tmp_path / "run") == read_result(tmp_path / "undisturbed")
