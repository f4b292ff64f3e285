"""Another inner optimizer than SGD, by the argument `inner`."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

import parle_gpu
import parle_mpi
from parle.algorithm import pull
from tests.reference import Reference, nesterov

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
SETTINGS = dict(sync_every=3, batches_per_epoch=4)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def build(networks, inner=ADAMW, **settings):
    return parle_gpu.Parle([model.parameters() for model in networks], inner=inner, **SETTINGS | settings)


@pytest.fixture(params=["mpi", "gpu"])
def build_one(request, comm):
    """Build either class over one replica."""
    if request.param == "mpi":
        return lambda parameters, **settings: parle_mpi.Parle(parameters, comm, **SETTINGS | settings)
    return lambda parameters, **settings: parle_gpu.Parle([parameters], **SETTINGS | settings)


def train(optimizer, networks, steps, scheduler=None):
    """Train on mini-batches that depend on step and replica."""
    for step in steps:
        optimizer.zero_grad()
        for number, model in enumerate(networks):
            random = torch.Generator().manual_seed(100 * step + number)
            inputs = torch.randn(8, 4, generator=random).to(model[0].weight.dtype)
            (model(inputs) - inputs[:, :3].sin()).pow(2).mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


# The equations


class AdamWReference(Reference):
    """The float64 reference with AdamW in place of SGD inside, written from Loshchilov and Hutter's Algorithm 2."""

    def __init__(self, *arguments, betas=(0.9, 0.999), eps=1e-8, **settings):
        super().__init__(*arguments, momentum=None, outer_momentum=0.8, **settings)
        self.betas, self.eps, self.lr0 = betas, eps, self.lr
        self.m, self.v2, self.t = np.zeros_like(self.xa), np.zeros_like(self.xa), 0

    def adamw(self, weights, a, gradient):
        (b1, b2), m, v = self.betas, self.m[a], self.v2[a]
        weights -= self.lr * self.weight_decay * weights
        m[:] = b1 * m + (1 - b1) * gradient
        v[:] = b2 * v + (1 - b2) * gradient**2
        weights -= self.lr * (m / (1 - b1**self.t)) / (np.sqrt(v / (1 - b2**self.t)) + self.eps)

    def step(self, gradients):
        if self.i == 0:
            growth = (1 + 1 / (2 * self.nb)) ** self.k
            self.gamma = min(self.gamma0 * growth, 1.0)
            self.c = min(self.rho0 * self.L * self.n * growth, 10.0)
            self.y, self.z = self.xa.copy(), self.xa.copy()
        self.i, self.t = self.i + 1, self.t + 1
        for a in range(self.n):
            center, coupling = (self.x, self.c) if self.L == 1 else (self.xa[a], self.gamma)
            self.y[a] -= self.lr * coupling * (self.y[a] - center)
            self.adamw(self.y[a], a, gradients[a])
            self.z[a] = self.alpha * self.z[a] + (1 - self.alpha) * self.y[a]
        if self.L == 1:
            self.xa = self.y.copy()
            self.x = self.xa.mean(0)
            self.k, self.i = self.k + 1, 0
        elif self.i == self.L:
            z = self.z.mean(0)
            for a in range(self.n):
                d = (self.xa[a] - self.z[a]) + self.c * (self.xa[a] - z)
                nesterov(self.xa[a], self.v[a], d, self.s / (1 + self.c), self.outer_momentum)
            self.move_master(z)
            self.y = self.xa.copy()
            self.k, self.i = self.k + 1, 0


