"""Parle over MPI: a rank trains a replica (or several ranks one, data-parallel), one allreduce a round couples them.

python parle_mpi.py -n 3                      # starts its own three ranks
mpirun -n 12 python parle_mpi.py              # 12 replicas
mpirun -n 12 python parle_mpi.py -n 3         # 3 replicas, each data-parallel over 4 ranks
"""

import argparse
import functools
import importlib.metadata
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import loader
from parle import cli, distributed, doctor, experiment, launcher, signals, training
from parle.checkpoint import CheckpointError
from parle.optimizer import TAIL, Replica, ReplicaOptimizer

if TYPE_CHECKING:
    from mpi4py import MPI


class Parle(ReplicaOptimizer):
    """Parle with its replicas on MPI ranks: at every L-th `step()`, one allreduce of one flat vector.

        for inputs, targets in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        optimizer.copy_master_to(evaluation_model)

    Building it is collective: rank 0's parameters are sent to all. The master is the same on every rank.

    Args:
        params: as for any torch optimizer; float32 (or all float64) and on one device.
        comm: the communicator of all ranks of all replicas.
        replicas: by default one per rank. Fewer make groups of comm.size / replicas neighbouring ranks, data-parallel
            inside, whose gradients `step()` averages before its update.
        hyperparameters: lr, batches_per_epoch and whatever else `ReplicaOptimizer` lists.

    Raises:
        ValueError: an invalid value, or one that differs between ranks.
    """

    def __init__(self, params: Iterable[Any], comm: "MPI.Comm", *, replicas: int | None = None, **hyperparameters: Any):
        replicas = comm.size if replicas is None else replicas
        if not (isinstance(replicas, int) and replicas >= 1 and comm.size % replicas == 0):
            raise ValueError(f"Invalid replicas value: {replicas}, for {comm.size} ranks")
        self.sync_seconds = 0.0
        super().__init__(params, replicas, **hyperparameters)
        settings = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        shapes = [tuple(parameter.shape) for parameter in self._home.parameters]
        distributed.check_same(
            comm, dict(replicas=replicas, parameters=shapes, strides=self._home.strides, groups=settings)
        )
        self.comm = comm
        self.team = comm.Split(comm.rank // (comm.size // replicas))  # the ranks of this replica
        # MPI from wheels cannot read a GPU's memory: messages are staged in the host's, pinned for CUDA's copies
        message = self._home.message
        device = message.device.type
        self._staging = (
            None if device == "cpu" else torch.empty_like(message, device="cpu", pin_memory=device == "cuda")
        )
        with torch.no_grad():
            for tensor in [self._home.weights, *self._home.frozen]:
                host = tensor.cpu().contiguous()
                distributed.broadcast(comm, host)
                tensor.copy_(host)
            self._start_alike()

    def _mean_gradient(self, replica: Replica) -> None:
        self._mean(self.team, replica.gradient)

    def _mean_messages(self) -> None:
        message, lr = self._home.message, self.param_groups[0]["lr"]
        message[-1] = lr
        # the ranks of one replica hold the same z^a, so the mean over all ranks is the mean over the replicas
        self._mean(self.comm, message if self.num_replicas > 1 else message[-TAIL:])
        if not math.isclose(message[-1], lr, rel_tol=1e-5, abs_tol=1e-30):
            raise RuntimeError(f"lr is {lr} here and {float(message[-1])} on average: schedule it alike everywhere")

    def _everywhere(self, numbers: list[int]) -> list[int]:
        mine = [self.comm.rank // self.team.size] if numbers else []  # here the only replica is number 0
        return sorted({number for numbers in distributed.gather(self.comm, mine) for number in numbers})

    def _mean(self, comm: "MPI.Comm", vector: Tensor) -> None:
        if comm.size == 1:
            return
        if self._staging is not None:
            torch.accelerator.synchronize(vector.device)  # what is still computing is not time spent communicating
        start = time.perf_counter()
        host = vector
        if self._staging is not None:
            host = self._staging[: len(vector)]
            host.copy_(vector)  # returns when it is there, so MPI reads what was computed
        distributed.add(comm, host)
        if host is not vector:
            vector.copy_(host)
        vector.div_(comm.size)
        self.sync_seconds += time.perf_counter() - start


def main() -> None:
    parser = cli.parser("parle_mpi.py", "Parle over MPI: replicas on ranks, coupled by one allreduce a round.")
    signals.await_training()
    comm = None
    try:
        examines = (
            "--doctor" in sys.argv and launcher.STARTED not in os.environ
        )  # before it starts ranks, which may fail
        if examines and not doctor.examine(cli.parse(parser), mpi=True):
            sys.exit(1)
        if launcher.launched() is None:
            args = cli.resolve(cli.parse(parser), None)
            cli.check(args, None)
            status = start(args.replicas)
            if status is not None:
                sys.exit(status)
        comm = world()
        done = run(distributed.together(comm, functools.partial(cli.parse, parser), True, cli.Mistake), comm)
        status = 0 if done else signals.STOPPED
    except (cli.Mistake, distributed.Disagreement, loader.DataError, FloatingPointError, CheckpointError) as error:
        cli.tell(parser.prog, error)
        status = 1 if isinstance(error, FloatingPointError | CheckpointError) else 2
    if status and comm is not None:
        distributed.gather(comm, None)  # every rank has the same to say, and none ends before the first has said it
        sys.modules["mpi4py.MPI"].Finalize()
    if status:
        sys.exit(status)


def start(replicas: int) -> int | None:
    try:
        return launcher.start(replicas)
    except OSError as error:
        raise cli.Mistake(str(error)) from error


def world() -> "MPI.Comm":
    """All ranks. Raises: Mistake."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise cli.Mistake(f"mpi4py finds no MPI library ({error}): pip install mpich") from error
    comm = MPI.COMM_WORLD
    _, size = launcher.launched() or (0, None)
    if size not in (None, comm.size):
        raise cli.Mistake(
            f"the launcher started {size} ranks but {MPI.get_vendor()[0]}, the MPI of mpi4py, sees {comm.size}: "
            "use its own mpiexec, or install mpi4py for the launcher's MPI"
        )
    return comm


def run(given: argparse.Namespace, comm: "MPI.Comm") -> bool:
    """Train as the arguments say, or only tell what that would take. Returns whether the run has come to its end."""
    local = {"data", "proc", "out", "device"}  # what may differ between machines
    distributed.check_same(comm, {name: value for name, value in vars(given).items() if name not in local})
    distributed.patience = given.timeout
    node = distributed.node(comm)
    cores = set().union(
        *distributed.gather(node, distributed.cores())
    )  # a launcher may have bound each rank to some of its own

    def check() -> list[torch.device]:
        args = cli.resolve(given, comm.size)
        cli.check(args, comm.size)
        return cli.devices(args.device)

    devices = distributed.together(comm, check, True, cli.Mistake)
    torch.set_num_threads(distributed.threads(len(cores), node.size))
    device = devices[node.rank % len(devices)]
    read = doctor.synthetic if given.doctor else functools.partial(load, comm, node)
    args, data = experiment.load(given, size=comm.size, read=read, first=comm.rank == 0)
    data = data.to(device)

    ranks_per_replica = comm.size // args.replicas
    replica, part = divmod(comm.rank, ranks_per_replica)
    model, batches = experiment.model(args, data), experiment.batches(args, data, replica, (part, ranks_per_replica))
    settings = experiment.hyperparameters(args, batches.per_epoch) | (doctor.STILL if args.doctor else {})
    optimizer = Parle(model.parameters(), comm, replicas=args.replicas, **settings)
    if args.doctor:
        return doctor.over_ranks(args, optimizer, (model, batches), device, comm, node)
    resumed = distributed.together(
        comm, functools.partial(experiment.find_checkpoint, args), comm.rank == 0, cli.Mistake
    )
    resumed = distributed.gather(comm, resumed)[0]
    own = {replica: (model, batches)}
    restore = functools.partial(experiment.restore, args, resumed, optimizer, own, part)
    distributed.together(comm, restore, True, cli.Mistake)
    open_report = functools.partial(experiment.open_report, args, resumed)
    program = f"{launcher.python()} {shlex.quote(sys.argv[0])}"
    if launcher.STARTED not in os.environ and comm.size > 1:
        program = f"mpiexec -n {comm.size} {program} -n {args.replicas}"
    return experiment.run(
        args,
        data,
        optimizer,
        own,
        distributed.together(comm, open_report, comm.rank == 0, cli.Mistake),
        resumed,
        program,
        team=training.Team(part, ranks_per_replica, functools.partial(distributed.add, optimizer.team)),
        world=training.Team(
            comm.rank, comm.size, functools.partial(distributed.add, comm), functools.partial(distributed.gather, comm)
        ),
        ranks=comm.size,
        devices=distributed.gather(comm, cli.name(device)),
        mpi=distributed.library(),
        mpi4py=importlib.metadata.version("mpi4py"),
    )


def load(comm: "MPI.Comm", node: "MPI.Comm", args: argparse.Namespace) -> loader.Dataset:
    """The data. One rank downloads and pre-processes, then one of each node unless proc/ is shared; then all map it."""
    build = functools.partial(loader.load, args.dataset, args.data, args.proc, args.whiten)
    for here in (comm.rank == 0, node.rank == 0):
        distributed.together(comm, build, here, loader.DataError)
    return distributed.together(comm, build, True, loader.DataError)


if __name__ == "__main__":
    distributed.run(main)
