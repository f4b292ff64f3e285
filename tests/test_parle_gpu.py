"""parle_gpu.Parle: replicas in one process, on devices that the CPU simulates and on real GPUs."""

import gc
import math
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import loader
import models
from parle import training
from parle.flat_replica import FlatReplica
from parle_gpu import DeviceTimer, Parle
from tests.devices import SimulatedDevices, device_of
from tests.lockstep import CASES, DOUBLE, EXTRA, SINGLE, P, lockstep
from tests.test_optimizer import batch, network, weights

SETTINGS = dict(lr=0.1, sync_every=3, batches_per_epoch=4)
GPUS = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
needs_gpus = pytest.mark.skipif(not GPUS, reason="no CUDA device")


@pytest.fixture
def devices(monkeypatch):
    monkeypatch.setattr(FlatReplica, "device", property(lambda replica: device_of(replica.weights)))
    from_dlpack = torch.from_dlpack

    def with_device(tensor):
        result = from_dlpack(tensor)
        result.untyped_storage().simulated_device = device_of(tensor)
        return result

    monkeypatch.setattr(torch, "from_dlpack", with_device)
    with SimulatedDevices() as devices:
        yield devices


def round_robin(replicas, count):
    """Return the device of each replica."""
    return [torch.device("cpu", replica % count) for replica in range(replicas)]


def networks(devices):
    """Return a network on each device."""
    return [network().to(device) for device in devices]


def train(replicas, optimizer, steps):
    """Train each replica on its own mini-batches."""
    for step in steps:
        optimizer.zero_grad()
        for number, model in enumerate(replicas):
            inputs, targets = (tensor.to(next(model.parameters()).device) for tensor in batch(1000 * number + step))
            F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def build(replicas, **settings):
    return Parle([model.parameters() for model in replicas], **(SETTINGS | settings))


def test_simulated_devices_do_not_mix():
    with SimulatedDevices() as devices:
        here, there = torch.ones(3).to("cpu:0"), torch.ones(3).to("cpu:1")
        fresh, scalar = torch.ones(3), torch.tensor(2.0)
        derived = (here[1:] * scalar + fresh[1:]).sum()
        there.mul_(scalar)
        for mixture in (
            lambda: here + there,
            lambda: here.add_(there[0]),
            lambda: there * derived,
            lambda: there + fresh,
            lambda: here.lerp_(there, 0.5),
            lambda: torch.cat([here, there]),
            lambda: torch._foreach_copy_([here], [there]),
        ):
            with pytest.raises(RuntimeError, match="has tensors on cpu:0 and cpu:1"):
                mixture()
        assert devices.copies == []
        here[1:].copy_(there[:2])
        moved = here.to("cpu:1").to("cpu:1")
        assert devices.copies == [(device_of(there), device_of(here), 2), (device_of(here), device_of(there), 3)]
        assert device_of(moved + there) == torch.device("cpu:1")
        assert here.tolist() == moved.tolist() == [1, 2, 2]


@pytest.mark.parametrize(("numbers", "precision"), [([0, 0], SINGLE), ([1, 0, 0], DOUBLE), ([0, 1, 2, 1], SINGLE)])
def test_lockstep_with_reference_over_devices(devices, numbers, precision):
    home, *others = [torch.device("cpu", number) for number in dict.fromkeys(numbers)]
    local = [(replica, 0, torch.device("cpu", number)) for replica, number in enumerate(numbers)]
    sync = [(other, home) for other in others] + [(home, other) for other in others]
    share = [(home, other) for other in others]
    for _, n, settings in CASES if precision == DOUBLE else CASES[:4]:
        if n is None:
            run = lockstep(Parle, local, len(numbers), 1, *precision, devices.copies, **settings)
            for optimizer, ended in run:
                shared = settings["sync_every"] == "auto" and optimizer.param_groups[0]["steps_per_round"] == 1
                assert [copy[:2] for copy in devices.copies] == (share if shared else []) + (sync if ended else [])
                assert all(P <= size <= P + EXTRA for *_, size in devices.copies)


