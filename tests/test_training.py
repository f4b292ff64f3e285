"""The training loop: its events, its schedule, its equivalence with torch's SGD, and its random numbers."""

import sys
import time
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import loader
import parle_gpu
from parle import evaluation, training
from parle.distributed import Groups
from parle.training import LocalReplica, Schedule
from parle_mpi import Parle
from tests.toy import DataParallel, Member, build_optimizer, dataset, mlp, network, run_ranks

SGD = dict(lr=0.1, sync_every=1, gamma=0.0, rho=0.0)
ROUND = {
    *("event", "round", "epoch", "train_seconds", "train_loss", "train_error", "lr", "gamma_k", "coupling_k"),
    *("replica_distance_rms", "sync_seconds", "images_per_second"),
}
EVAL = {
    *("event", "round", "epoch", "train_seconds", "master_loss", "master_error", "replica_errors", "ensemble_error"),
    "replica_distances",
}
FINISHED = {
    *("event", "train_seconds", "wall_seconds", "master_error", "best_master_error"),
    *("sync_seconds", "straggler_seconds", "images_seen"),
}


def start(comm, data=None, model=None, batch_size=8, **settings):
    """Return model, batches and optimizer, ready to be trained."""
    model = mlp() if model is None else model
    batches = loader.BatchLoader(dataset() if data is None else data, batch_size=batch_size, seed=1)
    optimizer = Parle(model.parameters(), comm, batches_per_epoch=batches.per_epoch, **SGD | settings)
    return model, batches, optimizer


def constant_error():
    return {"master_error": 50.0}


def train(model, batches, optimizer, evaluate=constant_error, *, epochs=2, schedule=None, **settings):
    """Train one replica and return the events."""
    schedule = Schedule(epochs, **{"lr_decay": 0.2} | (schedule or {}))
    replicas = [LocalReplica(0, model, batches)]
    return list(training.train(replicas, optimizer, schedule, evaluate=evaluate, **settings))


def of_kind(kind, events):
    return [event for event in events if event["event"] == kind]


