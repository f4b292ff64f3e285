"""The arithmetic of parle.py, its presets against their own authorities, and the published script's six faults."""

import math

import pytest
import torch
from torch import nn

from parle import GAMMA_CAP, PRESETS, descend, move_anchor, round_length, scope
from parle_mpi import Parle

SETTINGS = dict(lr=0.1, momentum=0.9, weight_decay=0.02)


def preset(name, n=1):
    values = {key: value for key, value in PRESETS[name].items() if key != "replicas"}
    return values | ({"rho": 1 / n} if values["rho"] == "1/n" else {})


def losses(count):
    """Of a fixed random quadratic with noise in every mini-batch: the same for every optimizer."""
    random = torch.Generator().manual_seed(3)
    h, b = torch.rand(7, generator=random) + 0.1, torch.randn(7, generator=random)
    for _ in range(count):
        noise = torch.randn(7, generator=random)
        yield lambda y, noise=noise: (0.5 * h * (y - b) ** 2 + noise * y).sum()


def train(optimizer, parameter, count):
    for loss in losses(count):
        optimizer.zero_grad()
        loss(parameter).backward()
        optimizer.step()
        yield parameter.detach().clone()


@pytest.fixture
def start():
    return torch.randn(7, dtype=torch.float32)


def test_scoping_starts_at_the_coefficient_grows_once_a_round_and_stops_at_the_cap():
    assert scope(0.01, 0, 469, 1.0) == 0.01
    assert scope(0.01, 1, 469, 1.0) == pytest.approx(0.01 * (1 + 1 / 938))
    assert scope(0.01, 469, 469, 1.0) == pytest.approx(0.01 * math.exp(0.5), rel=1e-3)
    assert scope(0.01, 10**4, 469, 1.0) == 1.0
    assert scope(0.0, 10**9, 1, 1.0) == 0.0
    assert scope(0.01, 10**9, 1, 1.0) == 1.0


def test_auto_gives_lr_over_gamma_and_at_least_one():
    assert [round_length("auto", 0.1, gamma) for gamma in (0.004, 0.01, 0.03, 0.1, 1.0)] == [25, 10, 3, 1, 1]
    assert round_length(25, 0.1, 0.01) == 25


def test_descend_by_hand():
    y, u, x = torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([1.0])
    descend(y, torch.tensor([3.0]), u, x, pull=0.1, lr=0.2, momentum=0.9, weight_decay=0.05)
    d = 3 + 0.05 * 2 + 0.1 * (2 - 1)
    assert u.item() == pytest.approx(0.9 * 0.5 + d)
    assert y.item() == pytest.approx(2 - 0.2 * (d + 0.9 * (0.9 * 0.5 + d)))


def test_move_anchor_by_hand():
    x, v = torch.tensor([1.0]), torch.tensor([0.5])
    move_anchor(x, torch.tensor([0.4]), torch.tensor([0.1]), v, pull=0.75, lr=0.2, momentum=0.9)
    d = (1 - 0.4) + 0.75 * (1 - 0.1)
    assert v.item() == pytest.approx(0.9 * 0.5 + d)
    assert x.item() == pytest.approx(1 - 0.2 * (d + 0.9 * (0.9 * 0.5 + d)))


