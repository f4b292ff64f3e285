"""Ranks that torchrun has started, which communicate by torch.distributed."""

import os
import re
import shlex
import signal
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import parle_mpi
from parle import distributed
from parle.distributed import TorchGroup
from tests.conftest import ROOT, SETTINGS
from tests.test_fault_recovery import (  # `start` is a fixture
    checkpoint_names,
    find_rank_pid,
    read_log,
    read_result,
    wait_for_exit,
    wait_for_rounds,
    wait_for_success,
)

TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone"


@pytest.fixture
def torchrun(start, tmp_path, proc):
    """Start a run of parle_mpi.py on ranks of torchrun, and return its process."""

    def run(*arguments, ranks=3, out="run", flags="", **environment):
        settings = [*SETTINGS, "--proc", proc, "--out", tmp_path / out, *arguments]
        program = f"{TORCHRUN} --nproc-per-node {ranks} {flags} parle_mpi.py"
        return start.shell(f"exec {program} {shlex.join(map(str, settings))}", **environment)

    return run


def test_same_run_as_over_mpi(torchrun, start, tmp_path):
    """Sums of three numbers may differ in their last digit: gloo and MPI add them in another order."""
    (tmp_path / "mpi4py.py").write_text("raise ImportError('not installed')")
    wait_for_success(torchrun("-B", 1, out="gloo", PYTHONPATH=str(tmp_path)))
    wait_for_success(start("parle_mpi.py", "-n", 3, "-B", 1, out="mpi"))
    gloo, mpi = (torch.load(tmp_path / name / "master.pt") for name in ("gloo", "mpi"))
    for name, value in mpi.items():
        assert (value - gloo[name]).float().norm() <= 1e-6 * value.float().norm(), name
    (begin,) = read_log(tmp_path / "gloo", "start")
    assert (begin["num_ranks"], begin["num_replicas"], begin["mpi"].split()[0]) == (3, 3, "gloo")


