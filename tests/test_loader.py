import contextlib
import errno
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import socket
import struct
import threading
import time
import tracemalloc
import urllib.error
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import loader

FORMATS = ["mnist", "fashion", "cifar10", "cifar100", "svhn"]
SMALL = {"svhn": 32, "cifar10": 32, "cifar100": 32}  # else 6 pixels: an idx file may hold any size


@pytest.fixture(autouse=True)
def requests(monkeypatch):
    """Return the list of requests to the network, all of which fail."""
    urls = []

    def refuse(request, *args, **kwargs):
        urls.append(request)
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return urls


@pytest.fixture
def proc(tmp_path):
    return tmp_path / "proc"


@pytest.fixture
def tiny(monkeypatch):
    """Add a data set named `tiny`, in memory; return its arrays and a list with an entry for each time it is read."""
    random = np.random.default_rng(3)
    arrays = [
        (random.integers(0, 256, (count, 5, 5, 2), dtype=np.uint8), random.integers(0, 10, count)) for count in (12, 7)
    ]
    reads = []

    def read(kind, raw, download):
        reads.append(raw)
        return [([images], labels) for images, labels in arrays]

    monkeypatch.setitem(loader.DATASETS, "tiny", loader.DatasetSpec(read, "Tiny", None, 12, 2, 5, 10, False))
    return arrays, reads


def unchanged(labels):
    return labels


def random_set(name, seed):
    """Return training and test arrays of a shape that the format allows."""
    random = np.random.default_rng(seed)
    size = SMALL.get(name, 6)
    shape = (size, size, 3 if name in SMALL else 1)
    return [
        (
            random.integers(0, 256, (count, *shape), dtype=np.uint8),
            random.permutation(np.arange(count) % loader.DATASETS[name].classes),
        )
        for count in (23, 11)
    ]


def write_raw(name, root, monkeypatch, seed=0, train_labels=unchanged, test_labels=unchanged):
    """Write a small data set in torchvision's layout, with its labels transformed; return its arrays and its files."""
    arrays = random_set(name, seed)
    (train, labels), (test, wanted) = arrays
    splits = [(train, train_labels(labels)), (test, test_labels(wanted))]
    write = {"mnist": write_idx, "fashion": write_idx, "svhn": write_svhn}.get(name, write_cifar)
    return arrays, write(loader.DATASETS[name].kind, root, monkeypatch, splits)


def write_idx(kind, root, monkeypatch, splits):
    folder = root / kind / "raw"
    folder.mkdir(parents=True)
    files = []
    for split, (images, labels) in zip(("train", "t10k"), splits, strict=True):
        for content, array in (("images-idx3", images[..., 0]), ("labels-idx1", labels)):
            files.append(folder / f"{split}-{content}-ubyte")
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            files[-1].write_bytes(header + array.astype(np.uint8).tobytes())
    return files


def write_cifar(kind, root, monkeypatch, splits):
    import torchvision

    cifar = getattr(torchvision.datasets, kind)
    folder = root / cifar.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, md5(folder / name)]

    for attribute, (images, labels) in zip(("train_list", "test_list"), splits, strict=True):
        names = [name for name, _ in getattr(cifar, attribute)]
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        key = "labels" if kind == "CIFAR10" else "fine_labels"
        cut = [round(i * len(images) / len(names)) for i in range(len(names) + 1)]
        listed = [
            write(name, {"data": rows[start:end], key: labels[start:end].tolist(), "coarse_labels": [99]})
            for name, start, end in zip(names, cut[:-1], cut[1:], strict=True)
        ]
        monkeypatch.setattr(cifar, attribute, listed)
    _, checksum = write(cifar.meta["filename"], {cifar.meta["key"]: ["a"] * 100})
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": checksum})
    return sorted(folder.iterdir())


def write_svhn(kind, root, monkeypatch, splits):
    import scipy.io
    import torchvision

    root.mkdir(parents=True, exist_ok=True)
    (images, labels), test = splits
    pieces = {"train": (images[:9], labels[:9]), "extra": (images[9:], labels[9:]), "test": test}
    listed = {}
    for split, (pixels, digits) in pieces.items():
        url, name, _ = torchvision.datasets.SVHN.split_list[split]
        digits = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
        scipy.io.savemat(root / name, {"X": pixels.transpose(1, 2, 3, 0), "y": digits})
        listed[split] = [url, name, md5(root / name)]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", listed)
    return sorted(root.iterdir())


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def assert_holds(data, arrays):
    (train, train_labels), (test, test_labels) = arrays
    for images, wanted in ((data.train_images, train), (data.test_images, test)):
        assert images.dtype == torch.uint8
        np.testing.assert_array_equal(images.numpy(), wanted)
    for labels, wanted in ((data.train_labels, train_labels), (data.test_labels, test_labels)):
        assert labels.dtype == torch.int64
        np.testing.assert_array_equal(labels.numpy(), wanted)


# Damage to files


def snapshot(folder):
    """Return everything below a directory: the content of files, the target of links."""
    return {path: content(path) for path in sorted(folder.rglob("*"))}


def content(path):
    if path.is_symlink():
        return os.readlink(path)
    return path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else path.stat().st_mode


class Malicious:
    """Creates a directory when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """Return the directory that a malicious file would create, and check that the test has not created it."""
    marker = tmp_path / "owned"
    yield marker
    assert not marker.exists()


def write_pickle(path, marker):
    path.write_bytes(pickle.dumps(Malicious(marker)))


def write_object_array(path, marker):
    with open(path, "wb") as file:
        np.save(file, np.array([Malicious(marker)], dtype=object), allow_pickle=True)


def write_torch(path, marker):
    torch.save({"weights": Malicious(marker), "master": Malicious(marker)}, path)


def test_malicious_files_execute_when_loaded_unsafely(tmp_path):
    path = tmp_path / "file"
    for number, (damage, load) in enumerate(
        [
            (write_pickle, lambda: pickle.loads(path.read_bytes())),
            (write_object_array, lambda: np.load(path, allow_pickle=True)),
            (write_torch, lambda: torch.load(path, weights_only=False)),
        ]
    ):
        damage(path, tmp_path / f"owned{number}")
        with contextlib.suppress(FileExistsError):  # the torch file holds two
            load()
        assert (tmp_path / f"owned{number}").exists()


def make_folder(path, *_):
    path.unlink()
    path.mkdir()


def make_unreadable(path, *_):
    """Make reading fail with an input/output error, as on a broken disk, although the file exists and opens."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def truncate(keep):
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


def append(content):
    return lambda path, *_: path.write_bytes(path.read_bytes() + content)