@pytest.mark.parametrize("sync_every", [1, 4])
@pytest.mark.parametrize("replicas", [1, 3])
def test_adamw_inside_equals_the_float64_reference(sync_every, replicas):
    sizes, random = [3, 5], np.random.default_rng(0)
    start, minima = random.normal(size=8), random.normal(size=(replicas, 8))
    first = np.arange(8) < sizes[0]
    reference = AdamWReference(
        *(start, replicas, sync_every),
        **dict(nb=4, lr=np.where(first, 0.02, 0.05), weight_decay=np.where(first, 0.1, 0.0)),
        **dict(gamma0=0.5, rho0=0.05, alpha=0.6, s=0.3),
    )
    own = [[nn.Parameter(torch.tensor(part)) for part in np.split(start, [sizes[0]])] for _ in range(replicas)]
    groups = [[dict(params=[a], lr=0.02), dict(params=[b], weight_decay=0.0)] for a, b in own]
    optimizer = parle_gpu.Parle(
        groups,
        inner=lambda groups: torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1),
        **dict(sync_every=sync_every, batches_per_epoch=4, gamma=0.5, rho=0.05, alpha=0.6),
        **dict(outer_lr_scale=0.3, outer_momentum=0.8),
    )
    scheduler = LambdaLR(optimizer, lambda step: 1.0 if step < 9 else 0.25)
    for step in range(20):
        gradients = reference.y - minima + random.normal(size=minima.shape)
        for parameters, gradient in zip(own, gradients, strict=True):
            for parameter, part in zip(parameters, np.split(gradient, [sizes[0]]), strict=True):
                parameter.grad = torch.tensor(part)
        reference.lr = reference.lr0 * (1.0 if step < 9 else 0.25)
        reference.step(gradients)
        optimizer.step()
        scheduler.step()
        for parameters, expected in zip(own, reference.y, strict=True):
            np.testing.assert_allclose(torch.cat(parameters).detach(), expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(optimizer.master, reference.x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("momentum", "weight_decay", "settings"),
    [
        (0.9, 0.01, dict(gamma=0.0)),
        (0.9, 0.01, dict(gamma=0.0, sync_every=1, rho=0.0)),
        (0.0, 0.0, dict(gamma=0.3)),
        (0.0, 0.0, dict(sync_every=1, rho=0.2)),
    ],
)
def test_sgd_inside_equals_the_built_in_step(momentum, weight_decay, settings):
    """With momentum or weight decay only where nothing is pulled: the built-in pull is a part of the gradient."""
    rates, masters = dict(lr=0.1, momentum=momentum, weight_decay=weight_decay), []
    settings = dict(batches_per_epoch=10**12, outer_momentum=0.9) | settings  # so that c_k is constant
    for own in (rates, dict(inner=functools.partial(torch.optim.SGD, nesterov=momentum > 0, **rates))):
        networks = [network().double() for _ in range(3)]
        scale = 1.0 if "lr" in own else 0.1 * (1 + 0.01 * 3 * 3)  # the outer lr is then the same
        optimizer = parle_gpu.Parle(
            [model.parameters() for model in networks],
            **SETTINGS | own | dict(outer_lr_scale=scale) | settings,
        )
        train(optimizer, networks, range(20))
        masters.append(optimizer.master)
    torch.testing.assert_close(*masters, rtol=1e-10, atol=1e-10)


# State


def optimizers():
    """Return functions that build torch's optimizers whose step needs no closure."""
    adaptive = ("AdamW", "Adam", "Adagrad", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "Adafactor")
    return [functools.partial(getattr(torch.optim, name), lr=0.01) for name in (*adaptive, "SGD", "ASGD", "Rprop")]


@pytest.mark.parametrize("inner", optimizers(), ids=lambda inner: inner.func.__name__)
def test_every_optimizer_of_torch_trains_and_resumes_bitwise(build_one, inner):
    model, resumed = network(), network()
    optimizer, other = (build_one(own.parameters(), inner=inner) for own in (model, resumed))
    before = flat(model)
    train(optimizer, [model], range(7))  # in the middle of a round
    assert optimizer.step_in_round == 1 and (flat(model) - before).norm() > 1e-4
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for own, network_ in ((optimizer, model), (other, resumed)):
        train(own, [network_], range(7, 20))
    assert torch.equal(optimizer.master, other.master)
    assert torch.equal(flat(model), flat(resumed))


def test_saved_state_resumes_bitwise_and_is_copied(tmp_path):
    networks, resumed = ([network() for _ in range(2)] for _ in range(2))
    optimizer, other = build(networks), build(resumed)
    train(optimizer, networks, range(4))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    for model, copied in zip(networks, resumed, strict=True):
        copied.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    saved = copy.deepcopy(state)
    for own, models in ((optimizer, networks), (other, resumed)):
        train(own, models, range(4, 12))
    assert torch.equal(optimizer.master, other.master)
    for number, values in saved["state"].items():
        for name, value in values["inner"].items():
            assert torch.equal(value, state["state"][number]["inner"][name]), name


def test_state_of_another_inner_optimizer_is_rejected():
    networks = [network(), network()]
    sgd, adamw = build(networks, inner=functools.partial(torch.optim.SGD, lr=0.1)), build([network(), network()])
    with pytest.raises(ValueError, match="different inner optimizer"):
        adamw.load_state_dict(sgd.state_dict())
    without = parle_gpu.Parle([network().parameters() for _ in range(2)], lr=0.1, **SETTINGS)
    with pytest.raises(ValueError, match="different inner optimizer"):
        adamw.load_state_dict(without.state_dict())
    with pytest.raises(ValueError, match="different inner optimizer"):
        without.load_state_dict(adamw.state_dict())


def test_inner_momentum_takes_no_memory():
    optimizer = build([network()])
    assert all("inner_momentum_buffer" not in values for values in optimizer.state.values())


@pytest.mark.parametrize("inner", [ADAMW, functools.partial(torch.optim.Adagrad, lr=0.1)])
def test_restarted_replica_and_reset_clear_the_state(inner):
    networks = [network() for _ in range(3)]
    optimizer = build(networks, inner=inner)
    train(optimizer, networks, range(3))
    optimizer.zero_grad()
    for model in networks:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, math.nan if model is networks[1] else 0.1)
    for _ in range(3):
        optimizer.step()
    assert optimizer.nonfinite_replicas == [1]
    train(optimizer, networks, range(3, 4))
    steps = [optimizer.state_dict()["state"][number]["inner"]["step"].item() for number in (0, 4, 8)]
    assert steps == [7, 1, 7]
    train(optimizer, networks, range(4, 9))
    assert all(flat(model).isfinite().all() for model in networks) and optimizer.nonfinite_replicas == []
    optimizer.reset()
    train(optimizer, networks, range(9, 10))
    assert {values["inner"]["step"].item() for values in optimizer.state_dict()["state"].values()} == {1}


