"""Parle over MPI: each rank, or group of ranks, trains a replica; one allreduce per round couples them.

python parle_mpi.py -n 3                      # starts its own three ranks
mpirun -n 12 python parle_mpi.py              # 12 replicas
mpirun -n 12 python parle_mpi.py -n 3         # 3 replicas, each data-parallel over 4 ranks
torchrun --nproc-per-node 3 parle_mpi.py      # over gloo or NCCL in place of MPI
"""

import argparse
import contextlib
import datetime
import faulthandler
import functools
import importlib.metadata
import numbers
import os
import shlex
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parle import distributed
from parle.algorithm import round_message
from parle.distributed import CollectiveTimeout, Group, Groups, MPIGroup, TorchGroup, group_of
from parle.flat_replica import CHECKSUM, FlatReplica
from parle.optimizer import ParleBase
from parle.validation import check_buffers

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch.distributed import ProcessGroup

    from loader import Dataset


class Parle(ParleBase):
    """Parle with its replicas on MPI ranks: every L-th `step()` performs one allreduce of one flat vector.

        for inputs, targets in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        optimizer.copy_master_to(evaluation_model)

    The constructor is collective and broadcasts rank 0's parameters. The master is the same on every rank.

    Args:
        params: as for any torch optimizer; float32 (or all float64) and on one device.
        comm: all ranks of all replicas: an MPI communicator, of which Parle uses a duplicate, or a process group of
            torch.distributed.
        replicas: number of replicas; default: one per rank. With fewer, groups of neighboring
            ranks share a replica, data-parallel: `step()` averages their gradients before its update.
        buffers: model.buffers(), needed if they are random: rank 0's are broadcast too.
        message_dtype: torch.float16 or torch.bfloat16 halves the bytes that a synchronization sends: ranks send their
            difference from the master, rounded, and add the rounding error to the next message. Default: the
            parameters' dtype.
        timeout: seconds that a rank waits for others before it raises CollectiveTimeout, which names them.
        hyperparameters: lr, batches_per_epoch and the other arguments of `ParleBase`.

    Raises:
        ValueError: an invalid value on any rank, one that differs between ranks, or a process group that cannot send
            tensors of the parameters' device.
        OSError: a launcher started several ranks, but MPI sees one. Pass COMM_SELF for independent runs.
    """

    def __init__(
        self,
        params: Iterable[Any],
        comm: "MPI.Comm | ProcessGroup",
        *,
        replicas: int | None = None,
        buffers: Iterable[Tensor] = (),
        message_dtype: torch.dtype | None = None,
        timeout: float = 1800.0,
        **hyperparameters: Any,
    ):
        given = group_of(comm, timeout)
        if given.size == 1 and not distributed.is_process_group(comm):
            _check_number_of_ranks(comm)
        replicas = given.size if replicas is None else replicas
        world = self._free_with_optimizer(given.duplicate())
        initialize = super().__init__

        def build() -> None:
            if not (isinstance(replicas, numbers.Integral) and replicas >= 1 and world.size % replicas == 0):
                raise ValueError(
                    f"Invalid replicas value: {replicas}; use a divisor of the number of ranks, {world.size}"
                )
            if not timeout > 0:
                raise ValueError(f"Invalid timeout value: {timeout}; use a number of seconds above 0")
            if message_dtype not in (None, torch.float16, torch.bfloat16):
                raise ValueError(
                    f"Invalid message_dtype value: {message_dtype}; use torch.float16, torch.bfloat16 or None"
                )
            self.message_dtype = message_dtype
            self.ranks_per_replica = world.size // replicas
            self.replica_number, self.rank_in_replica = divmod(world.rank, self.ranks_per_replica)
            own_buffers = list(buffers)
            check_buffers(own_buffers)
            initialize(params, replicas, {self.replica_number: own_buffers}, **hyperparameters)
            device = self._master_replica.device
            if device.type == "cpu" and not world.accepts(device):
                raise ValueError(
                    "Invalid comm value: this process group has no backend for the CPU, where the parameters are: move "
                    "the model to the GPU first, or use init_process_group('cpu:gloo,cuda:nccl')"
                )

        world.run_and_propagate_errors(build, Exception)
        world.check_consistent(
            dict(
                **dict(replicas=replicas, timeout=timeout, message_dtype=message_dtype, groups=len(self.param_groups)),
                **self._layout(),
            )
        )
        # a separate communicator even for all ranks: a gradient must not match a synchronization's message
        shares_replica = self.ranks_per_replica > 1
        replica = self._free_with_optimizer(world.split(self.replica_number)) if shares_replica else Group()
        self.groups = Groups(replica, world)
        # The MPI libraries on PyPI are not CUDA-aware, nor is gloo: messages are staged in host memory, pinned for
        # CUDA's copies
        message, self._staging = self._master_replica.message, None
        if not world.accepts(message.device):
            self._staging = torch.empty_like(message, device="cpu", pin_memory=message.is_cuda)
        self.reset()

    def _free_with_optimizer(self, group: Group) -> Group:
        """Release the group's communicator together with the optimizer."""
        weakref.finalize(self, group.release).atexit = False  # at exit, MPI frees it
        return group

    def _layout(self) -> dict[str, Any]:
        """Return the shapes, dtypes, strides and settings that must be equal on all ranks, by name."""
        replica = self._master_replica
        tensors = dict(parameters=replica.parameters, frozen_parameters=replica.frozen, buffers=replica.buffers)
        layout = {
            f"{name} (shape and dtype)": [(tuple(tensor.shape), str(tensor.dtype)) for tensor in group]
            for name, group in tensors.items()
        }
        return layout | dict(strides=replica.strides) | self._settings(self.replica_number)

    @contextlib.contextmanager
    def _named_timeout(self, occasion: str) -> Iterator[None]:
        """Add the call and the round to a CollectiveTimeout."""
        try:
            yield
        except CollectiveTimeout as error:
            raise CollectiveTimeout(f"In {occasion} of round {self.rounds_done + 1}, {error}") from None

    def _broadcast_replica(self, number: int) -> FlatReplica:
        for tensor in self._master_replica.replicated_tensors:
            source = tensor.detach()
            flat = (source.clone() if self.groups.world.accepts(source.device) else source.cpu()).contiguous().view(-1)
            is_known = flat.dtype in (torch.float32, torch.float64)  # to MPI, which has no bfloat16
            data = flat if is_known else flat.view(torch.uint8)
            with self._named_timeout("reset()"):
                self.groups.world.broadcast(data, root=number * self.ranks_per_replica)
            tensor.copy_(flat.view(tensor.shape))
        return self._master_replica

    def _any_process(self, flag: bool) -> bool:
        with self._named_timeout("the first step"):
            return any(self.groups.world.all_gather(flag))

    def _compare_settings(self) -> None:
        with self._named_timeout("the comparison of settings"):
            settings = self.groups.world.all_gather(self._settings(self.replica_number))
        found = distributed.first_difference(settings)
        if found:
            raise RuntimeError(f"{found}: use the same settings and schedule on every rank")

    def _average_gradient(self, replica: FlatReplica) -> None:
        if self.ranks_per_replica > 1:
            with self._named_timeout(f"step {self.step_in_round + 1}"):
                self._all_reduce(self.groups.replica, replica.gradient)
            replica.gradient.div_(self.ranks_per_replica)

    def _sum_over_replicas(self) -> None:
        with self._named_timeout("the synchronization"):
            replica = self._master_replica
            self._all_reduce(self.groups.world, replica.message if self.num_replicas > 1 else replica.tail)

    def _sum_averages(self) -> None:
        if self.message_dtype is None or self.num_replicas == 1:
            super()._sum_averages()
            return
        world, replica, master = self.groups.world, self._master_replica, self._master
        error = replica.state["message_error"]
        is_finite = replica.rows[world.rank, CHECKSUM] > 0  # otherwise the average has been replaced by zeros
        with self._named_timeout("the synchronization"):
            self._all_reduce(world, replica.tail)
            message = round_message(replica.gradient.sub_(master * is_finite), error, self.message_dtype)
            start = time.perf_counter()
            total, own, own_error = world.all_reduce_rounded(message if self._staging is None else message.cpu())
            self._status.sync_seconds += time.perf_counter() - start
        error[own] += own_error.to(error.device)
        replica.gradient.copy_(total).add_(master * (replica.rows[:, CHECKSUM] > 0).sum())

    def _all_reduce(self, group: Group, vector: Tensor) -> None:
        if group.size == 1:
            return
        if self._staging is not None:
            torch.accelerator.synchronize(vector.device)  # so that pending computation does not count as communication
        start = time.perf_counter()
        host = vector
        if self._staging is not None:
            host = self._staging[: len(vector)]
            host.copy_(vector)  # blocks until the copy is complete, so MPI reads the result
        group.all_reduce(host)
        if host is not vector:
            vector.copy_(host)
        self._status.sync_seconds += time.perf_counter() - start