def idx(*shape, value=0, kind=8):
    count = math.prod(shape)
    return write(struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape) + bytes([value]) * count)


needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
DAMAGE = {
    "missing": lambda path, *_: path.unlink(),
    "empty": write(b""),
    "truncated": truncate(-1),
    "truncated to three bytes": truncate(3),
    "folder": make_folder,
    "disk error": make_unreadable,
    "malicious pickle": write_pickle,
    "malicious array": write_object_array,
    "malicious torch file": write_torch,
    "no permission": pytest.param(lambda path, *_: path.chmod(0), marks=needs_permissions),
    "text": write(b"<html>404 Not Found</html>"),
    "truncated zip": write(b"PK\x03\x04" + bytes(40)),
}


def table(damage):
    """Parameters from damage by name."""
    return [
        pytest.param(*value.values, id=name, marks=value.marks)
        if hasattr(value, "marks")
        else pytest.param(value, id=name)
        for name, value in damage.items()
    ]


# Raw data


@pytest.mark.parametrize("name", FORMATS)
def test_raw_format_is_read_pixel_for_pixel(name, tmp_path, proc, monkeypatch, requests):
    arrays, _ = write_raw(name, tmp_path / "raw", monkeypatch)
    data = loader.load(name, tmp_path / "raw", proc)
    assert_holds(data, arrays)
    pixels = arrays[0][0].astype(np.float64).reshape(-1, data.channels)
    np.testing.assert_allclose(data.mean.numpy(), pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(data.std.numpy(), pixels.std(0), rtol=1e-6)
    assert data.mean.dtype == data.std.dtype == torch.float32
    assert (data.name, data.classes) == (name, loader.DATASETS[name].classes)
    assert (data.channels, data.size) == (3 if name in SMALL else 1, SMALL.get(name, 6))
    assert not requests


def test_raw_paths_are_those_of_torchvision(tmp_path):
    from torchvision import datasets

    for name in ("mnist", "fashion"):
        kind = getattr(datasets, loader.DATASETS[name].kind)
        unread = kind.__new__(kind)
        unread.root = tmp_path
        assert Path(unread.raw_folder) == tmp_path / Path(loader.DATASETS[name].raw).parent
    assert Path(datasets.CIFAR10.base_folder, "*") == Path(loader.DATASETS["cifar10"].raw)
    assert Path(datasets.CIFAR100.base_folder, "*") == Path(loader.DATASETS["cifar100"].raw)
    assert all(Path(names[1]).match(loader.DATASETS["svhn"].raw) for names in datasets.SVHN.split_list.values())


@pytest.mark.parametrize("raw", [None, "empty"])
def test_digits_come_from_scikit_learn_without_raw_folder(raw, tmp_path, proc, requests):
    from sklearn.datasets import load_digits

    (tmp_path / "empty").mkdir()
    data = loader.load("digits", raw and tmp_path / raw, proc)
    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    assert len(data.train_images) == 1437 and len(data.test_images) == 360
    assert (len(data.train_images), data.channels, data.size, data.classes) == loader.DATASETS["digits"][3:7]
    assert_holds(data, [(images[:1437], labels[:1437]), (images[1437:], labels[1437:])])
    assert data.train_images.max() == 255
    assert [path.name for path in proc.iterdir()] == ["digits"]
    assert not requests


@pytest.mark.parametrize(
    "damage", [DAMAGE["missing"], truncate(-1), flip(0), append(b"\0")], ids=["missing", "truncated", "flipped", "long"]
)
@pytest.mark.parametrize("name", FORMATS)
def test_each_damaged_raw_file_is_named(name, damage, tmp_path, proc, monkeypatch, requests):
    arrays, files = write_raw(name, tmp_path / "raw", monkeypatch)
    for path in files:
        content = path.read_bytes()
        damage(path)
        with pytest.raises(loader.DatasetError, match=re.escape(str(path))) as caught:
            loader.load(name, tmp_path / "raw", proc)
        assert not isinstance(caught.value, loader.DownloadError)
        assert not proc.exists()
        path.write_bytes(content)
    assert_holds(loader.load(name, tmp_path / "raw", proc), arrays)
    assert not requests


IDX_IMAGES = {
    "other magic number": flip(0),
    "float type": put(2, b"\x0d"),
    "no type": put(2, b"\x00"),
    "more images than there are": put(4, struct.pack(">I", 1000)),
    "maximal sizes": put(4, b"\xff" * 12),
    "fewer images than there are": put(4, struct.pack(">I", 1)),
    "labels": idx(23),
    "no image": idx(0, 6, 6),
    "images without pixels": idx(23, 0, 0),
    "images that are not square": idx(23, 6, 7),
    "images of another size": idx(23, 8, 8),
    "compressed": write(b"\x1f\x8b\x08\x00" + bytes(30)),
}
IDX_LABELS = {
    "label of 255 at the end": put(30, b"\xff"),
    "two dimensions": idx(23, 1),
    "images": idx(23, 6, 6),
    "malicious pickle": write_pickle,
    "disk error": make_unreadable,
}
CHECKSUM = {"flipped byte": flip(-1), "zeros": write(bytes(5000))}
NOT_OPENED = {name: damage for name, damage in DAMAGE.items() if "malicious" in name or name == "disk error"}


@pytest.mark.parametrize(
    ("name", "number", "damage"),
    [
        pytest.param(name, number, *value.values, id=f"{name}-{number}-{value.id}", marks=value.marks)
        for name, number, damage in (
            ("mnist", 0, DAMAGE | IDX_IMAGES),
            ("mnist", 1, IDX_LABELS),
            ("mnist", 3, IDX_LABELS),
            ("cifar10", -1, DAMAGE | CHECKSUM),
            ("cifar100", -1, NOT_OPENED),
            ("svhn", -1, NOT_OPENED | CHECKSUM),
        )
        for value in table(damage)
    ],
)
def test_invalid_raw_file_is_rejected_unexecuted(name, number, damage, marker, tmp_path, proc, monkeypatch):
    _, files = write_raw(name, tmp_path / "raw", monkeypatch)
    damage(files[number], marker)
    with pytest.raises(loader.DatasetError) as caught:
        loader.load(name, tmp_path / "raw", proc)
    named = (str(files[number]),) if name != "mnist" else (str(files[number]), name)  # a set that does not fit together
    assert any(word in str(caught.value) for word in named)
    assert not proc.exists()


@pytest.mark.parametrize("shape", [(40, 30), (0, 6), (0, 0)])
def test_images_must_be_square_and_not_empty(shape, tiny, proc):
    arrays, _ = tiny
    for i, (images, labels) in enumerate(arrays):
        arrays[i] = np.zeros((len(images), *shape, 2), np.uint8), labels
    with pytest.raises(loader.DatasetError, match=re.escape(f"({shape[0]}, {shape[1]}, 2)")):
        loader.load("tiny", proc=proc)
    assert not proc.exists()


def spoil_first(value):
    return lambda labels: np.concatenate([[value], labels[1:]])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [(name, spoil_first(200), name) for name in FORMATS]
    + [("cifar10", spoil_first(10), "0.*9"), ("cifar10", spoil_first(-1), "0.*9")]
    + [("mnist", spoil_first(10), "0.*9"), ("svhn", spoil_first(11), "0.*9"), ("cifar100", spoil_first(100), "0.*99")]
    + [(name, lambda labels: labels[:-1], r"\d.*\d") for name in FORMATS]
    + [("mnist", lambda labels: np.append(labels, 0), r"\d.*\d")],
)
def test_invalid_raw_labels_are_rejected(name, spoil, words, split, tmp_path, proc, monkeypatch):
    write_raw(name, tmp_path / "raw", monkeypatch, **{f"{split}_labels": spoil})
    with pytest.raises(loader.DatasetError, match=words) as caught:
        loader.load(name, tmp_path / "raw", proc)
    assert split in str(caught.value)
    assert not proc.exists()


