"""One run, from arguments to events. Independent of how replicas communicate."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import models
from loader import BatchLoader, Dataset, DownloadError
from parle import checkpoint, cli, evaluation, fault_injection, rank_exit, signals
from parle.distributed import Groups
from parle.logger import RunLogger, environment_info
from parle.optimizer import ParleBase
from parle.streams import print_line
from parle.training import LocalReplica, Schedule, TrainState, train

# Arguments that may change without notice when a run is resumed: they do not affect what is trained
LOCAL_ARGUMENTS = {
    *("data", "proc", "out", "device", "gpus_per_replica", "timeout", "max_restarts"),
    *("resume", "checkpoint_every", "eval_every", "on_nan", "doctor"),
}


def load_data(
    given: argparse.Namespace,
    args: argparse.Namespace,
    *,
    num_ranks: int | None,
    load: Callable[[argparse.Namespace], Dataset],
    is_first_rank: bool,
) -> tuple[argparse.Namespace, Dataset]:
    """Return the arguments and the data set that `load` returns for them.

    If no data set was given and the default one cannot be downloaded, digits is used, and the first rank prints a
    warning.

    Args:
        given, args: the command line before and after `cli.complete`.
    """
    try:
        return args, load(args)
    except DownloadError as error:
        if given.dataset or given.data:
            raise
        if is_first_rank:
            print_line(f"WARNING: training on digits, scikit-learn's 8 x 8 images, instead of {args.dataset}: {error}")
    args = cli.complete(argparse.Namespace(**vars(given) | dict(dataset="digits")), num_ranks)
    return args, load(args)


def build_model(args: argparse.Namespace, data: Dataset) -> nn.Module:
    """Return the network with the initial weights of every replica, on the device of the data."""
    torch.manual_seed(args.seed)
    return models.build(args.model, data.channels, data.size, data.classes, args.dropout).to(data.train_labels.device)


def build_replica(
    args: argparse.Namespace, data: Dataset, number: int, shard: tuple[int, int] = (0, 1)
) -> LocalReplica:
    """Return a replica with its network and mini-batches, or the given shard (index, count) of each mini-batch."""
    batches = BatchLoader(
        data,
        batch_size=args.batch_size,
        seed=args.seed,
        replica=number,
        replicas=args.replicas,
        frac=args.frac,
        augment=args.augment,
        shard=shard,
    )
    return LocalReplica(number, build_model(args, data), batches)


def hyperparameters(args: argparse.Namespace, batches_per_epoch: int) -> dict[str, Any]:
    """Return the keyword arguments of both Parle classes."""
    names = [
        "lr",
        "momentum",
        "weight_decay",
        "sync_every",
        "gamma",
        "rho",
        "alpha",
        "outer_lr_scale",
        "outer_momentum",
        "master_average",
    ]
    return {name: getattr(args, name) for name in names} | dict(batches_per_epoch=batches_per_epoch)


def build_schedule(args: argparse.Namespace) -> Schedule:
    return Schedule(args.epochs, args.lr_drops, args.lr_decay, args.eval_every, args.checkpoint_every)


def describe_data(data: Dataset, batches_per_epoch: int) -> dict[str, Any]:
    """Return what the log and checkpoints record of the data."""
    return dict(
        source_dir=data.source_dir,
        num_train_images=len(data.train_labels),
        data_checksum=data.checksum,
        batches_per_epoch=batches_per_epoch,
    )


class ResumePoint(NamedTuple):
    """The checkpoint from which a run resumes."""

    path: Path
    manifest: dict[str, Any]
    changes: dict[str, tuple[Any, Any]]  # arguments and properties of the data that differ: old and new values


def find_checkpoint(args: argparse.Namespace, data: dict[str, Any]) -> ResumePoint | None:
    """Return the checkpoint that --resume names, or the latest valid one of the directory that it names.

    Args:
        data: what `describe_data` returns.

    Raises:
        UsageError: there is none, or its data differ, and an epoch would have another length.
    """
    if args.resume is None:
        return None
    try:
        is_checkpoint = os.path.exists(args.resume / checkpoint.MANIFEST)
        paths = [args.resume] if is_checkpoint else checkpoint.list_checkpoints(args.resume)
        path, manifest, complaints = checkpoint.latest_valid(paths)
    except checkpoint.CheckpointError as error:
        raise cli.UsageError(f"--resume: {error}") from error
    try:
        TrainState(**manifest["train_state"])
    except (TypeError, ValueError) as error:
        raise cli.UsageError(f"--resume: {path / checkpoint.MANIFEST}: {error}") from error
    for complaint in complaints:
        print_line(f"WARNING: {complaint}; using the previous one")
    was, now = manifest["arguments"], json.loads(json.dumps(_to_json(args)))
    changes = {
        name: (was[name], now[name]) for name in was if name not in LOCAL_ARGUMENTS and was[name] != now.get(name)
    }
    saved_data = manifest["data"]
    if not all(isinstance(saved_data.get(name), int) for name in ("batches_per_epoch", "num_train_images")):
        raise cli.UsageError(f"--resume: {path / checkpoint.MANIFEST}: its data are not those that a run writes")
    if saved_data["batches_per_epoch"] != data["batches_per_epoch"] and not {"batch_size", "frac"} & changes.keys():
        raise cli.UsageError(
            f"--resume: {path} has {saved_data['num_train_images']} training images and "
            f"{saved_data['batches_per_epoch']} rounds per epoch, but these data have {data['num_train_images']} and "
            f"{data['batches_per_epoch']}: use --data with the same images"
        )
    names = ("source_dir", "num_train_images", "data_checksum")
    changes |= {name: (saved_data.get(name), data[name]) for name in names if saved_data.get(name) != data[name]}
    return ResumePoint(path, manifest, changes)


def open_logger(args: argparse.Namespace, resume: ResumePoint | None) -> RunLogger:
    """Return the logger of --out, or of a new directory in runs/.

    Raises:
        UsageError: the directory cannot be used.
    """
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{args.model}-{args.dataset}"
    try:
        if args.out is not None:
            same_run = resume is not None and resume.path.parent.resolve() == (args.out / checkpoint.FOLDER).resolve()
            logger = RunLogger(args.out, resume.manifest["log_bytes"] if same_run else None)
            if same_run:
                checkpoint.archive_newer(resume.path, resume.manifest["counters"])
            return logger
        for suffix in ("", *(f"-{i}" for i in range(2, 100))):  # other runs may start in the same second
            with contextlib.suppress(FileExistsError):
                return RunLogger(Path("runs") / f"{name}{suffix}")
        raise FileExistsError(f"runs/{name}")
    except OSError as error:
        if isinstance(error, FileExistsError) and error.filename and Path(error.filename).name == "log.jsonl":
            raise cli.UsageError(
                f"--out {args.out} already contains a run: choose a new directory, or continue that run with --resume"
            ) from error
        reason = f"{error.filename}: {error.strerror}" if error.filename else error
        raise cli.UsageError(f"--out: {reason}; choose a new directory") from error


def _to_json(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments with absolute paths, since a run may be resumed from another directory."""
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in vars(args).items()}


