import shlex
import sys
from pathlib import Path

import pytest

from parle import launcher
from tests.conftest import mpiexec


def test_import_loads_no_mpi_torch_or_numpy(python):
    program = "import sys; from parle import launcher; print({'mpi4py', 'torch', 'numpy'} & set(sys.modules))"
    done = python("-c", program)
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.parametrize(
    ("environment", "expected"),
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
        # a value that is not a number is ignored
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
def test_rank_and_size_from_environment(environment, expected):
    assert launcher.rank_from_environment(dict(item.split("=") for item in environment.split())) == expected


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ("PMI_RANK=1 PMI_SIZE=3", "mpiexec -n 3"),
        ("OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=3 PMIX_RANK=2", "mpirun -n 3"),
        ("SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=3 PMI_RANK=1 PMI_SIZE=3", "srun --mpi=pmi2 -n 3"),
        ("SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=3 PMIX_RANK=1", "srun --mpi=pmix -n 3"),
        ("SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=3", "srun -n 3"),
        ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 PMI_RANK=0 PMI_SIZE=3", "mpiexec -n 3"),  # which srun has started
    ],
)
def test_ranks_are_resumed_with_the_launcher_that_started_them(environment, command):
    started = launcher.launch_command(3, dict(item.split("=") for item in environment.split()))
    assert started == f"{command} {launcher.python_command()}"


def test_launchers_are_detected_in_the_environment_of_this_process(monkeypatch, no_launcher):
    assert launcher.rank_from_environment() is None
    monkeypatch.setenv("PMIX_RANK", "3")
    assert launcher.rank_from_environment() == (3, None)


def test_one_rank_in_a_shell_of_slurm_is_detected_if_parle_has_started_it():
    environment = dict(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1", PMI_RANK="0", PMI_SIZE="1")
    assert launcher.rank_from_environment(environment) is None
    assert launcher.rank_from_environment(environment | {launcher.STATUS_DIR: "/somewhere"}) == (0, 1)


SRUN = dict(SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="3")
PMI, OMPI = dict(PMI_RANK="0", PMI_SIZE="3"), dict(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="3", PMIX_RANK="0")
MPICH = "MPICH Version: 5.0.2\nMPICH configure: --with-device=ch4:ucx,ofi --with-pm=hydra:gforker\n"
OPEN_MPI = "Open MPI v5.0.10, package: Open MPI, ident: 5.0.10"


@pytest.mark.parametrize(
    ("library", "environment", "remedy"),
    [
        (MPICH, {}, None),
        (MPICH, PMI, None),
        (MPICH, SRUN | PMI, None),  # srun --mpi=pmi2
        (MPICH, SRUN, "srun --mpi=pmi2"),  # srun --mpi=none
        (MPICH, SRUN | dict(PMIX_RANK="0"), "srun --mpi=pmi2"),
        (MPICH, OMPI, "mpiexec"),
        (MPICH, dict(PMIX_RANK="0"), "mpiexec"),
        (MPICH, SRUN | dict(SLURM_STEP_NUM_TASKS="1"), None),  # a shell, or one rank
        (MPICH.replace("hydra", "hydra --with-pmix"), SRUN | dict(PMIX_RANK="0"), None),
        ("CRAY MPICH version 8.1", SRUN, None),  # its protocol is not known
        (OPEN_MPI, OMPI, None),
        (OPEN_MPI, SRUN | dict(PMIX_RANK="0"), None),
        (OPEN_MPI, SRUN, "srun --mpi=pmix"),
        (OPEN_MPI, PMI, "mpirun"),
    ],
)
def test_launcher_of_another_mpi_is_refused_with_the_remedy(library, environment, remedy):
    if remedy is None:
        launcher.check_mpi(library, environment)
    else:
        with pytest.raises(OSError, match=remedy):
            launcher.check_mpi(library, environment)


TORCHRUN = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="3", MASTER_ADDR="localhost", MASTER_PORT="29500")


ELASTIC = TORCHRUN | dict(TORCHELASTIC_RUN_ID="x", TORCHELASTIC_RESTART_COUNT="0", LOCAL_WORLD_SIZE="3")


