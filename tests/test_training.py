import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import loader
import parle_gpu
from parle import distributed, evaluation, training
from parle_mpi import Parle

SGD = dict(lr=0.1, sync_every=1, gamma=0.0, rho=0.0)
ROUND = {
    *("event", "round", "epoch", "seconds", "loss", "error", "lr", "gamma", "rho", "spread", "sync_seconds"),
    "images_per_second",
}
EVAL = {
    *("event", "round", "epoch", "seconds", "master_loss", "master_error", "replica_errors", "ensemble_error"),
    "distances",
}
END = {"event", "seconds", "master_error", "best_master_error", "sync_seconds", "images"}


def together(*models, **settings):
    """The optimizer of replicas of this process."""
    settings = dict(lr=0.1, sync_every=5, batches_per_epoch=5) | settings
    return parle_gpu.Parle([model.parameters() for model in models], **settings)


def recalibrate(model, data, batch_size, team=distributed.Group()):
    evaluation.recalibrate_batch_norm(model, evaluation.calibration_batches(data, batch_size, team), team)


def dataset(train=40, test=30, size=4):
    """Random images, labeled by the brightness of their upper half."""
    images = torch.randint(0, 256, (train + test, size, size, 1), dtype=torch.uint8)
    brightness = images[:, : size // 2].float().mean((1, 2, 3))
    labels = brightness.argsort().argsort() * 3 // (train + test)
    pixels = images[:train].float()
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    return loader.Dataset("bright", images[:train], labels[:train], images[train:], labels[train:], mean, std, 3)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def network():
    """A network whose batch norm follows dropout and whose logits depend on dropout."""
    return nn.Sequential(
        *(nn.Dropout(0.3), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
    )


class DataParallel(nn.DataParallel):
    """torch's DataParallel over devices that the CPU simulates."""

    def __init__(self, module, device_ids):
        nn.Module.__init__(self)
        self.module, self.device_ids = module, device_ids

    def forward(self, inputs):
        return self.module(inputs)


def norms(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]


def running(model):
    return [tensor for layer in norms(model) for tensor in (layer.running_mean, layer.running_var)]


def statistics(model):
    return [tensor.clone() for tensor in running(model)]


def inputs_of(data, images):
    return ((images.float() - data.mean) / data.std).permute(0, 3, 1, 2)


def shared(size, work):
    """The results of `work(team)` in each of a team of threads."""
    barrier, tensors = threading.Barrier(size, timeout=20), [None] * size

    def team(index):
        def add(tensor):
            tensors[index] = tensor.clone()
            barrier.wait()
            total = sum(tensors)
            barrier.wait()
            tensor.copy_(total)

        return distributed.Group(index, size, add)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda index: work(team(index)), range(size)))


@pytest.mark.parametrize(("size", "total"), [(1, 10), (4, 3), (7, 100)])
def test_the_shards_of_a_team_are_the_whole(size, total):
    rows = [list(range(total))[distributed.Group(index, size).part(total)] for index in range(size)]
    assert list(chain(*rows)) == list(range(total))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


# Batch norm


def test_recalibration_uses_training_images_without_dropout():
    data, model = dataset(), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1))
    (layer,) = norms(model)
    layer.running_mean.fill_(7.0)
    pixels = inputs_of(data._replace(std=data.std / 3), data.train_images)
    recalibrate(model, data._replace(std=data.std / 3), batch_size=len(data.train_labels))
    torch.testing.assert_close(layer.running_mean, pixels.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.running_var, pixels.var((0, 2, 3)), atol=1e-5, rtol=1e-5)


def test_recalibration_is_bitwise_repeatable_and_draws_nothing():
    data, model = dataset(), network().train()
    random = torch.get_rng_state()
    recalibrate(model, data, batch_size=8)
    assert torch.equal(torch.get_rng_state(), random)
    first = statistics(model)
    for layer in norms(model):
        layer.running_mean.normal_()
    torch.manual_seed(1)
    recalibrate(model, data, batch_size=8)
    assert all(map(torch.equal, statistics(model), first))