def test_train_and_test_images_must_have_one_size(tiny, proc):
    arrays, _ = tiny
    arrays[1] = (arrays[1][0][:, :4, :4], arrays[1][1])
    with pytest.raises(loader.DatasetError, match=r"\(5, 5, 2\).*\(4, 4, 2\)"):
        loader.load("tiny", proc=proc)


def test_missing_data_folder_is_rejected(tmp_path, proc, requests):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(loader.DatasetError, match=re.escape(f"--data {path}")):
            loader.load("mnist", path, proc)
    assert not requests


@pytest.mark.parametrize("name", FORMATS)
def test_download_without_network_raises_download_error(name, proc, requests):
    timeout = socket.getdefaulttimeout()
    with pytest.raises(loader.DownloadError, match=rf"{loader.DATASETS[name].kind}.*--data"):
        loader.load(name, proc=proc)
    assert requests
    assert socket.getdefaulttimeout() == timeout
    assert not (proc / name).exists()


@pytest.mark.parametrize("name", FORMATS)
def test_files_in_proc_raw_are_not_downloaded(name, proc, monkeypatch, requests):
    arrays, files = write_raw(name, proc / "raw", monkeypatch)
    files[0].write_bytes(b"?" + files[0].read_bytes())
    with pytest.raises(loader.DatasetError, match=re.escape(str(files[0]))) as caught:
        loader.load(name, proc=proc)
    assert not isinstance(caught.value, loader.DownloadError)
    files[0].write_bytes(files[0].read_bytes()[1:])
    assert_holds(loader.load(name, proc=proc), arrays)
    assert not requests


@pytest.mark.parametrize("name", FORMATS)
def test_interrupted_download_names_damaged_file(name, proc, monkeypatch):
    _, (path, *_) = write_raw(name, proc / "raw", monkeypatch)
    path.unlink()

    def leave_damaged(*args, **kwargs):
        path.write_bytes(b"?")
        raise urllib.error.URLError("connection lost")

    monkeypatch.setattr("urllib.request.urlopen", leave_damaged)
    with pytest.raises(loader.DatasetError, match=re.escape(str(path))) as caught:
        loader.load(name, proc=proc)
    assert not isinstance(caught.value, loader.DownloadError)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_file_is_downloaded_again(name, proc, monkeypatch):
    arrays, files = write_raw(name, proc / "raw", monkeypatch)
    contents = {path: path.read_bytes() for path in files}

    def download(*args, **kwargs):
        for path, content in contents.items():
            path.write_bytes(content)

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    for path in files:
        path.unlink()
        assert_holds(loader.load(name, proc=proc), arrays)
        shutil.rmtree(proc / name)


@pytest.mark.parametrize(
    ("name", "sizes", "mean", "std"),
    [
        ("mnist", (60_000, 10_000), [33.32], [78.57]),
        pytest.param(*("cifar10", (50_000, 10_000), [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]), marks=pytest.mark.slow),
    ],
)
def test_real_data_has_known_statistics(name, sizes, mean, std, raw, proc):
    data = loader.load(name, raw, proc)
    assert (len(data.train_images), len(data.test_images)) == sizes
    assert data.train_labels.bincount().min() > sizes[0] / 12
    torch.testing.assert_close(data.mean, torch.tensor(mean), atol=0.06, rtol=0)
    torch.testing.assert_close(data.std, torch.tensor(std), atol=0.06, rtol=0)


# proc/


@pytest.mark.parametrize("zca", [False, True])
def test_second_load_reads_no_raw_data(zca, tmp_path, proc, monkeypatch):
    raw = tmp_path / "raw"
    write_raw("mnist", raw, monkeypatch)
    first = loader.load("mnist", raw, proc, zca)
    shutil.rmtree(raw / "MNIST")
    for again in (loader.load("mnist", raw, proc, zca), loader.load("mnist", None, proc, zca)):
        for old, new in zip(first, again, strict=True):
            assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


def test_arrays_are_copy_on_write_maps_of_proc(tiny, proc):
    arrays, _ = tiny
    data = loader.load("tiny", proc=proc)
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        path, tensor = str((proc / "tiny" / f"{name}.npy").resolve()), getattr(data, name)
        ranges = [map(lambda end: int(end, 16), line[0].split("-")) for line in maps if line[-1] == path]
        assert any(start <= tensor.data_ptr() < end for start, end in ranges), name
        tensor.zero_()
    assert_holds(loader.load("tiny", proc=proc), arrays)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_modes_of_the_cache_follow_the_umask(umask, tiny, proc):
    before = os.umask(umask)
    try:
        loader.load("tiny", proc=proc)
    finally:
        os.umask(before)
    assert (proc / "tiny").stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in (proc / "tiny").iterdir()} == {0o666 & ~umask}


@contextlib.contextmanager
def another_user(folder):
    """Be a user who is not root, in a directory that this user can reach."""
    folder.chmod(0o755)
    os.chdir(folder)
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def assert_permission_denied(path, raw):
    with pytest.raises(loader.DatasetError, match=rf"{re.escape(str(path))}.*permission denied") as caught:
        loader.load("mnist", raw, Path("proc"))
    assert not re.search("damaged|missing|delete", str(caught.value))


