"""What README.md promises to a new user: its commands and the examples."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import OFFLINE, ROOT, outside

README = (ROOT / "README.md").read_text()
SETUP = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
TRAIN, TEST = ".venv/bin/python parle_mpi.py -n 3", ".venv/bin/python -m pytest -q"


def accuracies(output):
    """Return the accuracies that an example printed, in percent."""
    return [float(value) for value in re.findall(r"held-out data ([\d.]+) %", output)]


def test_readme_has_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_readme_has_the_two_commands():
    commands = [line for line in README.splitlines() if line.startswith("    python3")]
    assert commands == [f"    {SETUP}{TRAIN}", f"    {SETUP}{TEST}"]


def test_files_of_the_layout_exist():
    (layout,) = re.findall(r"## Layout\n\n((?: {4}.*\n)+)", README)
    names = [name for line in layout.splitlines() for name in re.split(r",? +", line.strip().split("  ")[0])]
    assert all((ROOT / name).exists() for name in names)
    assert {path.name for path in ROOT.glob("*.py")} <= set(names)


def test_mpi_example_runs_and_learns(python, tmp_path):
    path = ROOT / "examples" / "train_mpi.py"
    done = python("-m", "mpi4py", path, ranks=3, cwd=tmp_path, timeout=110, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    first, *_, last = accuracies(done.stdout)
    assert last > max(first, 93)


def test_gpu_example_runs_and_learns(python, tmp_path):
    path = ROOT / "examples" / "train_gpu.py"
    done = python(path, cwd=tmp_path, timeout=110, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    first, *_, last = accuracies(done.stdout)
    assert last > max(first, 93)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "launch", [["-m", "mpi4py"], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 3]]
)
def test_transformer_example_runs_and_learns(python, tmp_path, launch):
    path, ranks = ROOT / "examples" / "train_char_lm.py", 3 if "mpi4py" in launch else None
    done = python(*launch, path, ranks=ranks, cwd=tmp_path, timeout=560, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    first, *_, last = map(float, re.findall(r"text ([\d.]+) nats", done.stdout))
    assert last < min(first, 2.5)


@pytest.fixture
def clone(tmp_path):
    """A copy of the tree like a fresh clone, with this environment in place of the one that SETUP makes."""
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "proc", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tmp_path / "clone", ignore=ignored)
    (tmp_path / "clone" / "proc").mkdir()
    (tmp_path / "clone" / ".venv").symlink_to(sys.prefix)
    return tmp_path / "clone"


def run(command, cwd, **environment):
    shell = ["bash", "-c", command]
    return subprocess.run(shell, cwd=cwd, env=outside(environment), timeout=180, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_training_command_works_offline(clone):
    done = run(TRAIN, clone, **OFFLINE)
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout.splitlines()[0]
    assert float(re.findall(r"master +([\d.]+) %", done.stdout)[-1]) < 5


@pytest.mark.slow  # .ci/run runs the command itself
def test_test_command_collects_the_tests(clone):
    done = run(f"{TEST} --collect-only", clone)
    assert done.returncode == 0, done.stdout
    assert "tests/test_readme.py::test_readme_has_the_two_commands" in done.stdout