@pytest.mark.parametrize(("limit", "batch_size", "count"), [(100, 7, 5), (3, 8, 3)])
def test_recalibration_equals_torch_update_bn_without_dropout(limit, batch_size, count, monkeypatch):
    monkeypatch.setattr(engine, "RECALIBRATION_BATCHES", limit)
    data, model = dataset(), network()
    for layer in model:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    reference, seen = deepcopy(model), []
    hook = model.register_forward_pre_hook(lambda model, given: seen.append(given[0].clone()))
    recalibrate(model, data, batch_size)
    hook.remove()
    assert [len(batch) for batch in seen] == [batch_size] * count
    images = {tuple(image.flatten().tolist()) for image in inputs_of(data, data.train_images)}
    chosen = [tuple(image.flatten().tolist()) for image in torch.cat(seen)]
    assert len(set(chosen)) == len(chosen) and set(chosen) <= images
    torch.optim.swa_utils.update_bn(seen, reference)
    torch.testing.assert_close(statistics(model), statistics(reference), atol=1e-6, rtol=1e-6)


def test_recalibration_restores_modes_and_momenta():
    model = network().train()
    model[0].eval()
    model[2].eval()
    model[2].momentum, model[7].momentum = 0.3, None
    modes = [layer.training for layer in model.modules()]
    weights = [parameter.clone() for parameter in model.parameters()]
    recalibrate(model, dataset(), batch_size=8)
    assert [layer.training for layer in model.modules()] == modes
    assert (model[2].momentum, model[7].momentum) == (0.3, None)
    assert all(map(torch.equal, model.parameters(), weights))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_recalibration_without_batch_norm_does_nothing():
    model, calls = mlp().train(), []
    model.register_forward_hook(lambda *args: calls.append(args))
    recalibrate(model, dataset(), batch_size=8)
    assert not calls and model.training


def test_recalibration_by_a_team_gives_the_same_statistics():
    size, data, model = 7, dataset(), network()  # five mini-batches, so that some of seven members have none
    teammates = [deepcopy(model) for _ in range(size)]
    recalibrate(model, data, batch_size=8)
    shared(size, lambda team: recalibrate(teammates[team.index], data, 8, team))
    for teammate in teammates:
        torch.testing.assert_close(statistics(teammate), statistics(model), atol=1e-6, rtol=1e-5)
        assert all(map(torch.equal, statistics(teammate), statistics(teammates[0])))
        assert [int(layer.num_batches_tracked) for layer in norms(teammate)] == [5, 5]


# Evaluation


def test_predictions_are_made_in_evaluation_mode_in_order(monkeypatch):
    monkeypatch.setattr(engine, "EVALUATION_BATCH", 7)
    data, model = dataset(), network().train()
    logits = evaluation.predict(model, data.test_images, data)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, model.eval()(inputs_of(data, data.test_images)))
    assert not torch.allclose(logits, model.train()(inputs_of(data, data.test_images)))


def perturb(model, number):
    noise = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=noise), alpha=0.5)


def spread_replicas(n):
    """An optimizer and its n replicas, each at some distance from their master."""
    models = [network()]
    models += [deepcopy(models[0]) for _ in range(1, n)]
    optimizer = together(*models)
    for a, model in enumerate(models):
        perturb(model, a)
    return optimizer, models


def direct(model, data, batch_size):
    """Logits of the test images and the error in percent, after recalibration."""
    model = deepcopy(model)
    recalibrate(model, data, batch_size)
    logits = model.eval()(inputs_of(data, data.test_images)).detach()
    return logits, 100 * (logits.argmax(1) != data.test_labels).double().mean().item()