def _check_number_of_ranks(comm: "MPI.Comm") -> None:
    """Check that MPI sees the ranks that a launcher has started: else each would train alone. Raises: OSError."""
    from mpi4py import MPI

    from parle import launcher

    if MPI.COMM_WORLD.size == 1 and comm != MPI.COMM_SELF:  # which is for independent runs
        launcher.check_mpi(MPI.Get_library_version())
        launcher.check_number_of_ranks(1)


def main() -> None:
    from parle import signals

    signals.ignore_sigusr1()  # before the other imports, which take time
    from parle import cli, doctor, launcher, supervision
    from parle.checkpoint import CheckpointError

    parser = cli.build_parser("parle_mpi.py", "Parle over MPI: replicas on ranks, coupled by one allreduce per round.")
    parser.add_argument_group("ranks").add_argument(
        "--max-restarts",
        type=cli.nonnegative_int,
        default=0,
        metavar="N",
        help="restart all ranks from the newest checkpoint, at most N times, if one is killed or raises an exception; "
        "only ranks that this program has started (default: %(default)s)",
    )
    world = None
    try:
        launched = launcher.rank_from_environment()
        given = None
        # --doctor reports before MPI starts, which may fail
        if launched is None or ("--doctor" in sys.argv and not launcher.is_started_by_parle()):
            given = cli.parse(parser)
            args = cli.complete(given, launched and launched[1])
            if given.doctor and not launcher.is_started_by_parle() and not doctor.check_environment(args, mpi=True):
                sys.exit(1)
            if launched is None:
                with cli.launcher_errors():
                    status = supervision.spawn_ranks(args.replicas, args.max_restarts)
                if status is not None:
                    sys.exit(status)
        world = world_group()
        if given is None:
            restarted = any(world.all_gather(launcher.was_restarted()))  # torchrun counts on each node separately
            parse = functools.partial(cli.parse, parser, restarted)
            given = world.run_and_propagate_errors(parse, cli.UsageError)
        status = 0 if run(given, world) else signals.EXIT_RESUMABLE
    except (
        cli.UsageError,
        distributed.SettingsMismatch,
        cli.loader.DatasetError,
        FloatingPointError,
        CheckpointError,
    ) as error:
        cli.print_error(parser.prog, error)
        status = 1 if isinstance(error, FloatingPointError | CheckpointError) else 2
    if status and world is not None:
        world.all_gather(None)  # every rank has the same error, and none exits before the first has printed it
        world.close()
    if status:
        sys.exit(status)