# Settings


def test_scheduler_drives_the_inner_lr_only(build_one):
    model = network()
    optimizer = build_one(model.parameters(), inner=ADAMW, outer_lr_scale=0.5, rho=0.3, alpha=0.0)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 if step < 3 else 0.1)
    train(optimizer, [model], range(3), scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    anchor = optimizer.master
    train(optimizer, [model], range(3, 5), scheduler)
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = flat(model)
    optimizer._inner[0].step = lambda: None  # the last iterate is then the inner average
    optimizer.step()
    assert (before - anchor).abs().max() < 3 * 1.1e-3  # two steps of AdamW
    torch.testing.assert_close(optimizer.master, anchor + 0.5 * (before - anchor), rtol=1e-4, atol=1e-7)


def test_groups_hold_the_settings_and_their_changes_take_effect():
    networks = [network() for _ in range(2)]
    groups = [
        [dict(params=list(model[0].parameters()), betas=(0.5, 0.6), lr=0.3), dict(params=model[2].parameters())]
        for model in networks
    ]
    optimizer = parle_gpu.Parle(groups, inner=ADAMW, **SETTINGS)
    first, second = optimizer.param_groups[:2]
    assert (first["lr"], first["weight_decay"], first["inner"]["betas"]) == (0.3, 0.1, (0.5, 0.6))
    assert (second["lr"], second["inner"]["betas"]) == (1e-2, (0.9, 0.999)) and "betas" not in first
    for group in optimizer.param_groups:
        group["weight_decay"], group["inner"]["betas"] = 0.2, (0.7, 0.8)
    seen = []

    def record(inner, arguments, keywords):
        if inner is not optimizer:
            seen.extend((group["lr"], group["weight_decay"], group["betas"]) for group in inner.param_groups)

    handle = register_optimizer_step_pre_hook(record)
    train(optimizer, networks, range(1))
    handle.remove()
    assert seen == [(0.3, 0.2, (0.7, 0.8)), (1e-2, 0.2, (0.7, 0.8))] * 2


def test_settings_of_inner_optimizers_must_agree():
    networks = [network() for _ in range(2)]
    optimizer = build(networks)
    optimizer.param_groups[1]["inner"]["betas"] = (0.9, 0.99)
    with pytest.raises(RuntimeError, match=r"betas\[1\]"):
        train(optimizer, networks, range(1))


def test_outer_step_stays_stable_when_the_coupling_grows(recwarn):
    networks = [network() for _ in range(3)]
    optimizer = build(networks, rho=0.5)
    train(optimizer, networks, range(30))
    group = optimizer.param_groups[0]
    assert group["coupling_k"] == 10 and (group["outer_lr_scale"], group["outer_momentum"]) == (0.9, 0.0)
    assert not recwarn.list


def test_frozen_parameters_and_missing_gradients_are_left_alone():
    model = network()
    model[0].requires_grad_(False)
    optimizer = build([model])
    frozen, bias = model[0].weight.clone(), model[2].bias.clone()
    for step in range(2):  # within a round: an outer step would follow
        optimizer.zero_grad()
        model[2].weight.grad = torch.ones_like(model[2].weight) * (step + 1)
        optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    torch.testing.assert_close(model[2].bias, bias)  # pulled to the anchor, where it is, but not decayed


# Bad input


def other_parameters(parameters):
    return torch.optim.AdamW(network().parameters())


def fewer(parameters):
    return torch.optim.AdamW(list(parameters)[1:])


class SignSGD(torch.optim.Optimizer):
    """An optimizer of a user, whose step takes no closure."""

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad.sign())


