"""Checkpoints in one process: what is kept, what is refused, and that a resumed run equals an uninterrupted one."""

import errno
import hashlib
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import loader
import models
import parle_gpu
from parle import (
    checkpoint,
    cli,
    distributed,
    evaluation,
    experiment,
    fault_injection,
    launcher,
    logger,
    rank_exit,
    training,
)
from parle.checkpoint import CheckpointError
from parle.distributed import Group, Groups
from parle_gpu import Parle
from tests import toy
from tests.test_loader import write_idx
from tests.toy import run_ranks

FULL = OSError(errno.ENOSPC, "No space left on device")


# Checkpoints of small optimizers


def build(replicas=3, size=4, **settings):
    """Return Parle over replicas of one vector, (size,)."""
    weights = [nn.Parameter(torch.linspace(-1, 1, size)) for _ in range(replicas)]
    return Parle([[w] for w in weights], **(dict(lr=0.1, sync_every=3, batches_per_epoch=4) | settings))


def gradient(replica, step, size=4):
    return torch.randn(size, generator=torch.Generator().manual_seed(100 * step + replica))


def run_steps(optimizer, steps):
    for step in steps:
        for replica, group in enumerate(optimizer.param_groups):
            group["params"][0].grad = gradient(replica, step, len(group["params"][0])).to(group["params"][0].dtype)
        optimizer.step()
    return optimizer


METADATA = dict(arguments={}, data={}, train_state={}, log_bytes=0)


def build_networks(numbers):
    """Return networks that only have buffers: batch norm without parameters, by replica number."""
    return {number: nn.BatchNorm1d(2, affine=False) for number in numbers}


def save(folder, optimizer, networks=None, **metadata):
    networks = networks or build_networks(range(optimizer.num_replicas))
    return checkpoint.save(folder, optimizer, networks, METADATA | metadata, Groups())


def load(path, optimizer, networks=None):
    networks = networks or build_networks(range(optimizer.num_replicas))
    checkpoint.restore(path, checkpoint.read_manifest(path), optimizer, networks)
    return optimizer


def vectors_of(optimizer, replica):
    """Return the weights, states and piggyback of a replica of one parameter; not copies."""
    (parameter,) = optimizer.param_groups[replica]["params"]
    own = {name: value for name, value in optimizer.state[parameter].items() if not name.startswith("master")}
    return dict(weights=parameter.detach(), piggyback=optimizer.piggyback[replica], **own)


def every_replica(optimizer):
    return [vectors_of(optimizer, replica) for replica in range(len(optimizer.param_groups))]


def shared_by(optimizer):
    """Return the master and its momentum; not copies."""
    states = optimizer.state[optimizer.param_groups[0]["params"][0]]
    return {name: value for name, value in states.items() if name.startswith("master")}


def counters(optimizer):
    return [{name: group[name] for name in checkpoint.PROGRESS} for group in optimizer.param_groups]


def state(optimizer):
    """Return every vector and counter, for bitwise comparison."""
    vectors = [*every_replica(optimizer), shared_by(optimizer)]
    return [{name: vector.tolist() for name, vector in some.items()} for some in vectors], counters(optimizer)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync_every", [3, 1, "auto"])
@pytest.mark.parametrize("done", [0, 3, 7])
def test_saved_state_loads_and_continues_identically(tmp_path, sync_every, done):
    first = run_steps(build(sync_every=sync_every), range(done))
    path = save(tmp_path, first)
    second = load(path, build(sync_every=sync_every))
    assert state(second) == state(first)
    assert state(run_steps(second, range(done, done + 8))) == state(run_steps(first, range(done, done + 8)))


@pytest.mark.parametrize("sync_every", [3, 1, "auto"])
def test_average_of_the_master_is_saved(tmp_path, sync_every):
    settings = dict(sync_every=sync_every, master_average=0.5)
    first = run_steps(build(**settings), range(7))
    second = load(save(tmp_path, first), build(**settings))
    assert "master_average" in shared_by(second) and state(second) == state(first)
    assert state(run_steps(second, range(7, 15))) == state(run_steps(first, range(7, 15)))


def test_average_of_the_master_may_be_switched_on_and_off(tmp_path):
    first = run_steps(build(), range(7))
    second = load(save(tmp_path, first), build(master_average=0.5))
    average = shared_by(second)["master_average"]
    assert torch.equal(average, shared_by(first)["master"])
    run_steps(second, range(7, 9))
    assert torch.equal(average, shared_by(second)["master"])  # the first round in the average
    run_steps(second, range(9, 12))
    third = load(save(tmp_path, second), build())
    assert "master_average" not in shared_by(third) and not third.averages_master
    assert state(run_steps(third, range(12, 20))) == state(run_steps(first, range(7, 20)))
    again = load(save(tmp_path, third), build(master_average=0.5))
    assert again.param_groups[0]["rounds_averaged"] == 0


@pytest.mark.parametrize("now", [1, 2, 5])
def test_average_of_the_master_is_kept_with_other_replicas(tmp_path, now):
    first = run_steps(build(master_average=0.5), range(9))
    second = load(save(tmp_path, first), build(now, master_average=0.5))
    assert torch.equal(shared_by(second)["master_average"], shared_by(first)["master_average"])
    assert [group["rounds_averaged"] for group in second.param_groups] == [3] * now
    run_steps(second, range(9, 12))
    assert second.rounds_done == 4


def test_checkpoint_is_a_copy_of_the_state(tmp_path):
    optimizer = run_steps(build(), range(4))
    then = state(optimizer)
    path = save(tmp_path, optimizer)
    run_steps(optimizer, range(4, 9))
    assert state(load(path, build())) == then


def test_only_the_last_two_checkpoints_are_kept(tmp_path):
    optimizer = build()
    for step in range(8):
        save(tmp_path, run_steps(optimizer, [step]))
    assert names(tmp_path) == ["00000002-0001", "00000002-0002"]
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["00000002-0002", "00000002-0001"]
    for path in checkpoint.list_checkpoints(tmp_path):
        files = [f"{kind}.pt" for number in range(3) for kind in (f"replica-{number}", f"buffers-{number}-0")]
        assert names(path) == sorted(["manifest.json", "shared.pt", *files])
        checkpoint.read_manifest(path)


def test_checkpoints_are_ordered_by_number(tmp_path):
    optimizer = build(sync_every=20_000)
    for rounds, steps in ((9, 11), (10, 0), (99999, 9_999), (99999, 10_000), (100000, 0)):
        for group in optimizer.param_groups:
            group |= dict(rounds_done=rounds, step_in_round=steps, steps_per_round=20_000)
        path = save(tmp_path, optimizer)
        assert checkpoint.list_checkpoints(tmp_path)[0] == path
        assert checkpoint.latest_valid(checkpoint.list_checkpoints(tmp_path))[1]["counters"]["step_in_round"] == steps


@pytest.mark.parametrize("name", ["backup", "00000001", "1-2-3", "00000002-0000.bak", "2x-0", "²-0"])
def test_directories_with_other_names_are_ignored_and_kept(tmp_path, name):
    path = save(tmp_path, run_steps(build(), range(3)))
    shutil.copytree(path, tmp_path / name)
    assert checkpoint.list_checkpoints(tmp_path) == [path]
    save(tmp_path, run_steps(build(), range(6)))
    save(tmp_path, run_steps(build(), range(9)))
    assert names(tmp_path) == sorted(["00000002-0000", "00000003-0000", name])


def test_saving_the_same_step_again_replaces_it(tmp_path):
    optimizer = run_steps(build(), range(4))
    save(tmp_path, optimizer, note="first")
    path = save(tmp_path, optimizer, note="second")
    assert checkpoint.read_manifest(path)["note"] == "second"
    assert names(tmp_path) == [path.name]


def test_manifest_contains_counters_and_arguments(tmp_path):
    manifest = checkpoint.read_manifest(
        save(tmp_path, run_steps(build(), range(4)), arguments=dict(lr=0.1), log_bytes=7)
    )
    assert (manifest["num_replicas"], manifest["arguments"], manifest["log_bytes"]) == (3, {"lr": 0.1}, 7)
    assert (manifest["counters"]["rounds_done"], manifest["counters"]["step_in_round"]) == (1, 1)


def test_unfinished_checkpoints_are_not_found(tmp_path):
    path = save(tmp_path, run_steps(build(), range(3)))
    shutil.copytree(path, tmp_path / ".00000002-0000")
    (tmp_path / "00000003-0000").mkdir()
    (tmp_path / "notes").write_text("mine")
    assert checkpoint.list_checkpoints(tmp_path) == [path]
    assert checkpoint.list_checkpoints(tmp_path / "none") == []