def world_group() -> MPIGroup | TorchGroup:
    """Start MPI, or torch.distributed under torchrun, and return the group of all ranks. Raises: UsageError."""
    from parle import cli, launcher, supervision

    if launcher.launcher_name() == launcher.TORCHRUN:
        return torch_world_group()
    import mpi4py

    os.environ.setdefault("UCX_DEBUG_SIGNO", "0")  # in MPICH's wheel; otherwise MPI would take over SIGHUP
    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True  # so that importing MPI does not start it
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise cli.UsageError(f"mpi4py cannot load an MPI library ({error}): pip install mpich") from error
    with cli.launcher_errors():
        launcher.check_mpi(MPI.Get_library_version())
        if not MPI.Is_initialized():
            # MPI may wait forever, for ranks that never start or on shared memory that killed ranks have left
            faulthandler.dump_traceback_later(supervision.START_TIMEOUT, exit=True)
            MPI.Init_thread()
            faulthandler.cancel_dump_traceback_later()
        launcher.check_number_of_ranks(MPI.COMM_WORLD.size)
    return MPIGroup(MPI.COMM_WORLD)


def torch_world_group() -> TorchGroup:
    """Start torch.distributed and return the group of all ranks that torchrun has started."""
    from parle import cli, supervision

    limit = datetime.timedelta(seconds=supervision.START_TIMEOUT)
    try:
        store, rank, size = next(torch.distributed.rendezvous("env://", timeout=limit))
    except RuntimeError as error:
        raise cli.UsageError(
            f"the other ranks of torchrun cannot be reached ({str(error).splitlines()[0]}): start the program with "
            "torchrun, or unset RANK and WORLD_SIZE"
        ) from error
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if ranks_here == size:  # several nodes may count restarts differently
        # the store still has the addresses of ranks that have failed: pytorch/pytorch#135712
        store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # NCCL needs a GPU for each rank. --timeout limits each wait, but none while one rank downloads data
    backend = "cpu:gloo,cuda:nccl" if ranks_here <= torch.cuda.device_count() else "gloo"
    own = dict(store=store, rank=rank, world_size=size, timeout=datetime.timedelta(days=30))
    torch.distributed.init_process_group(backend, **own)
    return TorchGroup(torch.distributed.group.WORLD)