def test_evaluation_equals_a_direct_computation():
    data = dataset(test=200)
    optimizer, models = spread_replicas(3)
    result = evaluation.evaluate(optimizer, network(), data, batch_size=8, replicas=[0, 1, 2])

    every = [direct(model, data, 8) for model in models]
    errors = [error for _, error in every]
    assert len(set(errors)) == 3
    assert result["replica_errors"] == pytest.approx(errors)
    mean = torch.stack([logits.softmax(1) for logits, _ in every]).mean(0)
    assert result["ensemble_error"] == pytest.approx(100 * (mean.argmax(1) != data.test_labels).double().mean().item())
    assert result["ensemble_error"] not in errors
    other = torch.stack([logits for logits, _ in every]).mean(0)
    assert not torch.equal(mean.argmax(1), other.argmax(1)), "the data do not distinguish the two means"

    master = network()
    torch.nn.utils.vector_to_parameters(optimizer.master, master.parameters())
    logits, error = direct(master, data, 8)
    assert result["master_error"] == pytest.approx(error)
    assert result["master_loss"] == pytest.approx(F.cross_entropy(logits, data.test_labels).item(), rel=1e-5)
    for model, distance in zip(models, result["distances"], strict=True):
        weights = torch.nn.utils.parameters_to_vector(model.parameters())
        assert distance == pytest.approx(((weights - optimizer.master).norm() / optimizer.master.norm()).item())


def test_the_evaluation_model_holds_the_master_at_the_end():
    data, model = dataset(), network()
    optimizer, _ = spread_replicas(2)
    evaluation.evaluate(optimizer, model, data, batch_size=8, replicas=[0, 1])
    assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), optimizer.master)
    recalibrated = deepcopy(model)
    recalibrate(recalibrated, data, batch_size=8)
    assert all(map(torch.equal, statistics(model), statistics(recalibrated)))


@pytest.mark.parametrize("n", [1, 3])
def test_evaluation_by_three_ranks_equals_one_process(n):
    data = dataset(test=31)
    one, replicas = spread_replicas(n)
    expected = evaluation.evaluate(one, network(), data, batch_size=8, replicas=list(range(n)))

    optimizers = [together(deepcopy(replicas[rank % n])) for rank in range(3)]
    for optimizer in optimizers:
        optimizer.num_replicas = n
        optimizer.master.copy_(one.master)

    def work(world):
        team = world if n == 1 else distributed.Group()
        here = dict(replicas=[world.index % n], team=team, world=world)
        return evaluation.evaluate(optimizers[world.index], network(), data, batch_size=8, **here)

    for result in shared(3, work):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert result[name] == pytest.approx(value, rel=1e-5), name


def randomize_statistics(*models):
    """Give each model its own batch-norm statistics, as training would."""
    for number, model in enumerate(models):
        random = torch.Generator().manual_seed(number)
        for layer in norms(model):
            layer.running_mean.copy_(torch.randn(layer.running_mean.shape, generator=random))
            layer.running_var.copy_(0.5 + torch.rand(layer.running_var.shape, generator=random))


def with_statistics(model, values):
    model = deepcopy(model)
    for tensor, value in zip(running(model), values, strict=True):
        tensor.copy_(value)
    return model.eval()


def error(logits, data):
    return 100 * (logits.argmax(1) != data.test_labels).double().mean().item()


AVERAGED = ("running_stats_master_error", "running_stats_replica_errors", "running_stats_ensemble_error")