def rewrite(path, change):
    """Change the manifest and make its checksum match again."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sha256")
    change(manifest)
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


def truncate(path, name, size):
    os.truncate(path / name, size)


def flip(path, name, place):
    content = bytearray((path / name).read_bytes())
    content[place] ^= 1
    (path / name).write_bytes(content)


def replace_by_directory(path, name):
    (path / name).unlink()
    (path / name).mkdir()


def other_checksums(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["shared.pt"] = "0" * 64
    (path / "manifest.json").write_text(json.dumps(manifest))


def swap_replicas(path):
    (path / "replica-0.pt").rename(path / "x")
    (path / "replica-1.pt").rename(path / "replica-0.pt")
    (path / "x").rename(path / "replica-1.pt")


DAMAGE = {
    "a truncated replica": lambda path: truncate(path, "replica-1.pt", 700),
    "a flipped bit in a replica": lambda path: flip(path, "replica-0.pt", 500),
    "a flipped bit at the end": lambda path: flip(path, "shared.pt", -1),
    "an additional byte": lambda path: (path / "shared.pt").write_bytes((path / "shared.pt").read_bytes() + b"\0"),
    "a missing replica": lambda path: (path / "replica-1.pt").unlink(),
    "no buffers": lambda path: (path / "buffers-1-0.pt").unlink(),
    "a directory instead of a file": lambda path: replace_by_directory(path, "replica-1.pt"),
    "two replicas swapped": swap_replicas,
    "a truncated manifest": lambda path: truncate(path, "manifest.json", 100),
    "an empty manifest": lambda path: truncate(path, "manifest.json", 0),
    "a directory instead of the manifest": lambda path: replace_by_directory(path, "manifest.json"),
    "a manifest that is not JSON": lambda path: (path / "manifest.json").write_text("{'format': 1}"),
    "a manifest that is not text": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\0"),
    "a manifest that is a list": lambda path: (path / "manifest.json").write_text("[1, 2]"),
    "a manifest without keys": lambda path: (path / "manifest.json").write_text("{}"),
    "a deeply nested manifest": lambda path: (path / "manifest.json").write_text("[" * 100_000),
    "other checksums": other_checksums,
    "another format": lambda path: rewrite(path, lambda manifest: manifest.update(format=99)),
    "no format": lambda path: rewrite(path, lambda manifest: manifest.pop("format")),
    "no files": lambda path: rewrite(path, lambda manifest: manifest.pop("files")),
    "a list of files": lambda path: rewrite(path, lambda manifest: manifest.update(files=["shared.pt"])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_detected_and_the_previous_one_is_used(tmp_path, damage):
    optimizer = build()
    before, last = [save(tmp_path, run_steps(optimizer, steps)) for steps in (range(3), range(3, 6))]
    DAMAGE[damage](last)
    with pytest.raises(CheckpointError, match="00000002-0000"):
        checkpoint.read_manifest(last)
    path, manifest, (complaint,) = checkpoint.latest_valid([last, before])
    assert (path, manifest["counters"]["rounds_done"]) == (before, 1)
    assert str(last) in complaint
    assert "\n" not in complaint
    with pytest.raises(CheckpointError, match="00000002-0000"):
        checkpoint.latest_valid([last])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_replicas", value) for value in (0, "3")),
        *(("rounds_done", value) for value in (-5, float("nan"), None)),
        *(("step_in_round", value) for value in (-1, 3, 10**9, float("nan"), "1")),
        *(("steps_per_round", value) for value in (None, [1])),
        *(("log_bytes", value) for value in (-1, None)),
    ],
)
def test_invalid_counters_are_refused(tmp_path, name, value):
    path = save(tmp_path, run_steps(build(), range(4)))
    rewrite(path, lambda manifest: manifest.update(note="unchanged otherwise"))
    checkpoint.read_manifest(path)

    def change(manifest):
        (manifest if name in manifest else manifest["counters"])[name] = value

    rewrite(path, change)
    with pytest.raises(CheckpointError, match="00000001-0001"):
        checkpoint.read_manifest(path)


def test_no_checkpoint_at_all_is_an_error():
    with pytest.raises(CheckpointError):
        checkpoint.latest_valid([])


class Trap:
    """Creates a file when it is unpickled carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def forge(path, name, content):
    """Replace a file of a checkpoint and its checksum in the manifest."""
    if isinstance(content, bytes):
        (path / name).write_bytes(content)
    else:
        torch.save(content, path / name)
    rewrite(
        path, lambda manifest: manifest["files"].update({name: hashlib.sha256((path / name).read_bytes()).hexdigest()})
    )


@pytest.mark.parametrize("kind", ["torch.save", "pickle"])
@pytest.mark.parametrize("name", ["shared.pt", "replica-1.pt", "buffers-1-0.pt"])
def test_loading_a_checkpoint_executes_no_code(tmp_path, kind, name):
    created = tmp_path / "created"
    path = save(tmp_path / "checkpoints", run_steps(build(), range(3)))
    forge(path, name, {"master": Trap(created)} if kind == "torch.save" else pickle.dumps(Trap(created), 2))
    with pytest.raises(CheckpointError, match=name):
        load(path, build())
    assert not created.exists()
    pickle.loads(pickle.dumps(Trap(created)))
    assert created.exists(), "the trap does not work"


@pytest.mark.parametrize("name", ["shared.pt", "replica-1.pt", "buffers-1-0.pt"])
@pytest.mark.parametrize(
    "content",
    [[torch.zeros(4)], {}, {"master": 7, "weights": 7}, b"", b"PK\3\4"],
    ids=["list", "empty dict", "numbers", "empty file", "half a zip"],
)
def test_file_with_other_content_is_refused(tmp_path, name, content):
    path = save(tmp_path, run_steps(build(), range(3)))
    forge(path, name, content)
    with pytest.raises(CheckpointError):
        load(path, build())


@pytest.mark.parametrize(
    ("saved", "settings"),
    [
        ({}, dict(size=5)),
        ({}, dict(size=3)),
        ({}, dict(replicas=2, size=5)),
        ({}, dict(replicas=4, size=5)),
        (dict(sync_every=1), dict(sync_every=3)),
    ],
    ids=["larger", "smaller", "fewer and larger", "more and larger", "inner loop"],
)
def test_checkpoint_of_another_network_is_refused(tmp_path, saved, settings):
    path = save(tmp_path, run_steps(build(**saved), range(3)))
    with pytest.raises(CheckpointError, match=path.name):
        load(path, build(**settings))


# Several ranks


def save_from_ranks(optimizer, folders):
    """Save from one rank per replica, each with its own output directory. Return each rank's path or OSError."""

    def save(world):
        local = SimpleNamespace(num_replicas=len(folders), piggyback=[optimizer.piggyback[world.rank]])
        local.rounds_done, local.step_in_round = optimizer.rounds_done, optimizer.step_in_round
        local.param_groups = [optimizer.param_groups[world.rank]]
        own = checkpoint._split_by_replica(optimizer.state_dict())[world.rank]
        own["state"][0] |= shared_by(optimizer)  # every rank holds the master
        local.state_dict = lambda: own
        networks = build_networks([world.rank])
        metadata = METADATA if world.rank == 0 else {}
        try:
            return checkpoint.save(folders[world.rank], local, networks, metadata, Groups(Group(), world))
        except OSError as error:
            return error

    return run_ranks(len(folders), save)


def test_ranks_save_what_one_process_saves(tmp_path):
    optimizer = run_steps(build(), range(4))
    (path,) = set(save_from_ranks(optimizer, [tmp_path] * 3))
    assert state(load(path, build())) == state(optimizer)
    assert names(tmp_path) == [path.name]
    assert names(path) == names(save(tmp_path / "one process", optimizer))


def test_unshared_output_directory_is_an_error_on_every_rank(tmp_path):
    folders = [tmp_path / "one", tmp_path / "one", tmp_path / "two"]
    before = save(folders[0], run_steps(build(), range(3)))
    for error in save_from_ranks(run_steps(build(), range(6)), folders):
        assert isinstance(error, OSError)
        assert "replica-2.pt" in str(error) and "--out" in str(error)
    assert (names(folders[0]), names(folders[2])) == ([before.name], [])
    assert state(load(before, build())) == state(run_steps(build(), range(3)))


# Batch-norm statistics


def statistics(networks):
    return [[buffer.tolist() for buffer in network.buffers()] for network in networks]


def trained_networks(count):
    networks = build_networks(range(count))
    for number, network in networks.items():
        network(torch.randn(5, 2) + number)
    return networks


