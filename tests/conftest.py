import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parle import launcher

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
MPIEXEC = Path(sys.executable).with_name("mpiexec")
OFFLINE = dict(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")  # nobody listens there

torch.set_num_threads(1)  # the tests' networks are too small for more


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def comm():
    """A real communicator of one rank."""
    from mpi4py import MPI

    return MPI.COMM_SELF


def outside(changes):
    """The environment of a shell where no launcher and no test runs, with changes."""
    inside = ("PMI", "MPI", "OMPI", "SLURM", "PARLE", "PYTEST")
    return {name: value for name, value in os.environ.items() if not name.startswith(inside)} | changes


@pytest.fixture
def no_launcher(monkeypatch):
    """This process as no launcher has started it."""
    for name in {name for names in launcher.LAUNCHERS.values() for name in names if name}:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def python():
    """Run this Python with these arguments and a time limit, outside any launcher; gives the finished process."""

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
    """A folder of pre-processed data for all tests."""
    return tmp_path_factory.mktemp("proc")


@pytest.fixture(scope="session")
def raw():
    """The folder of real data that PARLE_DATA names."""
    if "PARLE_DATA" not in os.environ:
        pytest.skip("PARLE_DATA names no folder of real data")
    return Path(os.environ["PARLE_DATA"])
