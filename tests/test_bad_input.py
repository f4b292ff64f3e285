"""Wrong command lines, damaged files and a full disk: a program prints one line, exits with 2 and writes nothing.

test_cli.py, test_loader.py and test_checkpoint.py have the tables of wrong input for each parser. This file has one
case for each way in which an error reaches the user.
"""

import functools
import hashlib
import importlib
import json
import os
import re
import shutil
import sys
import urllib.error
from pathlib import Path

import pytest
import torch

import loader
from parle import checkpoint, launcher, supervision
from tests.test_loader import (
    FullDisk,
    another_user,
    flip,
    in_the_way,
    make_unreadable,
    snapshot,
    write_pickle,
    write_raw,
)

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_launcher")]
TINY = "-d digits -n 1 -L 1 -b 4 -B 1e-9 --frac 0.01 --device cpu"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Make an empty directory the current one, with one thread and no network."""

    def refuse(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def proc(tmp_path_factory):
    proc = tmp_path_factory.mktemp("built")
    loader.load("digits", proc=proc)
    return proc


@pytest.fixture(scope="module")
def trained(proc, tmp_path_factory):
    """Train for three rounds and return the output directory, which has checkpoints of the last two."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in {name for names in launcher.LAUNCHERS.values() for name in names if name}:
            patch.delenv(name, raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        start(patch, *TINY.split(), "-B", 1, "--frac", 0.006, "--checkpoint-every", 1, "--proc", proc, "--out", folder)
        assert len(checkpoint.list_checkpoints(folder / checkpoint.FOLDER)) == 2
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """Copy `trained` without its last checkpoint, as if it had been stopped after the second round."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest, _ = checkpoint.list_checkpoints(run / checkpoint.FOLDER)
    shutil.rmtree(newest)
    return run


@pytest.fixture
def saved(run):
    """Return the only checkpoint of `run`."""
    (path,) = checkpoint.list_checkpoints(run / checkpoint.FOLDER)
    return path


def start(monkeypatch, *arguments, program="parle_gpu"):
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, arguments)])
    try:
        importlib.import_module(program).main()
    except SystemExit as exit:
        return exit.code
    return 0


@pytest.fixture
def assert_refused(monkeypatch, capsys, tmp_path):
    """Return a function that runs a program and checks that it exits with 2, prints one line and changes no file."""

    def assert_refused(*arguments, words, program="parle_gpu"):
        before = snapshot(tmp_path)
        capsys.readouterr()
        status = start(monkeypatch, *arguments, program=program)
        out, err = capsys.readouterr()
        assert (status, out, err.count("\n"), err[-1:]) == (2, "", 1, "\n"), err
        assert err.startswith(f"{program}.py: error: ")
        assert all(str(word) in err for word in words), err
        assert snapshot(tmp_path) == before

    return assert_refused


# Command lines


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("-n 0", ["-n/--replicas", "0"]),
        ("-b 1438 --frac 1", ["1438", "-b 1437"]),
        ("-b 1000000000000", ["-b"]),
        ("--gpus-per-replica 2", ["--gpus-per-replica 2", "cpu"]),
        (f"--gpus-per-replica {10**30}", [f"--gpus-per-replica {10**30}", "cpu"]),
        ("--gpus-per-replica 0", ["--gpus-per-replica", "0"]),
        ("--device nonsense", ["--device nonsense", "cpu"]),
        ("--data /nowhere", ["--data", "/nowhere"]),
        ("--proc /dev/null/below", ["--proc"]),
        ("--out /dev/null/below", ["--out"]),
    ],
)
def test_wrong_command_line_is_refused(line, words, proc, tmp_path, assert_refused):
    assert_refused(*TINY.split(), "--proc", proc, "--out", tmp_path / "run", *line.split(), words=words)


@pytest.mark.parametrize("program", ["parle_gpu", "parle_mpi"])
def test_invalid_omp_num_threads_is_refused(program, monkeypatch, assert_refused):
    monkeypatch.setenv("OMP_NUM_THREADS", "abc")
    monkeypatch.setattr(supervision, "spawn_ranks", None)
    assert_refused(*TINY.split(), program=program, words=["OMP_NUM_THREADS", "abc"])


@pytest.mark.parametrize("environment", [dict(PMI_RANK="0", PMI_SIZE="3"), dict(PMIX_RANK="0")])
def test_parle_gpu_is_refused_under_a_launcher(environment, monkeypatch, assert_refused):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_refused("-d", "digits", words=["mpirun", "parle_mpi.py"])


# Output directories


def test_output_directory_of_another_run_is_refused(run, trained, proc, tmp_path, assert_refused):
    assert_refused(*TINY.split(), "--proc", proc, "--out", run, words=["--out", run])
    shutil.copytree(trained, tmp_path / "other")
    assert_refused("--resume", run, "--out", tmp_path / "other", words=["--out", tmp_path / "other"])


def test_file_named_runs_is_refused(proc, assert_refused):
    in_the_way(Path("runs"))
    assert_refused(*TINY.split(), "--proc", proc, words=["--out", "runs/"])


# Data


def test_malicious_raw_file_is_refused_unexecuted(tmp_path, monkeypatch, assert_refused):
    _, files = write_raw("cifar10", tmp_path / "raw", monkeypatch)
    write_pickle(files[0], tmp_path / "owned")
    arguments = [*TINY.split(), "-d", "cifar10", "--data", tmp_path / "raw", "--proc", tmp_path / "proc"]
    assert_refused(*arguments, words=[files[0]])


@pytest.fixture
def cache(proc, tmp_path):
    """Copy the pre-processed digits."""
    shutil.copytree(proc / "digits", tmp_path / "proc" / "digits")
    return tmp_path / "proc" / "digits"


def test_damaged_cache_is_refused(cache, assert_refused):
    flip(0)(cache / "train_images.npy")
    assert_refused(*TINY.split(), "--proc", cache.parent, words=[cache])


def test_full_disk_is_reported_and_next_run_works(cache, proc, monkeypatch, assert_refused):
    (cache / "meta.json").write_text('{"format": 0}')
    arguments = [*TINY.split(), "--proc", cache.parent]
    with monkeypatch.context() as patch:
        patch.setattr(loader, "open", functools.partial(FullDisk, [92_000]), raising=False)
        assert_refused(*arguments, words=[cache, "No space left on device", "--proc"])
    assert start(monkeypatch, *arguments) == 0
    new, old = (snapshot(folder) for folder in (cache, proc / "digits"))
    assert [new[cache / path.name] for path in old if path.suffix == ".npy"] == [
        content for path, content in old.items() if path.suffix == ".npy"
    ]


# Checkpoints


def seal(path, changes):
    """Change a manifest and recompute its checksums, so that only its contents are wrong."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    changes(manifest)
    if isinstance(manifest.get("files"), dict):
        manifest["files"] = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in manifest["files"]}
    write_manifest(path, manifest)


