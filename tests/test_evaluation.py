"""Batch-norm recalibration, and evaluation of the master, the replicas and their ensemble."""

from copy import deepcopy
from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import loader
from parle import evaluation
from parle.distributed import Group, Groups
from parle_mpi import Parle
from tests.toy import DataParallel, Member, build_optimizer, dataset, mlp, network, run_ranks, thread_groups


def recalibrate(model, data, batch_size, group=Group()):
    batches = evaluation.calibration_batches(data, batch_size, group)
    evaluation.recalibrate_batch_norm(model, batches, group)


def batch_norm_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]


def running_stats(model):
    return [tensor for layer in batch_norm_layers(model) for tensor in (layer.running_mean, layer.running_var)]


def copied_stats(model):
    return [tensor.clone() for tensor in running_stats(model)]


def normalized(data, images):
    return ((images.float() - data.mean) / data.std).permute(0, 3, 1, 2)


def error_of(logits, data):
    return 100 * (logits.argmax(1) != data.test_labels).double().mean().item()


@pytest.mark.parametrize(("size", "total"), [(1, 10), (4, 3), (7, 100)])
def test_shards_of_a_group_cover_all_rows(size, total):
    rows = [list(range(total))[Member(rank, size).shard(total)] for rank in range(size)]
    assert list(chain(*rows)) == list(range(total))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


# Batch norm


def test_recalibration_uses_training_images_without_dropout():
    data, model = dataset(), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1))
    (layer,) = batch_norm_layers(model)
    layer.running_mean.fill_(7.0)
    data = data._replace(std=data.std / 3)
    pixels = normalized(data, data.train_images)
    recalibrate(model, data, batch_size=len(data.train_labels))
    torch.testing.assert_close(layer.running_mean, pixels.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.running_var, pixels.var((0, 2, 3)), atol=1e-5, rtol=1e-5)


def test_recalibration_is_bitwise_repeatable_and_draws_nothing():
    data, model = dataset(), network().train()
    random = torch.get_rng_state()
    recalibrate(model, data, batch_size=8)
    assert torch.equal(torch.get_rng_state(), random)
    first = copied_stats(model)
    for layer in batch_norm_layers(model):
        layer.running_mean.normal_()
    torch.manual_seed(1)
    recalibrate(model, data, batch_size=8)
    assert all(map(torch.equal, copied_stats(model), first))


@pytest.mark.parametrize(("limit", "batch_size", "count"), [(100, 7, 5), (3, 8, 3)])
def test_recalibration_equals_update_bn_without_dropout(limit, batch_size, count, monkeypatch):
    monkeypatch.setattr(evaluation, "RECALIBRATION_BATCHES", limit)
    data, model = dataset(), network()
    for layer in model:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    reference, seen = deepcopy(model), []
    hook = model.register_forward_pre_hook(lambda model, given: seen.append(given[0].clone()))
    recalibrate(model, data, batch_size)
    hook.remove()
    assert [len(batch) for batch in seen] == [batch_size] * count
    images = {tuple(image.flatten().tolist()) for image in normalized(data, data.train_images)}
    chosen = [tuple(image.flatten().tolist()) for image in torch.cat(seen)]
    assert len(set(chosen)) == len(chosen) and set(chosen) <= images
    torch.optim.swa_utils.update_bn(seen, reference)
    torch.testing.assert_close(copied_stats(model), copied_stats(reference), atol=1e-6, rtol=1e-6)


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


def batches_until(error):
    """Yield one mini-batch, then raise `error`."""
    yield torch.ones(2, 1, 4, 4)
    raise error


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ([], ValueError),
        ([torch.ones(2, 1, 4, 4), torch.ones(2, 1, 5, 5)], RuntimeError),  # fails between the two batch-norm layers
        (batches_until(OSError()), OSError),
        (batches_until(KeyboardInterrupt()), KeyboardInterrupt),
    ],
    ids=["empty", "model", "iterator", "interrupt"],
)
def test_failed_recalibration_changes_nothing(batches, error):
    model = network().train()
    model[2].eval()
    model(torch.randn(8, 1, 4, 4))

    def settings():
        return [[module.training for module in model.modules()], [layer.momentum for layer in batch_norm_layers(model)]]

    before, tensors = settings(), deepcopy(model.state_dict())
    with pytest.raises(error):
        evaluation.recalibrate_batch_norm(model, iter(batches))
    assert settings() == before
    assert all(map(torch.equal, model.state_dict().values(), tensors.values()))


