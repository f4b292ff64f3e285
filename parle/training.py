"""Train and evaluate. Knows replicas and their optimizer; knows neither MPI nor the name of a data set."""

import contextlib
import ctypes
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loader import Batches, Dataset
from parle.optimizer import ReplicaOptimizer

RECALIBRATION_BATCHES = 100  # enough: with 12,800 images a mean is known to 1 % of a standard deviation
EVALUATION_BATCH = 256
LOG_EVERY = 25  # mini-batches: one line a round, or every few rounds where those are shorter
# What the optimizer's riders carry: two sums since the last line, a square, and whether somebody asked to save or stop
LOSS, WRONG, SPREAD, SAVE, STOP = range(5)


class Team(NamedTuple):
    """Those who share a piece of work: which one this is, how many there are, and how they exchange.

    `add` sums a tensor over all, in place; `gather` gives the small objects of all.
    """

    index: int = 0
    size: int = 1
    add: Callable[[Tensor], None] = lambda tensor: None
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def part(self, total: int) -> slice:
        """This one's part of `total` rows."""
        return slice(self.index * total // self.size, (self.index + 1) * total // self.size)


ALONE = Team()


@dataclasses.dataclass
class Progress:
    """How far a run has come, besides what its optimizer counts. A checkpoint holds it."""

    batches: int = 0  # mini-batches of each replica
    images: int = 0  # of all replicas
    since: int = 0  # mini-batches since the last line
    seconds: float = 0.0  # of training, evaluation excluded
    seconds_logged: float = 0.0  # at the last line
    sync_seconds: float = 0.0
    wait_seconds: float = 0.0
    evaluated: int = 0  # the last round with an evaluation
    master_error: float | None = None  # of that
    best_master_error: float | None = None


class Asked:
    """What somebody outside asks of a run: to `save` a checkpoint, or to save and `stop`."""

    save = stop = False


def count_rounds(epochs: float, batches_per_epoch: int) -> int:
    """An epoch is a round for each mini-batch in one pass over the data; a run has one at least."""
    return max(1, round(epochs * batches_per_epoch))


def drop_rounds(epochs: list[float], batches_per_epoch: int) -> list[int]:
    """After how many rounds lr drops: one at least."""
    return [max(1, round(epoch * batches_per_epoch)) for epoch in epochs]


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
    checkpoint_every: int | None = None,
    save: Callable[[Progress], None] = lambda progress: None,
    progress: Progress | None = None,
    asked: Asked | None = None,
    amp: bool = False,
    team: Team = ALONE,
    world: Team = ALONE,
) -> Iterator[dict[str, Any]]:
    """Train the replicas that live here, and tell of it: yields the log's `round`, `lost`, `eval` and `end` events.

    Where somebody asks it to stop it does so after the mini-batch, or after the round where others must do the same,
    and yields no `end`.

    Args:
        models, batches: of each replica here, in the order of the optimizer's.
        evaluate: gives the `eval` event's figures; called at every epoch's end, every `eval_every` rounds and last.
        epochs, lr_drops: in epochs of nb rounds each.
        save: keeps a checkpoint; called at every epoch's end, every `checkpoint_every` rounds and when asked to.
        progress: of a run to go on with, whose optimizer has been restored.
        team, world: who shares one replica's mini-batches, and all there are.
    """
    _keep_freed_memory()
    nb, batch_size = batches[0].per_epoch, batches[0].batch_size
    rounds = count_rounds(epochs, nb)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, drop_rounds(lr_drops, nb), lr_decay)
    scheduler.last_epoch = optimizer.rounds
    resumed, progress, asked = progress is not None and progress.batches > 0, progress or Progress(), asked or Asked()
    for source in batches:
        source.drawn = progress.batches
    places = [devices(model) for model in models]
    sums = [riders.unbind() for riders in optimizer.riders]  # views: the optimizer keeps its riders where they are
    precision = torch.autocast(places[0][0].type, torch.bfloat16) if amp else contextlib.nullcontext()
    for model in models:
        model.train()

    began = mark = time.perf_counter()
    syncs: list[float] = []  # seconds of communication of each line since the last checkpoint
    synced = optimizer.sync_seconds
    images_per_step = batch_size * optimizer.num_replicas

    def is_due(done: int) -> bool:
        return done % nb == 0 or done == rounds or (eval_every is not None and done % eval_every == 0)

    def tested(done: int) -> dict[str, Any]:
        result = evaluate()
        error, best = result["master_error"], progress.best_master_error
        progress.master_error, progress.best_master_error = error, error if best is None else min(best, error)
        progress.evaluated = done
        return {"event": "eval", "round": done, "epoch": done / nb, "seconds": progress.seconds, **result}

    def keep() -> None:
        nonlocal mark
        progress.seconds += time.perf_counter() - mark
        _count_syncs(progress, syncs, world)
        save(progress)
        asked.save, mark = False, time.perf_counter()

    if resumed and progress.evaluated < optimizer.rounds and optimizer.batches == 0 and is_due(optimizer.rounds):
        yield tested(optimizer.rounds)  # it was killed before it could
        mark = time.perf_counter()
    while optimizer.rounds < rounds:
        optimizer.zero_grad()
        for model, source, where, riders in zip(models, batches, places, sums, strict=True):
            inputs, targets = next(source)
            for part, place in enumerate(where):
                seed(place, source.dropout_seed(part))
            with precision:
                logits = model(inputs)
            # scaled so that the mean over the team is the mean over the whole batch, however that was cut
            loss = F.cross_entropy(logits.float(), targets, reduction="sum") * (team.size / batch_size)
            loss.backward()
            riders[LOSS].add_(loss.detach())
            riders[WRONG].add_((logits.detach().argmax(1) != targets).sum() * (team.size / batch_size))
            riders[SAVE].fill_(asked.save)
            riders[STOP].fill_(asked.stop)
        optimizer.step()
        progress.batches, progress.since = progress.batches + 1, progress.since + 1
        progress.images += images_per_step
        ended, done = optimizer.batches == 0, optimizer.rounds
        if not ended and (world.size > 1 or not (asked.save or asked.stop)):
            continue

        if ended and optimizer.lost:
            for statistics in (value for model in models for value in _statistics(model)):
                if not statistics.isfinite().all():
                    statistics.zero_()  # they follow the replica, now that it is sound
            yield {"event": "lost", "round": done, "replicas": optimizer.lost}
        saves, stops = asked.save, asked.stop
        if world.size > 1:  # what any rank was asked, and all now know
            saves, stops = (optimizer.riders[0][SAVE:] > 0).tolist()
        ends_epoch = ended and (done % nb == 0 or done == rounds)
        evaluates = ended and is_due(done)
        saves |= stops or ends_epoch or (ended and checkpoint_every is not None and done % checkpoint_every == 0)
        lr = optimizer.param_groups[0]["lr"]
        if ended:
            scheduler.step()
        if evaluates or (ended and progress.since >= LOG_EVERY):
            loss_sum, wrong, squared_spread = optimizer.riders[0][:SAVE].tolist()  # waits for the device
            progress.seconds, mark = progress.seconds + time.perf_counter() - mark, time.perf_counter()
            syncs.append(optimizer.sync_seconds - synced)
            synced = optimizer.sync_seconds
            yield {
                "event": "round",
                "round": done,
                "epoch": done / nb,
                "seconds": progress.seconds,
                "loss": loss_sum / progress.since,
                "error": 100 * wrong / progress.since,
                "lr": lr,
                "gamma": optimizer.param_groups[0]["scoped_gamma"],
                "rho": optimizer.param_groups[0]["scoped_rho"],
                "spread": squared_spread**0.5,
                "sync_seconds": syncs[-1],
                "images_per_second": progress.since * images_per_step / (progress.seconds - progress.seconds_logged),
            }
            progress.since, progress.seconds_logged = 0, progress.seconds
            for riders, distance in zip(optimizer.riders, optimizer.distances(), strict=True):
                riders.zero_()
                riders[SPREAD] = distance**2
        if evaluates:
            if stops and done < rounds:  # who has asked may not wait for the evaluation
                keep()
            yield tested(done)
            mark = time.perf_counter()
        if saves:
            keep()
        if stops and done < rounds:
            return

    yield {
        "event": "end",
        "seconds": progress.seconds,
        "wall_seconds": time.perf_counter() - began,
        "master_error": progress.master_error,
        "best_master_error": progress.best_master_error,
        "sync_seconds": progress.sync_seconds,
        "wait_seconds": progress.wait_seconds,
        "images": progress.images,
    }