@pytest.mark.parametrize("name", ["", "meta.json", "train_images.npy"])
def test_closed_cache_is_not_reported_as_damaged(name, tmp_path, proc, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_raw("mnist", tmp_path / "raw", monkeypatch)
    loader.load("mnist", tmp_path / "raw", proc)
    (proc / "mnist" / name).chmod(0)
    with another_user(tmp_path):
        assert_permission_denied(Path("proc", "mnist", name), None)
    (proc / "mnist" / name).chmod(0o700)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
@pytest.mark.parametrize("closed", [0, -1])
def test_closed_raw_file_is_not_reported_as_damaged_or_missing(name, closed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, files = write_raw(name, tmp_path / "raw", monkeypatch)
    closed = files[0] if closed else files[0].parent
    closed.chmod(0)
    with another_user(tmp_path), pytest.raises(loader.DatasetError, match="permission denied") as caught:
        loader.load(name, Path("raw"), Path("proc"))
    closed.chmod(0o700)
    assert str(closed.relative_to(tmp_path)) in str(caught.value)
    assert not re.search("damaged|missing|delete", str(caught.value))


def leave_temporary_folder(proc):
    loader.load("tiny", proc=proc)
    os.rename(proc / "tiny", proc / ".tiny-x1y2z3")
    (proc / ".tiny-x1y2z3" / "test_images.npy").write_bytes(b"")


def leave_other_format(proc):
    loader.load("tiny", proc=proc)
    (proc / "tiny" / "meta.json").write_text('{"format": 0}')
    np.save(proc / "tiny" / "train_images.npy", np.zeros((12, 5, 5, 2), np.uint8))


@pytest.mark.parametrize("leave", [leave_temporary_folder, leave_other_format])
def test_stale_cache_is_rebuilt(leave, tiny, proc):
    arrays, reads = tiny
    leave(proc)
    assert_holds(loader.load("tiny", proc=proc), arrays)
    assert len(reads) == 2


@pytest.fixture
def cache(tiny, proc):
    """Return the directory of `tiny`, pre-processed."""
    loader.load("tiny", proc=proc)
    return proc / "tiny"


def seal(cache):
    """Make meta.json describe the arrays as they are, so that only their contents are wrong."""
    meta = json.loads((cache / "meta.json").read_text())
    meta["arrays"] = {name: loader._fingerprint(cache / name, loader._sha256(cache / name)) for name in meta["arrays"]}
    (cache / "meta.json").write_text(json.dumps(meta))


@pytest.fixture
def assert_damaged(cache):
    """Return a function that checks that loading reports `cache` as damaged in one line and leaves it unchanged."""

    def assert_damaged():
        before = snapshot(cache)
        with pytest.raises(loader.DatasetError, match=re.escape(str(cache))) as caught:
            loader.load("tiny", proc=cache.parent)
        assert "\n" not in str(caught.value)
        assert snapshot(cache) == before

    return assert_damaged


def array(*shape, dtype=np.uint8, value=0):
    return lambda path, *_: np.save(path, np.full(shape, value, dtype))


def header(text):
    """Write an array file of version 1 with this header."""
    return write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)


ARRAYS = {
    "truncated description": truncate(60),
    "truncated values": truncate(150),
    "other magic number": flip(0),
    "description without end": header(b"{'descr': '|u1', 'shape': (("),
    "description with a call": header(b"__import__('os').mkdir('owned')"),
    "negative size": header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-5, 5, 5, 2)}"),
    "size beyond memory": header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 5, 5, 2)}" % 10**30),
    "strings": array(12, dtype="<U3"),
    "scalar": array(),
}
IMAGES = {
    "float64": array(12, 5, 5, 2, dtype=np.float64),
    "int64": array(12, 5, 5, 2, dtype=np.int64),
    "complex64": array(12, 5, 5, 2, dtype=np.complex64),
    "big-endian": array(12, 5, 5, 2, dtype=">i4"),
    "three dimensions": array(12, 5, 5),
    "five dimensions": array(12, 5, 5, 2, 1),
    "not square": array(12, 5, 6, 2),
    "other size than the test images": array(12, 6, 6, 2),
    "three channels": array(12, 5, 5, 3),
    "no image": array(0, 5, 5, 2),
    "one image too few": array(11, 5, 5, 2),
    "one image too many": array(13, 5, 5, 2),
}
LABELS = {
    "uint8": array(12),
    "float64": array(12, dtype=np.float64),
    "label of 10": array(12, dtype=np.int64, value=10),
    "label of -1": array(12, dtype=np.int64, value=-1),
    "label of 2 ** 62": array(12, dtype=np.int64, value=2**62),
    "two dimensions": array(12, 1, dtype=np.int64),
    "one label too few": array(11, dtype=np.int64),
    "none": array(0, dtype=np.int64),
}
JSON = {text[:9]: write(text.encode()) for text in ("[]", "null", "1", '"text"', "{", "[" * 100_000, "\ufeff{}")}
NO_LABELS = {"missing": DAMAGE["missing"], "truncated": truncate(-1), "malicious array": write_object_array}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, *value.values, id=f"{name}-{value.id}", marks=value.marks)
        for name, damage in (
            ("train_images.npy", DAMAGE | ARRAYS | IMAGES),
            ("train_labels.npy", NO_LABELS | LABELS),
            ("test_images.npy", NO_LABELS),
            ("test_labels.npy", NO_LABELS | {"label of 10": array(7, dtype=np.int64, value=10), "one": array(1)}),
            ("meta.json", {name: damage for name, damage in DAMAGE.items() if name != "missing"} | JSON),
        )
        for value in table(damage)
    ],
)
def test_damaged_cache_file_is_rejected_unexecuted(name, damage, marker, cache, assert_damaged, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    damage(cache / name, marker)
    assert_damaged()
    if name != "meta.json":
        with contextlib.suppress(OSError):  # it is missing or cannot be read
            seal(cache)
        assert_damaged()


@pytest.mark.parametrize("name", ["train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy"])
def test_changed_value_in_the_cache_is_detected(name, cache, assert_damaged):
    flip(-1 if "images" in name else -8)(cache / name)
    assert_damaged()


def test_copied_cache_is_used(cache, tiny):
    """A copy's files have other times of modification."""
    arrays, reads = tiny
    shutil.copytree(cache, cache.parent / "copy" / "tiny", copy_function=shutil.copyfile)
    assert_holds(loader.load("tiny", proc=cache.parent / "copy"), arrays)
    assert len(reads) == 1


def test_cache_that_was_written_wrong_is_not_used(tiny, proc, monkeypatch):
    """A new cache is read once, whatever its times of modification."""
    rename = os.rename

    def rename_and_corrupt(source, target):
        status = (source / "test_images.npy").stat()
        flip(-1)(source / "test_images.npy")
        os.utime(source / "test_images.npy", ns=(status.st_atime_ns, status.st_mtime_ns))
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_and_corrupt)
    with pytest.raises(loader.DatasetError, match=re.escape(str(proc / "tiny"))):
        loader.load("tiny", proc=proc)


