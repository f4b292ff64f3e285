"""Checkpoints: a directory with a file per replica, one for what they share, and a manifest with their checksums.

A checkpoint is written under a temporary name, and renamed once it is complete and on disk. The last two are kept.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parle.distributed import Groups
from parle.optimizer import ParleBase

FORMAT = 2  # of a checkpoint's contents; increment it when they change
FOLDER = "checkpoints"  # within the output directory
MAX_TO_KEEP = 2
FIELDS = dict(files=dict, arguments=dict, train_state=dict, counters=dict, num_replicas=int, log_bytes=int)
MANIFEST, SHARED = "manifest.json", "shared.pt"


class CheckpointError(Exception):
    """A checkpoint cannot be read or written. The message names it and says what to do."""


def save(
    folder: Path,
    optimizer: ParleBase,
    networks: Mapping[int, nn.Module],
    metadata: dict[str, Any],
    groups: Groups,
) -> Path:
    """Write `folder`/ROUND-STEP. Collective: the first rank of each replica writes that replica.

    Args:
        networks: the local replicas' networks by number; every rank writes their buffers, the batch-norm statistics.
        metadata: further contents of the manifest, from the first rank.

    Raises:
        OSError: on every rank, if any rank could not write. Earlier checkpoints are unaffected.
    """
    path = folder / f"{optimizer.rounds_done:08}-{optimizer.step_in_round:04}"
    temporary = folder / f".{path.name}"
    checksums, failure = {}, None
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        if groups.replica.rank == 0:
            for number, vectors in zip(networks, optimizer.vectors, strict=True):
                checksums[_replica_file(number)] = _write(temporary / _replica_file(number), vectors)
        for number, network in networks.items():
            name = _buffers_file(number, groups.replica.rank)
            checksums[name] = _write(temporary / name, dict(network.named_buffers()))
        if groups.world.rank == 0:
            checksums[SHARED] = _write(temporary / SHARED, optimizer.shared)
    except OSError as error:
        failure = error
    results = groups.world.all_gather((checksums, failure))
    failure = next((failure for _, failure in results if failure is not None), None)
    if groups.world.rank == 0 and failure is None:
        files = {name: value for checksums, _ in results for name, value in checksums.items()}
        manifest = dict(format=FORMAT, files=files, num_replicas=optimizer.num_replicas, counters=optimizer.counters)
        try:
            _complete(temporary, path, manifest | metadata)
        except OSError as error:
            failure = error
    failure = groups.world.all_gather(failure)[0] or failure
    shutil.rmtree(temporary, ignore_errors=True)  # by every rank, in case they do not share a file system
    if failure is not None:
        raise failure
    return path


def _complete(temporary: Path, path: Path, manifest: dict[str, Any]) -> None:
    """Add the manifest, rename the directory and remove older checkpoints."""
    for name in manifest["files"]:
        if not (temporary / name).exists():
            raise FileNotFoundError(f"{temporary / name} is missing: --out must be one directory shared by all ranks")
    _write_text(temporary / MANIFEST, json.dumps(manifest | dict(sha256=_manifest_sha256(manifest)), indent=1))
    _fsync_directory(temporary)
    if path.exists():  # left from before the run was resumed from an older checkpoint
        shutil.rmtree(path)
    os.rename(temporary, path)
    _fsync_directory(path.parent)
    for old in (*list_checkpoints(path.parent)[MAX_TO_KEEP:], *path.parent.glob(".[0-9]*")):
        shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, newest first."""
    paths = [path.parent for path in folder.glob(f"*/{MANIFEST}") if re.fullmatch(r"\d+-\d+", path.parent.name)]
    return sorted(paths, key=_position, reverse=True)


def _position(path: Path) -> list[int]:
    return [int(number) for number in path.name.split("-")]


def archive_newer(path: Path, counters: dict[str, Any]) -> None:
    """Hide the checkpoints that are newer than `path`, from which a run resumes; the next save removes them."""
    for newer in list_checkpoints(path.parent):
        if _position(newer) > [counters["rounds_done"], counters["step_in_round"]]:
            os.rename(newer, newer.with_name(f".{newer.name}-later"))


def latest_valid(paths: list[Path], verify_files: bool = True) -> tuple[Path, dict[str, Any], list[str]]:
    """Return the first valid one of `paths`, its manifest, and what is wrong with the ones before it.

    Raises:
        CheckpointError: none is valid.
    """
    complaints = []
    for path in paths:
        try:
            return path, read_manifest(path, verify_files), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    raise CheckpointError(
        "; ".join(complaints) or "it contains no checkpoint; use the output directory of a run, such as runs/NAME"
    )


