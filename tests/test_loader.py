import contextlib
import errno
import hashlib
import multiprocessing
import os
import pickle
import re
import shutil
import socket
import struct
import threading
import time
import tracemalloc
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import loader

FORMATS = ["mnist", "fashion", "cifar10", "cifar100", "svhn"]
SMALL = {"svhn": 32, "cifar10": 32, "cifar100": 32}  # else 6 pixels: an idx file may hold any size


@pytest.fixture(autouse=True)
def requests(monkeypatch):
    """What was asked of the network, which is not there."""
    asked = []

    def refuse(request, *args, **kwargs):
        asked.append(request)
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return asked


@pytest.fixture
def proc(tmp_path):
    return tmp_path / "proc"


@pytest.fixture
def tiny(monkeypatch):
    """A source named `tiny` that lies in memory; gives its arrays and the list of its readings."""
    random = np.random.default_rng(3)
    arrays = [
        (random.integers(0, 256, (count, 5, 5, 2), dtype=np.uint8), random.integers(0, 10, count)) for count in (12, 7)
    ]
    readings = []

    def read(kind, raw, download):
        readings.append(raw)
        return arrays

    monkeypatch.setitem(loader.SOURCES, "tiny", loader.Source(read, "Tiny", None, 12, 2, 5, 10, False))
    return arrays, readings


def same(labels):
    return labels


def random_set(name, seed):
    """Train and test arrays in a shape that the format allows."""
    random = np.random.default_rng(seed)
    size = SMALL.get(name, 6)
    shape = (size, size, 3 if name in SMALL else 1)
    return [
        (
            random.integers(0, 256, (count, *shape), dtype=np.uint8),
            random.permutation(np.arange(count) % loader.SOURCES[name].classes),
        )
        for count in (23, 11)
    ]


def write_raw(name, root, monkeypatch, seed=0, train_labels=same, test_labels=same):
    """Write a tiny set as torchvision lays it out, its labels spoiled as asked; gives its arrays and its files."""
    arrays = random_set(name, seed)
    (train, labels), (test, wanted) = arrays
    parts = [(train, train_labels(labels)), (test, test_labels(wanted))]
    write = {"mnist": write_idx, "fashion": write_idx, "svhn": write_svhn}.get(name, write_cifar)
    return arrays, write(loader.SOURCES[name].kind, root, monkeypatch, parts)


def write_idx(kind, root, monkeypatch, parts):
    folder = root / kind / "raw"
    folder.mkdir(parents=True)
    files = []
    for part, (images, labels) in zip(("train", "t10k"), parts, strict=True):
        for content, array in (("images-idx3", images[..., 0]), ("labels-idx1", labels)):
            files.append(folder / f"{part}-{content}-ubyte")
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            files[-1].write_bytes(header + array.astype(np.uint8).tobytes())
    return files


def write_cifar(kind, root, monkeypatch, parts):
    import torchvision

    cifar = getattr(torchvision.datasets, kind)
    folder = root / cifar.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, md5(folder / name)]

    for attribute, (images, labels) in zip(("train_list", "test_list"), parts, strict=True):
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


def write_svhn(kind, root, monkeypatch, parts):
    import scipy.io
    import torchvision

    root.mkdir(parents=True, exist_ok=True)
    (images, labels), test = parts
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


# Raw data


