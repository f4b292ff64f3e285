"""Checkpoints: a directory with a file per replica, one for what they share, and a manifest with their checksums.

A checkpoint is written under a temporary name, and renamed once it is complete and on disk. The last two are kept.
"""

import errno
import hashlib
import json
import os
import pickle
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parle.distributed import Groups
from parle.optimizer import ParleBase

FORMAT = 4  # of a checkpoint's contents; increment it when they change
FOLDER = "checkpoints"  # within the output directory
MAX_TO_KEEP = 2
FIELDS = dict(files=dict, arguments=dict, data=dict, train_state=dict, counters=dict, num_replicas=int, log_bytes=int)
MANIFEST, SHARED, BUFFERS = "manifest.json", "shared.pt", "buffers-"
MASTER = ("master", "master_momentum_buffer", "master_average")  # the states that all replicas share
# of every group
PROGRESS = ("rounds_done", "step_in_round", "steps_per_round", "rounds_averaged", "gamma_k", "coupling_k", "lr")


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
    suffix = groups.world.all_gather(secrets.token_hex(4))[0]  # so that nobody can put a link there before
    temporary = folder / f".{path.name}-{suffix}"
    checksums, failure = {}, None
    states = _split_by_replica(optimizer.state_dict())
    shared, counters = {}, {name: optimizer.param_groups[0][name] for name in PROGRESS}
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        for number, network, piggyback, (local, state) in zip(
            networks, networks.values(), optimizer.piggyback, states.items(), strict=True
        ):
            shared |= _pop_master(state)
            if groups.replica.rank == 0:
                weights = [parameter.detach() for parameter in _parameters(optimizer, local)]
                content = dict(weights=weights, optimizer=state, piggyback=piggyback)
                checksums[_replica_file(number)] = _write(temporary / _replica_file(number), content)
            name = _buffers_file(number, groups.replica.rank)
            checksums[name] = _write(temporary / name, _buffers(network))
        if groups.world.rank == 0:
            checksums[SHARED] = _write(temporary / SHARED, shared)
    except OSError as error:
        failure = error
    results = groups.world.all_gather((checksums, failure))
    failure = next((failure for _, failure in results if failure is not None), None)
    if groups.world.rank == 0 and failure is None:
        files = {name: value for checksums, _ in results for name, value in checksums.items()}
        manifest = dict(format=FORMAT, files=files, num_replicas=optimizer.num_replicas, counters=counters)
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
    """Return the checkpoints in `folder`, newest first. Raises: PermissionError, which glob would ignore."""
    names = os.listdir(folder) if folder.is_dir() else []
    paths = [folder / name for name in names if re.fullmatch(r"\d+-\d+", name)]
    return sorted((path for path in paths if (path / MANIFEST).exists()), key=_position, reverse=True)


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
        "; ".join(complaints)
        or "it contains no complete checkpoint; use the output directory of a run, such as runs/NAME"
    )


def read_manifest(path: Path, verify_files: bool = True) -> dict[str, Any]:
    """Return the manifest of a checkpoint after verifying it and the checksums of its files.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another format.
    """
    try:
        manifest = json.loads(_regular_file(path / MANIFEST).read_text())
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
        if not _has_all_files(manifest):
            raise ValueError(f"{MANIFEST} does not name the files of {manifest['num_replicas']} replicas")
        for name, expected in manifest["files"].items() if verify_files else ():
            if _sha256(_regular_file(path / name)) != expected:
                raise ValueError(f"{name} does not match its checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{MANIFEST} has no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path} cannot be used: {reason}") from error
    return manifest


def _has_all_files(manifest: dict[str, Any]) -> bool:
    """Return whether a manifest names exactly the files that `save` writes, so that no other file is ever read."""
    names, replicas = manifest["files"].keys(), manifest["num_replicas"]
    ranks = (len(names) - 1) // replicas - 1  # of each replica
    if ranks < 1:
        return False
    expected = {SHARED, *(_replica_file(number) for number in range(replicas))}
    return names == expected | {_buffers_file(number, rank) for number in range(replicas) for rank in range(ranks)}


