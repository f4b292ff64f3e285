"""How a rank ends, and what it reports: see test_supervision.py for the process that starts the ranks."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from parle import launcher, rank_exit
from tests.conftest import MPIEXEC, ROOT, is_running, outside, start_in_shell, wait_until

PMI = dict(PMI_RANK="0", PMI_SIZE="3")


@pytest.mark.parametrize("folder", ["missing", "without a reader"])
def test_a_rank_without_its_supervisor_runs_on(folder, tmp_path, monkeypatch, no_launcher):
    for name, value in (*PMI.items(), (launcher.STATUS_DIR, str(tmp_path / folder))):
        monkeypatch.setenv(name, value)
    if folder != "missing":
        (tmp_path / folder).mkdir()
        os.mkfifo(tmp_path / folder / "0")
    called = []
    rank_exit.run_or_abort(lambda: called.append(1))
    assert called == [1]


def test_full_disk_for_the_resume_command_is_no_error(tmp_path, monkeypatch, no_launcher):
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.setenv(launcher.STATUS_DIR, str(tmp_path / "gone"))
    rank_exit.write_resume_command("this", "that")
    assert not (tmp_path / "gone").exists()


def read_notices(pipe):
    return [(notice, int(number)) for notice, number in map(str.split, os.read(pipe, 100).decode().splitlines())]


def test_only_spawned_ranks_report_their_exit(tmp_path, monkeypatch, no_launcher):
    monkeypatch.setenv(launcher.STATUS_DIR, str(tmp_path))
    rank_exit.write_resume_command("this", "that")
    assert not rank_exit.open_status_pipe()(rank_exit.EXITED, 0)
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.delenv(launcher.STATUS_DIR)
    rank_exit.write_resume_command("this", "that")
    assert not rank_exit.open_status_pipe()(rank_exit.EXITED, 0)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(launcher.STATUS_DIR, str(tmp_path))
    rank_exit.write_resume_command("this", "that")
    os.mkfifo(tmp_path / "1")
    pipe = os.open(tmp_path / "1", os.O_RDONLY | os.O_NONBLOCK)
    assert rank_exit.open_status_pipe()(rank_exit.EXITED, 3)
    assert read_notices(pipe) == [(rank_exit.STARTED, os.getpid()), (rank_exit.EXITED, 3)]
    os.close(pipe)
    assert (tmp_path / "resume").read_text() == "this"


def test_report_to_a_dead_process_is_no_error(tmp_path, monkeypatch, no_launcher):
    for name, value in (("PMI_RANK", "1"), ("PMI_SIZE", "3"), (launcher.STATUS_DIR, str(tmp_path))):
        monkeypatch.setenv(name, value)
    os.mkfifo(tmp_path / "1")
    reader = os.open(tmp_path / "1", os.O_RDONLY | os.O_NONBLOCK)
    report_exit = rank_exit.open_status_pipe()
    os.close(reader)
    assert not report_exit(rank_exit.FAILED, 1)


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

rank_exit.run_or_abort(main)
"""


@pytest.mark.parametrize(
    ("delay", "wait", "error"),
    [
        (0.3, "comm.Barrier()", "ValueError('wrong')"),
        (0.0, "time.sleep(50)", "ValueError('wrong\\n  in the second line')"),
        (0.3, "distributed.MPIGroup(comm).all_gather(1)", "RuntimeError('wrong')"),
    ],
    ids=["in MPI", "asleep", "in all_gather"],
)
def test_exception_on_one_rank_aborts_all(delay, wait, error, python, script):
    done = python(script(RAISE.format(delay=delay, wait=wait, error=error)), ranks=3, PYTHONUNBUFFERED="")
    ended = time.time()
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"rank 1: {error.partition('(')[0]}: wrong")
    assert ended - float(done.stdout.split()[0]) < 10, "a second, and more on a busy machine"


def test_keyboard_interrupt_aborts_all_without_a_traceback(python, script):
    done = python(script(RAISE.format(delay=0.3, wait="comm.Barrier()", error="KeyboardInterrupt")), ranks=3)
    assert (done.returncode, done.stderr) == (130, "")


def test_exception_before_mpi_import_propagates(monkeypatch):
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)

    def main():
        raise ValueError("wrong")

    with pytest.raises(ValueError, match=r"^wrong$"):
        rank_exit.run_or_abort(main)


@pytest.mark.parametrize(("initialized", "finalized"), [(False, False), (True, True)])
def test_exception_outside_mpi_propagates(initialized, finalized, monkeypatch):
    mpi = SimpleNamespace(Is_initialized=lambda: initialized, Is_finalized=lambda: finalized)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)

    def main():
        raise KeyError("wrong")

    with pytest.raises(KeyError, match="wrong"):
        rank_exit.run_or_abort(main)


def test_run_or_abort_returns_after_main():
    called = []
    rank_exit.run_or_abort(lambda: called.append(1))
    assert called == [1]


