import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from parle import launcher
from tests.conftest import outside

ROOT = Path(launcher.__file__).parent


@pytest.fixture
def script(tmp_path):
    """A program that starts itself as three ranks; what they do is its body."""

    def write(body, before="", count=3):
        path = tmp_path / f"script{len(list(tmp_path.glob('*.py')))}.py"
        begin = f"if launcher.rank_from_environment() is None:\n    sys.exit(launcher.spawn_ranks({count}) or 0)\n"
        imports = f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport launch, ranks\n"
        path.write_text(f"{imports}{before}\n{begin}rank, size = launcher.rank_from_environment()\n{body}")
        return path

    return write


@pytest.fixture
def begin(tmp_path):
    """Start a script; gives the process. What still runs at the end is killed."""
    started = []

    def begin(path, **environment):
        command, changes = [sys.executable, str(path)], dict(TMPDIR=str(tmp_path)) | environment
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(command, env=outside(changes), cwd=tmp_path, **pipes))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def until(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


def test_import_loads_no_mpi_torch_or_numpy(python):
    done = python("-c", "import sys, launch; print({'mpi4py', 'torch', 'numpy'} & set(sys.modules))")
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ("PMI_RANK=1 PMI_SIZE=3", (1, 3)),
        ("PMI_RANK=0 PMI_SIZE=1", (0, 1)),
        ("OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4", (2, 4)),
        ("OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4 PMIX_RANK=2", (2, 4)),
        ("SLURM_PROCID=5 SLURM_STEP_NUM_TASKS=8", (5, 8)),
        ("SLURM_PROCID=5 SLURM_STEP_NUM_TASKS=8 PMIX_RANK=5", (5, 8)),
        ("PMIX_RANK=3", (3, None)),
        ("", None),
        ("PMI_RANK=1", None),
        ("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_JOB_ID=1", None),
        ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1", None),
        ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 PMI_RANK=1 PMI_SIZE=3", (1, 3)),
        # srun --pty bash, where Slurm's MpiDefault is pmix or pmi2
        ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 PMIX_RANK=0 PMIX_NAMESPACE=slurm.pmix.7.0", None),
        ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 PMI_RANK=0 PMI_SIZE=1", None),
        # what is no number is no launcher's
        ("PMI_RANK=abc PMI_SIZE=3", None),
        ("PMI_RANK=1 PMI_SIZE=abc", None),
        ("PMI_RANK= PMI_SIZE=3", None),
        ("PMI_RANK=1 PMI_SIZE=", None),
        ("PMI_RANK=-1 PMI_SIZE=3", None),
        ("PMI_RANK=1.5 PMI_SIZE=3", None),
        ("PMI_RANK=² PMI_SIZE=3", None),
        ("OMPI_COMM_WORLD_RANK=x OMPI_COMM_WORLD_SIZE=4", None),
        ("SLURM_PROCID=x SLURM_STEP_NUM_TASKS=8", None),
        ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=many", None),
        ("PMIX_RANK=abc", None),
        ("PMI_RANK=abc PMI_SIZE=3 PMIX_RANK=2", (2, None)),
    ],
)
def test_rank_and_size_from_environment(environment, launched):
    assert launcher.rank_from_environment(dict(item.split("=") for item in environment.split())) == launched


def test_rank_is_read_from_os_environ_by_default(monkeypatch):
    for name in {name for names in launcher.LAUNCHERS.values() for name in names if name}:
        monkeypatch.delenv(name, raising=False)
    assert launcher.rank_from_environment() is None
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "3")
    assert launcher.rank_from_environment() == (1, 3)


