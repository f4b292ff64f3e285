"""Checkpoints in one process: what is kept, what is refused, and that a resumed run is the run that never stopped."""

import errno
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import engine
import experiment
import faults
import launch
import loader
import models
import parle_gpu
import ranks
import report
from checkpoint import CheckpointError
from parle_gpu import Parle

FULL = OSError(errno.ENOSPC, "No space left on device")


# Checkpoints of small optimizers


def build(replicas=3, size=4, **settings):
    """Parle over replicas of one vector, (size,)."""
    weights = [nn.Parameter(torch.linspace(-1, 1, size)) for _ in range(replicas)]
    return Parle([[w] for w in weights], **(dict(lr=0.1, sync_every=3, batches_per_epoch=4) | settings))


def gradient(replica, step, size=4):
    return torch.randn(size, generator=torch.Generator().manual_seed(100 * step + replica))


def move(optimizer, steps):
    for step in steps:
        for replica, group in enumerate(optimizer.param_groups):
            group["params"][0].grad = gradient(replica, step, len(group["params"][0])).to(group["params"][0].dtype)
        optimizer.step()
    return optimizer


def save(folder, optimizer, **facts):
    replicas = list(range(optimizer.num_replicas))
    facts = dict(arguments={}, progress={}, log_bytes=0) | facts
    return checkpoint.save(folder, optimizer, replicas, facts, engine.ALONE, engine.ALONE)


def load(path, optimizer):
    checkpoint.load(path, checkpoint.read_manifest(path), optimizer, list(range(optimizer.num_replicas)))
    return optimizer


def state(optimizer):
    """Every vector and counter, to compare bit for bit."""
    vectors = [*optimizer.vectors, optimizer.shared]
    return [{name: vector.tolist() for name, vector in some.items()} for some in vectors], optimizer.counters


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync_every", [3, 1, "auto"])
@pytest.mark.parametrize("done", [0, 2, 3, 7])
def test_what_was_saved_is_loaded_and_goes_on_alike(tmp_path, sync_every, done):
    first = move(build(sync_every=sync_every), range(done))
    path = save(tmp_path, first)
    second = load(path, build(sync_every=sync_every))
    assert state(second) == state(first)
    assert state(move(second, range(done, done + 8))) == state(move(first, range(done, done + 8)))


def test_a_checkpoint_holds_its_moment_though_training_goes_on(tmp_path):
    optimizer = move(build(), range(4))
    then = state(optimizer)
    path = save(tmp_path, optimizer)
    move(optimizer, range(4, 9))
    assert state(load(path, build())) == then


def test_the_last_two_are_kept_and_nothing_else(tmp_path):
    optimizer = build()
    for step in range(8):
        save(tmp_path, move(optimizer, [step]))
    assert names(tmp_path) == ["00000002-0001", "00000002-0002"]
    assert [path.name for path in checkpoint.found(tmp_path)] == ["00000002-0002", "00000002-0001"]
    for path in checkpoint.found(tmp_path):
        files = ["manifest.json", *(f"replica-{number}.pt" for number in range(3)), "shared.pt"]
        assert names(path) == files
        checkpoint.read_manifest(path)


def test_rounds_of_many_digits_are_in_order(tmp_path):
    optimizer = build(sync_every=12)
    for rounds, batches in ((9, 11), (10, 0), (99999, 2), (100000, 0)):
        optimizer.counters = optimizer.counters | dict(rounds=rounds, batches=batches)
        save(tmp_path, optimizer)
        assert checkpoint.found(tmp_path)[0].name == f"{rounds:08}-{batches:04}"


def test_mini_batches_of_many_digits_are_in_order(tmp_path):
    optimizer = build(sync_every=20_000)
    for batches in (9_999, 10_000):
        optimizer.counters = optimizer.counters | dict(rounds=1, batches=batches, round_length=20_000)
        save(tmp_path, optimizer)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["00000001-10000", "00000001-9999"]
    assert checkpoint.newest(checkpoint.found(tmp_path))[1]["counters"]["batches"] == 10_000


@pytest.mark.parametrize("name", ["backup", "00000001", "1-2-3", "00000002-0000.bak", "00000002-", "-1", "2x-0", "²-0"])
def test_a_name_that_is_no_moment_is_no_checkpoint_of_the_run(tmp_path, name):
    path = save(tmp_path, move(build(), range(3)))
    shutil.copytree(path, tmp_path / name)
    assert checkpoint.found(tmp_path) == [path]
    save(tmp_path, move(build(), range(6)))
    save(tmp_path, move(build(), range(9)))
    assert names(tmp_path) == sorted(["00000002-0000", "00000003-0000", name])


def test_the_same_moment_is_saved_again(tmp_path):
    optimizer = move(build(), range(4))
    save(tmp_path, optimizer, note="first")
    path = save(tmp_path, optimizer, note="second")
    assert checkpoint.read_manifest(path)["note"] == "second"
    assert names(tmp_path) == [path.name]


def test_the_manifest_holds_what_it_is_given(tmp_path):
    manifest = checkpoint.read_manifest(save(tmp_path, move(build(), range(4)), arguments=dict(lr=0.1), log_bytes=7))
    assert (manifest["replicas"], manifest["arguments"], manifest["log_bytes"]) == (3, {"lr": 0.1}, 7)
    assert (manifest["counters"]["rounds"], manifest["counters"]["batches"]) == (1, 1)


def test_one_that_was_never_finished_is_none(tmp_path):
    path = save(tmp_path, move(build(), range(3)))
    shutil.copytree(path, tmp_path / ".00000002-0000")
    (tmp_path / "00000003-0000").mkdir()
    (tmp_path / "notes").write_text("mine")
    assert checkpoint.found(tmp_path) == [path]
    assert checkpoint.found(tmp_path / "none") == []


