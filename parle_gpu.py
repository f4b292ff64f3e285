"""Parle on one host: one process trains all replicas, spread over its devices, and copies weights between them.

python parle_gpu.py -m allcnn                 # three replicas over every GPU of this host, or on its CPU
python parle_gpu.py -n 8 --device cuda:1      # eight on one GPU
python parle_gpu.py -n 2 --gpus-per-replica 4 # each data-parallel over four
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import DataParallel

from parle import distributed
from parle.optimizer import ParleBase
from parle.validation import check_buffers

if TYPE_CHECKING:
    from loader import Dataset


class Parle(ParleBase):
    """Parle with all its replicas in this process, each on its own device or several on one.

        replicas = [network().to(device) for device in devices]
        optimizer = Parle([replica.parameters() for replica in replicas], lr=0.1, batches_per_epoch=nb)
        for batches in zip(*loaders):
            optimizer.zero_grad()
            for replica, (inputs, targets) in zip(replicas, batches):
                F.cross_entropy(replica(inputs), targets).backward()
            optimizer.step()
        optimizer.copy_master_to(evaluation_model)

    All replicas start with the parameters of the first one, whose device holds the master. A synchronization sends one
    message of a replica's size from each other device to it, and one back.

    Args:
        replicas: for each replica, what any torch optimizer takes: parameters, named parameters or groups. Replicas
            may differ only in their device.
        buffers: for each replica, its model.buffers(), needed if they are random: all become the first one's.
        hyperparameters: lr, batches_per_epoch and the other arguments of `ParleBase`.

    Raises:
        ValueError: an invalid value, or replicas that differ.
        TypeError: the parameters of one model, not a list with the parameters of each.
    """

    def __init__(
        self, replicas: Iterable[Iterable[Any]], *, buffers: Iterable[Iterable[Tensor]] = (), **hyperparameters: Any
    ):
        replicas, groups = list(replicas), []
        for number, parameters in enumerate(replicas):
            is_named_parameter = isinstance(parameters, tuple) and isinstance((*parameters, None)[0], str)
            if is_named_parameter or isinstance(parameters, Tensor | nn.Module | dict | str):
                raise TypeError(
                    "These are the parameters of one model: pass a list with the parameters of each replica, "
                    "Parle([model.parameters()], ...)"
                )
            given = list(parameters)
            replica_groups = given if given and isinstance(given[0], dict) else [dict(params=given)]
            groups += [group | dict(replica=number) for group in replica_groups]
        given = list(buffers)
        if any(isinstance(own, Tensor) for own in given):
            raise TypeError("These are the buffers of one model: pass a list, [model.buffers(), ...]")
        tensors = {number: list(own) for number, own in enumerate(given)}
        for own in tensors.values():
            check_buffers(own)
        kinds = [[(tensor.shape, tensor.dtype) for tensor in own] for own in tensors.values()]
        if given and (len(given) != len(replicas) or any(kind != kinds[0] for kind in kinds)):
            raise ValueError(
                "Invalid buffers value: replicas differ in the number, shape or dtype of their buffers; pass "
                "[model.buffers(), ...] with one entry per replica"
            )
        super().__init__(groups, len(replicas), tensors, **hyperparameters)
        self._timer = DeviceTimer(self._master_replica.device)
        self.reset()

    @property
    def sync_seconds(self) -> float:
        return self._timer.seconds

    def _compare_settings(self) -> None:
        found = distributed.first_difference([self._settings(number) for number in self._replicas], "replica")
        if found:
            raise RuntimeError(f"{found}: schedule the groups of all replicas identically")

    def _sum_over_replicas(self) -> None:
        home = self._master_replica.message
        remote = [first.message for first in self._first_replica_on.values() if first is not self._master_replica]
        # Between GPUs with peer access copy_ is one transfer from memory to memory that does not block the host. torch
        # queues it on the current stream of the source, behind the computation of the message, and makes the current
        # streams of both devices wait: nothing is read too early or overwritten while it is still read.
        with self._timer:
            for message in remote:
                home.add_(torch.empty_like(home).copy_(message))
            for message in remote:
                message.copy_(home)


class DeviceTimer:
    """Accumulated seconds of `with timer:` blocks: wall-clock time on a CPU, time of the current stream elsewhere.

    The latter includes waiting for other devices; the host blocks only when `seconds` is read.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.total = 0.0
        self.pending: list[tuple[torch.Event, torch.Event]] = []

    def __enter__(self) -> None:
        while self.pending and self.pending[0][1].query():
            self._add_oldest()
        self.start = self._now()

    def __exit__(self, *_: Any) -> None:
        if self.device.type == "cpu":
            self.total += self._now() - self.start
        else:
            self.pending.append((self.start, self._now()))

    @property
    def seconds(self) -> float:
        while self.pending:
            self._add_oldest()
        return self.total

    def _add_oldest(self) -> None:
        start, stop = self.pending.pop(0)
        stop.synchronize()
        self.total += start.elapsed_time(stop) / 1e3

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))
        return event