def test_step_need_not_take_a_closure(build_one):
    model = network()
    optimizer, before = (
        build_one(model.parameters(), inner=lambda own: SignSGD(own, dict(lr=0.1)), gamma=0.0),
        flat(model),
    )
    train(optimizer, [model], range(1))
    assert set((flat(model) - before).abs().mul(10).round(decimals=4).tolist()) == {1.0}


class NeedsLoss(torch.optim.Optimizer):
    def step(self, loss):
        pass


class Counting(torch.optim.Optimizer):
    """An optimizer that keeps its progress in its groups, as Prodigy and Schedule-Free do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1


def test_optimizer_with_progress_in_its_groups_is_an_error(build_one):
    model = network()
    optimizer = build_one(model.parameters(), inner=lambda own: Counting(own, dict(lr=0.1, k=0)))
    with pytest.raises(RuntimeError, match=r"Counting keeps its progress \(k\)"):
        train(optimizer, [model], range(1))


class CountingInNewKey(torch.optim.Optimizer):
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1


class Decaying(torch.optim.Optimizer):
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = group["lr"] * 0.5


class CountingGlobally(torch.optim.Optimizer):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sign"] = parameter.grad.sign()
        self.state["global"]["step"] = self.state["global"].get("step", 0) + 1


@pytest.mark.parametrize(
    ("kind", "words"), [(CountingInNewKey, r"\(step\)"), (Decaying, r"\(lr\)"), (CountingGlobally, "no parameter")]
)
def test_progress_that_would_not_be_saved_is_an_error(build_one, kind, words):
    model = network()
    optimizer = build_one(model.parameters(), inner=lambda own: kind(own, dict(lr=0.1)))
    with pytest.raises(RuntimeError, match=words):
        train(optimizer, [model], range(1))


class SetsUpNewParameters(torch.optim.Optimizer):
    """An optimizer that sets up the state of the parameters that have none."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter not in self.state:
                    self.state[parameter]["sum"] = torch.zeros_like(parameter)
                self.state[parameter]["sum"] += parameter.grad