def averaged_by_hand(optimizer, models, data):
    """The errors in the order of AVERAGED."""
    inputs = inputs_of(data, data.test_images)
    every = [deepcopy(model).eval()(inputs) for model in models]
    ensemble = torch.stack([logits.softmax(1) for logits in every]).mean(0)
    master = network()
    torch.nn.utils.vector_to_parameters(optimizer.master, master.parameters())
    means = [torch.stack(values).mean(0) for values in zip(*map(statistics, models), strict=True)]
    master = with_statistics(master, means)(inputs)
    return [error(master, data), [error(logits, data) for logits in every], error(ensemble, data)]


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: DataParallel(model, [0, 1])])
def test_running_statistics_evaluation_equals_a_direct_one(wrap):
    data = dataset(test=200)
    optimizer, models = spread_replicas(3)
    randomize_statistics(*models)
    before = list(map(statistics, models))
    networks = [wrap(model) for model in models]
    result = evaluation.evaluate_running_stats(optimizer, networks, network(), data, replicas=[0, 1, 2])
    expected = averaged_by_hand(optimizer, models, data)
    assert [result.pop(name) for name in AVERAGED] == [pytest.approx(value) for value in expected]
    assert not result
    recalibrated = evaluation.evaluate(optimizer, network(), data, batch_size=8, replicas=[0, 1, 2])
    for name, value in zip(AVERAGED, expected, strict=True):
        assert recalibrated[name.removeprefix("averaged_")] != value
    for model, values in zip(models, before, strict=True):
        assert all(map(torch.equal, statistics(model), values))


@pytest.mark.parametrize("ranks_per_replica", [1, 2])
def test_running_statistics_on_ranks_equal_one_process(ranks_per_replica):
    data = dataset(test=31)
    one, replicas = spread_replicas(2)
    randomize_statistics(*replicas)
    expected = evaluation.evaluate_running_stats(one, replicas, network(), data, replicas=[0, 1])

    size, networks, optimizers = 2 * ranks_per_replica, [], []
    for rank in range(size):
        replica, part = divmod(rank, ranks_per_replica)
        networks.append(deepcopy(replicas[replica]))
        shift = part - (ranks_per_replica - 1) / 2  # each has its own, and their mean is the replica's
        for value, before in zip(running(networks[-1]), statistics(replicas[replica]), strict=True):
            value.copy_(before + 0.4 * shift)
        optimizers.append(together(networks[-1]))
        optimizers[-1].num_replicas = 2
        optimizers[-1].master.copy_(one.master)
    gathered = [None] * size
    barriers = [threading.Barrier(ranks_per_replica, timeout=20) for _ in range(2)]
    shares = [None] * size

    def work(world):
        replica, part = divmod(world.index, ranks_per_replica)

        def add(tensor):
            shares[world.index] = tensor.clone()
            barriers[replica].wait()
            total = sum(shares[replica * ranks_per_replica :][:ranks_per_replica])
            barriers[replica].wait()
            tensor.copy_(total)

        def gather(value):
            gathered[world.index] = value
            world.add(torch.zeros(()))  # waits for all
            return gathered

        team = distributed.Group(part, ranks_per_replica, add)
        everyone = world._replace(gather=gather)
        where = dict(replicas=[replica], team=team, world=everyone)
        return evaluation.evaluate_running_stats(
            optimizers[world.index], [networks[world.index]], network(), data, **where
        )

    for result in shared(size, work):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert result[name] == pytest.approx(value), name


def test_nonfinite_running_statistics_give_nan_errors():
    data = dataset()
    optimizer, models = spread_replicas(3)
    randomize_statistics(*models)
    expected = evaluation.evaluate_running_stats(optimizer, models, network(), data, replicas=[0, 1, 2])
    norms(models[1])[1].running_var[0] = float("nan")
    result = evaluation.evaluate_running_stats(optimizer, models, network(), data, replicas=[0, 1, 2])
    first, _, last = expected["running_stats_replica_errors"]
    assert result["running_stats_replica_errors"] == pytest.approx([first, float("nan"), last], nan_ok=True)
    assert result["running_stats_master_error"] != result["running_stats_master_error"]
    assert result["running_stats_ensemble_error"] != result["running_stats_ensemble_error"]


def test_without_batch_norm_there_are_no_running_errors(monkeypatch):
    monkeypatch.setattr(engine, "predict", None)
    model = mlp()
    assert evaluation.evaluate_running_stats(together(model), [model], mlp(), dataset(), replicas=[0]) == {}


