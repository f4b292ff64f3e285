"""Parle on one host: one process holds the replicas, spread over its devices, and passes the weights between them.

python parle_gpu.py -m allcnn                 # three replicas over every GPU of this host, or on its CPU
python parle_gpu.py -n 8 --device cuda:1      # eight on one GPU
python parle_gpu.py -n 2 --gpus-per-replica 4 # each data-parallel over four
"""

import argparse
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import experiment
import interrupts
import launch
import loader
import models
import options
from optimizer import ReplicaOptimizer


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
            named = isinstance(parameters, tuple) and isinstance(parameters[0], str)
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
        # Between GPUs that reach each other copy_ is one transfer from memory to memory. torch queues it on the current
        # stream of the source, behind what computed the message, and makes the target's current stream wait for it:
        # nothing here waits on the host, and nothing is read too early.
        with self._stopwatch:
            for message in away:
                home.add_(torch.empty_like(home).copy_(message, non_blocking=True))
            home.div_(self.num_replicas)
            for message in away:
                message.copy_(home, non_blocking=True)


class Stopwatch:
    """Seconds that pass within `with stopwatch:`, on the CPU by the clock, elsewhere in the device's current stream.

    There they include waiting for other devices. The host waits for the last of them to end when `seconds` is read and
    when the next one begins, a round later.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Any] = []
        self.total = 0.0

    def __enter__(self) -> None:
        self.total = self.seconds  # of the last time, long over
        self.marks = [self._mark()]

    def __exit__(self, *_: Any) -> None:
        self.marks.append(self._mark())

    @property
    def seconds(self) -> float:
        if not self.marks:
            return self.total
        start, stop = self.marks
        if self.device.type == "cpu":
            return self.total + stop - start
        stop.synchronize()
        return self.total + start.elapsed_time(stop) / 1e3

    def _mark(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))
        return event


def main() -> None:
    parser = options.parser("parle_gpu.py", "Parle on one host: replicas over its devices, in one process.")
    add = parser.add_argument_group("the devices").add_argument
    add("--gpus-per-replica", type=options.COUNT, metavar="N", help="that share its batches (all there are, over -n)")
    try:
        status = 0 if run(options.parse(parser)) else interrupts.STOPPED
    except (options.Mistake, loader.DataError, FloatingPointError) as error:
        options.tell(parser.prog, error)
        status = 1 if isinstance(error, FloatingPointError) else 2
    sys.exit(status)


def run(given: argparse.Namespace) -> bool:
    """Train as the arguments say. Returns whether the run has come to its end."""
    if (launch.launched() or (0, 1))[1] != 1:
        raise options.Mistake("this is one process for all replicas: start it without a launcher, or parle_mpi.py")
    args = options.resolve(given, None)
    options.check(args, None)
    places = spread(options.devices(args.device), args)
    args, data = experiment.load(given, None, read, True)
    try:
        return train(args, data, places)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        vectors, batch = (size / 2**30 for size in memory(args, data))
        raise options.Mistake(
            f"out of memory: a replica of {args.model} takes {vectors:.2f} GiB and about {batch:.2f} GiB for a "
            f"mini-batch of {args.batch_size}: use a smaller -b, a smaller -n or --amp bf16"
        ) from error


def spread(devices: list[torch.device], args: argparse.Namespace) -> list[list[torch.device]]:
    """Each replica's devices: as many neighbours as there are to share out, dealt round. Raises: Mistake."""
    width = args.gpus_per_replica or max(1, len(devices) // args.replicas)
    if width > len(devices):
        raise options.Mistake(f"--gpus-per-replica {width} is more than there are: use {len(devices)} or less")
    part = -(-args.batch_size // width)  # as torch.chunk divides it; the last one has what is left
    if (args.batch_size - 1) % part + 1 < 2:
        raise options.Mistake(
            f"-b {args.batch_size} leaves less than 2 images for one of {width} GPUs of a replica: use -b {2 * width}"
        )
    teams = [devices[start : start + width] for start in range(0, len(devices) - width + 1, width)]
    return [teams[replica % len(teams)] for replica in range(args.replicas)]


def read(args: argparse.Namespace) -> loader.Dataset:
    return loader.load(args.dataset, args.data, args.proc, args.whiten)


def train(args: argparse.Namespace, data: loader.Dataset, places: list[list[torch.device]]) -> bool:
    copies = {device: data.to(device) for device in dict.fromkeys(devices[0] for devices in places)}
    replicas = {}
    for number, devices in enumerate(places):
        own = copies[devices[0]]
        model = experiment.model(args, own)
        if len(devices) > 1:
            model = nn.DataParallel(model, [device.index for device in devices])
        replicas[number] = model, experiment.batches(args, own, number)
    settings = experiment.hyperparameters(args, replicas[0][1].per_epoch)
    optimizer = Parle([model.parameters() for model, _ in replicas.values()], **settings)
    resumed = experiment.find_checkpoint(args)
    experiment.restore(args, resumed, optimizer, list(replicas), replicas[0][1].per_epoch)
    return experiment.run(
        args,
        copies[places[0][0]],
        optimizer,
        replicas,
        experiment.open_report(args, resumed),
        resumed,
        "python parle_gpu.py",
        devices=[" + ".join(map(options.name, devices)) for devices in places],
    )


def memory(args: argparse.Namespace, data: loader.Dataset) -> tuple[int, int]:
    """Bytes of one replica: its seven vectors, and what the forward pass of a mini-batch keeps for the backward pass.

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
