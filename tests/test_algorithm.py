"""The equations, the presets compared with independent implementations, and the published script's faults."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from parle.algorithm import GAMMA_MAX, PRESETS, inner_step, outer_step, round_message, scoped, steps_per_round
from parle_mpi import Parle

SETTINGS = dict(lr=0.1, momentum=0.9, weight_decay=0.02)


def preset(name, n=1):
    values = {key: value for key, value in PRESETS[name].items() if key != "replicas"}
    return values | ({"rho": 1 / n} if values["rho"] == "1/n" else {})


# A whole number of vector instructions: the fused kernel may round the rest of a tensor differently
SIZE = 64


def losses(count):
    """Of a fixed random quadratic with noise in every mini-batch: the same for every optimizer."""
    random = torch.Generator().manual_seed(3)
    h, b = torch.rand(SIZE, generator=random) + 0.1, torch.randn(SIZE, generator=random)
    for _ in range(count):
        noise = torch.randn(SIZE, generator=random)
        yield lambda y, noise=noise: (0.5 * h * (y - b) ** 2 + noise * y).sum()


def train(optimizer, parameter, count):
    for loss in losses(count):
        optimizer.zero_grad()
        loss(parameter).backward()
        optimizer.step()
        yield parameter.detach().clone()


@pytest.fixture
def start():
    return torch.randn(SIZE, dtype=torch.float32)


def test_scoping_grows_with_rounds_up_to_the_cap():
    assert scoped(0.01, 0, 469, 1.0) == 0.01
    assert scoped(0.01, 1, 469, 1.0) == pytest.approx(0.01 * (1 + 1 / 938))
    assert scoped(0.01, 469, 469, 1.0) == pytest.approx(0.01 * math.exp(0.5), rel=1e-3)
    assert scoped(0.01, 10**4, 469, 1.0) == 1.0
    assert scoped(0.0, 10**9, 1, 1.0) == 0.0
    assert scoped(0.01, 10**9, 1, 1.0) == 1.0


def test_auto_round_length_is_lr_over_gamma_at_least_one():
    assert [steps_per_round("auto", 0.1, gamma) for gamma in (0.004, 0.01, 0.03, 0.1, 1.0)] == [25, 10, 3, 1, 1]
    assert steps_per_round(25, 0.1, 0.01) == 25


def test_inner_step_matches_hand_computation():
    y, u, x = torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([1.0])
    inner_step(y, torch.tensor([3.0]), u, x, coupling=0.1, lr=0.2, momentum=0.9, weight_decay=0.05)
    d = 3 + 0.05 * 2 + 0.1 * (2 - 1)
    assert u.item() == pytest.approx(0.9 * 0.5 + d)
    assert y.item() == pytest.approx(2 - 0.2 * (d + 0.9 * (0.9 * 0.5 + d)))


def test_outer_step_matches_hand_computation():
    x, v = torch.tensor([1.0]), torch.tensor([0.5])
    outer_step(x, torch.tensor([0.4]), torch.tensor([0.1]), v, coupling=0.75, lr=0.2, momentum=0.9)
    d = (1 - 0.4) + 0.75 * (1 - 0.1)
    assert v.item() == pytest.approx(0.9 * 0.5 + d)
    assert x.item() == pytest.approx(1 - 0.2 * (d + 0.9 * (0.9 * 0.5 + d)))


def test_mean_of_the_anchors_follows_the_outer_update():
    anchors, averages, momenta = torch.randn(3, 4, 7, dtype=torch.float64).unbind()
    master, momentum, z = anchors.mean(0), momenta.mean(0), averages.mean(0)
    for x, average, v in zip(anchors, averages, momenta, strict=True):
        outer_step(x, average, z, v, coupling=0.75, lr=0.1, momentum=0.9)
    outer_step(master, z, z, momentum, coupling=0.75, lr=0.1, momentum=0.9)
    assert torch.allclose(master, anchors.mean(0), rtol=1e-12, atol=0)
    assert torch.allclose(momentum, momenta.mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("momentum", "pull"), [(0.0, 0.75), (0.9, 10.0)])
def test_outer_update_diverges_above_the_stated_limit(momentum, pull):
    limit = (2 + 2 * momentum) / (1 + 2 * momentum)
    for share, stable in ((0.97, True), (1.03, False)):
        x, z, v = torch.ones(1), torch.zeros(1), torch.zeros(1)
        for _ in range(300):
            outer_step(x, z, z, v, coupling=pull, lr=share * limit / (1 + pull), momentum=momentum)
        assert (abs(x) < 0.01) == stable


# presets


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_preset_is_bitwise_torch_sgd(comm, start, momentum):
    settings = SETTINGS | dict(momentum=momentum)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    parle = Parle([ours], comm, batches_per_epoch=5, **preset("sgd"), **settings)
    sgd = torch.optim.SGD([theirs], nesterov=momentum > 0, fused=True, **settings)
    for got, wanted in zip(train(parle, ours, 50), train(sgd, theirs, 50), strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(parle.master, theirs.detach())


def test_inner_loop_without_gamma_is_bitwise_torch_sgd(comm, start):
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    parle = Parle([ours], comm, batches_per_epoch=5, sync_every=26, gamma=0, rho=0, **SETTINGS)
    sgd = torch.optim.SGD([theirs], nesterov=True, fused=True, **SETTINGS)
    for got, wanted in zip(train(parle, ours, 25), train(sgd, theirs, 25), strict=True):
        assert torch.equal(got, wanted)


def test_entropy_sgd_preset_matches_two_nested_torch_sgds(comm, start):
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
        assert torch.allclose(got, y.detach(), rtol=1e-12, atol=1e-14)
    assert torch.allclose(parle.master, x.detach(), rtol=1e-12, atol=1e-14)


def test_elastic_sgd_preset_starts_at_a_coupling_of_one():
    for n in (1, 2, 6):
        assert scoped(preset("elastic-sgd", n)["rho"] * 1 * n, 0, 5, 10.0) == pytest.approx(1)


# the six faults of the published script, and the seventh


def test_fault_1_scoping_counts_rounds_not_tensors(comm):
    parameters = [nn.Parameter(torch.randn(2)) for _ in range(14)]
    parameters[0].grad = torch.zeros(2)
    parle = Parle(parameters, comm, lr=0.1, sync_every=5, batches_per_epoch=10)
    for _ in range(20):
        parle.step()
    assert parle.rounds_done == 4
    parle.step()
    assert parle.param_groups[0]["gamma_k"] == pytest.approx(0.01 * 1.05**4)


def test_fault_2_rho_is_not_overwritten(comm, start):
    parameter = nn.Parameter(start)
    parameter.grad = torch.zeros_like(start)
    parle = Parle([parameter], comm, lr=0.1, rho=0.01, batches_per_epoch=10)
    for _ in range(60):
        parle.step()
    assert parle.param_groups[0]["rho"] == 0.01
    assert parle.param_groups[0]["coupling_k"] == pytest.approx(0.01 * 25 * 1 * 1.05**2)


def test_fault_3_higher_gamma_stays_closer_to_the_anchor(comm, start):
    def distance(gamma):
        parameter = nn.Parameter(start.clone())
        parle = Parle([parameter], comm, lr=0.1, gamma=gamma, rho=0, sync_every=50, batches_per_epoch=10)
        *_, y = train(parle, parameter, 49)
        return (y - start).norm()

    assert distance(0.0) > distance(0.3) > distance(GAMMA_MAX)


def test_fault_4_momentum_is_nesterov_momentum(comm, start):
    parameter = nn.Parameter(torch.zeros(1))
    parle = Parle([parameter], comm, lr=1.0, momentum=0.9, sync_every=5, gamma=0, rho=0, batches_per_epoch=10)
    parameter.grad = torch.ones(1)
    parle.step()
    assert parameter.item() == pytest.approx(-1.9)  # the published script's first step was 2


def test_fault_5_outer_step_starts_at_the_anchor(comm):
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    parle = Parle([parameter], comm, lr=0.1, momentum=0, alpha=0, sync_every=1 + 1, gamma=0, rho=0, batches_per_epoch=9)
    for _ in range(2):
        parameter.grad = torch.ones(1, dtype=torch.float64)
        parle.step()
    y = z = -0.2
    assert parameter.item() == pytest.approx(0 - 0.1 * (0 - z))
    assert parameter.item() != pytest.approx(y - 0.1 * (0 - z))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-9])  # float16 has no number between 0 and 6e-8
def test_rounding_errors_of_messages_do_not_add_up(dtype, scale):
    error, sent, meant = (torch.zeros(100, dtype=torch.float64) for _ in range(3))
    for number in range(1000):
        message = scale * torch.randn(100, dtype=torch.float64).add_(0.3)
        meant += message
        previous = error.clone()
        rounded = round_message(message.clone(), error, dtype)
        assert rounded.dtype == dtype
        torch.testing.assert_close(rounded.double() + error, message + previous, rtol=1e-12, atol=0)
        sent += rounded
        assert (sent - meant).abs().max() <= 6e-8 + 1e-2 * 5 * scale, number


class Twin:
    """A communicator of this rank and another one that does exactly the same. Its reduce writes into its argument."""

    rank, size = 0, 2

    def __init__(self, comm):
        self.comm, self.live, self.during = comm, None, []

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def Idup(self):
        return self, self.comm.Ibarrier()

    def Free(self):
        pass

    def Iallgather(self, sent, received):
        received[:] = sent
        return self.comm.Ibarrier()

    def Iallgatherv(self, sent, received):
        received[0][:] = np.tile(sent, 2)
        return self.comm.Ibarrier()

    def Iallreduce(self, in_place, tensor, *_):
        tensor.mul_(2)
        tensor[-3:] = tensor[-6:-3].div_(2)  # the row of each rank
        self.during.append(self.live.detach().clone())
        return self.comm.Ibarrier()


@pytest.mark.parametrize("sync_every", [1, 3])
def test_fault_6_reduce_does_not_write_into_live_weights(comm, start, sync_every):
    parameter, twin = nn.Parameter(start.clone()), Twin(comm)
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


def test_fault_7_replicas_is_not_overwritten_by_world_size(comm, start):
    with pytest.raises(ValueError, match=r"replicas value: 3.*ranks, 1"):
        Parle([nn.Parameter(start)], comm, lr=0.1, replicas=3, batches_per_epoch=10)
