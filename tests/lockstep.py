"""Steps an optimizer beside the float64 reference and compares every buffer. Under mpiexec, every rank does so with its
replica: mpiexec -n 3 python tests/lockstep.py
"""

import copy
import functools
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine
import loader
import ranks
from optimizer import TAIL
from parle_mpi import Parle
from tests.reference import Reference

SHAPES = [(4, 3), (5,), (2, 3, 2, 2), ()]
P = sum(int(np.prod(shape)) for shape in SHAPES)
STEPS = 30
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]
CASES = [
    # method           n     settings
    ("parle", None, dict(sync_every=5, gamma0=0.1, rho0=0.02)),
    ("parle, caps", None, dict(sync_every=2, gamma0=0.9, rho0=3.0)),
    ("parle, L = 1", None, dict(sync_every=1, gamma0=0.1, rho0=0.2)),
    ("parle, L = auto", None, dict(sync_every="auto", gamma0=0.02, rho0=0.02)),
    ("parle, other outer step", None, dict(sync_every=3, gamma0=0.1, rho0=0.02, s=3.0, outer_momentum=0.3)),
    ("parle, no outer momentum", None, dict(sync_every=3, gamma0=0.1, rho0=0.02, s=5.0, outer_momentum=0.0)),
    ("elastic-sgd", None, dict(sync_every=1, gamma0=0.0, rho0="1/n")),
    ("entropy-sgd", 1, dict(sync_every=4, gamma0=0.1, rho0=0.0)),
    ("sgd", 1, dict(sync_every=1, gamma0=0.0, rho0=0.0)),
]


class Counted:
    """A communicator that counts collectives and remembers the sizes of their messages."""

    def __init__(self, comm):
        self.comm, self.sizes = comm, []

    def __getattr__(self, name):
        if name.lower().startswith(("iall", "all", "ired", "red", "ibc", "bc", "isend", "send", "ibarrier", "barrier")):
            self.sizes.append(None)
        return getattr(self.comm, name)

    def Iallreduce(self, in_place, tensor, *rest):
        self.sizes.append(tensor.numel())
        return self.comm.Iallreduce(in_place, tensor, *rest)


def curvatures(replicas):
    """Of each replica's loss, ½ Σ h (y − b)², and where it is least: (n, P) each, the same on every rank."""
    random = np.random.default_rng(7)
    return random.uniform(0.2, 2.0, (replicas, P)), random.normal(size=(replicas, P))


def shaped(vector):
    """The vector cut into arrays of SHAPES."""
    pieces = np.split(vector, np.cumsum([int(np.prod(shape)) for shape in SHAPES])[:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, SHAPES, strict=True)]


def flat(tensors):
    """In the order of the parameters, each read row by row, whatever its strides."""
    return np.concatenate([tensor.numpy(force=True).reshape(-1) for tensor in tensors])


