"""Data sets: downloaded and parsed by torchvision, pre-processed once into proc/, batched on the replica's device.

data = loader.load("mnist")                                  # writes proc/mnist the first time, then maps it
batches = loader.BatchLoader(data, batch_size=128, seed=42)  # infinite: next(batches) is (inputs, targets)
"""

import contextlib
import enum
import functools
import hashlib
import io
import itertools
import json
import math
import os
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FORMAT = 3  # of the files in proc/; increment it when they change, and older caches are rebuilt
DOWNLOAD_TIMEOUT = 20  # seconds without data
ZCA_REGULARIZER = 1e-5  # added to the eigenvalues, as in the authors' code
CHUNK = 10_000  # images that are processed at a time: SVHN's 604,388 would take 7 GB as floats
FINGERPRINT = dict(size=int, mtime_ns=int, sha256=str)  # of a file, in meta.json

# images (N, H, W, C) uint8, in parts that are never joined in memory; labels (N,) int64
Arrays = tuple[Sequence[np.ndarray], np.ndarray]


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
    checksum: str | None = None  # of images and labels

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
    return ([arrays[0][..., None]], arrays[1]), ([arrays[2][..., None]], arrays[3])


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
    train, test = (([each.data], np.array(each.targets)) for each in sets)
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
    return (images[:2], np.concatenate(labels[:2])), (images[2:], labels[2])


def read_digits(kind: str, raw: Path, download: bool) -> tuple[Arrays, Arrays]:
    """Read scikit-learn's 1,797 images of 8 x 8. The last 360, written by other people, are the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # from 0..16
    return ([images[:-360]], digits.target[:-360]), ([images[-360:]], digits.target[-360:])


class DatasetSpec(NamedTuple):
    """The reader of a data set, and its shape."""

    read: Callable[[str, Path, bool], tuple[Arrays, Arrays]]
    kind: str  # torchvision's name
    raw: str | None  # its files below torchvision's root, as a glob pattern
    num_train_images: int
    channels: int
    size: int  # height and width in pixels
    classes: int
    augment: bool  # default of --augment


DATASETS = {
    "mnist": DatasetSpec(read_idx, "MNIST", "MNIST/raw/*-ubyte", 60_000, 1, 28, 10, False),
    "fashion": DatasetSpec(read_idx, "FashionMNIST", "FashionMNIST/raw/*-ubyte", 60_000, 1, 28, 10, False),
    "cifar10": DatasetSpec(read_cifar, "CIFAR10", "cifar-10-batches-py/*", 50_000, 3, 32, 10, True),
    "cifar100": DatasetSpec(read_cifar, "CIFAR100", "cifar-100-python/*", 50_000, 3, 32, 100, True),
    "svhn": DatasetSpec(read_svhn, "SVHN", "*_32x32.mat", 604_388, 3, 32, 10, False),
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
    missing = [path for path in paths if not _is_file(path)]
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


def _is_file(path: Path) -> bool:
    """Return whether a file exists. Raises: PermissionError, unlike os.path.isfile."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except PermissionError:
        raise
    except OSError:
        return False


def _parse(path: Path, read: Callable[[Path], Tensor]) -> Tensor:
    try:
        return read(path)
    except PermissionError:
        raise
    except Exception as error:
        raise DatasetError(f"{path} is damaged ({error}): replace it, or delete it to download it again") from error


def _check_sums(sums: dict[Path, str]) -> None:
    from torchvision.datasets.utils import check_integrity

    for path, md5 in sums.items():
        try:
            is_intact = check_integrity(path, md5)
        except PermissionError:
            raise
        except OSError as error:
            raise DatasetError(
                f"{path} cannot be read ({error}): replace it, or delete it to download it again"
            ) from error
        if not is_intact:
            raise DatasetError(
                f"{path} is damaged (its MD5 sum is not {md5}): replace it, or delete it to download it again"
            )


# proc/: a directory per data set with four arrays and meta.json, written under a temporary name and then renamed


@contextlib.contextmanager
def _report_permission_errors() -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise DatasetError(
            f"{error.filename}: permission denied: ask its owner to make it readable, or choose other directories with "
            "--data and --proc"
        ) from error


@_report_permission_errors()
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
        raise DatasetError(f"--data {raw}: no such directory, or no permission to read it")
    folder, spec, was_built = cache(name, proc, zca), DATASETS[name], False
    for _ in range(3):
        if not is_current(name, raw, proc, zca):
            train, test = spec.read(spec.kind, proc / "raw" if raw is None else raw, raw is None)
            _check_arrays(name, train, test, spec.classes)
            raw_files = {file: _fingerprint(path, _sha256(path)) for file, path in _raw_files(name, raw, proc).items()}
            meta = dict(format=FORMAT, source_dir=_source_dir(name, raw), raw_files=raw_files, classes=spec.classes)
            try:
                _build(folder, train, test, zca, meta, functools.partial(is_current, name, raw, proc, zca))
            except OSError as error:
                raise DatasetError(
                    f"{folder} cannot be written ({error.strerror or error}): choose another directory with --proc"
                ) from error
            was_built = True
        try:
            return _open(name, folder, was_built)
        except (FileNotFoundError, _ChangedError) as error:  # retry: another run may be replacing it at this moment
            reason = error
    raise DatasetError(f"{folder} is damaged ({reason}): delete it and it will be rebuilt")