@contextlib.contextmanager
def _note_how_to_resume(optimizer: ParleBase, folder: Path | None, command: str) -> Iterator[None]:
    """Add the round to an exception, and the command that resumes the run if there is a checkpoint."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, FloatingPointError | checkpoint.CheckpointError):  # they name their round
            error.add_note(f"in round {optimizer.rounds_done + 1}")
        if folder and checkpoint.list_checkpoints(folder / checkpoint.FOLDER):
            error.add_note(f"resume with: {command}")
        raise


@contextlib.contextmanager
def _print_warnings(logger: RunLogger | None) -> Iterator[None]:
    """Print warnings as lines of the program's output, once and not on every rank."""
    printed = set()

    def show(message: Warning | str, *_: Any) -> None:
        if logger and str(message) not in printed:  # Python forgets what it has shown when a library changes a filter
            printed.add(str(message))
            logger.print_line(f"WARNING: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@dataclasses.dataclass
class Experiment:
    """The share of a run that this process holds: its replicas, the optimizer and the data for evaluation."""

    args: argparse.Namespace
    data: Dataset  # on the device of the evaluation model
    optimizer: ParleBase
    replicas: list[LocalReplica]
    groups: Groups = Groups()

    @property
    def networks(self) -> dict[int, nn.Module]:
        return {replica.number: replica.network for replica in self.replicas}

    @property
    def batches_per_epoch(self) -> int:
        return self.replicas[0].batches.per_epoch

    def restore(self, resume: ResumePoint | None) -> None:
        """Load a checkpoint into the optimizer and the networks, before anything in the run's directory changes.

        Raises:
            UsageError: it cannot be loaded, or its run is complete.
        """
        if resume is None:
            return
        try:
            checkpoint.restore(resume.path, resume.manifest, self.optimizer, self.networks, self.groups.replica.rank)
        except checkpoint.CheckpointError as error:
            raise cli.UsageError(f"--resume: {error}") from error
        schedule, rounds_done = build_schedule(self.args), self.optimizer.rounds_done
        if {"lr", "lr_drops", "lr_decay", "batch_size", "frac"} & resume.changes.keys():
            drops = sum(milestone <= rounds_done for milestone in schedule.lr_milestones(self.batches_per_epoch))
            for group in self.optimizer.param_groups:
                group["lr"] = self.args.lr * self.args.lr_decay**drops
        if rounds_done >= schedule.num_rounds(self.batches_per_epoch):
            epoch = rounds_done / self.batches_per_epoch
            raise cli.UsageError(
                f"--resume: {resume.path} is at epoch {epoch:.2f}, and the run ends there or before with "
                f"-B {self.args.epochs:g}: use a larger -B"
            )

    def run(self, logger: RunLogger | None, resume: ResumePoint | None, program: str, **environment: Any) -> bool:
        """Train, evaluate and save, and pass every event to `logger`, which only the first rank has. Collective.

        Returns whether the run is complete; otherwise a signal stopped it.

        Args:
            program: the shell command that starts this program again with the same number of replicas.
            environment: further fields of the log's first event: devices and how replicas communicate.
        """
        args, optimizer, groups = self.args, self.optimizer, self.groups
        evaluation_model = build_model(args, self.data)
        schedule = build_schedule(args)
        start = {
            "event": "resume" if resume else "start",
            **environment_info(),
            "arguments": _to_json(args),
            "dataset": args.dataset,
            "num_replicas": args.replicas,
            "sync_every": args.sync_every,
            "num_parameters": sum(parameter.numel() for parameter in evaluation_model.parameters()),
            **describe_data(self.data, self.batches_per_epoch),
            "num_rounds": schedule.num_rounds(self.batches_per_epoch),
            "threads_per_rank": torch.get_num_threads(),
            **environment,
        }
        fault_injection.inject_fault(optimizer, list(self.networks))
        state = TrainState()
        if resume:
            state = TrainState(**resume.manifest["train_state"])
            start |= dict(round=optimizer.rounds_done, checkpoint=str(resume.path), changes=resume.changes)
        folder = groups.world.all_gather(logger and logger.folder)[0]
        resume_command = f"{program} --resume {shlex.quote(str(folder))}"
        if folder and checkpoint.list_checkpoints(folder / checkpoint.FOLDER):
            rank_exit.write_resume_command(resume_command, folder)
        save_error: OSError | None = None

        def save(state: TrainState) -> None:
            nonlocal save_error
            if folder is None:
                return
            metadata = dict(
                arguments=_to_json(args),
                data=describe_data(self.data, self.batches_per_epoch),
                train_state=dataclasses.asdict(state),
            )
            if logger:
                metadata["log_bytes"] = logger.log_bytes
            try:
                checkpoint.save(folder / checkpoint.FOLDER, optimizer, self.networks, metadata, groups)
                rank_exit.write_resume_command(resume_command, folder)
                save_error = None
            except OSError as error:
                save_error = error
                if logger:
                    logger({"event": "checkpoint_failed", "round": optimizer.rounds_done, "message": str(error)})

        def evaluate() -> dict[str, Any]:
            running_stats = {}
            if optimizer.rounds_done == start["num_rounds"]:  # before `evaluate`, which leaves the master in the model
                running_stats = evaluation.evaluate_running_stats(
                    optimizer, evaluation_model, self.data, networks=self.networks, groups=groups
                )
            recalibrated = evaluation.evaluate(
                optimizer,
                evaluation_model,
                self.data,
                batch_size=args.batch_size,
                replicas=list(self.networks),
                groups=groups,
            )
            return recalibrated | running_stats

        note_how_to_resume = _note_how_to_resume(optimizer, folder, resume_command)
        with signals.handle_signals() as stop_request, note_how_to_resume, _print_warnings(logger):
            events = train(
                self.replicas,
                optimizer,
                schedule,
                evaluate=evaluate,
                save=save,
                state=state,
                stop_request=stop_request,
                amp=args.amp == "bf16",
                groups=groups,
            )
            for event in itertools.chain([start], events):
                if logger:
                    if event["event"] == "eval":
                        logger.save_master(evaluation_model)
                    logger(event)
                if event["event"] == "nonfinite" and args.on_nan == "stop":
                    raise FloatingPointError(
                        f"NaN or infinity in replicas {event['replicas']} in round {event['round']}: use a lower --lr, "
                        "or --on-nan restart"
                    )
            finished = event["event"] == "finished"
            if not finished and save_error is not None:
                raise checkpoint.CheckpointError(
                    f"stopped in round {optimizer.rounds_done + 1}, which could not be saved: {save_error}"
                )
        if not finished and logger:
            logger({"event": "interrupted", "round": optimizer.rounds_done, "resume_command": resume_command})
        return finished