def test_the_mean_of_the_anchors_obeys_the_outer_update_itself():
    anchors, averages, momenta = torch.randn(3, 4, 7, dtype=torch.float64).unbind()
    master, momentum, z = anchors.mean(0), momenta.mean(0), averages.mean(0)
    for x, average, v in zip(anchors, averages, momenta, strict=True):
        move_anchor(x, average, z, v, pull=0.75, lr=0.1, momentum=0.9)
    move_anchor(master, z, z, momentum, pull=0.75, lr=0.1, momentum=0.9)
    assert torch.allclose(master, anchors.mean(0), rtol=1e-12, atol=0)
    assert torch.allclose(momentum, momenta.mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("pull", [0.0, 0.75, 10.0])
@pytest.mark.parametrize(("share", "stable"), [(0.98, True), (1.02, False)])
def test_rounds_diverge_where_the_step_of_the_mean_is_above_the_stated_limit(momentum, pull, share, stable):
    limit = (2 + 2 * momentum) / (1 + 2 * momentum)
    x, z, v = torch.ones(1), torch.zeros(1), torch.zeros(1)
    for _ in range(500):
        move_anchor(x, z, z, v, pull=pull, lr=share * limit / (1 + pull), momentum=momentum)
    assert (abs(x) < 0.01) == stable


# presets


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_sgd(comm, start, momentum):
    settings = SETTINGS | dict(momentum=momentum)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    parle = Parle([ours], comm, batches_per_epoch=5, **preset("sgd"), **settings)
    sgd = torch.optim.SGD([theirs], nesterov=momentum > 0, fused=True, **settings)
    for got, wanted in zip(train(parle, ours, 200), train(sgd, theirs, 200), strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(parle.master, theirs.detach())


def test_the_inner_loop_without_pull_is_torchs_sgd_until_the_first_sync(comm, start):
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    parle = Parle([ours], comm, batches_per_epoch=5, sync_every=26, gamma=0, rho=0, **SETTINGS)
    sgd = torch.optim.SGD([theirs], nesterov=True, fused=True, **SETTINGS)
    for got, wanted in zip(train(parle, ours, 25), train(sgd, theirs, 25), strict=True):
        assert torch.equal(got, wanted)


def test_entropy_sgd_is_nesterov_on_the_anchor_minus_the_inner_average(comm, start):
    """x ← x − lr·Nesterov(x − z), with y and z restarted at x: torch's SGD does the outer loop, and the inner."""
    parameter = nn.Parameter(start.clone().double())
    parle = Parle([parameter], comm, batches_per_epoch=5, lr=0.1, **preset("entropy-sgd"))
    x, y = nn.Parameter(start.clone().double()), nn.Parameter(start.clone().double())
    outer = torch.optim.SGD([x], lr=0.1, momentum=0.9, nesterov=True)
    inner = torch.optim.SGD([y], lr=0.1, momentum=0.9, nesterov=True)
    z, k = x.detach().clone(), 0
    for step, (got, loss) in enumerate(zip(train(parle, parameter, 100), losses(100), strict=True)):
        gamma = min(0.01 * 1.1**k, 1)
        inner.zero_grad()
        (loss(y) + gamma / 2 * ((y - x.detach()) ** 2).sum()).backward()
        inner.step()
        z = 0.75 * z + 0.25 * y.detach()
        if step % 25 == 24:
            x.grad = x.detach() - z
            outer.step()
            z, k = x.detach().clone(), k + 1
            with torch.no_grad():
                y.copy_(x)
        assert torch.allclose(got, y.detach(), rtol=1e-12, atol=0)
    assert torch.allclose(parle.master, x.detach(), rtol=1e-12, atol=0)


def test_elastic_sgd_starts_at_a_pull_of_one():
    for n in (1, 2, 6):
        assert scope(preset("elastic-sgd", n)["rho"] * 1 * n, 0, 5, 10.0) == pytest.approx(1)


# the six faults of the published script, and the seventh


def test_fault_1_scoping_counts_rounds_not_tensors(comm):
    parameters = [nn.Parameter(torch.randn(2)) for _ in range(14)]
    parle = Parle(parameters, comm, lr=0.1, sync_every=5, batches_per_epoch=10)
    for _ in range(20):
        parle.step()
    assert parle.rounds == 4
    parle.step()
    assert parle.param_groups[0]["scoped_gamma"] == pytest.approx(0.01 * 1.05**4)


def test_fault_2_the_users_rho_is_left_alone(comm, start):
    parle = Parle([nn.Parameter(start)], comm, lr=0.1, rho=0.01, batches_per_epoch=10)
    for _ in range(60):
        parle.step()
    assert parle.param_groups[0]["rho"] == 0.01
    assert parle.param_groups[0]["scoped_rho"] == pytest.approx(0.01 * 25 * 1 * 1.05**2)


def test_fault_3_gamma_is_a_coefficient_more_of_it_keeps_closer_to_the_anchor(comm, start):
    def distance(gamma):
        parameter = nn.Parameter(start.clone())
        parle = Parle([parameter], comm, lr=0.1, gamma=gamma, rho=0, sync_every=100, batches_per_epoch=10)
        *_, y = train(parle, parameter, 99)
        return (y - start).norm()

    assert distance(0.0) > distance(0.3) > distance(GAMMA_CAP)


def test_fault_4_momentum_is_nesterovs_as_in_torch(comm, start):
    parameter = nn.Parameter(torch.zeros(1))
    parle = Parle([parameter], comm, lr=1.0, momentum=0.9, sync_every=5, gamma=0, rho=0, batches_per_epoch=10)
    parameter.grad = torch.ones(1)
    parle.step()
    assert parameter.item() == pytest.approx(-1.9)  # the published script's first step was 2


def test_fault_5_the_outer_step_starts_at_the_anchor_not_at_the_last_iterate(comm):
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    parle = Parle([parameter], comm, lr=0.1, momentum=0, alpha=0, sync_every=1 + 1, gamma=0, rho=0, batches_per_epoch=9)
    for _ in range(2):
        parameter.grad = torch.ones(1, dtype=torch.float64)
        parle.step()
    y = z = -0.2
    assert parameter.item() == pytest.approx(0 - 0.1 * (0 - z))
    assert parameter.item() != pytest.approx(y - 0.1 * (0 - z))


class Twin:
    """A communicator of this rank and one that does the very same. Its reduce, like MPI's, writes into what it got."""

    rank, size = 0, 2

    def __init__(self):
        self.live, self.during = None, []

    def allgather(self, value):
        return [value, value]

    def Split(self, color):
        return type("One", (), dict(rank=0, size=1))

    def Iallreduce(self, in_place, tensor):
        tensor.mul_(2)
        self.during.append(self.live.detach().clone())
        return self.Ibarrier()

    def Ibarrier(self, *_):
        return type("Done", (), dict(Test=lambda self: True))()

    Ibcast = Ibarrier


@pytest.mark.parametrize("sync_every", [1, 3])
def test_fault_6_the_reduce_does_not_write_into_the_live_weights(start, sync_every):
    parameter, twin = nn.Parameter(start.clone()), Twin()
    twin.live = parameter
    parle = Parle([parameter], twin, lr=0.1, gamma=0, rho=0, sync_every=sync_every, batches_per_epoch=10)
    reference = nn.Parameter(start.clone())
    sgd = torch.optim.SGD([reference], lr=0.1, momentum=0.9, nesterov=True, fused=True)
    for _ in zip(train(parle, parameter, sync_every), train(sgd, reference, sync_every), strict=True):
        pass
    assert torch.equal(twin.during[-1], reference)
    assert torch.allclose(parle.master, parameter.detach())
    if sync_every == 1:
        assert torch.equal(parameter, reference)


def test_fault_7_n_is_the_number_of_replicas_not_overwritten_by_the_world(comm, start):
    """The program's side of it: test_parle_mpi.py, test_n_3_starts_three_ranks_and_trains_three_replicas."""
    with pytest.raises(ValueError, match="Invalid replicas value: 3, for 1 ranks"):
        Parle([nn.Parameter(start)], comm, lr=0.1, replicas=3, batches_per_epoch=10)