@pytest.mark.parametrize("name", FORMATS)
def test_a_raw_format_is_read_pixel_for_pixel(name, tmp_path, proc, monkeypatch, requests):
    arrays, _ = write_raw(name, tmp_path / "raw", monkeypatch)
    data = loader.load(name, tmp_path / "raw", proc)
    assert_holds(data, arrays)
    pixels = arrays[0][0].astype(np.float64).reshape(-1, data.channels)
    np.testing.assert_allclose(data.mean.numpy(), pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(data.std.numpy(), pixels.std(0), rtol=1e-6)
    assert data.mean.dtype == data.std.dtype == torch.float32
    assert (data.name, data.classes) == (name, loader.SOURCES[name].classes)
    assert (data.channels, data.size) == (3 if name in SMALL else 1, SMALL.get(name, 6))
    assert not requests


def test_raw_data_are_where_torchvision_keeps_them(tmp_path):
    from torchvision import datasets

    for name in ("mnist", "fashion"):
        kind = getattr(datasets, loader.SOURCES[name].kind)
        unread = kind.__new__(kind)
        unread.root = tmp_path
        assert Path(unread.raw_folder) == tmp_path / loader.SOURCES[name].raw
    assert datasets.CIFAR10.base_folder == loader.SOURCES["cifar10"].raw
    assert datasets.CIFAR100.base_folder == loader.SOURCES["cifar100"].raw
    assert datasets.SVHN.split_list["train"][1] == loader.SOURCES["svhn"].raw


@pytest.mark.parametrize("raw", [None, "empty"])
def test_digits_are_scikit_learns_own_and_need_no_raw_folder(raw, tmp_path, proc, requests):
    from sklearn.datasets import load_digits

    (tmp_path / "empty").mkdir()
    data = loader.load("digits", raw and tmp_path / raw, proc)
    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    assert len(data.train_images) == 1437 and len(data.test_images) == 360
    assert (len(data.train_images), data.channels, data.size, data.classes) == loader.SOURCES["digits"][3:7]
    assert_holds(data, [(images[:1437], labels[:1437]), (images[1437:], labels[1437:])])
    assert data.train_images.max() == 255
    assert [path.name for path in proc.iterdir()] == ["digits"]
    assert not requests


DAMAGE = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "corrupt": lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_raw_file_is_an_error_that_names_it(name, damage, tmp_path, proc, monkeypatch, requests):
    arrays, files = write_raw(name, tmp_path / "raw", monkeypatch)
    for path in files:
        content = path.read_bytes()
        DAMAGE[damage](path)
        with pytest.raises(loader.DataError, match=re.escape(str(path))) as caught:
            loader.load(name, tmp_path / "raw", proc)
        assert not isinstance(caught.value, loader.Unreachable)
        assert not proc.exists()
        path.write_bytes(content)
    assert_holds(loader.load(name, tmp_path / "raw", proc), arrays)
    assert not requests


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_pickle_with_a_wrong_sum_is_never_unpickled(name, tmp_path, proc, monkeypatch):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    _, files = write_raw(name, tmp_path / "raw", monkeypatch)
    for path in files:
        content = path.read_bytes()
        path.write_bytes(pickle.dumps(Malicious()))
        with pytest.raises(loader.DataError, match=re.escape(str(path))):
            loader.load(name, tmp_path / "raw", proc)
        assert not (tmp_path / "owned").exists()
        path.write_bytes(content)
    pickle.loads(pickle.dumps(Malicious()))
    assert (tmp_path / "owned").exists()


def spoil_first(value):
    return lambda labels: np.concatenate([[value], labels[1:]])


@pytest.mark.parametrize("part", ["train_labels", "test_labels"])
@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [(name, spoil_first(200), "label outside") for name in FORMATS]
    + [("cifar10", spoil_first(10), "label outside 0 to 9"), ("cifar10", spoil_first(-1), "label outside")]
    + [("mnist", spoil_first(10), "label outside 0 to 9"), ("svhn", spoil_first(11), "label outside 0 to 9")]
    + [("cifar100", spoil_first(100), "label outside 0 to 99")]
    + [(name, lambda labels: labels[:-1], "images and") for name in FORMATS]
    + [("mnist", lambda labels: np.append(labels, 0), "images and")],
)
def test_labels_that_do_not_fit_are_an_error(name, spoil, message, part, tmp_path, proc, monkeypatch):
    write_raw(name, tmp_path / "raw", monkeypatch, **{part: spoil})
    with pytest.raises(loader.DataError, match=message) as caught:
        loader.load(name, tmp_path / "raw", proc)
    assert ("training" if part == "train_labels" else "test") in str(caught.value)
    assert not proc.exists()