def rewrite(path, change):
    """Change the manifest and make its sum fit again, as a forger would."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sum")
    change(manifest)
    manifest["sum"] = checkpoint._sum_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def truncate(path, name, size):
    os.truncate(path / name, size)


def flip(path, name, place):
    content = bytearray((path / name).read_bytes())
    content[place] ^= 1
    (path / name).write_bytes(content)


def replace_by_folder(path, name):
    (path / name).unlink()
    (path / name).mkdir()


def other_sums(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["shared.pt"] = "0" * 64
    (path / "manifest.json").write_text(json.dumps(manifest))


def swap(path):
    (path / "replica-0.pt").rename(path / "x")
    (path / "replica-1.pt").rename(path / "replica-0.pt")
    (path / "x").rename(path / "replica-1.pt")


DAMAGE = {
    "a truncated replica": lambda path: truncate(path, "replica-1.pt", 700),
    "an empty replica": lambda path: truncate(path, "replica-2.pt", 0),
    "a bit in a replica": lambda path: flip(path, "replica-0.pt", 500),
    "a bit at the end": lambda path: flip(path, "shared.pt", -1),
    "a byte more": lambda path: (path / "shared.pt").write_bytes((path / "shared.pt").read_bytes() + b"\0"),
    "no replica": lambda path: (path / "replica-1.pt").unlink(),
    "no shared": lambda path: (path / "shared.pt").unlink(),
    "a folder for a file": lambda path: replace_by_folder(path, "replica-1.pt"),
    "two replicas exchanged": swap,
    "a cut manifest": lambda path: truncate(path, "manifest.json", 100),
    "an empty manifest": lambda path: truncate(path, "manifest.json", 0),
    "a folder for the manifest": lambda path: replace_by_folder(path, "manifest.json"),
    "a manifest that is no JSON": lambda path: (path / "manifest.json").write_text("{'format': 1}"),
    "a manifest that is no text": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\0"),
    "a manifest that is a list": lambda path: (path / "manifest.json").write_text("[1, 2]"),
    "a manifest that is a number": lambda path: (path / "manifest.json").write_text("7"),
    "a manifest that is null": lambda path: (path / "manifest.json").write_text("null"),
    "a manifest of nothing": lambda path: (path / "manifest.json").write_text("{}"),
    "a manifest without end": lambda path: (path / "manifest.json").write_text("[" * 100_000),
    "other sums": other_sums,
    "another format": lambda path: rewrite(path, lambda manifest: manifest.update(format=99)),
    "no format": lambda path: rewrite(path, lambda manifest: manifest.pop("format")),
    "no files": lambda path: rewrite(path, lambda manifest: manifest.pop("files")),
    "files that are a list": lambda path: rewrite(path, lambda manifest: manifest.update(files=["shared.pt"])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path, damage):
    optimizer = build()
    before, last = [save(tmp_path, move(optimizer, steps)) for steps in (range(3), range(3, 6))]
    DAMAGE[damage](last)
    with pytest.raises(CheckpointError, match="00000002-0000 is damaged or no checkpoint"):
        checkpoint.read_manifest(last)
    path, manifest, (complaint,) = checkpoint.newest([last, before])
    assert (path, manifest["counters"]["rounds"]) == (before, 1)
    assert str(last) in complaint
    assert "\n" not in complaint
    with pytest.raises(CheckpointError, match="00000002-0000 is damaged"):
        checkpoint.newest([last])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("replicas", value) for value in (0, -1)),
        *(("rounds", value) for value in (-5, float("nan"))),
        *(("batches", value) for value in (-1, 3, 10**9, float("nan"))),
        *(("log_bytes", value) for value in (-1, -(10**30))),
    ],
)
def test_a_manifest_whose_sum_is_right_and_whose_counters_are_not_is_refused(tmp_path, name, value):
    path = save(tmp_path, move(build(), range(4)))
    rewrite(path, lambda manifest: manifest.update(note="as before"))
    checkpoint.read_manifest(path)

    def change(manifest):
        (manifest if name in manifest else manifest["counters"])[name] = value

    rewrite(path, change)
    with pytest.raises(CheckpointError, match="its counters are not what this program writes"):
        checkpoint.read_manifest(path)


@pytest.mark.parametrize("name", ["rounds", "batches", "round_length"])
@pytest.mark.parametrize("value", ["1", None, [1]])
def test_a_manifest_whose_counters_are_no_numbers_is_refused(tmp_path, name, value):
    path = save(tmp_path, move(build(), range(4)))
    rewrite(path, lambda manifest: manifest["counters"].update({name: value}))
    with pytest.raises(CheckpointError, match="00000001-0001 is damaged or no checkpoint"):
        checkpoint.read_manifest(path)


def test_without_any_it_says_so():
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint.newest([])


class Trap:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def forge(path, name, content):
    """Put a file into a checkpoint, under a manifest made to match."""
    if isinstance(content, bytes):
        (path / name).write_bytes(content)
    else:
        torch.save(content, path / name)
    rewrite(path, lambda manifest: manifest["files"].update({name: checkpoint._sum(path / name)}))


@pytest.mark.parametrize("kind", ["torch.save", "pickle"])
@pytest.mark.parametrize("name", ["shared.pt", "replica-1.pt"])
def test_nothing_in_it_is_executed(tmp_path, kind, name):
    sprung = tmp_path / "sprung"
    path = save(tmp_path / "checkpoints", move(build(), range(3)))
    forge(path, name, {"master": Trap(sprung)} if kind == "torch.save" else pickle.dumps(Trap(sprung), 2))
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load(path, build())
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists(), "the trap is none"


@pytest.mark.parametrize("name", ["shared.pt", "replica-1.pt"])
@pytest.mark.parametrize(
    "content",
    [[torch.zeros(4)], torch.zeros(4), {}, {"master": 7, "weights": 7}, 7, b"", b"PK\3\4"],
    ids=["list", "tensor", "nothing in it", "numbers", "number", "empty", "half a zip"],
)
def test_a_file_of_something_else_is_refused(tmp_path, name, content):
    path = save(tmp_path, move(build(), range(3)))
    forge(path, name, content)
    with pytest.raises(CheckpointError):
        load(path, build())


@pytest.mark.parametrize(
    "settings",
    [dict(size=5), dict(size=3), dict(replicas=2, size=5), dict(replicas=4, size=5)],
    ids=["larger", "smaller", "fewer and larger", "more and larger"],
)
def test_one_of_another_network_is_refused(tmp_path, settings):
    path = save(tmp_path, move(build(), range(3)))
    with pytest.raises(CheckpointError, match=r"is of another network or method \(\w+ does not fit\)"):
        load(path, build(**settings))


def test_one_without_inner_loop_is_refused_by_one_with(tmp_path):
    path = save(tmp_path, move(build(sync_every=1), range(3)))
    with pytest.raises(CheckpointError, match="another network or method"):
        load(path, build(sync_every=3))


# Several ranks


def at_once(size, work):
    """What `work(world)` gives on each of so many ranks, which are threads, or the OSError that it raises there."""
    barrier, values = threading.Barrier(size, timeout=20), [None] * size

    def answer(index):
        def gather(value):
            values[index] = value
            barrier.wait()
            every = list(values)
            barrier.wait()
            return every

        try:
            return work(engine.Team(index, size, gather=gather))
        except OSError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(answer, range(size)))


def save_at_once(optimizer, folders):
    """As ranks that have one replica each, and for `--out` these folders."""
    every = optimizer.vectors

    def work(world):
        own = SimpleNamespace(vectors=[every[world.index]], shared=optimizer.shared, num_replicas=len(folders))
        own.rounds, own.batches, own.counters = optimizer.rounds, optimizer.batches, optimizer.counters
        facts = dict(arguments={}, progress={}, log_bytes=0) if world.index == 0 else {}
        return checkpoint.save(folders[world.index], own, [world.index], facts, engine.ALONE, world)

    return at_once(len(folders), work)


def test_ranks_save_together_what_one_process_saves(tmp_path):
    optimizer = move(build(), range(4))
    (path,) = set(save_at_once(optimizer, [tmp_path] * 3))
    assert state(load(path, build())) == state(optimizer)
    assert names(tmp_path) == [path.name]


def test_a_folder_that_is_not_one_for_all_ranks_is_told_on_every_rank(tmp_path):
    folders = [tmp_path / "one", tmp_path / "one", tmp_path / "two"]
    before = save(folders[0], move(build(), range(3)))
    for error in save_at_once(move(build(), range(6)), folders):
        assert isinstance(error, OSError)
        assert str(error).endswith("replica-2.pt is not here: --out must be one folder for all ranks")
    assert (names(folders[0]), names(folders[2])) == ([before.name], [])
    assert state(load(before, build())) == state(move(build(), range(3)))


@pytest.mark.parametrize("refused", ["manifest.json", "its name", "shared.pt", "replica-0.pt", "replica-2.pt"])
def test_what_one_rank_cannot_write_fails_on_every_rank_and_leaves_nothing(tmp_path, monkeypatch, refused):
    before = save(tmp_path, move(build(), range(3)))

    def refusing(write):
        def refuse(path, *arguments):
            if path.name == refused or (refused == "its name" and write is os_rename):
                raise FULL
            return write(path, *arguments)

        return refuse

    os_rename = os.rename
    for module, name in ((checkpoint, "_write"), (checkpoint, "_write_text"), (os, "rename")):
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))
    assert save_at_once(move(build(), range(6)), [tmp_path] * 3) == [FULL] * 3
    assert names(tmp_path) == [before.name]
    assert state(load(before, build())) == state(move(build(), range(3)))


# Another number of replicas


def of_all(optimizer, name):
    return torch.stack([vectors[name] for vectors in optimizer.vectors])


def between(optimizer):
    """Where the master is the mean of them."""
    return of_all(optimizer, "anchor" if optimizer.batches else "weights")


def stays_the_mean(optimizer, steps):
    for step in steps:
        move(optimizer, [step])
        assert torch.allclose(optimizer.master, between(optimizer).mean(0), atol=1e-6), step


@pytest.mark.parametrize("done", [6, 8])
def test_new_replicas_start_at_the_master(tmp_path, done):
    three = move(build(3), range(done))
    five = load(save(tmp_path, three), build(5))
    assert five.counters == three.counters
    assert torch.equal(five.master, three.master)
    for number in range(3):
        for name, vector in three.vectors[number].items():
            assert torch.equal(five.vectors[number][name], vector), name
    for vectors in five.vectors[3:]:
        for name in ("weights", "anchor", "inner_avg"):
            assert torch.equal(vectors[name], three.master), name
        for name in ("inner_momentum_buffer", "outer_momentum_buffer"):
            assert not vectors[name].any(), name
    stays_the_mean(five, range(done, done + 9))


@pytest.mark.parametrize("done", [6, 8])
@pytest.mark.parametrize("remain", [1, 2])
def test_without_some_the_master_is_the_mean_of_the_others(tmp_path, done, remain):
    three = move(build(3), range(done))
    fewer = load(save(tmp_path, three), build(remain))
    assert fewer.counters == three.counters
    assert torch.allclose(fewer.master, between(three)[:remain].mean(0))
    for number in range(remain):
        for name, vector in three.vectors[number].items():
            assert torch.equal(fewer.vectors[number][name], vector), name
    stays_the_mean(fewer, range(done, done + 9))


def test_the_replicas_that_are_left_are_read_one_at_a_time(tmp_path, monkeypatch):
    """Twelve of WRN-28-10 at once would not fit where two of them do."""
    path = save(tmp_path, move(build(7), range(6)))
    asked, vectors, most = [], [], 0
    read, torch_load = checkpoint._read, torch.load

    def count(path):
        nonlocal most
        content = read(path)
        vectors.append(weakref.ref(content.get("weights", content.get("master"))))
        most = max(most, sum(vector() is not None for vector in vectors))
        return content

    monkeypatch.setattr(torch, "load", lambda *given, **named: asked.append(named) or torch_load(*given, **named))
    monkeypatch.setattr(checkpoint, "_read", count)
    load(path, build(6))
    assert len(vectors) > 12
    assert most <= 3  # what they share, and as one is read the one before
    assert all(named["mmap"] and named["weights_only"] for named in asked)


@pytest.mark.parametrize("now", [1, 2, 5])
@pytest.mark.parametrize("sync_every", [1, "auto"])
def test_another_number_goes_on_where_rounds_are_short(tmp_path, now, sync_every):
    path = save(tmp_path, move(build(3, sync_every=sync_every), range(7)))
    stays_the_mean(load(path, build(now, sync_every=sync_every)), range(7, 12))


def test_from_three_to_five_and_back_gives_the_three(tmp_path):
    three = move(build(3), range(6))
    five = load(save(tmp_path / "3", three), build(5))
    back = load(save(tmp_path / "5", five), build(3))
    assert state(back)[0][:3] == state(three)[0][:3]
    assert torch.allclose(back.master, three.master)


@pytest.mark.parametrize("now", [2, 3, 5])
def test_what_rides_with_a_message_stays_a_mean_whoever_joins(tmp_path, now):
    """Such as a line's loss: those who join in the middle of it have none."""
    three = move(build(3), range(4))
    for riders in three.riders:
        riders[0] = 6.0
    other = move(load(save(tmp_path, three), build(now)), range(4, 6))
    assert [riders[0].item() for riders in other.riders] == [6.0] * now


