"""Runs in jobs of a real Slurm, which these tests start on this machine as two nodes: `pytest -m slurm`, as root.

They need Debian's packages slurm-wlm and slurm-wlm-basic-plugins.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from parle import checkpoint
from tests.conftest import ROOT, outside

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]  # a requeued job waits for two minutes
CONFIGURATION = """
ClusterName=parle
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
AuthInfo=cred_expire=10
SchedulerParameters=batch_sched_delay=0,sched_interval=1
MinJobAge=300
FirstJobId={first_job}
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
KillWait=30
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
PROGRAM = [sys.executable, str(ROOT / "parle_mpi.py")]
SETTINGS = shlex.split("-d digits --device cpu -L 5 -b 24 --frac 0.075 --lr-drops 0.6 --checkpoint-every 1")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Start the daemons of two nodes; return the environment in which Slurm's commands find them."""
    if missing := [name for name in ("slurmctld", "slurmd", "srun") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)}: not installed")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    folder, host, port = tmp_path_factory.mktemp("slurm"), socket.gethostname(), free_port()
    numbers = dict(port=port, first=port + 1, last=port + 2, first_job=new_job_number())
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, **numbers))
    for name in ("state", "spool-node1", "spool-node2"):
        (folder / name).mkdir()
    environment = outside(dict(SLURM_CONF=str(folder / "slurm.conf"), OMP_NUM_THREADS="1"))
    daemons = [["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", name] for name in ("node1", "node2"))]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for command in daemons]
    try:
        wait_until(lambda: run(environment, "sinfo", "-h", "-o", "%T %D").out.strip() == "idle 2", 60)
        yield environment
    finally:
        run(environment, "scancel", "--user=root")
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not run(environment, "squeue", "-h").out, 60)
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(30)


def free_port():
    """Return a port that is free, and the next two probably as well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def new_job_number():
    """Return a new number: MPICH names its shared memory after it, and killed ranks leave theirs."""
    return int(time.time()) % 2**25


def run(environment, *command, timeout=150):
    command = list(map(str, command))
    done = subprocess.run(command, env=environment, cwd=ROOT, timeout=timeout, capture_output=True, text=True)
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


def wait_until(condition, seconds=150):
    deadline = time.time() + seconds
    while not (found := condition()):
        assert time.time() < deadline
        time.sleep(0.1)
    return found


@pytest.fixture
def submit(cluster, tmp_path):
    """A function that submits a batch script and returns the job's number. The script's output is in job-NUMBER."""

    def submit(script, *options):
        (tmp_path / "script.sh").write_text(f"#!/bin/bash\n{script}\n")
        output = f"--output={tmp_path}/job-%A"
        done = run(cluster, "sbatch", "--parsable", "--open-mode=append", output, *options, tmp_path / "script.sh")
        assert done.status == 0, done.err
        return done.out.strip()

    submit.output = lambda job: (tmp_path / f"job-{job}").read_text()
    return submit


def end_of_job(cluster, job):
    """Wait until a job has ended and return its state and exit status."""

    def ended():
        text = run(cluster, "scontrol", "show", "job", job).out
        state, status = re.search(r"JobState=(\S+)", text)[1], re.search(r"ExitCode=(\d+):", text)[1]
        return state not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED") and (state, int(status))

    return wait_until(ended, 400)


def command_line(proc, out, *arguments):
    return shlex.join([*PROGRAM, *SETTINGS, *map(str, ("--proc", proc, "--out", out, *arguments))])


def read_events(out, *events):
    log = out / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line for line in lines if line["event"] in events]


def master(out):
    return (out / "master.pt").read_bytes()


@pytest.fixture(scope="session")
def uninterrupted(cluster, proc, tmp_path_factory):
    """The master.pt of 15 rounds of three replicas."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run(cluster, "srun", "--mpi=pmi2", "-n", 3, *shlex.split(command_line(proc, out, "-B", 3)))
    assert (done.status, done.err) == (0, "")
    assert read_events(out, "start")[0]["num_ranks"] == 3
    return master(out)


def test_srun_with_pmi2_starts_the_ranks(uninterrupted):
    assert uninterrupted


def test_srun_without_pmi2_is_refused_with_the_remedy(cluster, proc, tmp_path):
    """The plugin for pmix cannot be loaded in Debian's packages."""
    out = tmp_path / "run"
    done = run(cluster, "srun", "-n", 3, *shlex.split(command_line(proc, out)))
    assert done.status == 2 and not out.exists()
    (line,) = [line for line in done.err.splitlines() if not line.startswith("srun: ")]
    assert "srun --mpi=pmi2" in line


@pytest.mark.parametrize("prefix", ["", "srun -n 1 ", "srun --mpi=pmi2 -n 1 "])
def test_program_starts_its_own_ranks_in_a_job_of_one_node(cluster, submit, proc, tmp_path, uninterrupted, prefix):
    job = submit(prefix + command_line(proc, tmp_path / "run", "-n", 3, "-B", 3), "-N", "1", "-n", "3")
    assert end_of_job(cluster, job) == ("COMPLETED", 0), submit.output(job)
    assert master(tmp_path / "run") == uninterrupted


def test_own_ranks_on_two_nodes_are_refused_with_the_remedy(cluster, submit, proc, tmp_path):
    own = submit(command_line(proc, tmp_path / "run", "-n", 4), "-N", "2", "-n", "4")
    assert end_of_job(cluster, own) == ("FAILED", 2)
    (line,) = submit.output(own).splitlines()
    command = re.search(r"srun --mpi=pmi2 -n 4", line)[0]
    launched = submit(f"{command} {command_line(proc, tmp_path / 'run', '-B', '0.4')}", "-N", "2", "-n", "4")
    assert end_of_job(cluster, launched) == ("COMPLETED", 0), submit.output(launched)
    assert read_events(tmp_path / "run", "start")[0]["num_ranks"] == 4


