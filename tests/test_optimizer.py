"""Parle as a citizen of torch.optim."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import parle_gpu
import parle_mpi


@pytest.fixture(params=["mpi", "gpu"])
def parle(request, comm):
    """Either class, with the parameters of one replica."""
    if request.param == "mpi":
        return lambda parameters, **settings: parle_mpi.Parle(parameters, comm, **settings)
    return lambda parameters, **settings: parle_gpu.Parle([parameters], **settings)


@pytest.fixture
def build(parle):
    def build(parameters, **settings):
        return parle(parameters, **(dict(lr=0.1, sync_every=3, batches_per_epoch=4) | settings))

    return build


def network():
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def batch(step):
    random = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 4, 4, generator=random), torch.randint(0, 3, (8,), generator=random)


def train(model, optimizer, steps):
    for step in steps:
        inputs, targets = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def weights(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("lr", "weight_decay", "gamma", "rho", "outer_step") for value in (-1, math.nan)),
        *((name, math.inf) for name in ("lr", "weight_decay", "gamma", "rho", "outer_step")),
        *((name, value) for name in ("momentum", "alpha", "outer_momentum") for value in (-0.1, 1, math.nan)),
        *((name, value) for name in ("sync_every", "batches_per_epoch") for value in (0, -3, 2.5, "often", None)),
    ],
)
def test_an_invalid_value_is_named(build, name, value):
    with pytest.raises(ValueError, match=f"Invalid {name} value: {value}"):
        build([nn.Parameter(torch.zeros(2))], **{name: value})


@pytest.mark.parametrize("value", [0, -1, 2, 1.0])
def test_an_invalid_number_of_replicas_is_named(comm, value):
    with pytest.raises(ValueError, match=f"Invalid replicas value: {value}"):
        parle_mpi.Parle([nn.Parameter(torch.zeros(2))], comm, lr=0.1, batches_per_epoch=4, replicas=value)


def test_an_invalid_value_in_a_group_is_named(build):
    with pytest.raises(ValueError, match="Invalid rho value: -1"):
        build([dict(params=[nn.Parameter(torch.zeros(2))], rho=-1)])


def test_auto_needs_a_gamma(build):
    with pytest.raises(ValueError, match="Invalid sync_every value: auto"):
        build([nn.Parameter(torch.zeros(2))], sync_every="auto", gamma=0)


def test_lr_and_batches_per_epoch_are_required(parle):
    for name, given in (("batches_per_epoch", dict(lr=0.1)), ("lr", dict(batches_per_epoch=4))):
        with pytest.raises(TypeError, match=f"argument: '{name}'"):
            parle([nn.Parameter(torch.zeros(2))], **given)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([], "empty parameter list|no parameter that requires a gradient"),
        ([nn.Parameter(torch.zeros(2), requires_grad=False)], "no parameter that requires a gradient"),
        ([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2).double())], "must be float32"),
        ([nn.Parameter(torch.zeros(2).bfloat16())], "must be float32"),
        ([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))], "one device"),
    ],
)
def test_parameters_that_do_not_fit_one_vector_are_refused(build, parameters, message):
    with pytest.raises(ValueError, match=message):
        build(parameters)


def test_parameters_that_share_memory_but_are_not_one_are_refused(build):
    memory = torch.zeros(2)
    with pytest.raises(ValueError, match="share their memory"):
        build([nn.Parameter(memory), nn.Parameter(memory)])


def test_a_tied_parameter_is_one(build):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    optimizer = build(model.parameters())
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    assert model[2].weight is model[0].weight
    assert len(optimizer.master) == 16


def test_closure_runs_with_gradients_on_and_its_loss_comes_back(build):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = build([parameter])

    def closure():
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 2.0
    assert torch.equal(parameter.grad, torch.full((2,), 2.0))
    assert not torch.equal(parameter.detach(), torch.ones(2))


def test_hooks_run_around_a_step(build):
    optimizer, calls = build([nn.Parameter(torch.ones(2))]), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6], 0.2),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=9, cycle_momentum=False),
    ],
)
def test_schedulers_drive_the_inner_step_as_they_drive_torchs_sgd(build, schedule):
    ours, theirs = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    parle = build([ours], sync_every=100, gamma=0)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=True, fused=True)
    schedulers = schedule(parle), schedule(sgd)
    for _ in range(8):
        for parameter, optimizer, scheduler in zip((ours, theirs), (parle, sgd), schedulers, strict=True):
            parameter.grad = torch.ones(2)
            optimizer.step()
            scheduler.step()
        assert torch.equal(ours, theirs)


def test_groups_have_their_own_settings(build):
    tensors = [torch.randn(3), torch.randn(2)]
    settings = [dict(lr=0.1, weight_decay=0.1), dict(lr=0.02, momentum=0.5, gamma=0.2, alpha=0.5, outer_step=2.0)]
    together = [nn.Parameter(tensor.clone()) for tensor in tensors]
    apart = [nn.Parameter(tensor.clone()) for tensor in tensors]
    one = build([dict(params=[p], **group) for p, group in zip(together, settings, strict=True)])
    two = [build([p], **group) for p, group in zip(apart, settings, strict=True)]
    for step in range(7):
        for parameter in (*together, *apart):
            parameter.grad = torch.full_like(parameter, step - 2.0)
        for optimizer in (one, *two):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    assert torch.equal(one.master, torch.cat([optimizer.master for optimizer in two]))


def test_groups_share_sync_every(build):
    with pytest.raises(ValueError, match="Invalid sync_every values"):
        build([dict(params=[nn.Parameter(torch.ones(1))], sync_every=L) for L in (2, 3)])


def test_a_group_cannot_be_added_later(build):
    optimizer = build([nn.Parameter(torch.ones(2))])
    with pytest.raises(RuntimeError, match="all its groups when it is built"):
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(2))]))


def test_no_gradient_is_a_zero_gradient(build):
    with_none, with_zero = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizers = [build([parameter], weight_decay=0.1) for parameter in (with_none, with_zero)]
    for step in range(5):
        for parameter, optimizer in zip((with_none, with_zero), optimizers, strict=True):
            parameter.grad = torch.ones(2) if step < 2 else None
            if parameter is with_zero and step >= 2:
                parameter.grad = torch.zeros(2)
            optimizer.step()
    assert torch.equal(with_none, with_zero)
    assert with_none[0] != 1


def test_a_frozen_parameter_stays_and_is_copied_with_the_master(build):
    model = network()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer = build(model.parameters(), weight_decay=0.1)
    train(model, optimizer, range(4))
    assert torch.equal(model[0].weight, frozen)
    other = network()
    optimizer.copy_master_to(other)
    assert torch.equal(other[0].weight, frozen)
    assert len(optimizer.master) == sum(p.numel() for p in model.parameters()) - frozen.numel()


@pytest.mark.parametrize("sync_every", [1, 3])
def test_strides_of_parameters_do_not_matter(build, sync_every):
    plain = torch.randn(4, 3, 2, 2)
    forms = [plain, plain.to(memory_format=torch.channels_last), plain.permute(3, 2, 1, 0), torch.randn(4, 6)[:, ::2]]
    shapes = [form.clone() if form.is_contiguous() else form for form in forms]
    for form in shapes:
        values = form.clone(memory_format=torch.contiguous_format)
        ours, theirs = nn.Parameter(form), nn.Parameter(values.clone())
        optimizers = [build([p], sync_every=sync_every) for p in (ours, theirs)]
        assert torch.equal(ours, values)
        for _ in range(7):
            gradient = torch.randn(form.shape)
            ours.grad, theirs.grad = gradient.clone(), gradient.clone()
            for optimizer in optimizers:
                optimizer.step()
            assert torch.equal(ours, theirs)
        assert sorted(optimizers[0].master.tolist()) == sorted(optimizers[1].master.tolist())


def test_channels_last_weights_stay_so_and_are_views_of_one_vector(build):
    model = network()
    optimizer = build(model.parameters())
    train(model, optimizer, range(4))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) == 1


def test_gradients_are_left_as_they_were(build):
    model = network()
    optimizer = build(model.parameters(), weight_decay=0.1)
    for step in range(7):
        inputs, targets = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        before = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_parameter_moved_after_building_is_an_error_not_a_silent_loss(build, moved):
    model = network()
    optimizer = build(model.parameters())
    train(model, optimizer, range(moved))
    model.double()
    rounds = optimizer.rounds
    with pytest.raises(RuntimeError, match="has left the optimizer's vector"):
        train(model.float(), optimizer, range(moved, 3))
    assert optimizer.rounds == rounds


def test_a_parameter_thawed_after_building_is_an_error_not_a_silent_loss(build):
    frozen, free = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    optimizer = build([frozen, free])
    optimizer.step()
    frozen.requires_grad_().grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="frozen when Parle was built"):
        optimizer.step()  # the round's last


def test_sparse_gradients_are_refused(build):
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = build(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("sync_every", [1, 3, "auto"])
@pytest.mark.parametrize("at", [0, 1, 4, 6])
def test_state_dict_resumes_in_mid_round_bit_for_bit(build, tmp_path, sync_every, at):
    settings = dict(sync_every=sync_every, gamma=0.02, weight_decay=0.01)

    def start():
        torch.manual_seed(1)
        model = network()
        optimizer = build(model.parameters(), **settings)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)

    model, optimizer, scheduler = start()
    for step in range(at):
        train(model, optimizer, [step])
        scheduler.step()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], tmp_path / "saved")
    other, resumed, its_scheduler = start()
    train(other, resumed, range(50, 52))  # what is resumed need not be fresh
    for thing, state in zip((other, resumed, its_scheduler), torch.load(tmp_path / "saved"), strict=True):
        thing.load_state_dict(state)
    for step in range(at, at + 12):
        for net, one, its in ((model, optimizer, scheduler), (other, resumed, its_scheduler)):
            train(net, one, [step])
            its.step()
        assert torch.equal(weights(model), weights(other))
        assert torch.equal(optimizer.master, resumed.master)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[ours].keys() == resumed.state[theirs].keys()
        assert all(
            torch.equal(optimizer.state[ours][name], resumed.state[theirs][name]) for name in resumed.state[theirs]
        )


def test_state_dict_is_copied_not_aliased(build):
    models = [network(), network()]
    optimizers = [build(model.parameters()) for model in models]
    train(models[0], optimizers[0], range(4))
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    before = optimizers[0].master.clone()
    train(models[1], optimizers[1], range(4, 9))
    assert torch.equal(optimizers[0].master, before)


def test_state_dict_of_another_kind_is_refused_and_changes_nothing(build):
    one, many, auto = (build([nn.Parameter(torch.ones(2))], sync_every=L) for L in (1, 3, "auto"))
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5)
    wrong = many.state_dict()
    wrong["param_groups"][0]["rho"] = math.nan
    for other in (one, auto, sgd):
        with pytest.raises(ValueError, match="as it is here"):
            many.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="as it is here"):
        auto.load_state_dict(many.state_dict())
    with pytest.raises(ValueError, match="Invalid rho"):
        many.load_state_dict(wrong)
    many.step()
    assert (many.param_groups[0]["sync_every"], many.param_groups[0]["lr"]) == (3, 0.1)


def test_a_copy_is_refused_since_it_would_lose_its_vectors(build):
    optimizer = build([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


def test_sync_ends_a_round_early_and_does_nothing_between_rounds(build):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = build([parameter], sync_every=5)
    parameter.grad = torch.ones(2)
    optimizer.step()
    optimizer.sync()
    assert (optimizer.rounds, optimizer.batches) == (1, 0)
    master = optimizer.master.clone()
    optimizer.sync()
    assert optimizer.rounds == 1
    assert torch.equal(optimizer.master, master)
    assert torch.equal(parameter.detach(), master)


@pytest.mark.parametrize("sync_every", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_riders_that_are_not_finite_make_the_replica_a_lost_one(build, sync_every, value):
    optimizer = build([nn.Parameter(torch.ones(2))], sync_every=sync_every)
    optimizer.riders[0][2] = value
    with pytest.raises(FloatingPointError, match="no replica is finite any more after round 1: try a lower lr"):
        for _ in range(sync_every):
            optimizer.step()
    assert optimizer.master.isfinite().all()


def test_a_master_that_overflows_though_the_replica_is_finite_is_an_error(build):
    parameter = nn.Parameter(torch.tensor([3e38, 1.0]))
    optimizer = build([parameter], gamma=0, rho=0, outer_step=1)
    optimizer.master[0] = -3e38
    with pytest.raises(FloatingPointError, match="the master is not finite any more after round 1: try a lower lr"):
        for _ in range(3):
            optimizer.step()
    assert parameter.isfinite().all()


def test_the_master_is_copied_by_order_by_name_or_not_at_all(build):
    model, other = network(), network()
    weights_first = [
        dict(params=[(n, p) for n, p in model.named_parameters() if p.ndim > 1]),
        dict(params=[(n, p) for n, p in model.named_parameters() if p.ndim <= 1], weight_decay=0.1),
    ]
    optimizer = build(weights_first)
    train(model, optimizer, range(3))
    optimizer.copy_master_to(other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    unnamed = build([dict(params=group["params"]) for group in optimizer.param_groups])
    with pytest.raises(ValueError, match="in their order"):
        unnamed.copy_master_to(other)
    third = network()
    unnamed.copy_master_to(
        [*(p for p in third.parameters() if p.ndim > 1), *(p for p in third.parameters() if p.ndim <= 1)]
    )
    assert torch.equal(weights(model), weights(third))

    with pytest.raises(ValueError, match="not those that Parle was built from"):
        build(network().parameters()).copy_master_to(nn.Linear(2, 2))


def test_copying_the_master_leaves_training_alone(build):
    model = network()
    optimizer = build(model.parameters())
    train(model, optimizer, range(4))
    state = copy.deepcopy(optimizer.state_dict())
    before, other = weights(model).clone(), network()
    optimizer.copy_master_to(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(weights(model), before)
    assert str(optimizer.state_dict()) == str(state)


def test_repr_shows_the_settings(build):
    text = repr(build([nn.Parameter(torch.ones(2))], rho=0.02))
    assert text.startswith("Parle (")
    assert "rho: 0.02" in text


def test_buffers_beyond_the_weights_are_six_vectors_and_one_for_the_gradient(build):
    optimizer = build([nn.Parameter(torch.ones(1000))])
    names = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert set(names) == {
        "anchor",
        "inner_avg",
        "inner_momentum_buffer",
        "outer_momentum_buffer",
        "master",
        "master_momentum_buffer",
    }
