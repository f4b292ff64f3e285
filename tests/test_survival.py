"""Runs of real processes that are killed, stopped, hang or meet NaN, each with a time limit."""

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

from benchmarks import record, survival
from parle import checkpoint
from tests.conftest import MPIEXEC, ROOT, outside

pytestmark = pytest.mark.timeout(400)  # of several starts of Python each, on a busy machine
SETTINGS = shlex.split("-d digits --device cpu -L 5 -b 24 --frac 0.075 --lr-drops 0.6 --checkpoint-every 1")
MPI, GPU = "parle_mpi.py", "parle_gpu.py"
BARE = "/usr/bin:/bin"  # for a PATH: no Python of an environment is there


@pytest.fixture
def start(tmp_path, proc):
    """Start a program; gives the process. What is still running at the end of the test is killed."""
    started = []

    def start(program, *arguments, out="run", ranks=None, **environment):
        command = [sys.executable, program, *SETTINGS, "--proc", proc, "--out", tmp_path / out, *arguments]
        if ranks is not None:
            command = [MPIEXEC, "-n", ranks, *command]
        (tmp_path / "tmp").mkdir(exist_ok=True)
        return begin(list(map(str, command)), dict(TMPDIR=str(tmp_path / "tmp"), OMP_NUM_THREADS="1") | environment)

    def begin(command, environment):
        process = subprocess.Popen(
            command, cwd=ROOT, env=outside(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    start.again = lambda command, **changes: begin(["bash", "-c", command], dict(OMP_NUM_THREADS="1") | changes)
    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def finish(process, timeout=150):
    printed, erred = process.communicate(timeout=timeout)
    return SimpleNamespace(status=process.returncode, printed=printed, erred=erred, ended=time.time())


def finished(process):
    done = finish(process)
    assert done.status == 0, done.erred
    return done


def saved(out):
    return [path.name for path in checkpoint.list_checkpoints(out / "checkpoints")]


def until(condition, process, seconds=100):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.01)


def trains(out, process, rounds=2):
    """Wait until so many rounds are done."""
    until(lambda: saved(out) >= [f"{rounds:08}-0000"], process)


def log_of(out, *events):
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in log if line["event"] in events] if events else log


def command_of(text):
    """The command that resumes the run: the end of the last line that has one."""
    return re.findall(r"(?:mpiexec -n \d+ )?\S+ parle_(?:mpi|gpu)\.py .*--resume .*", text)[-1]


def resumes(command, program, out):
    """Whether the command is this Python's, of the program and of the run in `out`."""
    python, *arguments = shlex.split(command)
    return os.path.samefile(shutil.which(python), sys.executable) and arguments == [program, "--resume", str(out)]


TIMINGS = {"seconds", "sync_seconds", "straggler_seconds", "wall_seconds", "images_per_second"}


def result(out):
    """What must not depend on interruptions: the log but for timings, and the master."""
    events = log_of(out, "round", "lost", "eval", "end")
    log = [{name: value for name, value in line.items() if name not in TIMINGS} for line in events]
    master = torch.load(out / "master.pt", weights_only=True)
    return log, {name: value.tolist() for name, value in master.items()}


@pytest.fixture(scope="session")
def whole(tmp_path_factory, proc):
    """The result of so many ranks that nobody interrupts, in 15 rounds."""

    @functools.cache
    def whole(ranks):
        out = tmp_path_factory.mktemp("whole") / "run"
        command = [MPIEXEC, "-n", ranks, sys.executable, MPI, *SETTINGS, "--proc", proc, "--out", out, "-B", 3]
        environment = outside(dict(OMP_NUM_THREADS="1"))
        subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, timeout=150, check=True)
        return result(out)

    return whole


FAULTS = {
    "kill:1:4": ("rank 1", "killed"),
    "raise:2:3": ("rank 2", "RuntimeError", "round 3"),
    "stall:1:5": ("Hang", "2 s", "rank 1", "round 5"),
}


@pytest.mark.parametrize(
    ("fault", "ranks", "timeout"),
    [
        ("kill:1:4", 2, 1800),
        pytest.param("raise:2:3", 3, 1800, marks=pytest.mark.slow),
        pytest.param("stall:1:5", 3, 2, marks=pytest.mark.slow),
    ],
)
def test_lost_rank_ends_all_and_resume_is_bitwise_identical(start, whole, tmp_path, fault, ranks, timeout):
    out = tmp_path / "run"
    done = finish(start(MPI, "-n", ranks, "-B", 3, "--timeout", timeout, PARLE_FAULT=fault))
    round = int(fault[-1])
    assert done.status not in (0, 75)
    assert saved(out) == [f"{round - 1:08}-0000", f"{round - 2:08}-0000"], done.erred
    last = done.erred.splitlines()[-1]
    assert all(word in last for word in FAULTS[fault]), last
    assert resumes(command_of(last), MPI, out)
    finished(start.again(command_of(last)))
    assert result(out) == whole(ranks)
    assert log_of(out, "resume")[0]["round"] == round - 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_killed_rank_is_named(start, rank):
    done = finish(start(MPI, "-n", 3, "-B", 1, PARLE_FAULT=f"kill:{rank}:{2 + rank}"))
    last = done.erred.splitlines()[-1]
    assert f"rank {rank}" in last and "killed" in last and "--resume" in last


