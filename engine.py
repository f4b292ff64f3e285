"""Train and evaluate. Knows replicas and their optimizer; knows neither MPI nor the name of a data set."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loader import Batches, Dataset
from optimizer import ReplicaOptimizer

RECALIBRATION_BATCHES = 100  # enough: with 12,800 images a mean is known to 1 % of a standard deviation
EVALUATION_BATCH = 256
LOG_EVERY = 25  # mini-batches: one line a round, or every few rounds where those are shorter
LOSS, WRONG, SPREAD = range(3)  # what the optimizer's riders carry: two sums since the last line, and a square


class Team(NamedTuple):
    """Those who share a piece of work: which one this is, how many there are, and how they add up a tensor in place."""

    index: int = 0
    size: int = 1
    add: Callable[[Tensor], None] = lambda tensor: None

    def part(self, total: int) -> slice:
        """This one's part of `total` rows."""
        return slice(self.index * total // self.size, (self.index + 1) * total // self.size)


ALONE = Team()


def count_rounds(epochs: float, batches_per_epoch: int) -> int:
    """An epoch is a round for each mini-batch in one pass over the data; a run has one at least."""
    return max(1, round(epochs * batches_per_epoch))


def train(
    models: Sequence[nn.Module],
    batches: Sequence[Batches],
    optimizer: ReplicaOptimizer,
    evaluate: Callable[[], dict[str, Any]],
    *,
    epochs: float,
    lr_drops: list[float],
    lr_decay: float,
    eval_every: int | None = None,
    amp: bool = False,
    team: Team = ALONE,
    world: Team = ALONE,
) -> Iterator[dict[str, Any]]:
    """Train the replicas that live here, and tell of it: yields the log's `round`, `eval` and `end` events.

    Args:
        models, batches: of each replica here, in the order of the optimizer's.
        evaluate: gives the `eval` event's figures; called at every epoch's end, every `eval_every` rounds and last.
        epochs, lr_drops: in epochs of nb rounds each.
        team, world: who shares one replica's mini-batches, and all there are.
    """
    nb, batch_size = batches[0].per_epoch, batches[0].batch_size
    rounds = count_rounds(epochs, nb)
    drops = [round(drop * nb) for drop in lr_drops]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, lr_decay)
    precision = torch.autocast(devices(models[0])[0].type, torch.bfloat16) if amp else contextlib.nullcontext()
    for model in models:
        model.train()

    began = mark = time.perf_counter()
    seconds, best = 0.0, float("inf")
    since, seconds_logged = 0, 0.0  # mini-batches since, and seconds at, the last line
    syncs = []  # seconds of communication of each line
    total, images_per_step = 0, batch_size * optimizer.num_replicas
    while optimizer.rounds < rounds:
        optimizer.zero_grad()
        for model, source, riders in zip(models, batches, optimizer.riders, strict=True):
            inputs, targets = next(source)
            for part, place in enumerate(devices(model)):
                seed(place, source.dropout_seed(part))
            with precision:
                logits = model(inputs)
            # scaled so that the mean over the team is the mean over the whole batch, however that was cut
            loss = F.cross_entropy(logits.float(), targets, reduction="sum") * (team.size / batch_size)
            loss.backward()
            riders[LOSS] += loss.detach()
            riders[WRONG] += (logits.detach().argmax(1) != targets).sum() * (team.size / batch_size)
        optimizer.step()
        since, total = since + 1, total + 1
        if optimizer.batches:
            continue

        done, lr = optimizer.rounds, optimizer.param_groups[0]["lr"]
        scheduler.step()
        evaluates = done % nb == 0 or done == rounds or (eval_every is not None and done % eval_every == 0)
        if since >= LOG_EVERY or evaluates:
            loss_sum, wrong, squared_spread = optimizer.riders[0].tolist()  # waits for the device
            now = time.perf_counter()
            seconds, mark = seconds + now - mark, now
            syncs.append(optimizer.sync_seconds - sum(syncs))
            yield {
                "event": "round",
                "round": done,
                "epoch": done / nb,
                "seconds": seconds,
                "loss": loss_sum / since,
                "error": 100 * wrong / since,
                "lr": lr,
                "gamma": optimizer.param_groups[0]["scoped_gamma"],
                "rho": optimizer.param_groups[0]["scoped_rho"],
                "spread": squared_spread**0.5,
                "sync_seconds": syncs[-1],
                "images_per_second": since * images_per_step / (seconds - seconds_logged),
            }
            since, seconds_logged = 0, seconds
            for riders, distance in zip(optimizer.riders, optimizer.distances(), strict=True):
                riders.zero_()
                riders[SPREAD] = distance**2
        if evaluates:
            result = evaluate()
            best = min(best, result["master_error"])
            yield {"event": "eval", "round": done, "epoch": done / nb, "seconds": seconds, **result}
            mark = time.perf_counter()

    sync_seconds, wait_seconds = _sync_cost(syncs, world)
    yield {
        "event": "end",
        "seconds": seconds,
        "wall_seconds": time.perf_counter() - began,
        "master_error": result["master_error"],
        "best_master_error": best,
        "sync_seconds": sync_seconds,
        "wait_seconds": wait_seconds,
        "images": total * images_per_step,
    }