def test_recalibration_fails_on_every_rank_without_any_mini_batch():
    models = [network(), network()]
    randomize_stats(*models)
    tensors = [deepcopy(model.state_dict()) for model in models]

    def work(world):
        with pytest.raises(ValueError, match="at least one mini-batch"):
            evaluation.recalibrate_batch_norm(models[world.rank], [], world)

    run_ranks(2, work)
    for model, before in zip(models, tensors, strict=True):
        assert all(map(torch.equal, model.state_dict().values(), before.values()))


def untracked():
    """Return a network whose batch norm has no running statistics."""
    return nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), *mlp())


@pytest.mark.parametrize("build", [mlp, untracked])
def test_recalibration_without_running_statistics_does_nothing(build):
    model, calls = build().train(), []
    model.register_forward_hook(lambda *args: calls.append(args))
    batches = iter([torch.ones(2, 1, 4, 4)])
    evaluation.recalibrate_batch_norm(model, batches)
    assert not calls and model.training and len(list(batches)) == 1


def test_recalibration_skips_layers_without_running_statistics():
    images = torch.randn(8, 1, 4, 4)
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.BatchNorm2d(1))
    evaluation.recalibrate_batch_norm(model, [images])
    torch.testing.assert_close(model[1].running_mean, model[0](images).mean((0, 2, 3)))
    assert model[0].running_mean is None
    assert all(map(torch.equal, evaluation.running_stats(model), [model[1].running_mean, model[1].running_var]))


def test_recalibration_asks_to_initialize_lazy_layers():
    model = nn.Sequential(nn.LazyBatchNorm2d()).train()
    with pytest.raises(ValueError, match="uninitialized"):
        evaluation.recalibrate_batch_norm(model, [torch.ones(2, 1, 4, 4)])
    assert model[0].training and model[0].momentum == 0.1


def test_recalibration_by_seven_ranks_equals_one_process():
    data, model = dataset(), network()
    copies = [deepcopy(model) for _ in range(7)]
    batch_norm_layers(copies[0])[0].running_mean.fill_(float("nan"))  # on a rank without mini-batches
    recalibrate(model, data, batch_size=8)  # five mini-batches, so that some of the ranks have none
    run_ranks(7, lambda world: recalibrate(copies[world.rank], data, 8, world))
    for copy in copies:
        torch.testing.assert_close(copied_stats(copy), copied_stats(model), atol=1e-6, rtol=1e-5)
        assert all(map(torch.equal, copied_stats(copy), copied_stats(copies[0])))
        assert [int(layer.num_batches_tracked) for layer in batch_norm_layers(copy)] == [5, 5]


# Evaluation with recalibrated statistics


def test_predictions_are_made_in_evaluation_mode_in_order(monkeypatch):
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH_SIZE", 7)
    data, model = dataset(), network().train()
    logits = evaluation.predict(model, data.test_images, data)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, model.eval()(normalized(data, data.test_images)))
    assert not torch.allclose(logits, model.train()(normalized(data, data.test_images)))


def perturbed_replicas(n):
    """Return an optimizer and its n replicas, each at some distance from the master."""
    models = [network()]
    models += [deepcopy(models[0]) for _ in range(1, n)]
    optimizer = build_optimizer(*models)
    for number, model in enumerate(models):
        noise = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=noise), alpha=0.5)
    return optimizer, models


def rank_optimizer(model, num_replicas, master):
    """Return the optimizer of one simulated rank, which holds one replica."""
    optimizer = build_optimizer(model)
    optimizer.num_replicas = num_replicas
    sizes = [parameter.numel() for parameter in model.parameters()]
    for parameter, values in zip(model.parameters(), master.split(sizes), strict=True):
        optimizer.state[parameter]["master"].copy_(values.view_as(parameter))
    return optimizer


def master_of(optimizer):
    master = network()
    torch.nn.utils.vector_to_parameters(optimizer.master, master.parameters())
    return master


def recalibrated_logits(model, data, batch_size):
    """Return the logits of the test images and the error in percent, after recalibration."""
    model = deepcopy(model)
    recalibrate(model, data, batch_size)
    logits = model.eval()(normalized(data, data.test_images)).detach()
    return logits, error_of(logits, data)