@pytest.mark.parametrize(
    ("environment", "name", "size"),
    [
        (TORCHRUN, "torchrun", 3),  # accelerate's variables, or a script's
        (ELASTIC, "torchrun", 3),
        (ELASTIC | dict(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2"), "torchrun", 3),  # srun torchrun
        (TORCHRUN | PMI, "MPICH or Intel MPI", 3),  # scripts for MPI set torch's variables, too
        (ELASTIC | PMI | {launcher.STATUS_DIR: "/somewhere"}, "MPICH or Intel MPI", 3),  # within a rank of torchrun
        (dict(RANK="3"), None, None),
    ],
)
def test_torchrun_is_detected(environment, name, size):
    assert launcher.launcher_name(environment) == name
    assert (launcher.rank_from_environment(environment) or (None, None))[1] == size


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("value", ["", "a"])
def test_variables_of_torchrun_that_are_no_numbers_are_ignored(name, value):
    assert launcher.rank_from_environment(ELASTIC | {name: value}) is None


@pytest.mark.parametrize(
    ("environment", "nodes", "expected"),
    [
        ({}, 0, {}),
        (dict(SLURM_PROCID="0", HYDRA_LAUNCHER="slurm"), 1, dict(HYDRA_LAUNCHER="fork", I_MPI_HYDRA_BOOTSTRAP="fork")),
        (dict(SLURM_JOB_ID="3"), 1, {}),  # the shell of salloc, which may be on another node
        (dict(PBS_NODEFILE="/missing"), 0, dict(HYDRA_RMK="user")),
        (dict(PBS_NODEFILE="/nodes"), 1, dict(HYDRA_LAUNCHER="fork", HYDRA_RMK="user")),
    ],
)
def test_own_ranks_start_on_this_machine(environment, nodes, expected):
    settings = launcher.settings_for_own_ranks(nodes, environment)
    hydra = {name: value for name, value in settings.items() if name.startswith(("HYDRA", "I_MPI"))}
    assert hydra.items() >= expected.items() and (hydra or not expected)
    assert settings["OMPI_MCA_rmaps_base_oversubscribe"] == "1"


@pytest.mark.parametrize(("count", "restarted"), [(None, False), ("0", False), ("2", True)])
def test_restarts_by_torchrun_are_detected(count, restarted):
    environment = {} if count is None else ELASTIC | dict(TORCHELASTIC_RESTART_COUNT=count)
    assert launcher.was_restarted(environment) is restarted


@pytest.mark.parametrize(("ranks_here", "flags"), [("3", "--nproc-per-node 3"), ("1", "--nnodes 3 --nproc-per-node 1")])
def test_ranks_of_torchrun_are_resumed_with_it(ranks_here, flags):
    command = launcher.launch_command(3, ELASTIC | dict(LOCAL_WORLD_SIZE=ranks_here))
    assert command == f"{launcher.python_command()} -m torch.distributed.run {flags}"


@pytest.mark.parametrize(
    ("environment", "nodes"),
    [
        ({}, 0),
        (dict(SLURM_JOB_NUM_NODES="2"), 2),
        (dict(SLURM_NNODES="1"), 1),
        (dict(SLURM_JOB_NUM_NODES=""), 0),
        (dict(PBS_NODEFILE="nodes"), 2),
        (dict(PBS_NODEFILE="missing"), 0),
    ],
)
def test_nodes_of_the_job_are_counted(environment, nodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nodes").write_text("a\na\nb\n")
    assert launcher.allocated_nodes(environment) == nodes


def test_rank_is_read_from_os_environ_by_default(monkeypatch, no_launcher):
    assert launcher.rank_from_environment() is None
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "3")
    assert launcher.rank_from_environment() == (1, 3)


@pytest.mark.parametrize(
    ("executable", "on_path", "expected"),
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
def test_python_command_is_what_a_shell_finds(executable, on_path, expected, tmp_path, monkeypatch):
    folders = [str((tmp_path / name).parent) for name in on_path]
    for name in {executable, *on_path}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        mpiexec(tmp_path / name, "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / executable))
    monkeypatch.setenv("PATH", ":".join(folders))
    assert launcher.python_command().replace(f"{tmp_path}/", "") == expected
    if expected != "python":
        assert shlex.split(launcher.python_command()) == [sys.executable]
