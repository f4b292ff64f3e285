"""Checkpoints: a folder with a file for each replica, one for what they share, and a manifest with their sums.

It is written under another name and renamed when it is whole and on the disk; the last two are kept.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parle.optimizer import ReplicaOptimizer
from parle.training import Team

FORMAT = 1  # of what is in a checkpoint; raise it when that changes
FOLDER = "checkpoints"  # in a run's own
KEPT = 2
FIELDS = dict(files=dict, arguments=dict, progress=dict, counters=dict, replicas=int, log_bytes=int)
MANIFEST, SHARED = "manifest.json", "shared.pt"


class CheckpointError(Exception):
    """A checkpoint cannot be read or written. The message names it and says what to do."""


def save(
    folder: Path,
    optimizer: ReplicaOptimizer,
    replicas: list[int],
    facts: dict[str, Any],
    team: Team,
    world: Team,
    networks: Sequence[nn.Module] = (),
) -> Path:
    """Write `folder`/ROUND-BATCH. Every rank calls it; the first of each replica's ranks writes that replica.

    Args:
        replicas: numbers of those that live here.
        facts: what else the manifest is to hold; the first rank's is kept.
        networks: theirs, of which every rank writes the buffers: batch-norm statistics.

    Raises:
        OSError: on every rank, where one could not write. What was saved before is left alone.
    """
    path = folder / f"{optimizer.rounds:08}-{optimizer.batches:04}"
    temporary = folder / f".{path.name}"
    sums, failure = {}, None
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        if team.index == 0:
            for number, vectors in zip(replicas, optimizer.vectors, strict=True):
                sums[_replica(number)] = _write(temporary / _replica(number), vectors)
        for number, network in zip(replicas, networks, strict=False):
            name = _buffers(number, team.index)
            sums[name] = _write(temporary / name, dict(network.named_buffers()))
        if world.index == 0:
            sums[SHARED] = _write(temporary / SHARED, optimizer.shared)
    except OSError as error:
        failure = error
    answers = world.gather((sums, failure))
    failure = next((failure for _, failure in answers if failure is not None), None)
    if world.index == 0 and failure is None:
        files = {name: value for sums, _ in answers for name, value in sums.items()}
        manifest = dict(format=FORMAT, files=files, replicas=optimizer.num_replicas, counters=optimizer.counters)
        try:
            _complete(temporary, path, manifest | facts)
        except OSError as error:
            failure = error
    failure = world.gather(failure)[0] or failure
    shutil.rmtree(temporary, ignore_errors=True)  # each rank its own, should they not see the same folder
    if failure is not None:
        raise failure
    return path


def _complete(temporary: Path, path: Path, manifest: dict[str, Any]) -> None:
    """Give what all ranks have written its manifest and its name, and remove what is older than the last two."""
    for name in manifest["files"]:
        if not (temporary / name).exists():
            raise FileNotFoundError(f"{temporary / name} is not here: --out must be one folder for all ranks")
    _write_text(temporary / MANIFEST, json.dumps(manifest | dict(sum=_sum_of(manifest)), indent=1))
    _flush(temporary)
    if path.exists():  # the same moment of a run that was resumed before it
        shutil.rmtree(path)
    os.rename(temporary, path)
    _flush(path.parent)
    for old in (*found(path.parent)[KEPT:], *path.parent.glob(".[0-9]*")):
        shutil.rmtree(old, ignore_errors=True)


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    paths = [path.parent for path in folder.glob(f"*/{MANIFEST}") if re.fullmatch(r"\d+-\d+", path.parent.name)]
    return sorted(paths, key=_moment, reverse=True)


def _moment(path: Path) -> list[int]:
    return [int(number) for number in path.name.split("-")]


def put_aside_later(path: Path, counters: dict[str, Any]) -> None:
    """A run that goes on from `path` goes another way than those after it; the next save removes them."""
    for later in found(path.parent):
        if _moment(later) > [counters["rounds"], counters["batches"]]:
            os.rename(later, later.with_name(f".{later.name}-later"))


def newest(paths: list[Path], files: bool = True) -> tuple[Path, dict[str, Any], list[str]]:
    """The first good one of `paths`, its manifest, and what is wrong with those before. Raises: CheckpointError."""
    complaints = []
    for path in paths:
        try:
            return path, read_manifest(path, files), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    raise CheckpointError("; ".join(complaints) or "there is no checkpoint")


def read_manifest(path: Path, files: bool = True) -> dict[str, Any]:
    """A checkpoint's manifest, once it and all its `files` have been found to be what was written.

    Raises:
        CheckpointError: they are not.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest.pop("sum") != _sum_of(manifest):
            raise ValueError(f"{MANIFEST} is not what was written")
        if manifest["format"] != FORMAT:
            raise ValueError(f"it has format {manifest['format']}, this program reads {FORMAT}")
        for name, kind in FIELDS.items():
            if not isinstance(manifest[name], kind):
                raise ValueError(f"its {name} are not what this program writes")
        counters = manifest["counters"]
        if (
            manifest["replicas"] < 1
            or manifest["log_bytes"] < 0
            or not (0 <= counters["batches"] < max(1, counters["round_length"]) and counters["rounds"] >= 0)
        ):
            raise ValueError("its counters are not what this program writes")
        for name, expected in manifest["files"].items() if files else ():
            if _sum(path / name) != expected:
                raise ValueError(f"{name} is not what was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error
    return manifest


def load(
    path: Path,
    manifest: dict[str, Any],
    optimizer: ReplicaOptimizer,
    replicas: list[int],
    networks: Sequence[nn.Module] = (),
    part: int = 0,
) -> None:
    """Put a checkpoint into an optimizer and its networks, of as many replicas or of another number of them.

    `part` is which of a replica's ranks this is.

    New replicas start at the master. Without some of them the master is the mean of the others.

    Raises:
        CheckpointError: it is of another network, or cannot be read.
    """
    then, now = manifest["replicas"], optimizer.num_replicas
    shared = _read(path / SHARED)
    if now < then:
        source = "anchor" if manifest["counters"]["batches"] else "weights"
        shared["master"] = _mean(path, now, source, optimizer.master)
        if "master_momentum_buffer" in shared:
            shared["master_momentum_buffer"] = _mean(path, now, "outer_momentum_buffer", optimizer.master)
    elif now > then and "master_momentum_buffer" in shared:  # the new ones have none
        shared["master_momentum_buffer"] *= then / now
    fresh = dict.fromkeys(("weights", "anchor", "inner_avg"), shared.get("master"))
    fresh["riders"] = _read(path / _replica(0)).get("riders")  # between rounds those of all are the same
    with torch.no_grad():
        for number, vectors in zip(replicas, optimizer.vectors, strict=True):
            saved = _read(path / _replica(number)) if number < then else None
            if saved is not None and saved.keys() != vectors.keys():
                raise CheckpointError(f"{path} is of another network or method")
            for name, vector in vectors.items():
                value = fresh.get(name, torch.zeros(())) if saved is None else saved.get(name)
                _put(path, name, value, vector, saved is None)
        for name, vector in optimizer.shared.items():
            _put(path, name, shared.get(name), vector, False)
        for number, network in zip(replicas, networks, strict=False):
            if _buffers(number, part) in manifest["files"]:  # else it is new
                saved = _read(path / _buffers(number, part))
                for name, buffer in network.named_buffers():
                    _put(path, name, saved.get(name), buffer, False)
        optimizer.counters = manifest["counters"]


def _mean(path: Path, count: int, name: str, like: Tensor) -> Tensor:
    """Of the first `count` replicas' vectors `name`; one of them is in memory at a time."""
    mean, vector = torch.zeros_like(like), torch.empty_like(like)
    for number in range(count):
        _put(path, name, _read(path / _replica(number)).get(name), vector, False)
        mean.add_(vector, alpha=1 / count)
    return mean


def _put(path: Path, name: str, value: Tensor | None, vector: Tensor, fresh: bool) -> None:
    if value is None or (not fresh and (value.shape != vector.shape or value.dtype != vector.dtype)):
        raise CheckpointError(f"{path} is of another network or method ({name} does not fit)")
    vector.copy_(value)


def _replica(number: int) -> str:
    return f"replica-{number}.pt"


def _buffers(number: int, part: int) -> str:
    return f"buffers-{number}-{part}.pt"


def _write(path: Path, content: dict[str, Tensor]) -> str:
    """Gives the file's sum, taken from what was written, which read_manifest compares with what is there later."""
    with open(path, "wb") as file:
        try:
            torch.save({name: tensor.cpu() for name, tensor in content.items()}, file)
        except RuntimeError as error:  # torch's, for a full disk
            raise OSError(f"{path} could not be written; is the disk full? ({error})") from error
        file.flush()
        os.fsync(file.fileno())
    return _sum(path)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """The names in a folder, too, are on the disk after this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of what it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError("it holds no tensors by name")
        return content
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged ({' '.join(str(error).split())[:200]})") from error


def _sum_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