def cache(name: str, proc: Path, zca: bool) -> Path:
    """Return the directory of a pre-processed data set."""
    return proc / (f"{name}-zca" if zca else name)


@_report_permission_errors()
def is_current(name: str, raw: Path | None, proc: Path, zca: bool) -> bool:
    """Return whether `load` with these arguments would find the data set pre-processed from the raw files as they are.

    Without `raw` data of any source is current. Raw files may be deleted.
    """
    try:
        meta = _read_meta(cache(name, proc, zca))
    except (FileNotFoundError, NotADirectoryError):
        return False
    if meta.get("format") != FORMAT:
        return False
    if meta["source_dir"] != _source_dir(name, raw):
        return raw is None
    saved = meta["raw_files"]
    return all(_is_unchanged(path, saved[file]) for file, path in _raw_files(name, raw, proc).items() if file in saved)


def _source_dir(name: str, raw: Path | None) -> str | None:
    return None if raw is None or DATASETS[name].raw is None else str(raw.resolve())


def _raw_files(name: str, raw: Path | None, proc: Path) -> dict[str, Path]:
    """Return the raw files that exist, by their path below torchvision's root."""
    root, pattern = proc / "raw" if raw is None else raw, DATASETS[name].raw
    paths = sorted(root.glob(pattern)) if pattern else []
    return {str(path.relative_to(root)): path for path in paths if os.path.isfile(path)}


def _fingerprint(path: Path, sha256: str) -> dict[str, Any]:
    status = path.stat()
    return dict(size=status.st_size, mtime_ns=status.st_mtime_ns, sha256=sha256)


def _is_unchanged(path: Path, saved: dict[str, Any]) -> bool:
    """Return whether a file has this fingerprint. Its content is read only if it has been copied or touched."""
    status = path.stat()
    if status.st_size != saved["size"]:
        return False
    return status.st_mtime_ns == saved["mtime_ns"] or _sha256(path) == saved["sha256"]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if not isinstance(meta, dict):
            raise ValueError("meta.json is not an object")
        if meta.get("format") == FORMAT:
            _check_meta(meta)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"{folder} is damaged ({error}): delete it and it will be rebuilt, or choose another directory with --proc"
        ) from error
    return meta


def _check_meta(meta: dict[str, Any]) -> None:
    """Check what is used before the arrays are opened. Raises: ValueError."""
    if not isinstance(meta.get("source_dir", 0), str | None):
        raise ValueError("meta.json has an invalid source_dir")
    for name in ("raw_files", "arrays"):
        files = meta.get(name)
        if not isinstance(files, dict) or not all(_is_fingerprint(value) for value in files.values()):
            raise ValueError(f"meta.json has invalid {name}")


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, dict) and {name: type(field) for name, field in value.items()} == FINGERPRINT


def _check_arrays(name: str, train: Arrays, test: Arrays, classes: int) -> None:
    for split, (images, labels) in (("training", train), ("test", test)):
        count = sum(map(len, images))
        if count != len(labels) or not count:
            raise DatasetError(f"the {split} set of {name} has {count} images and {len(labels)} labels")
        if labels.min() < 0 or labels.max() >= classes:
            raise DatasetError(f"the {split} set of {name} has a label outside 0 to {classes - 1}")
    first, *others = (part.shape[1:] for part in (*train[0], *test[0]))
    if len(first) != 3 or first[0] != first[1] or not first[0]:
        raise DatasetError(f"the images of {name} are {first}: only square images are supported")
    for shape in others:
        if shape != first:
            raise DatasetError(f"the images of {name} are {first} and {shape}: all must have one size")


def _build(
    folder: Path, train: Arrays, test: Arrays, zca: bool, meta: dict[str, Any], is_current: Callable[[], bool]
) -> None:
    shape = train[0][0].shape[1:]
    mean, std = (np.zeros(shape[2]), np.ones(shape[2])) if zca else _channel_mean_std(train[0])
    convert, dtype = (_fit_zca(train[0]), np.float32) if zca else (_chunks, np.uint8)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir()  # unlike mkdtemp's, its mode follows the umask, like the files'
    arrays: dict[str, Any] = {}
    try:
        for split, (images, labels) in (("train", train), ("test", test)):
            for content, array in (
                ("images", ((len(labels), *shape), dtype, convert(images))),
                ("labels", (labels.shape, np.int64, [labels.astype(np.int64)])),
            ):
                path = temporary / f"{split}_{content}.npy"
                arrays[path.name] = _fingerprint(path, _save(path, *array))
        meta |= dict(mean=mean.tolist(), std=std.tolist(), arrays=arrays)
        with open(temporary / "meta.json", "w") as file:
            json.dump(meta, file)
            _fsync(file)
        _put(temporary, folder, is_current)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, folder: Path, is_current: Callable[[], bool]) -> None:
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
            if is_current():
                return
            with tempfile.TemporaryDirectory(dir=folder.parent) as trash:
                os.rename(folder, Path(trash) / "old")
    raise blocked


