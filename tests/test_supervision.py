import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from parle import launcher, rank_exit, supervision
from tests.conftest import is_running, mpiexec, outside, start_in_shell, wait_until


@pytest.fixture
def start(tmp_path):
    """A function that starts a script and returns the process, which is killed if it still runs after the test."""
    started = []

    def start(path, **environment):
        command, changes = [sys.executable, str(path)], dict(TMPDIR=str(tmp_path)) | environment
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(command, env=outside(changes), cwd=tmp_path, **pipes))
        return started[-1]

    yield start
    for process in started:
        with process:
            process.kill()


@pytest.fixture
def own_signals():
    """Restore this process's handlers of signals after the test."""
    previous = {number: signal.getsignal(number) for number in (*supervision.STOP_SIGNALS, signal.SIGUSR1)}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def test_ranks_start_within_a_job_of_one_node(start, script):
    """MPICH's mpiexec would call srun, which need not exist in a container."""
    host = os.uname().nodename
    job = dict(SLURM_JOB_ID="7", SLURM_NODELIST=host, SLURM_JOB_NODELIST=host, SLURM_TASKS_PER_NODE="1")
    job |= dict(SLURMD_NODENAME=host)
    process = start(script("sys.stdout.write(f'{rank}\\n')"), SLURM_NNODES="1", SLURM_JOB_NUM_NODES="1", **job)
    out, err = process.communicate(timeout=60)
    assert (sorted(out.split()), err, process.returncode) == (["0", "1", "2"], "", 0)


def test_ranks_are_not_started_on_several_nodes(monkeypatch, no_launcher):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(OSError, match=r"2 nodes.*srun --mpi=pmi2 -n 3"):
        supervision.spawn_ranks(3)


def test_ranks_that_do_not_start_are_given_up(tmp_path, monkeypatch, capfd, no_launcher, own_signals):
    monkeypatch.setattr(launcher, "find_mpiexec", lambda: mpiexec(tmp_path, does="exec sleep 60"))
    monkeypatch.setattr(supervision, "START_TIMEOUT", 0.2)
    assert supervision.spawn_ranks(3) != 0
    assert re.search("no rank.*started", capfd.readouterr().err.splitlines()[-1])


@pytest.fixture
def folders(tmp_path, monkeypatch, no_launcher):
    """The directories of this Python (`beside`) and of the PATH (`path`), without an mpiexec.

    `spawned` lists the commands that `spawn_ranks` runs, each with its status directory.
    """
    folders = SimpleNamespace(beside=tmp_path / "beside", path=tmp_path / "path", spawned=[])

    class Silent:
        """A process that prints nothing and exits with 7."""

        def __init__(self, command, env, **options):
            assert "preexec_fn" not in options  # unsafe if there are threads
            assert Path(env[launcher.STATUS_DIR]).is_dir()
            folders.spawned.append((command[command.index("-n") - 1 :], Path(env[launcher.STATUS_DIR])))
            self.stdout, self.stderr = self.closed_pipe(), self.closed_pipe()

        def closed_pipe(self):
            reading, writing = os.pipe()
            os.close(writing)
            return open(reading, "rb")

        def wait(self):
            self.stdout.close()
            self.stderr.close()
            return 7

    folders.beside.mkdir()
    folders.path.mkdir()
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith(("PRTE", "OMPI", "PARLE"))]:
            del os.environ[name]
        monkeypatch.setattr(subprocess, "Popen", Silent)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setattr(sys, "executable", str(folders.beside / "python3"))
        monkeypatch.setattr(sys, "argv", ["parle_mpi.py", "-n", "3", "--out", "a b"])
        os.environ["PATH"] = str(folders.path)
        yield folders


def test_one_rank_needs_no_launcher(folders):
    mpiexec(folders.beside)
    before = dict(os.environ)
    assert supervision.spawn_ranks(1) is None
    assert os.environ == before
    assert folders.spawned == []


@pytest.mark.parametrize("elsewhere", [False, True])
def test_mpiexec_beside_python_is_preferred(folders, elsewhere):
    if elsewhere:
        mpiexec(folders.path)
    beside = mpiexec(folders.beside)
    assert supervision.spawn_ranks(3) == 7
    ((command, status_dir),) = folders.spawned
    assert command == [beside, "-n", "3", sys.executable, *sys.argv]
    assert not status_dir.exists()


