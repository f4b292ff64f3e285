"""Data sets: downloaded and parsed by torchvision, kept pre-processed in `proc/`, batched on the replica's device.

data = loader.load("mnist")                                  # builds proc/mnist the first time, then maps it
batches = loader.Batches(data, batch_size=128, seed=42)      # endless: next(batches) is (inputs, targets)
"""

import contextlib
import enum
import functools
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FORMAT = 1  # of what is in proc/; raise it when that changes, and older caches are built anew
DOWNLOAD_TIMEOUT = 20  # seconds without a byte
ZCA_REGULARISER = 1e-5  # added to the eigenvalues, as in the authors' code

Arrays = tuple[np.ndarray, np.ndarray]  # images (N, H, W, C) uint8, labels (N,) int64


class DataError(Exception):
    """The data is missing or damaged, or cannot be kept. The message names the file and says what to do."""


class Unreachable(DataError):
    """The data is not here and could not be downloaded."""


class Dataset(NamedTuple):
    """Images are (N, H, W, C), uint8 or (whitened) float32, labels (N,) int64, mean and std (C,)."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    classes: int
    origin: str | None = None  # the folder of raw data; None where they were downloaded

    @property
    def channels(self) -> int:
        return self.train_images.shape[3]

    @property
    def size(self) -> int:
        """Height and width."""
        return self.train_images.shape[1]

    def to(self, device: torch.device) -> "Dataset":
        return self._make(value.to(device) if isinstance(value, Tensor) else value for value in self)

    def inputs(self, images: Tensor) -> Tensor:
        """A network's input from (B, H, W, C) images: (B, C, H, W), normalised float32, channels_last in memory."""
        return (images - self.mean).div_(self.std).permute(0, 3, 1, 2)


# Raw data: each reader takes the raw folder and whether to download what is missing; it gives train and test arrays


def read_idx(kind: str, raw: Path, download: bool) -> tuple[Arrays, Arrays]:
    """torchvision's MNIST (`kind`) and its look-alikes: kind/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte."""
    datasets = _torchvision_datasets()
    folder = raw / kind / "raw"
    names = [f"{part}-{content}-ubyte" for part in ("train", "t10k") for content in ("images-idx3", "labels-idx1")]
    _fetch(kind, [folder / name for name in names], download, lambda: getattr(datasets, kind)(raw, download=True))
    read = datasets.mnist.read_image_file, datasets.mnist.read_label_file
    arrays = [_parse(folder / name, read[i % 2]).numpy() for i, name in enumerate(names)]
    return (arrays[0][..., None], arrays[1]), (arrays[2][..., None], arrays[3])


def read_cifar(kind: str, raw: Path, download: bool) -> tuple[Arrays, Arrays]:
    """torchvision's CIFAR10 or CIFAR100, whose files are pickles: none is opened before its MD5 sum is checked."""
    datasets = _torchvision_datasets()
    cifar, utils = getattr(datasets, kind), datasets.utils
    listed = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
    sums = {raw / cifar.base_folder / name: md5 for name, md5 in listed}
    archive = dict(filename=cifar.filename, md5=cifar.tgz_md5)
    _fetch(kind, list(sums), download, lambda: utils.download_and_extract_archive(cifar.url, raw, **archive))
    _check_sums(sums)
    parts = [cifar(raw, train=train) for train in (True, False)]
    train, test = ((part.data, np.array(part.targets)) for part in parts)
    return train, test


def read_svhn(kind: str, raw: Path, download: bool) -> tuple[Arrays, Arrays]:
    """torchvision's SVHN; its training set is `train` and `extra` together, 604,388 images, as in the paper."""
    svhn = getattr(_torchvision_datasets(), kind)
    splits = ("train", "extra", "test")
    sums = {raw / svhn.split_list[split][1]: svhn.split_list[split][2] for split in splits}
    _fetch(kind, list(sums), download, lambda: [svhn(raw, split=split, download=True) for split in splits])
    _check_sums(sums)
    parts = [svhn(raw, split=split) for split in splits]
    images = [part.data.transpose(0, 2, 3, 1) for part in parts]
    labels = [part.labels for part in parts]
    return (np.concatenate(images[:2]), np.concatenate(labels[:2])), (images[2], labels[2])