def test_evaluation_equals_a_direct_computation():
    data = dataset(test=200)
    optimizer, models = perturbed_replicas(3)
    result = evaluation.evaluate(optimizer, network(), data, batch_size=8, replicas=[0, 1, 2])

    every = [recalibrated_logits(model, data, 8) for model in models]
    errors = [error for _, error in every]
    assert len(set(errors)) == 3
    assert result["replica_errors"] == pytest.approx(errors)
    mean = torch.stack([logits.softmax(1) for logits, _ in every]).mean(0)
    assert result["ensemble_error"] == pytest.approx(error_of(mean, data))
    assert result["ensemble_error"] not in errors
    other = torch.stack([logits for logits, _ in every]).mean(0)
    assert not torch.equal(mean.argmax(1), other.argmax(1)), "the data do not distinguish the two means"

    logits, error = recalibrated_logits(master_of(optimizer), data, 8)
    assert result["master_error"] == pytest.approx(error)
    assert result["master_loss"] == pytest.approx(F.cross_entropy(logits, data.test_labels).item(), rel=1e-5)
    for model, distance in zip(models, result["replica_distances"], strict=True):
        weights = torch.nn.utils.parameters_to_vector(model.parameters())
        assert distance == pytest.approx(((weights - optimizer.master).norm() / optimizer.master.norm()).item())


def test_an_averaged_master_is_evaluated_beside_the_master_itself():
    data, model = dataset(test=200), network()
    optimizer, models = perturbed_replicas(2)
    plain = evaluation.evaluate(optimizer, network(), data, batch_size=8, replicas=[0, 1])
    averaging = build_optimizer(*models, master_average=0.5)
    averaged = deepcopy(models[1])
    for mean, state in zip(averaged.parameters(), averaging.state.values(), strict=False):
        state["master_average"].copy_(mean.detach())
    for first, states in zip(optimizer.state.values(), averaging.state.values(), strict=True):
        if "master" in states:
            states["master"].copy_(first["master"])
    result = evaluation.evaluate(averaging, model, data, batch_size=8, replicas=[0, 1])
    _, error = recalibrated_logits(averaged, data, 8)
    assert result["unaveraged_master_error"] == plain["master_error"] != error
    assert result["unaveraged_master_loss"] == plain["master_loss"]
    assert result["master_error"] == pytest.approx(error)
    assert all(map(torch.equal, model.parameters(), averaged.parameters()))
    statistics = evaluation.evaluate_running_stats(averaging, model, data, networks=dict(enumerate(models)))
    assert statistics["running_stats_unaveraged_master_error"] != statistics["running_stats_master_error"]


def test_evaluation_model_holds_the_master_afterwards():
    data, model = dataset(), network()
    optimizer, _ = perturbed_replicas(2)
    evaluation.evaluate(optimizer, model, data, batch_size=8, replicas=[0, 1])
    assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), optimizer.master)
    recalibrated = deepcopy(model)
    recalibrate(recalibrated, data, batch_size=8)
    assert all(map(torch.equal, copied_stats(model), copied_stats(recalibrated)))


@pytest.mark.parametrize("n", [1, 3])
def test_evaluation_by_three_ranks_equals_one_process(n):
    data = dataset(test=31)
    one, models = perturbed_replicas(n)
    expected = evaluation.evaluate(one, network(), data, batch_size=8, replicas=list(range(n)))
    optimizers = [rank_optimizer(deepcopy(models[rank % n]), n, one.master) for rank in range(3)]

    def work(world):
        local = dict(replicas=[world.rank % n], groups=Groups(replica=world if n == 1 else Group(), world=world))
        return evaluation.evaluate(optimizers[world.rank], network(), data, batch_size=8, **local)

    for result in run_ranks(3, work):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert result[name] == pytest.approx(value, rel=1e-5), name


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
        momenta = [layer.momentum for layer in batch_norm_layers(model)]
        return [tensor.clone() for tensor in tensors], [state["param_groups"], modes, momenta, batches.batches_drawn]

    train(6)  # into the middle of the second round
    tensors, settings = deepcopy(everything())
    with pytest.warns(UserWarning, match="2 steps"):
        result = evaluation.evaluate(optimizer, evaluation_model, data, batch_size=8, replicas=[0])
    tensors_after, settings_after = everything()
    assert result["replica_distances"][0] > 0
    assert len(tensors) == len(tensors_after) and all(map(torch.equal, tensors, tensors_after))
    assert settings == settings_after
    assert model.training


# Evaluation with the running statistics of training