@pytest.mark.parametrize("now", [2, 3, 5])
def test_buffers_are_restored_and_averaged_in_new_replicas(tmp_path, now):
    optimizer, saved = run_steps(build(), range(4)), trained_networks(3)
    path = save(tmp_path, optimizer, saved)
    restored = build_networks(range(now))
    load(path, build(now), restored)
    master = nn.BatchNorm1d(2, affine=False)  # with the mean of the replicas' statistics
    for buffer, *own in zip(master.buffers(), *(network.buffers() for network in saved.values()), strict=True):
        buffer.copy_(torch.stack(own).double().mean(0))
    assert statistics(restored.values()) == statistics([*saved.values(), master, master][:now])
    assert len({str(values) for values in statistics(saved.values())}) == 3


WRAPPERS = {
    "plain": lambda network: network,
    "DataParallel": toy.DataParallel,
    "compiled": torch.compile,
    "compiled DataParallel": lambda network: torch.compile(toy.DataParallel(network)),
    "compiled layer": lambda network: nn.Sequential(torch.compile(network[0])),
}


@pytest.mark.parametrize("saved", WRAPPERS)
@pytest.mark.parametrize("restored", WRAPPERS)
def test_buffers_are_restored_with_and_without_wrappers(tmp_path, saved, restored):
    def wrap(networks, name):
        return {number: WRAPPERS[name](nn.Sequential(network)) for number, network in networks.items()}

    before, after = trained_networks(3), build_networks(range(3))
    load(save(tmp_path, build(), wrap(before, saved)), build(), wrap(after, restored))
    assert statistics(after.values()) == statistics(before.values())


def test_every_rank_of_a_replica_restores_its_own_buffers(tmp_path):
    optimizer, saved = run_steps(build(1), range(4)), trained_networks(3)

    def save(world):
        metadata = METADATA if world.rank == 0 else {}
        return checkpoint.save(tmp_path, optimizer, {0: saved[world.rank]}, metadata, Groups(world, world))

    (path,) = set(run_ranks(3, save))
    manifest, restored = checkpoint.read_manifest(path), build_networks(range(3))
    for rank, network in restored.items():
        checkpoint.restore(path, manifest, build(1), {0: network}, rank)
    assert statistics(restored.values()) == statistics(saved.values())


def test_buffers_of_another_shape_are_refused(tmp_path):
    path = save(tmp_path, run_steps(build(), range(3)))
    with pytest.raises(CheckpointError, match=path.name):
        load(path, build(), {number: nn.BatchNorm1d(3, affine=False) for number in range(3)})


# Failed writes


@contextmanager
def failing(monkeypatch, module, name, applies, error=FULL):
    """Make the function `name` of `module` raise within the context if `applies` is true of its arguments."""
    real = getattr(module, name, open)

    def fail(*arguments, **named):
        if applies(*arguments):
            raise error
        return real(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, fail, raising=False)
        yield


@pytest.mark.parametrize(
    "refused", ["manifest.json", "shared.pt", "replica-0.pt", "replica-2.pt", "buffers-1-0.pt", "rename"]
)
def test_failed_write_of_one_rank_fails_on_every_rank(tmp_path, monkeypatch, refused):
    before = save(tmp_path, run_steps(build(), range(3)))
    module, name, applies = checkpoint, "open", lambda path, mode: path.name == refused and mode != "rb"
    if refused == "rename":
        module, name, applies = os, "rename", lambda *_: True
    with failing(monkeypatch, module, name, applies):
        assert save_from_ranks(run_steps(build(), range(6)), [tmp_path] * 3) == [FULL] * 3
    assert names(tmp_path) == [before.name]
    assert state(load(before, build())) == state(run_steps(build(), range(3)))


def is_in_checkpoint(file):
    return re.search(r"\d{8}-\d{4}", os.readlink(f"/proc/self/fd/{file}"))


# torch's own error for a full disk
TORCH_FULL = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598")


@pytest.mark.parametrize(
    ("module", "name", "applies", "error"),
    [
        pytest.param(torch, "save", lambda *_: True, FULL, id="torch.save"),
        pytest.param(torch, "save", lambda *_: True, TORCH_FULL, id="torch.save, RuntimeError"),
        pytest.param(os, "fsync", is_in_checkpoint, FULL, id="fsync"),
        pytest.param(os, "mkdir", lambda *_: True, FULL, id="mkdir"),
    ],
)
def test_full_disk_leaves_previous_checkpoints_intact(tmp_path, monkeypatch, module, name, applies, error):
    before = save(tmp_path, run_steps(build(), range(3)))
    with failing(monkeypatch, module, name, applies, error), pytest.raises(OSError):
        save(tmp_path, run_steps(build(), range(6)))
    assert names(tmp_path) == [before.name]
    assert state(load(before, build())) == state(run_steps(build(), range(3)))