def test_checksum_depends_on_the_data_only(tiny, tmp_path):
    arrays, _ = tiny
    checksums = [loader.load("tiny", proc=tmp_path / name).checksum for name in "ab"]
    arrays[1][1][0] ^= 1
    checksums.append(loader.load("tiny", proc=tmp_path / "c").checksum)
    assert checksums[0] == checksums[1] != checksums[2]


META = {
    "mean": [None, "text", {}, [], [1], [1, 2, 3], [[1, 2]], 1, ["1", "2"], [None, 1], [10**400, 1], [float("nan"), 1]],
    "std": [None, [0, 1], [-1, 1], [1], {}, [[]], [float("inf"), 1]],
    "classes": [None, "10", 10.0, 0, -1, [10], 9, 10**30],
    "source_dir": [5, ["x"]],
    "raw_files": [[], {"x": 1}, {"x": {"size": 1}}, {"x": {"size": "1", "mtime_ns": 1, "sha256": ""}}],
    "arrays": [[], {}, {"train_images.npy": []}],
}


@pytest.mark.parametrize("name", META)
def test_invalid_or_missing_meta_value_is_rejected(name, cache, assert_damaged):
    meta = json.loads((cache / "meta.json").read_text())
    for value in META[name]:
        (cache / "meta.json").write_text(json.dumps(meta | {name: value}))
        assert_damaged()
    del meta[name]
    (cache / "meta.json").write_text(json.dumps(meta))
    assert_damaged()


@pytest.mark.parametrize("value", [0, 1, 10**30, str(loader.FORMAT), None, {}])
def test_cache_of_another_format_is_rebuilt(value, cache):
    meta = json.loads((cache / "meta.json").read_text())
    (cache / "meta.json").write_text(json.dumps(meta | dict(format=value)))
    loader.load("tiny", proc=cache.parent)
    assert json.loads((cache / "meta.json").read_text()) == meta | dict(arrays=ANY)


def keep_files(cache):
    (cache / "meta.json").unlink()


def put_file(cache):
    shutil.rmtree(cache)
    cache.write_text("in the way")


def put_link_to_nowhere(cache):
    shutil.rmtree(cache)
    cache.symlink_to("nowhere")


@pytest.mark.parametrize("change", [keep_files, put_file, put_link_to_nowhere])
def test_unrelated_files_in_proc_are_left_unchanged(change, cache):
    change(cache)
    before = snapshot(cache.parent)
    with pytest.raises(loader.DatasetError, match=rf"{re.escape(str(cache))}.*--proc"):
        loader.load("tiny", proc=cache.parent)
    assert snapshot(cache.parent) == before


def test_changed_format_number_rebuilds_cache(tiny, proc, monkeypatch):
    arrays, reads = tiny
    loader.load("tiny", proc=proc)
    arrays[0] = (255 - arrays[0][0], arrays[0][1])
    monkeypatch.setattr(loader, "FORMAT", loader.FORMAT + 1)
    assert_holds(loader.load("tiny", proc=proc), arrays)
    loader.load("tiny", proc=proc)
    assert len(reads) == 2


def test_another_data_folder_rebuilds_cache(tmp_path, proc, monkeypatch):
    sets = {
        raw: write_raw("mnist", raw, monkeypatch, seed=i)[0] for i, raw in enumerate([tmp_path / "a", tmp_path / "b"])
    }
    for raw in [*sets, *sets]:
        assert_holds(loader.load("mnist", raw, proc), sets[raw])
        assert [path.name for path in proc.iterdir()] == ["mnist"]
    assert_holds(loader.load("mnist", None, proc), sets[raw])


@pytest.mark.parametrize("downloaded", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_changed_raw_files_rebuild_cache(name, downloaded, proc, tmp_path, monkeypatch):
    raw = proc / "raw" if downloaded else tmp_path / "raw"
    for seed in (1, 2):
        shutil.rmtree(raw, ignore_errors=True)
        arrays, _ = write_raw(name, raw, monkeypatch, seed)
        assert_holds(loader.load(name, None if downloaded else raw, proc), arrays)


@pytest.fixture
def no_reads(monkeypatch):
    """Return a function after which no raw data can be read."""

    def forbid():
        monkeypatch.setitem(loader.DATASETS, "mnist", loader.DATASETS["mnist"]._replace(read=None))

    return forbid


def test_touched_raw_files_do_not_rebuild_cache(tmp_path, proc, monkeypatch, no_reads):
    """Jobs that copy the same data to a node's own disk give the files new times."""
    arrays, files = write_raw("mnist", tmp_path / "raw", monkeypatch)
    loader.load("mnist", tmp_path / "raw", proc)
    no_reads()
    for file in files:
        os.utime(file)
    assert_holds(loader.load("mnist", tmp_path / "raw", proc), arrays)


def test_without_a_data_folder_its_later_changes_do_not_matter(tmp_path, proc, monkeypatch, no_reads):
    arrays, files = write_raw("mnist", tmp_path / "raw", monkeypatch)
    loader.load("mnist", tmp_path / "raw", proc)
    no_reads()
    append(b"\0")(files[0])
    data = loader.load("mnist", None, proc)
    assert_holds(data, arrays)
    assert data.source_dir == str(tmp_path / "raw")


def test_relative_path_of_same_data_folder_uses_cache(tmp_path, proc, monkeypatch):
    write_raw("mnist", tmp_path / "raw", monkeypatch)
    loader.load("mnist", tmp_path / "raw", proc)
    shutil.rmtree(tmp_path / "raw" / "MNIST")
    monkeypatch.chdir(tmp_path)
    loader.load("mnist", Path("raw"), proc)


def in_the_way(path):
    path.write_text("in the way")
    return path


def closed(path, mode):
    path.mkdir()
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(in_the_way, id="file"),
        pytest.param(lambda path: in_the_way(path) / "below", id="below a file"),
        pytest.param(lambda path: path.with_name("a" * 300), id="long name"),
        pytest.param(lambda path: Path("/dev/null/below"), id="below a device"),
        pytest.param(lambda path: closed(path, 0) / "below", id="below a closed folder", marks=needs_permissions),
        pytest.param(lambda path: closed(path, 0o500), id="read-only folder", marks=needs_permissions),
    ],
)
def test_unwritable_proc_is_rejected(place, tiny, tmp_path):
    path = place(tmp_path / "place")
    before = snapshot(tmp_path)
    with pytest.raises(loader.DatasetError, match=rf"{re.escape(str(path))}.*--proc"):
        loader.load("tiny", proc=path)
    assert snapshot(tmp_path) == before