def test_mpiexec_on_the_path_is_used_otherwise(folders):
    on_path = mpiexec(folders.path)
    supervision.spawn_ranks(12)
    ((command, _),) = folders.spawned
    assert command == [on_path, "-n", "12", sys.executable, *sys.argv]


def test_mpiexec_that_cannot_be_executed_is_passed_over(folders):
    Path(mpiexec(folders.beside)).chmod(0o644)
    assert launcher.find_mpiexec() is None
    on_path = mpiexec(folders.path)
    assert launcher.find_mpiexec() == on_path


def test_missing_mpiexec_is_an_error_with_advice(folders):
    with pytest.raises(FileNotFoundError, match="pip install mpich"):
        supervision.spawn_ranks(3)


def test_ranks_without_a_rank_number_spawn_no_ranks(folders, monkeypatch):
    mpiexec(folders.beside)
    monkeypatch.setenv(launcher.STATUS_DIR, "directory")
    with pytest.raises(OSError, match="mpiexec"):
        supervision.spawn_ranks(3)
    assert folders.spawned == []


@pytest.mark.parametrize("terminal", [False, True])
def test_ranks_get_the_terminal_width(folders, terminal, monkeypatch):
    mpiexec(folders.beside)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "77")
    supervision.spawn_ranks(3)
    assert os.environ.get(supervision.TERMINAL_WIDTH) == ("77" if terminal else None)


def test_settings_of_open_mpi_are_not_overridden(folders, monkeypatch):
    mpiexec(folders.beside)
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "0")
    supervision.spawn_ranks(3)
    assert (os.environ["OMPI_ALLOW_RUN_AS_ROOT"], os.environ["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"]) == ("0", "1")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_ranks_run_the_command_and_print_in_full(python, script, unbuffered):
    path = script("""
sys.stderr.write(f"{launcher.rank_from_environment()} {sys.argv[1:]}\\n")
if rank == 0:  # only one: mpiexec interleaves the output of several
    sys.stdout.write(("0" * 99 + "\\n") * 3000)
""")
    done = python(path, "-n", "a b", PYTHONUNBUFFERED=unbuffered)
    assert done.stdout == ("0" * 99 + "\n") * 3000
    assert sorted(done.stderr.splitlines()) == [f"({rank}, 3) ['-n', 'a b']" for rank in range(3)]
    assert done.returncode == 0


HANDLE = """
def handle(number, frame):
    with open(f"signals-{rank}", "a") as file:
        file.write(f"{number} ")
    if number != signal.SIGUSR1:
        sys.exit(75)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, handle)
open(f"ready-{rank}", "w").close()
time.sleep(20)
time.sleep(20)
"""


@pytest.mark.parametrize(
    ("last", "forwarded"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGHUP, signal.SIGTERM)],
)
def test_mpiexec_forwards_signals_while_ranks_start(start, script, tmp_path, last, forwarded):
    process = start(script(HANDLE))
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: [path.read_text() for path in tmp_path.glob("signals-*")] == [f"{int(signal.SIGUSR1)} "] * 3)
    process.send_signal(last)
    process.communicate(timeout=60)
    assert process.returncode == 75
    received = [path.read_text() for path in tmp_path.glob("signals-*")]
    assert received == [f"{int(signal.SIGUSR1)} {int(forwarded)} "] * 3