# Lost replicas


class Expected:
    """n replicas of Parle in float64 numpy, of which those in `lost` are left out of a round's mean and restarted."""

    def __init__(self, start, n, L, nb, lr, momentum, gamma, rho, alpha, outer_step, outer_momentum):
        self.n, self.L, self.nb, self.lr, self.mu = n, L, nb, lr, momentum
        self.eta, self.outer_mu = outer_step * lr, outer_momentum
        self.gamma, self.rho, self.alpha = gamma, rho, alpha
        self.x, self.vx = start.copy(), np.zeros_like(start)
        self.xa, self.u, self.v = np.tile(start, (n, 1)), np.zeros((n, len(start))), np.zeros((n, len(start)))
        self.k = 0

    def round(self, gradients, lost=()):
        """gradients: (L, n, P)"""
        growth = (1 + 1 / (2 * self.nb)) ** self.k
        gamma, c = min(self.gamma * growth, 1), min(self.rho * self.L * self.n * growth, 10)
        healthy = [a for a in range(self.n) if a not in lost]
        y, z = self.xa.copy(), self.xa.copy()
        for g in gradients:
            d = g + (c * (y - self.x) if self.L == 1 else gamma * (y - self.xa))
            self.u = self.mu * self.u + d
            y = y - self.lr * (d + self.mu * self.u)
            z = self.alpha * z + (1 - self.alpha) * y
        if self.L == 1:
            self.xa, self.x = y, y[healthy].mean(0)
        else:
            mean = z[healthy].mean(0)
            d = (self.xa - z) + c * (self.xa - mean)
            self.v = self.outer_mu * self.v + d
            self.xa = self.xa - self.eta * (d + self.outer_mu * self.v)
            d = (1 + c) * (self.x - mean)
            self.vx = self.outer_mu * self.vx + d
            self.x = self.x - self.eta * (d + self.outer_mu * self.vx)
        for a in lost:
            self.xa[a], self.u[a], self.v[a] = self.x, 0, 0
        self.k += 1


