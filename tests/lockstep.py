"""Step an optimizer in parallel with the float64 reference and compare every buffer after every step.

mpiexec -n 4 python tests/lockstep.py              # every rank compares its own replica
torchrun --nproc-per-node 4 tests/lockstep.py
"""

import copy
import functools
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from parle import rank_exit
from tests import ranks
from tests.ranks import Parle
from tests.reference import HalfPrecisionReference, Reference

SHAPES = [(4, 3), (5,), (2, 3, 2, 2), ()]
SIZES = [int(np.prod(shape)) for shape in SHAPES]
P = sum(SIZES)
EXTRA = 32  # maximum number of floats that travel with the weights in a message; less than P
STEPS = 24
RESUME_AT, SYNC_AT = 7, 19  # in the middle of a round wherever a round has several steps
DOUBLE, SINGLE = (torch.float64, 1e-12), (torch.float32, 1e-5)
CASES = [
    # method, its n, and settings
    ("parle", None, dict(sync_every=5, gamma0=0.1, rho0=0.02)),
    ("parle, maxima", None, dict(sync_every=2, gamma0=0.9, rho0=3.0)),
    ("parle, L = 1", None, dict(sync_every=1, gamma0=0.1, rho0=0.2)),
    ("parle, L = auto", None, dict(sync_every="auto", gamma0=0.02, rho0=0.02)),
    ("parle, other outer step", None, dict(sync_every=3, gamma0=0.1, rho0=0.02, s=3.0, outer_momentum=0.3)),
    ("parle, no outer momentum", None, dict(sync_every=3, gamma0=0.1, rho0=0.02, s=5.0, outer_momentum=0.0)),
    ("elastic-sgd", None, dict(sync_every=1, gamma0=0.0, rho0="1/n")),
    ("entropy-sgd", 1, dict(sync_every=4, gamma0=0.1, rho0=0.0)),
    ("sgd", 1, dict(sync_every=1, gamma0=0.0, rho0=0.0)),
    ("parle, averaged master", None, dict(sync_every=3, gamma0=0.1, rho0=0.02, beta=0.7)),
    ("parle, L = auto, averaged master", None, dict(sync_every="auto", gamma0=0.02, rho0=0.02, beta=0.7)),
    ("elastic-sgd, averaged master", None, dict(sync_every=1, gamma0=0.0, rho0="1/n", beta=0.9)),
    ("sgd, averaged master", 1, dict(sync_every=1, gamma0=0.0, rho0=0.0, beta=0.9)),
]
HALF_PRECISION_CASES = [
    ("parle, half precision", None, dict(sync_every=5, gamma0=0.1, rho0=0.02)),
    ("parle, L = auto, half precision", None, dict(sync_every="auto", gamma0=0.02, rho0=0.02)),
    ("parle, no outer momentum, half precision", None, dict(sync_every=3, gamma0=0.1, rho0=0.02, outer_momentum=0.0)),
    ("elastic-sgd, half precision", None, dict(sync_every=1, gamma0=0.0, rho0="1/n")),
]


class CountingComm:
    """A communicator that records the message size of every collective call."""

    def __init__(self, comm, sizes=None):
        self.comm, self.sizes = comm, [] if sizes is None else sizes

    def __getattr__(self, name):
        if name.lower().startswith(("iall", "all", "ired", "red", "ibc", "bc", "isend", "send", "ibarrier", "barrier")):
            self.sizes.append(None)
        return getattr(self.comm, name)

    def Idup(self):
        comm, request = self.comm.Idup()
        return CountingComm(comm, self.sizes), request

    def Iallreduce(self, in_place, tensor, *rest):
        self.sizes.append(tensor.numel())
        return self.comm.Iallreduce(in_place, tensor, *rest)


class CountingRanks(ranks.TorchRanks):
    """A process group that records the message size of every collective call."""

    def __init__(self, comm):
        super().__init__(comm.group)
        self.sizes = []
        for name in ("all_reduce", "all_gather", "broadcast"):
            setattr(torch.distributed, name, functools.partial(self._call, name, getattr(torch.distributed, name)))

    def _call(self, name, function, *arguments, **settings):
        if settings["group"] == self.group:  # not one that shares a replica
            self.sizes.append(arguments[0].numel() if name == "all_reduce" else None)
        return function(*arguments, **settings)


def losses(replicas):
    """Return curvature h and minimum b of each replica's loss, ½ Σ h (y − b)²: (n, P), identical on every rank."""
    random = np.random.default_rng(7)
    return random.uniform(0.2, 2.0, (replicas, P)), random.normal(size=(replicas, P))