STARTING = """
open(f"ready-{rank}", "w")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("arguments", "resumes"), [("", False), ("--resume run", True)])
def test_a_signal_before_training_is_no_failed_rank(start, script, tmp_path, number, arguments, resumes):
    before = f"sys.argv += {arguments.split()}"
    process = start(script(STARTING, before=before))
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (75 if resumes else 128 + number)
    assert "rank" not in err


@pytest.mark.parametrize(
    ("arguments", "run"),
    [
        ("--resume a/run -B 3", "a/run"),
        ("-B 3 --resume=a/run", "a/run"),
        ("--resume --out b", None),
        ("--resume", None),
    ],
)
def test_ranks_are_restarted_from_the_run_that_is_resumed(monkeypatch, arguments, run):
    monkeypatch.setattr(sys, "argv", ["parle_mpi.py", *arguments.split()])
    assert supervision._given_run() == run


MPIRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
count, command = int(sys.argv[2]), sys.argv[3:]
def environment(rank):
    return os.environ | dict(OMPI_COMM_WORLD_RANK=str(rank), OMPI_COMM_WORLD_SIZE=str(count))
ranks = [subprocess.Popen(command, env=environment(rank)) for rank in range(count)]
signal.signal(signal.SIGTERM, lambda *_: ([rank.kill() for rank in ranks], sys.exit(1)))
while ranks:
    process, status = os.wait()
    ranks = [rank for rank in ranks if rank.pid != process]
    if status:
        [rank.kill() for rank in ranks]
        sys.exit(1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ranks_can_save_although_mpirun_would_kill_them(start, script, tmp_path, number):
    """Open MPI's mpirun kills its ranks a second after SIGTERM, and if one of them exits with another status than 0."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(MPIRUN)
    mpirun.chmod(0o755)
    saving = HANDLE.replace(
        "sys.exit", "time.sleep(rank); print('saved', flush=True); sys.modules['mpi4py.MPI'] = FINALIZED; sys.exit"
    )
    body = "import types\nFINALIZED = types.SimpleNamespace(Is_finalized=lambda: True, Is_initialized=lambda: True)\n"
    body += f"def main():\n{textwrap.indent(saving, '    ')}\nrank_exit.run_or_abort(main)"
    process = start(script(body, before=f"launcher.find_mpiexec = lambda: {str(mpirun)!r}"))
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    time.sleep(0.5)  # until the notices are read
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.split(), err) == (75, ["saved"] * 3, "")


LATE_SIGNAL = """
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.{name}):
        kill(pid, number)

if launcher.rank_from_environment() is None:
    late = Late()  # deleted after Python has given signals their default effect again
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_after_the_ranks_have_ended_changes_nothing(python, script, name):
    end = "rank_exit.run_or_abort(lambda: sys.exit(75))"
    assert python(script(end, before=LATE_SIGNAL.format(name=name), count=2)).returncode == 75


def test_second_sigint_ends_ranks_that_hang(start, script, tmp_path):
    body = "def main():\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    open(f'ready-{rank}', 'w').close()\n"
    process = start(script(f"{body}    time.sleep(60)\nrank_exit.run_or_abort(main)", before=SHORT_GRACE_PERIOD))
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode not in (0, 75)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_rank_survives_a_killed_proxy(start, script, tmp_path):
    announce = "open(f'{os.environ[launcher.STATUS_DIR]}/rank-{rank}', 'w').write(f'{os.getpid()} {os.getppid()}')\n"
    process = start(script(f"rank_exit.end_with_launcher()\n{announce}time.sleep(60)"))
    wait_until(lambda: len([path for path in tmp_path.glob("parle-*/rank-*") if path.read_text()]) == 3)
    pids, parents = zip(*(path.read_text().split() for path in tmp_path.glob("parle-*/rank-*")), strict=True)
    os.kill(int(parents[0]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode not in (0, 75)
    wait_until(lambda: not any(map(is_running, pids)), seconds=10)


def test_ignored_signals_stay_ignored(start, script, tmp_path):
    ignore = "for number in (signal.SIGINT, signal.SIGHUP):\n    signal.signal(number, signal.SIG_IGN)"
    process = start(script(HANDLE, before=ignore))
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert [path.read_text() for path in tmp_path.glob("signals-*")] == [f"{int(signal.SIGTERM)} "] * 3


@pytest.mark.parametrize("redirected", ["2>&-", ">&- 2>&-", ">/dev/full 2>/dev/full"])
@pytest.mark.parametrize("end", ["sys.exit(75)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_exit_status_is_the_same_with_unusable_streams(script, redirected, end):
    path = script(f"print('out'), print('err', file=sys.stderr)\nrank_exit.open_status_pipe()\n{end}", count=2)
    status, out, err = start_in_shell(path, "")
    assert status and b"out" in out and b"err" in err
    assert start_in_shell(path, redirected)[::2] == (status, b"")


KILLED = """
from mpi4py import MPI

def main():
    rank_exit.write_resume_command("python this --resume that", "that")
    MPI.COMM_WORLD.Barrier()
    if rank == {killed}:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.MPIGroup(MPI.COMM_WORLD).wait(MPI.COMM_WORLD.Ibarrier())