@pytest.mark.parametrize(
    ("executable", "on_path", "named"),
    [
        ("bin/python", ["bin/python"], "python"),
        ("bin/python", ["other/python", "bin/python"], "bin/python"),
        ("bin/python", ["bin/python", "other/python"], "python"),
        ("bin/python", ["other/python3"], "bin/python"),
        ("bin/python", [], "bin/python"),
        ("bin/python3", ["bin/python"], "bin/python3"),
        ("my bin/python", ["my bin/python"], "python"),
        ("my bin/python", [], "'my bin/python'"),
        ("my bin/it's", [], "'my bin/it'\"'\"'s'"),
    ],
)
def test_python_command_is_what_a_shell_finds(executable, on_path, named, tmp_path, monkeypatch):
    folders = [str((tmp_path / name).parent) for name in on_path]
    for name in {executable, *on_path}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        mpiexec(tmp_path / name, "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / executable))
    monkeypatch.setenv("PATH", ":".join(folders))
    assert launcher.python_command().replace(f"{tmp_path}/", "") == named
    if named != "python":
        assert shlex.split(launcher.python_command()) == [sys.executable]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A Python in `beside` and a PATH of `path`, both without an mpiexec; `ran` lists the commands of start()."""
    folders = SimpleNamespace(beside=tmp_path / "beside", path=tmp_path / "path", ran=[])

    class Silent:
        """A process that prints nothing and exits with 7."""

        def __init__(self, command, env, **_):
            assert Path(env[launcher.STATUS_DIR]).is_dir()
            folders.ran.append((command, Path(env[launcher.STATUS_DIR])))
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


def mpiexec(folder, name="mpiexec"):
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_one_rank_needs_no_launcher(place):
    mpiexec(place.beside)
    before = dict(os.environ)
    assert launcher.spawn_ranks(1) is None
    assert os.environ == before
    assert place.ran == []


@pytest.mark.parametrize("elsewhere", [False, True])
def test_mpiexec_beside_python_is_preferred(place, elsewhere):
    if elsewhere:
        mpiexec(place.path)
    beside = mpiexec(place.beside)
    assert launcher.spawn_ranks(3) == 7
    ((command, folder),) = place.ran
    assert command == [beside, "-n", "3", sys.executable, *sys.argv]
    assert not folder.exists()


def test_mpiexec_of_path_is_used_otherwise(place):
    on_path = mpiexec(place.path)
    launcher.spawn_ranks(12)
    ((command, _),) = place.ran
    assert command == [on_path, "-n", "12", sys.executable, *sys.argv]


def test_missing_mpiexec_is_an_error_with_advice(place):
    with pytest.raises(FileNotFoundError, match="pip install mpich"):
        launcher.spawn_ranks(3)


def test_ranks_without_a_number_start_no_ranks(place, monkeypatch):
    mpiexec(place.beside)
    monkeypatch.setenv(launcher.STATUS_DIR, "folder")
    with pytest.raises(OSError, match="mpiexec"):
        launcher.spawn_ranks(3)
    assert place.ran == []


@pytest.mark.parametrize("terminal", [False, True])
def test_ranks_receive_the_width_of_the_terminal(place, terminal, monkeypatch):
    mpiexec(place.beside)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "77")
    launcher.spawn_ranks(3)
    assert os.environ.get(launcher.TERMINAL_WIDTH) == ("77" if terminal else None)


def test_settings_of_open_mpi_are_not_overridden(place, monkeypatch):
    mpiexec(place.beside)
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "0")
    launcher.spawn_ranks(3)
    assert (os.environ["OMPI_ALLOW_RUN_AS_ROOT"], os.environ["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"]) == ("0", "1")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_ranks_run_the_command_and_their_output_is_whole(python, script, unbuffered):
    path = script("""
sys.stderr.write(f"{launcher.rank_from_environment()} {sys.argv[1:]}\\n")
if rank == 0:  # alone: mpiexec would put what others write between two parts of it
    sys.stdout.write(("0" * 99 + "\\n") * 3000)
""")
    done = python(path, "-n", "a b", PYTHONUNBUFFERED=unbuffered)
    assert done.stdout == ("0" * 99 + "\n") * 3000
    assert sorted(done.stderr.splitlines()) == [f"({rank}, 3) ['-n', 'a b']" for rank in range(3)]
    assert done.returncode == 0


HEAR = """
def hear(number, frame):
    with open(f"heard-{rank}", "a") as file:
        file.write(f"{number} ")
    if number != signal.SIGUSR1:
        sys.exit(75)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, hear)
open(f"ready-{rank}", "w").close()
time.sleep(20)
time.sleep(20)
"""


@pytest.mark.parametrize("last", [signal.SIGINT, signal.SIGTERM])
def test_signals_and_exit_code_75_are_passed_on(begin, script, tmp_path, last):
    process = begin(script(HEAR))
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    process.send_signal(signal.SIGUSR1)
    until(lambda: [path.read_text() for path in tmp_path.glob("heard-*")] == [f"{int(signal.SIGUSR1)} "] * 3)
    process.send_signal(last)
    process.communicate(timeout=60)
    assert process.returncode == 75
    heard = [path.read_text() for path in tmp_path.glob("heard-*")]
    assert heard == [f"{int(signal.SIGUSR1)} {int(last)} "] * 3


KILLED = """
from mpi4py import MPI

def main():
    launcher.write_resume_command("python this --resume that")
    MPI.COMM_WORLD.Barrier()
    if rank == {killed}:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.wait_with_timeout(MPI.COMM_WORLD.Ibarrier())