def test_exception_without_launcher_names_rank_0(python):
    program = "from mpi4py import MPI; from parle import rank_exit; rank_exit.run_or_abort(lambda: open('/none'))"
    done = python("-c", program)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == "rank 0: FileNotFoundError: [Errno 2] No such file or directory: '/none'"


def test_exception_aborts_all_ranks_even_if_stdout_is_full(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from mpi4py import MPI; from parle import rank_exit\n"
        "print('out')\nrank_exit.run_or_abort(lambda: open('/none'))"
    )
    status, _, err = start_in_shell(path, ">/dev/full", PYTHONUNBUFFERED="")
    assert status != 0
    assert err.splitlines()[-1].startswith(b"rank 0: FileNotFoundError")


EXIT = """
from mpi4py import MPI
comm = MPI.COMM_WORLD

def main():
    if comm.rank in {ranks}:
        sys.exit(2)
    distributed.MPIGroup(comm).all_gather(1)

rank_exit.run_or_abort(main)
"""


def test_exit_status_of_all_ranks_is_kept(python, script):
    done = python(script(EXIT.format(ranks=(0, 1, 2))), ranks=3)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_exit_of_one_rank_aborts_all(python, script):
    done = python(script(EXIT.format(ranks=(1,))), ranks=3)
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("text", "notes", "line"),
    [
        ("wrong", [], "wrong"),
        ("", [], ""),
        ("wrong\n  in the second line\n", [], "wrong in the second line"),
        ("wrong", ["resume with:\n python this.py", "or not"], "wrong; resume with: python this.py; or not"),
    ],
)
def test_error_is_described_in_one_line_with_notes(text, notes, line):
    error = ValueError(text)
    for note in notes:
        error.add_note(note)
    assert rank_exit.describe_error(error) == line


MPI_STATES = {
    "never loaded": None,
    "not started": SimpleNamespace(Is_finalized=lambda: False, Is_initialized=lambda: False),
    "finalized": SimpleNamespace(Is_finalized=lambda: True, Is_initialized=lambda: True),
}


@pytest.mark.parametrize(
    ("mpi", "error", "notice", "status"),
    [
        ("never loaded", None, rank_exit.FINISHED, 0),
        ("finalized", None, rank_exit.FINISHED, 0),
        ("finalized", SystemExit(75), rank_exit.FINISHED, 75),
        ("finalized", SystemExit("wrong"), rank_exit.FINISHED, 1),
        ("not started", SystemExit(0), rank_exit.EXITED, 0),
        ("not started", SystemExit(), rank_exit.EXITED, 0),
        ("never loaded", SystemExit(2), rank_exit.EXITED, 2),
        ("never loaded", ValueError("wrong"), rank_exit.FAILED, 1),
        ("finalized", ValueError("wrong"), rank_exit.FAILED, 1),
        ("finalized", KeyboardInterrupt(), rank_exit.FINISHED, 130),
        ("not started", KeyboardInterrupt(), rank_exit.EXITED, 130),
    ],
)
def test_exit_notice(mpi, error, notice, status, tmp_path, monkeypatch, no_launcher):
    if MPI_STATES[mpi] is None:
        monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "mpi4py.MPI", MPI_STATES[mpi])
    for name, value in (("PMI_RANK", "1"), ("PMI_SIZE", "3"), (launcher.STATUS_DIR, str(tmp_path))):
        monkeypatch.setenv(name, value)
    os.mkfifo(tmp_path / "1")
    pipe = os.open(tmp_path / "1", os.O_RDONLY | os.O_NONBLOCK)

    def main():
        if error is not None:
            raise error

    raised = SystemExit if isinstance(error, KeyboardInterrupt) else type(error)
    with contextlib.nullcontext() if error is None else pytest.raises(raised) as raised:
        rank_exit.run_or_abort(main)
    assert read_notices(pipe) == [(rank_exit.STARTED, os.getpid()), (notice, status)]
    assert os.read(pipe, 1) == b""
    if status in (2, 75, 130):  # Open MPI's mpirun would end the other ranks
        assert raised.value.code == 0
    os.close(pipe)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_end_with_the_launcher_that_started_them(tmp_path):
    """Not only with one that parle_mpi.py has started."""
    path = tmp_path / "script.py"
    path.write_text(
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); from parle import rank_exit\ndef main():\n"
        "    open(f'rank-{os.environ[\"PMI_RANK\"]}', 'w').write(f'{os.getpid()} {os.getppid()}')\n    time.sleep(60)\n"
        "rank_exit.run_or_abort(main)"
    )
    command = [MPIEXEC, "-n", "3", sys.executable, path]
    with subprocess.Popen(command, cwd=tmp_path, env=outside({}), stderr=subprocess.DEVNULL) as mpiexec:
        try:
            wait_until(lambda: len([path for path in tmp_path.glob("rank-*") if path.read_text()]) == 3)
            pids, parents = zip(*(path.read_text().split() for path in tmp_path.glob("rank-*")), strict=True)
            os.kill(int(parents[0]), signal.SIGKILL)
            wait_until(lambda: not any(map(is_running, pids)), seconds=10)
        finally:
            mpiexec.kill()