def agrees(optimizer, expected):
    def same(vector, value):
        assert vector.isfinite().all()
        np.testing.assert_allclose(vector.numpy(), value, rtol=1e-9, atol=1e-12)

    same(optimizer.master, expected.x)
    same(of_all(optimizer, "weights"), expected.xa)
    same(of_all(optimizer, "inner_momentum_buffer"), expected.u)
    if expected.L > 1:
        same(of_all(optimizer, "outer_momentum_buffer"), expected.v)
        same(of_all(optimizer, "anchor"), expected.xa)
        same(optimizer.shared["master_momentum_buffer"], expected.vx)


@pytest.mark.parametrize("length", [5, 1])
@pytest.mark.parametrize("lost", [(1,), (0,), (0, 2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_replica_has_no_part_in_the_mean_and_restarts_from_the_master(length, lost, value):
    settings = dict(lr=0.1, momentum=0.9, gamma=0.3, rho=0.1, alpha=0.75, outer_step=2, outer_momentum=0.4)
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
                for a in lost:
                    weights[a].data[a + 1] = value
            optimizer.step()
        expected.round(gradients.numpy(), lost if round == 2 else ())
        assert optimizer.lost == (list(lost) if round == 2 else [])
        agrees(optimizer, expected)
        if round == 2:
            for a in lost:
                assert torch.equal(optimizer.vectors[a]["weights"], optimizer.master)


@pytest.mark.parametrize("length", [5, 1])
def test_bad_gradients_lose_a_replica_too_and_its_riders(length):
    optimizer = build(sync_every=length)
    for _ in range(length):
        for replica, group in enumerate(optimizer.param_groups):
            group["params"][0].grad = torch.full((4,), float("nan") if replica == 2 else 1.0)
            optimizer.riders[replica][0] = float("nan") if replica == 2 else replica
        optimizer.step()
    assert optimizer.lost == [2]
    assert [riders[0].item() for riders in optimizer.riders] == [0.5] * 3
    assert all(vector.isfinite().all() for some in optimizer.vectors for vector in some.values())
    move(optimizer, range(length))
    assert optimizer.lost == []


@pytest.mark.parametrize("length", [5, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_loses_a_replica_whose_weights_are(length, value):
    optimizer = move(build(sync_every=length), range(length))
    for replica, riders in enumerate(optimizer.riders):
        riders[engine.LOSS] = value if replica == 2 else replica
    move(optimizer, range(length))
    assert optimizer.lost == [2]
    assert [riders.tolist() for riders in optimizer.riders] == [[0.5, 0, 0, 0, 0]] * 3
    assert torch.equal(optimizer.vectors[2]["weights"], optimizer.master)
    assert optimizer.master.isfinite().all()
    assert not torch.equal(optimizer.vectors[1]["weights"], optimizer.master)


@pytest.mark.parametrize("length", [5, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_mean_that_overflows_though_every_replica_is_finite_is_an_error(length, sign):
    optimizer = move(build(sync_every=length, gamma=0, rho=0, momentum=0), range(length))
    for vectors in optimizer.vectors:
        vectors["weights"][1] = sign * 2e38
        vectors["inner_momentum_buffer"].zero_()
    with pytest.raises(FloatingPointError, match="the master is not finite any more after round 2: try a lower lr"):
        move(optimizer, range(length))
    assert all(vectors["weights"][0].isfinite() for vectors in optimizer.vectors)


@pytest.mark.parametrize("length", [5, 1])
@pytest.mark.parametrize("replicas", [1, 3])
def test_without_any_good_replica_it_ends(length, replicas):
    optimizer = build(replicas, sync_every=length)
    move(optimizer, range(length))
    master = optimizer.master.clone()
    for vectors in optimizer.vectors:
        vectors["weights"][1] = float("nan")
    with pytest.raises(FloatingPointError, match="after round 2"):
        move(optimizer, range(length))
    assert torch.equal(optimizer.master, master)


def test_after_a_loss_the_master_comes_back_to_the_mean_of_the_anchors():
    optimizer = move(build(sync_every=5), range(13))
    optimizer.vectors[1]["weights"].fill_(float("nan"))
    away = []
    for round in range(2, 40):
        move(optimizer, range(5 * round + (3 if round == 2 else 0), 5 * round + 5))
        away.append(float((optimizer.master - of_all(optimizer, "weights").mean(0)).norm()))
    assert max(away[-5:]) < 0.1 * max(away), away


# Runs


class Run:
    """parle_gpu.py in this process, on digits."""

    SETTINGS = "-d digits --device cpu -n 3 -L 5 -b 24 --frac 0.075 --weight-decay 0.001 -B 1.4 --lr-drops 0.6"

    def __init__(self, monkeypatch, capsys, proc):
        self.monkeypatch, self.capsys, self.proc = monkeypatch, capsys, proc
        self.at = {}
        monkeypatch.setattr(engine, "RECALIBRATION_BATCHES", 3)
        for name in {name for names in launch.LAUNCHERS.values() for name in names if name}:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(faults, "inject", self._hook)

    def _hook(self, optimizer, replicas):
        steps = 0

        def count(*_):
            nonlocal steps
            steps += 1
            if steps in self.at:
                self.at[steps]()

        optimizer.register_step_post_hook(count)

    def __call__(self, *arguments, at=None):
        """Run, and call what `at` has for a number of mini-batches after so many. Gives the exit status."""
        self.at = at or {}
        self.monkeypatch.setattr(sys, "argv", ["parle_gpu.py", *map(str, arguments)])
        self.capsys.readouterr()
        status = 0
        try:
            parle_gpu.main()
        except SystemExit as exit:
            status = exit.code
        self.printed, self.erred = self.capsys.readouterr()
        return status

    def new(self, out, *arguments, settings=SETTINGS, at=None):
        return self(*settings.split(), "--proc", self.proc, "--out", out, *arguments, at=at)


@pytest.fixture
def run(monkeypatch, capsys, proc):
    return Run(monkeypatch, capsys, proc)


def ask(number):
    return lambda: os.kill(os.getpid(), number)


def fail():
    raise RuntimeError("a power cut")


STOP, SAVE = ask(signal.SIGTERM), ask(signal.SIGUSR1)
TIMINGS = {"seconds", "wall_seconds", "sync_seconds", "wait_seconds", "images_per_second"}


def log_of(out, *events):
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in log if line["event"] in events] if events else log


def result(out):
    """What must not depend on stops: the log but for timings and the stops themselves, and the master."""
    told = log_of(out, "round", "lost", "eval", "end")
    log = [{name: value for name, value in line.items() if name not in TIMINGS} for line in told]
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


PARLE = Run.SETTINGS  # 7 rounds of 5 mini-batches; 5 rounds an epoch; lr drops after 3, lines after 5
ONE = PARLE.replace("-L 5", "-L 1").replace("-B 1.4", "-B 6").replace("0.6", "4")  # lr drops after 20, lines after 25
AUTO = PARLE.replace("-L 5", "-L auto --gamma 0.02")
AUGMENTED = PARLE.replace("-b 24 --frac 0.075", "-b 150 --frac 0.5") + " --augment"
ELASTIC = ONE.replace("-L 1", "--method elastic-sgd --eval-every 7")
ENTROPY = PARLE.replace("-n 3", "--method entropy-sgd --outer-momentum 0.5")


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        pytest.param(PARLE, [1], id="after the first mini-batch"),
        pytest.param(PARLE, [7], id="in mid-round"),
        pytest.param(PARLE, [10], id="at a round's end, in mid-line"),
        pytest.param(PARLE, [14], id="just before lr drops", marks=pytest.mark.slow),
        pytest.param(PARLE, [15], id="as lr drops"),
        pytest.param(PARLE, [16], id="just after lr drops", marks=pytest.mark.slow),
        pytest.param(PARLE, [25], id="at an epoch's end"),
        pytest.param(PARLE, [34], id="just before the end", marks=pytest.mark.slow),
        pytest.param(PARLE, [8, 9], id="twice", marks=pytest.mark.slow),
        pytest.param(PARLE, [13, 2, 1, 11], id="four times", marks=pytest.mark.slow),
        pytest.param(ONE, [13], id="L 1, in mid-line", marks=pytest.mark.slow),
        pytest.param(ONE, [20], id="L 1, as lr drops", marks=pytest.mark.slow),
        pytest.param(ONE, [25, 1], id="L 1, at a line and after it", marks=pytest.mark.slow),
        pytest.param(AUTO, [3], id="auto, in mid-round", marks=pytest.mark.slow),
        pytest.param(AUTO, [13], id="auto, just before lr drops", marks=pytest.mark.slow),
        pytest.param(AUTO, [14], id="auto, at lr's drop", marks=pytest.mark.slow),
        pytest.param(AUTO, [15, 1], id="auto, after lr has dropped"),
        pytest.param(AUGMENTED, [12], id="augmented, in mid-round", marks=pytest.mark.slow),
        pytest.param(ELASTIC, [17, 4], id="elastic-sgd", marks=pytest.mark.slow),
        pytest.param(ENTROPY, [12], id="entropy-sgd", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(run, uninterrupted, tmp_path, settings, stops):
    expected = uninterrupted(settings)
    out = tmp_path / "run"
    status = run.new(out, settings=settings, at={stops[0]: STOP})
    for count in [*stops[1:], 0]:
        assert status == 75
        assert run.printed.splitlines()[-1].endswith(f"; go on with: {launch.python()} parle_gpu.py --resume {out}")
        assert log_of(out)[-1]["event"] == "stop"
        status = run("--resume", out, at={count: STOP})
    assert (status, run.erred) == (0, "")
    assert result(out) == expected
    assert len(log_of(out, "resume")) == len(stops)


def test_a_run_that_is_killed_as_it_evaluates_before_it_stops_loses_nothing(run, uninterrupted, tmp_path, monkeypatch):
    expected = uninterrupted(PARLE)
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(engine, "evaluate", lambda *_, **__: fail())
        with pytest.raises(RuntimeError, match="a power cut"):
            run.new(out, at={25: STOP})
    assert names(out / "checkpoints") == ["00000005-0000"]
    assert run("--resume", out) == 0
    assert result(out) == expected


@pytest.mark.slow
@pytest.mark.parametrize("drop", [0.04, 0.2])
def test_lr_drops_once_however_early(run, uninterrupted, tmp_path, drop):
    settings = PARLE.replace("0.6", f"{drop} 0.6 0.6").replace("-B 1.4", "-B 0.8")
    expected = uninterrupted(settings)
    assert run.new(tmp_path / "run", settings=settings, at={2: STOP}) == 75
    assert run("--resume", tmp_path / "run") == 0
    assert result(tmp_path / "run") == expected


def test_what_was_done_since_the_checkpoint_is_done_again(run, uninterrupted, tmp_path):
    expected = uninterrupted(PARLE)
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="a power cut") as failed:
        run.new(out, "--checkpoint-every", 2, at={33: fail})
    assert failed.value.__notes__ == ["in round 7", f"go on with: {launch.python()} parle_gpu.py --resume {out}"]
    del failed  # and with it, as when the process ends, the hold on the log
    assert run("--resume", out) == 0
    assert log_of(out, "resume")[0]["round"] == 6
    assert result(out) == expected


def test_usr1_saves_and_goes_on(run, uninterrupted, tmp_path):
    expected = uninterrupted(PARLE)
    out, cut = tmp_path / "run", tmp_path / "cut"
    assert run.new(out, at={7: SAVE}) == 0
    assert result(out) == expected
    with pytest.raises(RuntimeError, match="a power cut"):
        run.new(cut, at={7: SAVE, 9: fail})
    assert names(cut / "checkpoints") == ["00000001-0002"]
    assert run("--resume", cut) == 0
    assert result(cut) == expected


def test_a_second_interrupt_stops_at_once(run, tmp_path):
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
    """The folder of a run that was stopped in the middle of its second round."""
    if "stopped" not in results:
        results["stopped"] = tmp_path_factory.mktemp("stopped") / "run"
        assert run.new(results["stopped"], "--checkpoint-every", 1, at={7: STOP}) == 75
    return shutil.copytree(results["stopped"], tmp_path / "run")


@pytest.mark.parametrize("n", [2, 5])
def test_another_n_goes_on_and_is_told_in_one_line(run, stopped, n):
    assert run("--resume", stopped, "-n", n) == 0
    (line,) = [line for line in run.printed.splitlines() if "resumed" in line]
    assert f"resumed in round 2 from {stopped}/checkpoints/00000001-0002; replicas is {n}, was 3" in line
    (resume,) = log_of(stopped, "resume")
    assert (resume["replicas"], resume["changes"]) == (n, {"replicas": [3, n]})
    (*_, last) = log_of(stopped, "eval")
    assert len(last["replica_errors"]) == n
    assert last["master_error"] < 60
    assert log_of(stopped)[-1]["images"] == 24 * (7 * 3 + 28 * n)
    checkpoint.read_manifest(checkpoint.found(stopped / "checkpoints")[0])


@pytest.mark.slow
def test_elastic_sgd_keeps_rho_n_at_one(run, tmp_path):
    out = tmp_path / "run"
    assert run.new(out, settings=ELASTIC, at={3: STOP}) == 75
    assert run("--resume", out, "-n", 5) == 0
    assert log_of(out, "round")[0]["rho"] == pytest.approx(1.1**4)


def test_more_epochs_go_on_as_if_they_had_been_asked_for_at_once(run, uninterrupted, tmp_path):
    expected = uninterrupted(PARLE)
    out = tmp_path / "run"
    assert run.new(out, settings=PARLE.replace("-B 1.4", "-B 1")) == 0
    assert run("--resume", out, "-B", 1.4) == 0
    assert "epochs is 1.4, was 1.0" in run.printed
    log, master = result(out)
    last_then = next(line for line in log if line["event"] == "eval")
    for name in [name for name in last_then if name.startswith("averaged")]:
        del last_then[name]
    assert (log, master) == expected


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
def test_lr_is_what_the_drops_say_where_an_epoch_has_other_rounds(tmp_path, changes, per_epoch, lr):
    path = save(tmp_path, move(build(lr=0.07), range(15)))
    resumed = experiment.Resumed(path, checkpoint.read_manifest(path), dict.fromkeys(changes.split(), (1, 2)))
    args = SimpleNamespace(lr=0.1, lr_drops=[0.8, 1.6], lr_decay=0.4, epochs=9)
    optimizer = build()
    batches = SimpleNamespace(per_epoch=per_epoch)
    experiment.restore(args, resumed, optimizer, {number: (nn.Module(), batches) for number in range(3)})
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr] * 3)


@pytest.mark.parametrize(
    ("change", "lr"), [("--frac 0.035", 0.02), ("-b 48 -B 1", 0.02), ("-b 12 -B 0.2", 0.1), ("-B 0.4", 0.1)]
)
def test_a_run_that_goes_on_with_other_batches_trains_with_the_lr_of_its_drops(run, stopped, change, lr):
    assert run("--resume", stopped, *change.split()) == 0
    lines = log_of(stopped, "round")
    assert [line["lr"] for line in lines] == pytest.approx([lr] * len(lines)) and lines


def test_another_program_is_told(run, stopped):
    for path in checkpoint.found(stopped / "checkpoints"):
        rewrite(path, lambda manifest: manifest["arguments"].update(program="parle_mpi.py"))
    assert run("--resume", stopped, at={1: STOP}) == 75
    assert "; program is parle_gpu.py, was parle_mpi.py\n" in run.printed
    assert log_of(stopped, "resume")[0]["changes"] == {"program": ["parle_mpi.py", "parle_gpu.py"]}


def test_lr_given_anew_is_what_trains(run, stopped):
    assert run("--resume", stopped, "--lr", 0.05) == 0
    assert "lr is 0.05, was 0.1" in run.printed
    assert [line["lr"] for line in log_of(stopped, "round")] == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize(
    "arguments",
    ["-m allcnn", "-d mnist", "--method sgd", "--method elastic-sgd", "--whiten", "-L 1", "--resume /nowhere"],
)
def test_what_cannot_go_on_is_one_line_and_exit_code_2(run, stopped, arguments, monkeypatch):
    digits = loader.load("digits", None, run.proc)
    monkeypatch.setattr(loader, "load", lambda *_: digits)
    before = (stopped / "log.jsonl").read_bytes()
    checkpoints = names(stopped / "checkpoints")
    assert run("--resume", stopped, *arguments.split()) == 2
    (line,) = run.erred.splitlines()
    assert line.startswith("parle_gpu.py: error: --resume")
    assert (stopped / "log.jsonl").read_bytes() == before
    assert names(stopped / "checkpoints") == checkpoints


def test_rounds_of_one_do_not_become_longer(run, tmp_path):
    out = tmp_path / "run"
    assert run.new(out, settings=ONE, at={3: STOP}) == 75
    before = (out / "log.jsonl").read_bytes()
    assert run("--resume", out, "-L", 5) == 2
    (line,) = run.erred.splitlines()
    assert line.startswith("parle_gpu.py: error: --resume")
    assert (out / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [{"master": Trap("sprung")}, [1], {}], ids=["a trap", "a list", "nothing"])
def test_a_forged_checkpoint_is_one_line_and_exit_code_2(run, stopped, content):
    for path in checkpoint.found(stopped / "checkpoints"):
        forge(path, "shared.pt", content)
    before = (stopped / "log.jsonl").read_bytes()
    assert run("--resume", stopped) == 2
    (line,) = run.erred.splitlines()
    assert line.startswith("parle_gpu.py: error: ")
    assert (stopped / "log.jsonl").read_bytes() == before


def test_without_a_path_it_is_the_one_of_out(run, uninterrupted, stopped):
    expected = uninterrupted(PARLE)
    assert run("--out", stopped, "--resume") == 0
    assert result(stopped) == expected


def test_without_any_path_it_says_what_to_type(run):
    assert run("--resume") == 2
    assert run.erred == "parle_gpu.py: error: --resume needs the folder of the run: --resume DIR\n"


@pytest.mark.parametrize("kind", ["empty", "none", "a file"])
def test_a_folder_without_checkpoint_is_one_line(run, tmp_path, kind):
    folder = tmp_path / "run"
    if kind == "empty":
        folder.mkdir()
    elif kind == "a file":
        folder.write_text("mine")
    assert run("--resume", folder) == 2
    assert run.erred == f"parle_gpu.py: error: --resume {folder}: there is no checkpoint\n"
    assert not (folder / "log.jsonl").exists()


def test_a_checkpoint_can_be_named_itself(run, uninterrupted, stopped):
    expected = uninterrupted(PARLE)
    assert run("--resume", stopped / "checkpoints" / "00000001-0000") == 0
    assert log_of(stopped, "resume")[0]["round"] == 1
    assert result(stopped) == expected


def content(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def elsewhere(stopped, tmp_path, monkeypatch):
    """A copy of a checkpoint in a folder with a log, checkpoints and a master that are another run's."""
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
    ],
    ids=["absolute", "relative", "with dots", "a link to it", "a link in a run's checkpoints", "a link above it"],
)
def test_a_named_checkpoint_elsewhere_leaves_what_is_around_it_alone(run, elsewhere, named):
    path = named(elsewhere)
    before = content(elsewhere)
    assert run("--resume", path, at={1: STOP}) == 75
    assert content(elsewhere) == before
    (out,) = Path("runs").iterdir()
    assert (log_of(out)[0]["event"], log_of(out)[0]["round"]) == ("resume", 1)
    assert names(out / "checkpoints") == ["00000001-0003"]
    assert run.printed.splitlines()[-1].endswith(f" --resume {out}")


def test_a_checkpoint_elsewhere_named_from_its_own_folder_leaves_what_is_around_it_alone(run, elsewhere, monkeypatch):
    monkeypatch.chdir(elsewhere / "copies")
    before = content(elsewhere)
    assert run("--resume", "00000001-0002", at={1: STOP}) == 75
    after = content(elsewhere)
    assert {path: after[path] for path in before} == before
    (out,) = Path("runs").iterdir()
    assert {path for path in after if elsewhere / "copies" / "runs" not in (path, *path.parents)} == before.keys()
    assert names(out / "checkpoints") == ["00000001-0003"]


@pytest.mark.parametrize("kind", ["from its folder", "from the run's", "by a link"])
def test_a_checkpoint_of_a_run_goes_on_there_however_it_is_named(run, stopped, tmp_path, monkeypatch, kind):
    where, path = {
        "from its folder": (stopped / "checkpoints", "00000001-0002"),
        "from the run's": (stopped, "checkpoints/00000001-0002"),
        "by a link": (tmp_path, link(tmp_path / "link", stopped / "checkpoints" / "00000001-0002")),
    }[kind]
    monkeypatch.chdir(where)
    assert run("--resume", path, at={1: STOP}) == 75
    assert names(stopped / "checkpoints") == ["00000001-0002", "00000001-0003"]
    assert [line["event"] for line in log_of(stopped)[-2:]] == ["resume", "stop"]
    assert not (where / "runs").exists()


def test_a_copy_beside_a_runs_checkpoints_goes_on_in_that_run(run, stopped):
    copy = shutil.copytree(stopped / "checkpoints" / "00000001-0002", stopped / "checkpoints" / "backup")
    assert run("--resume", copy, at={1: STOP}) == 75
    assert copy.exists()


def test_a_checkpoint_elsewhere_goes_on_where_out_says(run, elsewhere, tmp_path):
    before = content(elsewhere)
    assert run("--resume", elsewhere / "copies" / "00000001-0002", "--out", tmp_path / "new", at={1: STOP}) == 75
    assert content(elsewhere) == before
    assert names(tmp_path / "new" / "checkpoints") == ["00000001-0003"]


@pytest.mark.parametrize("damage", ["a truncated replica", "a cut manifest", "no shared", "another format"])
def test_a_damaged_newest_is_told_and_the_one_before_is_taken(run, uninterrupted, stopped, damage):
    expected = uninterrupted(PARLE)
    DAMAGE[damage](stopped / "checkpoints" / "00000001-0002")
    assert run("--resume", stopped) == 0
    (warning,) = [line for line in run.printed.splitlines() if line.startswith("WARNING")]
    assert f"{stopped}/checkpoints/00000001-0002 is damaged" in warning
    assert "taking the one before" in warning
    assert result(stopped) == expected


@pytest.mark.parametrize("damage", DAMAGE)
def test_only_damaged_ones_are_one_line_and_exit_code_2(run, stopped, damage):
    for path in checkpoint.found(stopped / "checkpoints"):
        DAMAGE[damage](path)
    before = (stopped / "log.jsonl").read_bytes()
    assert run("--resume", stopped) == 2
    (line,) = run.erred.splitlines()
    assert line.startswith("parle_gpu.py: error: --resume")
    assert (stopped / "log.jsonl").read_bytes() == before


def test_after_a_damaged_newest_the_last_two_kept_are_good(run, stopped):
    path = stopped / "checkpoints" / "00000006-0000"
    shutil.copytree(stopped / "checkpoints" / "00000001-0002", path)
    flip(path, "replica-1.pt", 500)
    with pytest.raises(RuntimeError, match="a power cut"):
        run("--resume", stopped, at={14: fail})
    good = [path for path in checkpoint.found(stopped / "checkpoints") if is_good(path)]
    assert [path.name for path in good] == ["00000004-0000", "00000003-0000"]


def is_good(path):
    try:
        checkpoint.read_manifest(path)
    except CheckpointError:
        return False
    return True


def test_from_an_older_checkpoint_on_its_own_are_the_newest(run, stopped):
    """Else the next --resume would go on with what the user has left behind."""
    assert run("--resume", stopped, at={13: STOP}) == 75
    old = checkpoint.found(stopped / "checkpoints")[1]
    assert run("--resume", old, "--momentum", 0.5, at={1: STOP}) == 75
    assert run("--resume", stopped, at={1: STOP}) == 75
    assert log_of(stopped, "resume")[-1]["arguments"]["momentum"] == 0.5


def test_going_on_from_an_older_checkpoint_puts_the_later_aside_at_once(run, uninterrupted, stopped):
    """Else what is killed before its first checkpoint would go on from one that the log knows nothing of."""
    expected = uninterrupted(PARLE)
    older = stopped / "checkpoints" / "00000001-0000"
    with pytest.raises(RuntimeError, match="a power cut"):
        run("--resume", older, at={1: fail})
    assert names(stopped / "checkpoints") == [".00000001-0002-later", "00000001-0000"]
    assert checkpoint.found(stopped / "checkpoints") == [older]
    log = (stopped / "log.jsonl").read_bytes()
    assert [json.loads(line)["event"] for line in log.splitlines()] == ["start", "resume"]
    assert log.endswith(b"\n")
    assert log.index(b"\n") + 1 == checkpoint.read_manifest(older)["log_bytes"]
    assert run("--resume", stopped) == 0
    assert [line["round"] for line in log_of(stopped, "resume")] == [1]
    assert names(stopped / "checkpoints") == ["00000006-0000", "00000007-0000"]
    assert result(stopped) == expected


def test_the_next_checkpoint_removes_what_was_put_aside_and_keeps_the_one_gone_on_from(run, stopped):
    flip(stopped / "checkpoints" / "00000001-0002", "replica-1.pt", 500)
    with pytest.raises(RuntimeError, match="a power cut"):
        run("--resume", stopped, at={1: SAVE, 2: fail})
    assert names(stopped / "checkpoints") == ["00000001-0000", "00000001-0001"]


def test_the_log_of_another_run_is_never_cut(run, stopped, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "log.jsonl").write_text("precious\n" * 1000)
    run("--resume", stopped, "--out", other)
    assert (other / "log.jsonl").read_text().startswith("precious\n" * 1000)


def test_a_folder_with_a_space_is_quoted(run, tmp_path):
    out = tmp_path / "my run"
    assert run.new(out, at={3: STOP}) == 75
    command = shlex.split(run.printed.splitlines()[-1].partition("go on with: ")[2])
    assert command == [*shlex.split(launch.python()), "parle_gpu.py", "--resume", str(out)]


# What is said of how to go on


@pytest.fixture
def word(monkeypatch):
    """What is left for the process that has started the ranks."""
    left = []
    monkeypatch.setattr(launch, "leave_word", left.append)
    return left


def test_no_word_is_left_before_there_is_a_checkpoint(run, word, tmp_path):
    out = tmp_path / "run"
    left = []
    with pytest.raises(RuntimeError, match="a power cut") as failed:
        run.new(out, at={2: lambda: left.extend(word), 3: SAVE, 4: fail})
    assert left == []
    assert word == [f"{launch.python()} parle_gpu.py --resume {out}"]
    assert failed.value.__notes__[-1] == f"go on with: {word[0]}"


def test_a_checkpoint_of_another_folder_is_not_one_to_go_on_with(run, word, stopped, tmp_path):
    with pytest.raises(RuntimeError, match="a power cut") as failed:
        run("--resume", stopped, "--out", tmp_path / "new", at={1: fail})
    assert word == []
    assert failed.value.__notes__ == ["in round 2"]


def test_word_is_left_at_once_where_there_is_a_checkpoint(run, word, stopped):
    with pytest.raises(RuntimeError, match="a power cut"):
        run("--resume", stopped, at={1: fail})
    assert word == [f"{launch.python()} parle_gpu.py --resume {stopped}"]


@pytest.mark.parametrize("older", [False, True])
def test_a_stop_that_cannot_be_saved_says_so(run, stopped, tmp_path, monkeypatch, older):
    with full_for(monkeypatch, os, "fsync", of_a_checkpoint, FULL):
        out = stopped if older else tmp_path / "new"
        status = run("--resume", out, at={1: STOP}) if older else run.new(out, at={1: STOP})
    assert status == 1
    hint = f"; go on with: {launch.python()} parle_gpu.py --resume {out}" if older else ""
    error = f"stopped in round {1 + older}, which is not saved: {FULL}"
    assert run.erred == f"parle_gpu.py: error: {error}{hint}\n"
    assert [line["event"] for line in log_of(out)[-2:]] == ["resume" if older else "start", "checkpoint"]
    assert names(out / "checkpoints") == ["00000001-0000", "00000001-0002"] * older


def test_a_stop_that_is_saved_ends_well_though_a_checkpoint_before_it_was_not(run, tmp_path, monkeypatch):
    full = [FULL]

    def fsync(file):
        if full and of_a_checkpoint(file):
            raise full[0]

    monkeypatch.setattr(os, "fsync", fsync)
    assert run.new(tmp_path / "run", at={2: SAVE, 4: full.clear, 5: STOP}) == 75
    assert "WARNING: no checkpoint of round 0" in run.printed
    assert names(tmp_path / "run" / "checkpoints") == ["00000001-0000"]


# Hangs


def hang(*_, **__):
    raise ranks.Hang("waited 2 s for rank 1")


@pytest.mark.parametrize("where", ["evaluation", "saving", "a sync"])
def test_a_hang_is_told_with_its_round_wherever_it_is(run, tmp_path, monkeypatch, where):
    if where == "evaluation":
        monkeypatch.setattr(engine, "evaluate", hang)
    elif where == "saving":
        monkeypatch.setattr(checkpoint, "save", hang)
    else:
        monkeypatch.setattr(Parle, "_mean_messages", hang)
    with pytest.raises(ranks.Hang) as hung:
        run.new(tmp_path / "run", "--eval-every", 1, at={7: SAVE})
    round = {"evaluation": 2, "saving": 2, "a sync": 1}[where]
    assert ranks.reason(hung.value) == f"waited 2 s for rank 1; in round {round}"


# The master as a product


def test_the_saved_master_has_the_error_that_the_log_says(run, results, tmp_path):
    """Loaded as the README says."""
    out = tmp_path / "run"
    assert run.new(out, settings="-m allcnn -d digits --device cpu -n 2 -L 2 -b 20 -B 1e-9") == 0
    text = (Path(report.__file__).parent / "README.md").read_text()
    (lines,) = re.findall(r"( *model = models\.build\(.*?model\.eval\(\))", text, re.DOTALL)
    lines = textwrap.dedent(lines).replace('"lenet"', '"allcnn"').replace("size=28", "size=8")
    found = dict(models=models, torch=torch)
    exec(lines.replace("runs/…", str(out)), found)
    data = loader.load("digits", None, run.proc)
    with torch.no_grad():
        wrong = found["model"](data.inputs(data.test_images)).argmax(1) != data.test_labels
    assert 100 * wrong.double().mean().item() == pytest.approx(log_of(out, "eval")[-1]["master_error"])
    assert log_of(out)[-1]["master_error"] == log_of(out, "eval")[-1]["master_error"]


# A full disk


@contextmanager
def full_for(monkeypatch, module, name, applies, error):
    """Within, what `module` calls by `name` fails where that applies."""
    real = getattr(module, name, open)

    def fail(*arguments, **named):
        if applies(*arguments):
            raise error
        return real(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, fail, raising=False)
        yield


TORCHS = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598")


def of_a_checkpoint(file):
    return "checkpoints" in os.readlink(f"/proc/self/fd/{file}")


@pytest.mark.parametrize(
    ("module", "name", "applies", "error"),
    [
        pytest.param(torch, "save", lambda content, file: "checkpoints" in file.name, FULL, id="torch.save"),
        pytest.param(torch, "save", lambda content, file: "checkpoints" in file.name, TORCHS, id="torch.save, torch's"),
        pytest.param(os, "fsync", of_a_checkpoint, FULL, id="fsync"),
        pytest.param(checkpoint, "open", lambda path, mode: mode == "wb", FULL, id="open"),
        pytest.param(checkpoint, "open", lambda path, mode: mode == "w", FULL, id="open the manifest"),
        pytest.param(os, "mkdir", lambda path, *_: "checkpoints" in str(path), FULL, id="mkdir"),
        pytest.param(os, "rename", lambda *_: True, FULL, id="rename"),
    ],
)
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    run, uninterrupted, stopped, monkeypatch, module, name, applies, error
):
    expected = uninterrupted(PARLE)
    manifests = [checkpoint.read_manifest(path) for path in checkpoint.found(stopped / "checkpoints")]
    with full_for(monkeypatch, module, name, applies, error):
        assert run("--resume", stopped) == 0
    warnings = [line for line in run.printed.splitlines() if "WARNING: no checkpoint of round" in line]
    assert len(warnings) == len(log_of(stopped, "checkpoint")) == 6
    assert result(stopped) == expected
    assert names(stopped / "checkpoints") == ["00000001-0000", "00000001-0002"]
    assert [checkpoint.read_manifest(path) for path in checkpoint.found(stopped / "checkpoints")] == manifests


def test_a_disk_full_in_the_middle_of_a_file_costs_no_more(run, uninterrupted, stopped):
    """The kernel's own refusal, in the middle of a write, by a limit on the size of files."""
    expected = uninterrupted(PARLE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, limits[1]))  # master.pt fits
    try:
        assert run("--resume", stopped) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "WARNING: no checkpoint of round 7" in run.printed
    assert names(stopped / "checkpoints") == ["00000001-0000", "00000001-0002"]
    assert result(stopped) == expected
    assert run("--resume", stopped) == 0
    assert log_of(stopped, "resume")[-1]["checkpoint"].endswith("00000001-0002")
    assert result(stopped) == expected


@pytest.mark.parametrize("error", [FULL, TORCHS])
def test_a_full_disk_costs_a_new_master_and_not_the_old(run, stopped, monkeypatch, error):
    (stopped / "master.pt").write_bytes(b"the old one")

    def is_master(content, file):
        file.write(b"half of it")
        return file.name.endswith("master.tmp")

    with full_for(monkeypatch, torch, "save", is_master, error):
        assert run("--resume", stopped) == 0
    assert f"WARNING: {stopped}/master.pt is not the newest master" in run.printed
    assert (stopped / "master.pt").read_bytes() == b"the old one"
    assert names(stopped) == ["checkpoints", "log.jsonl", "master.pt"]


class Full:
    """A file that takes half of what is written."""

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


def test_a_full_disk_costs_whole_lines_of_the_log(run, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def half_open(path, mode):
        file = open(path, mode)  # noqa: SIM115
        return Full(file) if mode == "a" and os.path.getsize(path) > 1500 else file

    with monkeypatch.context() as patched:
        patched.setattr(report, "open", half_open, raising=False)
        assert run.new(out) == 0
    log = log_of(out)
    assert log[0]["event"] == "start"
    assert log[-1]["event"] != "end"
    assert f"WARNING: a line is missing from {out}/log.jsonl" in run.printed