@pytest.mark.timeout(300)
def test_class_on_four_ranks(python):
    command = shlex.split(TORCHRUN)[1:]
    done = python(*command, "--nproc-per-node", 4, ROOT / "tests" / "mpi_checks.py", timeout=240, OMP_NUM_THREADS="1")
    assert done.stdout == "all checks passed\n", done.stderr
    for rank in (0, 1, 3):  # rank 2 left out a step
        assert re.search(
            rf"rank {rank}: In the synchronization of round 3, rank {rank} waited \d s for rank 2;", done.stderr
        )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_rank_matches_the_reference_at_each_step(python):
    command = shlex.split(TORCHRUN)[1:]
    done = python(*command, "--nproc-per-node", 4, ROOT / "tests" / "lockstep.py", timeout=240, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all equal\n")


@pytest.mark.slow
def test_ranks_that_share_a_replica(torchrun, start, tmp_path):
    wait_for_success(torchrun("-n", 2, "-B", 1, ranks=4, out="gloo"))
    wait_for_success(start("parle_mpi.py", "-n", 2, "-B", 1, ranks=4, out="mpi"))
    gloo, mpi = (torch.load(tmp_path / name / "master.pt") for name in ("gloo", "mpi"))
    for name, value in mpi.items():
        assert (value - gloo[name]).float().norm() <= 1e-5 * value.float().norm(), name


def find_resume_command(text):
    return re.findall(r"\S+ -m torch\.distributed\.run .*--resume \S+", text)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_run_resumes_bitwise(torchrun, start, tmp_path, number):
    wait_for_success(torchrun("-B", 3, out="undisturbed"))
    process = torchrun("-B", 3)
    wait_for_rounds(tmp_path / "run", process)
    process.send_signal(number)  # which torchrun passes on twice
    done = wait_for_exit(process)
    assert done.status == 1 and read_log(tmp_path / "run")[-1]["event"] == "interrupted"  # torchrun's own status
    wait_for_success(start.shell(find_resume_command(done.out)))
    assert read_result(tmp_path / "run") == read_result(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.timeout(300)  # torchrun gives a rank that hangs 30 s
@pytest.mark.parametrize(
    ("fault", "words"), [("kill:1:4", "-9"), ("raise:2:4", "injected fault"), ("hang:1:4", "rank 1")]
)
def test_failed_rank_ends_all_and_the_run_resumes_bitwise(torchrun, start, tmp_path, fault, words):
    wait_for_success(torchrun("-B", 3, out="undisturbed"))
    done = wait_for_exit(torchrun("-B", 3, "--timeout", 8, PARLE_FAULT=fault))
    assert done.status == 1 and words in done.err and checkpoint_names(tmp_path / "run")[0] == "00000003-0000"
    wait_for_success(start.shell(find_resume_command(done.err)))
    assert read_result(tmp_path / "run") == read_result(tmp_path / "undisturbed")


@pytest.mark.slow
def test_restarted_ranks_resume_from_the_newest_checkpoint(torchrun, tmp_path):
    wait_for_success(torchrun("-B", 6, out="undisturbed"))
    process = torchrun("-B", 6, flags="--max-restarts 1")
    wait_for_rounds(tmp_path / "run", process)
    os.kill(find_rank_pid(1, tmp_path / "run", variable="RANK"), signal.SIGKILL)
    wait_for_success(process)
    assert read_log(tmp_path / "run", "resume")
    assert read_result(tmp_path / "run") == read_result(tmp_path / "undisturbed")


@pytest.fixture
def two_nodes(start, tmp_path, proc):
    """Start torchrun twice, with so many ranks each, as if on two machines, and return the processes."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, socket\nif 'RANK' in os.environ:\n    socket.gethostname = lambda: os.environ['NODE']\n"
    )

    def run(*ranks, flags=""):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            rendezvous = (
                f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{probe.getsockname()[1]} --rdzv-id test {flags}"
            )
        settings = shlex.join(map(str, [*SETTINGS, "-B", 6, "--proc", proc, "--out", tmp_path / "run"]))
        environment = dict(PYTHONPATH=str(tmp_path), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        launch = f"exec {sys.executable} -m torch.distributed.run --nnodes 2 {rendezvous} --nproc-per-node"
        return [
            start.shell(f"{launch} {count} parle_mpi.py {settings}", NODE=f"node{node}", **environment)
            for node, count in enumerate(ranks)
        ]

    return run


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_of_two_nodes_with_unequal_numbers(two_nodes, tmp_path):
    for process in two_nodes(2, 1):
        wait_for_success(process)
    (begin,) = read_log(tmp_path / "run", "start")
    assert [host["ranks"] for host in begin["hosts"]] == [2, 1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_of_two_nodes_resume_after_a_restart(two_nodes, tmp_path):
    processes = two_nodes(2, 2, flags="--max-restarts 1")
    wait_for_rounds(tmp_path / "run", processes[0])
    os.kill(find_rank_pid(1, tmp_path / "run", variable="RANK"), signal.SIGKILL)
    for process in processes:
        wait_for_success(process)
    assert len(read_log(tmp_path / "run", "resume")) == len(read_log(tmp_path / "run", "finished")) == 1


# The group and the class in one process


@pytest.fixture
def world(tmp_path):
    """A process group of one rank."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def build(comm):
    return parle_mpi.Parle([nn.Parameter(torch.ones(3))], comm, lr=0.1, batches_per_epoch=4)


def test_group_of_one_rank_needs_no_communication(world):
    optimizer = build(world)
    assert (optimizer.num_replicas, type(optimizer.groups.world)) == (1, distributed.Group)


def test_group_sums_gathers_and_broadcasts(world):
    group = TorchGroup(world)
    tensor = torch.arange(3.0)
    group.all_reduce(tensor)
    group.broadcast(tensor)
    assert tensor.tolist() == [0, 1, 2] and group.all_gather({"a": 1}) == [{"a": 1}]
    assert type(group.split_by_node()) is distributed.Group and group.library().startswith("gloo")


def test_groups_of_one_replica_have_the_time_limit_of_their_optimizer(world, monkeypatch):
    limits = []
    monkeypatch.setattr(torch.distributed, "new_group", lambda *_, timeout, **settings: limits.append(timeout.seconds))
    for timeout in (2.0, 900.0):
        TorchGroup(world, timeout).split(0)
    assert limits[0] > 2 and limits[1] > 900


class Mesh:
    """Like torch's DeviceMesh."""

    def size(self):
        return 2


@pytest.mark.parametrize("comm", [None, torch.distributed.GroupMember.NON_GROUP_MEMBER, "gloo", Mesh()])
def test_without_a_process_group_the_remedy_is_named(comm):
    with pytest.raises(ValueError, match=r"Invalid comm.*init_process_group.*get_group"):
        build(comm)


def test_group_without_a_backend_for_the_parameters_is_rejected(world, monkeypatch):
    monkeypatch.setattr(parle_mpi, "group_of", TorchGroup)
    monkeypatch.setattr(TorchGroup, "accepts", lambda self, device: device.type == "cuda")  # as with NCCL
    with pytest.raises(ValueError, match="backend for the CPU"):
        build(world)


def test_lost_connection_is_an_error():
    def fail():
        raise RuntimeError("Connection closed by peer")

    group = TorchGroup.__new__(TorchGroup)
    distributed.Group.__init__(group)
    group.comm = SimpleNamespace(get_group_store=lambda: None)
    with pytest.raises(RuntimeError, match="closed by peer"):
        group.wait(SimpleNamespace(is_completed=lambda: True, wait=fail), torch.zeros(1))