def read_manifest(path: Path, verify_files: bool = True) -> dict[str, Any]:
    """Return the manifest of a checkpoint after verifying it and the checksums of its files.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(
                f"its format is {manifest['format']}, and this version reads {FORMAT}: use the version that wrote it"
            )
        if manifest.pop("sha256") != _manifest_sha256(manifest):
            raise ValueError(f"{MANIFEST} does not match its checksum")
        for name, kind in FIELDS.items():
            if not isinstance(manifest[name], kind):
                raise ValueError(f"{name} in {MANIFEST} has the wrong type")
        counters = manifest["counters"]
        if (
            manifest["num_replicas"] < 1
            or manifest["log_bytes"] < 0
            or not (0 <= counters["step_in_round"] < max(1, counters["steps_per_round"]))
            or not (counters["rounds_done"] >= 0)  # refuses NaN as well
        ):
            raise ValueError(f"the counters in {MANIFEST} are invalid")
        for name, expected in manifest["files"].items() if verify_files else ():
            if _sha256(path / name) != expected:
                raise ValueError(f"{name} does not match its checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{MANIFEST} has no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path} cannot be used: {reason}") from error
    return manifest


def restore(
    path: Path,
    manifest: dict[str, Any],
    optimizer: ParleBase,
    networks: Mapping[int, nn.Module],
    rank_in_replica: int = 0,
) -> None:
    """Load a checkpoint into an optimizer and the local networks. The number of replicas may differ.

    Additional replicas start at the master. With fewer replicas the master becomes the mean of the remaining ones.

    Raises:
        CheckpointError: the checkpoint is from another network or method, or cannot be read.
    """
    then, now = manifest["num_replicas"], optimizer.num_replicas
    shared = _read(path / SHARED)
    if now < then:
        source = "anchor" if manifest["counters"]["step_in_round"] else "weights"
        shared["master"] = _mean(path, now, source, optimizer.master)
        if "master_momentum_buffer" in shared:
            shared["master_momentum_buffer"] = _mean(path, now, "outer_momentum_buffer", optimizer.master)
    elif now > then and "master_momentum_buffer" in shared:  # additional replicas start without momentum
        shared["master_momentum_buffer"] *= then / now
    fresh = dict.fromkeys(("weights", "anchor", "inner_avg"), shared.get("master"))
    fresh["piggyback"] = _read(path / _replica_file(0)).get("piggyback")  # equal for all between rounds
    with torch.no_grad():
        for number, vectors in zip(networks, optimizer.vectors, strict=True):
            saved = _read(path / _replica_file(number)) if number < then else None
            if saved is not None and saved.keys() != vectors.keys():
                raise CheckpointError(f"{path} is from another network or method")
            for name, vector in vectors.items():
                value = fresh.get(name, torch.zeros(())) if saved is None else saved.get(name)
                _put(path, name, value, vector, saved is None)
        for name, vector in optimizer.shared.items():
            _put(path, name, shared.get(name), vector, False)
        for number, network in networks.items():
            if _buffers_file(number, rank_in_replica) in manifest["files"]:  # missing for an additional replica or rank
                saved = _read(path / _buffers_file(number, rank_in_replica))
                for name, buffer in network.named_buffers():
                    _put(path, name, saved.get(name), buffer, False)
        optimizer.counters = manifest["counters"]


def _mean(path: Path, count: int, name: str, like: Tensor) -> Tensor:
    """Return the mean of the first `count` replicas' vectors `name`, with one of them in memory at a time."""
    mean, vector = torch.zeros_like(like), torch.empty_like(like)
    for number in range(count):
        _put(path, name, _read(path / _replica_file(number)).get(name), vector, False)
        mean.add_(vector, alpha=1 / count)
    return mean


def _put(path: Path, name: str, value: Tensor | None, vector: Tensor, fresh: bool) -> None:
    if value is None or (not fresh and (value.shape != vector.shape or value.dtype != vector.dtype)):
        raise CheckpointError(f"{path} is from another network or method ({name} does not fit)")
    vector.copy_(value)


def _replica_file(number: int) -> str:
    return f"replica-{number}.pt"


def _buffers_file(number: int, rank_in_replica: int) -> str:
    return f"buffers-{number}-{rank_in_replica}.pt"


def _write(path: Path, content: dict[str, Tensor]) -> str:
    """Write tensors to disk and return the file's checksum, read back from what was written."""
    with open(path, "wb") as file:
        try:
            torch.save({name: tensor.cpu() for name, tensor in content.items()}, file)
        except RuntimeError as error:  # torch raises it for a full disk
            raise OSError(f"{path} could not be written; is the disk full? ({error})") from error
        file.flush()
        os.fsync(file.fileno())
    return _sha256(path)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fsync_directory(folder: Path) -> None:
    """Force the names in `folder` to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns about what it then rejects
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError("it is not a dictionary of tensors")
        return content
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged ({' '.join(str(error).split())[:200]})") from error


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