def test_replicas_start_identical_to_the_first(devices):
    replicas = networks([torch.device(name) for name in ("cpu:1", "cpu:0", "cpu:1")])
    for model in replicas:
        model[0].weight.requires_grad_(False)
    first = weights(replicas[0]).tolist()
    optimizer = build(replicas)
    assert [weights(model).tolist() for model in replicas] == [first] * 3
    assert optimizer.master.tolist() == first[replicas[0][0].weight.numel() :]
    assert device_of(optimizer.master) == torch.device("cpu:1")
    for model in replicas:
        for parameter in list(model.parameters())[1:]:
            state = optimizer.state[parameter]
            assert {device_of(value) for value in state.values()} == {device_of(parameter)}
            assert state["anchor"].tolist() == state["inner_avg"].tolist() == parameter.tolist()


@pytest.mark.parametrize(("sync_every", "at"), [(1, 1), (3, 4), ("auto", 1), ("auto", 4)])
def test_resume_of_three_replicas_is_bitwise_identical(devices, tmp_path, sync_every, at):
    def start():
        torch.manual_seed(1)
        replicas = networks(round_robin(3, 2))
        # auto: first 2, then 1
        return replicas, build(replicas, sync_every=sync_every, gamma=0.06, master_average=0.5)

    replicas, optimizer = start()
    train(replicas, optimizer, range(at))
    torch.save([[model.state_dict() for model in replicas], optimizer.state_dict()], tmp_path / "saved")
    others, resumed = start()
    train(others, resumed, range(50, 52))  # a used optimizer can load a state
    states, state = torch.load(tmp_path / "saved", weights_only=True)
    for model, values in zip(others, states, strict=True):
        model.load_state_dict(values)
    resumed.load_state_dict(state)
    for step in range(at, at + 5):
        train(replicas, optimizer, [step])
        train(others, resumed, [step])
        assert [weights(model).tolist() for model in replicas] == [weights(model).tolist() for model in others]
        assert optimizer.master.tolist() == resumed.master.tolist()
    ours, theirs = (
        [value.tolist() for values in one.state_dict()["state"].values() for value in values.values()]
        for one in (optimizer, resumed)
    )
    assert ours == theirs


def test_state_dict_of_fewer_replicas_is_rejected(devices):
    two, three = (build(networks(round_robin(count, 2))) for count in (2, 3))
    with pytest.raises(ValueError, match="number of parameter groups"):
        three.load_state_dict(two.state_dict())


@pytest.mark.parametrize(
    "other",
    [
        lambda weight, bias: [nn.Parameter(weight.detach().reshape(3, 2)), bias],
        lambda weight, bias: [weight],
        lambda weight, bias: [bias, weight],
        lambda weight, bias: [],
        lambda weight, bias: [nn.Parameter(weight.detach().double()), nn.Parameter(bias.detach().double())],
        lambda weight, bias: [weight, bias.requires_grad_(False)],
        lambda weight, bias: [dict(params=[weight, bias], lr=0.2)],
        lambda weight, bias: [dict(params=[weight, bias], rho=0.2)],
        lambda weight, bias: [dict(params=[weight]), dict(params=[bias])],
        lambda weight, bias: [nn.Parameter(weight.detach().t().contiguous().t()), bias],
    ],
    ids=["shapes", "fewer", "order", "none", "dtype", "frozen", "lr", "rho", "groups", "strides"],
)
def test_replicas_that_differ_are_rejected(other):
    identical = [nn.Linear(3, 2).parameters() for _ in range(2)]
    with pytest.raises(ValueError, match=r"(?i)replica 2.*replica 0"):
        Parle([*identical, other(*nn.Linear(3, 2).parameters())], **SETTINGS)