def reseal(path, change):
    """Change a manifest and recompute only its own checksum."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    change(manifest)
    write_manifest(path, manifest)


def write_manifest(path, manifest):
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def test_manifest_with_wrong_content_is_rejected(saved):
    seal(saved, lambda manifest: None)
    checkpoint.read_manifest(saved)
    good = (saved / checkpoint.MANIFEST).read_bytes()
    names = ("arguments", "train_state", "counters", "num_replicas", "log_bytes", "files", "format")
    for changes in (
        *(lambda manifest, name=name: manifest.pop(name) for name in names),
        *(
            lambda manifest, value=value: manifest.update(format=value)
            for value in (0, checkpoint.FORMAT - 1, checkpoint.FORMAT + 1, str(checkpoint.FORMAT), None)
        ),
        lambda manifest: manifest.update(arguments=None),
        lambda manifest: manifest.update(counters={}),
        lambda manifest: manifest.update(num_replicas="x"),
        lambda manifest: manifest.update(num_replicas=0),
        lambda manifest: manifest["counters"].update(step_in_round=-1),
        lambda manifest: manifest.update(log_bytes=-1),
    ):
        (saved / checkpoint.MANIFEST).write_bytes(good)
        seal(saved, changes)
        with pytest.raises(checkpoint.CheckpointError, match=saved.name):
            checkpoint.read_manifest(saved)
    (saved / checkpoint.MANIFEST).write_text(json.dumps(json.loads(good) | dict(note="not in the checksum")))
    with pytest.raises(checkpoint.CheckpointError, match="checksum"):
        checkpoint.read_manifest(saved)


@pytest.mark.parametrize("name", ["/dev/zero", "../../secret", "replica-00.pt", "replica-1.pt", "log.jsonl"])
def test_manifest_names_only_files_of_a_checkpoint(name, run, saved, assert_refused):
    Path(run.parent, "secret").write_text("not to be read")

    good = (saved / checkpoint.MANIFEST).read_bytes()
    for dropped in ("nothing", "shared.pt"):

        def change(manifest, dropped=dropped):
            manifest["files"][name] = manifest["files"].pop(dropped, "0" * 64)

        reseal(saved, change)
        assert_refused("--resume", run, words=["--resume", saved])
        (saved / checkpoint.MANIFEST).write_bytes(good)


@pytest.mark.parametrize("name", ["replica-0.pt", "manifest.json"])
@pytest.mark.parametrize("endless", [lambda path: path.symlink_to("/dev/zero"), os.mkfifo], ids=["device", "pipe"])
def test_files_without_end_are_refused(name, endless, run, saved, assert_refused):
    (saved / name).unlink()
    endless(saved / name)
    assert_refused("--resume", run, words=["--resume", saved, name])


@pytest.mark.parametrize("count", [2, 10**9])
def test_manifest_of_another_number_of_replicas_is_refused(count, run, saved, assert_refused):
    reseal(saved, lambda manifest: manifest.update(num_replicas=count))
    assert_refused("--resume", run, words=["--resume", saved])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", -5),
        ("batch_size", 2.5),
        ("eval_every", 0),
        ("replicas", 10**9),
        ("replicas", [1]),
        ("seed", True),
        ("epochs", float("inf")),
        ("momentum", 1),
        ("lr", "fast"),
        ("lr_drops", 3),
        ("lr_drops", [-1]),
        ("sync_every", 0),
        ("model", "../lenet"),
        ("dataset", "imagenet"),
        ("method", None),
        ("zca", "yes"),
        ("augment", 1),
        ("data", "/nowhere"),
        ("device", {}),
    ],
)
def test_saved_arguments_are_validated(name, value, run, saved, assert_refused):
    reseal(saved, lambda manifest: manifest["arguments"].update({name: value}))
    words = {"data": "--data", "device": "--device"}.get(name, checkpoint.MANIFEST)
    assert_refused("--resume", run, words=[words])


@pytest.mark.parametrize(
    "state",
    [dict(steps_done=-1), dict(steps_done=1.5), dict(train_seconds="1"), dict(seconds=1), dict(master_error=[])],
)
def test_saved_progress_is_validated(state, run, saved, assert_refused):
    reseal(saved, lambda manifest: manifest["train_state"].update(state))
    assert_refused("--resume", run, words=["--resume", saved / checkpoint.MANIFEST, *state])


def doubled(value):
    if isinstance(value, dict):
        return {key: doubled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [doubled(item) for item in value]
    return value.double() if isinstance(value, torch.Tensor) else value


def write_doubles(path):
    torch.save(doubled(torch.load(path)), path)


@pytest.mark.parametrize("damage", [write_doubles, make_unreadable])
@pytest.mark.parametrize("name", ["replica-0.pt", checkpoint.SHARED])
def test_invalid_checkpoint_file_is_refused(name, damage, run, saved, assert_refused):
    damage(saved / name)
    if damage is write_doubles:
        seal(saved, lambda manifest: None)
    assert_refused("--resume", run, words=["--resume", saved])


@pytest.mark.parametrize("closed", ["", "checkpoints", "checkpoints/00000002-0000", "manifest.json", "replica-0.pt"])
def test_closed_checkpoint_is_reported_as_such(closed, run, saved, cache, tmp_path, monkeypatch, capsys):
    path = (saved if "." in closed else run) / closed
    path.chmod(0)
    with another_user(tmp_path):
        assert start(monkeypatch, "--resume", "run", "--proc", "proc") == 2
    path.chmod(0o700)
    error = capsys.readouterr().err
    assert "Permission denied" in error and str(path.relative_to(tmp_path)) in error, error
    assert error.count("\n") == 1 and not re.search("damaged|no checkpoint|does not exist", error)


def test_two_damaged_checkpoints_are_both_named(trained, tmp_path, assert_refused):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    paths = checkpoint.list_checkpoints(run / checkpoint.FOLDER)
    for path in paths:
        (path / checkpoint.MANIFEST).write_text("")
    assert_refused("--resume", run, words=paths)


@pytest.mark.parametrize("change", ["--momentum 0 --lr 0", "--gamma 0 --rho 0", "-L auto"])
def test_resuming_with_other_hyperparameters_works_or_is_refused(change, run, capsys, monkeypatch):
    status = start(monkeypatch, "--resume", run, *change.split())
    assert status == 0 or capsys.readouterr().err.startswith("parle_gpu.py: error: --resume")


def test_resuming_a_finished_run_is_refused(trained, tmp_path, assert_refused):
    shutil.copytree(trained, tmp_path / "run")
    assert_refused("--resume", tmp_path / "run", words=["--resume", tmp_path / "run", "-B"])
