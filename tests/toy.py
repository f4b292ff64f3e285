"""A small data set, small networks and simulated ranks, for the tests of training and evaluation."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

import loader
import parle_gpu
from parle.distributed import Group


def build_optimizer(*models, **settings):
    """Return the optimizer of replicas in this process."""
    settings = dict(lr=0.1, sync_every=5, batches_per_epoch=5) | settings
    return parle_gpu.Parle([model.parameters() for model in models], **settings)


def dataset(train=40, test=30, size=4):
    """Return random images, labeled by the brightness of their upper half."""
    images = torch.randint(0, 256, (train + test, size, size, 1), dtype=torch.uint8)
    brightness = images[:, : size // 2].float().mean((1, 2, 3))
    labels = brightness.argsort().argsort() * 3 // (train + test)
    pixels = images[:train].float()
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    return loader.Dataset("bright", images[:train], labels[:train], images[train:], labels[train:], mean, std, 3)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def network():
    """Return a network with batch norm behind dropout, and with dropout behind batch norm."""
    return nn.Sequential(
        *(nn.Dropout(0.3), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
    )


class DataParallel(nn.DataParallel):
    """torch's DataParallel over devices that the CPU simulates."""

    def __init__(self, module, device_ids=()):
        nn.Module.__init__(self)
        self.module, self.device_ids = module, device_ids

    def forward(self, inputs):
        return self.module(inputs)


class Member(Group):
    """One rank of a group, without communication."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


class ThreadGroup(Member):
    """One rank of a group whose ranks are threads of this process."""

    def __init__(self, rank, barrier, values):
        super().__init__(rank, len(values))
        self.barrier, self.values = barrier, values

    def all_gather(self, value):
        self.values[self.rank] = value
        self.barrier.wait()
        gathered = list(self.values)
        self.barrier.wait()
        return gathered

    def all_reduce(self, tensor):
        tensor.copy_(sum(self.all_gather(tensor.clone())))


def thread_groups(size):
    """Return the group as each of its ranks sees it."""
    barrier, values = threading.Barrier(size, timeout=20), [None] * size
    return [ThreadGroup(rank, barrier, values) for rank in range(size)]


def run_ranks(size, work):
    """Return what `work(world)` returns on each of `size` simulated ranks."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, thread_groups(size)))