def _regular_file(path: Path) -> Path:
    """Return `path`. Raises: ValueError if it is a device or a pipe, whose end may never come."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is not a regular file")
    return path


def restore(
    path: Path,
    manifest: dict[str, Any],
    optimizer: ParleBase,
    networks: Mapping[int, nn.Module],
    rank_in_replica: int = 0,
) -> None:
    """Load a checkpoint into an optimizer and the local networks. The number of replicas may differ.

    Additional replicas start at the master, with the mean of the saved batch-norm statistics, which
    `evaluate_running_stats` uses for the master. With fewer replicas the master becomes the mean of the remaining ones.

    Raises:
        CheckpointError: the checkpoint is from another network or method, or cannot be read.
    """
    num_saved, num_replicas = manifest["num_replicas"], optimizer.num_replicas
    try:
        shared = _read(path / SHARED)
        if num_replicas != num_saved:
            _rescale_master(path, shared, num_saved, num_replicas)
        for values in shared.values():  # the run may resume without the average, or with a new one
            average = values.pop("master_average", values["master"])
            if optimizer.param_groups[0]["master_average"]:
                values["master_average"] = average
        contents = []
        for number, (local, own) in zip(networks, _split_by_replica(optimizer.state_dict()).items(), strict=True):
            content = _read(path / _replica_file(number if number < num_saved else 0))
            if number >= num_saved:
                _restart_at_master(content, shared)
            state = content["optimizer"]
            for group, saved in zip(own["param_groups"], state["param_groups"], strict=True):
                group |= {name: saved[name] for name in PROGRESS}
                if not group["master_average"]:
                    group["rounds_averaged"] = 0
            for position, values in shared.items() if not contents else ():
                state["state"][position] |= values
            for position, (weights, parameter) in enumerate(
                zip(content["weights"], _parameters(optimizer, local), strict=True)
            ):
                tensors = (weights, *state["state"].get(position, {}).values())
                if any((tensor.shape, tensor.dtype) != (parameter.shape, parameter.dtype) for tensor in tensors):
                    raise ValueError(f"parameter {position} has another shape or dtype")
            contents.append(content | dict(optimizer=state | dict(param_groups=own["param_groups"])))
        saved_buffers = [
            _read_buffers(path, manifest, _buffers(network), number, rank_in_replica)
            for number, network in networks.items()
        ]
        for content, piggyback in zip(contents, optimizer.piggyback, strict=True):
            if content["piggyback"].shape != piggyback.shape:
                raise ValueError("piggyback has another shape")
        optimizer.load_state_dict(_join_replicas([content["optimizer"] for content in contents]))
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this network or method ({error})") from error
    with torch.no_grad():
        for local, content, piggyback in zip(
            _split_by_replica(optimizer.state_dict()), contents, optimizer.piggyback, strict=True
        ):
            for parameter, weights in zip(_parameters(optimizer, local), content["weights"], strict=True):
                parameter.copy_(weights)
            piggyback.copy_(content["piggyback"])
        for network, saved in zip(networks.values(), saved_buffers, strict=True):
            for name, buffer in _buffers(network).items():
                buffer.copy_(saved[name])


def _split_by_replica(state_dict: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Split a state_dict by local replica; `state` is keyed by the parameter's position within its replica."""
    states: dict[int, dict[str, Any]] = {}
    for group in state_dict["param_groups"]:
        own = states.setdefault(group["replica"], dict(state={}, param_groups=[]))
        first = sum(len(previous["params"]) for previous in own["param_groups"])
        positions = range(first, first + len(group["params"]))
        own["state"] |= {
            position: dict(state_dict["state"][index])
            for position, index in zip(positions, group["params"], strict=True)
            if index in state_dict["state"]  # a frozen parameter has none
        }
        own["param_groups"].append(group | dict(params=list(positions)))
    return states