@pytest.mark.skipif(sys.platform != "linux", reason="is only called on Linux")
@pytest.mark.parametrize(("accepts", "names"), [(True, {"M_MMAP_THRESHOLD", "M_TRIM_THRESHOLD"}), (False, set())])
def test_malloc_thresholds_are_both_changed_or_neither(accepts, names, monkeypatch):
    changed = set()

    def mallopt(parameter, value):
        name = {-1: "M_TRIM_THRESHOLD", -3: "M_MMAP_THRESHOLD"}[parameter]
        accepted = accepts or name == "M_TRIM_THRESHOLD" or value <= 2**25
        changed.update({name} if accepted else ())
        return int(accepted)

    monkeypatch.setattr(training.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    training.disable_malloc_trim()
    assert changed == names


def test_classes_and_the_training_loop_leave_malloc_alone(comm, monkeypatch):
    monkeypatch.setattr(training.ctypes, "CDLL", lambda name: pytest.fail("changes malloc"))
    train(*start(comm), epochs=0.1)


@pytest.mark.parametrize(
    ("epochs", "eval_every", "evals"),
    [
        (2, 4, [4, 5, 8, 10]),
        (1.4, None, [5, 7]),
        (1.7, 100, [5, 8]),
        (0.01, None, [1]),
    ],
)
def test_events_are_in_order_and_have_the_documented_keys(epochs, eval_every, evals, comm):
    data = dataset()
    model, batches, optimizer = start(comm, data, sync_every=3, gamma=0.01, rho=0.01)
    evaluation_model = mlp()

    def evaluate():
        return evaluation.evaluate(optimizer, evaluation_model, data, batch_size=8, replicas=[0])

    events = train(model, batches, optimizer, evaluate, epochs=epochs, schedule=dict(eval_every=eval_every))
    seen = [(event["event"], event.get("round")) for event in events]
    assert seen == [(kind, done) for done in evals for kind in ("round", "eval")] + [("finished", None)]
    for kind, keys in (("round", ROUND), ("eval", EVAL), ("finished", FINISHED)):
        for event in of_kind(kind, events):
            assert keys == event.keys()
            assert kind == "finished" or event["epoch"] == event["round"] / 5
    assert optimizer.rounds_done == evals[-1] == max(1, round(epochs * 5))
    assert batches.batches_drawn == 3 * evals[-1]
    seconds = [event["train_seconds"] for event in events]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_finished_event_has_the_last_and_the_best_error(comm):
    errors = iter([30.0, 10.0, 20.0])
    events = train(*start(comm), lambda: {"master_error": next(errors)}, epochs=3)
    assert (events[-1]["master_error"], events[-1]["best_master_error"]) == (20.0, 10.0)


@pytest.mark.parametrize(
    ("stop_at", "calls"),
    [
        (5, ["save", "evaluate", "save"]),  # a run that is killed during the evaluation loses nothing
        (4, ["save"]),
        (99, ["evaluate", "save", "evaluate", "save"]),
    ],
)
def test_stop_request_saves_before_the_evaluation(comm, stop_at, calls):
    model, batches, optimizer = start(comm)
    request, done = training.StopRequest(), []

    def evaluate():
        done.append("evaluate")
        return {"master_error": 50.0}

    def stop(*_):
        request.stop = optimizer.rounds_done >= stop_at

    optimizer.register_step_post_hook(stop)
    events = train(model, batches, optimizer, evaluate, stop_request=request, save=lambda state: done.append("save"))
    assert done == calls
    assert optimizer.rounds_done == min(stop_at, 10)
    assert [event["event"] for event in events[-1:]] == {4: [], 5: ["eval"]}.get(stop_at, ["finished"])


def test_save_request_within_a_round_does_not_shift_the_schedule(comm, monkeypatch):
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    model, batches, optimizer = start(comm, sync_every=4)
    request, saved = training.StopRequest(), []

    def position():
        return optimizer.rounds_done, optimizer.step_in_round

    def save(*_):
        request.save = position() == (0, 2)

    optimizer.register_step_post_hook(save)
    settings = dict(schedule=dict(lr_drops=[1]), stop_request=request, save=lambda state: saved.append(position()))
    events = of_kind("round", train(model, batches, optimizer, **settings))
    assert saved == [(0, 2), (5, 0), (10, 0)]
    assert [event["lr"] for event in events] == pytest.approx([0.1] * 5 + [0.02] * 5)


def test_evaluation_time_is_not_training_time(comm):
    def evaluate():
        time.sleep(0.1)
        return {"master_error": 50.0}

    *_, last, _, finished = train(*start(comm), evaluate)
    assert last["train_seconds"] <= finished["train_seconds"] <= finished["wall_seconds"] - 0.2


@pytest.mark.parametrize(
    ("sync_every", "epochs", "rounds"), [(1, 2, [25, 30, 55, 60]), (25, 0.1, [1, 2, 3]), (10, 0.2, [3, 6])]
)
def test_round_event_follows_the_first_sync_after_25_steps(sync_every, epochs, rounds, comm):
    events = train(*start(comm, dataset(train=60), batch_size=2, sync_every=sync_every), epochs=epochs)
    assert [event["round"] for event in of_kind("round", events)] == rounds


def test_training_equals_torch_sgd_with_its_loss_and_error(comm):
    data, model = dataset(train=61), network()
    for layer in model:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    reference = deepcopy(model)
    model.eval()
    run = start(comm, data, model, batch_size=2, weight_decay=1e-3, lr=0.01)
    events = train(*run, schedule=dict(lr_drops=[0.5, 1.5]))

    batches = loader.BatchLoader(data, batch_size=2, seed=1)
    sgd = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3, nesterov=True)
    losses, errors = [], []
    for done in range(62):
        if done in (round(0.5 * 31), round(1.5 * 31)):
            sgd.param_groups[0]["lr"] *= 0.2
        inputs, targets = next(batches)
        sgd.zero_grad()
        logits = reference(inputs)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        sgd.step()
        losses.append(loss.item())
        errors.append(100 * (logits.argmax(1) != targets).double().mean().item())

    # batch norm over two images amplifies rounding errors, which differ between CPUs
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), atol=1e-3, rtol=1e-2)
    rounds = [0, 25, 31, 56, 62]
    for event, first, last in zip(of_kind("round", events), rounds[:-1], rounds[1:], strict=True):
        assert event["round"] == last
        assert event["train_loss"] == pytest.approx(sum(losses[first:last]) / (last - first), rel=1e-4)
        assert event["train_error"] == pytest.approx(sum(errors[first:last]) / (last - first), rel=1e-4)
    assert model.training


def test_lr_drops_after_the_given_epochs(comm, monkeypatch):
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    run = start(comm, dataset(train=32), sync_every=2, gamma=0.01)
    events = of_kind("round", train(*run, epochs=3, schedule=dict(lr_drops=[1, 2.5], lr_decay=0.2)))
    assert [event["round"] for event in events] == list(range(1, 13))
    assert [event["lr"] for event in events] == pytest.approx([0.1] * 4 + [0.02] * 6 + [0.004] * 2)
    assert [event["gamma_k"] for event in events] == pytest.approx([0.01 * 1.125**k for k in range(12)])