def _keep_freed_memory() -> None:
    """Have glibc give nothing back to the kernel.

    Else every mini-batch returns megabytes of activations and gets them again, cleared, with a fault for every page.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**31 - 1)


def devices(model: nn.Module) -> list[torch.device]:
    """Where `model` computes; more than one with torch's DataParallel."""
    own = next(model.parameters()).device
    if isinstance(model, nn.DataParallel):
        return [torch.device(own.type, index) for index in model.device_ids] or [own]
    return [own]


def seed(device: torch.device, number: int) -> None:
    """Seed what `device` draws: dropout then is the mini-batch's own, whoever else draws there."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(number)  # 1 µs; torch.manual_seed takes 70 for all kinds of devices
    else:
        with torch.accelerator.device_index(device.index):
            torch.get_device_module(device).manual_seed(number)


def _count_syncs(progress: Progress, seconds: list[float], world: Team) -> None:
    """Add what each line's communication took, the mean over the ranks, and how much of it they waited for each other.

    The one that comes last to a sync waits for nobody, so what it spends there is what a sync costs.
    """
    table = torch.zeros(world.size, len(seconds), dtype=torch.float64)
    table[world.index] = torch.tensor(seconds, dtype=torch.float64)
    world.add(table)
    total = float(table.sum()) / world.size
    progress.sync_seconds += total
    progress.wait_seconds += total - float(table.amin(0).sum())
    seconds.clear()


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

    def recalibrate(replica: int | None, sharers: Team) -> None:
        recalibrate_batch_norm(model, calibration_batches(data, batch_size, sharers), sharers)

    return _evaluate(optimizer, model, data, recalibrate, replicas, team, world)


def evaluate_averaged(
    optimizer: ReplicaOptimizer,
    networks: Sequence[nn.Module],
    model: nn.Module,
    data: Dataset,
    *,
    replicas: list[int],
    team: Team = ALONE,
    world: Team = ALONE,
) -> dict[str, Any]:
    """The errors that `evaluate` gives, but with the batch-norm statistics that were averaged while training.

    They are a replica's own running statistics, the mean over the ranks that share it, for the master the mean of the
    replicas', and in the ensemble each one's own. A replica that was lost has none, so what depends on it is NaN.

    Args:
        networks: that trained the replicas that live here. Those without batch norm give no errors.
    """
    if not _statistics(model):
        return {}
    own = [torch.cat([value.cpu().double() for value in _statistics(network)]) / team.size for network in networks]
    mean = sum(own) / optimizer.num_replicas
    world.add(mean)
    for vector in own:
        team.add(vector)
    lost = [replica for replica, vector in zip(replicas, own, strict=True) if not vector.isfinite().all()]

    def put(replica: int | None, sharers: Team) -> None:
        vector, statistics = mean if replica is None else own[replica], _statistics(model)
        for value, average in zip(statistics, vector.split([len(value) for value in statistics]), strict=True):
            value.copy_(average)

    result = _evaluate(optimizer, model, data, put, replicas, team, world)
    for replica in {number for numbers in world.gather(lost) for number in numbers}:
        result["replica_errors"][replica] = result["master_error"] = result["ensemble_error"] = math.nan
    return {f"averaged_{name}": result[name] for name in ("master_error", "replica_errors", "ensemble_error")}


def _evaluate(
    optimizer: ReplicaOptimizer,
    model: nn.Module,
    data: Dataset,
    prepare: Callable[[int | None, Team], None],
    replicas: list[int],
    team: Team,
    world: Team,
) -> dict[str, Any]:
    """`prepare` gives `model` the batch-norm statistics of a replica, by its place here, or of the master, None."""
    labels = data.test_labels
    total, classes, n = len(labels), data.classes, optimizer.num_replicas
    # one message for all: each replica's errors and distance, the sum of their probabilities, the master's loss, errors
    message = torch.zeros(2 * n + total * classes + 2, dtype=torch.float64)
    wrong, distances, probabilities, master = message.split([n, n, total * classes, 2])
    probabilities = probabilities.view(total, classes)

    def test(replica: int | None, rows: slice, sharers: Team) -> tuple[Tensor, Tensor]:
        prepare(replica, sharers)
        logits = predict(model, data.test_images[rows], data)
        return logits, (logits.argmax(1) != labels[rows]).sum()

    rows, lengths = team.part(total), optimizer.distances()
    for here, replica in enumerate(replicas):
        optimizer.copy_replica_to(model, here)
        logits, wrong[replica] = test(here, rows, team)
        probabilities[rows] += logits.softmax(1).cpu()
        if team.index == 0:
            distances[replica] = lengths[here]
    optimizer.copy_master_to(model)
    rows = world.part(total)
    logits, master[1] = test(None, rows, world)
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
    layers = _batch_norms(model)
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

    statistics = _statistics(model)
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


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def _statistics(model: nn.Module) -> list[Tensor]:
    return [value for layer in _batch_norms(model) for value in (layer.running_mean, layer.running_var)]