def main() -> None:
    from parle import cli, doctor, signals
    from parle.checkpoint import CheckpointError

    parser = cli.build_parser("parle_gpu.py", "Parle on one host: replicas over its devices, in one process.")
    add = parser.add_argument_group("devices").add_argument
    add(
        "--gpus-per-replica",
        type=cli.positive_int,
        metavar="N",
        help="CUDA devices that share each mini-batch of a replica (default: all devices // -n)",
    )
    signals.ignore_sigusr1()
    try:
        given = cli.parse(parser)
        args = cli.complete(given, None)
        if args.doctor and not doctor.check_environment(args, mpi=False):
            sys.exit(1)
        status = 0 if run(given, args) else signals.EXIT_RESUMABLE
    except (cli.UsageError, cli.loader.DatasetError, FloatingPointError, CheckpointError) as error:
        cli.print_error(parser.prog, error)
        status = 1 if isinstance(error, FloatingPointError | CheckpointError) else 2
    if status:
        sys.exit(status)


def run(given: argparse.Namespace, args: argparse.Namespace) -> bool:
    """Train, or with --doctor print what training would take. Returns whether the run is complete.

    Args:
        given, args: the command line before and after `cli.complete`.
    """
    import loader
    from parle import cli, cores, doctor, experiment, launcher, training

    if launcher.has_several_ranks():
        raise cli.UsageError("one process trains all replicas: omit mpirun (or srun, torchrun), or use parle_mpi.py")
    training.disable_malloc_trim()
    devices = cli.find_devices(args.device)
    replica_devices = assign_devices(devices, args)
    if devices[0].type == "cpu":  # the number of threads of a rank, so that both programs round identically
        torch.set_num_threads(cores.threads_per_rank(cores.count_cores(), args.replicas))

    def load(args: argparse.Namespace) -> loader.Dataset:
        return doctor.synthetic_data(args) if args.doctor else loader.load(args.dataset, args.data, args.proc, args.zca)

    args, data = experiment.load_data(given, args, num_ranks=None, load=load, is_first_rank=True)
    idle = [str(device) for device in devices if not any(device in assigned for assigned in replica_devices)]
    try:
        return train(args, data, replica_devices, idle)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED")):
            raise
        vectors, batch = (size / 2**20 for size in estimate_memory(args, data))
        raise cli.UsageError(
            f"out of memory: each of {args.replicas} replicas of {args.model} takes {vectors:,.0f} MiB, and about "
            f"{batch:,.0f} MiB for a mini-batch of {args.batch_size}: use a smaller -b or -n, or --amp bf16"
        ) from error


