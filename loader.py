"""Data sets: downloaded and parsed by torchvision, pre-processed once into proc/, batched on the replica's device.

data = loader.load("mnist")                                  # writes proc/mnist the first time, then maps it
batches = loader.BatchLoader(data, batch_size=128, seed=42)  # infinite: next(batches) is (inputs, targets)
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

FORMAT = 2  # of the files in proc/; increment it when they change, and older caches are rebuilt
DOWNLOAD_TIMEOUT = 20  # seconds without data
ZCA_REGULARIZER = 1e-5  # added to the eigenvalues, as in the authors' code

Arrays = tuple[np.ndarray, np.ndarray]  # images (N, H, W, C) uint8, labels (N,) int64


class DatasetError(Exception):
    """The data is missing or damaged, or proc/ cannot be written. The message names the file and says what to do."""


class DownloadError(DatasetError):
    """The data is missing and could not be downloaded."""


class Dataset(NamedTuple):
    """A data set. Images are (N, H, W, C), uint8 or (with ZCA) float32; labels (N,) int64; mean and std (C,)."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    classes: int
    source_dir: str | None = None  # the directory of raw data; None if it was downloaded

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
        """Return normalized float32 inputs (B, C, H, W), channels_last in memory, from images (B, H, W, C)."""
        return (images - self.mean).div_(self.std).permute(0, 3, 1, 2)


# Raw data: each reader takes the raw directory and whether to download missing files; it returns both sets


def read_idx(kind: str, raw: Path, download: bool) -> tuple[Arrays, Arrays]:
    """Read torchvision's MNIST or FashionMNIST: kind/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte."""
    datasets = _torchvision_datasets()
    folder = raw / kind / "raw"
    names = [f"{split}-{content}-ubyte" for split in ("train", "t10k") for content in ("images-idx3", "labels-idx1")]
    _fetch(kind, [folder / name for name in names], download, lambda: getattr(datasets, kind)(raw, download=True))
    read = datasets.mnist.read_image_file, datasets.mnist.read_label_file
    arrays = [_parse(folder / name, read[i % 2]).numpy() for i, name in enumerate(names)]
    return (arrays[0][..., None], arrays[1]), (arrays[2][..., None], arrays[3])


def read_cifar(kind: str, raw: Path, download: bool) -> tuple[Arrays, Arrays]:
    """Read torchvision's CIFAR10 or CIFAR100. Its files are pickles: none is opened before its MD5 sum is checked."""
    datasets = _torchvision_datasets()
    cifar, utils = getattr(datasets, kind), datasets.utils
    listed = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
    sums = {raw / cifar.base_folder / name: md5 for name, md5 in listed}
    archive = dict(filename=cifar.filename, md5=cifar.tgz_md5)
    _fetch(kind, list(sums), download, lambda: utils.download_and_extract_archive(cifar.url, raw, **archive))
    _check_sums(sums)
    sets = [cifar(raw, train=train) for train in (True, False)]
    train, test = ((each.data, np.array(each.targets)) for each in sets)
    return train, test


def read_svhn(kind: str, raw: Path, download: bool) -> tuple[Arrays, Arrays]:
    """Read torchvision's SVHN; as in the paper, its 604,388 training images are `train` and `extra` together."""
    svhn = getattr(_torchvision_datasets(), kind)
    splits = ("train", "extra", "test")
    sums = {raw / svhn.split_list[split][1]: svhn.split_list[split][2] for split in splits}
    _fetch(kind, list(sums), download, lambda: [svhn(raw, split=split, download=True) for split in splits])
    _check_sums(sums)
    sets = [svhn(raw, split=split) for split in splits]
    images = [each.data.transpose(0, 2, 3, 1) for each in sets]
    labels = [each.labels for each in sets]
    return (np.concatenate(images[:2]), np.concatenate(labels[:2])), (images[2], labels[2])