def test_loss_and_error_fall(comm):
    run = start(comm, dataset(train=80), sync_every=5, gamma=0.01, rho=0.01)
    events = of_kind("round", train(*run, epochs=6))
    assert events[-1]["train_loss"] < 0.5 * events[0]["train_loss"]
    assert events[-1]["train_error"] < 0.5 * events[0]["train_error"]


def train_replicas(n, sync_every, epochs):
    """Train n replicas in this process: return their batches, and each event with the RMS distance after it."""
    data, models = dataset(), [mlp()]
    models += [deepcopy(models[0]) for _ in range(1, n)]
    batches = [loader.BatchLoader(data, batch_size=8, seed=1, replica=a, replicas=n) for a in range(n)]
    optimizer = build_optimizer(*models, sync_every=sync_every)
    replicas = list(map(LocalReplica, range(n), models, batches))
    events = training.train(replicas, optimizer, Schedule(epochs), evaluate=constant_error)
    return batches, [(event, torch.stack(optimizer.distances()).square().mean().sqrt().item()) for event in events]


@pytest.mark.parametrize(("n", "sync_every", "epochs", "images"), [(1, 1, 2, 80), (3, 4, 1.4, 672)])
def test_images_of_all_replicas_are_counted(n, sync_every, epochs, images):
    batches, seen = train_replicas(n, sync_every, epochs)
    assert seen[-1][0]["images_seen"] == images == 8 * sum(source.batches_drawn for source in batches)
    first, _ = seen[0]
    images_of_first = 8 * n * sync_every * first["round"]
    assert first["images_per_second"] == pytest.approx(images_of_first / first["train_seconds"])


def test_logged_loss_is_the_mean_over_steps_and_replicas(monkeypatch):
    losses = []
    cross_entropy = F.cross_entropy

    def recorded(logits, targets, **settings):
        losses.append(cross_entropy(logits, targets).item())
        return cross_entropy(logits, targets, **settings)

    monkeypatch.setattr(F, "cross_entropy", recorded)
    _, seen = train_replicas(3, sync_every=10, epochs=1)
    assert len(losses) == 3 * 50
    first, second = (event for event, _ in seen if event["event"] == "round")
    assert (first["round"], second["round"]) == (3, 5)
    assert first["train_loss"] == pytest.approx(sum(losses[:90]) / 90, rel=1e-5)
    assert second["train_loss"] == pytest.approx(sum(losses[90:]) / 60, rel=1e-5)


def test_logged_distance_is_from_the_previous_round_event():
    _, seen = train_replicas(3, sync_every=25, epochs=0.6)
    rounds = [(event["replica_distance_rms"], distance) for event, distance in seen if event["event"] == "round"]
    assert len(rounds) == 3
    for (_, distance), (logged, _) in pairwise(rounds):
        assert logged == pytest.approx(distance, rel=1e-4) and logged > 0


def test_gradients_of_a_replica_group_average_to_the_whole_batch(comm):
    data, model = dataset(train=14), mlp()

    def first_round(rank, size):
        replica = deepcopy(model)
        batches = loader.BatchLoader(data, batch_size=7, seed=1, shard=(rank, size))
        optimizer = Parle(replica.parameters(), comm, batches_per_epoch=2, **SGD | dict(lr=0.0))
        event, *_ = train(replica, batches, optimizer, epochs=0.5, groups=Groups(replica=Member(rank, size)))
        sums = torch.tensor([event["train_loss"], event["train_error"]])
        return [*(parameter.grad for parameter in replica.parameters()), sums]

    shards = [first_round(rank, 3) for rank in range(3)]
    for whole, *values in zip(first_round(0, 1), *shards, strict=True):
        torch.testing.assert_close(sum(values) / 3, whole)


def test_amp_computes_in_bfloat16_and_keeps_float32_weights(comm):
    model, batches, optimizer = start(comm)
    dtypes = set()
    model[1].register_forward_hook(lambda layer, given, output: dtypes.add(output.dtype))
    for amp, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        dtypes.clear()
        event, *_ = train(model, batches, optimizer, amp=amp, epochs=1 + amp)
        assert dtypes == {dtype} and event["train_loss"] > 0
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_straggler_seconds_are_part_of_sync_seconds(monkeypatch):
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    seconds = [[1.0, 0.1, 0.5], [0.2, 2.0, 0.5]]  # of each round on each rank

    class Scripted(parle_gpu.Parle):
        sync_seconds = property(lambda self: sum(self.scripted[: self.rounds_done]))

    def work(world):
        model = mlp()
        optimizer = Scripted([model.parameters()], lr=0.1, sync_every=2, batches_per_epoch=5)
        optimizer.scripted = seconds[world.rank]
        batches = loader.BatchLoader(dataset(), batch_size=8, seed=1)
        states = [training.TrainState(), training.TrainState(sync_seconds=1.0, straggler_seconds=2.0)]
        return train(model, batches, optimizer, epochs=0.6, state=states[world.rank], groups=Groups(world=world))

    first, second = run_ranks(2, work)
    assert [event["sync_seconds"] for event in of_kind("round", second)] == pytest.approx(seconds[1])
    sync, straggler = (1.6 + 2.7) / 2, (0.8 + 1.9) / 2
    assert (first[-1]["sync_seconds"], first[-1]["straggler_seconds"]) == pytest.approx((sync, straggler))
    assert (second[-1]["sync_seconds"], second[-1]["straggler_seconds"]) == pytest.approx((sync + 1, straggler + 2))