rank_exit.run_or_abort(main)
"""


@pytest.mark.parametrize("killed", [0, 2])
def test_last_line_names_killed_rank_and_resume_command(python, script, killed):
    done = python(script(KILLED.format(killed=killed)))
    assert done.returncode not in (0, 75)
    last = done.stderr.splitlines()[-1]
    assert f"rank {killed}" in last and "killed" in last and last.endswith("python this --resume that")


def test_resume_command_has_the_bytes_of_the_directory(script):
    path = script(KILLED.format(killed=1).replace('"python this --resume that"', "os.fsdecode(b'--resume run\\xff')"))
    status, _, err = start_in_shell(path, "", PYTHONIOENCODING="ascii")
    assert status not in (0, 75) and err.splitlines()[-1].endswith(b"--resume run\xff")


def test_without_a_resume_command_the_killed_rank_is_named(python, script):
    done = python(script(KILLED.format(killed=1).replace("rank_exit.write_resume_command", "max")))
    assert done.returncode not in (0, 75)
    last = done.stderr.splitlines()[-1]
    assert "rank 1" in last and "killed" in last and "--resume" not in last


FAILS = """
from pathlib import Path
from mpi4py import MPI
attempts, succeeded = Path(__file__).with_suffix(".attempts"), Path(__file__).with_suffix(".succeeded")

def main():
    if {checkpoint}:
        rank_exit.write_resume_command("python this --resume that", "that")
    if rank == size - 1:
        text = attempts.read_text() if attempts.exists() else ""
        attempts.write_text(f"{{text}}{{sys.argv[1:]}};")
        if text.count(";") < {failures}:
            {end}
        succeeded.touch()
    while not succeeded.exists():
        time.sleep(0.01)

rank_exit.run_or_abort(main)
"""


KILL, RAISE_ERROR = "os.kill(os.getpid(), signal.SIGKILL)", "raise ValueError('wrong')"


@pytest.mark.parametrize(("end", "max_restarts"), [(KILL, 1), (KILL, 2), (RAISE_ERROR, 2)])
def test_failed_ranks_are_restarted_from_the_checkpoint(python, script, end, max_restarts):
    path = script(FAILS.format(checkpoint=True, failures=2, end=end), count=f"2, {max_restarts}")
    done = python(path)
    restarts = re.findall(r"restart (\d) of (\d).*that", done.stderr)
    assert restarts == [(str(number), str(max_restarts)) for number in range(1, max_restarts + 1)]
    assert (done.returncode == 0) == (max_restarts == 2)
    assert path.with_suffix(".attempts").read_text() == "[];" + "['--resume', 'that'];" * max_restarts


def test_ranks_that_fail_before_they_train_are_restarted_from_the_same_checkpoint(python, script):
    body = FAILS.format(checkpoint="not attempts.exists()", failures=2, end=KILL)
    done = python(script(body, count="1, 2"))
    assert done.returncode == 0 and "restart 2 of 2" in done.stderr


def test_a_signal_between_two_attempts_stops_the_run(tmp_path, monkeypatch, capfd, no_launcher, own_signals):
    attempts = []

    def attempt(command, folder, count, forwarder):
        attempts.append(command)
        (folder / rank_exit.RUN).write_text("that")
        os.kill(os.getpid(), signal.SIGTERM)
        return SimpleNamespace(supervise=lambda: (1, True))

    monkeypatch.setattr(launcher, "find_mpiexec", lambda: mpiexec(tmp_path))
    monkeypatch.setattr(supervision, "Attempt", attempt)
    assert supervision.spawn_ranks(2, max_restarts=3) == 1
    assert len(attempts) == 1 and capfd.readouterr().err == ""


def test_without_a_checkpoint_nothing_is_restarted(python, script):
    path = script(FAILS.format(checkpoint=False, failures=1, end=KILL), count="2, 3")
    done = python(path)
    assert done.returncode != 0 and path.with_suffix(".attempts").read_text() == "[];"
    assert "no checkpoint" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("status", [1, 2, 75])
def test_runs_that_end_in_order_are_not_restarted(python, script, status):
    body = FAILS.format(checkpoint=True, failures=1, end=f"succeeded.touch(); sys.exit({status})")
    path = script(
        body.replace("        time.sleep(0.01)", f"        time.sleep(0.01)\n    sys.exit({status})"), count="2, 3"
    )
    done = python(path)
    assert done.returncode == status and "restart" not in done.stderr


def test_one_rank_is_supervised_if_it_may_be_restarted(python, script):
    done = python(script(FAILS.format(checkpoint=True, failures=1, end=KILL), count="1, 1"))
    assert done.returncode == 0 and "restart 1 of 1" in done.stderr


def test_silent_exit_of_all_ranks_is_a_failure(python, script):
    done = python(script("rank_exit.open_status_pipe()\nos._exit(0)"))
    assert done.returncode == 1
    assert re.search("rank [012].* killed", done.stderr.splitlines()[-1])


def test_exception_is_the_last_line(python, script):
    body = "from mpi4py import MPI\ndef main():\n    if rank == 1:\n        raise ValueError('wrong')\n"
    body += "    distributed.MPIGroup(MPI.COMM_WORLD).wait(MPI.COMM_WORLD.Ibarrier())\nrank_exit.run_or_abort(main)"
    done = python(script(body))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "rank 1: ValueError: wrong"


EARLY = """
def main():
    rank_exit.write_resume_command("python this --resume that", "that")
    if rank == 1:
        {end}
    {others}
    from mpi4py import MPI
    MPI.COMM_WORLD.Barrier()