def test_evaluation_does_not_change_training_state(comm):
    data, model, evaluation_model = dataset(), network(), network()
    batches = loader.BatchLoader(data, batch_size=8, seed=1)
    optimizer = Parle(model.parameters(), comm, lr=0.1, sync_every=4, batches_per_epoch=5)

    def train(steps):
        for _ in range(steps):
            inputs, targets = next(batches)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    def everything():
        state = optimizer.state_dict()
        tensors = [*model.state_dict().values(), *(parameter.grad for parameter in model.parameters())]
        tensors += [tensor for entry in state["state"].values() for tensor in entry.values()]
        tensors += [*optimizer.piggyback, torch.get_rng_state()]
        modes = [layer.training for layer in model.modules()]
        momenta = [layer.momentum for layer in norms(model)]
        return [tensor.clone() for tensor in tensors], [state["param_groups"], modes, momenta, batches.drawn]

    train(6)  # into the middle of the second round
    before, also_before = deepcopy(everything())
    result = evaluation.evaluate(optimizer, evaluation_model, data, batch_size=8, replicas=[0])
    after, also_after = everything()
    assert result["distances"][0] > 0
    assert len(before) == len(after) and all(map(torch.equal, before, after))
    assert also_before == also_after
    assert model.training


# Training


def start(comm, data=None, model=None, batch_size=8, **settings):
    """Model, batches and optimizer, ready to be trained."""
    model = mlp() if model is None else model
    batches = loader.BatchLoader(dataset() if data is None else data, batch_size=batch_size, seed=1)
    optimizer = Parle(model.parameters(), comm, batches_per_epoch=batches.per_epoch, **SGD | settings)
    return model, batches, optimizer


def train(model, batches, optimizer, evaluate=None, **settings):
    evaluate = evaluate or (lambda: {"master_error": 50.0})
    settings = dict(epochs=2, lr_drops=[], lr_decay=0.2) | settings
    return list(training.train([model], [batches], optimizer, evaluate, **settings))


def of_kind(kind, events):
    return [event for event in events if event["event"] == kind]


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

    events = train(model, batches, optimizer, evaluate, epochs=epochs, eval_every=eval_every)
    seen = [(event["event"], event.get("round")) for event in events]
    assert seen == [(kind, done) for done in evals for kind in ("round", "eval")] + [("end", None)]
    for kind, keys in (("round", ROUND), ("eval", EVAL), ("end", END)):
        for event in of_kind(kind, events):
            assert keys <= event.keys()
            assert kind == "end" or event["epoch"] == event["round"] / 5
    assert optimizer.rounds_done == evals[-1] == max(1, round(epochs * 5))
    assert batches.drawn == 3 * evals[-1]
    seconds = [event["seconds"] for event in events]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_end_event_has_the_last_and_the_best_error(comm):
    errors = iter([30.0, 10.0, 20.0])
    events = train(*start(comm), lambda: {"master_error": next(errors)}, epochs=3)
    assert (events[-1]["master_error"], events[-1]["best_master_error"]) == (20.0, 10.0)


@pytest.mark.parametrize(
    ("at", "calls"),
    [
        (5, ["save", "evaluate", "save"]),  # a run that is killed during the evaluation loses nothing
        (4, ["save"]),
        (99, ["evaluate", "save", "evaluate", "save"]),
    ],
)
def test_a_stop_request_saves_before_the_evaluation(comm, at, calls):
    model, batches, optimizer = start(comm)
    asked, done = training.StopRequest(), []

    def evaluate():
        done.append("evaluate")
        return {"master_error": 50.0}

    def ask(*_):
        asked.stop = optimizer.rounds_done >= at

    optimizer.register_step_post_hook(ask)
    events = train(model, batches, optimizer, evaluate, asked=asked, save=lambda progress: done.append("save"))
    assert done == calls
    assert optimizer.rounds_done == min(at, 10)
    assert [event["event"] for event in events[-1:]] == {4: [], 5: ["eval"]}.get(at, ["end"])