def test_saving_follows_no_link(tmp_path):
    """The name of the next checkpoint is known in advance."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "shared.pt").write_text("precious")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".00000001-0000").symlink_to(elsewhere)
    path = save(tmp_path / "checkpoints", run_steps(build(), range(3)))
    assert names(elsewhere) == ["shared.pt"] and (elsewhere / "shared.pt").read_text() == "precious"
    checkpoint.read_manifest(path)


@pytest.mark.filterwarnings("always")  # as after a library has changed a filter
@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL, errno.ENOTSUP])
def test_directories_that_cannot_be_synced_are_reported_once(run, tmp_path, monkeypatch, number):
    """SMB and some FUSE file systems flush files only."""

    def is_directory(file):
        return os.path.isdir(f"/proc/self/fd/{file}")

    with failing(monkeypatch, os, "fsync", is_directory, OSError(number, os.strerror(number))):
        assert run.new(tmp_path / "run", "--checkpoint-every", 1, at={12: STOP}) == 75
    (warning,) = run.warnings()
    assert os.strerror(number) in warning
    assert names(tmp_path / "run" / "checkpoints") == ["00000002-0000", "00000002-0002"]


def test_files_are_synced_before_the_rename(tmp_path, monkeypatch):
    synced, fsync, rename = [], os.fsync, os.rename

    def record(file):
        synced.append(Path(os.readlink(f"/proc/self/fd/{file}")))
        fsync(file)

    def check(source, target):
        assert {Path(source).resolve(), *Path(source).resolve().iterdir()} <= set(synced)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", check)
    path = save(tmp_path, run_steps(build(), range(3)))
    assert synced[-1] == path.parent.resolve()


# Another number of replicas


def stacked(optimizer, name):
    return torch.stack([vectors[name] for vectors in every_replica(optimizer)])


def anchors(optimizer):
    """Return the vectors whose mean is the master."""
    return stacked(optimizer, "anchor" if optimizer.step_in_round else "weights")


def check_master_stays_the_mean(optimizer, steps):
    for step in steps:
        run_steps(optimizer, [step])
        assert torch.allclose(optimizer.master, anchors(optimizer).mean(0), atol=1e-6), step


@pytest.mark.parametrize("done", [6, 8])
def test_new_replicas_start_at_the_master(tmp_path, done):
    three = run_steps(build(3), range(done))
    five = load(save(tmp_path, three), build(5))
    assert counters(five)[:3] == counters(three)
    assert torch.equal(five.master, three.master)
    for number in range(3):
        for name, vector in vectors_of(three, number).items():
            assert torch.equal(vectors_of(five, number)[name], vector), name
    for vectors in every_replica(five)[3:]:
        for name in ("weights", "anchor", "inner_avg"):
            assert torch.equal(vectors[name], three.master), name
        for name in ("inner_momentum_buffer", "outer_momentum_buffer"):
            assert not vectors[name].any(), name
    check_master_stays_the_mean(five, range(done, done + 9))


@pytest.mark.parametrize("done", [6, 8])
@pytest.mark.parametrize("remain", [1, 2])
def test_with_fewer_replicas_master_is_their_mean(tmp_path, done, remain):
    three = run_steps(build(3), range(done))
    fewer = load(save(tmp_path, three), build(remain))
    assert counters(fewer) == counters(three)[:remain]
    assert torch.allclose(fewer.master, anchors(three)[:remain].mean(0))
    for number in range(remain):
        for name, vector in vectors_of(three, number).items():
            assert torch.equal(vectors_of(fewer, number)[name], vector), name
    check_master_stays_the_mean(fewer, range(done, done + 9))


def test_folder_name_may_be_any_bytes(tmp_path):
    path = save(tmp_path / os.fsdecode(b"run\xff"), run_steps(build(2), range(6)))
    assert counters(load(path, build(2))) == counters(run_steps(build(2), range(6)))


def test_replica_files_are_memory_mapped_and_averaged_one_at_a_time(tmp_path, monkeypatch):
    """Memory that holds two replicas of WRN-28-10 need not hold twelve."""
    path = save(tmp_path, run_steps(build(7), range(6)))
    contents, alive, torch_load = [], [], torch.load

    def count(*given, **named):
        assert named["mmap"] and named["weights_only"]
        content = torch_load(*given, **named)
        if Path(given[0]).resolve().name.startswith("replica"):
            contents.append(weakref.ref(content["weights"][0]))
            alive.append(sum(content() is not None for content in contents))
        return content

    monkeypatch.setattr(torch, "load", count)
    load(path, build(6))
    assert len(contents) == 6 + 6  # for the mean of the remaining ones, and to load them
    assert max(alive[:6]) <= 2


@pytest.mark.parametrize("now", [2, 5])
@pytest.mark.parametrize("sync_every", [1, "auto"])
def test_other_number_of_replicas_with_short_rounds(tmp_path, now, sync_every):
    path = save(tmp_path, run_steps(build(3, sync_every=sync_every), range(7)))
    check_master_stays_the_mean(load(path, build(now, sync_every=sync_every)), range(7, 12))


def test_three_to_five_to_three_replicas_is_lossless(tmp_path):
    three = run_steps(build(3), range(6))
    five = load(save(tmp_path / "3", three), build(5))
    back = load(save(tmp_path / "5", five), build(3))
    assert state(back)[0][:3] == state(three)[0][:3]
    assert torch.allclose(back.master, three.master)


@pytest.mark.parametrize("now", [2, 5])
def test_piggyback_stays_a_mean_with_other_replicas(tmp_path, now):
    """The training loss since the last log line, for example, which new replicas do not have."""
    three = run_steps(build(3), range(4))
    for piggyback in three.piggyback:
        piggyback[0] = 6.0
    other = run_steps(load(save(tmp_path, three), build(now)), range(4, 6))
    assert [piggyback[0].item() for piggyback in other.piggyback] == [6.0] * now


# Non-finite replicas


class Expected:
    """n replicas of Parle in float64 numpy; `nonfinite` ones are left out of a round's mean and restarted."""

    def __init__(self, start, n, L, nb, lr, momentum, gamma, rho, alpha, outer_lr_scale, outer_momentum):
        self.n, self.L, self.nb, self.lr, self.mu = n, L, nb, lr, momentum
        self.eta, self.outer_mu = outer_lr_scale * lr, outer_momentum
        self.gamma, self.rho, self.alpha = gamma, rho, alpha
        self.x, self.vx = start.copy(), np.zeros_like(start)
        self.xa, self.u, self.v = np.tile(start, (n, 1)), np.zeros((n, len(start))), np.zeros((n, len(start)))
        self.k = 0

    def round(self, gradients, nonfinite=()):
        """gradients: (L, n, P)"""
        growth = (1 + 1 / (2 * self.nb)) ** self.k
        gamma, c = min(self.gamma * growth, 1), min(self.rho * self.L * self.n * growth, 10)
        finite = [a for a in range(self.n) if a not in nonfinite]
        y, z = self.xa.copy(), self.xa.copy()
        for g in gradients:
            d = g + (c * (y - self.x) if self.L == 1 else gamma * (y - self.xa))
            self.u = self.mu * self.u + d
            y = y - self.lr * (d + self.mu * self.u)
            z = self.alpha * z + (1 - self.alpha) * y
        if self.L == 1:
            self.xa, self.x = y, y[finite].mean(0)
        else:
            mean = z[finite].mean(0)
            d = (self.xa - z) + c * (self.xa - mean)
            self.v = self.outer_mu * self.v + d
            self.xa = self.xa - self.eta * (d + self.outer_mu * self.v)
            d = (1 + c) * (self.x - mean)
            self.vx = self.outer_mu * self.vx + d
            self.x = self.x - self.eta * (d + self.outer_mu * self.vx)
            if nonfinite:
                self.x = self.xa[finite].mean(0)
                self.vx = self.v[finite].sum(0) / self.n
        for a in nonfinite:
            self.xa[a], self.u[a], self.v[a] = self.x, 0, 0
        self.k += 1


def check_equal(optimizer, expected):
    def check(vector, value):
        assert vector.isfinite().all()
        np.testing.assert_allclose(vector.numpy(), value, rtol=1e-9, atol=1e-12)

    check(optimizer.master, expected.x)
    check(stacked(optimizer, "weights"), expected.xa)
    check(stacked(optimizer, "inner_momentum_buffer"), expected.u)
    if expected.L > 1:
        check(stacked(optimizer, "outer_momentum_buffer"), expected.v)
        check(stacked(optimizer, "anchor"), expected.xa)
        check(shared_by(optimizer)["master_momentum_buffer"], expected.vx)


@pytest.mark.parametrize("length", [5, 1])
@pytest.mark.parametrize(("nonfinite", "value"), [((1,), float("nan")), ((0,), float("inf")), ((0, 2), -float("inf"))])
def test_nonfinite_replica_is_excluded_and_restarted(length, nonfinite, value):
    settings = dict(lr=0.1, momentum=0.9, gamma=0.3, rho=0.1, alpha=0.75, outer_lr_scale=2, outer_momentum=0.4)
    start = torch.linspace(-1, 1, 6, dtype=torch.float64)
    weights = [nn.Parameter(start.clone()) for _ in range(3)]
    optimizer = Parle([[w] for w in weights], sync_every=length, batches_per_epoch=4, **settings)
    expected = Expected(start.numpy(), 3, length, 4, **settings)
    random = torch.Generator().manual_seed(1)
    for round in range(6):
        gradients = torch.randn(length, 3, 6, generator=random, dtype=torch.float64)
        for step, rows in enumerate(gradients):
            for w, row in zip(weights, rows, strict=True):
                w.grad = row.clone()
            if round == 2 and step == length // 2:
                for a in nonfinite:
                    weights[a].data[a + 1] = value
            optimizer.step()
        expected.round(gradients.numpy(), nonfinite if round == 2 else ())
        assert optimizer.nonfinite_replicas == (list(nonfinite) if round == 2 else [])
        check_equal(optimizer, expected)
        if round == 2:
            for a in nonfinite:
                assert torch.equal(vectors_of(optimizer, a)["weights"], optimizer.master)


@pytest.mark.parametrize("length", [5, 1])
def test_nan_gradients_restart_replica_and_piggyback(length):
    optimizer = build(sync_every=length)
    for _ in range(length):
        for replica, group in enumerate(optimizer.param_groups):
            group["params"][0].grad = torch.full((4,), float("nan") if replica == 2 else 1.0)
            optimizer.piggyback[replica][0] = float("nan") if replica == 2 else replica
        optimizer.step()
    assert optimizer.nonfinite_replicas == [2]
    assert [piggyback[0].item() for piggyback in optimizer.piggyback] == [0.5] * 3
    assert all(vector.isfinite().all() for some in every_replica(optimizer) for vector in some.values())
    run_steps(optimizer, range(length))
    assert optimizer.nonfinite_replicas == []


@pytest.mark.parametrize("length", [5, 1])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_nonfinite_loss_restarts_the_replica(length, value):
    optimizer = run_steps(build(sync_every=length), range(length))
    for replica, piggyback in enumerate(optimizer.piggyback):
        piggyback[training.LOSS] = value if replica == 2 else replica
    run_steps(optimizer, range(length))
    assert optimizer.nonfinite_replicas == [2]
    assert [piggyback.tolist() for piggyback in optimizer.piggyback] == [[0.5, 0, 0, 0, 0]] * 3
    assert torch.equal(vectors_of(optimizer, 2)["weights"], optimizer.master)
    assert optimizer.master.isfinite().all()
    assert not torch.equal(vectors_of(optimizer, 1)["weights"], optimizer.master)