def read_digits(kind: str, raw: Path, download: bool) -> tuple[Arrays, Arrays]:
    """scikit-learn's own 1,797 images of 8 x 8. The last 360, by other writers, are the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # from 0..16
    return (images[:-360], digits.target[:-360]), (images[-360:], digits.target[-360:])


class Source(NamedTuple):
    read: Callable[[str, Path, bool], tuple[Arrays, Arrays]]
    kind: str  # torchvision's name
    raw: str | None  # where that keeps it, below its root
    images: int  # for training
    channels: int
    size: int  # pixels a side
    classes: int
    augment: bool  # unless told otherwise


SOURCES = {
    "mnist": Source(read_idx, "MNIST", "MNIST/raw", 60_000, 1, 28, 10, False),
    "fashion": Source(read_idx, "FashionMNIST", "FashionMNIST/raw", 60_000, 1, 28, 10, False),
    "cifar10": Source(read_cifar, "CIFAR10", "cifar-10-batches-py", 50_000, 3, 32, 10, True),
    "cifar100": Source(read_cifar, "CIFAR100", "cifar-100-python", 50_000, 3, 32, 100, True),
    "svhn": Source(read_svhn, "SVHN", "train_32x32.mat", 604_388, 3, 32, 10, False),
    "digits": Source(read_digits, "digits", None, 1_437, 1, 8, 10, False),
}


def _torchvision_datasets() -> Any:
    """torchvision is imported only here, when raw data is first read: it is slow, and may not fit torch."""
    try:
        import torchvision.datasets
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"torchvision does not work with torch {torch.__version__} ({error}): "
            "install a matching pair, pip install --force-reinstall torch torchvision"
        ) from error
    return torchvision.datasets


def _fetch(kind: str, paths: list[Path], download: bool, fetch: Callable[[], Any]) -> None:
    """Download where a file is missing and that is allowed. Raises: DataError, Unreachable."""
    missing = [path for path in paths if not os.path.isfile(path)]
    if not missing:
        return
    if not download:
        raise DataError(f"{missing[0]} is missing: --data takes the folder that torchvision calls `root` of {kind}")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        fetch()
    except Exception as error:
        if not all(path.is_file() for path in paths):  # else one is damaged, and named when it is read
            reason = " ".join(str(error).split())
            raise Unreachable(
                f"{kind} could not be downloaded ({reason}): give --data DIR, a folder that holds it, or -d digits"
            ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _parse(path: Path, read: Callable[[Path], Tensor]) -> Tensor:
    try:
        return read(path)
    except Exception as error:
        raise DataError(f"{path} is damaged ({error}): replace it, or delete it to have it downloaded") from error


def _check_sums(sums: dict[Path, str]) -> None:
    from torchvision.datasets.utils import check_integrity

    for path, md5 in sums.items():
        try:
            sound = check_integrity(path, md5)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error}): replace it, or delete it to download it") from error
        if not sound:
            raise DataError(f"{path} is damaged (its MD5 sum is not {md5}): replace it, or delete it to download it")


# proc/: a folder a data set with four arrays and meta.json, written under another name and renamed when complete


def load(name: str, raw: Path | None = None, proc: Path = Path("proc"), whiten: bool = False) -> Dataset:
    """A data set from `proc`, put there first if need be. Its arrays are memory maps, shared by the ranks of a node.

    Args:
        name: a key of SOURCES.
        raw: the raw data in torchvision's layout; by default it is downloaded into proc/raw.
        proc: the folder of pre-processed data.
        whiten: global contrast normalisation of each image and ZCA fitted on the training set, instead of mean and std.

    Raises:
        DataError: the data is missing or damaged, or `proc` cannot be written.
        Unreachable: the same, because it could not be downloaded.
    """
    if raw is not None and not os.path.isdir(raw):
        raise DataError(f"--data {raw}: there is no such folder")
    origin = None if raw is None or name == "digits" else str(raw.resolve())
    folder = cache(name, proc, whiten)
    for _ in range(3):
        if not is_current(folder, origin):
            source = SOURCES[name]
            train, test = source.read(source.kind, proc / "raw" if raw is None else raw, raw is None)
            _check_arrays(name, train, test, source.classes)
            try:
                _build(folder, train, test, whiten, dict(format=FORMAT, origin=origin, classes=source.classes))
            except OSError as error:
                raise DataError(f"{folder} cannot be written ({error}): name another folder with --proc") from error
        try:
            return _open(name, folder)
        except FileNotFoundError as error:  # unless another run is replacing it at this moment, in which case again
            missing = error
    raise DataError(f"{folder} is damaged ({missing}): delete it and it is built anew")


def cache(name: str, proc: Path, whiten: bool) -> Path:
    """Where a data set is kept pre-processed."""
    return proc / (f"{name}-whitened" if whiten else name)


def is_current(folder: Path, origin: str | None) -> bool:
    """Whether `folder` holds this format and, where raw data was named, comes from there."""
    try:
        meta = _read_meta(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return meta.get("format") == FORMAT and origin in (None, meta.get("origin"))


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if not isinstance(meta, dict):
            raise ValueError("meta.json holds no object")
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{folder} is damaged ({error}): delete it and it is built anew, or name another folder with --proc"
        ) from error
    return meta


def _check_arrays(name: str, train: Arrays, test: Arrays, classes: int) -> None:
    for part, (images, labels) in (("training", train), ("test", test)):
        if len(images) != len(labels) or not len(images):
            raise DataError(f"The {part} set of {name} has {len(images)} images and {len(labels)} labels")
        if labels.min() < 0 or labels.max() >= classes:
            raise DataError(f"The {part} set of {name} has a label outside 0 to {classes - 1}")
    if train[0].ndim != 4 or train[0].shape[1] != train[0].shape[2] or not train[0].shape[1]:
        raise DataError(f"The images of {name} are {train[0].shape[1:]}: only square ones can be used")
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(f"The images of {name} are {train[0].shape[1:]} for training and {test[0].shape[1:]} for test")


def _build(folder: Path, train: Arrays, test: Arrays, whiten: bool, meta: dict[str, Any]) -> None:
    images = {"train": train[0], "test": test[0]}
    channels = train[0].shape[3]
    mean, std = np.zeros(channels), np.ones(channels)
    if whiten:
        images = _whiten(images)
    else:
        mean, std = _moments(train[0])
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for part, labels in (("train", train[1]), ("test", test[1])):
            _save(temporary / f"{part}_images.npy", images[part])
            _save(temporary / f"{part}_labels.npy", labels.astype(np.int64))
        meta |= dict(mean=mean.tolist(), std=std.tolist())
        with open(temporary / "meta.json", "w") as file:
            json.dump(meta, file)
            _flush(file)
        temporary.chmod(0o755)  # mkdtemp's folders are its user's alone
        _put(temporary, folder, meta["origin"])
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, folder: Path, origin: str | None) -> None:
    """Rename `temporary` to `folder`, unless another run has put the same there meanwhile. An older one makes way.

    Raises:
        DataError: there is a folder that no run of this program has made.
    """
    for _ in range(10):
        try:
            os.rename(temporary, folder)
            return
        except OSError as error:
            blocked = error
        with contextlib.suppress(FileNotFoundError):  # another run has just moved it away
            if "meta.json" not in os.listdir(folder):
                raise DataError(f"{folder} is not this program's: name another folder with --proc")
            if is_current(folder, origin):
                return
            with tempfile.TemporaryDirectory(dir=folder.parent) as trash:
                os.rename(folder, Path(trash) / "old")
    raise blocked


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)  # np.save's own writing loses the error of the last few bytes
        _flush(file)


def _flush(file: Any) -> None:
    """To the disk, lest a crash leave a renamed folder with empty files."""
    file.flush()
    os.fsync(file.fileno())


def _open(name: str, folder: Path) -> Dataset:
    meta = _read_meta(folder)
    try:
        arrays = {
            f"{part}_{content}": np.lib.format.open_memmap(folder / f"{part}_{content}.npy", mode="c")
            for part in ("train", "test")
            for content in ("images", "labels")
        }
        _check_cache(name, arrays, meta)
        return Dataset(
            name=name,
            **{part: torch.from_numpy(array) for part, array in arrays.items()},
            mean=torch.tensor(meta["mean"], dtype=torch.float32),
            std=torch.tensor(meta["std"], dtype=torch.float32),
            classes=meta["classes"],
            origin=meta["origin"],
        )
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever numpy and torch make of what is no array and no number
        raise DataError(
            f"{folder} is damaged ({' '.join(str(error).split())}): delete it and it is built anew"
        ) from error


def _check_cache(name: str, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Raises: ValueError, DataError."""
    for part, array in arrays.items():
        kinds, dimensions = (("uint8", "float32"), 4) if part.endswith("images") else (("int64",), 1)
        if array.dtype.name not in kinds or array.ndim != dimensions:
            raise ValueError(f"{part}.npy holds {array.dtype} of {array.ndim} dimensions")
    if meta["classes"] != SOURCES[name].classes or not isinstance(meta["classes"], int):
        raise ValueError(f"meta.json has {meta['classes']} classes")
    if not isinstance(meta["origin"], str | None):
        raise ValueError(f"meta.json has origin {meta['origin']}")
    train, test = ((arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "test"))
    _check_arrays(name, train, test, meta["classes"])
    mean, std = np.array(meta["mean"], dtype=np.float64), np.array(meta["std"], dtype=np.float64)
    fits = mean.shape == std.shape == train[0].shape[3:]
    if not (fits and np.isfinite([mean, std]).all() and (std > 0).all()):
        raise ValueError("meta.json has a mean or std that is none")