rank_exit.run_or_abort(main)
"""


SHORT_GRACE_PERIOD = "supervision.GRACE_PERIOD = 1.0"


def test_rank_that_exits_before_mpi_starts_ends_all(start, script):
    cases = [
        ("sys.exit(0)", ""),
        ("os._exit(0)", ""),
        ("time.sleep(0.5); sys.exit(0)", "if rank == 0: return"),  # rank 0 has finished, which is no failure
    ]
    bodies = [EARLY.format(end=end, others=others) for end, others in cases]
    processes = [start(script(body, before=SHORT_GRACE_PERIOD)) for body in bodies]  # side by side: each waits
    for process in processes:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode not in (0, 75)
        last = stderr.splitlines()[-1]
        assert "rank 1" in last and "killed" not in last
        assert last.endswith("python this --resume that")


SLOW_EXIT = """
import atexit
atexit.register(time.sleep, {after} * rank)
rank_exit.run_or_abort(lambda: time.sleep({before} * rank))
"""


def test_finished_ranks_may_exit_slowly(start, script):
    bodies = [SLOW_EXIT.format(before=before, after=after) for before, after in [(0, 3), (3, 0)]]
    processes = [start(script(body, before=SHORT_GRACE_PERIOD, count=2)) for body in bodies]
    for process in processes:
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mpiexec_inherits_no_signal_that_python_ignores():
    command = [shutil.which("grep"), "SigIgn", "/proc/self/status"]
    expected, found = (
        subprocess.run(line, capture_output=True, check=True).stdout
        for line in (command, [*supervision._end_with_parent(), *command])
    )
    assert found == expected != b""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux sends the signal")
def test_mpiexec_does_not_start_if_its_parent_is_dead():
    *program, parent = supervision._end_with_parent()
    done = subprocess.run([*program, str(int(parent) + 1), sys.executable, "--version"], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_killed_mpiexec_is_named(start, script, tmp_path):
    process = start(
        script(
            HANDLE.replace(
                "def handle", "rank_exit.write_resume_command('python this --resume that', 'that')\ndef handle"
            )
        )
    )
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    (mpiexec,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(mpiexec), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    last = stderr.splitlines()[-1]
    assert "mpiexec" in last and "killed" in last and last.endswith("python this --resume that")


def test_exit_status_2_of_all_ranks_adds_no_message(python, script):
    done = python(script("rank_exit.run_or_abort(lambda: sys.exit(2))"))
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("prints", [False, True], ids=["silent", "printing"])
def test_no_rank_survives_a_killed_supervisor(start, script, tmp_path, prints):
    work = "    sys.stdout.write('works' * 100)\n    sys.stdout.flush()\n" if prints else ""
    announce = "open(f'{os.environ[launcher.STATUS_DIR]}/rank-{rank}', 'w').write(str(os.getpid()))\n"
    body = f"{announce}while True:\n    time.sleep(0.05)\n{work}"
    process = start(script(body))

    def process_ids():
        return [int(path.read_text() or 0) for path in tmp_path.glob("parle-*/rank-*")]

    wait_until(lambda: len([number for number in process_ids() if number]) == 3)
    numbers = process_ids()
    try:
        process.kill()
        process.stdout.close()
        process.stderr.close()
        wait_until(lambda: not any(map(is_running, numbers)), seconds=30)
    finally:
        for number in filter(is_running, numbers):
            os.kill(number, signal.SIGKILL)
        process.wait()