# Dropout


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_seeding_the_cpu_equals_torch_manual_seed(seed):
    training.seed_device(torch.device("cpu"), seed)
    drawn = F.dropout(torch.ones(1000))
    torch.manual_seed(seed)
    assert torch.equal(drawn, F.dropout(torch.ones(1000)))


def test_seeding_a_gpu_seeds_only_that_gpu(monkeypatch):
    current, seeded = [0], []

    @contextmanager
    def device_index(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    module = SimpleNamespace(manual_seed=lambda seed: seeded.append((current[0], seed)))
    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    monkeypatch.setattr(torch, "get_device_module", lambda device: {"cuda": module}[device.type])
    before = torch.get_rng_state()
    training.seed_device(torch.device("cuda", 2), 7)
    assert (seeded, current) == ([(2, 7)], [0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("ids", "devices"), [(None, ["cpu"]), ([0], ["cpu:0"]), ([3, 1], ["cpu:3", "cpu:1"])])
def test_network_devices_include_those_of_data_parallel(ids, devices):
    model = mlp() if ids is None else DataParallel(mlp(), ids)
    assert training.network_devices(model) == list(map(torch.device, devices))


@pytest.mark.parametrize("ids", [[3, 1], "mine"])
def test_device_ids_of_other_models_are_ignored(ids):
    model = mlp()
    model.device_ids = ids
    assert training.network_devices(model) == [torch.device("cpu")]


@pytest.mark.parametrize(("ids", "indices"), [(None, [0]), ([0, 1, 2], [0, 1, 2])])
def test_each_forward_pass_is_seeded_on_each_device(ids, indices, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "seed_device", lambda *seed: seen.append(seed))
    models = [mlp() if ids is None else DataParallel(mlp(), ids) for _ in range(2)]
    for a, model in enumerate(models):
        model.register_forward_pre_hook(lambda model, given, a=a: seen.append(a))
    batches, again = (
        [loader.BatchLoader(dataset(), batch_size=8, seed=1, replica=a, replicas=2) for a in range(2)] for _ in range(2)
    )
    optimizer = build_optimizer(*models, sync_every=2)
    replicas = list(map(LocalReplica, range(2), models, batches))
    list(training.train(replicas, optimizer, Schedule(1), evaluate=constant_error))

    expected = []
    devices = [torch.device("cpu")] if ids is None else [torch.device("cpu", i) for i in ids]
    for _ in range(2 * 5):
        for a, source in enumerate(again):
            next(source)
            expected += [(device, source.dropout_seed(i)) for device, i in zip(devices, indices, strict=True)] + [a]
    assert seen == expected
    seeds = [seed for _, seed in (seed for seed in seen if isinstance(seed, tuple))]
    assert len(set(seeds)) == len(seeds) == 2 * 5 * 2 * len(indices)


def test_dropout_of_a_replica_does_not_depend_on_the_others():
    data, model = dataset(), network()

    def logits(*numbers):
        """Train these of two replicas with lr 0 and return the logits of each."""
        models, outputs = [deepcopy(model) for _ in numbers], [[] for _ in numbers]
        for copy, own in zip(models, outputs, strict=True):
            copy.register_forward_hook(lambda _, given, output, own=own: own.append(output.detach()))
        batches = [loader.BatchLoader(data, batch_size=8, seed=1, replica=a, replicas=2) for a in numbers]
        optimizer = build_optimizer(*models, lr=0.0, sync_every=2)
        replicas = list(map(LocalReplica, numbers, models, batches))
        list(training.train(replicas, optimizer, Schedule(0.6), evaluate=constant_error))
        return [torch.stack(own) for own in outputs]

    pair = logits(0, 1)
    assert pair[0].shape == (6, 8, 3)
    assert torch.equal(pair[0], *logits(0))
    torch.manual_seed(7)
    assert torch.equal(pair[1], *logits(1))
