"""One experiment, as the command line says: its data, its replicas, its events. Knows nothing of who communicates."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import loader
import models
from parle import checkpoint, cli, fault_injection, launcher, signals, training
from parle.logger import Report, surroundings
from parle.optimizer import ReplicaOptimizer


def load(
    given: argparse.Namespace, *, size: int | None, read: Callable[[argparse.Namespace], loader.Dataset], first: bool
) -> tuple[argparse.Namespace, loader.Dataset]:
    """The arguments resolved for `size` ranks, and the data that `read` gives for them.

    They are digits where nobody asked for a data set and the usual one cannot be downloaded; the `first` rank says so.
    """
    args = cli.resolve(given, size)
    try:
        return args, read(args)
    except loader.Unreachable as error:
        if given.dataset or given.data:
            raise
        if first:
            print(
                f"WARNING: training on digits, scikit-learn's 8 x 8 images, instead of {args.dataset}: {error}",
                flush=True,
            )
    args = cli.resolve(argparse.Namespace(**vars(given) | dict(dataset="digits")), size)
    return args, read(args)


def model(args: argparse.Namespace, data: loader.Dataset) -> nn.Module:
    """The network as every replica starts with it, where the data is."""
    torch.manual_seed(args.seed)
    return models.build(args.model, data.channels, data.size, data.classes, args.dropout).to(data.train_labels.device)


def batches(
    args: argparse.Namespace, data: loader.Dataset, replica: int, part: tuple[int, int] = (0, 1)
) -> loader.Batches:
    """Those of one replica, or of a part of it."""
    return loader.Batches(
        data,
        batch_size=args.batch_size,
        seed=args.seed,
        replica=replica,
        replicas=args.replicas,
        frac=args.frac,
        augment=args.augment,
        part=part,
    )


def hyperparameters(args: argparse.Namespace, batches_per_epoch: int) -> dict[str, Any]:
    """What both Parle classes take."""
    names = ("lr", "momentum", "weight_decay", "sync_every", "gamma", "rho", "alpha", "outer_step", "outer_momentum")
    return {name: getattr(args, name) for name in names} | dict(batches_per_epoch=batches_per_epoch)


class Resumed(NamedTuple):
    """The checkpoint that a run goes on from."""

    path: Path
    manifest: dict[str, Any]
    changes: dict[str, tuple[Any, Any]]  # arguments that are not what they were: what they were and what they are


# Arguments that may change without a word: they are of the machine and of what is told, not of what is trained
MACHINE = {
    *("data", "proc", "out", "device", "gpus_per_replica", "timeout"),
    *("resume", "checkpoint_every", "eval_every", "on_nan", "doctor"),
}


def find_checkpoint(args: argparse.Namespace) -> Resumed | None:
    """What --resume names, its newest good one if that is a folder of several. Raises: Mistake."""
    if args.resume is None:
        return None
    try:
        paths = [args.resume] if os.path.exists(args.resume / checkpoint.MANIFEST) else checkpoint.found(args.resume)
        path, manifest, complaints = checkpoint.newest(paths)
    except checkpoint.CheckpointError as error:
        raise cli.Mistake(f"--resume: {error}") from error
    for complaint in complaints:
        print(f"WARNING: {complaint}; taking the one before", flush=True)
    was, now = manifest["arguments"], json.loads(json.dumps(_plain(args)))
    changes = {name: (was[name], now[name]) for name in was if name not in MACHINE and was[name] != now.get(name)}
    return Resumed(path, manifest, changes)


def restore(
    args: argparse.Namespace,
    resumed: Resumed | None,
    optimizer: ReplicaOptimizer,
    replicas: dict[int, tuple[nn.Module, loader.Batches]],
    part: int = 0,
) -> None:
    """Put the checkpoint into the optimizer and the networks of the replicas that live here, by number.

    `part` is which of a replica's ranks this is. Nothing of the run's folder has been touched yet. Raises: Mistake.
    """
    if resumed is None:
        return
    networks, sources = zip(*replicas.values(), strict=True)
    per_epoch = sources[0].per_epoch
    try:
        checkpoint.load(resumed.path, resumed.manifest, optimizer, list(replicas), networks, part)
    except checkpoint.CheckpointError as error:
        raise cli.Mistake(f"--resume: {error}") from error
    if {"lr", "lr_drops", "lr_decay", "batch_size", "frac"} & resumed.changes.keys():
        passed = sum(drop <= optimizer.rounds for drop in training.drop_rounds(args.lr_drops, per_epoch))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * args.lr_decay**passed
    if optimizer.rounds >= training.count_rounds(args.epochs, per_epoch):
        raise cli.Mistake(f"--resume: {resumed.path} is the end of its run: -B with more than {args.epochs:g} goes on")


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def open_report(args: argparse.Namespace, resumed: Resumed | None) -> Report:
    """In --out or a new folder below runs/. Raises: Mistake."""
    label = f"{args.model} on {args.dataset}"
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{args.model}-{args.dataset}"
    try:
        if args.out is not None:
            own = resumed is not None and resumed.path.parent.resolve() == (args.out / checkpoint.FOLDER).resolve()
            report = Report(args.out, label, resumed.manifest["log_bytes"] if own else None)
            if own:
                checkpoint.put_aside_later(resumed.path, resumed.manifest["counters"])
            return report
        for suffix in ("", *(f"-{i}" for i in range(2, 100))):  # runs may start in the same second
            with contextlib.suppress(FileExistsError):
                return Report(Path("runs") / f"{name}{suffix}", label)
        raise FileExistsError(f"runs/{name}")
    except OSError as error:
        raise cli.Mistake(f"--out: {error}; name a new folder") from error


@contextlib.contextmanager
def _told_how_to_resume(optimizer: ReplicaOptimizer, folder: Path | None, resume: str) -> Iterator[None]:
    """What goes wrong within is noted with the round, and with how to go on once there is a checkpoint."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, FloatingPointError | checkpoint.CheckpointError):  # which name theirs
            error.add_note(f"in round {optimizer.rounds + 1}")
        if folder and checkpoint.found(folder / checkpoint.FOLDER):
            error.add_note(f"go on with: {resume}")
        raise