def run(given: argparse.Namespace, world: MPIGroup | TorchGroup) -> bool:
    """Train, or with --doctor print what training would take. Returns whether the run is complete. Collective."""
    from parle import cli, cores, doctor, launcher, training
    from parle.experiment import (
        Experiment,
        build_replica,
        describe_data,
        find_checkpoint,
        hyperparameters,
        load_data,
        open_logger,
    )

    machine_specific = {"data", "proc", "out", "device"}
    world.check_consistent({name: value for name, value in vars(given).items() if name not in machine_specific})
    world.timeout = given.timeout
    node = world.split_by_node()
    num_cores = cores.count_cores(node)

    def complete() -> tuple[argparse.Namespace, list[torch.device]]:
        if given.max_restarts and not launcher.is_started_by_parle():
            raise cli.UsageError("--max-restarts works only for ranks that this program starts itself: omit it")
        args = cli.complete(given, world.size)
        return args, cli.find_devices(args.device)

    args, devices = world.run_and_propagate_errors(complete, cli.UsageError)
    training.disable_malloc_trim()
    torch.set_num_threads(cores.threads_per_rank(num_cores, node.size))
    device = devices[node.rank % len(devices)]
    load = doctor.synthetic_data if args.doctor else functools.partial(load_shared, world, node)
    args, data = load_data(given, args, num_ranks=world.size, load=load, is_first_rank=world.rank == 0)
    data = data.to(device)

    ranks_per_replica = world.size // args.replicas
    number, shard = divmod(world.rank, ranks_per_replica)
    replica = build_replica(args, data, number, (shard, ranks_per_replica))
    settings = hyperparameters(args, replica.batches.per_epoch) | (doctor.SETTINGS if args.doctor else {})
    network = replica.network
    own = dict(replicas=args.replicas, buffers=network.buffers(), timeout=args.timeout)
    comm = world.comm
    if isinstance(world, TorchGroup):  # NCCL has no other time limit than that of its group
        comm = torch.distributed.new_group(timeout=distributed.time_limit(args.timeout))
    optimizer = Parle(network.parameters(), comm, **own, **settings)
    experiment = Experiment(args, data, optimizer, [replica], optimizer.groups)
    hosts = cores.describe_hosts(world, node, torch.get_num_threads())
    if args.doctor:
        return doctor.report_ranks(experiment, device, hosts)

    is_first = world.rank == 0
    find = functools.partial(find_checkpoint, args, describe_data(data, experiment.batches_per_epoch))
    resume = world.run_and_propagate_errors(find, cli.UsageError, only_if=is_first)
    resume = world.all_gather(resume)[0]
    world.run_and_propagate_errors(functools.partial(experiment.restore, resume), cli.UsageError)
    open_log = functools.partial(open_logger, args, resume)
    logger = world.run_and_propagate_errors(open_log, cli.UsageError, only_if=is_first)
    script, program = shlex.quote(sys.argv[0]), f"{launcher.python_command()} {shlex.quote(sys.argv[0])}"
    if not launcher.is_started_by_parle() and world.size > 1:
        program = f"{launcher.launch_command(world.size)} {script} -n {args.replicas}"
    return experiment.run(
        logger,
        resume,
        program,
        num_ranks=world.size,
        hosts=hosts,
        devices=world.all_gather(cli.device_name(device)),
        mpi=world.library(),
        mpi4py=importlib.metadata.version("mpi4py") if isinstance(world, MPIGroup) else None,
    )


def load_shared(world: Group, node: Group, args: argparse.Namespace) -> "Dataset":
    """Return the data set. One rank pre-processes it, then one per node unless proc/ is shared; then all map it.

    Downloading and pre-processing may take longer than --timeout.
    """
    import loader

    load = functools.partial(loader.load, args.dataset, args.data, args.proc, args.zca)
    with world.unlimited():
        for is_turn in (world.rank == 0, node.rank == 0):
            world.run_and_propagate_errors(load, loader.DatasetError, only_if=is_turn)
    return world.run_and_propagate_errors(load, loader.DatasetError)


if __name__ == "__main__":
    from parle.rank_exit import run_or_abort
    from parle.streams import prepare_streams

    prepare_streams()
    run_or_abort(main)