@pytest.mark.parametrize("length", [5, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_of_the_mean_is_an_error(length, sign):
    optimizer = run_steps(build(sync_every=length, gamma=0, rho=0, momentum=0), range(length))
    vectors_of(optimizer, 0)["weights"][1] = sign * 2e38
    optimizer.reset()
    with pytest.raises(FloatingPointError, match=r"round 2\b.*\blr\b"):
        run_steps(optimizer, range(length))
    assert all(vectors["weights"][0].isfinite() for vectors in every_replica(optimizer))


@pytest.mark.parametrize("length", [5, 1])
@pytest.mark.parametrize("replicas", [1, 3])
def test_all_replicas_nonfinite_is_an_error(length, replicas):
    optimizer = build(replicas, sync_every=length)
    run_steps(optimizer, range(length))
    master = optimizer.master.clone()
    for vectors in every_replica(optimizer):
        vectors["weights"][1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"round 2\b"):
        run_steps(optimizer, range(length))
    assert torch.equal(optimizer.master, master)


def test_master_stays_the_mean_of_the_anchors_after_a_restart():
    optimizer = run_steps(build(sync_every=5), range(13))
    vectors_of(optimizer, 1)["weights"].fill_(float("nan"))
    run_steps(optimizer, range(13, 15))
    assert optimizer.nonfinite_replicas == [1]
    check_master_stays_the_mean(optimizer, range(15, 40))


# Runs


def tiny(name, channels, size, classes, dropout):
    """Replace models.build by a network with batch norm and dropout that takes a tenth of LeNet's time."""
    side = (size - 3) // 2 + 1
    return nn.Sequential(
        *(nn.Conv2d(channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Flatten(), nn.Linear(8 * side * side, classes)),
    )


class Run:
    """Runs parle_gpu.py on digits in this process."""

    SETTINGS = "-d digits --device cpu -n 3 -L 5 -b 24 --frac 0.075 --weight-decay 0.001 -B 1.4 --lr-drops 0.6"

    def __init__(self, monkeypatch, capsys, proc):
        self.monkeypatch, self.capsys, self.proc = monkeypatch, capsys, proc
        self.actions = {}
        monkeypatch.setattr(models, "build", tiny)
        monkeypatch.setattr(evaluation, "RECALIBRATION_BATCHES", 3)
        monkeypatch.setattr(fault_injection, "inject_fault", self._hook)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def _hook(self, optimizer, replicas):
        steps = 0

        def count(*_):
            nonlocal steps
            steps += 1
            if steps in self.actions:
                self.actions[steps]()

        optimizer.register_step_post_hook(count)

    def __call__(self, *arguments, at=None):
        """Run, and call each action in `at` after its number of steps. Return the exit status."""
        self.actions = at or {}
        self.monkeypatch.setattr(sys, "argv", ["parle_gpu.py", *map(str, arguments)])
        self.capsys.readouterr()
        status = 0
        try:
            parle_gpu.main()
        except SystemExit as exit:
            status = exit.code
        self.stdout, self.stderr = self.capsys.readouterr()
        return status

    def new(self, out, *arguments, settings=SETTINGS, at=None):
        return self(*settings.split(), "--proc", self.proc, "--out", out, *arguments, at=at)

    def warnings(self):
        return [line for line in self.stdout.splitlines() if "warning" in line.lower()]


@pytest.fixture
def run(monkeypatch, capsys, proc, no_launcher):
    return Run(monkeypatch, capsys, proc)


def send(number):
    return lambda: os.kill(os.getpid(), number)


def fail():
    raise RuntimeError("power failure")


STOP, SAVE = send(signal.SIGTERM), send(signal.SIGUSR1)


def log_of(out, *events):
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in log if line["event"] in events] if events else log


def result(out):
    """Return what must not depend on interruptions: the log without its timings, and the master."""
    lines = log_of(out, "round", "nonfinite", "eval", "finished")
    log = [{name: line[name] for name in line if not name.endswith(("seconds", "per_second"))} for line in lines]
    master = torch.load(out / "master.pt", weights_only=True)
    return log, {name: value.tolist() for name, value in master.items()}


@pytest.fixture(scope="session")
def results():
    return {}


@pytest.fixture
def uninterrupted(run, results, tmp_path):
    def uninterrupted(settings):
        if settings not in results:
            out = tmp_path / "uninterrupted"
            assert run.new(out, settings=settings) == 0
            results[settings] = result(out)
        return results[settings]

    return uninterrupted


PARLE = Run.SETTINGS  # 7 rounds of 5 steps; 5 rounds per epoch; lr drops after round 3, `round` events every 5 rounds
ONE = PARLE.replace("-L 5", "-L 1").replace("-B 1.4", "-B 6").replace("0.6", "4")  # lr drops after round 20
AUTO = PARLE.replace("-L 5", "-L auto --gamma 0.02")
AUGMENTED = PARLE.replace("-b 24 --frac 0.075", "-b 150 --frac 0.5") + " --augment"
ELASTIC = ONE.replace("-L 1", "--method elastic-sgd --eval-every 7")
ENTROPY = PARLE.replace("-n 3", "--method entropy-sgd --outer-momentum 0.5")
AVERAGED = PARLE + " --master-average 0.5"


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        pytest.param(PARLE, [1], id="after the first step"),
        pytest.param(PARLE, [10], id="at the end of a round, between log lines"),
        pytest.param(PARLE, [14], id="just before lr drops"),
        pytest.param(PARLE, [15], id="as lr drops"),
        pytest.param(PARLE, [25], id="at the end of an epoch"),
        pytest.param(PARLE, [34], id="just before the end"),
        pytest.param(PARLE, [13, 2, 1, 11], id="four times"),
        pytest.param(ONE, [20], id="L 1, as lr drops"),
        pytest.param(ONE, [25, 1], id="L 1, at a log line and after it"),
        pytest.param(AUTO, [3], id="auto, in the middle of a round"),
        pytest.param(AUTO, [14, 2], id="auto, when lr drops and after"),
        pytest.param(AUGMENTED, [12], id="augmented"),
        pytest.param(ELASTIC, [17, 4], id="elastic-sgd"),
        pytest.param(ENTROPY, [12], id="entropy-sgd"),
        pytest.param(AVERAGED, [13], id="averaged master"),
    ],
)
def test_resume_is_bitwise_identical(run, uninterrupted, tmp_path, settings, stops):
    expected = uninterrupted(settings)
    out = tmp_path / "run"
    status = run.new(out, settings=settings, at={stops[0]: STOP})
    for count in [*stops[1:], 0]:
        assert status == 75
        assert run.stdout.splitlines()[-1].endswith(f"{launcher.python_command()} parle_gpu.py --resume {out}")
        assert log_of(out)[-1]["event"] == "interrupted"
        status = run("--resume", out, at={count: STOP})
    assert (status, run.stderr) == (0, "")
    assert result(out) == expected
    assert len(log_of(out, "resume")) == len(stops)


@pytest.mark.parametrize("drop", [0.04, 0.2])
def test_lr_drops_once_after_resuming(run, uninterrupted, tmp_path, drop):
    settings = PARLE.replace("0.6", f"{drop} 0.6 0.6").replace("-B 1.4", "-B 0.8")
    expected = uninterrupted(settings)
    assert run.new(tmp_path / "run", settings=settings, at={2: STOP}) == 75
    assert run("--resume", tmp_path / "run") == 0
    assert result(tmp_path / "run") == expected


def test_crash_in_the_evaluation_before_a_stop_loses_nothing(run, uninterrupted, tmp_path, monkeypatch):
    expected = uninterrupted(PARLE)
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "evaluate", lambda *_, **__: fail())
        with pytest.raises(RuntimeError, match="power failure"):
            run.new(out, at={25: STOP})
    assert names(out / "checkpoints") == ["00000005-0000"]
    assert run("--resume", out) == 0
    assert result(out) == expected


def test_steps_since_the_last_checkpoint_are_repeated(run, uninterrupted, tmp_path):
    expected = uninterrupted(PARLE)
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power failure") as failed:
        run.new(out, "--checkpoint-every", 2, at={33: fail})
    notes = "\n".join(failed.value.__notes__)
    assert "round 7" in notes and notes.endswith(f"{launcher.python_command()} parle_gpu.py --resume {out}")
    del failed, notes  # releases the lock on the log, as the end of a process does
    assert run("--resume", out) == 0
    assert log_of(out, "resume")[0]["round"] == 6
    assert result(out) == expected


def test_sigusr1_saves_and_continues(run, uninterrupted, tmp_path):
    expected = uninterrupted(PARLE)
    out, cut = tmp_path / "run", tmp_path / "cut"
    assert run.new(out, at={7: SAVE}) == 0
    assert result(out) == expected
    with pytest.raises(RuntimeError, match="power failure"):
        run.new(cut, at={7: SAVE, 9: fail})
    assert names(cut / "checkpoints") == ["00000001-0002"]
    assert run("--resume", cut) == 0
    assert result(cut) == expected


