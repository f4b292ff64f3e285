"""Parle on one host: one process holds the replicas, spread over its devices, and passes the weights between them.

python parle_gpu.py -m allcnn                 # three replicas over every GPU of this host, or on its CPU
python parle_gpu.py -n 8 --device cuda:1      # eight on one GPU
python parle_gpu.py -n 2 --gpus-per-replica 4 # each data-parallel over four
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import DataParallel

import loader
import models
from parle import cli, distributed, doctor, experiment, launcher, signals
from parle.checkpoint import CheckpointError
from parle.optimizer import ReplicaOptimizer


class Parle(ReplicaOptimizer):
    """Parle with all its replicas in this process, each on a device of its own or several on one.

        replicas = [network().to(device) for device in devices]
        optimizer = Parle([replica.parameters() for replica in replicas], lr=0.1, batches_per_epoch=nb)
        for batches in zip(*loaders):
            optimizer.zero_grad()
            for replica, (inputs, targets) in zip(replicas, batches):
                F.cross_entropy(replica(inputs), targets).backward()
            optimizer.step()
        optimizer.copy_master_to(evaluation_model)

    All replicas start with the first one's parameters. The master is kept on its device, the home. A synchronization
    sends one message of a replica's size from each other device there, and one back.

    Args:
        replicas: for each, what any torch optimizer takes: parameters, named ones or groups; alike but for the device.
        hyperparameters: lr, batches_per_epoch and whatever else `ReplicaOptimizer` lists.

    Raises:
        ValueError: an invalid value, or replicas that differ.
        TypeError: the parameters of one replica instead of a list of them.
    """

    def __init__(self, replicas: Iterable[Iterable[Any]], **hyperparameters: Any):
        replicas, groups = list(replicas), []
        for number, parameters in enumerate(replicas):
            named = isinstance(parameters, tuple) and isinstance((*parameters, None)[0], str)
            if named or isinstance(parameters, Tensor | nn.Module | dict | str):
                raise TypeError("Give a list with the parameters of each replica: Parle([model.parameters()], …)")
            given = list(parameters)
            own = given if given and isinstance(given[0], dict) else [dict(params=given)]
            groups += [group | dict(replica=number) for group in own]
        super().__init__(groups, len(replicas), **hyperparameters)
        self._stopwatch = Stopwatch(self._home.device)

    @property
    def sync_seconds(self) -> float:
        return self._stopwatch.seconds

    def _mean_messages(self) -> None:
        first, *others = ([g["lr"] for g in self.param_groups if g["replica"] == a] for a in range(self.num_replicas))
        if any(lrs != first for lrs in others):
            raise RuntimeError(f"lr is {first} for replica 0 and not for all others: schedule it alike for every group")
        home = self._messages[self._home.device]
        away = [message for message in self._messages.values() if message is not home]
        # Between GPUs that reach each other copy_ is one transfer from memory to memory, and the host does not wait for
        # it. torch queues it on the current stream of the source, behind what computed the message, and makes the
        # current streams of both devices wait: nothing is read too early or written while it is still read.
        with self._stopwatch:
            for message in away:
                home.add_(torch.empty_like(home).copy_(message))
            home.div_(self.num_replicas)
            for message in away:
                message.copy_(home)


class Stopwatch:
    """Seconds that pass within `with stopwatch:`, on the CPU by the clock, elsewhere in the device's current stream.

    There they include waiting for other devices, and the host waits only when `seconds` is read.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.total = 0.0
        self.pending: list[tuple[torch.Event, torch.Event]] = []

    def __enter__(self) -> None:
        while self.pending and self.pending[0][1].query():
            self._settle()
        self.start = self._mark()

    def __exit__(self, *_: Any) -> None:
        if self.device.type == "cpu":
            self.total += self._mark() - self.start
        else:
            self.pending.append((self.start, self._mark()))

    @property
    def seconds(self) -> float:
        while self.pending:
            self._settle()
        return self.total

    def _settle(self) -> None:
        start, stop = self.pending.pop(0)
        stop.synchronize()
        self.total += start.elapsed_time(stop) / 1e3

    def _mark(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))
        return event


def main() -> None:
    parser = cli.parser("parle_gpu.py", "Parle on one host: replicas over its devices, in one process.")
    add = parser.add_argument_group("the devices").add_argument
    add(
        "--gpus-per-replica",
        type=cli.COUNT,
        metavar="N",
        help="CUDA devices that share each one's mini-batches (all there are // -n)",
    )
    signals.await_training()
    try:
        given = cli.parse(parser)
        if given.doctor and not doctor.examine(given, mpi=False):
            sys.exit(1)
        status = 0 if run(given) else signals.STOPPED
    except (cli.Mistake, loader.DataError, FloatingPointError, CheckpointError) as error:
        cli.tell(parser.prog, error)
        status = 1 if isinstance(error, FloatingPointError | CheckpointError) else 2
    if status:
        sys.exit(status)