class FullDisk:
    """A file on a disk with `room` free bytes."""

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


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("room", [0, 700, 1100, -1])
def test_full_disk_leaves_old_cache_and_next_run_builds(room, existing, cache, tiny, monkeypatch):
    total = sum(path.stat().st_size for path in cache.iterdir())
    if existing:
        (cache / "meta.json").write_text('{"format": 0}')
    else:
        shutil.rmtree(cache)
    before = snapshot(cache.parent)
    with monkeypatch.context() as patch:
        patch.setattr(loader, "open", functools.partial(FullDisk, [room % total]), raising=False)
        with pytest.raises(loader.DatasetError, match=rf"{re.escape(str(cache))}.*No space left on device.*--proc"):
            loader.load("tiny", proc=cache.parent)
    assert snapshot(cache.parent) == before
    assert_holds(loader.load("tiny", proc=cache.parent), tiny[0])
    assert sum(path.stat().st_size for path in cache.iterdir()) == total


@pytest.mark.parametrize("limit", [0, 92_000])  # the images of digits take 92,096 bytes
def test_file_that_cannot_grow_leaves_nothing(limit, proc):
    proc.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(loader.DatasetError, match="--proc"):
            loader.load("digits", proc=proc)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not os.listdir(proc)
    loader.load("digits", proc=proc)


def test_failing_flush_leaves_nothing(tiny, proc, monkeypatch):
    for call in range(1, 6):
        calls = []

        def fsync(number, calls=calls, call=call):
            calls.append(number)
            if len(calls) == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(loader.DatasetError, match=r"No space left on device.*--proc"):
                loader.load("tiny", proc=proc)
        assert not os.listdir(proc)
    assert_holds(loader.load("tiny", proc=proc), tiny[0])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("stale", [False, True])
def test_concurrent_builds_all_load_the_data(stale, tiny, proc, monkeypatch):
    arrays, _ = tiny
    if stale:
        leave_other_format(proc)
    context = multiprocessing.get_context("fork")
    built, rename = context.Barrier(3, timeout=20), os.rename

    def rename_at_once(*args):
        os.rename = rename  # in this process: if it has to build again it does not wait
        built.wait()
        rename(*args)

    monkeypatch.setattr(os, "rename", rename_at_once)
    runs = [context.Process(target=lambda: assert_holds(loader.load("tiny", proc=proc), arrays)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert [path.name for path in proc.iterdir()] == ["tiny"]
    assert_holds(loader.load("tiny", proc=proc), arrays)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_cache_replaced_while_opening_is_retried(tiny, proc):
    arrays, _ = tiny
    leave_other_format(proc)
    context = multiprocessing.get_context("fork")
    stale, rename, open_memmap = context.Barrier(2), os.rename, np.lib.format.open_memmap

    def run(number):
        """Both find a stale cache; the second replaces the one that the first has written and not opened yet."""

        def slow_rename(source, target):
            moves_away = source == proc / "tiny"
            if moves_away:
                with contextlib.suppress(threading.BrokenBarrierError):
                    stale.wait(timeout=1)
            time.sleep(0.1 * number * moves_away)
            rename(source, target)
            time.sleep(0.3 * number * moves_away)

        def slow_open(*args, **kwargs):
            np.lib.format.open_memmap = open_memmap
            time.sleep(0.2 * (1 - number))
            return open_memmap(*args, **kwargs)

        os.rename, np.lib.format.open_memmap = slow_rename, slow_open
        assert_holds(loader.load("tiny", proc=proc), arrays)

    runs = [context.Process(target=run, args=(number,)) for number in range(2)]
    for process in runs:
        process.start()
    for process in runs:
        process.join()
    assert [process.exitcode for process in runs] == [0, 0]


def test_building_makes_no_float_copy_of_images(tiny, proc):
    arrays, _ = tiny
    images = np.full((20_000, 12, 12, 3), 7, np.uint8)
    arrays[0] = (images, np.zeros(len(images), np.int64))
    arrays[1] = (images[:1], np.zeros(1, np.int64))
    tracemalloc.start()
    loader.load("tiny", proc=proc)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * images.nbytes, f"{peak / images.nbytes:.1f} times the images' own bytes"


# ZCA whitening


def peak_memory():
    """Return the largest resident set since the last call, in bytes. Unlike tracemalloc it counts torch's memory."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_whitening_holds_no_float_copy_of_the_images(tiny, proc, monkeypatch):
    """SVHN's would take 7 GB."""
    monkeypatch.setattr(loader, "CHUNK", 500)
    arrays, _ = tiny
    loader.load("tiny", proc=proc / "small", zca=True)  # libraries allocate memory at their first use
    images = np.random.default_rng(1).integers(0, 256, (60_000, 9, 9, 2), np.uint8)
    arrays[0] = (images, np.zeros(len(images), np.int64))
    arrays[1] = (images[:1, ...].copy(), np.zeros(1, np.int64))
    peak_memory()
    before = peak_memory()
    loader.load("tiny", proc=proc, zca=True)
    assert peak_memory() - before < 2 * images.nbytes  # as floats they take four times their bytes


@pytest.mark.parametrize("zca", [False, True])
def test_parts_of_a_data_set_are_written_as_one(zca, tiny, proc, monkeypatch):
    """SVHN is in two parts of different sizes."""
    monkeypatch.setattr(loader, "CHUNK", 90)
    arrays, _ = tiny
    arrays[0] = (np.random.default_rng(1).integers(0, 256, (400, 5, 5, 2), np.uint8), np.arange(400) % 10)
    whole = loader.load("tiny", proc=proc / "whole", zca=zca)

    def read_parts(*_):
        (images, labels), (test, wanted) = arrays
        return ([images[:130], images[130:]], labels), ([test], wanted)

    monkeypatch.setitem(loader.DATASETS, "tiny", loader.DATASETS["tiny"]._replace(read=read_parts))
    parts = loader.load("tiny", proc=proc / "parts", zca=zca)
    for name in ("train_images", "train_labels", "test_images", "test_labels", "mean", "std"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-4)


def correlated_images(count, correlation, random):
    mixing = np.eye(18) + correlation * random.normal(size=(18, 18))
    pixels = 128 + 25 * random.normal(size=(count, 18)) @ mixing
    return pixels.clip(0, 255).round().astype(np.uint8).reshape(count, 3, 3, 2)


@pytest.fixture
def correlated(tiny):
    """Give `tiny` correlated pixels and a training set longer than one chunk of the whitening; return its arrays."""
    arrays, _ = tiny
    random = np.random.default_rng(0)
    for i, (count, correlation) in enumerate([(10_300, 0.3), (50, 0.6)]):
        arrays[i] = (correlated_images(count, correlation, random), random.integers(0, 10, count))
    arrays[1][0][0] = 9
    return arrays


def test_zca_decorrelates_training_set(correlated, proc):
    data = loader.load("tiny", proc=proc, zca=True)
    flat = data.train_images.reshape(len(data.train_images), -1).double()
    assert flat.mean(0).abs().max() < 1e-4
    # contrast normalization subtracts each image's mean, so the direction of ones has no variance
    wanted = torch.eye(18, dtype=torch.float64) - 1 / 18
    torch.testing.assert_close(flat.T @ flat / len(flat), wanted, atol=2e-3, rtol=0)


def test_zca_follows_contrast_normalization(correlated, proc):
    random = np.random.default_rng(1)
    for images, _ in correlated:
        flat = images.reshape(len(images), -1)
        # two nearly equal pixels: without an eigenvalue near the regularizer, its value and ddof would have no effect
        flat[:, 17] = np.minimum(flat[:, 16], 254) + (random.random(len(flat)) < 0.1)
    data = loader.load("tiny", proc=proc, zca=True)
    (train, _), (test, _) = correlated

    def gcn(images):
        flat = images.reshape(len(images), -1).astype(np.float64)
        flat -= flat.mean(1, keepdims=True)
        return flat / np.maximum(flat.std(1, ddof=1, keepdims=True), 1e-8)

    mean = gcn(train).mean(0)
    values, vectors = np.linalg.eigh(np.cov(gcn(train).T, ddof=0))
    zca = vectors @ np.diag((values.clip(0) + 1e-5) ** -0.5) @ vectors.T
    for images, source in ((data.train_images, train), (data.test_images, test)):
        assert images.dtype == torch.float32 and images.shape == source.shape
        np.testing.assert_allclose(images.numpy().reshape(len(source), -1), (gcn(source) - mean) @ zca, atol=1e-2)
    inputs = data.inputs(data.test_images)
    assert torch.equal(inputs.permute(0, 2, 3, 1), data.test_images)


def test_zca_and_plain_data_have_separate_caches(tiny, proc):
    arrays, reads = tiny
    for _ in range(2):
        whitened = loader.load("tiny", proc=proc, zca=True)
    assert [path.name for path in proc.iterdir()] == ["tiny-zca"]
    for _ in range(2):
        assert_holds(loader.load("tiny", proc=proc), arrays)
    assert {path.name for path in proc.iterdir()} == {"tiny", "tiny-zca"}
    assert torch.equal(loader.load("tiny", proc=proc, zca=True).train_images, whitened.train_images)
    assert len(reads) == 2


# Batches


def numbered(total, size=6, channels=2):
    """Return a data set whose labels are the indices of its images, and whose inputs are the unchanged pixels."""
    images = torch.randint(0, 256, (total, size, size, channels), dtype=torch.uint8)
    labels = torch.arange(total)
    return loader.Dataset(
        "numbered", images, labels, images[:1], labels[:1], torch.zeros(channels), torch.ones(channels), total
    )


def targets(batches, count):
    return torch.cat([next(batches)[1] for _ in range(count)])


def assert_same_batch(left, right):
    assert torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])