def test_evaluation_time_is_not_training_time(comm):
    def evaluate():
        time.sleep(0.1)
        return {"master_error": 50.0}

    *_, last, _, end = train(*start(comm), evaluate)
    assert last["seconds"] <= end["seconds"] <= end["wall_seconds"] - 0.2


@pytest.mark.parametrize(
    ("sync_every", "epochs", "lines"), [(1, 2, [25, 30, 55, 60]), (25, 0.1, [1, 2, 3]), (10, 0.2, [3, 6])]
)
def test_a_line_is_logged_at_the_first_sync_after_25_steps(sync_every, epochs, lines, comm):
    events = train(*start(comm, dataset(train=60), batch_size=2, sync_every=sync_every), epochs=epochs)
    assert [event["round"] for event in of_kind("round", events)] == lines


def test_training_equals_torch_sgd_with_its_loss_and_error(comm):
    data, model = dataset(train=61), network()
    for layer in model:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    reference = deepcopy(model)
    model.eval()
    parts = start(comm, data, model, batch_size=2, weight_decay=1e-3, lr=0.01)
    events = train(*parts, epochs=2, lr_drops=[0.5, 1.5])

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

    torch.testing.assert_close(model.state_dict(), reference.state_dict(), atol=1e-4, rtol=1e-3)
    lines = [0, 25, 31, 56, 62]
    for event, first, last in zip(of_kind("round", events), lines[:-1], lines[1:], strict=True):
        assert event["round"] == last
        assert event["loss"] == pytest.approx(sum(losses[first:last]) / (last - first), rel=1e-4)
        assert event["error"] == pytest.approx(sum(errors[first:last]) / (last - first), rel=1e-4)
    assert model.training


def test_lr_drops_after_the_given_rounds(comm, monkeypatch):
    monkeypatch.setattr(engine, "LOG_EVERY", 1)
    parts = start(comm, dataset(train=32), sync_every=2, gamma=0.01)
    events = of_kind("round", train(*parts, epochs=3, lr_drops=[1, 2.5], lr_decay=0.2))
    assert [event["round"] for event in events] == list(range(1, 13))
    assert [event["lr"] for event in events] == pytest.approx([0.1] * 4 + [0.02] * 6 + [0.004] * 2)
    assert [event["gamma"] for event in events] == pytest.approx([0.01 * 1.125**k for k in range(12)])


def test_loss_and_error_fall(comm):
    parts = start(comm, dataset(train=80), sync_every=5, gamma=0.01, rho=0.01)
    events = of_kind("round", train(*parts, epochs=6))
    assert events[-1]["loss"] < 0.5 * events[0]["loss"]
    assert events[-1]["error"] < 0.5 * events[0]["error"]


def train_together(n, sync_every, epochs, evaluate=None):
    """The events of n replicas of this process, and the replicas' RMS distance after each event."""
    data, models = dataset(), [mlp()]
    models += [deepcopy(models[0]) for _ in range(1, n)]
    batches = [loader.BatchLoader(data, batch_size=8, seed=1, replica=a, replicas=n) for a in range(n)]
    optimizer = together(*models, sync_every=sync_every)
    evaluate = evaluate or (lambda: {"master_error": 50.0})
    events = training.train(models, batches, optimizer, evaluate, epochs=epochs, lr_drops=[], lr_decay=0.2)
    seen = [(event, torch.stack(optimizer.distances()).square().mean().sqrt().item()) for event in events]
    return models, batches, seen


@pytest.mark.parametrize(("n", "sync_every", "epochs", "images"), [(1, 1, 2, 80), (3, 4, 1.4, 672)])
def test_images_of_all_replicas_are_counted(n, sync_every, epochs, images):
    _, batches, seen = train_together(n, sync_every, epochs)
    assert seen[-1][0]["images"] == images == 8 * sum(source.drawn for source in batches)
    for event, _ in seen[:1]:
        images_of_line = 8 * n * sync_every * event["round"]
        assert event["images_per_second"] == pytest.approx(images_of_line / event["seconds"])