def read_digits(kind: str, raw: Path, download: bool) -> tuple[Arrays, Arrays]:
    """Read scikit-learn's 1,797 images of 8 x 8. The last 360, written by other people, are the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # from 0..16
    return (images[:-360], digits.target[:-360]), (images[-360:], digits.target[-360:])


class DatasetSpec(NamedTuple):
    """The reader of a data set, and its shape."""

    read: Callable[[str, Path, bool], tuple[Arrays, Arrays]]
    kind: str  # torchvision's name
    raw: str | None  # its path below torchvision's root
    num_train_images: int
    channels: int
    size: int  # height and width in pixels
    classes: int
    augment: bool  # default of --augment


DATASETS = {
    "mnist": DatasetSpec(read_idx, "MNIST", "MNIST/raw", 60_000, 1, 28, 10, False),
    "fashion": DatasetSpec(read_idx, "FashionMNIST", "FashionMNIST/raw", 60_000, 1, 28, 10, False),
    "cifar10": DatasetSpec(read_cifar, "CIFAR10", "cifar-10-batches-py", 50_000, 3, 32, 10, True),
    "cifar100": DatasetSpec(read_cifar, "CIFAR100", "cifar-100-python", 50_000, 3, 32, 100, True),
    "svhn": DatasetSpec(read_svhn, "SVHN", "train_32x32.mat", 604_388, 3, 32, 10, False),
    "digits": DatasetSpec(read_digits, "digits", None, 1_437, 1, 8, 10, False),
}


def _torchvision_datasets() -> Any:
    """Import torchvision only when raw data is read: it is slow, and may not match torch."""
    try:
        import torchvision.datasets
    except (ImportError, RuntimeError) as error:
        raise DatasetError(
            f"torchvision does not work with torch {torch.__version__} ({error}): "
            "install a matching pair, pip install --force-reinstall torch torchvision"
        ) from error
    return torchvision.datasets


def _fetch(kind: str, paths: list[Path], download: bool, fetch: Callable[[], Any]) -> None:
    """Download missing files, if allowed. Raises: DatasetError, DownloadError."""
    missing = [path for path in paths if not os.path.isfile(path)]
    if not missing:
        return
    if not download:
        raise DatasetError(
            f"{missing[0]} is missing: --data takes the directory that torchvision calls `root` of {kind}"
        )
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        fetch()
    except Exception as error:
        if not all(path.is_file() for path in paths):  # otherwise a file is damaged, which the reader reports
            reason = " ".join(str(error).split())
            raise DownloadError(
                f"{kind} could not be downloaded ({reason}): use --data DIR, a directory with its files, or -d digits"
            ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _parse(path: Path, read: Callable[[Path], Tensor]) -> Tensor:
    try:
        return read(path)
    except Exception as error:
        raise DatasetError(f"{path} is damaged ({error}): replace it, or delete it to download it again") from error


def _check_sums(sums: dict[Path, str]) -> None:
    from torchvision.datasets.utils import check_integrity

    for path, md5 in sums.items():
        try:
            is_intact = check_integrity(path, md5)
        except OSError as error:
            raise DatasetError(
                f"{path} cannot be read ({error}): replace it, or delete it to download it again"
            ) from error
        if not is_intact:
            raise DatasetError(
                f"{path} is damaged (its MD5 sum is not {md5}): replace it, or delete it to download it again"
            )


# proc/: a directory per data set with four arrays and meta.json, written under a temporary name and then renamed


def load(name: str, raw: Path | None = None, proc: Path = Path("proc"), zca: bool = False) -> Dataset:
    """Return a data set from `proc`, after building it if necessary. The ranks of a node share its memory maps.

    Args:
        name: a key of DATASETS.
        raw: directory of raw data in torchvision's layout; by default it is downloaded into proc/raw.
        proc: directory of pre-processed data.
        zca: normalize by the global contrast of each image and ZCA whitening fitted on the training set, instead of by
            mean and standard deviation.

    Raises:
        DatasetError: the data is missing or damaged, or `proc` cannot be written.
        DownloadError: the data is missing and could not be downloaded.
    """
    if raw is not None and not os.path.isdir(raw):
        raise DatasetError(f"--data {raw}: this directory does not exist")
    source_dir = None if raw is None or name == "digits" else str(raw.resolve())
    folder = cache(name, proc, zca)
    for _ in range(3):
        if not is_current(folder, source_dir):
            spec = DATASETS[name]
            train, test = spec.read(spec.kind, proc / "raw" if raw is None else raw, raw is None)
            _check_arrays(name, train, test, spec.classes)
            try:
                _build(folder, train, test, zca, dict(format=FORMAT, source_dir=source_dir, classes=spec.classes))
            except OSError as error:
                raise DatasetError(
                    f"{folder} cannot be written ({error.strerror or error}): choose another directory with --proc"
                ) from error
        try:
            return _open(name, folder)
        except FileNotFoundError as error:  # retry in case another run is replacing it at this moment
            missing = error
    raise DatasetError(f"{folder} is damaged ({missing}): delete it and it will be rebuilt")


def cache(name: str, proc: Path, zca: bool) -> Path:
    """Return the directory of a pre-processed data set."""
    return proc / (f"{name}-zca" if zca else name)


def is_current(folder: Path, source_dir: str | None) -> bool:
    """Return whether `folder` has this format and, if a directory of raw data was given, was built from it."""
    try:
        meta = _read_meta(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return meta.get("format") == FORMAT and source_dir in (None, meta.get("source_dir"))


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if not isinstance(meta, dict):
            raise ValueError("meta.json is not an object")
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"{folder} is damaged ({error}): delete it and it will be rebuilt, or choose another directory with --proc"
        ) from error
    return meta


def _check_arrays(name: str, train: Arrays, test: Arrays, classes: int) -> None:
    for split, (images, labels) in (("training", train), ("test", test)):
        if len(images) != len(labels) or not len(images):
            raise DatasetError(f"the {split} set of {name} has {len(images)} images and {len(labels)} labels")
        if labels.min() < 0 or labels.max() >= classes:
            raise DatasetError(f"the {split} set of {name} has a label outside 0 to {classes - 1}")
    if train[0].ndim != 4 or train[0].shape[1] != train[0].shape[2] or not train[0].shape[1]:
        raise DatasetError(f"the images of {name} are {train[0].shape[1:]}: only square images are supported")
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DatasetError(
            f"the images of {name} are {train[0].shape[1:]} for training and {test[0].shape[1:]} for test"
        )


def _build(folder: Path, train: Arrays, test: Arrays, zca: bool, meta: dict[str, Any]) -> None:
    images = {"train": train[0], "test": test[0]}
    channels = train[0].shape[3]
    mean, std = np.zeros(channels), np.ones(channels)
    if zca:
        images = _apply_zca(images)
    else:
        mean, std = _channel_mean_std(train[0])
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for split, labels in (("train", train[1]), ("test", test[1])):
            _save(temporary / f"{split}_images.npy", images[split])
            _save(temporary / f"{split}_labels.npy", labels.astype(np.int64))
        meta |= dict(mean=mean.tolist(), std=std.tolist())
        with open(temporary / "meta.json", "w") as file:
            json.dump(meta, file)
            _fsync(file)
        temporary.chmod(0o755)  # mkdtemp's directories are accessible to their user only
        _put(temporary, folder, meta["source_dir"])
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, folder: Path, source_dir: str | None) -> None:
    """Rename `temporary` to `folder`, replacing an older one, unless another run has just written the same.

    Raises:
        DatasetError: `folder` exists and was not written by this program.
    """
    for _ in range(10):
        try:
            os.rename(temporary, folder)
            return
        except OSError as error:
            blocked = error
        with contextlib.suppress(FileNotFoundError):  # another run has just moved it
            if "meta.json" not in os.listdir(folder):
                raise DatasetError(f"{folder} was not written by this program: choose another directory with --proc")
            if is_current(folder, source_dir):
                return
            with tempfile.TemporaryDirectory(dir=folder.parent) as trash:
                os.rename(folder, Path(trash) / "old")
    raise blocked


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)  # np.save does not report an error in the last few bytes
        _fsync(file)


def _fsync(file: Any) -> None:
    """Force a file to disk, so that a crash cannot leave a renamed directory with empty files."""
    file.flush()
    os.fsync(file.fileno())


def _open(name: str, folder: Path) -> Dataset:
    meta = _read_meta(folder)
    try:
        arrays = {
            f"{split}_{content}": np.lib.format.open_memmap(folder / f"{split}_{content}.npy", mode="c")
            for split in ("train", "test")
            for content in ("images", "labels")
        }
        _check_cache(name, arrays, meta)
        return Dataset(
            name=name,
            **{split: torch.from_numpy(array) for split, array in arrays.items()},
            mean=torch.tensor(meta["mean"], dtype=torch.float32),
            std=torch.tensor(meta["std"], dtype=torch.float32),
            classes=meta["classes"],
            source_dir=meta["source_dir"],
        )
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy and torch raise many kinds of errors for invalid arrays and numbers
        raise DatasetError(
            f"{folder} is damaged ({' '.join(str(error).split())}): delete it and it will be rebuilt"
        ) from error


def _check_cache(name: str, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Raises: ValueError, DatasetError."""
    for split, array in arrays.items():
        kinds, dimensions = (("uint8", "float32"), 4) if split.endswith("images") else (("int64",), 1)
        if array.dtype.name not in kinds or array.ndim != dimensions:
            raise ValueError(f"{split}.npy holds {array.dtype} of {array.ndim} dimensions")
    if meta["classes"] != DATASETS[name].classes or not isinstance(meta["classes"], int):
        raise ValueError(f"meta.json has {meta['classes']} classes")
    if not isinstance(meta["source_dir"], str | None):
        raise ValueError(f"meta.json has source_dir {meta['source_dir']}")
    train, test = ((arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("train", "test"))
    _check_arrays(name, train, test, meta["classes"])
    mean, std = np.array(meta["mean"], dtype=np.float64), np.array(meta["std"], dtype=np.float64)
    fits = mean.shape == std.shape == train[0].shape[3:]
    if not (fits and np.isfinite([mean, std]).all() and (std > 0).all()):
        raise ValueError("meta.json has an invalid mean or std")


def _chunks(images: np.ndarray, *shape: int) -> Iterator[Tensor]:
    """Yield images as float32, reshaped, 10,000 at a time: SVHN's 604,388 would take 7 GB."""
    for start in range(0, len(images), 10_000):
        yield torch.from_numpy(images[start : start + 10_000]).reshape(shape).float()


def _channel_mean_std(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel, (C,)."""
    channels, count = images.shape[3], images.size // images.shape[3]
    mean = sum(chunk.sum(0, dtype=torch.float64) for chunk in _chunks(images, -1, channels)) / count
    squares = sum((chunk - mean).square().sum(0) for chunk in _chunks(images, -1, channels))
    return mean.numpy(), (squares / count).sqrt().clamp_min(1e-6).numpy()


def _apply_zca(images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Normalize contrast and whiten every split by the ZCA matrix of images["train"]. CIFAR takes about a minute."""
    train = images["train"]
    dimensions = math.prod(train.shape[1:])

    def contrast_normalized(split: np.ndarray) -> Iterator[Tensor]:
        for flat in _chunks(split, -1, dimensions):
            flat -= flat.mean(1, keepdim=True)
            yield flat / flat.std(1, keepdim=True).clamp_min(1e-8)

    mean = sum(chunk.sum(0, dtype=torch.float64) for chunk in contrast_normalized(train)) / len(train)
    covariance = torch.zeros(dimensions, dimensions, dtype=torch.float64)
    for chunk in contrast_normalized(train):
        centered = chunk - mean.float()
        covariance += centered.T @ centered
    values, vectors = torch.linalg.eigh(covariance / len(train))
    zca = ((vectors / (values.clamp_min(0) + ZCA_REGULARIZER).sqrt()) @ vectors.T).float()
    return {
        name: torch.cat([(chunk - mean.float()) @ zca for chunk in contrast_normalized(split)])
        .reshape(split.shape)
        .numpy()
        for name, split in images.items()
    }


# Batches


class Stream(enum.IntEnum):
    """Uses of random numbers: each use, replica and count has its own stream."""

    SHUFFLE, ORDER, AUGMENTATION, DROPOUT = range(4)


@functools.lru_cache(256)  # dropout requests the same seed at every mini-batch
def random_seed(seed: int, use: Stream, replica: int = 0, *counts: int) -> int:
    """Return the 64-bit seed of a stream."""
    return int(np.random.SeedSequence((seed, use, replica, *counts)).generate_state(1, np.uint64)[0])


class BatchLoader:
    """Infinite mini-batches of one replica: passes over its part of the training set, each in a new order.

    Every mini-batch is full: one that reaches the end of a pass continues with the next. `batches_drawn` is the whole
    state: mini-batch j does not depend on what was drawn before.

    Args:
        data: on the device where mini-batches are needed.
        batch_size: B, per replica.
        seed: determines, with `replica`, order and augmentation.
        replica, replicas: number of this replica, and of replicas.
        frac: fraction of the training set that each replica uses. Replica a takes the block at a N / n of one common
            shuffle, wrapping around.
        augment: flip, pad by reflecting 4 pixels, and crop at random.
        shard: (i, m) selects the i-th of m parts of each mini-batch, for ranks that share a replica. Sizes may differ
            by one.

    Raises:
        DatasetError: a mini-batch would be larger than the replica's part of the training set.
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
        shard: tuple[int, int] = (0, 1),
    ):
        total = len(data.train_labels)
        num_images = round(frac * total)
        if batch_size > num_images:
            fits = f"-b {num_images} or less" if num_images >= 2 else f"--frac {math.ceil(2e6 / total) / 1e6:g} or more"
            raise DatasetError(
                f"a mini-batch of {batch_size} is larger than the {num_images} images of a replica: use {fits}"
            )
        if augment and data.size <= 4:
            raise DatasetError(f"images of {data.size} pixels are too small for random crops: use --no-augment")
        shuffle = torch.randperm(total, generator=_generator(seed, Stream.SHUFFLE))
        self.indices = shuffle[(torch.arange(num_images) + replica * total // replicas) % total]
        self.data, self.batch_size, self.augment = data, batch_size, augment
        self.seed, self.replica, self.shard_index = seed, replica, shard[0]
        self.rows = slice(shard[0] * batch_size // shard[1], (shard[0] + 1) * batch_size // shard[1])
        self.per_epoch = math.ceil(num_images / batch_size)  # nb
        self.batches_drawn = 0
        self._orders: dict[int, Tensor] = {}

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Return inputs (B, C, H, W) float32 and targets (B,) int64, or this shard of them."""
        num_images, start = len(self.indices), self.batches_drawn * self.batch_size
        first, last = start // num_images, (start + self.batch_size - 1) // num_images
        self._orders = {number: self._orders.get(number, None) for number in range(first, last + 1)}
        for number, order in self._orders.items():
            if order is None:
                generator = _generator(self.seed, Stream.ORDER, self.replica, number)
                self._orders[number] = self.indices[torch.randperm(num_images, generator=generator)]
        passes = torch.cat(list(self._orders.values())) if last > first else self._orders[first]
        indices = passes[start - first * num_images :][: self.batch_size][self.rows]
        indices = self._send(indices)
        # index_select copies whole images, 30 times faster on a CPU than indexing, which copies pixels
        images = self._crop(indices) if self.augment else self.data.train_images.index_select(0, indices)
        self.batches_drawn += 1
        return self.data.inputs(images), self.data.train_labels.index_select(0, indices)

    def dropout_seed(self, device_index: int = 0) -> int:
        """Return the seed for the last mini-batch; `device_index` counts the local devices that share it."""
        # consecutive seeds: a SeedSequence for each mini-batch would take 0.1 ms of LeNet's 12
        return (
            random_seed(self.seed, Stream.DROPOUT, self.replica, self.shard_index + device_index) + self.batches_drawn
        ) % 2**64

    def _send(self, indices: Tensor) -> Tensor:
        """Copy to the device. CUDA reads pageable memory before it returns, so the host need not block there."""
        device = self.data.train_labels.device
        return indices.to(device, non_blocking=device.type == "cuda")

    def _crop(self, indices: Tensor) -> Tensor:
        """Flip, pad and crop in one gather: indices are reflected instead of pixels being padded."""
        size = self.data.size
        generator = _generator(self.seed, Stream.AUGMENTATION, self.replica, self.batches_drawn)
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