@pytest.mark.parametrize(("batch_size", "per_epoch"), [(5, 2), (4, 3), (7, 2), (10, 1)])
def test_pass_shows_every_image_once(batch_size, per_epoch):
    batches = loader.BatchLoader(numbered(10), batch_size=batch_size, seed=1)
    assert batches.per_epoch == per_epoch
    passes = targets(batches, 10).view(batch_size, 10)
    assert (passes.sort(1).values == torch.arange(10)).all()
    assert len(passes.unique(dim=0)) == batch_size


def test_inputs_match_their_targets():
    data = numbered(10)
    inputs, labels = next(loader.BatchLoader(data, batch_size=7, seed=1))
    assert inputs.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(inputs, data.train_images[labels].permute(0, 3, 1, 2).float())


@pytest.mark.parametrize("augment", [False, True])
def test_batch_j_does_not_depend_on_earlier_draws(augment):
    settings = dict(batch_size=7, seed=1, augment=augment)
    data = numbered(10)
    through = loader.BatchLoader(data, **settings)
    drawn = [next(through) for _ in range(9)]
    jumping = loader.BatchLoader(data, **settings)
    for j in (8, 2, 2, 0, 5, 4):
        jumping.batches_drawn = j
        assert_same_batch(next(jumping), drawn[j])
        assert jumping.batches_drawn == j + 1


def test_order_depends_only_on_seed_and_replica():
    data = numbered(64)

    def order(seed, replica):
        return targets(loader.BatchLoader(data, batch_size=16, seed=seed, replica=replica, replicas=2), 4)

    first = order(1, 0)
    torch.manual_seed(99)
    assert torch.equal(order(1, 0), first)
    assert not torch.equal(order(2, 0), first)
    assert not torch.equal(order(1, 1), first)


@pytest.mark.parametrize(("seed", "replica"), [(2, 0), (1, 1)])
def test_augmentation_depends_on_seed_and_replica(seed, replica):
    data = numbered(1)
    choices = [
        torch.cat([next(batches)[0] for _ in range(20)])
        for batches in (
            loader.BatchLoader(data, batch_size=1, seed=s, replica=a, replicas=2, augment=True)
            for s, a in [(1, 0), (1, 0), (seed, replica)]
        )
    ]
    assert torch.equal(choices[0], choices[1])
    assert not torch.equal(choices[0], choices[2])


def dropout_seed(drawn, seed=1, replica=0, shard=(0, 1), device=0):
    batches = loader.BatchLoader(numbered(10), batch_size=4, seed=seed, replica=replica, replicas=2, shard=shard)
    for _ in range(drawn):
        next(batches)
    return batches.dropout_seed(device)