def run(
    args: argparse.Namespace,
    data: loader.Dataset,
    optimizer: ReplicaOptimizer,
    replicas: dict[int, tuple[nn.Module, loader.Batches]],
    report: Report | None,
    resumed: Resumed | None,
    command: str,
    *,
    team: training.Team = training.ALONE,
    world: training.Team = training.ALONE,
    **where: Any,
) -> bool:
    """Train and evaluate the replicas that live here, by number, and give every event to `report`, on the first rank.

    Returns whether the run has come to its end. If it has not, it was asked to stop.

    Args:
        command: what starts this program again with as many replicas, but for its arguments.
        data: on the device where the master is tested.
        team, world: who shares one replica, and all there are.
        where: what the log's first line says of the devices and of who communicates.
    """
    networks, sources = zip(*replicas.values(), strict=True)
    evaluation_model = model(args, data)
    start = {
        "event": "resume" if resumed else "start",
        "arguments": _plain(args),
        "dataset": args.dataset,
        "origin": data.origin,
        "replicas": args.replicas,
        "sync_every": args.sync_every,
        "parameters": sum(parameter.numel() for parameter in evaluation_model.parameters()),
        "images": len(data.train_labels),
        "batches_per_epoch": sources[0].per_epoch,
        "rounds": training.count_rounds(args.epochs, sources[0].per_epoch),
        "threads": torch.get_num_threads(),
        **where,
        **surroundings(),
    }
    fault_injection.inject(optimizer, list(replicas))
    progress = training.Progress()
    if resumed:
        progress = training.Progress(**resumed.manifest["progress"])
        start |= dict(round=optimizer.rounds, checkpoint=str(resumed.path), changes=resumed.changes)
    folder = world.gather(report and report.folder)[0]
    resume = f"{command} --resume {shlex.quote(str(folder))}"
    if folder and checkpoint.found(folder / checkpoint.FOLDER):
        launcher.leave_word(resume)
    unsaved: OSError | None = None

    def save(progress: training.Progress) -> None:
        nonlocal unsaved
        if folder is None:
            return
        facts = dict(arguments=_plain(args), progress=dataclasses.asdict(progress))
        if report:
            facts["log_bytes"] = report.log_bytes
        try:
            checkpoint.save(folder / checkpoint.FOLDER, optimizer, list(replicas), facts, team, world, networks)
            launcher.leave_word(resume)
            unsaved = None
        except OSError as error:
            unsaved = error
            if report:
                report({"event": "checkpoint", "round": optimizer.rounds, "error": str(error)})

    def evaluate() -> dict[str, Any]:
        shared = dict(replicas=list(replicas), team=team, world=world)
        averaged = {}
        if optimizer.rounds == start["rounds"]:  # the last; before the other, which leaves what master.pt is to hold
            averaged = training.evaluate_averaged(optimizer, networks, evaluation_model, data, **shared)
        return training.evaluate(optimizer, evaluation_model, data, batch_size=args.batch_size, **shared) | averaged

    with signals.heard() as asked, _told_how_to_resume(optimizer, folder, resume):
        events = training.train(
            networks,
            sources,
            optimizer,
            evaluate,
            epochs=args.epochs,
            lr_drops=args.lr_drops,
            lr_decay=args.lr_decay,
            eval_every=args.eval_every,
            checkpoint_every=args.checkpoint_every,
            save=save,
            progress=progress,
            asked=asked,
            amp=args.amp == "bf16",
            team=team,
            world=world,
        )
        for event in itertools.chain([start], events):
            if report:
                if event["event"] == "eval":
                    report.save_master(evaluation_model)
                report(event)
            if event["event"] == "lost" and args.on_nan == "stop":
                raise FloatingPointError(f"NaN or infinity in replicas {event['replicas']} in round {event['round']}")
        ended = event["event"] == "end"
        if not ended and unsaved is not None:
            raise checkpoint.CheckpointError(f"stopped in round {optimizer.rounds + 1}, which is not saved: {unsaved}")
    if not ended and report:
        report({"event": "stop", "round": optimizer.rounds, "command": resume})
    return ended