def test_replicas_that_differ_in_a_later_group_are_rejected():
    layers = [nn.Linear(3, 2) for _ in range(2)]
    groups = [
        [dict(params=[layer.weight]), dict(params=[layer.bias], lr=lr)]
        for layer, lr in zip(layers, (1, 2), strict=True)
    ]
    with pytest.raises(ValueError, match=r"(?i)replica 1.*replica 0"):
        Parle(groups, **SETTINGS)


def test_same_network_twice_is_rejected():
    model = network()
    with pytest.raises(ValueError, match="parameter"):
        build([model, model])


def test_buffers_of_all_replicas_become_the_first_ones():
    replicas = [nn.BatchNorm1d(2) for _ in range(3)]
    for number, model in enumerate(replicas):
        model.running_mean.fill_(number)
        model.num_batches_tracked.fill_(number)
    parameters = [model.parameters() for model in replicas]
    with pytest.raises(TypeError, match="list"):
        Parle(parameters, buffers=replicas[0].buffers(), **SETTINGS)
    with pytest.raises(ValueError, match="buffers"):
        Parle(parameters, buffers=[model.buffers() for model in replicas[:2]], **SETTINGS)
    with pytest.raises(TypeError, match="tensor"):
        Parle(parameters, buffers=[[model] for model in replicas], **SETTINGS)
    assert replicas[2].running_mean.tolist() == [2, 2]
    Parle([model.parameters() for model in replicas], buffers=[model.buffers() for model in replicas], **SETTINGS)
    for model in replicas:
        assert model.running_mean.tolist() == [0, 0] and model.num_batches_tracked == 0


def test_empty_list_of_replicas_is_rejected():
    with pytest.raises(ValueError, match="empty"):
        Parle([], **SETTINGS)


@pytest.mark.parametrize(
    "parameters",
    [
        lambda model: model.parameters(),
        lambda model: list(model.parameters()),
        lambda model: [dict(params=model.parameters())],
        lambda model: dict(params=model.parameters()),
        lambda model: model.named_parameters(),
        lambda model: [model, network()],
    ],
    ids=["parameters", "list", "groups", "group", "named", "models"],
)
def test_parameters_of_one_replica_are_rejected_with_a_hint(parameters):
    with pytest.raises(TypeError, match=r"Parle\(\["):
        Parle(parameters(network()), **SETTINGS)


@pytest.mark.parametrize("sync_every", [1, 3])
def test_each_group_of_each_replica_has_its_own_settings(devices, sync_every):
    tensors = [torch.randn(3), torch.randn(2)]
    settings = [
        dict(lr=0.1, weight_decay=0.1),
        dict(lr=0.02, momentum=0.5, gamma=0.2, rho=0.05, alpha=0.5, outer_lr_scale=2.0, outer_momentum=0.3),
    ]
    joint, separate = ([[nn.Parameter(t.to(d)) for t in tensors] for d in round_robin(3, 2)] for _ in range(2))
    one = Parle(
        [[dict(params=[p], **group) for p, group in zip(own, settings, strict=True)] for own in joint],
        **SETTINGS | dict(sync_every=sync_every),
    )
    two = [
        Parle([[own[i]] for own in separate], **SETTINGS | dict(sync_every=sync_every) | group)
        for i, group in enumerate(settings)
    ]
    for step in range(8):
        for number, parameters in enumerate(zip(joint, separate, strict=True)):
            for parameter in (*parameters[0], *parameters[1]):
                parameter.grad = torch.full_like(parameter, number + step - 2.0)
        for optimizer in (one, *two):
            optimizer.step()
        assert [[p.tolist() for p in own] for own in joint] == [[p.tolist() for p in own] for own in separate]
    assert one.master.tolist() == two[0].master.tolist() + two[1].master.tolist()
    assert one.master.tolist()[0] != tensors[0][0]


