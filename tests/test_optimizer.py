"""Parle as a torch.optim optimizer. The classes share everything except constructor and communication."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import parle_gpu
import parle_mpi
from tests.lockstep import CASES, DOUBLE, lockstep

SETTINGS = dict(lr=0.1, sync_every=3, batches_per_epoch=4)


def build(parameters, **settings):
    """Return the optimizer of one replica."""
    return parle_gpu.Parle([parameters], **SETTINGS | settings)


@pytest.fixture(params=["mpi", "gpu"])
def build_both(request, comm):
    if request.param == "gpu":
        return build
    return lambda parameters, **settings: parle_mpi.Parle(parameters, comm, **SETTINGS | settings)


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


@pytest.mark.parametrize("kind", ["mpi", "gpu"])
def test_lockstep_with_reference_of_one_replica(comm, kind):
    def build(groups, **settings):
        return parle_mpi.Parle(*groups, comm, **settings) if kind == "mpi" else parle_gpu.Parle(groups, **settings)

    for _, _, settings in CASES:
        for _ in lockstep(build, [(0, 0, "cpu")], 1, 1, *DOUBLE, **settings):
            pass


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, (-1, math.nan, math.inf)) for name in ("lr", "weight_decay", "gamma", "rho", "outer_lr_scale")),
        *((name, (-0.1, 1, math.nan)) for name in ("momentum", "alpha", "outer_momentum", "master_average")),
        *((name, (0, -3, 2.5, "often", None)) for name in ("sync_every", "batches_per_epoch")),
    ],
)
def test_invalid_hyperparameters_are_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name}.*{value}"):
            build([nn.Parameter(torch.zeros(2))], **{name: value})
    with pytest.raises(ValueError, match=f"{name}.*{values[0]}"):
        build([dict(params=[nn.Parameter(torch.zeros(2))], **{name: values[0]})])


@pytest.mark.parametrize("value", [0, -1, 2, 1.0])
def test_invalid_number_of_replicas_is_named(comm, value):
    with pytest.raises(ValueError, match=f"replicas.*{value}"):
        parle_mpi.Parle([nn.Parameter(torch.zeros(2))], comm, lr=0.1, batches_per_epoch=4, replicas=value)


@pytest.mark.parametrize("gamma", [0, 1e-320])
def test_auto_sync_every_needs_a_gamma(gamma):
    with pytest.raises(ValueError, match=r"sync_every.*auto"):
        build([nn.Parameter(torch.zeros(2))], sync_every="auto", gamma=gamma)
    optimizer = build([nn.Parameter(torch.zeros(2))], sync_every="auto")
    optimizer.param_groups[0]["gamma"] = gamma
    with pytest.raises(ValueError, match=r"sync_every.*auto"):
        optimizer.step()


def test_lr_and_batches_per_epoch_are_required():
    for name in ("batches_per_epoch", "lr"):
        settings = {key: value for key, value in SETTINGS.items() if key != name}
        with pytest.raises(TypeError, match=name):
            parle_gpu.Parle([[nn.Parameter(torch.zeros(2))]], **settings)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([], "empty|requires_grad"),
        ([nn.Parameter(torch.zeros(2), requires_grad=False)], "requires_grad"),
        ([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2).double())], "float32"),
        ([nn.Parameter(torch.zeros(2).bfloat16())], "float32"),
        ([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))], "device"),
    ],
    ids=["none", "frozen", "mixed types", "bfloat16", "two devices"],
)
def test_unsuitable_parameters_are_rejected(parameters, message):
    with pytest.raises(ValueError, match=message):
        build(parameters)


def test_parameters_that_share_memory_are_rejected():
    memory = torch.zeros(2)
    with pytest.raises(ValueError, match="memory"):
        build([nn.Parameter(memory), nn.Parameter(memory)])


def test_a_tied_parameter_counts_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    optimizer = build(model.parameters())
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    assert model[2].weight is model[0].weight
    assert len(optimizer.master) == 16


def test_closure_runs_with_grad_enabled_and_returns_loss():
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


def test_step_hooks_run():
    optimizer, calls = build([nn.Parameter(torch.ones(2))]), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6], 0.2),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=9, cycle_momentum=False),
    ],
)
def test_schedulers_change_the_inner_step_as_in_sgd(schedule):
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


def test_each_group_has_its_own_hyperparameters(build_both):
    tensors = [torch.randn(3), torch.randn(2)]
    settings = [dict(lr=0.1, weight_decay=0.1), dict(lr=0.02, momentum=0.5, gamma=0.2, alpha=0.5, outer_lr_scale=2.0)]
    together = [nn.Parameter(tensor.clone()) for tensor in tensors]
    apart = [nn.Parameter(tensor.clone()) for tensor in tensors]
    one = build_both([dict(params=[p], **group) for p, group in zip(together, settings, strict=True)])
    two = [build_both([p], **group) for p, group in zip(apart, settings, strict=True)]
    for step in range(7):
        for parameter in (*together, *apart):
            parameter.grad = torch.full_like(parameter, step - 2.0)
        for optimizer in (one, *two):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    assert torch.equal(one.master, torch.cat([optimizer.master for optimizer in two]))


@pytest.mark.parametrize(("in_group", "in_call"), [(1, 3), (3, 1), ("auto", 3)])
def test_sync_every_may_be_given_in_the_group(in_group, in_call):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = build([dict(params=[parameter], sync_every=in_group)], sync_every=in_call)
    parameter.grad = torch.ones(2)
    for _ in range(3):
        optimizer.step()
    assert optimizer.rounds_done == (3 if in_group == 1 else 1 if in_group == 3 else 0)


def test_groups_must_share_sync_every():
    with pytest.raises(ValueError, match="sync_every"):
        build([dict(params=[nn.Parameter(torch.ones(1))], sync_every=L) for L in (2, 3)])


def test_groups_must_share_master_average():
    groups = [dict(params=[nn.Parameter(torch.ones(2))], master_average=beta) for beta in (0.5, 0.9)]
    with pytest.raises(ValueError, match="master_average"):
        build(groups)
    (parameter,) = build(groups[:1]).param_groups[0]["params"]
    assert "master_average" in build([dict(params=[parameter], master_average=0.5)]).state[parameter]


def test_add_param_group_is_rejected():
    optimizer = build([nn.Parameter(torch.ones(2))])
    with pytest.raises(RuntimeError, match="groups"):
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(2))]))


def test_none_gradient_counts_as_zero():
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


def test_frozen_parameter_is_kept_and_copied_with_master():
    model = network()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer = build(model.parameters(), weight_decay=0.1)
    train(model, optimizer, range(6))
    assert torch.equal(model[0].weight, frozen)
    other = network()
    optimizer.copy_master_to(other)
    assert torch.equal(other[0].weight, frozen)
    assert len(optimizer.master) == sum(p.numel() for p in model.parameters()) - frozen.numel()


@pytest.mark.parametrize("sync_every", [1, 3])
def test_parameter_strides_do_not_change_the_update(sync_every):
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


def test_each_parameter_and_state_has_its_own_aligned_storage():
    model = network()
    optimizer = build(model.parameters())
    train(model, optimizer, range(4))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    for parameter in model.parameters():
        for tensor in (parameter, *optimizer.state[parameter].values()):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert tensor.data_ptr() % 16 == 0
            assert len(pickle.dumps(tensor)) < 1000 + tensor.numel() * tensor.element_size()


def test_stale_graph_is_an_error_as_with_sgd():
    for sync_every in (1, 2):
        weight = nn.Parameter(torch.ones(3))
        optimizer = build([weight], sync_every=sync_every)
        loss = (weight**2).sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="inplace operation"):
            loss.backward()
        loss = (weight**2).sum()
        optimizer.sync() if sync_every > 1 else optimizer.reset()
        with pytest.raises(RuntimeError, match="inplace operation"):
            loss.backward()


@pytest.mark.parametrize("moved", [0, 1])
def test_moving_a_parameter_after_building_is_an_error(moved):
    model = network()
    optimizer = build(model.parameters())
    train(model, optimizer, range(moved))
    model.double()
    rounds = optimizer.rounds_done
    with pytest.raises(RuntimeError, match="parameter"):
        train(model.float(), optimizer, range(moved, 3))
    assert optimizer.rounds_done == rounds


def test_unfreezing_a_parameter_after_building_is_an_error():
    frozen, free = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    optimizer = build([frozen, free])
    optimizer.step()
    frozen.requires_grad_().grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="frozen"):
        optimizer.step()  # the round's last


def test_sparse_gradients_are_rejected():
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = build(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize(("sync_every", "at"), [(1, 1), (3, 0), (3, 4), (3, 6), ("auto", 1), ("auto", 6)])
def test_resume_in_mid_round_is_bitwise_identical(build_both, tmp_path, sync_every, at):
    settings = dict(sync_every=sync_every, gamma=0.05, weight_decay=0.01)

    def start():
        torch.manual_seed(1)
        model = network()
        optimizer = build_both(model.parameters(), **settings)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)

    model, optimizer, scheduler = start()
    for step in range(at):
        train(model, optimizer, [step])
        scheduler.step()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], tmp_path / "saved")
    other, resumed, its_scheduler = start()
    train(other, resumed, range(50, 52))  # a used optimizer can load a state
    for thing, state in zip((other, resumed, its_scheduler), torch.load(tmp_path / "saved"), strict=True):
        thing.load_state_dict(state)
    for step in range(at, at + 7):
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


def test_load_state_dict_copies_tensors():
    models = [network(), network()]
    optimizers = [build(model.parameters()) for model in models]
    train(models[0], optimizers[0], range(4))
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    before = optimizers[0].master.clone()
    train(models[1], optimizers[1], range(4, 9))
    assert torch.equal(optimizers[0].master, before)


def snapshot(optimizer):
    """Return all that `load_state_dict` could change, for bitwise comparison."""
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    vectors = [[parameter.tolist(), *map(repr, optimizer.state[parameter].items())] for parameter in parameters]
    return copy.deepcopy(groups), vectors, optimizer.master.tolist(), list(map(id, parameters))


def without(name):
    return lambda state: [group.pop(name) for group in state["param_groups"]]


def group_with(**values):
    return lambda state: state["param_groups"][0].update(values)


def state_with(**values):
    return lambda state: state["state"][0].update(values)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without("rounds_done"), "rounds_done"),
        (without("lr"), "lr"),
        (group_with(rho=math.nan), "rho"),
        (group_with(lr=-1.0), "lr"),
        (group_with(sync_every=1), "sync_every"),
        (group_with(sync_every="auto"), "sync_every"),
        (group_with(step_in_round=4), "step_in_round"),
        (group_with(rounds_done=-1), "rounds_done"),
        (group_with(rounds_done=1.5), "rounds_done"),
        (group_with(coupling_k=math.nan), "coupling_k"),
        (group_with(replica=1), "replica"),
        (state_with(anchor=torch.zeros(2, 1)), "anchor"),
        (state_with(anchor=torch.zeros(4)), "anchor"),
        (state_with(anchor=None), "anchor"),
        (lambda state: state["state"][1].update(anchor=None), "parameter 1"),
        (lambda state: state["state"].update({2: state["state"][1]}), "parameter 2"),
        (group_with(lr=None), "lr"),
        (group_with(num_replicas=3), "3 replicas"),
        (group_with(master_average=0.5), "master_average"),
        (group_with(rounds_averaged=-1), "rounds_averaged"),
        (state_with(exp_avg=torch.zeros(2, 2)), "exp_avg"),
        (lambda state: state["state"][0].pop("anchor"), "anchor"),
        (lambda state: state["state"].pop(1), "parameter 1"),
        (lambda state: state["state"].clear(), "parameter 0"),
        (lambda state: state["param_groups"].append(state["param_groups"][0]), "groups"),
        (lambda state: state["param_groups"][0]["params"].append(3), "group"),
    ],
)
def test_unsuitable_state_dict_is_rejected_and_changes_nothing(damage, words):
    parameters = [nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(()))]
    optimizer = build([*parameters, nn.Parameter(torch.ones(1), requires_grad=False)])
    for step in range(4):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, step + 1.0)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    damage(state)
    before, anchor = snapshot(optimizer), optimizer.state[parameters[0]]["anchor"]
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before
    assert optimizer.state[parameters[0]]["anchor"] is anchor
    for _ in range(2):
        optimizer.step()
    assert optimizer.rounds_done == 2 and not torch.equal(anchor, torch.zeros(2, 2))


def test_state_dict_of_sgd_is_rejected():
    with pytest.raises(ValueError, match="not saved by Parle"):
        build([nn.Parameter(torch.ones(2))]).load_state_dict(
            torch.optim.SGD([nn.Parameter(torch.ones(2))]).state_dict()
        )


def test_load_state_dict_runs_hooks_around_its_own_checks():
    """As with torch's optimizers: one hook wraps what is saved, and another one unwraps what is loaded."""
    for optimizer in (build([nn.Parameter(torch.ones(2))]), torch.optim.SGD([nn.Parameter(torch.ones(2))])):
        calls = []
        optimizer.register_state_dict_post_hook(lambda _, state: dict(wrapped=state))
        optimizer.register_load_state_dict_pre_hook(lambda _, state: calls.append("before") or state["wrapped"])  # noqa: B023
        optimizer.register_load_state_dict_post_hook(lambda _: calls.append("after"))  # noqa: B023
        state = optimizer.state_dict()
        assert calls == []
        state["wrapped"]["param_groups"][0]["lr"] = 0.03
        optimizer.load_state_dict(state)
        assert calls == ["before", "after"] and optimizer.param_groups[0]["lr"] == 0.03