def test_images_of_two_sizes_are_an_error(tiny, proc):
    arrays, _ = tiny
    arrays[1] = (arrays[1][0][:, :4, :4], arrays[1][1])
    with pytest.raises(loader.DataError, match=r"\(5, 5, 2\) for training and \(4, 4, 2\) for test"):
        loader.load("tiny", proc=proc)


def test_a_data_folder_that_does_not_exist_is_an_error(tmp_path, proc, requests):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(loader.DataError, match=re.escape(f"--data {path}")):
            loader.load("mnist", path, proc)
    assert not requests


@pytest.mark.parametrize("name", FORMATS)
def test_without_a_network_a_download_is_unreachable(name, proc, requests):
    timeout = socket.getdefaulttimeout()
    with pytest.raises(loader.Unreachable, match=rf"{loader.SOURCES[name].kind} could not be downloaded .*--data DIR"):
        loader.load(name, proc=proc)
    assert requests
    assert socket.getdefaulttimeout() == timeout
    assert not (proc / name).exists()


@pytest.mark.parametrize("name", FORMATS)
def test_what_lies_in_proc_raw_is_not_downloaded(name, proc, monkeypatch, requests):
    arrays, files = write_raw(name, proc / "raw", monkeypatch)
    files[0].write_bytes(b"?" + files[0].read_bytes())
    with pytest.raises(loader.DataError, match=re.escape(str(files[0]))) as caught:
        loader.load(name, proc=proc)
    assert not isinstance(caught.value, loader.Unreachable)
    files[0].write_bytes(files[0].read_bytes()[1:])
    assert_holds(loader.load(name, proc=proc), arrays)
    assert not requests


@pytest.mark.parametrize("name", FORMATS)
def test_a_download_that_leaves_a_damaged_file_is_an_error_that_names_it(name, proc, monkeypatch):
    _, (path, *_) = write_raw(name, proc / "raw", monkeypatch)
    path.unlink()

    def leave_damaged(*args, **kwargs):
        path.write_bytes(b"?")
        raise urllib.error.URLError("the line is cut")

    monkeypatch.setattr("urllib.request.urlopen", leave_damaged)
    with pytest.raises(loader.DataError, match=re.escape(f"{path} is damaged")) as caught:
        loader.load(name, proc=proc)
    assert not isinstance(caught.value, loader.Unreachable)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_every_missing_file_of_cifar_is_downloaded_again(name, proc, monkeypatch):
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
        ("cifar10", (50_000, 10_000), [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]),
    ],
)
def test_real_data_is_what_it_is_known_to_be(name, sizes, mean, std, raw, proc):
    data = loader.load(name, raw, proc)
    assert (len(data.train_images), len(data.test_images)) == sizes
    assert data.train_labels.bincount().min() > sizes[0] / 12
    torch.testing.assert_close(data.mean, torch.tensor(mean), atol=0.06, rtol=0)
    torch.testing.assert_close(data.std, torch.tensor(std), atol=0.06, rtol=0)


# proc/


@pytest.mark.parametrize("whiten", [False, True])
def test_a_second_load_reads_no_raw_data(whiten, tmp_path, proc, monkeypatch):
    raw = tmp_path / "raw"
    write_raw("mnist", raw, monkeypatch)
    first = loader.load("mnist", raw, proc, whiten)
    shutil.rmtree(raw / "MNIST")
    for again in (loader.load("mnist", raw, proc, whiten), loader.load("mnist", None, proc, whiten)):
        for old, new in zip(first, again, strict=True):
            assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


def test_arrays_are_mapped_from_proc_and_writing_to_them_leaves_it_alone(tiny, proc):
    arrays, _ = tiny
    data = loader.load("tiny", proc=proc)
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        path, tensor = str((proc / "tiny" / f"{name}.npy").resolve()), getattr(data, name)
        ranges = [map(lambda end: int(end, 16), line[0].split("-")) for line in maps if line[-1] == path]
        assert any(start <= tensor.data_ptr() < end for start, end in ranges), name
        tensor.zero_()
    assert_holds(loader.load("tiny", proc=proc), arrays)