def test_dropout_seeds_are_all_different():
    seeds = {
        dropout_seed(drawn, seed, replica, (shard, 3))
        for drawn in (1, 2, 3, 5)
        for seed in (1, 2)
        for replica in (0, 1)
        for shard in (0, 1, 2)
    }
    assert len(seeds) == 4 * 2 * 2 * 3
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_dropout_seed_does_not_depend_on_earlier_draws():
    batches = loader.BatchLoader(numbered(10), batch_size=4, seed=1, replicas=2)
    for drawn in (4, 1, 3):
        batches.batches_drawn = drawn - 1
        next(batches)
        assert batches.dropout_seed() == batches.dropout_seed(0) == dropout_seed(drawn)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_dropout_seeds_of_devices_equal_those_of_ranks(number):
    assert dropout_seed(3, device=number) == dropout_seed(3, shard=(number, 3))


def test_random_streams_have_different_seeds():
    uses = list(loader.Stream)
    assert len({loader.random_seed(1, use, 0, 2) for use in uses}) == len(uses) == 4


def test_drawing_leaves_torch_random_state_unchanged():
    data, before = numbered(10), torch.get_rng_state()
    batches = loader.BatchLoader(data, batch_size=4, seed=1, frac=0.5, augment=True)
    for _ in range(4):
        next(batches)
        batches.dropout_seed()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_shards_of_a_batch_concatenate_to_the_batch(count, augment):
    data = numbered(11)
    settings = dict(batch_size=8, seed=1, augment=augment)
    whole = loader.BatchLoader(data, **settings)
    shards = [loader.BatchLoader(data, **settings, shard=(i, count)) for i in range(count)]
    for _ in range(4):
        drawn = [next(shard) for shard in shards]
        assert_same_batch([torch.cat(column) for column in zip(*drawn, strict=True)], next(whole))
        sizes = [len(labels) for _, labels in drawn]
        assert max(sizes) - min(sizes) <= 1
    assert shards[0].per_epoch == whole.per_epoch


@pytest.mark.parametrize(("replicas", "frac", "num_images"), [(4, 0.5, 5), (3, 0.34, 3), (3, 1.0, 10), (6, 0.25, 2)])
def test_frac_takes_wrapping_block_of_common_shuffle(replicas, frac, num_images):
    data = numbered(10)
    shuffle = loader.BatchLoader(data, batch_size=1, seed=5).indices
    assert sorted(shuffle.tolist()) == list(range(10)) != shuffle.tolist()
    for replica in range(replicas):
        batches = loader.BatchLoader(data, batch_size=1, seed=5, replica=replica, replicas=replicas, frac=frac)
        block = shuffle.roll(-(replica * 10 // replicas))[:num_images]
        assert batches.per_epoch == num_images
        for _ in range(2):
            assert sorted(targets(batches, num_images).tolist()) == sorted(block.tolist())


def test_two_halves_are_disjoint_and_cover_everything():
    shown = [
        targets(loader.BatchLoader(numbered(20), batch_size=5, seed=5, replica=a, replicas=2, frac=0.5), 2)
        for a in range(2)
    ]
    assert sorted(torch.cat(shown).tolist()) == list(range(20))


def test_suggested_frac_and_batch_size_are_valid():
    data = numbered(1437)
    with pytest.raises(loader.DatasetError, match="--frac") as caught:
        loader.BatchLoader(data, batch_size=100, seed=1, frac=1e-9)
    frac = float(re.search(r"--frac ([\d.e-]*\d)", str(caught.value))[1])
    with pytest.raises(loader.DatasetError, match="-b") as caught:
        loader.BatchLoader(data, batch_size=100, seed=1, frac=frac)
    loader.BatchLoader(data, batch_size=int(re.search(r"-b (\d+)", str(caught.value))[1]), seed=1, frac=frac)


def test_batch_larger_than_a_replicas_data_is_rejected():
    loader.BatchLoader(numbered(10), batch_size=5, seed=1, frac=0.5)
    with pytest.raises(loader.DatasetError, match=r"\b6\b.*\b5\b.*-b 5"):
        loader.BatchLoader(numbered(10), batch_size=6, seed=1, frac=0.5)


def test_images_too_small_to_augment_are_rejected():
    loader.BatchLoader(numbered(10, size=5), batch_size=2, seed=1, augment=True)
    with pytest.raises(loader.DatasetError, match="--no-augment"):
        loader.BatchLoader(numbered(10, size=4), batch_size=2, seed=1, augment=True)


def crops_chosen(size, draws):
    """Return for each augmented image which (flip, down, right) of its original's 2 x 9 x 9 crops it equals."""
    data = numbered(30, size)
    pixels = data.train_images.permute(0, 3, 1, 2).float()
    padded = torch.stack([F.pad(images, (4, 4, 4, 4), mode="reflect") for images in (pixels, pixels.flip(3))], 1)
    crops = padded.unfold(3, size, 1).unfold(4, size, 1).movedim(2, 4)  # image, flip, down, right, C, H, W
    batches = loader.BatchLoader(data, batch_size=30, seed=1, augment=True)
    drawn = [pair for _ in range(draws) for pair in zip(*next(batches), strict=True)]
    return [(crops[label] == image).flatten(3).all(3).nonzero().tolist() for image, label in drawn]


@pytest.mark.parametrize("size", [5, 8, 10])
def test_augmentation_flips_reflects_and_crops(size):
    chosen = crops_chosen(size, draws=4)
    assert len(chosen) == 120 and all(chosen)


def test_augmentation_draws_flips_and_crops_uniformly():
    chosen = crops_chosen(10, draws=20)  # from 10 pixels on, no two crops are the same
    flips, downs, rights = (torch.tensor(chosen).squeeze(1)[:, axis].bincount() for axis in range(3))
    assert (len(flips), len(downs), len(rights)) == (2, 9, 9)
    assert flips.min() > 240 and downs.min() > 35 and rights.min() > 35  # of 600
    assert len({tuple(choice) for (choice,) in chosen}) > 140  # of 162; the expectation is 158


@pytest.mark.parametrize("channels", [1, 3])
def test_inputs_are_normalized_float32_channels_last(channels):
    images = torch.randint(0, 256, (5, 6, 6, channels), dtype=torch.uint8)
    mean, std = torch.rand(channels) * 100, torch.rand(channels) * 50 + 20
    data = numbered(5, channels=channels)._replace(mean=mean, std=std)
    inputs = data.inputs(images)
    assert inputs.dtype == torch.float32 and inputs.shape == (5, channels, 6, 6)
    assert inputs.stride() == (36 * channels, 1, 6 * channels, channels)
    wanted = (images.double() - mean.double()) / std.double()
    torch.testing.assert_close(inputs.permute(0, 2, 3, 1), wanted.float())