launcher.run_or_abort(main)
"""


@pytest.mark.parametrize("killed", [0, 2])
def test_last_line_names_killed_rank_and_resume_command(python, script, killed):
    done = python(script(KILLED.format(killed=killed)))
    assert done.returncode not in (0, 75)
    last = done.stderr.splitlines()[-1]
    assert f"rank {killed}" in last and "killed" in last and last.endswith("python this --resume that")


def test_without_a_resume_command_the_killed_rank_is_named(python, script):
    done = python(script(KILLED.format(killed=1).replace("launcher.write_resume_command", "len")))
    assert done.returncode not in (0, 75)
    last = done.stderr.splitlines()[-1]
    assert "rank 1" in last and "killed" in last and "--resume" not in last


def test_silent_exit_of_all_ranks_is_a_failure(python, script):
    done = python(script("launcher.open_status_pipe()\nos._exit(0)"))
    assert done.returncode == 1
    assert re.search("rank [012].* killed", done.stderr.splitlines()[-1])


def test_exception_is_the_last_line(python, script):
    body = "from mpi4py import MPI\ndef main():\n    if rank == 1:\n        raise ValueError('wrong')\n"
    done = python(script(body + "    distributed.wait_with_timeout(MPI.COMM_WORLD.Ibarrier())\nranks.run(main)"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "rank 1: ValueError: wrong"


EARLY = """
def main():
    launcher.write_resume_command("python this --resume that")
    if rank == 1:
        {end}
    from mpi4py import MPI
    MPI.COMM_WORLD.Barrier()

launcher.run_or_abort(main)
"""


def test_rank_that_exits_before_mpi_starts_is_named(begin, script):
    ends = "return", "sys.exit(0)", "os._exit(0)"
    processes = [begin(script(EARLY.format(end=end), before="launcher.GRACE_PERIOD = 1.0")) for end in ends]
    for process in processes:  # side by side: each of them waits
        _, erred = process.communicate(timeout=60)
        assert process.returncode not in (0, 75)
        last = erred.splitlines()[-1]
        assert "rank 1" in last and "killed" not in last
        assert last.endswith("python this --resume that")


@pytest.mark.slow
def test_ranks_may_exit_some_seconds_apart(begin, script):
    process = begin(script("launcher.run_or_abort(lambda: time.sleep(rank))"))
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def test_killed_mpiexec_is_named(begin, script, tmp_path):
    process = begin(
        script(HEAR.replace("def hear", "launcher.write_resume_command('python this --resume that')\ndef hear"))
    )
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    (mpiexec,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(mpiexec), signal.SIGKILL)
    _, erred = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    last = erred.splitlines()[-1]
    assert "mpiexec" in last and "killed" in last and last.endswith("python this --resume that")


def test_full_disk_for_the_resume_command_is_no_error(tmp_path, monkeypatch, no_launcher):
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.setenv(launcher.STATUS_DIR, str(tmp_path / "gone"))
    launcher.write_resume_command("this")
    assert not (tmp_path / "gone").exists()


def test_exit_code_2_of_all_ranks_adds_no_message(python, script):
    done = python(script("launcher.run_or_abort(lambda: sys.exit(2))"))
    assert (done.returncode, done.stderr) == (2, "")


def test_only_ranks_of_our_starter_report_to_it(tmp_path, monkeypatch, no_launcher):
    monkeypatch.setenv(launcher.STATUS_DIR, str(tmp_path))
    launcher.write_resume_command("this")
    launcher.open_status_pipe()(launcher.EXITED)
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.delenv(launcher.STATUS_DIR)
    launcher.write_resume_command("this")
    launcher.open_status_pipe()(launcher.EXITED)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(launcher.STATUS_DIR, str(tmp_path))
    launcher.write_resume_command("this")
    os.mkfifo(tmp_path / "1")
    line = os.open(tmp_path / "1", os.O_RDONLY | os.O_NONBLOCK)
    launcher.open_status_pipe()(launcher.EXITED)
    assert os.read(line, 100) == launcher.EXITED
    assert (tmp_path / "resume").read_text() == "this"


def lives(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("speaks", [False, True], ids=["silent", "printing"])
def test_no_rank_survives_a_killed_starter(begin, script, tmp_path, speaks):
    work = "    sys.stdout.write('works' * 100)\n    sys.stdout.flush()\n" if speaks else ""
    leave = "open(f'{os.environ[launcher.STATUS_DIR]}/rank-{rank}', 'w').write(str(os.getpid()))\n"
    body = f"{leave}while True:\n    time.sleep(0.05)\n{work}"
    process = begin(script(body))

    def left():
        return [int(path.read_text() or 0) for path in tmp_path.glob("parle-*/rank-*")]

    until(lambda: len([number for number in left() if number]) == 3)
    numbers = left()
    try:
        process.kill()
        process.stdout.close()
        process.stderr.close()
        until(lambda: not any(map(lives, numbers)), seconds=30)
    finally:
        for number in filter(lives, numbers):
            os.kill(number, signal.SIGKILL)
        process.wait()