RUNNING = ("running_stats_master_error", "running_stats_replica_errors", "running_stats_ensemble_error")


def randomize_stats(*models):
    """Give each model its own batch-norm statistics, as training would."""
    for number, model in enumerate(models):
        random = torch.Generator().manual_seed(number)
        for layer in batch_norm_layers(model):
            layer.running_mean.copy_(torch.randn(layer.running_mean.shape, generator=random))
            layer.running_var.copy_(0.5 + torch.rand(layer.running_var.shape, generator=random))


def running_stats_errors(optimizer, models, data):
    """Return the errors in the order of RUNNING."""
    inputs = normalized(data, data.test_images)
    every = [deepcopy(model).eval()(inputs) for model in models]
    ensemble = torch.stack([logits.softmax(1) for logits in every]).mean(0)
    master = master_of(optimizer)
    for tensor, *values in zip(running_stats(master), *map(running_stats, models), strict=True):
        tensor.copy_(torch.stack(values).mean(0))
    logits = master.eval()(inputs)
    return [error_of(logits, data), [error_of(logits, data) for logits in every], error_of(ensemble, data)]


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: DataParallel(model, [0, 1])])
def test_running_stats_evaluation_equals_a_direct_one(wrap):
    data = dataset(test=200)
    optimizer, models = perturbed_replicas(3)
    randomize_stats(*models)
    before = list(map(copied_stats, models))
    networks = dict(enumerate(map(wrap, models)))
    result = evaluation.evaluate_running_stats(optimizer, network(), data, networks=networks)
    expected = running_stats_errors(optimizer, models, data)
    assert [result.pop(name) for name in RUNNING] == [pytest.approx(value) for value in expected]
    assert not result
    recalibrated = evaluation.evaluate(optimizer, network(), data, batch_size=8, replicas=[0, 1, 2])
    for name, value in zip(RUNNING, expected, strict=True):
        assert recalibrated[name.removeprefix("running_stats_")] != value
    for model, values in zip(models, before, strict=True):
        assert all(map(torch.equal, running_stats(model), values))


@pytest.mark.parametrize("ranks_per_replica", [1, 2])
def test_running_stats_evaluation_by_ranks_equals_one_process(ranks_per_replica):
    data = dataset(test=31)
    one, models = perturbed_replicas(2)
    randomize_stats(*models)
    expected = evaluation.evaluate_running_stats(one, network(), data, networks=dict(enumerate(models)))

    networks, replica_groups = [], []
    for model in models:
        replica_groups += thread_groups(ranks_per_replica)
        for rank in range(ranks_per_replica):
            networks.append(deepcopy(model))
            shift = rank - (ranks_per_replica - 1) / 2  # each rank has its own, and their mean is the replica's
            for tensor in running_stats(networks[-1]):
                tensor.add_(0.4 * shift)
    optimizers = [rank_optimizer(model, 2, one.master) for model in networks]

    def work(world):
        local = {world.rank // ranks_per_replica: networks[world.rank]}
        groups = Groups(replica=replica_groups[world.rank], world=world)
        return evaluation.evaluate_running_stats(optimizers[world.rank], network(), data, networks=local, groups=groups)

    for result in run_ranks(2 * ranks_per_replica, work):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert result[name] == pytest.approx(value), name


def test_nonfinite_running_stats_give_nan_errors():
    data = dataset()
    optimizer, models = perturbed_replicas(3)
    randomize_stats(*models)
    networks = dict(enumerate(models))
    expected = evaluation.evaluate_running_stats(optimizer, network(), data, networks=networks)
    batch_norm_layers(models[1])[1].running_var[0] = float("nan")
    result = evaluation.evaluate_running_stats(optimizer, network(), data, networks=networks)
    first, _, last = expected["running_stats_replica_errors"]
    assert result["running_stats_replica_errors"] == pytest.approx([first, float("nan"), last], nan_ok=True)
    assert result["running_stats_master_error"] != result["running_stats_master_error"]
    assert result["running_stats_ensemble_error"] != result["running_stats_ensemble_error"]


@pytest.mark.parametrize("build", [mlp, untracked])
def test_no_running_stats_errors_without_running_statistics(build, monkeypatch):
    monkeypatch.setattr(evaluation, "predict", None)
    model = build()
    assert evaluation.evaluate_running_stats(build_optimizer(model), build(), dataset(), networks={0: model}) == {}