def test_master_and_replicas_are_copied_by_name(devices):
    replicas = networks(round_robin(3, 2))

    def groups(model):
        named = list(model.named_parameters())
        return [dict(params=[(n, p) for n, p in named if (p.ndim > 1) == large]) for large in (True, False)]

    optimizer = Parle([groups(model) for model in replicas], **SETTINGS)
    target = network()
    train(replicas, optimizer, range(3))
    optimizer.copy_master_to(target)
    mean = torch.tensor([weights(model).tolist() for model in replicas]).mean(0)
    assert weights(target).tolist() == pytest.approx(mean.tolist(), rel=1e-5, abs=1e-7)
    train(replicas, optimizer, [3])
    before = [weights(model).tolist() for model in replicas]
    assert before[0] != before[1] != before[2] != before[0]
    for number in range(3):
        optimizer.copy_replica_to(target, number)
        assert weights(target).tolist() == before[number]
    optimizer.copy_replica_to(target)
    assert weights(target).tolist() == before[0]
    assert [weights(model).tolist() for model in replicas] == before


def test_average_of_the_master_is_copied_to_every_device(devices):
    replicas, target = networks(round_robin(3, 2)), network()
    optimizer = build(replicas, master_average=0.5)
    masters = []
    for start in (0, 3):
        train(replicas, optimizer, range(start, start + 3))
        optimizer.copy_master_to(target, averaged=False)
        assert weights(target).tolist() == optimizer.master.tolist()
        masters.append(optimizer.master.to("cpu:0"))
    optimizer.copy_master_to(target)
    assert weights(target).tolist() == pytest.approx(((masters[0] + 2 * masters[1]) / 3).tolist(), rel=1e-5, abs=1e-7)
    with optimizer.master_weights():
        assert [weights(model).tolist() for model in replicas] == [weights(target).tolist()] * 3


def test_distances_are_relative_to_the_norm_of_the_master(devices):
    replicas = networks(round_robin(3, 2))
    optimizer = build(replicas)
    assert [float(distance) for distance in optimizer.distances()] == [0, 0, 0]
    train(replicas, optimizer, range(4))
    target = network()
    with pytest.warns(UserWarning, match="1 step"):
        optimizer.copy_master_to(target)
    master = torch.tensor(weights(target).tolist())
    for model, distance in zip(replicas, optimizer.distances(), strict=True):
        assert device_of(distance) == device_of(model[0].weight)
        difference = torch.tensor(weights(model).tolist()) - master
        assert float(distance) == pytest.approx(float(difference.norm() / master.norm()), rel=1e-5)


@pytest.mark.parametrize("sync_every", [1, 2])
def test_piggyback_is_averaged_only_by_a_sync(devices, sync_every):
    replicas = networks(round_robin(3, 2))
    optimizer = build(replicas, sync_every=sync_every)
    train(replicas, optimizer, range(sync_every))
    for number, piggyback in enumerate(optimizer.piggyback):
        piggyback[:3] += torch.tensor([1.0, 3 * number, number**2])
    for _ in range(sync_every):
        assert [piggyback[:3].tolist() for piggyback in optimizer.piggyback] == [[1, 0, 0], [1, 3, 1], [1, 6, 4]]
        optimizer.step()
    for _ in range(2 * sync_every):
        assert [piggyback[:3].tolist() for piggyback in optimizer.piggyback] == [pytest.approx([1, 3, 5 / 3])] * 3
        optimizer.step()


def test_none_gradient_in_one_replica_counts_as_zero():
    trained = []
    for gradient in (None, torch.zeros(2)):
        replicas = [[nn.Parameter(torch.ones(2)) for _ in range(2)] for _ in range(3)]
        optimizer = Parle(replicas, **SETTINGS, weight_decay=0.1)
        for _ in range(4):
            for parameter in (*replicas[0], *replicas[1], *replicas[2]):
                parameter.grad = torch.ones(2)
            replicas[1][0].grad = gradient
            optimizer.step()
        trained.append([parameter.tolist() for own in replicas for parameter in own])
    assert trained[0] == trained[1]
    assert trained[0][2] != trained[0][3]