def devices(model: nn.Module) -> list[torch.device]:
    """Where `model` computes; more than one with torch's DataParallel."""
    own = next(model.parameters()).device
    return [torch.device(own.type, index) for index in getattr(model, "device_ids", [])] or [own]


def seed(device: torch.device, number: int) -> None:
    """Seed what `device` draws: dropout then is the mini-batch's own, whoever else draws there."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(number)  # 1 µs; torch.manual_seed takes 70 for all kinds of devices
    else:
        with torch.accelerator.device_index(device.index):
            torch.get_device_module(device).manual_seed(number)


def _sync_cost(seconds: list[float], world: Team) -> tuple[float, float]:
    """Seconds of communication, the mean over the ranks, and how many of them they waited for each other.

    The one that comes last to a sync waits for nobody, so what it spends there is what a sync costs.
    """
    table = torch.zeros(world.size, len(seconds), dtype=torch.float64)
    table[world.index] = torch.tensor(seconds, dtype=torch.float64)
    world.add(table)
    total = float(table.sum()) / world.size
    return total, total - float(table.amin(0).sum())


def evaluate(
    optimizer: ReplicaOptimizer,
    model: nn.Module,
    data: Dataset,
    *,
    batch_size: int,
    replicas: list[int],
    team: Team = ALONE,
    world: Team = ALONE,
) -> dict[str, Any]:
    """Test the master, every replica, and the ensemble of the replicas: the mean of their probabilities.

    Each has its batch-norm statistics recomputed first. `model` is filled with each in turn, last with the master;
    what trains is not touched.

    Args:
        batch_size: of the training, for the batch-norm statistics.
        replicas: numbers of the replicas that live here.
        team, world: who shares one replica, and all there are.
    """
    labels = data.test_labels
    total, classes, n = len(labels), data.classes, optimizer.num_replicas
    # one message for all: each replica's errors and distance, the sum of their probabilities, the master's loss, errors
    message = torch.zeros(2 * n + total * classes + 2, dtype=torch.float64)
    wrong, distances, probabilities, master = message.split([n, n, total * classes, 2])
    probabilities = probabilities.view(total, classes)

    def test(rows: slice, sharers: Team) -> tuple[Tensor, Tensor]:
        recalibrate_batch_norm(model, calibration_batches(data, batch_size, sharers), sharers)
        logits = predict(model, data.test_images[rows], data)
        return logits, (logits.argmax(1) != labels[rows]).sum()

    rows, lengths = team.part(total), optimizer.distances()
    for here, replica in enumerate(replicas):
        optimizer.copy_replica_to(model, here)
        logits, wrong[replica] = test(rows, team)
        probabilities[rows] += logits.softmax(1).cpu()
        if team.index == 0:
            distances[replica] = lengths[here]
    optimizer.copy_master_to(model)
    rows = world.part(total)
    logits, master[1] = test(rows, world)
    master[0] = F.cross_entropy(logits, labels[rows], reduction="sum")
    world.add(message)

    ensemble_wrong = (probabilities.argmax(1) != labels.cpu()).sum()
    return {
        "master_loss": float(master[0]) / total,
        "master_error": 100 * float(master[1]) / total,
        "replica_errors": [100 * value / total for value in wrong.tolist()],
        "ensemble_error": 100 * float(ensemble_wrong) / total,
        "distances": distances.tolist(),
    }


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, data: Dataset) -> Tensor:
    """Logits (N, classes) of images (N, H, W, C) as `data` keeps them, with the model in evaluation mode."""
    model.eval()
    return torch.cat([model(data.inputs(chunk)) for chunk in images.split(EVALUATION_BATCH)])


def calibration_batches(data: Dataset, batch_size: int, team: Team = ALONE) -> Iterator[Tensor]:
    """This one's share of up to 100 mini-batches of training images, not augmented: the same for any size of team."""
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    count = min(RECALIBRATION_BATCHES, len(order) // batch_size)
    for indices in order[: count * batch_size].view(count, batch_size)[team.part(count)]:
        yield data.inputs(data.train_images[indices.to(data.train_labels.device)])


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Tensor], team: Team = ALONE) -> None:
    """Recompute batch-norm statistics as the mean over mini-batches of inputs, those of the whole team, dropout off.

    The statistics of averaged weights are not the average of the statistics. torch's update_bn would leave dropout on.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    was_training = [module.training for module in model.modules()]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the mini-batches
        layer.train()
    count = 0
    for inputs in batches:
        model(inputs)
        count += 1

    statistics = [value for layer in layers for value in (layer.running_mean, layer.running_var)]
    sums = [value.cpu().double() * count for value in statistics]
    message = torch.cat([*sums, torch.tensor([count], dtype=torch.float64)])
    team.add(message)
    if not message[-1]:
        raise ValueError("No mini-batch to recompute batch-norm statistics on")
    means = (message[:-1] / message[-1]).split([len(value) for value in statistics])
    for value, mean in zip(statistics, means, strict=True):
        value.copy_(mean)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.num_batches_tracked.fill_(int(message[-1]))
    for module, training in zip(model.modules(), was_training, strict=True):
        module.training = training