def _chunks(images: np.ndarray, *shape: int) -> Iterator[Tensor]:
    """The images as float32, reshaped, 10,000 at a time: SVHN's 604,388 would fill 7 GB."""
    for start in range(0, len(images), 10_000):
        yield torch.from_numpy(images[start : start + 10_000]).reshape(shape).float()


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, (C,)."""
    channels, count = images.shape[3], images.size // images.shape[3]
    mean = sum(chunk.sum(0, dtype=torch.float64) for chunk in _chunks(images, -1, channels)) / count
    squares = sum((chunk - mean).square().sum(0) for chunk in _chunks(images, -1, channels))
    return mean.numpy(), (squares / count).sqrt().clamp_min(1e-6).numpy()


def _whiten(images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """GCN and ZCA of images["train"] and, with the same matrix, of every other part. CIFAR takes about a minute."""
    train = images["train"]
    dimensions = math.prod(train.shape[1:])

    def contrast_normalised(part: np.ndarray) -> Iterator[Tensor]:
        for flat in _chunks(part, -1, dimensions):
            flat -= flat.mean(1, keepdim=True)
            yield flat / flat.std(1, keepdim=True).clamp_min(1e-8)

    mean = sum(chunk.sum(0, dtype=torch.float64) for chunk in contrast_normalised(train)) / len(train)
    covariance = torch.zeros(dimensions, dimensions, dtype=torch.float64)
    for chunk in contrast_normalised(train):
        centred = chunk - mean.float()
        covariance += centred.T @ centred
    values, vectors = torch.linalg.eigh(covariance / len(train))
    zca = ((vectors / (values.clamp_min(0) + ZCA_REGULARISER).sqrt()) @ vectors.T).float()
    return {
        name: torch.cat([(chunk - mean.float()) @ zca for chunk in contrast_normalised(part)])
        .reshape(part.shape)
        .numpy()
        for name, part in images.items()
    }


# Batches


class Stream(enum.IntEnum):
    """What random numbers are for: each use, replica and count has a stream of its own."""

    SHUFFLE, ORDER, AUGMENTATION, DROPOUT = range(4)


@functools.lru_cache(256)  # of one seed a stream, dropout asks again at every mini-batch
def random_seed(seed: int, use: Stream, replica: int = 0, *counts: int) -> int:
    """The 64-bit seed of a stream."""
    return int(np.random.SeedSequence((seed, use, replica, *counts)).generate_state(1, np.uint64)[0])


class Batches:
    """Endless mini-batches of one replica: pass after pass over its share of the training set, in new order each.

    All are full: one that crosses the end of a pass goes on with the next. The number of batches drawn is the whole
    state: batch j is the same whatever was drawn before.

    Args:
        data: on the device where batches are wanted.
        batch_size: B.
        seed: with `replica`, decides order and augmentation.
        replica, replicas: which one this is.
        frac: share of the training set that each replica sees. Replica a takes the block at a N / n of one common
            shuffle, wrapping.
        augment: flip, and crop from 4 pixels of reflection.
        part: (i, m): only the i-th of m parts of each batch, for ranks that share a replica. Parts may differ by one.

    Raises:
        DataError: a batch would be larger than the replica's share.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        batch_size: int,
        seed: int,
        replica: int = 0,
        replicas: int = 1,
        frac: float = 1.0,
        augment: bool = False,
        part: tuple[int, int] = (0, 1),
    ):
        total = len(data.train_labels)
        share = round(frac * total)
        if batch_size > share:
            fits = f"-b {share} or less" if share >= 2 else f"--frac {math.ceil(2e6 / total) / 1e6:g} or more"
            raise DataError(f"A batch of {batch_size} is more than the {share} images of a replica: {fits}")
        if augment and data.size <= 4:
            raise DataError(f"Images of {data.size} pixels cannot be cropped from 4 of reflection: --no-augment")
        shuffle = torch.randperm(total, generator=_generator(seed, Stream.SHUFFLE))
        self.share = shuffle[(torch.arange(share) + replica * total // replicas) % total]
        self.data, self.batch_size, self.augment = data, batch_size, augment
        self.seed, self.replica, self.part = seed, replica, part[0]
        self.rows = slice(part[0] * batch_size // part[1], (part[0] + 1) * batch_size // part[1])
        self.per_epoch = math.ceil(share / batch_size)  # nb
        self.drawn = 0
        self._orders: dict[int, Tensor] = {}

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Inputs (B, C, H, W) float32 and targets (B,) int64, or this part of them."""
        share, start = len(self.share), self.drawn * self.batch_size
        first, last = start // share, (start + self.batch_size - 1) // share
        self._orders = {number: self._orders.get(number, None) for number in range(first, last + 1)}
        for number, order in self._orders.items():
            if order is None:
                generator = _generator(self.seed, Stream.ORDER, self.replica, number)
                self._orders[number] = self.share[torch.randperm(share, generator=generator)]
        passes = torch.cat(list(self._orders.values())) if last > first else self._orders[first]
        indices = passes[start - first * share :][: self.batch_size][self.rows]
        indices = self._send(indices)
        # index_select copies whole images, 30 times faster on a CPU than indexing, which copies pixels
        images = self._crop(indices) if self.augment else self.data.train_images.index_select(0, indices)
        self.drawn += 1
        return self.data.inputs(images), self.data.train_labels.index_select(0, indices)

    def dropout_seed(self, part: int = 0) -> int:
        """Of the batch that was drawn last; `part` counts the devices here that share it."""
        # one number on from batch to batch: a SeedSequence for each would take 0.1 ms of LeNet's 12
        return (random_seed(self.seed, Stream.DROPOUT, self.replica, self.part + part) + self.drawn) % 2**64

    def _send(self, indices: Tensor) -> Tensor:
        """To the device. CUDA takes what it copies at once, so the host need not wait; other accelerators may not."""
        device = self.data.train_labels.device
        return indices.to(device, non_blocking=device.type == "cuda")

    def _crop(self, indices: Tensor) -> Tensor:
        """Flip, reflect and crop in one gather: nothing is padded, the indices are reflected."""
        size = self.data.size
        generator = _generator(self.seed, Stream.AUGMENTATION, self.replica, self.drawn)
        shifts = torch.randint(-4, 5, (2, self.batch_size, 1), generator=generator)
        flips = torch.rand(self.batch_size, 1, generator=generator) < 0.5
        pixels = torch.arange(size)
        rows, columns = pixels + shifts  # (B, H) each
        columns = torch.where(flips, columns.flip(1), columns)
        rows, columns = (self._send(_reflect(axis[self.rows], size)) for axis in (rows, columns))
        return self.data.train_images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]


def _reflect(positions: Tensor, size: int) -> Tensor:
    positions = positions.abs()
    return torch.where(positions >= size, 2 * (size - 1) - positions, positions)


def _generator(seed: int, use: Stream, replica: int = 0, count: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(random_seed(seed, use, replica, count))
