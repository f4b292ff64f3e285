import os
import shlex
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from parle import launcher

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
MPIEXEC = Path(sys.executable).with_name("mpiexec")
SETTINGS = shlex.split(  # of a run of 5 rounds per epoch
    "-d digits --device cpu -L 5 -b 24 --frac 0.075 --lr-drops 0.6 --checkpoint-every 1"
)
OFFLINE = dict(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")  # no proxy listens on this port

os.environ["PARLE_TESTING"] = "1"  # otherwise PARLE_FAULT has no effect
torch.set_num_threads(1)  # the tests' networks are too small for more


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def comm():
    """A real communicator of one rank."""
    from mpi4py import MPI

    return MPI.COMM_SELF


def mpiexec(folder, name="mpiexec", does=""):
    """Write a program that pretends to be an mpiexec, and return its path."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def outside(changes):
    """Return the environment of a shell outside any launcher and any test, with `changes`."""
    inside, testing = ("PMI", "MPI", "OMPI", "SLURM", "PARLE", "PYTEST"), dict(PARLE_TESTING="1")
    return {name: value for name, value in os.environ.items() if not name.startswith(inside)} | testing | changes


@pytest.fixture
def no_launcher(monkeypatch):
    """Remove the environment variables by which this process would detect a launcher."""
    for name in {name for names in launcher.LAUNCHERS.values() for name in names if name} | {launcher.STATUS_DIR}:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def python():
    """A function that runs this Python outside any launcher, or as MPI ranks, and returns the completed process."""

    def run(*arguments, ranks=None, cwd=ROOT, timeout=60, **environment):
        command = [sys.executable, *map(str, arguments)]
        if ranks is not None:
            command = [str(MPIEXEC), "-n", str(ranks), *command]
        return subprocess.run(
            command, cwd=cwd, env=outside(environment), timeout=timeout, capture_output=True, text=True
        )

    return run


@pytest.fixture(scope="session")
def proc(tmp_path_factory):
    """The directory of pre-processed data that all tests share."""
    return tmp_path_factory.mktemp("proc")


@pytest.fixture(scope="session")
def raw():
    """The directory of real data that PARLE_DATA names."""
    if "PARLE_DATA" not in os.environ:
        pytest.skip("PARLE_DATA names no directory of real data")
    return Path(os.environ["PARLE_DATA"])


@pytest.fixture
def start(tmp_path, proc):
    """Start a program and return its process. Processes that still run at the end of the test are killed."""
    processes = []

    def start(program, *arguments, out="run", ranks=None, **environment):
        command = [sys.executable, program, *SETTINGS, "--proc", proc, "--out", tmp_path / out, *arguments]
        if ranks is not None:
            command = [MPIEXEC, "-n", ranks, *command]
        (tmp_path / "tmp").mkdir(exist_ok=True)
        environment = dict(TMPDIR=str(tmp_path / "tmp"), OMP_NUM_THREADS="1") | environment
        return start_command(list(map(str, command)), environment)

    def start_command(command, environment):
        process = subprocess.Popen(
            command, cwd=ROOT, env=outside(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    start.shell = lambda line, **changes: start_command(["bash", "-c", line], dict(OMP_NUM_THREADS="1") | changes)
    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def script(tmp_path):
    """A function that writes a program and returns its path: it starts itself as ranks, which execute `body`."""

    def write(body, before="", count=3):
        path = tmp_path / f"script{len(list(tmp_path.glob('*.py')))}.py"
        imports = f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        imports += (
            "from parle import distributed, launcher, rank_exit, streams, supervision\nstreams.prepare_streams()\n"
        )
        spawn = f"if launcher.rank_from_environment() is None:\n    sys.exit(supervision.spawn_ranks({count}))\n"
        path.write_text(f"{imports}{before}\n{spawn}rank, size = launcher.rank_from_environment()\n{body}")
        return path

    return write


def start_in_shell(path, redirected, **environment):
    """Run a script in a shell that redirects its streams and return its exit status, stdout and stderr."""
    line = f"{shlex.quote(sys.executable)} {shlex.quote(str(path))} {redirected}"
    done = subprocess.run(["sh", "-c", line], env=outside(environment), capture_output=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def wait_until(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