def test_second_sigint_stops_at_once(run, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.new(tmp_path / "run", at={7: twice})
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture
def stopped(run, results, tmp_path, tmp_path_factory):
    """Return the output directory of a run that was stopped in the middle of its second round."""
    if "stopped" not in results:
        results["stopped"] = tmp_path_factory.mktemp("stopped") / "run"
        assert run.new(results["stopped"], "--checkpoint-every", 1, at={7: STOP}) == 75
    return shutil.copytree(results["stopped"], tmp_path / "run")


# Changed arguments


@pytest.mark.parametrize("n", [2, 5])
def test_resume_with_another_number_of_replicas(run, stopped, n):
    assert run("--resume", stopped, "-n", n) == 0
    (line,) = [line for line in run.stdout.splitlines() if "00000001-0002" in line]
    assert re.search(rf"round 2\b.*\breplicas\b.*\b{n}\b.*\b3\b", line)
    (resume,) = log_of(stopped, "resume")
    assert (resume["num_replicas"], resume["changes"]) == (n, {"replicas": [3, n]})
    (*_, last) = log_of(stopped, "eval")
    assert len(last["replica_errors"]) == n
    assert last["master_error"] < 80
    assert log_of(stopped)[-1]["images_seen"] == 24 * (7 * 3 + 28 * n)
    checkpoint.read_manifest(checkpoint.list_checkpoints(stopped / "checkpoints")[0])


def test_resume_may_switch_the_average_of_the_master_on_and_off(run, uninterrupted, stopped):
    expected_log, expected_master = uninterrupted(PARLE)
    assert run("--resume", stopped, "--master-average", 0.5, at={8: STOP}) == 75
    assert log_of(stopped, "resume")[-1]["changes"] == {"master_average": [0.0, 0.5]}
    assert run("--resume", stopped, at={15: STOP}) == 75
    assert log_of(stopped, "eval")[-1]["unaveraged_master_loss"] == expected_log[1]["master_loss"]
    assert run("--resume", stopped, "--master-average", 0) == 0
    log, master = result(stopped)
    assert (log[-2], master) == (expected_log[-2], expected_master)


def test_elastic_sgd_keeps_rho_n_at_one_with_another_n(run, tmp_path):
    out = tmp_path / "run"
    assert run.new(out, settings=ELASTIC, at={3: STOP}) == 75
    assert run("--resume", out, "-n", 5) == 0
    assert log_of(out, "round")[0]["coupling_k"] == pytest.approx(1.1**4)


def test_resume_with_more_epochs_equals_a_longer_run(run, uninterrupted, tmp_path):
    expected_log, expected_master = uninterrupted(PARLE)
    out = tmp_path / "run"
    assert run.new(out, settings=PARLE.replace("-B 1.4", "-B 1")) == 0
    assert run("--resume", out, "-B", 1.4) == 0
    assert log_of(out, "resume")[0]["changes"] == {"epochs": [1.0, 1.4]}
    log, master = result(out)
    first, wanted = (next(line for line in lines if line["event"] == "eval") for lines in (log, expected_log))
    extra = first.keys() - wanted.keys()  # it was the last evaluation, which has more
    assert extra
    for name in extra:
        del first[name]
    assert (log, master) == (expected_log, expected_master)


@pytest.mark.parametrize(
    ("changes", "per_epoch", "lr"),
    [
        ("batch_size", 4, 0.04),  # lr drops after 3 and 6 rounds
        ("frac", 3, 0.016),  # after 2 and 5
        ("batch_size frac", 9, 0.1),  # after 7 and 14
        ("lr_drops", 5, 0.04),
        ("lr_decay", 5, 0.04),
        ("lr", 5, 0.04),
        ("momentum", 2, 0.07),
        ("", 2, 0.07),
    ],
)
def test_lr_follows_the_drops_when_arguments_change(tmp_path, changes, per_epoch, lr):
    path = save(tmp_path, run_steps(build(lr=0.07), range(15)))
    resume = experiment.ResumePoint(path, checkpoint.read_manifest(path), dict.fromkeys(changes.split(), (1, 2)))
    args = SimpleNamespace(lr=0.1, lr_drops=[0.8, 1.6], lr_decay=0.4, epochs=9, eval_every=None, checkpoint_every=None)
    optimizer, batches = build(), SimpleNamespace(per_epoch=per_epoch)
    replicas = [training.LocalReplica(number, network, batches) for number, network in build_networks(range(3)).items()]
    experiment.Experiment(args, None, optimizer, replicas).restore(resume)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr] * 3)


@pytest.mark.parametrize(("change", "lr"), [("--frac 0.035", 0.02), ("-b 12 -B 0.2", 0.1), ("--lr 0.05", 0.01)])
def test_resume_trains_with_the_lr_of_changed_arguments(run, stopped, change, lr):
    assert run("--resume", stopped, *change.split()) == 0
    lines = log_of(stopped, "round")
    assert [line["lr"] for line in lines] == pytest.approx([lr] * len(lines)) and lines


def test_resume_reports_another_program(run, stopped):
    for path in checkpoint.list_checkpoints(stopped / "checkpoints"):
        rewrite(path, lambda manifest: manifest["arguments"].update(program="parle_mpi.py"))
    assert run("--resume", stopped, at={1: STOP}) == 75
    assert re.search(r"parle_gpu\.py.*parle_mpi\.py", run.stdout)
    assert log_of(stopped, "resume")[0]["changes"] == {"program": ["parle_mpi.py", "parle_gpu.py"]}


# Data of a resumed run


MNIST = "-d mnist --device cpu -n 2 -L 2 -b 5 -B 2"


def write_mnist(raw, monkeypatch, train=23, seed=0):
    """Write random images in torchvision's layout."""
    random = np.random.default_rng(seed)
    splits = [(random.integers(0, 256, (count, 6, 6, 1)), np.arange(count) % 10) for count in (train, 11)]
    write_idx("MNIST", raw, monkeypatch, splits)


@pytest.fixture
def stopped_on_mnist(run, tmp_path, monkeypatch):
    """Stop a run whose --data and --proc are relative, and change to another directory, with data of the same name."""
    for seed, name in enumerate("xy"):
        write_mnist(tmp_path / name / "raw", monkeypatch, seed=seed)
    monkeypatch.chdir(tmp_path / "x")
    assert run(*MNIST.split(), "--data", "raw", "--proc", "proc", "--out", "run", at={4: STOP}) == 75
    monkeypatch.chdir(tmp_path / "y")
    return Path("../x/run")


def test_resume_from_another_directory_uses_the_same_data(run, stopped_on_mnist, tmp_path):
    assert run("--resume", stopped_on_mnist) == 0
    (resume,) = log_of(stopped_on_mnist, "resume")
    assert (resume["source_dir"], resume["changes"]) == (str(tmp_path / "x" / "raw"), {})
    assert not Path("proc").exists()


def test_resume_lists_changed_data(run, stopped_on_mnist, tmp_path, monkeypatch):
    write_mnist(tmp_path / "z", monkeypatch, 24, seed=2)
    (start,) = log_of(stopped_on_mnist, "start")
    assert run("--resume", stopped_on_mnist, "--data", "../z", at={1: STOP}) == 75
    (resume,) = log_of(stopped_on_mnist, "resume")
    assert resume["changes"] == {
        "source_dir": [str(tmp_path / "x" / "raw"), str(tmp_path / "z")],
        "num_train_images": [23, 24],
        "data_checksum": [start["data_checksum"], resume["data_checksum"]],
    }
    assert start["data_checksum"] != resume["data_checksum"]
    assert str(tmp_path / "z") in run.stdout


def test_changed_pixels_are_listed_when_a_run_resumes(run, stopped_on_mnist, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "x" / "raw")
    write_mnist(tmp_path / "x" / "raw", monkeypatch, seed=3)
    assert run("--resume", stopped_on_mnist, at={1: STOP}) == 75
    assert list(log_of(stopped_on_mnist, "resume")[0]["changes"]) == ["data_checksum"]


def test_data_that_change_the_length_of_an_epoch_are_refused(run, stopped_on_mnist, tmp_path, monkeypatch):
    write_mnist(tmp_path / "z", monkeypatch, 43)
    before = content(stopped_on_mnist)
    assert run("--resume", stopped_on_mnist, "--data", "../z") == 2
    (line,) = run.stderr.splitlines()
    assert all(word in line for word in ("--resume", "--data", "23", "43"))
    assert content(stopped_on_mnist) == before
    assert run("--resume", stopped_on_mnist, "--data", "../z", "-b", 10, at={1: STOP}) == 75
    assert log_of(stopped_on_mnist, "resume")[0]["changes"].keys() > {"batch_size", "num_train_images"}


# What --resume names


