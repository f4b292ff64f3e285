"""What the README tells a new user to type, from a clean copy of the tree."""

import re
import shutil
import subprocess
import sys

import pytest

import options
from tests.conftest import ROOT, outside
from tests.test_parle_mpi import OFFLINE

README = (ROOT / "README.md").read_text()
SETUP = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "


@pytest.fixture
def clean(tmp_path):
    """A copy as a fresh clone has it, with this environment in the place of the one that SETUP makes."""
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "proc", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tmp_path / "clone", ignore=ignored)
    (tmp_path / "clone" / "proc").mkdir()
    (tmp_path / "clone" / ".venv").symlink_to(sys.prefix)
    return tmp_path / "clone"


def commands():
    return [line.strip().removeprefix(SETUP) for line in README.splitlines() if line.startswith("    " + SETUP)]


def run(command, cwd, **environment):
    shell = ["bash", "-c", command]
    return subprocess.run(shell, cwd=cwd, env=outside(environment), timeout=180, capture_output=True, text=True)


def test_the_two_commands_stand_at_the_top():
    assert commands() == [".venv/bin/python parle_mpi.py -n 3", ".venv/bin/python -m pytest -q"]
    assert README.index(SETUP) < 1500


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_first_command_trains_to_less_than_5_percent_without_a_network(clean):
    done = run(commands()[0], clean, **OFFLINE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("WARNING: training on digits")
    (error,) = re.findall(r"lenet on digits    master +([\d.]+) %", done.stdout)
    assert float(error) < 5


@pytest.mark.slow  # .ci/run runs them
def test_the_second_command_finds_the_tests(clean):
    done = run(commands()[1] + " --collect-only", clean)
    assert done.returncode == 0, done.stdout
    assert "tests/test_readme.py::test_the_two_commands_stand_at_the_top" in done.stdout


def test_the_example_runs_and_learns(clean, python):
    (example,) = re.findall(r"```python\n(import torch\nfrom mpi4py.*?)```", README, re.DOTALL)
    differ = "assert len(set(MPI.COMM_WORLD.allgather(float(model[0].weight.sum())))) == 2\n"
    (clean / "example.py").write_text(example.replace("optimizer.copy_master_to", differ + "optimizer.copy_master_to"))
    done = python("-m", "mpi4py", "example.py", ranks=2, cwd=clean)
    assert done.returncode == 0, done.stderr
    accuracies = [float(value) for value in re.findall(r"tensor\(([\d.]+)\)", done.stdout)]
    assert len(accuracies) == 2
    assert min(accuracies) == max(accuracies) > 0.95


def test_the_example_of_one_process_runs_and_learns(clean, python):
    (example,) = re.findall(r"```python\n(import torch\nfrom sklearn.*?)```", README, re.DOTALL)
    (clean / "example.py").write_text(example)
    done = python("example.py", cwd=clean, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert float(re.fullmatch(r"tensor\((.*)\)\n", done.stdout)[1]) > 0.95


def test_every_flag_that_is_named_exists():
    known = {*options.parser("", "")._option_string_actions, "--gpus-per-replica"}
    named = set(re.findall(r"(?<!\w)`(--?[A-Za-z][\w-]*)", README)) - {"-m"}
    assert len(named) > 15
    assert named <= known


def test_every_file_of_the_layout_exists():
    (layout,) = re.findall(r"## Layout\n\n(.*?)\n\n", README + "\n\n", re.DOTALL)
    names = [line.split()[0] for line in layout.splitlines()]
    assert all((ROOT / name).exists() for name in names)
    assert {path.name for path in ROOT.glob("*.py")} - {"example.py", "example_gpu.py"} <= set(names)