def test_srun_starts_torchrun_on_each_node(cluster, submit, proc, tmp_path):
    rendezvous = f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()} --rdzv-id $SLURM_JOB_ID"
    torchrun = f"{PROGRAM[0]} -m torch.distributed.run --nnodes 2 --nproc-per-node 2 {rendezvous} --no-python"
    command = command_line(proc, tmp_path / "run", "-n", 2, "-B", "0.4")
    job = submit(f"srun --ntasks-per-node 1 {torchrun} {command}", "-N", "2", "--ntasks-per-node", "1")
    assert end_of_job(cluster, job) == ("COMPLETED", 0), submit.output(job)
    (start,) = read_events(tmp_path / "run", "start")
    assert (start["num_ranks"], start["num_replicas"]) == (4, 2) and start["mpi"].startswith("gloo")


def find_rank(rank, out):
    """Return the process number of this rank of the run in `out`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"PMI_RANK={rank}".encode() in environment and str(out).encode() in command and b"srun" not in command[0]:
            return int(folder.name)
    raise LookupError(rank)


def test_killed_rank_ends_the_step_and_the_run_resumes(cluster, submit, proc, tmp_path):
    out = tmp_path / "run"
    command = command_line(proc, out, "-B", "30")
    job = submit(f"srun --mpi=pmi2 -W 3 {command}", "-n", "3")
    wait_until(lambda: checkpoint.list_checkpoints(out / "checkpoints"))
    os.kill(find_rank(1, out), 9)
    killed = time.time()
    assert end_of_job(cluster, job)[0] == "FAILED"
    assert time.time() - killed < 30
    resumed = submit(f"srun --mpi=pmi2 {command} --resume", "-n", "3")
    assert end_of_job(cluster, resumed) == ("COMPLETED", 0), submit.output(resumed)
    assert len(read_events(out, "resume")) == 1


def test_rank_that_raises_ends_the_step_and_its_hint_resumes(cluster, submit, proc, tmp_path, uninterrupted):
    out = tmp_path / "run"
    fault = "PARLE_TESTING=1 PARLE_FAULT=raise:2:4"
    job = submit(f"{fault} srun --mpi=pmi2 {command_line(proc, out, '-B', '3')}", "-n", "3")
    assert end_of_job(cluster, job)[0] == "FAILED"
    hint = re.search(r"resume with: (srun --mpi=pmi2 -n 3 .*)", submit.output(job))[1]
    resumed = submit(f"cd {ROOT}; {hint}", "-n", "3")
    assert end_of_job(cluster, resumed) == ("COMPLETED", 0), submit.output(resumed)
    assert master(out) == uninterrupted


def requeue_recipe(command, out):
    """Return the recipe of docs/running.md with this command."""
    recipe = re.search(r"```sh\n#!/bin/bash\n(#SBATCH.*?)```", (ROOT / "docs/running.md").read_text(), re.DOTALL)[1]
    recipe = recipe.replace("--gpus-per-task=1 ", "")  # this machine has none
    (program,) = [line for line in recipe.splitlines() if "python parle_mpi.py" in line]
    recipe = recipe.replace(program, f"{program.partition('python parle_mpi.py')[0]}{command} $resume")
    return recipe.replace("runs/wrn/", f"{shlex.quote(str(out))}/")


def test_documented_script_is_requeued_after_sigterm(cluster, submit, proc, tmp_path):
    out = tmp_path / "run"
    job = submit(requeue_recipe(command_line(proc, out, "-B", "30"), out))
    wait_until(lambda: checkpoint.list_checkpoints(out / "checkpoints"))
    assert run(cluster, "scancel", "--signal=TERM", job).status == 0
    wait_until(lambda: read_events(out, "interrupted"))
    assert end_of_job(cluster, job) == ("COMPLETED", 0), submit.output(job)
    assert len(read_events(out, "resume")) == len(read_events(out, "finished")) == 1


def test_time_limit_saves_and_requeues(cluster, submit, proc, tmp_path):
    """Slurm may send the signal a minute earlier than --signal asks for: here 30 to 90 seconds after the start."""
    out = tmp_path / "run"
    recipe = requeue_recipe(command_line(proc, out, "-B", "3000", "--eval-every", "100000"), out)
    job = submit(recipe, "--signal=TERM@30", "--time=2")
    wait_until(lambda: read_events(out, "interrupted"))
    wait_until(lambda: read_events(out, "resume"), 300)
    assert run(cluster, "scancel", job).status == 0
    assert end_of_job(cluster, job)[0] == "CANCELLED"


def test_jobs_of_an_array_have_their_own_directories(cluster, submit, proc, tmp_path):
    """Their names hold the second of the start."""
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.strftime = lambda *_: '20261201-000000'\n")
    arguments = [*PROGRAM, *SETTINGS, "-B", "0.4", "-n", "1", "--proc", str(proc)]
    job = submit(f"cd {tmp_path}; PYTHONPATH={tmp_path} {shlex.join(arguments)}", "--array=1-4", "-n", "1")
    for task in range(1, 5):
        assert end_of_job(cluster, f"{job}_{task}") == ("COMPLETED", 0)
    names = sorted(path.parent.name for path in (tmp_path / "runs").glob("*/master.pt"))
    first = "20261201-000000-lenet-digits"
    assert names == [first, *(f"{first}-{number}" for number in (2, 3, 4))]