def test_logged_loss_is_the_mean_over_steps_and_replicas(monkeypatch):
    losses = []
    cross_entropy = F.cross_entropy

    def recorded(logits, targets, **settings):
        losses.append(cross_entropy(logits, targets).item())
        return cross_entropy(logits, targets, **settings)

    monkeypatch.setattr(F, "cross_entropy", recorded)
    _, _, seen = train_together(3, sync_every=10, epochs=1)
    assert len(losses) == 3 * 50
    first, second = (event for event, _ in seen if event["event"] == "round")
    assert (first["round"], second["round"]) == (3, 5)
    assert first["loss"] == pytest.approx(sum(losses[:90]) / 90, rel=1e-5)
    assert second["loss"] == pytest.approx(sum(losses[90:]) / 60, rel=1e-5)


def test_logged_distance_is_that_of_the_line_before():
    _, _, seen = train_together(3, sync_every=25, epochs=0.6)
    lines = [(event["spread"], distance) for event, distance in seen if event["event"] == "round"]
    assert len(lines) == 3
    for (_, distance), (spread, _) in pairwise(lines):
        assert spread == pytest.approx(distance, rel=1e-4) and spread > 0


def test_gradients_of_a_team_average_to_the_whole_batch(comm):
    data, model = dataset(train=14), mlp()

    def first_round(part, parts):
        replica = deepcopy(model)
        batches = loader.BatchLoader(data, batch_size=7, seed=1, part=(part, parts))
        optimizer = Parle(replica.parameters(), comm, batches_per_epoch=2, **SGD | dict(lr=0.0))
        event, *_ = train(replica, batches, optimizer, epochs=0.5, team=distributed.Group(part, parts))
        return [parameter.grad for parameter in replica.parameters()], torch.tensor([event["loss"], event["error"]])

    gradients, figures = first_round(0, 1)
    parts = [first_round(part, 3) for part in range(3)]
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(sum(part[0][i] for part in parts) / 3, gradient)
    torch.testing.assert_close(sum(part[1] for part in parts) / 3, figures)


def test_amp_computes_in_bfloat16_and_keeps_float32_weights(comm):
    model, batches, optimizer = start(comm)
    kinds = set()
    model[1].register_forward_hook(lambda layer, given, output: kinds.add(output.dtype))
    for amp, kind in ((False, torch.float32), (True, torch.bfloat16)):
        kinds.clear()
        event, *_ = train(model, batches, optimizer, amp=amp, epochs=1 + amp)
        assert kinds == {kind} and event["loss"] > 0
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in model.parameters())


# Dropout


@pytest.mark.parametrize("number", [0, 2**64 - 1])
def test_seeding_the_cpu_equals_torch_manual_seed(number):
    training.seed_device(torch.device("cpu"), number)
    drawn = F.dropout(torch.ones(1000))
    torch.manual_seed(number)
    assert torch.equal(drawn, F.dropout(torch.ones(1000)))


