"""The launcher that started this process, if any, and whether it suits the MPI library."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

# Environment variables that hold a process's rank and the number of ranks; PMIx does not give the latter
LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "PMIx": ("PMIX_RANK", None),
}
TORCHRUN = "torchrun"  # also accelerate launch, and scripts that set its variables
TORCHRUN_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}
STATUS_DIR = "PARLE_STATUS_DIR"  # set for ranks started by this program: the directory of their status pipes


def rank_from_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int | None] | None:
    """Return rank and number of ranks (None if unknown) if a launcher started this process, else None."""
    detected = _detect_launcher(environment)
    return detected and detected[1:]


def launcher_name(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the launcher that started this process, if any."""
    detected = _detect_launcher(environment)
    return detected and detected[0]


def _detect_launcher(environment: Mapping[str, str]) -> tuple[str, int, int | None] | None:
    torchrun = None
    is_numbered = all(environment.get(name, "").isdecimal() for name in ("RANK", "WORLD_SIZE"))
    if is_numbered and environment.keys() >= TORCHRUN_VARIABLES and STATUS_DIR not in environment:
        torchrun = TORCHRUN, int(environment["RANK"]), int(environment["WORLD_SIZE"])
        if "TORCHELASTIC_RUN_ID" in environment:  # perhaps within srun
            return torchrun
    for name, (rank, size) in LAUNCHERS.items():
        if all(environment.get(variable, "").isdecimal() for variable in (rank, size) if variable):
            ranks = None if size is None else int(environment[size])
            # a Slurm step of one task may be a shell (srun --pty bash) in which this program was typed
            is_shell = environment.get("SLURM_STEP_NUM_TASKS") == "1" and STATUS_DIR not in environment
            if not is_shell or ranks not in (1, None):
                slurm = [environment.get(variable) for variable in LAUNCHERS["Slurm"]]
                if size and slurm == [environment[rank], environment[size]]:  # srun --mpi=pmi2 sets MPICH's variables
                    name = "Slurm"
                return name, int(environment[rank]), ranks
    return torchrun  # last: scripts for MPI set its variables, too


def launch_command(count: int, environment: Mapping[str, str] = os.environ) -> str:
    """Return the command that starts `count` ranks of a Python program in the way in which this process was started."""
    launcher = launcher_name(environment)
    if launcher == TORCHRUN:
        local = int(environment.get("LOCAL_WORLD_SIZE", count))
        nodes = f" --nnodes {count // local}" if local < count else ""
        return f"{python_command()} -m torch.distributed.run{nodes} --nproc-per-node {local}"
    if launcher == "Slurm":
        protocol = {"PMI_RANK": " --mpi=pmi2", "PMIX_RANK": " --mpi=pmix"}
        flag = next((flag for variable, flag in protocol.items() if variable in environment), "")
        return f"srun{flag} -n {count} {python_command()}"
    return f"{'mpirun' if launcher == 'Open MPI' else 'mpiexec'} -n {count} {python_command()}"


def was_restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun has restarted the ranks after a failure."""
    return environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def check_mpi(library_version: str, environment: Mapping[str, str] = os.environ) -> None:
    """Check that the launcher uses this MPI library's protocol; otherwise MPI would abort or find one rank.

    Args:
        library_version: what MPI_Get_library_version returns.

    Raises:
        OSError: the protocols differ. An unknown library passes.
    """
    launcher = launcher_name(environment)
    if launcher is None or rank_from_environment(environment)[1] == 1:
        return
    if library_version.startswith("Open MPI") and not environment.keys() & {"OMPI_COMM_WORLD_RANK", "PMIX_RANK"}:
        remedy = "srun --mpi=pmix" if launcher == "Slurm" else "Open MPI's own mpirun"
        raise OSError(f"mpi4py uses Open MPI, but {launcher} started the ranks with another protocol: use {remedy}")
    is_plain_mpich = "MPICH configure" in library_version and "pmix" not in library_version.lower()
    if is_plain_mpich and "PMI_RANK" not in environment:
        remedy = "srun --mpi=pmi2" if "SLURM_PROCID" in environment else "this Python's own mpiexec"
        raise OSError(f"mpi4py uses MPICH, but {launcher} started the ranks with another protocol: use {remedy}")


def check_number_of_ranks(found: int, environment: Mapping[str, str] = os.environ) -> None:
    """Check that MPI found the number of ranks that the launcher started. Raises: OSError."""
    _, started = rank_from_environment(environment) or (0, None)
    if started not in (found, None):
        raise OSError(
            f"the launcher started {started} ranks, but mpi4py's MPI library sees {found}: use that library's mpiexec, "
            "or install mpi4py for the launcher's MPI"
        )


def allocated_nodes(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of nodes of the batch job (Slurm, PBS) that this process belongs to; 0 outside one."""
    nodes = environment.get("SLURM_JOB_NUM_NODES", environment.get("SLURM_NNODES", ""))
    if nodes.isdecimal():
        return int(nodes)
    try:
        return len(set(Path(environment["PBS_NODEFILE"]).read_text().split()))
    except (KeyError, OSError):
        return 0


def settings_for_own_ranks(nodes: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables with which any mpiexec starts ranks on this machine.

    Args:
        nodes: of the batch job, see `allocated_nodes`.
    """
    # Open MPI refuses root and more ranks than cores; other launchers ignore these
    settings = {
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # version 5
        "OMPI_MCA_rmaps_base_oversubscribe": "1",  # version 4
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    settings = {name: environment.get(name, value) for name, value in settings.items()}
    is_this_node = nodes == 1 and environment.keys() & {"SLURMD_NODENAME", "SLURM_PROCID", "PBS_NODEFILE"}
    if is_this_node:  # MPICH's mpiexec would start them through srun, which waits for cores, or ssh; Intel's as well
        settings |= {"HYDRA_LAUNCHER": "fork", "I_MPI_HYDRA_BOOTSTRAP": "fork"}
    if "PBS_NODEFILE" in environment:  # MPICH would read it, but a container may not have it
        settings |= {"HYDRA_RMK": "user"}
    return settings


def is_first_rank() -> bool:
    rank, _ = rank_from_environment() or (0, None)
    return rank == 0


def has_several_ranks() -> bool:
    """Return whether a launcher started this process as one of several ranks, or does not give their number."""
    return (rank_from_environment() or (0, 1))[1] != 1


def is_started_by_parle() -> bool:
    """Return whether this process is a rank that `spawn_ranks` started."""
    return STATUS_DIR in os.environ


def python_command() -> str:
    """Return the command that runs this Python, quoted for a shell."""
    return "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable)


def find_mpiexec() -> str | None:
    """Return the mpiexec in the directory of this Python, or else the first one on the PATH."""
    return shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
