"""Wrong command lines, damaged files and a full disk, through the programs themselves: one line, exit 2, no traces."""

import errno
import functools
import importlib
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import struct
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import launch
import loader
import parle_gpu
from tests.conftest import ROOT
from tests.test_loader import write_raw

pytestmark = pytest.mark.timeout(60)
TINY = "-d digits -n 1 -L 1 -b 4 -B 1e-9 --frac 0.01 --device cpu"
LONG = "a" * 300  # longer than a file name may be
needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")


def leave_launcher(monkeypatch):
    for name in {name for names in launch.LAUNCHERS.values() for name in names if name}:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def outside(tmp_path, monkeypatch):
    """An empty working folder, no launcher and no network."""

    def refuse(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    leave_launcher(monkeypatch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def proc(tmp_path_factory):
    proc = tmp_path_factory.mktemp("built")
    loader.load("digits", proc=proc)
    return proc


@pytest.fixture(scope="module")
def trained(proc, tmp_path_factory):
    """A run of three rounds, with checkpoints of the last two."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        leave_launcher(patch)
        start(patch, *TINY.split(), "-B", 1, "--frac", 0.006, "--checkpoint-every", 1, "--proc", proc, "--out", folder)
        assert len(checkpoint.found(folder / checkpoint.FOLDER)) == 2
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of `trained` that was stopped after its last round but one."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest, _ = checkpoint.found(run / checkpoint.FOLDER)
    shutil.rmtree(newest)
    return run


@pytest.fixture
def saved(run):
    """The only checkpoint of `run`."""
    (path,) = checkpoint.found(run / checkpoint.FOLDER)
    return path


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["parle_gpu.py", *map(str, arguments)])
    try:
        parle_gpu.main()
    except SystemExit as exit:
        return exit.code
    return 0


def tree(folder):
    """All that is below a folder: of files the content, of links where they lead."""
    return {path: content(path) for path in sorted(folder.rglob("*"))}


def content(path):
    if path.is_symlink():
        return os.readlink(path)
    return path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else path.stat().st_mode


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Start the program, which is to complain in one line and to leave everything as it was; gives the line."""

    def refused(*arguments, told=()):
        before = tree(tmp_path)
        capsys.readouterr()
        status = start(monkeypatch, *arguments)
        out, err = capsys.readouterr()
        assert (status, out, err.count("\n"), err[-1:]) == (2, "", 1, "\n"), err
        assert err.startswith("parle_gpu.py: error: ")
        for part in told:
            assert str(part) in err
        assert tree(tmp_path) == before
        return err

    return refused


# Command lines


FRACTIONS = [
    *("--gamma", "--rho", "--alpha", "--outer-step", "--outer-momentum", "-B/--epochs", "--lr", "--lr-drops"),
    *("--lr-decay", "--momentum", "--weight-decay", "--dropout", "--frac", "--timeout"),
]
COUNTS = [
    *("-s/--seed", "-n/--replicas", "-L/--sync-every", "-b/--batch-size"),
    *("--eval-every", "--checkpoint-every", "--gpus-per-replica"),
]
NAMES = {
    "-m/--model": "lenet, allcnn",
    "-d/--dataset": "mnist, fashion",
    "--method": "parle, entropy-sgd",
    "--on-nan": "restart, stop",
    "--amp": "off, bf16",
}


VALUES = [
    flag for flag in [*FRACTIONS, *COUNTS, *NAMES, "--data", "--proc", "--out", "--device"] if flag != "--lr-drops"
]


@pytest.mark.parametrize("flag", VALUES)
def test_a_flag_without_its_value_is_named(flag, refused):
    refused(flag.split("/")[0], told=[f"argument {flag}: expected one argument"])


@pytest.mark.parametrize("flag", FRACTIONS + COUNTS)
def test_what_is_no_number_is_told_with_one_that_is(flag, refused):
    for value in ("x", "nan", "inf", "1e400", "-1", "", "1,5", "½", "0x1", "1\0", "-1e-3", "1\n2"):
        line = refused(f"{flag.split('/')[-1]}={value}", told=[f"argument {flag}: "])
        assert re.search(r"is not a .*number .*, such as [\d.]+", line)


@pytest.mark.parametrize("flag", [flag for flag in COUNTS if "seed" not in flag])
def test_a_count_is_whole_and_has_a_few_digits(flag, refused):
    for value in ("0", "1.5", "1e3", str(-(10**30)), "1" * 5000):
        refused(flag.split("/")[-1], value, told=[f"argument {flag}: ", "is not a whole number of at least"])


@pytest.mark.parametrize("flag", NAMES)
def test_a_wrong_name_is_told_with_all_there_are(flag, refused):
    for value in ("", "x", "Lenet", "lénet", "lenet\n", "lenet\0", "off,", "None", "%s", "{}", "-"):
        refused(flag.split("/")[-1], value, told=[f"argument {flag}: there is no ", f"(there are {NAMES[flag]}"])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--replica 3", "unknown argument --replica; did you mean --replicas?"),
        ("-lr 0.1", "unknown argument -lr; did you mean --lr?"),
        ("--lr_drops 1", "unknown argument --lr_drops; did you mean --lr-drops?"),
        ("--Lr 1", "unknown argument --Lr; did you mean --lr?"),
        ("--epoch 3", "did you mean --epochs?"),
        ("--resum here", "did you mean --resume?"),
        ("--checkpoint_every 3", "did you mean --checkpoint-every?"),
        ("--no-whiten", "unknown argument --no-whiten; did you mean"),
        ("–-lr 1", "unknown argument –-lr; did you mean --lr?"),
        ("-q", "unknown argument -q; python parle_gpu.py -h lists what there is"),
        ("''", "parle_gpu.py -h"),
        ("'a\nb'", "unknown argument a b; python parle_gpu.py -h"),
        ("mnist", "unknown argument mnist"),
        ("-n 2 2", "unknown argument 2"),
        ("--lr-drops 1 2 three", "--lr-drops: three is not a number above 0"),
        ("--lr-drops one", "--lr-drops: one is not a number above 0"),
        ("-momentum 0.5", "-m/--model: there is no omentum"),
        ("--whiten=yes", "--whiten: ignored explicit argument 'yes'"),
        ("--augment=no", "--augment/--no-augment: ignored explicit argument 'no'"),
        ("--alpha 0.99999999999999999", "--alpha: 0.99999999999999999 is not"),
        ("--momentum 1", "--momentum: 1 is not"),
        ("--frac 1.0000001", "--frac: 1.0000001 is not a number above 0 and up to 1"),
        ("--frac 0", "--frac: 0 is not"),
        ("--epochs 0", "-B/--epochs: 0 is not a number above 0"),
        ("--lr-decay 0", "--lr-decay: 0 is not"),
        ("-b 1", "-b/--batch-size: 1 is not a whole number of at least 2 (batch norm needs two)"),
        (f"-s {2**63}", f"-s/--seed: {2**63} is not"),
        ("--lr 1e39", "--lr: 1e39 is not a number of at least 0 and up to 1e6, such as 0.01"),
        ("--gamma 1e39", "--gamma: 1e39 is not a number of at least 0 and up to 1e6"),
        ("--weight-decay 1000001", "--weight-decay: 1000001 is not"),
        (f"-L {10**10}", f"-L/--sync-every: {10**10} is not a whole number of at least 1 and up to 1e9, such as 25"),
        ("-L auto --gamma 1e-320", "-L auto is lr / gamma, and 0.1 / 9.99989e-321 is too long: --gamma 0.01"),
        ("-L auto --gamma 1e-10 --lr 1", "-L auto is lr / gamma, and 1 / 1e-10 is too long: --gamma 0.01"),
        ("-L Auto", "-L/--sync-every: Auto is not a whole number of at least 1 and up to 1e9, such as 25, or auto"),
        ("-L auto --gamma 0", "-L auto needs a pull towards the anchor: --gamma 0.01"),
        ("-L auto --method sgd", "-L auto needs a pull towards the anchor: --gamma 0.01"),
        ("-L auto --method elastic-sgd", "-L auto needs a pull towards the anchor: --gamma 0.01"),
        ("-b 1438", "A batch of 1438 is more than the 1437 images of a replica: -b 1437 or less"),
        ("--frac 0.5", "A batch of 1000 is more than the 718 images of a replica: -b 718 or less"),
        ("--frac 1e-9", "--frac"),
        ("--gpus-per-replica 2", "--gpus-per-replica 2 needs CUDA devices, and this is cpu: leave it out"),
        (f"--gpus-per-replica {10**30}", f"--gpus-per-replica {10**30} needs CUDA devices"),
        ("--device nonsense", "--device nonsense is not to be had here"),
        ("--device ''", "is not to be had here: use one of cpu"),
        ("--device meta", "--device meta is not to be had here"),
        ("--device cpu:x", "--device cpu:x is not to be had here"),
        ("--device cuda:-1", "is not to be had here: use one of cpu"),
        ("--device cuda:99", "is not to be had here: use one of cpu"),
        (f"--device cuda:{10**30}", "is not to be had here: use one of cpu"),
        ("--device privateuseone", "is not to be had here: use one of cpu"),
        ("--device xla", "is not to be had here: use one of cpu"),
        ("--device 'cpu\n'", "is not to be had here: use one of cpu"),
        ("--device 'cpu\0'", "is not to be had here: use one of cpu"),
        ("--device прoцессор", "--device прoцессор is not"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(line, told, proc, refused):
    refused(*shlex.split(f"-d digits -n 1 -b 1000 --device cpu --proc {proc}"), *shlex.split(line), told=[told])


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("-b 1000000000000", "-b"),
        (f"-b {10**30}", "-b"),
        ("-B 1e308", "-B"),
        ("--lr-drops 1e308", "--lr-drops"),
        pytest.param(f"-n {10**30}", "-n", marks=pytest.mark.timeout(2, func_only=True)),
    ],
)
def test_a_number_that_nothing_can_hold_is_told_in_one_line(line, flag, proc, tmp_path, refused):
    refused(*f"{TINY} --proc {proc} --out {tmp_path / 'run'} {line}".split(), told=[flag])


@pytest.mark.parametrize(
    "value",
    [
        *("abc", "", "1.5", "0", "99999", "-1", " ", "x,4", "²"),
        pytest.param("1" * 5000, id="of 5000 digits"),
    ],
)
@pytest.mark.parametrize("program", ["parle_gpu", "parle_mpi"])
def test_a_number_of_threads_that_is_none_is_told_in_one_line(value, program, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *TINY.split(), "--out", str(tmp_path / "run")])
    monkeypatch.setattr(launch, "start", None)
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(program).main()
    line = f"{program}.py: error: OMP_NUM_THREADS is {value.split(',')[0]!r}, not a number of threads from 1 to 1024\n"
    assert (exit.value.code, *capsys.readouterr()) == (2, "", " ".join(line.split()) + "\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["1", "1,1", " 1"])
def test_a_number_of_threads_for_each_level_is_one(value, proc, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert start(monkeypatch, *TINY.split(), "--proc", proc, "--out", tmp_path / "run") == 0


def test_what_is_advised_for_a_share_of_too_few_images_is_enough(proc, refused):
    line = refused(*TINY.split(), "-b", 100, "--proc", proc, "--frac", 1e-9)
    advised = re.search(r"--frac ([\d.e-]+) or more", line)[1]
    assert re.search(r"-b \d+ or less", refused(*TINY.split(), "-b", 100, "--proc", proc, "--frac", advised))


@pytest.mark.parametrize("launcher", [dict(PMI_RANK="0", PMI_SIZE="3"), dict(PMIX_RANK="0")])
def test_one_process_for_all_replicas_does_not_start_under_a_launcher(launcher, monkeypatch, refused):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    refused("-d", "digits", told=["no mpirun, or mpirun -n 3 python parle_mpi.py"])


# Folders


def in_the_way(path):
    path.write_text("in the way")
    return path


def closed(path, mode=0):
    path.mkdir()
    path.chmod(mode)
    return path


PLACES = {
    "nowhere": lambda path: path,
    "a file": in_the_way,
    "below a file": lambda path: in_the_way(path) / "below",
    "a name that is too long": lambda path: path.with_name(LONG),
    "a name with NUL": lambda path: path.with_name("a\0b"),
    "a name with a newline": lambda path: path / "a\nb",
    "a name beyond ASCII": lambda path: path / "Übung",
    "below a device": lambda path: Path("/dev/null/below"),
    "the empty name": lambda path: "",
    "below a closed folder": lambda path: closed(path) / "below",
}


def places(*left_out):
    return pytest.mark.parametrize(
        "place",
        [pytest.param(name, marks=[needs_permissions] * ("closed" in name)) for name in PLACES if name not in left_out],
    )


@places()
def test_a_data_folder_that_is_none_is_told(place, proc, tmp_path, refused):
    data = PLACES[place](tmp_path / "place")
    refused("-d", "mnist", "--proc", tmp_path / "proc", "--data", data, told=["--data"])


@places("nowhere", "a name with a newline", "a name beyond ASCII")
def test_a_place_where_no_data_can_be_kept_is_told(place, tmp_path, refused):
    refused(*TINY.split(), "--out", tmp_path / "run", "--proc", PLACES[place](tmp_path / "place"), told=["--proc"])


@places("nowhere", "a name with a newline", "a name beyond ASCII")
def test_a_place_where_no_run_can_be_kept_is_told(place, proc, tmp_path, refused):
    refused(*TINY.split(), "--proc", proc, "--out", PLACES[place](tmp_path / "place"), told=["--out"])


@places()
@pytest.mark.parametrize("flags", [["--resume"], ["--resume", "--out"]], ids=" ".join)
def test_a_place_without_a_run_is_not_resumed(flags, place, proc, tmp_path, refused):
    assert re.search("--resume|--out", refused(*flags, PLACES[place](tmp_path / "place")))


@pytest.mark.parametrize("flag", ["--proc", "--out"])
@needs_permissions
def test_a_folder_that_may_only_be_read_is_told(flag, proc, tmp_path, refused):
    place = closed(tmp_path / "place", 0o500)
    refused(*TINY.split(), "--proc", proc, "--out", tmp_path / "run", flag, place, told=[flag, place])


def test_resume_without_a_folder_asks_for_one(refused):
    refused("--resume", told=["--resume needs the folder of the run: --resume DIR"])


@pytest.mark.parametrize("name", ["log.jsonl", "checkpoints", "checkpoints/00000002-0000/replica-0.pt", "master.pt"])
def test_what_lies_in_a_runs_folder_is_not_a_run(name, run, refused):
    refused("--resume", run / name, told=[f"--resume {run / name}: "])


def test_another_runs_folder_is_not_written_to(run, proc, refused):
    refused(*TINY.split(), "--proc", proc, "--out", run, told=["--out", run, "name a new folder"])


def test_a_resumed_run_does_not_go_on_in_another_runs_folder(run, trained, tmp_path, refused):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    refused("--resume", run, "--out", other, told=["--out", other])


def test_a_file_named_runs_is_told(proc, refused):
    in_the_way(Path("runs"))
    refused(*TINY.split(), "--proc", proc, told=["--out", "runs/", "name a new folder"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("-m allcnn", "has model lenet, not allcnn"),
        ("--method sgd", "has method parle, not sgd"),
        ("-d mnist", "has dataset digits, not mnist"),
        ("-b 1438 --frac 1", "-b 1437 or less"),
        ("-L auto --gamma 0", "--gamma 0.01"),
        ("-n 0", "-n/--replicas: 0 is not"),
        ("--device cuda:99", "is not to be had here: use one of cpu"),
        ("--proc /dev/null/below", "--proc"),
        ("--data /nowhere", "--data /nowhere"),
    ],
)
def test_a_run_is_not_resumed_as_another(change, told, run, refused):
    refused("--resume", run, *change.split(), told=[told])


def test_a_run_is_not_resumed_with_whitened_data(run, proc, refused):
    loader.load("digits", proc=proc, whiten=True)
    refused("--resume", run, "--whiten", told=["--resume: ", "has whiten False, not True"])


@pytest.mark.parametrize("change", ["--momentum 0", "--gamma 0", "--rho 0", "--lr 0", "-L auto", "-L 2"])
def test_resuming_a_run_with_other_numbers_works_or_is_told(change, run, capsys, monkeypatch):
    status = start(monkeypatch, "--resume", run, *change.split())
    assert status == 0 or capsys.readouterr().err.startswith("parle_gpu.py: error: --resume")


def test_a_run_that_has_come_to_its_end_is_resumed_without_a_traceback(trained, tmp_path, capsys, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    status = start(monkeypatch, "--resume", tmp_path / "run")
    assert (status, capsys.readouterr().err.count("\n")) in [(0, 0), (2, 1)]


# Damaged files


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """What a malicious pickle makes. None may have been made."""
    marker = tmp_path / "owned"
    yield marker
    assert not marker.exists()


def test_the_malicious_pickles_here_would_do_what_they_are_to_do(tmp_path):
    for number, damage in enumerate([write_pickle, write_object_array, write_torch]):
        path, marker = tmp_path / "file", tmp_path / f"owned{number}"
        damage(path, marker)
        for load in (
            lambda path: pickle.loads(path.read_bytes()),
            lambda path: np.load(path, allow_pickle=True),
            lambda path: torch.load(path, weights_only=False),
        ):
            if not marker.exists():
                try:
                    load(path)
                except Exception:
                    continue
        assert marker.exists()


def write_pickle(path, marker):
    path.write_bytes(pickle.dumps(Malicious(marker)))


def write_object_array(path, marker):
    with open(path, "wb") as file:
        np.save(file, np.array([Malicious(marker)], dtype=object), allow_pickle=True)


def write_torch(path, marker):
    torch.save({"weights": Malicious(marker), "master": Malicious(marker)}, path)


def make_folder(path, *_):
    path.unlink()
    path.mkdir()


def make_unreadable(path, *_):
    """As a broken disk does: the file is there and opens, but reading it is an input/output error."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def forbid(path, *_):
    path.chmod(0)


def cut(keep):
    return lambda path, *_: path.write_bytes(path.read_bytes()[:keep])


def flip(position):
    def damage(path, *_):
        content = bytearray(path.read_bytes())
        content[position] ^= 0xFF
        path.write_bytes(content)

    return damage


def write(content):
    return lambda path, *_: path.write_bytes(content)


def put(position, content):
    def damage(path, *_):
        old = path.read_bytes()
        path.write_bytes(old[:position] + content + old[position + len(content) :])

    return damage


def idx(*shape, value=0, kind=8):
    count = int(np.prod(shape))
    return write(struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape) + bytes([value]) * count)


ANY = {
    "empty": write(b""),
    "cut": cut(-1),
    "cut to three bytes": cut(3),
    "a folder": make_folder,
    "a disk error": make_unreadable,
    "a malicious pickle": write_pickle,
    "a malicious array": write_object_array,
    "a malicious torch file": write_torch,
    "forbidden": pytest.param(forbid, marks=needs_permissions),
    "a text": write(b"<html>404 Not Found</html>"),
    "a zip file that is cut": write(b"PK\x03\x04" + bytes(40)),
    "gone": lambda path, *_: path.unlink(),
}


def table(damage):
    """Parameters from damage by name."""
    return [
        pytest.param(*value.values, id=name, marks=value.marks)
        if hasattr(value, "marks")
        else pytest.param(value, id=name)
        for name, value in damage.items()
    ]


MNIST = {
    "another magic number": flip(0),
    "floats": put(2, b"\x0d"),
    "no type": put(2, b"\x00"),
    "more images than there are": put(4, struct.pack(">I", 1000)),
    "as many as can be": put(4, b"\xff" * 12),
    "fewer images than there are": put(4, struct.pack(">I", 1)),
    "labels": idx(23),
    "no image": idx(0, 6, 6),
    "images without pixels": idx(23, 0, 0),
    "images that are not square": idx(23, 6, 7),
    "images of another size": idx(23, 8, 8),
    "packed": write(b"\x1f\x8b\x08\x00" + bytes(30)),
}


@pytest.mark.parametrize("damage", table(ANY | MNIST))
def test_damaged_images_are_told_and_nothing_is_kept(damage, marker, tmp_path, monkeypatch, refused):
    _, (path, *_) = write_raw("mnist", tmp_path / "raw", monkeypatch)
    damage(path, marker)
    told = refused(
        *f"{TINY} -b 2 --frac 1 -d mnist --data raw --proc proc".replace("raw", str(tmp_path / "raw")).split()
    )
    assert str(path) in told or "mnist" in told


@pytest.mark.parametrize("shape", [(40, 30), (0, 6)])
def test_images_that_are_not_square_are_told(shape, tmp_path, monkeypatch, refused):
    _, files = write_raw("mnist", tmp_path / "raw", monkeypatch)
    for path, count in ((files[0], 23), (files[2], 11)):
        idx(count, *shape)(path)
    refused(*TINY.split(), "-d", "mnist", "--frac", 1, "--data", tmp_path / "raw", "--proc", tmp_path / "proc")


MNIST_LABELS = {
    "a label of 10": put(8, b"\x0a"),
    "a label of 255": put(30, b"\xff"),
    "one label too few": idx(22),
    "one too many": idx(24),
    "of two dimensions": idx(23, 1),
    "images": idx(23, 6, 6),
}


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("damage", table(MNIST_LABELS | {"a malicious pickle": write_pickle}))
def test_damaged_labels_are_told_and_nothing_is_kept(damage, number, marker, tmp_path, monkeypatch, refused):
    _, files = write_raw("mnist", tmp_path / "raw", monkeypatch)
    damage(files[number], marker)
    told = refused(*TINY.split(), "-d", "mnist", "--data", tmp_path / "raw", "--proc", tmp_path / "proc")
    assert str(files[number]) in told or f"The {'training' if number == 1 else 'test'} set of mnist has" in told


SUMS = {"one bit": flip(-1), "too long": write(bytes(5000))}
SOME = {name: damage for name, damage in ANY.items() if "malicious" in name or name == "a disk error"}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, *value.values, id=f"{name}-{value.id}", marks=value.marks)
        for name, damage in (("cifar10", ANY | SUMS), ("cifar100", SOME), ("svhn", SOME | SUMS))
        for value in table(damage)
    ],
)
def test_a_file_with_another_sum_is_told_and_not_opened(name, damage, marker, tmp_path, monkeypatch, refused):
    _, files = write_raw(name, tmp_path / "raw", monkeypatch)
    damage(files[-1], marker)
    refused(*TINY.split(), "-d", name, "--data", tmp_path / "raw", "--proc", tmp_path / "proc", told=[files[-1]])


@pytest.fixture
def cache(proc, tmp_path):
    """A copy of the pre-processed digits."""
    shutil.copytree(proc / "digits", tmp_path / "proc" / "digits")
    return tmp_path / "proc" / "digits"


@pytest.fixture
def spoiled(cache, refused):
    def spoiled():
        refused(*TINY.split(), "--frac", 1, "--proc", cache.parent, told=[cache])

    return spoiled


def array(*shape, dtype=np.uint8, value=0):
    def damage(path, *_):
        np.save(path, np.full(shape, value, dtype))

    return damage


def header(text):
    """An array file of version 1 with this for a description."""
    return write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)


ARRAYS = {
    "cut in its description": cut(60),
    "another magic number": flip(0),
    "a description that does not end": header(b"{'descr': '|u1', 'shape': (("),
    "a description that calls": header(b"__import__('os').mkdir('owned')"),
    "a size below zero": header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-5, 8, 8, 1)}"),
    "a size beyond memory": header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 8, 8, 1)}" % 10**30),
    "texts": array(1437, dtype="<U3"),
    "a single number": array(),
}
IMAGES = {
    "floats": array(1437, 8, 8, 1, dtype=np.float64),
    "whole numbers of 64 bits": array(1437, 8, 8, 1, dtype=np.int64),
    "complex numbers": array(1437, 8, 8, 1, dtype=np.complex64),
    "big-endian ones": array(1437, 8, 8, 1, dtype=">i4"),
    "three dimensions": array(1437, 8, 8),
    "five dimensions": array(1437, 8, 8, 1, 1),
    "images that are not square": array(1437, 8, 9, 1),
    "another size than the test's": array(1437, 9, 9, 1),
    "three channels": array(1437, 8, 8, 3),
    "no image": array(0, 8, 8, 1),
    "one image too few": array(1436, 8, 8, 1),
    "one image too many": array(1438, 8, 8, 1),
}
LABELS = {
    "bytes": array(1437),
    "floats": array(1437, dtype=np.float64),
    "a label of 10": array(1437, dtype=np.int64, value=10),
    "a label of -1": array(1437, dtype=np.int64, value=-1),
    "a label of 2 ** 62": array(1437, dtype=np.int64, value=2**62),
    "two dimensions": array(1437, 1, dtype=np.int64),
    "one too few": array(1436, dtype=np.int64),
    "none": array(0, dtype=np.int64),
}


@pytest.mark.parametrize("damage", table(ANY | ARRAYS | IMAGES))
def test_damaged_images_in_the_cache_are_told(damage, marker, cache, spoiled):
    damage(cache / "train_images.npy", marker)
    spoiled()


@pytest.mark.parametrize("damage", table(LABELS | {"a malicious array": write_object_array}))
def test_damaged_labels_in_the_cache_are_told(damage, marker, cache, spoiled):
    damage(cache / "train_labels.npy", marker)
    spoiled()


@pytest.mark.parametrize("damage", table(LABELS | {"a disk error": make_unreadable}))
def test_damaged_labels_of_the_test_set_in_the_cache_are_told(damage, marker, cache, spoiled):
    damage(cache / "test_labels.npy", marker)
    spoiled()


@pytest.mark.parametrize("damage", table({name: damage for name, damage in ANY.items() if name != "gone"}))
def test_a_damaged_meta_file_is_told(damage, marker, cache, spoiled):
    damage(cache / "meta.json", marker)
    spoiled()


@pytest.mark.parametrize("content", ["[]", "null", "1", '"text"', "[" * 100_000, "\ufeff{}"], ids=lambda text: text[:9])
def test_a_meta_file_that_holds_no_object_is_told(content, cache, spoiled):
    (cache / "meta.json").write_text(content)
    spoiled()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("mean", None), ("mean", "text"), ("mean", {}), ("mean", []), ("mean", [1, 2]), ("mean", [[1]]), ("mean", 1)],
        *[("mean", ["1"]), ("mean", [None]), ("mean", [10**400]), ("mean", [float("nan")]), ("std", [float("inf")])],
        *[("std", None), ("std", [0]), ("std", [-1]), ("std", [1, 1]), ("std", {}), ("std", [[]])],
        *[("classes", None), ("classes", "10"), ("classes", 10.0), ("classes", 0), ("classes", -1), ("classes", [10])],
        *[("classes", 9), ("classes", 10**30), ("origin", 5), ("origin", ["x"])],
    ],
    ids=lambda value: repr(value)[:12],
)
def test_a_wrong_value_in_the_meta_file_is_told(name, value, cache, spoiled):
    meta = json.loads((cache / "meta.json").read_text())
    (cache / "meta.json").write_text(json.dumps(meta | {name: value}))
    spoiled()


@pytest.mark.parametrize("name", ["mean", "std", "classes", "origin"])
def test_a_meta_file_without_a_value_is_told(name, cache, spoiled):
    meta = json.loads((cache / "meta.json").read_text())
    del meta[name]
    (cache / "meta.json").write_text(json.dumps(meta))
    spoiled()


@pytest.mark.parametrize("value", [0, 10**30, "1", None, {}])
def test_a_cache_of_another_format_is_built_anew(value, cache, proc, monkeypatch):
    meta = json.loads((cache / "meta.json").read_text())
    (cache / "meta.json").write_text(json.dumps(meta | dict(format=value)))
    assert start(monkeypatch, *TINY.split(), "--proc", cache.parent) == 0
    assert (cache / "meta.json").read_bytes() == (proc / "digits" / "meta.json").read_bytes()


def keep_files(cache):
    (cache / "meta.json").unlink()
    return "is not this program's: name another folder with --proc"


def put_file(cache):
    shutil.rmtree(cache)
    cache.write_text("in the way")
    return "name another folder with --proc"


def put_link_to_nowhere(cache):
    shutil.rmtree(cache)
    cache.symlink_to("nowhere")
    return "name another folder with --proc"


@pytest.mark.parametrize("change", [keep_files, put_file, put_link_to_nowhere])
def test_what_is_not_this_programs_is_left_alone(change, cache, refused):
    told = change(cache)
    refused(*TINY.split(), "--proc", cache.parent, told=[cache, told])


# Checkpoints


def seal(path, **changes):
    """As somebody who knows the format would: sums that are right for what is there."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text()) | changes
    del manifest["sum"]
    manifest["files"] = {name: checkpoint._sum(path / name) for name in manifest["files"]}
    manifest["sum"] = checkpoint._sum_of(manifest)
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", table(ANY | {"one bit": flip(-1), "one bit in the middle": flip(9000)}))
def test_a_damaged_file_of_a_checkpoint_is_told(damage, marker, run, saved, refused):
    damage(saved / "replica-0.pt", marker)
    refused("--resume", run, told=["--resume", saved])


@pytest.mark.parametrize("damage", table({name: damage for name, damage in ANY.items() if name != "gone"}))
def test_a_damaged_manifest_is_told(damage, marker, run, saved, refused):
    damage(saved / checkpoint.MANIFEST, marker)
    refused("--resume", run, told=["--resume", saved])


@pytest.mark.parametrize("content", ["[]", "null", "{}", "1", '{"sum": 1}', "[" * 100_000], ids=lambda text: text[:9])
def test_a_manifest_that_holds_something_else_is_told(content, run, saved, refused):
    (saved / checkpoint.MANIFEST).write_text(content)
    refused("--resume", saved, told=["--resume", saved])


@pytest.mark.parametrize("flag", ["", "--out"])
def test_a_checkpoint_without_manifest_is_none(flag, run, saved, refused):
    (saved / checkpoint.MANIFEST).unlink()
    refused("--resume", *flag.split(), run, told=["--resume", run, "there is no checkpoint"])


@pytest.mark.parametrize("change", [b'"lr": 0.1', b'"batch_size": 4', b'"batches": 0'])
def test_a_changed_number_in_a_manifest_is_told(change, run, saved, refused):
    path = saved / checkpoint.MANIFEST
    assert change in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(change, change[:-1] + b"7"))
    refused("--resume", run, told=["--resume", saved, "manifest.json is not what was written"])


@pytest.mark.parametrize("value", [0, checkpoint.FORMAT + 1, "1", None])
def test_a_checkpoint_of_another_version_is_told(value, run, saved, refused):
    seal(saved, format=value)
    refused("--resume", run, told=["--resume", saved, f"it has format {value}, this program reads {checkpoint.FORMAT}"])


@pytest.mark.parametrize(
    "changes",
    [
        dict(arguments=None),
        dict(counters={}),
        dict(replicas="x"),
        dict(log_bytes=-1),
    ],
    ids=str,
)
def test_a_sealed_manifest_of_other_content_is_told(changes, run, saved, refused):
    seal(saved, **changes)
    refused("--resume", run, told=["--resume", saved])


@pytest.mark.parametrize("name", ["arguments", "progress", "counters", "replicas", "log_bytes", "files"])
def test_a_sealed_manifest_without_a_part_is_told(name, run, saved, refused):
    manifest = json.loads((saved / checkpoint.MANIFEST).read_text())
    del manifest[name], manifest["sum"]
    manifest["sum"] = checkpoint._sum_of(manifest)
    (saved / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    refused("--resume", run, told=["--resume", saved])


@pytest.mark.parametrize("model", ["lenet", "allcnn", "wrn-16-4"])
def test_a_model_that_is_not_the_checkpoints_is_told(model, run, saved, refused):
    manifest = json.loads((saved / checkpoint.MANIFEST).read_text())
    seal(saved, arguments=manifest["arguments"] | dict(model=model))
    if model == "lenet":
        shared = torch.load(saved / checkpoint.SHARED, weights_only=True)
        torch.save({name: vector[:-1].clone() for name, vector in shared.items()}, saved / checkpoint.SHARED)
        seal(saved)
    refused("--resume", run, told=["--resume", saved])


def write_names(path, *_):
    torch.save({"weights": "text", "master": "text"}, path)


def write_list(path, *_):
    torch.save([torch.zeros(3)], path)


def write_doubles(path, *_):
    content = torch.load(path, weights_only=True)
    torch.save({name: vector.double() for name, vector in content.items()}, path)


SEALED = {name: damage for name, damage in ANY.items() if name in ("empty", "cut", "a text") or "malicious" in name}
SEALED |= {"texts for vectors": write_names, "a list": write_list, "doubles": write_doubles}


@pytest.mark.parametrize("damage", table(SEALED))
@pytest.mark.parametrize("name", ["replica-0.pt", checkpoint.SHARED])
def test_a_damaged_file_whose_sum_is_right_is_told_and_not_executed(name, damage, marker, run, saved, refused):
    damage(saved / name, marker)
    seal(saved)
    refused("--resume", run, told=["--resume", saved])


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_taken(trained, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest, before = checkpoint.found(run / checkpoint.FOLDER)
    flip(-1)(newest / "replica-0.pt")
    assert start(monkeypatch, "--resume", run) == 0
    out, err = capsys.readouterr()
    assert f"WARNING: {newest} is damaged" in out and f"from {before}" in out
    assert err == ""


def test_two_damaged_checkpoints_are_both_told(trained, tmp_path, refused):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    paths = checkpoint.found(run / checkpoint.FOLDER)
    for path in paths:
        (path / checkpoint.MANIFEST).write_text("")
    refused("--resume", run, told=paths)


# A full disk


class Full:
    """A file on a disk with room for `room` more bytes."""

    def __init__(self, room, *arguments):
        self.room, self.file = room, open(*arguments)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        content = content.encode() if isinstance(content, str) else memoryview(content).cast("B")
        fits = content[: self.room[0]]
        self.room[0] -= len(fits)
        (self.file.buffer if hasattr(self.file, "buffer") else self.file).write(fits)
        if len(fits) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(content)


@pytest.mark.parametrize(
    ("room", "before"),
    [
        *[(0, "nothing"), (50_000, "nothing"), (104_000, "nothing"), (129_900, "nothing")],
        *[(0, "an older cache"), (92_200, "an older cache")],
    ],
)
def test_a_disk_full_while_the_cache_is_written_is_told_and_the_next_run_works(
    room, before, cache, proc, monkeypatch, refused
):
    if before == "nothing":
        shutil.rmtree(cache.parent)
        cache.parent.mkdir()
    else:
        (cache / "meta.json").write_text('{"format": 0}')
    arguments = [*TINY.split(), "--proc", cache.parent]
    with monkeypatch.context() as patch:
        left = [room]
        patch.setattr(loader, "open", functools.partial(Full, left), raising=False)
        refused(*arguments, told=[f"{cache} cannot be written", "No space left on device", "--proc"])
        assert os.listdir(cache.parent) == ["digits"] * (before != "nothing")
    assert start(monkeypatch, *arguments) == 0
    assert tree(cache).keys() == {cache / path.name for path in tree(proc / "digits")}
    assert [*tree(cache).values()] == [*tree(proc / "digits").values()]


@pytest.mark.parametrize("limit", [0, 50_000, 92_000])
def test_a_file_that_cannot_grow_is_told_and_the_next_run_works(limit, tmp_path):
    (tmp_path / "proc").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(loader.DataError, match="cannot be written"):
            loader.load("digits", proc=tmp_path / "proc")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not os.listdir(tmp_path / "proc")
    loader.load("digits", proc=tmp_path / "proc")


@pytest.mark.parametrize("call", range(1, 6))
def test_a_disk_that_is_full_when_it_is_flushed_is_told(call, tmp_path, monkeypatch, refused):
    calls = []

    def fsync(number):
        calls.append(number)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "proc").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        refused(*TINY.split(), "--proc", tmp_path / "proc", told=["No space left on device", "--proc"])
    loader.load("digits", proc=tmp_path / "proc")


# The other program, in a process of its own


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["-m", b"\xff"], r"argument -m/--model: there is no \udcff (there are lenet, allcnn,"),
        (
            ["-n", "1", "-d", "digits", "-b", "1438"],
            "A batch of 1438 is more than the 1437 images of a replica: -b 1437",
        ),
    ],
)
def test_parle_mpi_tells_in_one_line_too(line, told, python, proc, tmp_path):
    line = [os.fsdecode(part) for part in line]
    done = python(ROOT / "parle_mpi.py", *line, "--proc", proc, cwd=tmp_path / "here")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"parle_mpi\.py: error: {re.escape(told)}.*\n", done.stderr)
    assert not os.listdir(tmp_path / "here")