def _save(path: Path, shape: tuple[int, ...], dtype: type, chunks: Iterable[np.ndarray]) -> str:
    """Write an array that is given in chunks of rows. Returns the checksum of what was to be written."""
    header, checksum = io.BytesIO(), hashlib.sha256()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(header, dict(descr=descr, fortran_order=False, shape=shape))
    with open(path, "wb") as file:
        for data in itertools.chain([header.getbuffer()], (np.ascontiguousarray(chunk).data for chunk in chunks)):
            file.write(data)  # np.save does not report an error in the last few bytes
            checksum.update(data)
        _fsync(file)
    return checksum.hexdigest()


def _fsync(file: Any) -> None:
    """Force a file to disk, so that a crash cannot leave a renamed directory with empty files."""
    file.flush()
    os.fsync(file.fileno())


class _ChangedError(Exception):
    """An array is not the one that meta.json describes."""


def _open(name: str, folder: Path, was_built: bool) -> Dataset:
    """Map the arrays of a data set, verifying the checksums if it was just built.

    Raises:
        FileNotFoundError, _ChangedError: an array is missing, or damaged or replaced.
    """
    meta = _read_meta(folder)
    try:
        arrays, checksums = {}, []
        for array in (f"{split}_{content}" for split in ("train", "test") for content in ("images", "labels")):
            path = folder / f"{array}.npy"
            saved = meta["arrays"][path.name]
            if (_sha256(path) != saved["sha256"]) if was_built else not _is_unchanged(path, saved):
                raise _ChangedError(f"{path.name} does not match its checksum")
            arrays[array] = np.lib.format.open_memmap(path, mode="c")
            checksums.append(saved["sha256"])
        _check_cache(name, arrays, meta)
        return Dataset(
            name=name,
            **{split: torch.from_numpy(array) for split, array in arrays.items()},
            mean=torch.tensor(meta["mean"], dtype=torch.float32),
            std=torch.tensor(meta["std"], dtype=torch.float32),
            classes=meta["classes"],
            source_dir=meta["source_dir"],
            checksum=hashlib.sha256("".join(checksums).encode()).hexdigest()[:16],
        )
    except (FileNotFoundError, PermissionError, _ChangedError):
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
    train, test = (([arrays[f"{split}_images"]], arrays[f"{split}_labels"]) for split in ("train", "test"))
    _check_arrays(name, train, test, meta["classes"])
    mean, std = np.array(meta["mean"], dtype=np.float64), np.array(meta["std"], dtype=np.float64)
    fits = mean.shape == std.shape == train[0][0].shape[3:]
    if not (fits and np.isfinite([mean, std]).all() and (std > 0).all()):
        raise ValueError("meta.json has an invalid mean or std")


def _chunks(images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    for part in images:
        yield from (part[start : start + CHUNK] for start in range(0, len(part), CHUNK))


def _float_chunks(images: Sequence[np.ndarray], row: int) -> Iterator[Tensor]:
    """Yield chunks as float32 matrices with `row` columns."""
    for chunk in _chunks(images):
        yield torch.from_numpy(chunk).reshape(-1, row).float()


def _channel_mean_std(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel, (C,)."""
    channels = images[0].shape[3]
    count = sum(part.size for part in images) // channels
    mean = sum(chunk.sum(0, dtype=torch.float64) for chunk in _float_chunks(images, channels)) / count
    squares = sum((chunk - mean).square().sum(0) for chunk in _float_chunks(images, channels))
    return mean.numpy(), (squares / count).sqrt().clamp_min(1e-6).numpy()


def _fit_zca(train: Sequence[np.ndarray]) -> Callable[[Sequence[np.ndarray]], Iterator[np.ndarray]]:
    """Return the function that normalizes contrast and whitens by the ZCA matrix of `train`, in chunks.

    CIFAR takes about a minute.
    """
    dimensions = math.prod(train[0].shape[1:])

    def contrast_normalized(images: Sequence[np.ndarray]) -> Iterator[Tensor]:
        for flat in _float_chunks(images, dimensions):
            flat -= flat.mean(1, keepdim=True)
            yield flat / flat.std(1, keepdim=True).clamp_min(1e-8)

    count = sum(map(len, train))
    mean = sum(chunk.sum(0, dtype=torch.float64) for chunk in contrast_normalized(train)) / count
    covariance = torch.zeros(dimensions, dimensions, dtype=torch.float64)
    for chunk in contrast_normalized(train):
        centered = chunk - mean.float()
        covariance += centered.T @ centered
    values, vectors = torch.linalg.eigh(covariance / count)
    zca = ((vectors / (values.clamp_min(0) + ZCA_REGULARIZER).sqrt()) @ vectors.T).float()

    def whiten(images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        for chunk in contrast_normalized(images):
            yield ((chunk - mean.float()) @ zca).numpy()

    return whiten


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