def test_reading_the_state_before_the_first_step_changes_nothing(build_one):
    model = network()
    optimizer = build_one(model.parameters(), inner=lambda own: SetsUpNewParameters(own, dict(lr=0.1)))
    optimizer.state_dict()
    train(optimizer, [model], range(2))
    assert all(values["inner"].keys() == {"sum"} for values in optimizer.state_dict()["state"].values())


def test_changes_of_momentum_reach_the_inner_optimizer():
    trained = []
    for momentum in (0.9, 0.5):
        model = network()
        inner = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        optimizer = build([model], inner=inner, gamma=0.0)
        optimizer.param_groups[0]["momentum"] = momentum
        train(optimizer, [model], range(3))
        trained.append(flat(model))
    assert not torch.equal(*trained)


def test_pull_moves_no_farther_than_to_the_anchor():
    weights, anchor = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    pull(weights, anchor, coupling=5.0, lr=1.0)
    assert torch.equal(weights, anchor)


def test_loaded_states_have_the_dtype_that_the_inner_optimizer_needs():
    model, resumed = network(), network()
    fused = functools.partial(torch.optim.AdamW, fused=True)
    optimizer, other = build([model], inner=fused), build([resumed], inner=fused)
    train(optimizer, [model], range(2))
    state = optimizer.state_dict()
    for values in state["state"].values():
        values["inner"] = values["inner"] | dict(step=values["inner"]["step"].double())
    other.load_state_dict(state)
    assert {values["inner"]["step"].dtype for values in other.state_dict()["state"].values()} == {torch.float32}


class WithoutLr(torch.optim.Optimizer):
    def step(self, closure=None):
        pass


def split(parameters):
    return torch.optim.AdamW([dict(params=parameters[:2]), dict(params=parameters[2:])])


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        (other_parameters, "parameters or groups that it is given"),
        (fewer, "parameters or groups that it is given"),
        (split, "pass the groups to Parle"),
        (lambda parameters: None, "NoneType"),
        (torch.optim.LBFGS, "LBFGS needs a closure"),
        (lambda parameters: NeedsLoss(parameters, dict(lr=0.1)), "NeedsLoss needs a loss"),
        (lambda parameters: WithoutLr(parameters, {}), "WithoutLr has no lr"),
    ],
)
def test_unsuitable_inner_optimizers_are_rejected(build_one, inner, words):
    with pytest.raises(ValueError, match=words):
        build_one(network().parameters(), inner=inner)


def test_round_length_cannot_follow_an_lr_of_another_scale(build_one):
    group = dict(params=list(network().parameters()), sync_every="auto")
    for params, settings in ((network().parameters(), dict(sync_every="auto")), ([group], {})):
        with pytest.raises(ValueError, match=r"sync_every.*auto.*number"):
            build_one(params, inner=ADAMW, **settings)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_settings_of_the_inner_optimizer_belong_to_it(build_one, name):
    with pytest.raises(ValueError, match=f"Invalid {name} value: 0.5"):
        build_one(network().parameters(), inner=ADAMW, **{name: 0.5})


def test_without_inner_nothing_is_added():
    optimizer = parle_gpu.Parle([network().parameters()], lr=0.1, **SETTINGS)
    assert "inner" not in optimizer.param_groups[0]
    assert all("inner" not in values for values in optimizer.state.values())


def test_one_replica_without_coupling_is_the_inner_optimizer():
    model, plain = network(), network()
    optimizer = build([model], sync_every=1, gamma=0.0, rho=0.0)
    adamw = ADAMW(plain.parameters())
    train(optimizer, [model], range(10))
    train(adamw, [plain], range(10))
    assert torch.equal(flat(model), flat(plain))