def test_seeding_a_gpu_seeds_only_that_gpu(monkeypatch):
    current, seeded = [0], []

    @contextmanager
    def device_index(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    module = SimpleNamespace(manual_seed=lambda number: seeded.append((current[0], number)))
    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    monkeypatch.setattr(torch, "get_device_module", lambda device: {"cuda": module}[device.type])
    before = torch.get_rng_state()
    training.seed_device(torch.device("cuda", 2), 7)
    assert (seeded, current) == ([(2, 7)], [0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("ids", "places"), [(None, ["cpu"]), ([0], ["cpu:0"]), ([3, 1], ["cpu:3", "cpu:1"])])
def test_devices_of_a_model_and_of_data_parallel(ids, places):
    model = mlp() if ids is None else DataParallel(mlp(), ids)
    assert training.network_devices(model) == [torch.device(place) for place in places]


@pytest.mark.parametrize("ids", [[3, 1], "mine"])
def test_device_ids_of_other_models_are_ignored(ids):
    model = mlp()
    model.device_ids = ids
    assert training.network_devices(model) == [torch.device("cpu")]


@pytest.mark.parametrize(("ids", "parts"), [(None, [0]), ([0, 1, 2], [0, 1, 2])])
def test_each_forward_pass_is_seeded_on_each_device(ids, parts, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "seed", lambda *seed: seen.append(seed))
    models = [mlp() if ids is None else DataParallel(mlp(), ids) for _ in range(2)]
    for a, model in enumerate(models):
        model.register_forward_pre_hook(lambda model, given, a=a: seen.append(a))
    batches = [loader.BatchLoader(dataset(), batch_size=8, seed=1, replica=a, replicas=2) for a in range(2)]
    optimizer = together(*models, sync_every=2)
    list(training.train(models, batches, optimizer, lambda: {"master_error": 50.0}, epochs=1, lr_drops=[], lr_decay=1))

    expected = []
    sources = [loader.BatchLoader(dataset(), batch_size=8, seed=1, replica=a, replicas=2) for a in range(2)]
    for _ in range(2 * 5):
        for a, source in enumerate(sources):
            next(source)
            places = [torch.device("cpu")] if ids is None else [torch.device("cpu", i) for i in ids]
            expected += [(place, source.dropout_seed(i)) for place, i in zip(places, parts, strict=True)] + [a]
    assert seen == expected
    numbers = [number for _, number in (seed for seed in seen if isinstance(seed, tuple))]
    assert len(set(numbers)) == len(numbers) == 2 * 5 * 2 * len(parts)


def test_dropout_of_a_replica_does_not_depend_on_the_others():
    data, model = dataset(), network()

    def logits(*replicas):
        """Train these of two replicas with lr 0 and return the logits of each."""
        models, drawn = [deepcopy(model) for _ in replicas], [[] for _ in replicas]
        for copy, outputs in zip(models, drawn, strict=True):
            copy.register_forward_hook(lambda _, given, output, outputs=outputs: outputs.append(output.detach()))
        batches = [loader.BatchLoader(data, batch_size=8, seed=1, replica=a, replicas=2) for a in replicas]
        optimizer = together(*models, lr=0.0, sync_every=2)
        settings = dict(epochs=0.6, lr_drops=[], lr_decay=1)
        list(training.train(models, batches, optimizer, lambda: {"master_error": 50.0}, **settings))
        return [torch.stack(outputs) for outputs in drawn]

    pair = logits(0, 1)
    assert pair[0].shape == (6, 8, 3)
    assert torch.equal(pair[0], *logits(0))
    torch.manual_seed(7)
    assert torch.equal(pair[1], *logits(1))


def test_waiting_time_is_separated_from_sync_time(monkeypatch):
    monkeypatch.setattr(engine, "LOG_EVERY", 1)
    seconds = [[1.0, 0.1, 0.5], [0.2, 2.0, 0.5]]  # of each round on each rank

    class Scripted(parle_gpu.Parle):
        sync_seconds = property(lambda self: sum(self.seconds[: self.rounds]))

    def work(world):
        model = mlp()
        optimizer = Scripted([model.parameters()], lr=0.1, sync_every=2, batches_per_epoch=5)
        optimizer.seconds = seconds[world.index]
        batches = loader.BatchLoader(dataset(), batch_size=8, seed=1)
        before = [training.TrainState(), training.TrainState(sync_seconds=1.0, straggler_seconds=2.0)][world.index]
        return train(model, batches, optimizer, epochs=0.6, progress=before, world=world)

    first, second = shared(2, work)
    assert [event["sync_seconds"] for event in of_kind("round", second)] == pytest.approx(seconds[1])
    sync, wait = (1.6 + 2.7) / 2, (0.8 + 1.9) / 2
    assert (first[-1]["sync_seconds"], first[-1]["straggler_seconds"]) == pytest.approx((sync, wait))
    assert (second[-1]["sync_seconds"], second[-1]["straggler_seconds"]) == pytest.approx((sync + 1, wait + 2))