@pytest.mark.slow
def test_killed_before_a_checkpoint_names_only_the_rank(start, tmp_path):
    done = finish(start(MPI, "-n", 2, PARLE_FAULT="kill:1:1"))
    assert done.status not in (0, 75)
    last = done.erred.splitlines()[-1]
    assert "rank 1" in last and "killed" in last and "--resume" not in last
    assert saved(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill:1:4", "raise:1:4"])
def test_killed_while_resuming_prints_how_to_resume(start, whole, tmp_path, fault):
    out = tmp_path / "run"
    process = start(MPI, "-n", 3, "-B", 3)
    trains(out, process)
    process.terminate()
    finish(process)
    rounds = int(saved(out)[0][:8]) + 1
    done = finish(start(MPI, "--resume", PARLE_FAULT=f"{fault[:-1]}{rounds}"))
    last = done.erred.splitlines()[-1]
    assert resumes(command_of(last), MPI, out)
    finished(start.again(command_of(last)))
    assert result(out) == whole(3)


@pytest.mark.slow
def test_resume_after_sigterm_is_bitwise_identical(start, whole, tmp_path):
    out = tmp_path / "run"
    process = start(MPI, "-n", 3, "-B", 3)
    trains(out, process)
    process.terminate()
    done = finish(process)
    assert (done.status, done.erred) == (75, "")
    command = command_of(done.printed)
    assert command == log_of(out)[-1]["command"] and resumes(command, MPI, out)
    finished(start.again(command))
    assert result(out) == whole(3)


def process_of(rank, out):
    """The number of the process that is this rank of the run in `out`."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (folder / "environ").read_bytes().split(b"\0")
            if f"PMI_RANK={rank}".encode() in environment and str(out).encode() in (folder / "cmdline").read_bytes():
                return int(folder.name)
    raise LookupError(rank)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("rank", [0, 2])
def test_signal_to_one_rank_reaches_all(start, tmp_path, number, rank):
    out = tmp_path / "run"
    process = start(MPI, "-B", 1, "--frac", 1, "--checkpoint-every", 1000, ranks=3)  # no other checkpoint than the last
    until(lambda: (out / "log.jsonl").exists() and len(log_of(out)) > 1, process)
    os.kill(process_of(rank, out), number)
    done = finish(process)
    rounds = log_of(out)[0]["rounds"]
    kept = [int(name[:8]) for name in saved(out)]
    if number == signal.SIGUSR1:
        assert (done.status, done.erred) == (0, "")
        assert log_of(out)[-1]["event"] == "end"
        assert len(kept) == 2 and 0 < kept[1] < kept[0] == rounds
    else:
        assert (done.status, done.erred) == (75, "")
        assert kept == [log_of(out)[-1]["round"]] and 0 < kept[0] < rounds
        assert command_of(done.printed) == log_of(out)[-1]["command"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, 3])
def test_signal_to_all_ranks_stops_once(start, tmp_path, ranks):
    """As Slurm and mpiexec do it: every rank gets the signal."""
    process = start(MPI, "-n", 3, "-B", 4, ranks=ranks)
    trains(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM if ranks else signal.SIGINT)
    done = finish(process)
    assert done.status == 75
    assert done.printed.count("--resume") == 1
    command = command_of(done.printed)
    if ranks:
        assert re.search(rf"mpiexec -n 3 \S+ {MPI} -n 3 --resume", done.printed)
    else:
        assert resumes(command, MPI, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("program", [MPI, GPU])
def test_second_sigint_stops_at_once(start, tmp_path, program):
    # one that neither ends its mini-batch nor its round
    process = start(program, "-n", 3, "-B", 40, PARLE_FAULT="stall:0:3")
    trains(tmp_path / "run", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.status not in (0, 75)
    checkpoint.latest_valid(checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize("program", [MPI, GPU])
def test_resume_command_runs_where_path_has_no_python(start, tmp_path, program):
    out = tmp_path / "run"
    done = finish(start(program, "-n", 2, "-B", 1, PARLE_FAULT="raise:1:3", PATH=BARE))
    assert done.status not in (0, 75)
    command = command_of(done.erred)
    assert command == f"{shlex.quote(sys.executable)} {program} --resume {out}"
    finished(start.again(command, PATH=BARE))
    assert [line["round"] for line in log_of(out, "resume")] == [2]
    assert log_of(out)[-1]["event"] == "end"


@pytest.mark.slow
@pytest.mark.parametrize("program", [MPI, GPU])
@pytest.mark.parametrize(
    "redirected",
    [
        *("> /dev/full", "> /dev/full 2>&1", "| true"),
        ">&-",
    ],
)
def test_full_or_closed_stdout_does_not_end_the_run(start, tmp_path, proc, program, redirected):
    out = tmp_path / "run"
    words = [sys.executable, program, *SETTINGS, "--proc", proc, "--out", out, "-n", 2, "-B", 0.4]
    done = finish(start.again(f"{shlex.join(map(str, words))} {redirected}"))
    assert (done.status, done.printed) == (0, ""), done.erred
    assert log_of(out)[-1]["event"] == "end"
    assert saved(out) == ["00000002-0000", "00000001-0000"]
    assert (out / "master.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("program", [MPI, GPU])
def test_second_run_in_a_folder_in_use_is_refused(start, tmp_path, program):
    out = tmp_path / "run"
    first = start(program, "-n", 2, "-B", 4000)
    trains(out, first)
    second = finish(start(program, "--resume"))
    assert (second.status, second.printed) == (2, "")
    (line,) = second.erred.splitlines()
    assert line.startswith(f"{program}: error: ") and "--out" in line and f"{out}/log.jsonl" in line
    first.terminate()
    done = finish(first)
    assert (done.status, done.erred) == (75, "")
    assert [line["event"] for line in log_of(out, "start", "resume", "stop", "checkpoint")] == ["start", "stop"]
    finished(start(program, "--resume", "-B", int(saved(out)[0][:8]) // 5 + 1))


@pytest.mark.slow
@pytest.mark.parametrize("program", [MPI, GPU])
def test_sigusr1_saves_and_the_run_finishes(start, tmp_path, program):
    out = tmp_path / "run"
    process = start(program, "-n", 2, "-B", 6, "--checkpoint-every", 1000, "--eval-every", 1)
    until(lambda: (out / "log.jsonl").exists() and len(log_of(out, "round")) >= 7, process)
    assert [name[:8] for name in saved(out)] == ["00000005"]
    process.send_signal(signal.SIGUSR1)
    until(lambda: saved(out)[0][:8] > "00000005", process)
    assert int(saved(out)[0][:8]) % 5 != 0
    done = finish(process)
    assert (done.status, done.erred) == (0, "")
    assert log_of(out)[-1]["event"] == "end"


def test_sigterm_stops_parle_gpu_within_a_round(start, tmp_path):
    out = tmp_path / "run"
    process = start(GPU, "-n", 2, "-L", 100_000)
    until(lambda: (out / "log.jsonl").exists() and log_of(out), process)
    process.terminate()
    done = finish(process)
    assert (done.status, done.erred) == (75, "")
    assert resumes(command_of(done.printed), GPU, out)
    (path,) = checkpoint.list_checkpoints(out / "checkpoints")
    counters = checkpoint.read_manifest(path)["counters"]
    assert counters["rounds"] == 0 < counters["batches"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "method", "replica"),
    [
        (2, "parle", 0),
        (3, "parle", 1),
        (2, "elastic-sgd", 1),
        (3, "elastic-sgd", 0),
    ],
)
def test_replica_with_nan_is_named_and_restarted(start, tmp_path, n, method, replica):
    length = dict(parle="5", **{"elastic-sgd": "1"})[method]
    epochs = dict(parle=1, **{"elastic-sgd": 8})[method]
    arguments = ("-n", n, "--method", method, "-L", length, "-B", epochs, "--on-nan", "restart")
    done = finished(start(MPI, *arguments, PARLE_FAULT=f"poison:{replica}:3"))
    (warning,) = [line for line in done.printed.splitlines() if "WARNING" in line]
    assert "NaN" in warning and f"replica {replica}" in warning and "round 3" in warning
    log = log_of(tmp_path / "run")
    lost = [line for line in log if line["event"] == "lost"]
    assert lost == [{"event": "lost", "round": 3, "replicas": [replica]}]
    assert "null" not in json.dumps([line for line in log if line["event"] in ("round", "eval", "end")])
    last = log_of(tmp_path / "run", "eval")[-1]
    assert last["master_error"] < 60
    assert all(error < 80 for error in last["replica_errors"])
    assert all(distance < 1 for distance in last["distances"])


@pytest.mark.slow
@pytest.mark.parametrize(("program", "n", "words"), [(MPI, 3, "replica"), (GPU, 3, "replica"), (MPI, 1, "no replica")])
def test_stop_on_nan_is_one_line_and_exit_code_1(start, tmp_path, program, n, words):
    done = finish(start(program, "-n", n, "-B", 1, "--on-nan", "stop", PARLE_FAULT="poison:0:3"))
    assert done.status == 1
    (line,) = done.erred.splitlines()
    assert line.startswith(f"{program}: error: ")
    assert words in line and "round 3" in line
    assert resumes(command_of(line), program, tmp_path / "run")
    assert saved(tmp_path / "run") == ["00000002-0000", "00000001-0000"]
    shared = tmp_path / "run" / "checkpoints" / "00000002-0000" / "shared.pt"
    master = torch.load(shared, weights_only=True)["master"]
    assert master.isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_starter_leaves_no_rank_and_resumes(start, whole, tmp_path):
    out = tmp_path / "run"
    process = start(MPI, "-n", 3, "-B", 3)
    trains(out, process)
    ranks = [process_of(rank, out) for rank in range(3)]
    process.kill()
    deadline = time.time() + 60
    while any(os.path.exists(f"/proc/{rank}") for rank in ranks):
        assert time.time() < deadline
        time.sleep(0.05)
    process.communicate()
    finished(start(MPI, "--resume"))
    assert result(out) == whole(3)


@pytest.mark.slow
def test_resume_from_mpi_to_gpu_and_back(start, tmp_path):
    out = tmp_path / "run"
    finished(start(MPI, "-n", 3, "-B", 0.6))
    finished(start(GPU, "-B", 1, "--resume"))
    finished(start(MPI, "-B", 3, "--resume"))
    finished(start(MPI, "-n", 3, "-B", 3, out="whole"))
    (log, master), (expected_log, expected) = result(out), result(tmp_path / "whole")
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(master[name]), torch.tensor(value), rtol=1e-3, atol=1e-5)
    assert log[-1]["images"] == expected_log[-1]["images"]
    resumes = log_of(out, "resume")
    assert [line["replicas"] for line in resumes] == [3, 3]
    assert [line["changes"]["program"] for line in resumes] == [[MPI, GPU], [GPU, MPI]]
    assert ["ranks" in line for line in resumes] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_resume_with_other_numbers_of_replicas(start, tmp_path, n):
    out = tmp_path / "run"
    process = start(MPI, "-n", 3, "-B", 3)
    trains(out, process)
    process.terminate()
    assert finish(process).status == 75
    done = finished(start(MPI, "-n", n, "-B", 3, "--resume"))
    assert log_of(out, "resume")[0]["changes"]["replicas"] == [3, n]
    assert "replicas" in done.printed
    assert len(log_of(out, "eval")[-1]["replica_errors"]) == n


@pytest.mark.slow
def test_resume_keeps_replicas_of_several_ranks(start, tmp_path):
    out = tmp_path / "run"
    process = start(MPI, "-n", 2, "-B", 4, ranks=4)
    trains(out, process)
    process.terminate()
    done = finish(process)
    assert done.status == 75
    finished(start.again(f"{command_of(done.printed)} -B 1"))
    (resumed,) = log_of(out, "resume")
    assert (resumed["replicas"], resumed["ranks"], resumed["changes"].get("replicas")) == (2, 4, None)


# The benchmark


def test_benchmark_table_counts_identical_resumes(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for seed, seconds, saved, same in ((1, 2.0, 7, True), (2, 0.5, 6, False)):
        row = dict(fault="a rank raises", seed=seed, round=7, saved=saved, status=1, seconds=seconds, same=same)
        record.keep("survival", row)
    record.keep("survival", dict(fault="SIGUSR1", seed=1, round=7, saved=15, status=0, seconds=3.0, same=True))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in survival.table().splitlines()[2:]]
    assert [row[:4] for row in rows] == [["a rank raises", "2", "1", "0.5 to 2.0"], ["SIGUSR1", "1", "0", rows[1][3]]]
    assert [re.findall(r"\d+", row[-1]) for row in rows] == [["1", "2"], ["1", "1"]]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a rank raises", "SIGTERM to `parle_gpu.py`"])
def test_benchmark_injects_a_fault_and_resumes(fault, monkeypatch, tmp_path, proc):
    for name in [name for name in os.environ if name.startswith("PMI")]:
        monkeypatch.delenv(name)
    row = survival.trial(survival.FAULTS[fault], 2, proc, tmp_path / "run")
    assert (row["status"], row["resumed"], row["round"]) == (75 if "SIGTERM" in fault else 1, 0, 3)
    assert 3 <= row["saved"] < survival.ROUNDS
    assert all(tensor.isfinite().all() for tensor in survival.master(tmp_path / "run"))
