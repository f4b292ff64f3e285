"""What a run tells: lines or a bar on the screen, and in its folder log.jsonl and master.pt. First rank only."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from parle import launcher

LINE_EVERY = 5.0  # seconds between lines on rounds


class Report:
    """Takes a run's events one by one: each becomes a line of `folder`/log.jsonl and, for a person, of the screen.

    A run that is resumed goes on after the first `log_bytes` of its log: what came later is done again.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, label: str, log_bytes: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.label = folder, label
        self.log = folder / "log.jsonl"
        if log_bytes is None or not self.log.exists():
            self.log.touch(exist_ok=False)
        handle = os.open(self.log, os.O_RDWR)
        self.release = weakref.finalize(self, os.close, handle)  # the lock, at the end or with the process
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"another run is writing {self.log}") from error
        if log_bytes is not None:
            os.truncate(self.log, min(log_bytes, self.log_bytes))
        self.bar: tqdm | None = None
        self.spoken = -LINE_EVERY
        self.start: dict[str, Any] = {}
        self.last_eval: dict[str, Any] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        size = self.log_bytes
        try:
            with open(self.log, "a") as file:
                file.write(json.dumps(_finite(event), allow_nan=False) + "\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.log, size)  # whole lines or none
            self.say(f"WARNING: a line is missing from {self.log}: {error}")
        getattr(self, f"_{event['event']}")(event)

    @property
    def log_bytes(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def say(self, text: str) -> None:
        """A line on the screen, with what is trained on what in front."""
        if sys.stdout is None:  # closed before the program began
            return
        with _whoever_reads():
            tqdm.write(f"{self.label}  {text}")
            sys.stdout.flush()

    def _start(self, event: dict[str, Any]) -> None:
        self.start, arguments = event, event["arguments"]
        threads = _count(event["threads"], "thread")
        spread = (
            f"on {_count(event['ranks'], 'rank')}, {threads} each" if "ranks" in event else f"in one process, {threads}"
        )
        counts = collections.Counter(event["devices"])
        devices = ", ".join(f"{counts[name]} on {name}" if len(counts) > 1 else name for name in sorted(counts))
        idle = f"; idle: {', '.join(event['idle'])}" if event.get("idle") else ""
        self.say(f"{arguments['method']}: {_count(event['replicas'], 'replica')} {spread}, {devices}{idle}")
        origin = f" from {event['origin']}" if event["origin"] else ""
        rounds, length = _count(event["rounds"], "round"), _count(event["sync_every"], "mini-batch")
        self.say(
            f"{event['parameters']:,} parameters, {event['images']:,} images{origin}; {rounds} of {length} "
            f"of {arguments['batch_size']}, {_count(event['batches_per_epoch'], 'round')} an epoch; in {self.folder}"
        )
        columns = os.environ.get(launcher.TERMINAL)
        if sys.stdout and (columns or sys.stdout.isatty()):
            with _whoever_reads():  # on stdout like all else: mpiexec would bring stderr in another order
                self.bar = tqdm(
                    total=event["rounds"],
                    initial=event.get("round", 0),
                    desc=self.label,
                    bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}",
                    ncols=int(columns) if columns else None,
                    file=sys.stdout,
                )

    def _resume(self, event: dict[str, Any]) -> None:
        self._start(event)
        changes = "".join(f"; {name} is {now}, was {was}" for name, (was, now) in event["changes"].items())
        self.say(f"resumed in round {event['round'] + 1} from {event['checkpoint']}{changes}")

    def _lost(self, event: dict[str, Any]) -> None:
        names = ", ".join(f"replica {number}" for number in event["replicas"])
        self.say(f"WARNING: NaN or infinity in {names} in round {event['round']}: restarted from the master")

    def _checkpoint(self, event: dict[str, Any]) -> None:
        self.say(f"WARNING: no checkpoint of round {event['round']}: {event['error']}")

    def _close(self) -> None:
        self.release()
        if self.bar is not None:
            with _whoever_reads():
                self.bar.close()

    def _stop(self, event: dict[str, Any]) -> None:
        self._close()
        self.say(f"stopped in round {event['round'] + 1}; go on with: {event['command']}")

    def _round(self, event: dict[str, Any]) -> None:
        done, total = event["round"], self.start["rounds"]
        figures = f"loss {event['loss']:.4f}  error {event['error']:5.2f} %"
        if self.bar is not None:
            with _whoever_reads():
                self.bar.set_postfix_str(figures, refresh=False)
                self.bar.update(done - self.bar.n)
        elif event["seconds"] - self.spoken >= LINE_EVERY or done == total:
            self.spoken = event["seconds"]
            left = _clock(event["seconds"] / done * (total - done))
            figures += f"  {event['images_per_second']:,.0f} images/s  {left} left"
            self.say(f"round {done:{len(str(total))}}/{total}  epoch {event['epoch']:.2f}  {figures}")

    def _eval(self, event: dict[str, Any]) -> None:
        self.last_eval = event
        replicas = " ".join(f"{error:.2f}" for error in event["replica_errors"])
        self.say(
            f"epoch {event['epoch']:.2f}  test error: master {event['master_error']:.2f} %  replicas {replicas} %  "
            f"ensemble {event['ensemble_error']:.2f} %"
        )

    def _end(self, event: dict[str, Any]) -> None:
        self._close()
        last = self.last_eval
        names = ["master", *(f"replica {number}" for number in range(len(last["replica_errors"]))), "ensemble"]
        columns = {"recalibrated": _errors(last)}
        if "averaged_master_error" in last:
            columns["averaged"] = _errors(last, "averaged_")
        notes = [
            f"loss {last['master_loss']:.4f}, best {event['best_master_error']:.2f} %",
            *(f"{distance:.4f} of the master's norm away from it" for distance in last["distances"]),
            "of the replicas' probabilities",
        ]
        header = "".join(f"{title:>14}" for title in columns) + "   batch-norm statistics" if len(columns) > 1 else ""
        self.say(f"test error{header}")
        for name, *errors, note in zip(names, *columns.values(), notes, strict=True):
            self.say(f"  {name:12}{'    '.join(f'{error:8.2f} %' for error in errors)}   {note}")
        seconds, waiting = event["seconds"], event["wait_seconds"]
        idle = f", {100 * waiting / seconds:.1f} % waiting for the slowest rank" if "ranks" in self.start else ""
        self.say(
            f"{seconds:.1f} s of training, {event['images'] / seconds:,.0f} images/s; "
            f"{100 * (event['sync_seconds'] - waiting) / seconds:.2f} % of it synchronizing{idle}"
        )
        self.say(f"log and master in {self.folder}")

    def save_master(self, model: torch.nn.Module) -> None:
        """The master as a plain state dict, in one piece or not at all, and finite."""
        path = self.folder / "master.pt"
        temporary = path.with_suffix(".tmp")
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        try:
            if not all(value.isfinite().all() for value in state.values()):
                raise ValueError("that one has NaN or infinity")
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (ValueError, OSError, RuntimeError) as error:  # torch has a RuntimeError for a full disk
            temporary.unlink(missing_ok=True)
            self.say(f"WARNING: {path} is not the newest master: {error}")


def surroundings() -> dict[str, Any]:
    """For the log: when, what versions, what machine, what revision of this program."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in ("torchvision", "numpy")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "revision": revision(),
    }


def revision() -> str | None:
    """The commit of this program, "-dirty" where a .py file differs from it; None where git does not know."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10)

    try:
        commit = git("rev-parse", "HEAD").stdout.strip()
        changed = commit and git("diff", "--quiet", "HEAD", "--", "*.py").returncode
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{commit}-dirty" if changed else commit or None


@contextlib.contextmanager
def _whoever_reads() -> Iterator[None]:
    """Where nobody reads any more, or the disk is full, the run goes on in silence."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: what has diverged is null."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _errors(evaluation: dict[str, Any], kind: str = "") -> list[float]:
    """Of the master, the replicas and the ensemble."""
    master, replicas, ensemble = (evaluation[kind + n] for n in ("master_error", "replica_errors", "ensemble_error"))
    return [master, *replicas, ensemble]


def _count(number: int | str, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