def shaped(vector):
    """Return the vector split into arrays of SHAPES."""
    pieces = np.split(vector, np.cumsum(SIZES)[:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, SHAPES, strict=True)]


def adders(replicas):
    """Return the rank that adds up each element in float64. Each tensor is padded to 16 bytes."""
    padded = [-(-size // 2) * 2 for size in SIZES]
    starts = np.cumsum([0, *padded])
    positions = np.concatenate([start + np.arange(size) for start, size in zip(starts, SIZES, strict=False)])
    return positions // -(-starts[-1] // replicas)


def flat(tensors):
    """Return the elements of all tensors, each in row-major order whatever its strides."""
    return np.concatenate([tensor.numpy(force=True).reshape(-1) for tensor in tensors])


def gradients(parameters):
    return flat([torch.zeros(p.shape) if p.grad is None else p.grad for p in parameters])


def lockstep(
    build,
    local,
    replicas,
    ranks_per_replica,
    dtype,
    tolerance,
    messages=None,
    *,
    sync_every,
    gamma0,
    rho0,
    s=1.0,
    outer_momentum=None,
    beta=0.0,
    half_precision=False,
):
    """Yield the optimizer and whether a round ended, after each step and after all buffers were compared.

    Each replica has a frozen parameter and two groups with different lr and weight decay. Some gradients are None. The
    optimizer is replaced by a resumed one at RESUME_AT, and a round ends early at SYNC_AT.

    Args:
        build: builds the optimizer from the groups of each local replica and from settings.
        local: number, rank within the replica's group, and device of each local replica.
        messages: list that is cleared before each step.
    """
    rho0 = 1 / replicas if rho0 == "1/n" else rho0
    x0 = np.random.default_rng(1).normal(size=P).astype(np.float32)
    second = np.arange(P) >= SIZES[0]  # the elements of the second group
    shared = dict(momentum=0.9, alpha=0.75)
    make_reference = functools.partial(HalfPrecisionReference, adders=adders(replicas)) if half_precision else Reference
    reference = make_reference(
        *(x0, replicas, sync_every),
        **dict(nb=4, lr=0.1, weight_decay=np.where(second, 0.05, 0.01)),
        **dict(gamma0=gamma0, rho0=rho0, s=s, outer_momentum=outer_momentum, beta=beta),
        **shared,
    )

    def start():
        parameters, frozen, groups = [], [], []
        for number, rank, device in local:
            values = x0 if number == rank == 0 else x0 + 1  # all must start identical to the first
            tensors = [torch.tensor(array, dtype=dtype).to(device) for array in shaped(values)]
            tensors[2] = tensors[2].to(memory_format=torch.channels_last)
            own = [nn.Parameter(tensor) for tensor in tensors]
            fixed = nn.Parameter(torch.full((3,), 1.0 + number, dtype=dtype).to(device), requires_grad=False)
            groups.append([dict(params=[own[0], fixed]), dict(params=own[1:], weight_decay=0.05)])
            parameters.append(own)
            frozen.append(fixed)
        optimizer = build(
            groups,
            **dict(lr=0.1, weight_decay=0.01, sync_every=sync_every, gamma=gamma0, rho=rho0),
            **dict(outer_lr_scale=s, outer_momentum=outer_momentum, master_average=beta, batches_per_epoch=4),
            **shared,
        )
        return optimizer, parameters, frozen

    optimizer, parameters, frozen = start()
    h, b = losses(replicas)
    noise = np.random.default_rng(3)
    for step in range(STEPS):
        if step == RESUME_AT:
            state, weights = (
                copy.deepcopy(optimizer.state_dict()),
                [[p.detach().clone() for p in o] for o in parameters],
            )
            optimizer, parameters, frozen = start()
            for own, values in zip(parameters, weights, strict=True):
                for parameter, value in zip(own, values, strict=True):
                    parameter.data.copy_(value)
            optimizer.load_state_dict(state)
        lr = 0.02 if 10 <= step < 16 else 0.1  # L = auto falls to 1 and rises again
        reference.lr = np.where(second, lr / 2, lr)
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = lr / 2 if number % 2 else lr
        noises = noise.normal(size=(replicas, ranks_per_replica, P))
        mask = np.ones((replicas, ranks_per_replica, P))
        none = step % 3 == 1
        if none:  # the second parameter has no gradient on one rank of one replica
            mask[step % replicas, 0, SIZES[0] : SIZES[0] + SIZES[1]] = 0
        for (a, rank, _), own in zip(local, parameters, strict=True):
            gradient = h[a] * (flat(own) - b[a]) + noises[a, rank]
            for parameter, values in zip(own, shaped(gradient), strict=True):
                parameter.grad = torch.tensor(values, dtype=dtype, device=parameter.device)
            if none and (a, rank) == (step % replicas, 0):
                own[1].grad = None
        before = [gradients(own) for own in parameters]
        rounds = optimizer.rounds_done
        if messages is not None:
            messages.clear()
        reference.step((mask * ((h * (reference.y - b))[:, None] + noises)).mean(1))
        optimizer.step()
        if step == SYNC_AT:
            reference.sync()
            optimizer.sync()

        assert (optimizer.rounds_done, optimizer.step_in_round) == (reference.k, reference.i)
        for (a, _, _), own, gradient, fixed in zip(local, parameters, before, frozen, strict=True):
            assert (gradients(own) == gradient).all(), "p.grad was changed"
            assert (fixed.numpy(force=True) == 1).all(), "a frozen parameter differs from the first replica's"
            expected = {"y": reference.y[a], "inner_momentum_buffer": reference.u[a]}
            if sync_every != 1 and outer_momentum != 0:  # without momentum the buffers are unused
                expected["outer_momentum_buffer"] = reference.v[a]
                if reference.L_k > 1:
                    expected["anchor"], expected["inner_avg"] = reference.xa[a], reference.z[a]
            if own is parameters[0]:
                expected["master"] = reference.x
                if beta and reference.k:
                    expected["master_average"] = reference.xbar
                if "outer_momentum_buffer" in expected:
                    expected["master_momentum_buffer"] = reference.master_momentum
                if half_precision:
                    expected["message_error"] = reference.e[a]
            for name, values in expected.items():
                tensors = own if name == "y" else [optimizer.state[parameter][name] for parameter in own]
                got = flat(tensors)
                scale = 1.0 if name == "message_error" else np.abs(values).max().clip(1e-3)  # itself a rounding error
                error = np.abs(got - values).max() / scale
                assert error < tolerance, f"{name} of replica {a} is off by {error:.1e} after {step + 1} steps"
        yield optimizer, optimizer.rounds_done > rounds


def check(comm, replicas, dtype, tolerance, half_precision=False, **settings):
    counted = (CountingRanks if isinstance(comm, ranks.TorchRanks) else CountingComm)(comm)
    ranks_per_replica = comm.size // replicas

    def build(groups, **settings):
        message_dtype = torch.float16 if half_precision else None
        return Parle(*groups, counted, replicas=replicas, message_dtype=message_dtype, **settings)

    local = [(*divmod(comm.rank, ranks_per_replica), "cpu")]
    arguments = build, local, replicas, ranks_per_replica, dtype, tolerance, counted.sizes
    run = lockstep(*arguments, half_precision=half_precision, **settings)
    for step, (_, ended) in enumerate(run):
        if step in (0, RESUME_AT):  # the first step of an optimizer compares settings and weights, too
            counted.sizes[:] = [size for size in counted.sizes if size is not None]
        if not ended or comm.size == 1:
            assert counted.sizes == []
            continue
        if half_precision:
            assert counted.sizes.pop(0) <= EXTRA and set(counted.sizes) <= {None}  # followed by two of bytes
            continue
        (size,) = counted.sizes  # one message per round
        assert 0 <= size - (P if replicas > 1 else 0) <= EXTRA, size  # one replica is its own mean


def main():
    comm, _ = ranks.start()
    for size, replicas, (dtype, tolerance) in ((4, 2, SINGLE), (4, 1, DOUBLE), (3, 3, DOUBLE)):
        if size > comm.size:
            continue
        world = ranks.split(comm, 0 if comm.rank < size else None)
        cases = CASES
        if (replicas, dtype) == (size, torch.float64):  # in float32 the rounding of a message may differ
            cases = [
                *cases,
                *((name, n, settings | dict(half_precision=True)) for name, n, settings in HALF_PRECISION_CASES),
            ]
        for name, n, settings in cases if world is not None else ():
            if n in (None, replicas):
                check(world, replicas, dtype, tolerance, **settings)
                if comm.rank == 0:
                    print(f"{name}: n={replicas} on {size} ranks, {dtype}", flush=True)
        comm.allgather(None)
    if comm.rank == 0:
        print("all equal")


if __name__ == "__main__":
    rank_exit.run_or_abort(main)