def test_others_may_read_what_one_user_built(tiny, proc):
    loader.load("tiny", proc=proc)
    assert (proc / "tiny").stat().st_mode & 0o777 == 0o755


def leave_temporary_folder(proc):
    loader.load("tiny", proc=proc)
    os.rename(proc / "tiny", proc / ".tiny-x1y2z3")
    (proc / ".tiny-x1y2z3" / "test_images.npy").write_bytes(b"")


def leave_other_format(proc):
    loader.load("tiny", proc=proc)
    (proc / "tiny" / "meta.json").write_text('{"format": 0}')
    np.save(proc / "tiny" / "train_images.npy", np.zeros((12, 5, 5, 2), np.uint8))


@pytest.mark.parametrize("leave", [leave_temporary_folder, leave_other_format])
def test_what_another_run_left_is_built_anew(leave, tiny, proc):
    arrays, readings = tiny
    leave(proc)
    assert_holds(loader.load("tiny", proc=proc), arrays)
    assert len(readings) == 2


def test_a_folder_without_meta_file_is_never_trusted(tiny, proc):
    arrays, _ = tiny
    leave_other_format(proc)
    (proc / "tiny" / "meta.json").unlink()
    try:
        assert_holds(loader.load("tiny", proc=proc), arrays)
    except loader.DataError as error:
        assert str(proc / "tiny") in str(error)
        assert [path.name for path in proc.iterdir()] == ["tiny"]


@pytest.mark.parametrize("keep", [0, 40, 150, -1])
@pytest.mark.parametrize("part", ["train_images", "train_labels", "test_images", "test_labels"])
def test_a_truncated_array_is_an_error_that_names_its_folder(part, keep, tiny, proc):
    loader.load("tiny", proc=proc)
    path = proc / "tiny" / f"{part}.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(loader.DataError, match=re.escape(f"{proc / 'tiny'} is damaged")):
        loader.load("tiny", proc=proc)


def test_a_missing_array_is_an_error_that_names_it(tiny, proc):
    loader.load("tiny", proc=proc)
    (proc / "tiny" / "test_labels.npy").unlink()
    with pytest.raises(loader.DataError, match=re.escape(str(proc / "tiny" / "test_labels.npy"))):
        loader.load("tiny", proc=proc)


@pytest.mark.parametrize("content", ["", "{", '{"format": 1, "origin": null}', "[]"])
def test_a_damaged_meta_file_is_an_error_that_names_its_folder(content, tiny, proc):
    loader.load("tiny", proc=proc)
    (proc / "tiny" / "meta.json").write_text(content)
    with pytest.raises(loader.DataError, match=re.escape(f"{proc / 'tiny'} is damaged")):
        loader.load("tiny", proc=proc)


def test_another_format_is_built_anew(tiny, proc, monkeypatch):
    arrays, readings = tiny
    loader.load("tiny", proc=proc)
    arrays[0] = (255 - arrays[0][0], arrays[0][1])
    monkeypatch.setattr(loader, "FORMAT", loader.FORMAT + 1)
    assert_holds(loader.load("tiny", proc=proc), arrays)
    loader.load("tiny", proc=proc)
    assert len(readings) == 2


def test_another_data_folder_is_built_anew(tmp_path, proc, monkeypatch):
    sets = {
        raw: write_raw("mnist", raw, monkeypatch, seed=i)[0] for i, raw in enumerate([tmp_path / "a", tmp_path / "b"])
    }
    for raw in [*sets, *sets]:
        assert_holds(loader.load("mnist", raw, proc), sets[raw])
        assert [path.name for path in proc.iterdir()] == ["mnist"]
    assert_holds(loader.load("mnist", None, proc), sets[raw])


def test_a_name_for_the_same_data_folder_is_not_another(tmp_path, proc, monkeypatch):
    write_raw("mnist", tmp_path / "raw", monkeypatch)
    loader.load("mnist", tmp_path / "raw", proc)
    shutil.rmtree(tmp_path / "raw" / "MNIST")
    monkeypatch.chdir(tmp_path)
    loader.load("mnist", Path("raw"), proc)


