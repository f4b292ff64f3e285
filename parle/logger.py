"""Output of a run on the first rank: lines or a progress bar on the screen, log.jsonl and master.pt."""

import collections
import contextlib
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from parle import supervision
from parle.streams import ignore_write_errors

LOG_VERSION = 2  # of the events and their keys: see docs/logs.md
LINE_EVERY = 5.0  # seconds between lines about rounds


class RunLogger:
    """The writer of a run's events: each becomes a line of `folder`/log.jsonl and is printed.

    A resumed run truncates its log to `log_bytes` and rewrites what came later.

    Raises:
        OSError: the directory cannot be written, or another run is writing to it.
    """

    def __init__(self, folder: Path, log_bytes: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log = folder / "log.jsonl"
        if log_bytes is None or not self.log.exists():
            self.log.touch(exist_ok=False)
        handle = os.open(self.log, os.O_RDWR)
        self.release_lock = weakref.finalize(self, os.close, handle)  # at the latest when the process exits
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"another run is writing {self.log}") from error
        except OSError as error:  # Lustre without -o flock and NFS without lockd, for example
            self.print_line(
                f"WARNING: the file system of {folder} does not support file locks ({error.strerror}): make sure "
                "that no other run uses this directory"
            )
        if log_bytes is not None:
            os.truncate(self.log, min(log_bytes, self.log_bytes))
        self.bar: tqdm | None = None
        self.last_line_seconds = -LINE_EVERY
        self.start: dict[str, Any] = {}
        self.last_eval: dict[str, Any] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        size = self.log_bytes
        try:
            with open(self.log, "a") as file:
                file.write(json.dumps(_nan_to_null(event), allow_nan=False) + "\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.log, size)  # no partial lines
            self.print_line(f"WARNING: a line is missing from {self.log}: {error}")
        getattr(self, f"_{event['event']}")(event)

    @property
    def log_bytes(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def print_line(self, text: str) -> None:
        with ignore_write_errors(sys.stdout):
            tqdm.write(text)
            sys.stdout.flush()

    def _start(self, event: dict[str, Any]) -> None:
        self.start, arguments = event, event["arguments"]
        threads, processes = pluralize(event["threads_per_rank"], "thread"), "in one process"
        if "num_ranks" in event:
            threads, processes = _threads(event["hosts"]), f"on {pluralize(event['num_ranks'], 'rank')}"
        counts = collections.Counter(event["devices"])
        devices = ", ".join(f"{counts[name]} on {name}" if len(counts) > 1 else name for name in sorted(counts))
        idle = f"; idle: {', '.join(event['idle_devices'])}" if event.get("idle_devices") else ""
        self.print_line(
            f"{arguments['model']} on {event['dataset']}: {arguments['method']}, "
            f"{pluralize(event['num_replicas'], 'replica')} {processes} ({threads}), {devices}{idle}"
        )
        automatic = "lr / gamma_k steps (-L auto)"
        length = automatic if event["sync_every"] == "auto" else pluralize(event["sync_every"], "step")
        self.print_line(
            f"{event['num_parameters']:,} parameters; {event['num_train_images']:,} training images from "
            f"{_source(event)}; batch size {arguments['batch_size']}"
        )
        self.print_line(
            f"{pluralize(event['num_rounds'], 'round')} of {length}, "
            f"{pluralize(event['batches_per_epoch'], 'round')} per epoch; output directory {self.folder}"
        )
        columns = os.environ.get(supervision.TERMINAL_WIDTH)
        if columns or sys.stdout.isatty():
            # on stdout like all other output: mpiexec may reorder stdout and stderr
            with ignore_write_errors(sys.stdout):
                self.bar = tqdm(
                    total=event["num_rounds"],
                    initial=event.get("round", 0),
                    desc=f"{arguments['model']} on {event['dataset']}",
                    bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}",
                    ncols=int(columns) if columns else None,
                    file=sys.stdout,
                )

    def _resume(self, event: dict[str, Any]) -> None:
        self._start(event)
        changes = "".join(f"; {name} is {now}, was {was}" for name, (was, now) in event["changes"].items())
        self.print_line(f"resumed in round {event['round'] + 1} from {event['checkpoint']}{changes}")

    def _nonfinite(self, event: dict[str, Any]) -> None:
        names = ", ".join(f"replica {number}" for number in event["replicas"])
        restarted = ": restarted from the master" if self.start["arguments"]["on_nan"] == "restart" else ""
        self.print_line(f"WARNING: NaN or infinity in {names} in round {event['round']}{restarted}")

    def _checkpoint_failed(self, event: dict[str, Any]) -> None:
        self.print_line(f"WARNING: no checkpoint of round {event['round']}: {event['message']}")

    def _close(self) -> None:
        self.release_lock()
        if self.bar is not None:
            with ignore_write_errors(sys.stdout):
                self.bar.close()

    def _interrupted(self, event: dict[str, Any]) -> None:
        self._close()
        self.print_line(f"stopped in round {event['round'] + 1}; resume with: {event['resume_command']}")

    def _epoch(self, event: dict[str, Any]) -> str:
        """Return the epoch with its passes over the data, which are unknown if L varies."""
        length = self.start["sync_every"]
        passes = "" if length == "auto" else f" ({event['epoch'] * length:.1f} passes)"
        return f"epoch {event['epoch']:.2f}{passes}"

    def _round(self, event: dict[str, Any]) -> None:
        done, total = event["round"], self.start["num_rounds"]
        numbers = f"loss {event['train_loss']:.4f}  error {event['train_error']:5.2f} %"
        if self.bar is not None:
            with ignore_write_errors(sys.stdout):
                self.bar.set_postfix_str(numbers, refresh=False)
                self.bar.update(done - self.bar.n)
        elif event["train_seconds"] - self.last_line_seconds >= LINE_EVERY or done == total:
            self.last_line_seconds = event["train_seconds"]
            left = format_duration(event["train_seconds"] / done * (total - done))
            self.print_line(
                f"round {done:{len(str(total))}}/{total}  {self._epoch(event)}  {numbers}  "
                f"{event['images_per_second']:,.0f} images/s  {left} left"
            )

    def _eval(self, event: dict[str, Any]) -> None:
        self.last_eval = event
        replicas = " ".join(f"{error:.2f}" for error in event["replica_errors"])
        master = f"{event['master_error']:.2f} %"
        if "unaveraged_master_error" in event:
            master += f" (not averaged: {event['unaveraged_master_error']:.2f} %)"
        self.print_line(
            f"{self._epoch(event)}  test error: master {master}, replicas {replicas} %, "
            f"ensemble {event['ensemble_error']:.2f} %"
        )

    def _finished(self, event: dict[str, Any]) -> None:
        self._close()
        last = self.last_eval
        names = ["master", *(f"replica {number}" for number in range(len(last["replica_errors"]))), "ensemble"]
        columns = {"recalibrated": _errors(last)}
        if "running_stats_master_error" in last:
            columns["running stats"] = _errors(last, "running_stats_")
        notes = [
            f"loss {last['master_loss']:.4f}, best {event['best_master_error']:.2f} %",
            *(f"distance to master {distance:.4f}" for distance in last["replica_distances"]),
            "mean of probabilities",
        ]
        if "unaveraged_master_error" in last:
            names.insert(1, "unaveraged")
            notes[0] += ", average over rounds"
            notes.insert(1, "the master of the last round")
        header = "".join(f"{title:>15}" for title in columns) + "   (batch norm)" if len(columns) > 1 else ""
        self.print_line(f"test error  {header}".rstrip())
        for name, *errors, note in zip(names, *columns.values(), notes, strict=True):
            self.print_line(f"  {name:10}{''.join(f'{error:13.2f} %' for error in errors)}   {note}")
        seconds, waiting = event["train_seconds"], event["straggler_seconds"]
        self.print_line(f"{seconds:.1f} s of training, {event['images_seen'] / seconds:,.0f} images/s")
        idle = f", {100 * waiting / seconds:.1f} % waiting for the slowest rank" if "num_ranks" in self.start else ""
        self.print_line(f"{100 * (event['sync_seconds'] - waiting) / seconds:.2f} % of the time synchronizing{idle}")
        self.print_line(f"log and master in {self.folder}")

    def save_master(self, model: torch.nn.Module) -> None:
        """Replace master.pt by a plain state dict of the master, atomically, unless it has NaN or infinity."""
        path = self.folder / "master.pt"
        temporary = path.with_suffix(".tmp")
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        try:
            if not all(value.isfinite().all() for value in state.values()):
                raise ValueError("the latest master has NaN or infinity")
            temporary.unlink(missing_ok=True)  # left by a killed run, or a link to another file
            with open(temporary, "xb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (ValueError, OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            temporary.unlink(missing_ok=True)
            self.print_line(f"WARNING: {path} does not hold the latest master: {error}")


def _source(event: dict[str, Any]) -> str:
    """Return where the data of a run come from; without --data this may be the directory of an earlier run."""
    if event["source_dir"]:
        return event["source_dir"] + (", pre-processed earlier" if event["arguments"]["data"] is None else "")
    return "scikit-learn" if event["dataset"] == "digits" else f"{event['arguments']['proc']}/raw"


def environment_info() -> dict[str, Any]:
    """Return the log version, time, command, library versions, machine and revision of this program."""
    return {
        "log_version": LOG_VERSION,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in ("torchvision", "numpy")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "revision": revision(),
    }


def revision() -> str | None:
    """Return this program's commit, with "-dirty" if a .py file differs from it.

    Outside a repository that contains this file: the version of the installed package, or None if it is not installed.
    """
    return _commit() or _installed_version()


def _commit() -> str | None:
    file = Path(__file__)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(file.parent.parent), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, errors="replace", timeout=10)

    try:
        # an installed package may be in a directory of another repository
        if git("ls-files", "--error-unmatch", str(file)).returncode:
            return None
        commit = git("rev-parse", "HEAD").stdout.strip()
        changed = commit and git("diff", "--quiet", "HEAD", "--", "*.py").returncode
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{commit}-dirty" if changed else commit or None


def _installed_version() -> str | None:
    try:
        package = importlib.metadata.distribution("parle")
    except importlib.metadata.PackageNotFoundError:
        return None
    installed = Path(str(package.locate_file("parle/logger.py")))  # elsewhere if another checkout is installed
    return package.version if installed.resolve() == Path(__file__).resolve() else None


def _nan_to_null(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {name: _nan_to_null(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_nan_to_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _errors(evaluation: dict[str, Any], prefix: str = "") -> list[float]:
    """Return the errors of the master, the replicas and the ensemble."""
    names = ["master_error", "unaveraged_master_error", "ensemble_error"]
    master, *unaveraged, ensemble = (evaluation[prefix + name] for name in names if prefix + name in evaluation)
    return [master, *unaveraged, *evaluation[f"{prefix}replica_errors"], ensemble]


def _threads(hosts: list[dict[str, Any]]) -> str:
    """Return the threads of each rank, with the names of the hosts if their numbers differ."""
    names = collections.defaultdict(list)
    for host in hosts:
        names[host["threads_per_rank"]].append(host["name"])
    if len(names) == 1:
        return f"{pluralize(*names, 'thread')} each"
    return "; ".join(f"{pluralize(count, 'thread')} each on {', '.join(names[count])}" for count in sorted(names))


def pluralize(number: int, noun: str) -> str:
    return f"{number} {noun if number == 1 else noun + 's'}"


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