def assign_devices(devices: list[torch.device], args: argparse.Namespace) -> list[list[torch.device]]:
    """Return the devices of each replica: consecutive ones, assigned round-robin; by default divided evenly.

    Raises:
        UsageError: --gpus-per-replica does not fit the devices or the mini-batch size.
    """
    from parle import cli

    requested = args.gpus_per_replica
    if requested not in (None, 1) and devices[0].type != "cuda":  # torch's DataParallel supports CUDA only
        raise cli.UsageError(
            f"--gpus-per-replica {requested} needs CUDA devices, and the device is {devices[0].type}: leave it out"
        )
    if requested is not None and requested > len(devices):
        raise cli.UsageError(f"--gpus-per-replica {requested}: use at most {len(devices)}, the number of devices")
    if requested is not None and not _gets_two_images_each(args.batch_size, requested):
        raise cli.UsageError(
            f"-b {args.batch_size} leaves fewer than 2 images for each of {requested} GPUs of a replica: "
            f"use -b {2 * requested}, a multiple of it, or a smaller --gpus-per-replica"
        )
    max_width = max(1, len(devices) // args.replicas) if devices[0].type == "cuda" else 1
    width = requested or next(
        width for width in range(max_width, 0, -1) if _gets_two_images_each(args.batch_size, width)
    )
    sets = [devices[start : start + width] for start in range(0, len(devices) - width + 1, width)]
    return [sets[replica % len(sets)] for replica in range(args.replicas)]


def _gets_two_images_each(batch_size: int, width: int) -> bool:
    """Return whether torch.chunk gives each of `width` devices at least 2 images, which batch norm needs."""
    chunk = -(-batch_size // width)
    return batch_size - (width - 1) * chunk >= 2


def train(
    args: argparse.Namespace, data: "Dataset", replica_devices: list[list[torch.device]], idle: list[str]
) -> bool:
    from parle import cli, doctor, launcher
    from parle.experiment import (
        Experiment,
        build_replica,
        describe_data,
        find_checkpoint,
        hyperparameters,
        open_logger,
    )

    copies = {device: data.to(device) for device in dict.fromkeys(devices[0] for devices in replica_devices)}
    replicas = []
    for number, devices in enumerate(replica_devices):
        replica = build_replica(args, copies[devices[0]], number)
        if len(devices) > 1:
            if args.amp == "bf16":  # DataParallel's threads start without it and would use float16
                replica.network.register_forward_pre_hook(lambda *_: torch.set_autocast_dtype("cuda", torch.bfloat16))
            network = DataParallel(replica.network, [device.index for device in devices])
            replica = replica._replace(network=network)
        replicas.append(replica)
    settings = hyperparameters(args, replicas[0].batches.per_epoch) | (doctor.SETTINGS if args.doctor else {})
    buffers = [replica.network.buffers() for replica in replicas]
    optimizer = Parle([replica.network.parameters() for replica in replicas], buffers=buffers, **settings)
    experiment = Experiment(args, copies[replica_devices[0][0]], optimizer, replicas)
    names = [" + ".join(map(cli.device_name, devices)) for devices in replica_devices]
    if args.doctor:
        return doctor.report_devices(experiment, names)
    resume = find_checkpoint(args, describe_data(data, experiment.batches_per_epoch))
    experiment.restore(resume)
    logger = open_logger(args, resume)
    program = f"{launcher.python_command()} {shlex.quote(sys.argv[0])}"
    return experiment.run(logger, resume, program, devices=names, idle_devices=idle)


def estimate_memory(args: argparse.Namespace, data: "Dataset") -> tuple[int, int]:
    """Return the bytes of one replica: its seven vectors, and what the forward pass of a mini-batch saves.

    Nothing is computed: the latter is counted on torch's meta device, without the workspace of kernels.
    """
    import models

    with torch.device("meta"):
        model = models.build(args.model, data.channels, data.size, data.classes, args.dropout)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    known = {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}
    saved = {}  # by storage address; holding the tensors keeps addresses from being reused

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model(torch.empty(args.batch_size, data.channels, data.size, data.size, device="meta"))
    batch = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in known)
    return 7 * 4 * parameters, batch


if __name__ == "__main__":
    from parle.streams import prepare_streams

    prepare_streams()
    main()
