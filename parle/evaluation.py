"""Evaluate the master, the replicas and their ensemble, with recalibrated batch-norm statistics."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parle.distributed import Group, Groups
from parle.optimizer import ParleBase

if TYPE_CHECKING:
    from loader import Dataset

RECALIBRATION_BATCHES = 100  # enough: from 12,800 images a mean is known to 1 % of a standard deviation
EVALUATION_BATCH_SIZE = 256


def evaluate(
    optimizer: ParleBase,
    model: nn.Module,
    data: "Dataset",
    *,
    batch_size: int,
    replicas: Sequence[int],
    groups: Groups = Groups(),
) -> dict[str, Any]:
    """Return the test errors of the master, of every replica and of the ensemble, which averages probabilities.

    If the optimizer averages its master, "master" is the average, and "unaveraged_master" the master itself. Batch-norm
    statistics are recalibrated for each. `model` is overwritten by each in turn and holds the master afterwards; the
    training state does not change. Collective.

    Args:
        batch_size: of training, for the batch-norm statistics.
        replicas: numbers of the local replicas.
    """

    def recalibrate(replica: int | None, group: Group) -> None:
        recalibrate_batch_norm(model, calibration_batches(data, batch_size, group), group)

    return _evaluate(optimizer, model, data, recalibrate, replicas, groups)


def evaluate_running_stats(
    optimizer: ParleBase,
    model: nn.Module,
    data: "Dataset",
    *,
    networks: Mapping[int, nn.Module],
    groups: Groups = Groups(),
) -> dict[str, Any]:
    """Return the errors of `evaluate`, but with the batch-norm running statistics of training.

    A replica uses its own running statistics, averaged over the ranks that share it; the master uses the mean of the
    replicas'. A replica with NaN in its statistics makes its error, the master's and the ensemble's NaN. A network
    without running statistics gives no errors. Collective.

    Args:
        networks: the local replicas' networks by number.
    """
    if not running_stats(model):
        return {}
    local = {
        number: torch.cat([value.cpu().double() for value in running_stats(network)]) / groups.replica.size
        for number, network in networks.items()
    }
    mean = sum(local.values()) / optimizer.num_replicas
    groups.world.all_reduce(mean)
    for vector in local.values():
        groups.replica.all_reduce(vector)
    nonfinite = [number for number, vector in local.items() if not vector.isfinite().all()]

    def set_statistics(replica: int | None, group: Group) -> None:
        vector, statistics = mean if replica is None else local[replica], running_stats(model)
        for value, average in zip(statistics, vector.split([len(value) for value in statistics]), strict=True):
            value.copy_(average)

    result = _evaluate(optimizer, model, data, set_statistics, list(networks), groups)
    for replica in {number for numbers in groups.world.all_gather(nonfinite) for number in numbers}:
        result["replica_errors"][replica] = math.nan
        result |= {name: math.nan for name in result if name.endswith("_error")}
    return {f"running_stats_{name}": value for name, value in result.items() if name.endswith(("_error", "_errors"))}


def _evaluate(
    optimizer: ParleBase,
    model: nn.Module,
    data: "Dataset",
    set_statistics: Callable[[int | None, Group], None],
    replicas: Sequence[int],
    groups: Groups,
) -> dict[str, Any]:
    """Return the fields of an `eval` event.

    `set_statistics` sets the batch-norm statistics of `model` for a replica, or for the master (None).
    """
    labels = data.test_labels
    total, classes, n = len(labels), data.classes, optimizer.num_replicas
    masters = {"unaveraged_master": False} if optimizer.averages_master else {}
    masters["master"] = True  # last, so that it stays in the model
    # one message: each replica's errors and distance, the sum of their probabilities, each master's loss and errors
    message = torch.zeros(2 * n + total * classes + 2 * len(masters), dtype=torch.float64)
    wrong, distances, probabilities, sums = message.split([n, n, total * classes, 2 * len(masters)])
    probabilities = probabilities.view(total, classes)

    def predict_shard(replica: int | None, rows: slice, group: Group) -> tuple[Tensor, Tensor]:
        set_statistics(replica, group)
        logits = predict(model, data.test_images[rows], data)
        return logits, (logits.argmax(1) != labels[rows]).sum()

    rows, local_distances = groups.replica.shard(total), optimizer.distances()
    for index, replica in enumerate(replicas):
        optimizer.copy_replica_to(model, index)
        logits, wrong[replica] = predict_shard(replica, rows, groups.replica)
        probabilities[rows] += logits.softmax(1).cpu()
        if groups.replica.rank == 0:
            distances[replica] = local_distances[index]
    rows = groups.world.shard(total)
    for averaged, loss_and_errors in zip(masters.values(), sums.view(-1, 2), strict=True):
        optimizer.copy_master_to(model, averaged=averaged)
        logits, loss_and_errors[1] = predict_shard(None, rows, groups.world)
        loss_and_errors[0] = F.cross_entropy(logits, labels[rows], reduction="sum")
    groups.world.all_reduce(message)

    ensemble_wrong = (probabilities.argmax(1) != labels.cpu()).sum()
    result = {}
    for name, (loss, errors) in zip(masters, sums.view(-1, 2).tolist(), strict=True):
        result |= {f"{name}_loss": loss / total, f"{name}_error": 100 * errors / total}
    return result | {
        "replica_errors": [100 * value / total for value in wrong.tolist()],
        "ensemble_error": 100 * float(ensemble_wrong) / total,
        "replica_distances": distances.tolist(),
    }


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, data: "Dataset") -> Tensor:
    """Return the logits (N, classes) of images (N, H, W, C) as `data` stores them, in evaluation mode."""
    model.eval()
    return torch.cat([model(data.inputs(chunk)) for chunk in images.split(EVALUATION_BATCH_SIZE)])


def calibration_batches(data: "Dataset", batch_size: int, group: Group = Group()) -> Iterator[Tensor]:
    """Yield this rank's share of 100 mini-batches of training images without augmentation.

    The mini-batches of the whole group do not depend on its size.
    """
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    count = min(RECALIBRATION_BATCHES, len(order) // batch_size)
    for indices in order[: count * batch_size].view(count, batch_size)[group.shard(count)]:
        yield data.inputs(data.train_images[indices.to(data.train_labels.device)])


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Tensor], group: Group = Group()) -> None:
    """Recompute batch-norm statistics as their mean over mini-batches of inputs, with dropout off. Collective.

    The statistics of averaged weights are not the average of the statistics. torch's update_bn leaves dropout on.
    Draws no mini-batch for a model without running statistics. After an error the model is as before.

    Args:
        batches: this rank's mini-batches; the mean is over those of the whole group.

    Raises:
        ValueError: no rank has a mini-batch.
    """
    layers = _batch_norm_layers(model)
    if not layers:
        return
    with _cumulative_statistics(model, layers):
        count = 0
        for inputs in batches:
            model(inputs)
            count += 1

        statistics = running_stats(model)
        sums = [value.cpu().double() * count for value in statistics]
        message = torch.cat([*sums, torch.tensor([count], dtype=torch.float64)])
        group.all_reduce(message)
        if not message[-1]:
            raise ValueError("recalibrate_batch_norm needs at least one mini-batch")
        means = (message[:-1] / message[-1]).split([len(value) for value in statistics])
        for value, mean in zip(statistics, means, strict=True):
            value.copy_(mean)
        for layer in layers:
            layer.num_batches_tracked.fill_(int(message[-1]))


@contextmanager
def _cumulative_statistics(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Reset batch-norm layers and let only them train, so that their statistics become a plain mean over mini-batches.

    Restores modes and momenta at the end and, after an error, the statistics.
    """
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    saved = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean instead of a moving average
            layer.train()
        yield
    except BaseException:  # KeyboardInterrupt too
        for buffer, value in saved:
            buffer.copy_(value)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in modes:
            module.training = training  # train() would change its children too


def running_stats(model: nn.Module) -> list[Tensor]:
    """Return the running mean and variance of every batch-norm layer that has them; not copies."""
    return [value for layer in _batch_norm_layers(model) for value in (layer.running_mean, layer.running_var)]


def _batch_norm_layers(model: nn.Module) -> list[nn.Module]:
    """Return the batch-norm layers with running statistics; those with track_running_stats=False have none."""
    layers = (layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm))
    return [layer for layer in layers if layer.running_mean is not None]