def test_deepcopy_is_rejected():
    optimizer = build([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


def test_sync_between_rounds_does_nothing():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = build([parameter], sync_every=5)
    parameter.grad = torch.ones(2)
    optimizer.step()
    optimizer.sync()
    assert (optimizer.rounds_done, optimizer.step_in_round) == (1, 0)
    master = optimizer.master.clone()
    optimizer.sync()
    assert optimizer.rounds_done == 1
    assert torch.equal(optimizer.master, master)
    assert torch.equal(parameter.detach(), master)


@pytest.mark.parametrize(("sync_every", "value"), [(1, math.nan), (3, math.inf)])
def test_nonfinite_piggyback_excludes_the_replica(build_both, sync_every, value):
    optimizer = build_both([nn.Parameter(torch.ones(2))], sync_every=sync_every)
    optimizer.piggyback[0][2] = value
    with pytest.raises(FloatingPointError, match=r"replica.*round 1.*lr"):
        for _ in range(sync_every):
            optimizer.step()
    assert optimizer.master.isfinite().all()


def test_master_overflow_is_an_error():
    parameter = nn.Parameter(torch.tensor([3e38, 1.0]))
    optimizer = build([parameter], gamma=0, rho=0, outer_lr_scale=1)
    optimizer.state[parameter]["master"][0] = -3e38
    with pytest.raises(FloatingPointError, match=r"master.*round 1.*lr"):
        for _ in range(3):
            optimizer.step()
    assert parameter.isfinite().all()


def test_master_is_copied_by_order_or_by_name(build_both):
    model, other = network(), network()
    weights_first = [
        dict(params=[(n, p) for n, p in model.named_parameters() if p.ndim > 1]),
        dict(params=[(n, p) for n, p in model.named_parameters() if p.ndim <= 1], weight_decay=0.1),
    ]
    optimizer = build_both(weights_first)
    train(model, optimizer, range(3))
    optimizer.copy_master_to(other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    unnamed = build_both([dict(params=group["params"]) for group in optimizer.param_groups])
    with pytest.raises(ValueError, match="order"):
        unnamed.copy_master_to(other)
    third = network()
    unnamed.copy_master_to(
        [*(p for p in third.parameters() if p.ndim > 1), *(p for p in third.parameters() if p.ndim <= 1)]
    )
    assert torch.equal(weights(model), weights(third))

    with pytest.raises(ValueError, match="parameters"):
        build_both(network().parameters()).copy_master_to(nn.Linear(2, 2))


def test_copying_the_master_does_not_change_training():
    model = network()
    optimizer = build(model.parameters())
    train(model, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    before, other = weights(model).clone(), network()
    optimizer.copy_master_to(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(weights(model), before)
    assert str(optimizer.state_dict()) == str(state)


def test_repr_shows_the_hyperparameters():
    text = repr(build([nn.Parameter(torch.ones(2))], rho=0.02))
    assert text.startswith("Parle (")
    assert "rho: 0.02" in text


def test_state_of_the_first_replica_is_six_vectors():
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


# The average of the master


@pytest.mark.parametrize("sync_every", [1, 3])
def test_average_of_the_master_is_the_result_and_does_not_change_training(build_both, sync_every):
    plain_model, model = network(), network()
    model.load_state_dict(plain_model.state_dict())
    plain = build_both(plain_model.parameters(), sync_every=sync_every)
    optimizer = build_both(model.parameters(), sync_every=sync_every, master_average=0.5)
    target, masters = network(), []
    for start in (0, 3, 6):
        train(plain_model, plain, range(start, start + 3))
        train(model, optimizer, range(start, start + 3))
        assert torch.equal(weights(model), weights(plain_model)) and torch.equal(optimizer.master, plain.master)
        optimizer.copy_master_to(target, averaged=False)
        assert torch.equal(weights(target), optimizer.master)
        masters.append(optimizer.master)
        optimizer.copy_master_to(target)
        if start == 0 and sync_every == 3:
            assert torch.equal(weights(target), optimizer.master)  # of the first round
        with optimizer.master_weights():
            assert torch.equal(weights(model), weights(target))
    if sync_every == 3:
        expected = (masters[0] + 2 * masters[1] + 4 * masters[2]) / 7
        torch.testing.assert_close(weights(target), expected)
    plain.copy_master_to(target)
    assert torch.equal(weights(target), plain.master) and optimizer.averages_master and not plain.averages_master


def test_average_of_equal_masters_is_bitwise_equal_to_them():
    parameter, target = nn.Parameter(torch.randn(1000)), [torch.empty(1000)]
    optimizer = build([parameter], lr=0.0, master_average=0.9)
    for _ in range(30):
        parameter.grad = torch.ones(1000)
        optimizer.step()
        if optimizer.step_in_round == 0:
            optimizer.copy_master_to(target)
            assert torch.equal(target[0], parameter)


def test_reset_restarts_the_average(build_both):
    model, target = network(), network()
    optimizer = build_both(model.parameters(), master_average=0.9)
    train(model, optimizer, range(6))
    optimizer.reset()
    optimizer.copy_master_to(target)
    assert torch.equal(weights(target), weights(model))
    train(model, optimizer, range(6, 9))
    optimizer.copy_master_to(target)
    assert torch.equal(weights(target), optimizer.master)


def test_decay_of_the_average_may_change_during_a_run():
    parameter, target = nn.Parameter(torch.zeros(1)), [torch.zeros(1)]
    optimizer = build([parameter], master_average=0.9)
    for _ in range(6):
        parameter.grad = torch.ones(1)
        optimizer.step()
    optimizer.copy_master_to(target)
    before = target[0].clone()
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["master_average"] = 0.5
    optimizer.load_state_dict(state)
    for _ in range(3):
        optimizer.step()
    optimizer.copy_master_to(target)
    torch.testing.assert_close(target[0], before.lerp(optimizer.master, 0.5 / (1 - 0.5**3)))
    optimizer.param_groups[0]["master_average"] = 0.2
    before = target[0].clone()
    for _ in range(3):
        optimizer.step()
    optimizer.copy_master_to(target)
    torch.testing.assert_close(target[0], before.lerp(optimizer.master, 0.8 / (1 - 0.2**4)))


def test_average_cannot_be_switched_off_in_an_optimizer():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = build([parameter], master_average=0.9)
    with pytest.raises(ValueError, match="master_average"):
        optimizer.load_state_dict(build([nn.Parameter(torch.zeros(1))]).state_dict())
    optimizer.param_groups[0]["master_average"] = 0.0
    parameter.grad = torch.ones(1)
    with pytest.raises(ValueError, match="master_average"):
        optimizer.step()
    assert parameter == 0


# Weights and groups changed by other code


@pytest.mark.parametrize("sync_every", [1, 3, "auto"])
def test_weights_loaded_before_the_first_step_are_adopted(build_both, sync_every):
    model, pretrained = network(), network()
    optimizer = build_both(model.parameters(), sync_every=sync_every)
    model.load_state_dict(pretrained.state_dict())
    with pytest.warns(UserWarning, match=r"reset\(\)"):
        train(model, optimizer, [0])
    other = network()
    other.load_state_dict(pretrained.state_dict())
    expected = build_both(other.parameters(), sync_every=sync_every)
    train(other, expected, [0])
    train(model, optimizer, range(1, 7))
    train(other, expected, range(1, 7))
    assert torch.equal(weights(model), weights(other))
    assert torch.equal(optimizer.master, expected.master)


def test_weights_changed_between_rounds_are_an_error(build_both):
    parameter = nn.Parameter(torch.ones(4))
    optimizer = build_both([parameter])
    parameter.grad = torch.ones(4)
    for step in range(8):  # changes within a round are allowed
        if step in (1, 4):
            parameter.data.clamp_(-0.5, 0.5)
        optimizer.step()
    optimizer.sync()
    parameter.data.clamp_(-0.1, 0.1)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"reset\(\)"):
        optimizer.sync()


def test_reset_adopts_weights_and_clears_momentum(build_both):
    parameter = nn.Parameter(torch.ones(4))
    optimizer = build_both([parameter], sync_every=3)
    parameter.grad = torch.ones(4)
    for _ in range(5):
        optimizer.step()
    with torch.no_grad():
        parameter.copy_(torch.arange(4))
    optimizer.reset()
    assert (optimizer.rounds_done, optimizer.step_in_round) == (1, 0)
    assert optimizer.master.tolist() == parameter.tolist() == [0, 1, 2, 3]
    fresh = nn.Parameter(torch.arange(4.0))
    fresh.grad = torch.ones(4)
    other = build_both([fresh], sync_every=3)
    other.param_groups[0]["rounds_done"] = 1
    for _ in range(7):
        optimizer.step()
        other.step()
        assert torch.equal(parameter, fresh) and torch.equal(optimizer.master, other.master)


def replace_parameter(optimizer, model):
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(4, 2, 3, 3))


def delete_group(optimizer, model):
    del optimizer.param_groups[1]


def freeze(optimizer, model):
    model[0].weight.requires_grad_(False)


def set_group(**values):
    def change(optimizer, model):
        for group in optimizer.param_groups:
            group |= values

    return change


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (replace_parameter, RuntimeError, "build a new Parle"),
        (delete_group, RuntimeError, "build a new Parle"),
        (freeze, RuntimeError, "frozen"),
        (set_group(sync_every=1), ValueError, "sync_every"),
        (set_group(sync_every="auto"), ValueError, "sync_every"),
        (set_group(sync_every=0), ValueError, "sync_every"),
        (set_group(lr=-0.1), ValueError, "lr"),
        (set_group(momentum=math.nan), ValueError, "momentum"),
        (set_group(master_average=0.9), ValueError, "master_average"),
    ],
)
def test_unsupported_changes_raise_at_the_next_round(change, error, words):
    model = network()
    optimizer = build([dict(params=[model[0].weight]), dict(params=[p for p in model.parameters()][1:])])
    train(model, optimizer, range(3))
    before, rounds = weights(model), optimizer.rounds_done
    change(optimizer, model)
    with pytest.raises(error, match=words):
        train(model, optimizer, [3])
    assert torch.equal(weights(model), before) and rounds == 1


def test_sync_every_may_change_to_another_number():
    model = network()
    optimizer = build(model.parameters())
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["sync_every"] = 2
    train(model, optimizer, range(3, 7))
    assert (optimizer.rounds_done, optimizer.step_in_round) == (3, 0)


def test_parameters_replaced_by_assign_warn():
    model = network()
    optimizer = build(model.parameters())
    train(model, optimizer, range(3))
    model.load_state_dict(network().state_dict(), assign=True)
    train(model, optimizer, range(3, 6))
    with pytest.warns(UserWarning, match="assign=True"):
        train(model, optimizer, [6])
    train(model, optimizer, range(7, 12))  # once


def test_unstable_outer_step_warns_once():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = build([parameter], lr=1.0, momentum=0.5)  # the limit is 1.5
    parameter.grad = torch.zeros(2)
    for _ in range(3):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.5
    with pytest.warns(UserWarning, match=r"diverge.*1\.5"):
        optimizer.step()
    for _ in range(6):
        optimizer.step()
    single = build([nn.Parameter(torch.ones(2))], lr=5.0, sync_every=1)
    single.step()


# The master in the training model


@pytest.mark.parametrize("sync_every", [1, 3])
def test_master_weights_swaps_the_master_in_and_out(build_both, sync_every):
    models = [network(), network()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_both(model.parameters(), sync_every=sync_every) for model in models]
    for start in (0, 3, 6):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, range(start, start + 3))
        before, target = weights(models[0]), network()
        optimizers[0].copy_master_to(target)
        with pytest.raises(KeyError), optimizers[0].master_weights():
            assert torch.equal(weights(models[0]), weights(target))
            for call in (
                optimizers[0].step,
                optimizers[0].reset,
                optimizers[0].average_gradients,
                lambda: optimizers[0].load_state_dict(optimizers[0].state_dict()),
                optimizers[0].master_weights().__enter__,
            ):
                with pytest.raises(RuntimeError, match="master_weights"):
                    call()
            raise KeyError
        assert torch.equal(weights(models[0]), before)
        optimizers[0].step()
        optimizers[1].step()
        assert torch.equal(weights(models[0]), weights(models[1]))
        optimizers[0].sync()
        optimizers[1].sync()