def lockstep(build, here, replicas, team, dtype, tolerance, *, sync_every, gamma0, rho0, s=1.0, outer_momentum=None):
    """Yields after each mini-batch, with every buffer compared, the optimizer and whether a round ended.

    `build` makes the optimizer, of the parameters of each replica of this process and of settings. `here` lists these
    replicas: each one's number, its part in the team that averages its gradients, and its device.
    """
    rho0 = 1 / replicas if rho0 == "1/n" else rho0
    x0 = np.random.default_rng(1).normal(size=P).astype(np.float32)
    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.01, alpha=0.75)
    reference = Reference(
        x0, replicas, sync_every, nb=4, gamma0=gamma0, rho0=rho0, s=s, outer_momentum=outer_momentum, **settings
    )
    parameters = []
    for number, part, device in here:
        start = x0 if number == part == 0 else x0 + 1  # all are to start as the first
        tensors = [torch.tensor(values, dtype=dtype).to(device) for values in shaped(start)]
        tensors[2] = tensors[2].to(memory_format=torch.channels_last)
        parameters.append([nn.Parameter(tensor) for tensor in tensors])
    optimizer = build(
        parameters,
        sync_every=sync_every,
        gamma=gamma0,
        rho=rho0,
        outer_step=s,
        outer_momentum=outer_momentum,
        batches_per_epoch=4,
        **settings,
    )
    h, b = curvatures(replicas)
    noise = np.random.default_rng(3)
    for step in range(STEPS):
        noises = noise.normal(size=(replicas, team, P))
        reference.lr = 0.02 if 20 <= step < 24 else 0.1  # L = auto falls to 1 and rises again
        for group in optimizer.param_groups:
            group["lr"] = reference.lr
        gradients = h * (reference.y - b) + noises.mean(1)
        for (a, part, _), own in zip(here, parameters, strict=True):
            ours = h[a] * (flat(own) - b[a]) + noises[a, part]
            for parameter, values in zip(own, shaped(ours), strict=True):
                parameter.grad = torch.tensor(values, dtype=dtype, device=parameter.device)
        before = [flat([parameter.grad for parameter in own]) for own in parameters]
        rounds = optimizer.rounds
        reference.step(gradients)
        optimizer.step()

        assert (optimizer.rounds, optimizer.batches) == (reference.k, reference.i)
        for (a, _, _), own, gradient in zip(here, parameters, before, strict=True):
            assert (flat([parameter.grad for parameter in own]) == gradient).all(), "p.grad was changed"
            expected = {"y": reference.y[a], "inner_momentum_buffer": reference.u[a]}
            if sync_every != 1 and outer_momentum != 0:  # without momentum the buffers are not used
                expected["outer_momentum_buffer"] = reference.v[a]
                if reference.L_k > 1:
                    expected["anchor"], expected["inner_avg"] = reference.xa[a], reference.z[a]
            if own is parameters[0]:
                expected["master"] = reference.x
                if "outer_momentum_buffer" in expected:
                    expected["master_momentum_buffer"] = reference.v.mean(0)
            for name, wanted in expected.items():
                got = flat(own if name == "y" else [optimizer.state[parameter][name] for parameter in own])
                error = np.abs(got - wanted).max() / np.abs(wanted).max().clip(1e-3)
                assert error < tolerance, f"{name} of replica {a} is off by {error:.1e} after {step + 1} mini-batches"
        yield optimizer, optimizer.rounds > rounds


def check(comm, replicas, dtype, tolerance, **settings):
    counted, team = Counted(comm), comm.size // replicas

    def build(parameters, **settings):
        optimizer = Parle(*parameters, counted, replicas=replicas, **settings)
        counted.sizes.clear()
        return optimizer

    here = [(*divmod(comm.rank, team), "cpu")]
    for _, ended in lockstep(build, here, replicas, team, dtype, tolerance, **settings):
        message = [P + TAIL if replicas > 1 else TAIL]  # one replica is its own mean
        assert counted.sizes == (message if ended and comm.size > 1 else []), counted.sizes
        counted.sizes.clear()


def random_images(count, seed):
    """Images of 8 x 8 whose brightness depends on their class, and the classes."""
    random = np.random.default_rng(seed)
    labels = random.integers(10, size=count)
    images = random.integers(100, size=(count, 8, 8, 1)) + 15 * labels[:, None, None, None]
    return torch.tensor(images, dtype=torch.uint8), torch.tensor(labels)


def check_data_parallel(comm, alone, batch_size):
    """One replica over all ranks trains as one rank does on the whole of each mini-batch, however that is cut."""
    images, test = random_images(500, seed=0), random_images(100, seed=1)
    data = loader.Dataset("random", *images, *test, mean=torch.tensor([115.0]), std=torch.tensor([50.0]), classes=10)
    masters = []
    for world in (comm, alone):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
        part = (world.rank, world.size)
        batches = loader.Batches(data, batch_size=batch_size, seed=5, part=part)
        optimizer = Parle(model.parameters(), world, lr=0.05, sync_every=5, batches_per_epoch=10, replicas=1)
        team = engine.Team(world.rank, world.size, functools.partial(ranks.add, world))
        evaluate = functools.partial(
            engine.evaluate, optimizer, copy.deepcopy(model), data, batch_size=50, replicas=[0], team=team, world=team
        )
        events = list(
            engine.train(
                [model], [batches], optimizer, evaluate, epochs=0.5, lr_drops=[], lr_decay=1, team=team, world=team
            )
        )
        masters.append((optimizer.master, events[-3]["loss"], events[-2]["master_loss"], events[-2]["master_error"]))
    for ours, single in zip(*masters, strict=True):
        assert torch.allclose(torch.as_tensor(ours), torch.as_tensor(single), rtol=1e-5, atol=1e-6), (ours, single)