def parsed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["parle_gpu.py", *map(str, arguments)])
    return cli.parse(cli.build_parser("parle_gpu.py", ""))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--resume {run} -m allcnn", ["allcnn", "lenet"]),
        ("--resume {run} -d mnist", ["mnist", "digits"]),
        ("--resume {run} --method elastic-sgd", ["elastic-sgd", "parle"]),
        ("--resume {run} --zca", ["zca"]),
        ("--resume {run}/nowhere", ["nowhere"]),
        ("--resume {run}/empty", ["empty"]),
        ("--resume {run}/log.jsonl", ["log.jsonl"]),
        ("--resume", ["DIR"]),
    ],
)
def test_unusable_resume_argument_is_a_usage_error(stopped, monkeypatch, arguments, words):
    (stopped / "empty").mkdir()
    with pytest.raises(cli.UsageError) as caught:
        parsed(monkeypatch, *arguments.format(run=stopped).split())
    message = str(caught.value)
    assert all(word in message for word in ["--resume", *words]) and "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "damage"),
    [
        ("-L 1", lambda path: None),
        ("-m allcnn", lambda path: None),
        ("", DAMAGE["a truncated replica"]),
        ("", DAMAGE["a manifest that is not JSON"]),
        ("", lambda path: forge(path, "shared.pt", {"master": Trap("created")})),
    ],
    ids=["another method", "another model", "truncated", "no manifest", "forged"],
)
def test_failed_resume_is_one_line_and_changes_nothing(run, stopped, arguments, damage):
    for path in checkpoint.list_checkpoints(stopped / "checkpoints"):
        damage(path)
    before = content(stopped)
    assert run("--resume", stopped, *arguments.split()) == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("parle_gpu.py: ") and "--resume" in line
    assert content(stopped) == before


def test_resume_without_a_path_uses_out(run, uninterrupted, stopped):
    expected = uninterrupted(PARLE)
    assert run("--out", stopped, "--resume") == 0
    assert result(stopped) == expected


def test_resume_from_a_named_checkpoint(run, uninterrupted, stopped):
    expected = uninterrupted(PARLE)
    assert run("--resume", stopped / "checkpoints" / "00000001-0000") == 0
    assert log_of(stopped, "resume")[0]["round"] == 1
    assert result(stopped) == expected