def test_evaluating_the_master_within_a_round_warns():
    model = network()
    optimizer = build(model.parameters())
    train(model, optimizer, range(5))
    with pytest.warns(UserWarning, match=r"2 steps.*sync\(\)"):
        optimizer.copy_master_to(network())
    with pytest.warns(UserWarning, match="2 steps"), optimizer.master_weights():
        pass
    optimizer.sync()
    optimizer.copy_master_to(network())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))])
def test_names_of_wrapped_models_are_accepted(wrap):
    """The wrapped model is not called, so nothing is compiled."""
    for train_wrapped, target_wrapped in ((True, False), (False, True), (True, True)):
        model, target = network(), network()
        named = (wrap(model) if train_wrapped else model).named_parameters()
        optimizer = build(sorted(named, key=lambda item: item[1].ndim))
        optimizer.copy_master_to(wrap(target) if target_wrapped else target)
        assert torch.equal(weights(model), weights(target))
    with pytest.raises(ValueError, match=r"0\.weight"):
        optimizer.copy_master_to(nn.ModuleDict(dict(other=nn.Linear(1, 1))))


def test_only_prefixes_of_names_are_ignored():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.module = nn.Parameter(torch.zeros(2)), nn.Linear(2, 1, bias=False)

    model, target = Net(), Net()
    optimizer = build([dict(params=[item]) for item in model.named_parameters()])
    optimizer.copy_master_to(target)
    assert torch.equal(target.module.weight, model.module.weight)
    with pytest.raises(ValueError, match="prefix"):
        optimizer.copy_master_to(nn.ModuleDict(dict(module=nn.Linear(2, 1))))