@pytest.mark.parametrize("replica", [0, 2])
def test_lr_that_differs_between_replicas_is_an_error_at_sync(devices, replica):
    replicas = networks(round_robin(3, 2))
    optimizer = build(replicas)
    train(replicas, optimizer, range(2))
    optimizer.param_groups[replica]["lr"] = 0.2
    with pytest.raises(RuntimeError, match="lr"):
        train(replicas, optimizer, [2])


def test_scheduler_sets_lr_of_every_replica(devices):
    replicas = networks(round_robin(3, 2))
    optimizer = build(replicas)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.5)
    for step in range(6):
        train(replicas, optimizer, [step])
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025] * 3


@pytest.mark.parametrize("master_average", [0, 0.5])
@pytest.mark.parametrize(("sync_every", "replicas", "count"), [(1, 5, 3), (3, 5, 3), ("auto", 5, 3)])
def test_memory_use_is_as_documented(devices, replicas, count, sync_every, master_average):
    gc.collect()
    gc.freeze()  # from here on get_objects returns what is new
    parameters = [nn.Parameter(torch.ones(1000).to(device)) for device in round_robin(replicas, count)]
    settings = dict(sync_every=sync_every, gamma=0.06, master_average=master_average)
    optimizer = Parle([[parameter] for parameter in parameters], **SETTINGS | settings)
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    del parameter
    vectors = {
        1: 2 * replicas + count,  # weights, momentum; master
        3: 5 * replicas + 2,  # weights, two momenta, anchor, inner average; master and its momentum
        "auto": 5 * replicas + count + 1,
    }[sync_every]
    vectors += replicas + (master_average > 0)  # gradients
    gc.collect()
    found = [item.untyped_storage() for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    gc.unfreeze()
    added = sum({storage.data_ptr(): storage.nbytes() // 4 for storage in found}.values())
    assert 1000 * vectors <= added < 1000 * (vectors + 0.2)


def test_sync_seconds_grow_only_with_a_sync(devices):
    replicas = networks(round_robin(3, 2))
    optimizer = build(replicas, sync_every=2)
    seconds = [optimizer.sync_seconds]
    for step in range(5):
        train(replicas, optimizer, [step])
        seconds.append(optimizer.sync_seconds)
    assert 0 == seconds[0] == seconds[1] < seconds[2] == seconds[3] < seconds[4] == seconds[5] < 1


def test_device_timer_adds_up_intervals(monkeypatch):
    class Event:
        """A CUDA event that was recorded at the next of `marks`, in seconds."""

        def __init__(self, *_, **__):
            self.reached = False

        def record(self, stream):
            self.milliseconds = 1000 * next(marks)

        def query(self):
            return self.reached

        def synchronize(self):
            self.reached = True

        def elapsed_time(self, later):
            assert later.reached
            return later.milliseconds - self.milliseconds

    for device in ("cpu", "cuda"):
        marks = iter([1, 3, 10, 14, 20, 25])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "Event", Event)
            patch.setattr(torch.accelerator, "current_stream", lambda device: None)
            patch.setattr(time, "perf_counter", lambda marks=marks: next(marks))
            timer = DeviceTimer(torch.device(device))
            totals = [timer.seconds]
            for _ in range(3):
                with timer:
                    pass
                totals += [timer.seconds, timer.seconds]
        assert totals == [0, 2, 2, 6, 6, 11, 11]


@pytest.mark.cuda
@needs_gpus
@pytest.mark.parametrize(("dtype", "tolerance"), [DOUBLE, SINGLE])
def test_lockstep_with_reference_over_gpus(dtype, tolerance):
    local = [(number, 0, GPUS[number % len(GPUS)]) for number in range(3)]
    for _, n, settings in CASES:
        if n is None:
            for _ in lockstep(Parle, local, 3, 1, dtype, tolerance, **settings):
                pass


@pytest.mark.cuda
@needs_gpus
def test_parameters_on_a_gpu_have_their_own_aligned_storages():
    model = network().to(GPUS[0])
    optimizer = build([model])
    train([model], optimizer, range(4))
    for parameter in model.parameters():
        for tensor in (parameter, *optimizer.state[parameter].values()):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert tensor.data_ptr() % 16 == 0
    loss = (model[4].weight ** 2).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.cuda
@needs_gpus
def test_nonfinite_replica_on_a_gpu_restarts_one_round_later():
    replicas = [network().to(GPUS[number % len(GPUS)]) for number in range(3)]
    optimizer, seen = build(replicas), []
    for step in range(9):
        if step == 4:
            replicas[1][4].weight.data[0] = torch.nan
        train(replicas, optimizer, [step])
        seen.append(optimizer.nonfinite_replicas)
        assert optimizer.master.isfinite().all()
    assert seen == [[]] * 8 + [[1]]
    assert weights(replicas[1]).isfinite().all()


@pytest.mark.cuda
@needs_gpus
def test_gpus_train_as_the_cpu():
    trained = []
    for devices in ([torch.device("cpu")], GPUS):
        torch.manual_seed(1)
        replicas = [nn.Sequential(nn.Flatten(), nn.Linear(32, 9), nn.Tanh(), nn.Linear(9, 3)) for _ in range(3)]
        replicas = [model.to(devices[number % len(devices)]) for number, model in enumerate(replicas)]
        optimizer = build(replicas)
        train(replicas, optimizer, range(10))
        trained.append(torch.stack([weights(model).cpu() for model in replicas]))
        trained.append(optimizer.master.cpu())
    torch.testing.assert_close(trained[2], trained[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trained[3], trained[1], rtol=1e-4, atol=1e-6)


@pytest.mark.cuda
@needs_gpus
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("sync_every", [1, 5])
def test_steps_on_a_gpu_do_not_block_the_host(tmp_path, sync_every):
    data = loader.load("digits", proc=tmp_path).to(GPUS[0])
    networks = [models.build("lenet", channels=1, size=8, classes=10).to(GPUS[0]) for _ in range(2)]
    batches = [loader.BatchLoader(data, batch_size=32, seed=1, replica=a, replicas=2, augment=True) for a in range(2)]
    replicas = list(map(training.LocalReplica, range(2), networks, batches))
    optimizer = build(networks, sync_every=sync_every)

    def forbid(*_):  # from the second mini-batch until train reads the piggyback
        torch.cuda.set_sync_debug_mode("default" if optimizer.rounds_done == 3 else "error")

    optimizer.register_step_post_hook(forbid)
    schedule = training.Schedule(epochs=3 / batches[0].per_epoch)
    try:
        events = list(training.train(replicas, optimizer, schedule, evaluate=lambda: dict(master_error=0.0)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert events[0]["round"] == 3
    assert events[0]["sync_seconds"] > 0


@pytest.mark.cuda
@needs_gpus
def test_sync_seconds_of_gpus_grow_with_every_sync():
    replicas = [network().to(GPUS[number % len(GPUS)]) for number in range(3)]
    optimizer = build(replicas, sync_every=2)
    seconds = [optimizer.sync_seconds]
    for step in range(4):
        train(replicas, optimizer, [step])
        seconds.append(optimizer.sync_seconds)
    assert 0 == seconds[0] == seconds[1] < seconds[2] == seconds[3] < seconds[4]


def test_average_of_the_master_contains_the_one_after_a_restart():
    replicas = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    settings = dict(lr=0.1, sync_every=2, batches_per_epoch=4, master_average=0.5)
    optimizer = Parle([[replica] for replica in replicas], **settings)
    masters = []
    for step in range(4):
        for number, replica in enumerate(replicas):
            replica.grad = torch.full((4,), number + 1.0 + (math.nan if (number, step) == (1, 3) else 0.0))
        optimizer.step()
        if optimizer.step_in_round == 0:
            masters.append(optimizer.master)
    assert optimizer.nonfinite_replicas == [1]
    average = [torch.zeros(4)]
    optimizer.copy_master_to(average)
    torch.testing.assert_close(average[0], (masters[0] + 2 * masters[1]) / 3)