def _join_replicas(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the state_dicts of several replicas: the inverse of `_split_by_replica`."""
    joined: dict[str, Any] = dict(state={}, param_groups=[])
    for state in states:
        first = sum(len(group["params"]) for group in joined["param_groups"])
        joined["state"] |= {first + position: values for position, values in state["state"].items()}
        for group in state["param_groups"]:
            joined["param_groups"].append(group | dict(params=[first + position for position in group["params"]]))
    return joined


def _pop_master(state: dict[str, Any]) -> dict[int, dict[str, Tensor]]:
    """Remove the master's states from a replica's state_dict and return them by position."""
    shared = {
        position: {name: values.pop(name) for name in MASTER if name in values}
        for position, values in state["state"].items()
    }
    return {position: values for position, values in shared.items() if values}


def _rescale_master(path: Path, shared: dict[int, dict[str, Tensor]], num_saved: int, num_replicas: int) -> None:
    """Recompute the master for `num_replicas`: the mean of the first ones, or with more of them less momentum.

    Its average stays.
    """
    if num_replicas > num_saved:  # additional replicas start without momentum
        for values in shared.values():
            if "master_momentum_buffer" in values:
                values["master_momentum_buffer"] *= num_saved / num_replicas
        return
    for values in shared.values():
        for name in ("master", "master_momentum_buffer") & values.keys():
            values[name].zero_()
    for number in range(num_replicas):  # one of them in memory at a time
        content = _read(path / _replica_file(number))
        for position, values in shared.items():
            state = content["optimizer"]["state"][position]
            values["master"].add_(state.get("anchor", content["weights"][position]), alpha=1 / num_replicas)
            if "master_momentum_buffer" in values:
                values["master_momentum_buffer"].add_(state["outer_momentum_buffer"], alpha=1 / num_replicas)


def _restart_at_master(content: dict[str, Any], shared: dict[int, dict[str, Tensor]]) -> None:
    """Replace a saved replica's weights and states by the master's, without momentum, for an additional replica."""
    for position, values in content["optimizer"]["state"].items():
        for name, value in values.items():
            values[name] = torch.zeros_like(value) if name.endswith("momentum_buffer") else shared[position]["master"]
        content["weights"][position] = shared[position]["master"]


def _parameters(optimizer: ParleBase, replica: int) -> list[nn.Parameter]:
    groups = [group for group in optimizer.param_groups if group["replica"] == replica]
    return [parameter for group in groups for parameter in group["params"]]


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    """Return the buffers by name; the names do not depend on DataParallel or torch.compile."""
    if isinstance(network, nn.DataParallel):
        return _buffers(network.module)
    if hasattr(network, "_orig_mod"):
        return _buffers(network._orig_mod)
    return {name.replace("_orig_mod.", ""): buffer for name, buffer in network.named_buffers()}


def _read_buffers(
    path: Path, manifest: dict[str, Any], buffers: dict[str, Tensor], number: int, rank_in_replica: int
) -> dict[str, Tensor]:
    """Return the saved buffers of a replica's rank, or of its first one; for an additional replica the master's."""
    names = (_buffers_file(number, rank) for rank in (rank_in_replica, 0))
    name = next((name for name in names if name in manifest["files"]), None)
    sources = [name] if name else [name for name in manifest["files"] if name.startswith(BUFFERS)]
    contents = [_read(path / source) for source in sources]
    for saved in contents:
        for name, buffer in buffers.items():
            if (saved[name].shape, saved[name].dtype) != (buffer.shape, buffer.dtype):
                raise ValueError(f"{name} has another shape or dtype")
    return {name: _mean([saved[name] for saved in contents]) for name in buffers}


def _mean(tensors: list[Tensor]) -> Tensor:
    """Return the mean of floating-point tensors, and the first of others, such as a count of mini-batches."""
    first = tensors[0]
    return torch.stack(tensors).double().mean(0).to(first.dtype) if first.is_floating_point() else first


def _replica_file(number: int) -> str:
    return f"replica-{number}.pt"


def _buffers_file(number: int, rank_in_replica: int) -> str:
    return f"{BUFFERS}{number}-{rank_in_replica}.pt"


def _write(path: Path, content: dict[Any, Any]) -> str:
    """Write tensors to disk and return the file's checksum, read back from what was written."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
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
    """Force the names in `folder` to disk, where the file system can do it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
        warnings.warn(
            f"The file system of the output directory cannot force directories to disk ({error.strerror}): a crash "
            "of the machine may lose the last checkpoint",
            stacklevel=1,
        )
    finally:
        os.close(handle)


def _read(path: Path) -> dict[Any, Any]:
    try:
        # torch warns about what it then rejects; it maps files by name, which must be UTF-8
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            content = torch.load(f"/dev/fd/{file.fileno()}", map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict):
            raise ValueError("it is not a dictionary")
        return content
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): make it readable") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged ({' '.join(str(error).split())[:200]})") from error


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