def test_a_proc_that_cannot_be_written_is_an_error(tiny, proc):
    proc.write_text("in the way")
    with pytest.raises(loader.DataError, match=re.escape(str(proc))):
        loader.load("tiny", proc=proc)
    assert list(proc.parent.iterdir()) == [proc]
    assert proc.read_text() == "in the way"


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_that_is_trusted(existing, tiny, proc, monkeypatch):
    arrays, _ = tiny
    if existing:
        leave_other_format(proc)
    save, calls = loader._save, []

    def save_until_full(path, array):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, array)

    monkeypatch.setattr(loader, "_save", save_until_full)
    with pytest.raises(loader.DataError, match=r"No space left on device.*--proc"):
        loader.load("tiny", proc=proc)
    assert [path.name for path in proc.iterdir()] == ["tiny"] * existing
    assert_holds(loader.load("tiny", proc=proc), arrays)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("stale", [False, True])
def test_processes_that_build_at_once_all_get_the_data(stale, tiny, proc, monkeypatch):
    arrays, _ = tiny
    if stale:
        leave_other_format(proc)
    context = multiprocessing.get_context("fork")
    built, put = context.Barrier(3, timeout=20), loader._put

    def put_at_once(*args):
        monkeypatch.setattr(loader, "_put", put)  # for this process: one that has to build again waits for nobody
        built.wait()
        put(*args)

    monkeypatch.setattr(loader, "_put", put_at_once)
    runs = [context.Process(target=lambda: assert_holds(loader.load("tiny", proc=proc), arrays)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert [path.name for path in proc.iterdir()] == ["tiny"]
    assert_holds(loader.load("tiny", proc=proc), arrays)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_whose_folder_another_run_replaces_at_that_moment_does_not_fail(tiny, proc):
    arrays, _ = tiny
    leave_other_format(proc)
    context = multiprocessing.get_context("fork")
    stale, rename, open_folder = context.Barrier(2), os.rename, loader._open

    def run(number):
        """Both find the folder stale; the second replaces what the first has put there and not opened yet."""

        def slow_rename(source, target):
            moves_away = source == proc / "tiny"
            if moves_away:
                with contextlib.suppress(threading.BrokenBarrierError):
                    stale.wait(timeout=1)
            time.sleep(0.1 * number * moves_away)
            rename(source, target)
            time.sleep(0.3 * number * moves_away)

        os.rename = slow_rename
        loader._open = lambda *args: (time.sleep(0.2 * (1 - number)), open_folder(*args))[1]
        assert_holds(loader.load("tiny", proc=proc), arrays)

    runs = [context.Process(target=run, args=(number,)) for number in range(2)]
    for process in runs:
        process.start()
    for process in runs:
        process.join()
    assert [process.exitcode for process in runs] == [0, 0]


def test_building_makes_no_float_copy_of_the_images(tiny, proc):
    arrays, _ = tiny
    images = np.full((20_000, 12, 12, 3), 7, np.uint8)
    arrays[0] = (images, np.zeros(len(images), np.int64))
    arrays[1] = (images[:1], np.zeros(1, np.int64))
    tracemalloc.start()
    loader.load("tiny", proc=proc)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * images.nbytes, f"{peak / images.nbytes:.1f} times the images' own bytes"


# Whitening


def correlated(count, spread, random):
    mixing = np.eye(18) + spread * random.normal(size=(18, 18))
    pixels = 128 + 25 * random.normal(size=(count, 18)) @ mixing
    return pixels.clip(0, 255).round().astype(np.uint8).reshape(count, 3, 3, 2)


@pytest.fixture
def colourful(tiny):
    """Makes `tiny` a set whose training part is longer than a chunk of the whitening."""
    arrays, _ = tiny
    random = np.random.default_rng(0)
    for i, (count, spread) in enumerate([(10_300, 0.3), (50, 0.6)]):
        arrays[i] = (correlated(count, spread, random), random.integers(0, 10, count))
    arrays[1][0][0] = 9
    return arrays


def test_whitening_leaves_no_correlation_in_the_training_set(colourful, proc):
    data = loader.load("tiny", proc=proc, whiten=True)
    flat = data.train_images.reshape(len(data.train_images), -1).double()
    assert flat.mean(0).abs().max() < 1e-4
    # contrast normalisation takes each image's mean away, so nothing is left along the direction of ones
    wanted = torch.eye(18, dtype=torch.float64) - 1 / 18
    torch.testing.assert_close(flat.T @ flat / len(flat), wanted, atol=2e-3, rtol=0)


def test_whitening_is_gcn_and_zca_fitted_on_the_training_set(colourful, proc):
    random = np.random.default_rng(1)
    for images, _ in colourful:
        flat = images.reshape(len(images), -1)
        # two pixels nearly alike: an eigenvalue near the regulariser, else neither that nor ddof would show
        flat[:, 17] = np.minimum(flat[:, 16], 254) + (random.random(len(flat)) < 0.1)
    data = loader.load("tiny", proc=proc, whiten=True)
    (train, _), (test, _) = colourful

    def gcn(images):
        flat = images.reshape(len(images), -1).astype(np.float64)
        flat -= flat.mean(1, keepdims=True)
        return flat / np.maximum(flat.std(1, ddof=1, keepdims=True), 1e-8)

    mean = gcn(train).mean(0)
    values, vectors = np.linalg.eigh(np.cov(gcn(train).T, ddof=0))
    zca = vectors @ np.diag((values.clip(0) + 1e-5) ** -0.5) @ vectors.T
    for images, source in ((data.train_images, train), (data.test_images, test)):
        assert images.dtype == torch.float32 and images.shape == source.shape
        np.testing.assert_allclose(images.numpy().reshape(len(source), -1), (gcn(source) - mean) @ zca, atol=6e-3)
    inputs = data.inputs(data.test_images)
    assert torch.equal(inputs.permute(0, 2, 3, 1), data.test_images)


def test_whitened_and_plain_data_are_kept_apart(tiny, proc):
    arrays, readings = tiny
    for _ in range(2):
        whitened = loader.load("tiny", proc=proc, whiten=True)
    assert [path.name for path in proc.iterdir()] == ["tiny-whitened"]
    for _ in range(2):
        assert_holds(loader.load("tiny", proc=proc), arrays)
    assert {path.name for path in proc.iterdir()} == {"tiny", "tiny-whitened"}
    assert torch.equal(loader.load("tiny", proc=proc, whiten=True).train_images, whitened.train_images)
    assert len(readings) == 2


# Batches


def numbered(total, size=6, channels=2):
    """A data set whose labels are the numbers of its images, and whose inputs are the pixels as they are."""
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
def test_a_pass_shows_every_image_once(batch_size, per_epoch):
    batches = loader.Batches(numbered(10), batch_size=batch_size, seed=1)
    assert batches.per_epoch == per_epoch
    passes = targets(batches, 10).view(batch_size, 10)
    assert (passes.sort(1).values == torch.arange(10)).all()
    assert len(passes.unique(dim=0)) == batch_size


def test_inputs_follow_their_targets():
    data = numbered(10)
    inputs, labels = next(loader.Batches(data, batch_size=7, seed=1))
    assert inputs.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(inputs, data.train_images[labels].permute(0, 3, 1, 2).float())


@pytest.mark.parametrize("augment", [False, True])
def test_batch_j_is_the_same_whatever_was_drawn_before(augment):
    settings = dict(batch_size=7, seed=1, augment=augment)
    data = numbered(10)
    through = loader.Batches(data, **settings)
    drawn = [next(through) for _ in range(9)]
    jumping = loader.Batches(data, **settings)
    for j in (8, 2, 2, 0, 5, 4):
        jumping.drawn = j
        assert_same_batch(next(jumping), drawn[j])
        assert jumping.drawn == j + 1


def test_seed_and_replica_decide_the_order_and_nothing_else_does():
    data = numbered(64)

    def order(seed, replica):
        return targets(loader.Batches(data, batch_size=16, seed=seed, replica=replica, replicas=2), 4)

    first = order(1, 0)
    torch.manual_seed(99)
    assert torch.equal(order(1, 0), first)
    assert not torch.equal(order(2, 0), first)
    assert not torch.equal(order(1, 1), first)


@pytest.mark.parametrize(("seed", "replica"), [(2, 0), (1, 1)])
def test_seed_and_replica_decide_the_augmentation(seed, replica):
    data = numbered(1)
    choices = [
        torch.cat([next(batches)[0] for _ in range(20)])
        for batches in (
            loader.Batches(data, batch_size=1, seed=s, replica=a, replicas=2, augment=True)
            for s, a in [(1, 0), (1, 0), (seed, replica)]
        )
    ]
    assert torch.equal(choices[0], choices[1])
    assert not torch.equal(choices[0], choices[2])


def dropout_seed(drawn, seed=1, replica=0, part=(0, 1), device=0):
    batches = loader.Batches(numbered(10), batch_size=4, seed=seed, replica=replica, replicas=2, part=part)
    for _ in range(drawn):
        next(batches)
    return batches.dropout_seed(device)


def test_every_mini_batch_of_every_part_of_a_replica_has_a_dropout_seed_of_its_own():
    seeds = {
        dropout_seed(drawn, seed, replica, (part, 3))
        for drawn in (1, 2, 3, 5)
        for seed in (1, 2)
        for replica in (0, 1)
        for part in (0, 1, 2)
    }
    assert len(seeds) == 4 * 2 * 2 * 3
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_a_dropout_seed_is_the_same_whatever_was_drawn_before():
    batches = loader.Batches(numbered(10), batch_size=4, seed=1, replicas=2)
    for drawn in (4, 1, 3):
        batches.drawn = drawn - 1
        next(batches)
        assert batches.dropout_seed() == batches.dropout_seed(0) == dropout_seed(drawn)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_the_devices_of_a_replica_are_seeded_as_so_many_ranks_of_it(part):
    assert dropout_seed(3, device=part) == dropout_seed(3, part=(part, 3))


def test_a_seed_of_dropout_is_none_of_order_or_augmentation():
    uses = list(loader.Stream)
    assert len({loader.random_seed(1, use, 0, 2) for use in uses}) == len(uses) == 4


def test_drawing_leaves_torchs_own_random_numbers_alone():
    data, before = numbered(10), torch.get_rng_state()
    batches = loader.Batches(data, batch_size=4, seed=1, frac=0.5, augment=True)
    for _ in range(4):
        next(batches)
        batches.dropout_seed()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_the_parts_of_a_batch_make_up_the_whole(parts, augment):
    data = numbered(11)
    settings = dict(batch_size=8, seed=1, augment=augment)
    whole = loader.Batches(data, **settings)
    pieces = [loader.Batches(data, **settings, part=(i, parts)) for i in range(parts)]
    for _ in range(4):
        drawn = [next(piece) for piece in pieces]
        assert_same_batch([torch.cat(column) for column in zip(*drawn, strict=True)], next(whole))
        sizes = [len(labels) for _, labels in drawn]
        assert max(sizes) - min(sizes) <= 1
    assert pieces[0].per_epoch == whole.per_epoch


@pytest.mark.parametrize(("replicas", "frac", "share"), [(4, 0.5, 5), (3, 0.34, 3), (3, 1.0, 10), (6, 0.25, 2)])
def test_a_share_is_a_wrapping_block_of_one_common_shuffle(replicas, frac, share):
    data = numbered(10)
    shuffle = loader.Batches(data, batch_size=1, seed=5).share
    assert sorted(shuffle.tolist()) == list(range(10)) != shuffle.tolist()
    for replica in range(replicas):
        batches = loader.Batches(data, batch_size=1, seed=5, replica=replica, replicas=replicas, frac=frac)
        block = shuffle.roll(-(replica * 10 // replicas))[:share]
        assert batches.per_epoch == share
        for _ in range(2):
            assert sorted(targets(batches, share).tolist()) == sorted(block.tolist())


def test_two_halves_are_disjoint_and_cover_everything():
    shown = [
        targets(loader.Batches(numbered(20), batch_size=5, seed=5, replica=a, replicas=2, frac=0.5), 2)
        for a in range(2)
    ]
    assert sorted(torch.cat(shown).tolist()) == list(range(20))


def test_a_batch_larger_than_the_share_is_an_error():
    loader.Batches(numbered(10), batch_size=5, seed=1, frac=0.5)
    with pytest.raises(loader.DataError, match=r"batch of 6 .* 5 images .*-b 5"):
        loader.Batches(numbered(10), batch_size=6, seed=1, frac=0.5)


def test_images_too_small_to_reflect_are_an_error():
    loader.Batches(numbered(10, size=5), batch_size=2, seed=1, augment=True)
    with pytest.raises(loader.DataError, match="--no-augment"):
        loader.Batches(numbered(10, size=4), batch_size=2, seed=1, augment=True)


def crops_chosen(size, draws):
    """For each augmented image drawn, which (flip, down, right) of its source's 2 x 9 x 9 crops it equals."""
    data = numbered(30, size)
    pixels = data.train_images.permute(0, 3, 1, 2).float()
    padded = torch.stack([F.pad(images, (4, 4, 4, 4), mode="reflect") for images in (pixels, pixels.flip(3))], 1)
    crops = padded.unfold(3, size, 1).unfold(4, size, 1).movedim(2, 4)  # image, flip, down, right, C, H, W
    batches = loader.Batches(data, batch_size=30, seed=1, augment=True)
    drawn = [pair for _ in range(draws) for pair in zip(*next(batches), strict=True)]
    return [(crops[label] == image).flatten(3).all(3).nonzero().tolist() for image, label in drawn]


@pytest.mark.parametrize("size", [5, 8, 10])
def test_augmentation_flips_pads_by_reflection_and_crops(size):
    chosen = crops_chosen(size, draws=4)
    assert len(chosen) == 120 and all(chosen)


def test_augmentation_draws_all_flips_and_crops_alike():
    chosen = crops_chosen(10, draws=20)  # from 10 pixels on, no two crops are the same
    flips, downs, rights = (torch.tensor(chosen).squeeze(1)[:, axis].bincount() for axis in range(3))
    assert (len(flips), len(downs), len(rights)) == (2, 9, 9)
    assert flips.min() > 240 and downs.min() > 35 and rights.min() > 35  # of 600
    assert len({tuple(choice) for (choice,) in chosen}) > 140  # of 162; 158 are to be expected


@pytest.mark.parametrize("channels", [1, 3])
def test_inputs_are_normalised_float32_and_channels_last(channels):
    images = torch.randint(0, 256, (5, 6, 6, channels), dtype=torch.uint8)
    mean, std = torch.rand(channels) * 100, torch.rand(channels) * 50 + 20
    data = numbered(5, channels=channels)._replace(mean=mean, std=std)
    inputs = data.inputs(images)
    assert inputs.dtype == torch.float32 and inputs.shape == (5, channels, 6, 6)
    assert inputs.stride() == (36 * channels, 1, 6 * channels, channels)
    wanted = (images.double() - mean.double()) / std.double()
    torch.testing.assert_close(inputs.permute(0, 2, 3, 1), wanted.float())


# Importing


def test_importing_the_programs_imports_no_torchvision_sklearn_or_mpi(python):
    script = (
        "import sys, loader, models, engine, options, report, experiment, parle_mpi, parle_gpu\n"
        "print({name.partition('.')[0] for name in sys.modules} & {'torchvision', 'sklearn', 'scipy', 'mpi4py'})"
    )
    done = python("-c", script)
    assert (done.stdout, done.stderr) == ("set()\n", "")