def test_tensor_subclasses_are_rejected():
    class Sharded(torch.Tensor):
        pass

    with pytest.raises(ValueError, match="Sharded"):
        build([nn.Parameter(torch.ones(2).as_subclass(Sharded))])


def test_flags_of_an_accelerator_are_read_at_the_next_sync(monkeypatch):
    """A host that does not wait restarts the replica, and raises, one sync later."""

    class Event:
        def __init__(self, device):
            pass

        def record(self, stream):
            pass

        def synchronize(self):
            pass

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: None)
    monkeypatch.setattr(parle_gpu.Parle, "_host_reads_without_blocking", False)
    parameters = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = parle_gpu.Parle([[parameter] for parameter in parameters], **SETTINGS)
    seen = []
    for step in range(15):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.full((4,), math.nan if (step, number) == (4, 1) else number + 1.0)
        optimizer.step()
        seen.append(optimizer.nonfinite_replicas)
        assert optimizer.master.isfinite().all()
        assert parameters[1].isfinite().all() == (step not in range(4, 8))
        anchors = [optimizer.state[parameter]["anchor"] for parameter in parameters]
        if step not in range(5, 8):
            torch.testing.assert_close(optimizer.master, torch.stack(anchors).mean(0))
    assert seen == [[]] * 8 + [[1]] * 3 + [[]] * 4
    for replicas in (3, 1):  # all of them fail in the last round
        parameters = [nn.Parameter(torch.ones(4)) for _ in range(replicas)]
        optimizer = parle_gpu.Parle([[parameter] for parameter in parameters], **SETTINGS)
        for parameter in parameters:
            parameter.grad = torch.full((4,), math.nan)
        for _ in range(3):
            optimizer.step()
        assert optimizer.master.isnan().all()
        with pytest.raises(FloatingPointError, match="round 1:"):
            optimizer.copy_master_to([torch.zeros(4)])
    for parameter in parameters:  # reset() forgets what the device has not reported yet
        parameter.grad.fill_(1.0)
    for _ in range(3):
        optimizer.step()
    parameters[0].data.fill_(1.0)
    optimizer.reset()
    for _ in range(6):
        optimizer.step()


class Wrapper:
    """A wrapper like Lightning's and Fabric's: it inherits from the optimizer's class and reads its attributes."""

    def __init__(self, optimizer):
        self.wrapped = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def step(self, closure=None):
        return self.wrapped.step(closure)

    def __getattr__(self, name):
        return getattr(self.wrapped, name)


def test_wrappers_that_inherit_share_the_status(build_both):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = build_both([parameter])
    wrapper = Wrapper(optimizer)
    parameter.grad = torch.ones(2)
    wrapper.step()
    with pytest.warns(UserWarning, match="1 step"), wrapper.master_weights():
        for each in (wrapper, optimizer):
            with pytest.raises(RuntimeError, match="master_weights"):
                each.step()
    wrapper.sync()
    optimizer.step()
    optimizer.sync()
    assert (wrapper.rounds_done, wrapper.sync_seconds) == (optimizer.rounds_done, optimizer.sync_seconds)
    assigned = wrapper.__dict__.keys() - {"wrapped"}
    assert not assigned


def test_shared_memory_is_rejected():
    with pytest.raises(ValueError, match="shared memory"):
        build(nn.Linear(2, 2).share_memory().parameters())