def check_same_everywhere(comm):
    """Ranks built differently start alike; all hold the same master to the last bit, and a team the same weights."""
    torch.manual_seed(comm.rank)
    parameters = [nn.Parameter(torch.randn(1000)), nn.Parameter(torch.randn(3), requires_grad=False)]
    optimizer = Parle(parameters, comm, lr=0.1, sync_every=3, batches_per_epoch=10, replicas=comm.size // 2 or 1)
    assert len(set(comm.allgather(parameters[0].sum().item()))) == 1
    assert len(set(comm.allgather(parameters[1].sum().item()))) == 1
    team = comm.Split(comm.rank // (comm.size // optimizer.num_replicas))
    for _ in range(10):
        parameters[0].grad = torch.randn(1000)
        optimizer.step()
        assert len(set(comm.allgather(optimizer.master.numpy().tobytes()))) == 1
        assert len(set(team.allgather(parameters[0].detach().numpy().tobytes()))) == 1
    others = comm.allgather(parameters[0].detach().numpy().tobytes())
    assert len(set(others)) == optimizer.num_replicas


def check_riders(comm):
    optimizer = Parle([nn.Parameter(torch.randn(5))], comm, lr=0.1, sync_every=2, batches_per_epoch=10)
    optimizer.riders[0][1] = comm.rank
    optimizer.step()
    assert optimizer.riders[0].tolist() == [0, comm.rank, 0, 0, 0]
    optimizer.step()
    assert optimizer.riders[0].tolist() == [0, (comm.size - 1) / 2, 0, 0, 0]


def check_disagreement(comm):
    for tensor, settings in (
        (torch.zeros(5), dict(lr=0.1 + comm.rank)),
        (torch.zeros(5 + comm.rank), dict(lr=0.1)),
        (torch.zeros(4, 3) if comm.rank == 0 else torch.zeros(3, 4).t(), dict(lr=0.1)),
    ):
        try:
            Parle([nn.Parameter(tensor)], comm, batches_per_epoch=10, **settings)
        except ValueError as error:
            assert "rank 0" in str(error)
        else:
            assert comm.size == 1


def check_drift(comm):
    """Ranks whose lr has come to differ hear of it at the next sync, instead of holding different masters."""
    optimizer = Parle([nn.Parameter(torch.zeros(5))], comm, lr=0.1, sync_every=2, batches_per_epoch=10)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.2 if comm.rank == 0 else 0.1
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "lr" in str(error)
    else:
        assert comm.size == 1


def check_nonfinite(comm, sync_every):
    """Every rank learns which replica is not finite; it restarts from the mean of the others, without momentum."""
    bad = comm.size - 1
    parameter = nn.Parameter(torch.zeros(5))
    optimizer = Parle([parameter], comm, lr=0.1, sync_every=sync_every, batches_per_epoch=10)
    for round in range(3):
        if round == 1 and comm.rank == bad:
            with torch.no_grad():
                parameter.fill_(torch.nan)
        for _ in range(sync_every):
            parameter.grad = torch.full((5,), comm.rank + 1.0)
            optimizer.step()
        assert optimizer.lost == ([bad] if round == 1 else [])
        assert optimizer.master.isfinite().all() and parameter.isfinite().all()
        assert len(set(comm.allgather(optimizer.master.numpy().tobytes()))) == 1
        if round == 1 and comm.rank == bad:
            assert torch.equal(parameter, optimizer.master)
            assert not optimizer.state[parameter]["inner_momentum_buffer"].any()


def main():
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    float64, float32 = PRECISIONS
    teams = {"parle", "elastic-sgd"} if comm.size % 2 == 0 else set()
    for name, n, settings in CASES:
        check(comm, n or comm.size, *float64, **settings)
        if name in teams:
            check(comm, comm.size // 2, *float64, **settings)
        if name == "parle":
            check(comm, comm.size, *float32, **settings)
        if comm.rank == 0:
            print(name, flush=True)
    part = comm.Split(comm.rank == comm.size - 1)  # one rank alone and a world of all others, at once
    for name, n, settings in CASES:
        if name in ("parle", "elastic-sgd", "entropy-sgd"):
            check(part, n or part.size, *float64, **settings)
    for batch_size in (48, 50):
        check_data_parallel(comm, MPI.COMM_SELF, batch_size)
    for sync_every in (1, 2):
        check_nonfinite(comm, sync_every)
    check_same_everywhere(comm)
    check_riders(comm)
    check_disagreement(comm)
    check_drift(comm)
    if comm.rank == 0:
        print("all equal")


if __name__ == "__main__":
    ranks.run(main)