def run(given: argparse.Namespace) -> bool:
    """Train as the arguments say, or only tell what that would take. Returns whether the run has come to its end."""
    if (launcher.launched() or (0, 1))[1] != 1:
        raise cli.Mistake("one process holds all replicas: no mpirun, or mpirun -n 3 python parle_mpi.py")
    args = cli.resolve(given, None)
    cli.check(args, None)
    devices = cli.devices(args.device)
    places = spread(devices, args)
    if devices[0].type == "cpu":  # as many as a rank would have, so that both programs round alike
        torch.set_num_threads(distributed.threads(len(distributed.cores()), args.replicas))
    args, data = experiment.load(given, size=None, read=doctor.synthetic if given.doctor else read, first=True)
    try:
        return train(
            args, data, places, idle=[str(device) for device in devices if not any(device in place for place in places)]
        )
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED")):
            raise
        vectors, batch = (size / 2**20 for size in memory(args, data))
        raise cli.Mistake(
            f"out of memory: each of {args.replicas} replicas of {args.model} takes {vectors:,.0f} MiB, and about "
            f"{batch:,.0f} MiB for a mini-batch of {args.batch_size}: use a smaller -b or -n, or --amp bf16"
        ) from error


def spread(devices: list[torch.device], args: argparse.Namespace) -> list[list[torch.device]]:
    """Each replica's devices: neighbours, dealt round, by default as many as there are for each. Raises: Mistake."""
    asked = args.gpus_per_replica
    if asked not in (None, 1) and devices[0].type != "cuda":  # all that torch's DataParallel knows
        raise cli.Mistake(f"--gpus-per-replica {asked} needs CUDA devices, and this is {devices[0].type}: leave it out")
    if asked is not None and asked > len(devices):
        raise cli.Mistake(f"--gpus-per-replica {asked}: there are {len(devices)}, use that or less")
    if asked is not None and not _divides(args.batch_size, asked):
        raise cli.Mistake(
            f"-b {args.batch_size} does not give each of {asked} GPUs of a replica 2 images: use -b {2 * asked}, "
            "a multiple of it, or a smaller --gpus-per-replica"
        )
    most = max(1, len(devices) // args.replicas) if devices[0].type == "cuda" else 1
    width = asked or next(width for width in range(most, 0, -1) if _divides(args.batch_size, width))
    teams = [devices[start : start + width] for start in range(0, len(devices) - width + 1, width)]
    return [teams[replica % len(teams)] for replica in range(args.replicas)]


def _divides(batch_size: int, width: int) -> bool:
    """Whether each of `width` devices gets 2 images or more, as torch.chunk divides them: batch norm needs two."""
    chunk = -(-batch_size // width)
    return batch_size - (width - 1) * chunk >= 2


def read(args: argparse.Namespace) -> loader.Dataset:
    return loader.load(args.dataset, args.data, args.proc, args.whiten)


def train(args: argparse.Namespace, data: loader.Dataset, places: list[list[torch.device]], idle: list[str]) -> bool:
    copies = {device: data.to(device) for device in dict.fromkeys(devices[0] for devices in places)}
    replicas = {}
    for number, devices in enumerate(places):
        own = copies[devices[0]]
        model = experiment.model(args, own)
        if len(devices) > 1:
            if args.amp == "bf16":  # DataParallel's threads start without it, and would take float16
                model.register_forward_pre_hook(lambda *_: torch.set_autocast_dtype("cuda", torch.bfloat16))
            model = DataParallel(model, [device.index for device in devices])
        replicas[number] = model, experiment.batches(args, own, number)
    settings = experiment.hyperparameters(args, replicas[0][1].per_epoch) | (doctor.STILL if args.doctor else {})
    optimizer = Parle([model.parameters() for model, _ in replicas.values()], **settings)
    where = [" + ".join(map(cli.name, devices)) for devices in places]
    if args.doctor:
        return doctor.over_devices(args, optimizer, list(replicas.values()), where)
    resumed = experiment.find_checkpoint(args)
    experiment.restore(args, resumed, optimizer, replicas)
    return experiment.run(
        args,
        copies[places[0][0]],
        optimizer,
        replicas,
        experiment.open_report(args, resumed),
        resumed,
        f"{launcher.python()} {shlex.quote(sys.argv[0])}",
        devices=where,
        idle=idle,
    )


def memory(args: argparse.Namespace, data: loader.Dataset) -> tuple[int, int]:
    """Bytes of one replica: seven vectors, as the README counts them, and what a mini-batch's forward pass keeps.

    Nothing is computed: the second is counted on torch's meta device, without the workspace that kernels use.
    """
    with torch.device("meta"):
        model = models.build(args.model, data.channels, data.size, data.classes, args.dropout)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    known = {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}
    kept = {}  # by storage, and so kept alive: a freed one's address would come again

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.empty(args.batch_size, data.channels, data.size, data.size, device="meta"))
    batch = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in known)
    return 7 * 4 * parameters, batch


if __name__ == "__main__":
    main()