def content(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def elsewhere(stopped, tmp_path, monkeypatch):
    """Return the directory of another run, which has a copy of a checkpoint in copies/."""
    folder = tmp_path / "another"
    shutil.copytree(stopped / "checkpoints" / "00000001-0002", folder / "copies" / "00000001-0002")
    shutil.copytree(stopped / "checkpoints", folder / "checkpoints")
    for name in ("log.jsonl", "master.pt", "copies/log.jsonl", "copies/master.pt"):
        (folder / name).write_text("precious\n" * 1000)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def link(path, target):
    path.symlink_to(target)
    return path


@pytest.mark.parametrize(
    "named",
    [
        lambda another: another / "copies" / "00000001-0002",
        lambda another: Path("../another/copies/00000001-0002"),
        lambda another: another / "checkpoints" / ".." / "copies" / "00000001-0002",
        lambda another: link(Path("link"), another / "copies" / "00000001-0002"),
        lambda another: link(another / "checkpoints" / "00000009-0000", "../copies/00000001-0002"),
        lambda another: link(another / "link", "copies") / "00000001-0002",
        lambda another: os.chdir(another / "copies") or Path("00000001-0002"),
    ],
    ids=["absolute", "relative", "dots", "link to it", "link in checkpoints", "link above it", "from its directory"],
)
def test_checkpoint_outside_a_run_gets_a_new_directory(elsewhere, monkeypatch, named):
    path = named(elsewhere)
    assert parsed(monkeypatch, "--resume", path).out is None
    assert parsed(monkeypatch, "--resume", path, "--out", "new").out == Path("new")


@pytest.mark.parametrize(
    "named",
    [
        lambda run: run / "checkpoints" / "00000001-0002",
        lambda run: os.chdir(run / "checkpoints") or "00000001-0002",
        lambda run: os.chdir(run) or "checkpoints/00000001-0002",
        lambda run: link(run.parent / "link", run / "checkpoints" / "00000001-0002"),
        lambda run: shutil.copytree(run / "checkpoints" / "00000001-0002", run / "checkpoints" / "backup"),
    ],
    ids=["absolute", "from its directory", "from the run's directory", "a link", "a copy beside it"],
)
def test_checkpoint_of_a_run_resumes_in_its_directory(elsewhere, stopped, monkeypatch, named):
    path = named(stopped)
    args = parsed(monkeypatch, "--resume", path)
    assert args.out.samefile(stopped)
    assert Path(args.resume).samefile(path)


def test_resume_by_a_link_writes_to_the_run(run, stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("--resume", link(tmp_path / "link", stopped / "checkpoints" / "00000001-0002"), at={1: STOP}) == 75
    assert names(stopped / "checkpoints") == ["00000001-0002", "00000001-0003"]
    assert [line["event"] for line in log_of(stopped)[-2:]] == ["resume", "interrupted"]
    assert not Path("runs").exists()


@pytest.mark.parametrize("arguments", [(), ("--out", "new")])
def test_resume_from_a_copy_does_not_change_its_directory(run, elsewhere, arguments):
    path = link(elsewhere / "checkpoints" / "00000009-0000", "../copies/00000001-0002")
    before = content(elsewhere)
    assert run("--resume", path, *arguments, at={1: STOP}) == 75
    assert content(elsewhere) == before
    (out,) = [Path("new")] if arguments else Path("runs").iterdir()
    assert (log_of(out)[0]["event"], log_of(out)[0]["round"]) == ("resume", 1)
    assert names(out / "checkpoints") == ["00000001-0003"]
    assert run.stdout.splitlines()[-1].endswith(f" --resume {out}")


def test_resume_into_another_run_does_not_change_its_log(run, stopped, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "log.jsonl").write_text("precious\n" * 1000)
    assert run("--resume", stopped, "--out", other) == 2
    assert (other / "log.jsonl").read_text() == "precious\n" * 1000


def test_damaged_newest_checkpoint_falls_back_with_a_warning(run, uninterrupted, stopped):
    expected = uninterrupted(PARLE)
    DAMAGE["a truncated replica"](stopped / "checkpoints" / "00000001-0002")
    assert run("--resume", stopped) == 0
    (warning,) = run.warnings()
    assert f"{stopped}/checkpoints/00000001-0002" in warning
    assert log_of(stopped, "resume")[0]["checkpoint"].endswith("00000001-0000")
    assert result(stopped) == expected


def is_valid(path):
    try:
        checkpoint.read_manifest(path)
    except CheckpointError:
        return False
    return True


def test_the_last_two_kept_after_a_damaged_one_are_valid(run, stopped):
    path = stopped / "checkpoints" / "00000006-0000"
    shutil.copytree(stopped / "checkpoints" / "00000001-0002", path)
    flip(path, "replica-1.pt", 500)
    with pytest.raises(RuntimeError, match="power failure"):
        run("--resume", stopped, at={14: fail})
    valid = [path for path in checkpoint.list_checkpoints(stopped / "checkpoints") if is_valid(path)]
    assert [path.name for path in valid] == ["00000004-0000", "00000003-0000"]


def test_checkpoints_after_an_older_one_become_the_newest(run, stopped):
    """Otherwise the next --resume would continue from a checkpoint that the user discarded."""
    assert run("--resume", stopped, at={13: STOP}) == 75
    old = checkpoint.list_checkpoints(stopped / "checkpoints")[1]
    assert run("--resume", old, "--momentum", 0.5, at={1: STOP}) == 75
    assert run("--resume", stopped, at={1: STOP}) == 75
    assert log_of(stopped, "resume")[-1]["arguments"]["momentum"] == 0.5


def test_resuming_an_older_checkpoint_archives_newer_ones(run, uninterrupted, stopped):
    """Otherwise a run killed before its first checkpoint would resume from one that the log does not contain."""
    expected = uninterrupted(PARLE)
    older = stopped / "checkpoints" / "00000001-0000"
    with pytest.raises(RuntimeError, match="power failure"):
        run("--resume", older, at={1: fail})
    assert checkpoint.list_checkpoints(stopped / "checkpoints") == [older]
    assert len(names(stopped / "checkpoints")) == 2
    log = (stopped / "log.jsonl").read_bytes()
    assert [json.loads(line)["event"] for line in log.splitlines()] == ["start", "resume"]
    assert log.endswith(b"\n")
    assert log.index(b"\n") + 1 == checkpoint.read_manifest(older)["log_bytes"]
    assert run("--resume", stopped) == 0
    assert [line["round"] for line in log_of(stopped, "resume")] == [1]
    assert names(stopped / "checkpoints") == ["00000006-0000", "00000007-0000"]
    assert result(stopped) == expected


def test_next_save_removes_archived_checkpoints(run, stopped):
    flip(stopped / "checkpoints" / "00000001-0002", "replica-1.pt", 500)
    with pytest.raises(RuntimeError, match="power failure"):
        run("--resume", stopped, at={1: SAVE, 2: fail})
    assert names(stopped / "checkpoints") == ["00000001-0000", "00000001-0001"]


# The command that resumes


def test_resume_command_quotes_the_directory(run, tmp_path):
    out = tmp_path / "my run"
    assert run.new(out, at={3: STOP}) == 75
    command = [*shlex.split(launcher.python_command()), "parle_gpu.py", "--resume", str(out)]
    assert shlex.split(run.stdout.splitlines()[-1])[-len(command) :] == command


@pytest.fixture
def commands(monkeypatch):
    """Return the resume commands that the supervising process gets, filled in as they are written."""
    written = []
    monkeypatch.setattr(rank_exit, "write_resume_command", lambda command, folder: written.append(command))
    return written


def test_resume_command_is_written_once_a_checkpoint_exists(run, commands, tmp_path):
    out = tmp_path / "run"
    command = f"{launcher.python_command()} parle_gpu.py --resume {out}"
    early = []
    with pytest.raises(RuntimeError, match="power failure") as failed:
        run.new(out, at={2: lambda: early.extend(commands), 3: SAVE, 4: fail})
    assert early == [] and commands == [command]
    assert failed.value.__notes__[-1].endswith(command)
    del failed
    with pytest.raises(RuntimeError, match="power failure"):
        run("--resume", out, at={1: fail})
    assert commands == [command] * 2


def test_resume_command_never_names_another_directory(run, commands, stopped, tmp_path):
    with pytest.raises(RuntimeError, match="power failure") as failed:
        run("--resume", stopped, "--out", tmp_path / "new", at={1: fail})
    assert commands == []
    (note,) = failed.value.__notes__
    assert "round 2" in note and "--resume" not in note


@pytest.mark.parametrize("older", [False, True])
def test_stop_that_cannot_be_saved_is_an_error(run, stopped, tmp_path, monkeypatch, older):
    with failing(monkeypatch, os, "fsync", is_in_checkpoint):
        out = stopped if older else tmp_path / "new"
        status = run("--resume", out, at={1: STOP}) if older else run.new(out, at={1: STOP})
    assert status == 1
    (line,) = run.stderr.splitlines()
    assert f"round {1 + older}" in line and str(FULL) in line
    assert (f"{launcher.python_command()} parle_gpu.py --resume {out}" in line) == older
    assert [line["event"] for line in log_of(out)[-2:]] == ["resume" if older else "start", "checkpoint_failed"]
    assert names(out / "checkpoints") == ["00000001-0000", "00000001-0002"] * older


def test_stop_saved_after_an_earlier_failure_exits_normally(run, tmp_path, monkeypatch):
    full = [FULL]

    def fsync(file):
        if full and is_in_checkpoint(file):
            raise full[0]

    monkeypatch.setattr(os, "fsync", fsync)
    assert run.new(tmp_path / "run", at={2: SAVE, 4: full.clear, 5: STOP}) == 75
    (warning,) = run.warnings()
    assert "round 0" in warning
    assert names(tmp_path / "run" / "checkpoints") == ["00000001-0000"]


# Timeouts


@pytest.mark.parametrize(
    ("module", "name", "round"),
    [(evaluation, "evaluate", 2), (checkpoint, "save", 2), (Parle, "sync", 1)],
    ids=["evaluation", "saving", "sync"],
)
def test_timeout_message_contains_the_round(run, tmp_path, monkeypatch, module, name, round):
    def time_out(*_, **__):
        raise distributed.CollectiveTimeout("waited 2 s for rank 1")

    monkeypatch.setattr(module, name, time_out)
    with pytest.raises(distributed.CollectiveTimeout) as caught:
        run.new(tmp_path / "run", "--eval-every", 1, at={7: SAVE})
    assert re.fullmatch(rf"waited 2 s for rank 1\b.*\bround {round}\b.*", rank_exit.describe_error(caught.value))


# master.pt


def test_saved_master_has_the_error_in_the_log(run, tmp_path, monkeypatch):
    monkeypatch.undo()  # a real network
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", f"p -d digits --device cpu -n 2 -L 2 -b 20 -B 1e-9 --proc {run.proc}".split())
    sys.argv += ["--out", str(out)]
    parle_gpu.main()
    model = models.build("lenet", channels=1, size=8, classes=10)
    model.load_state_dict(torch.load(out / "master.pt", weights_only=True))
    model.eval()
    data = loader.load("digits", None, run.proc)
    with torch.no_grad():
        wrong = model(data.inputs(data.test_images)).argmax(1) != data.test_labels
    assert 100 * wrong.double().mean().item() == pytest.approx(log_of(out, "eval")[-1]["master_error"])
    assert log_of(out)[-1]["master_error"] == log_of(out, "eval")[-1]["master_error"]


# A full disk


def test_run_continues_when_checkpoints_cannot_be_written(run, uninterrupted, stopped, monkeypatch):
    expected = uninterrupted(PARLE)
    before = content(stopped / "checkpoints")
    with failing(monkeypatch, torch, "save", lambda content, file: "checkpoints" in file.name, TORCH_FULL):
        assert run("--resume", stopped) == 0
    assert len(run.warnings()) == len(log_of(stopped, "checkpoint_failed")) == 6
    assert result(stopped) == expected
    assert content(stopped / "checkpoints") == before


def test_disk_full_in_the_middle_of_a_file(run, uninterrupted, stopped):
    """A limit on file sizes makes the kernel fail in the middle of a write."""
    expected = uninterrupted(PARLE)
    sizes = [path.stat().st_size for path in (stopped / "checkpoints").glob("*/replica-*.pt")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(sizes) - 100, limits[1]))  # master.pt fits
    try:
        assert run("--resume", stopped) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "round 7" in run.warnings()[-1]
    assert names(stopped / "checkpoints") == ["00000001-0000", "00000001-0002"]
    assert result(stopped) == expected
    assert run("--resume", stopped) == 0
    assert log_of(stopped, "resume")[-1]["checkpoint"].endswith("00000001-0002")
    assert result(stopped) == expected


@pytest.mark.parametrize("error", [FULL, TORCH_FULL])
def test_full_disk_keeps_the_previous_master(run, stopped, monkeypatch, error):
    (stopped / "master.pt").write_bytes(b"the old one")

    def is_master(content, file):
        file.write(b"half of it")
        return "master" in file.name

    with failing(monkeypatch, torch, "save", is_master, error):
        assert run("--resume", stopped) == 0
    assert any(f"{stopped}/master.pt" in line for line in run.warnings())
    assert (stopped / "master.pt").read_bytes() == b"the old one"
    assert names(stopped) == ["checkpoints", "log.jsonl", "master.pt"]


class Full:
    """A file that accepts half of what is written."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, text):
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        raise FULL


def test_full_disk_leaves_only_complete_lines_in_the_log(run, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def half_open(path, mode):
        file = open(path, mode)  # noqa: SIM115
        return Full(file) if mode == "a" and os.path.getsize(path) > 1500 else file

    with monkeypatch.context() as patched:
        patched.setattr(logger, "open", half_open, raising=False)
        assert run.new(out) == 0
    log = log_of(out)
    assert log[0]["event"] == "start"
    assert log[-1]["event"] != "finished"
    assert any(f"{out}/log.jsonl" in line for line in run.warnings())


@pytest.mark.parametrize("data", [{}, dict(batches_per_epoch="x", num_train_images=None)])
def test_manifest_without_the_data_of_a_run_is_refused(run, tmp_path, data):
    run.new(tmp_path / "run", "-B", 0.2)
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    rewrite(path, lambda manifest: manifest.update(data=data))
    assert run("--resume", tmp_path / "run", "-B", 1) == 2
    assert "manifest.json" in run.stderr


def test_doctor_is_not_taken_from_a_checkpoint(run, tmp_path):
    run.new(tmp_path / "run", "-B", 0.2)
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    rewrite(path, lambda manifest: manifest["arguments"].update(doctor=True))
    assert run("--resume", tmp_path / "run", "-B", 0.4) == 0
    (newest, _) = sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True)
    assert newest.name > path.name
