"""Trials: train one method once on a task, and return the row of its errors.

A trial trains its replicas one after another on one thread with parle_gpu.Parle on the CPU. `run_missing` runs trials
in parallel, one per core, so errors are comparable but seconds are not.

Local SGD replaces the weights of all replicas by their mean every L steps. DiLoCo takes an outer Nesterov step of 0.7
towards that mean. Every trial can also average the master over time, with several decays at once: an average does not
affect training.
"""

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import loader
import models
from benchmarks import results
from parle import evaluation, logger, training
from parle.algorithm import COUPLING_MAX, PRESETS, update_average
from parle.cores import count_cores
from parle_gpu import Parle

BATCH_SIZE = 128
LR_DECAY = 0.2  # the factor of lr at each drop
# name → factor of lr at a fraction of the run, for every method
SCHEDULES: dict[str, Callable[[float], float]] = {
    "drops": lambda fraction: LR_DECAY ** sum(fraction >= drop for drop in (0.5, 0.75)),
    "constant": lambda fraction: 1.0,
    "cosine": lambda fraction: (1 + math.cos(math.pi * fraction)) / 2,
    "one drop": lambda fraction: LR_DECAY ** (fraction >= 0.75),
}
AVERAGE_EVERY = 25  # steps to which the decay of an average refers; it is updated after every round
NO_SCOPING = 10**9  # batches per epoch for which gamma_k and c_k stay constant
NUM_VALIDATION_IMAGES = 5000
EVAL_FRACTIONS = (0.1, 0.2, 0.4, 0.6, 0.8)  # the master is tested at these fractions of a run and at the end
CHECKPOINT_SECONDS = 300  # between two checkpoints of a trial

Config = dict[str, Any]  # changes to DEFAULTS


class Task(NamedTuple):
    """A data set and a network."""

    dataset: str
    num_train_images: int  # the first ones of a fixed shuffle
    downsample: int  # average-pooling of height and width
    build_model: Callable[[loader.Dataset], nn.Module]
    augment: bool
    weight_decay: float
    steps: int  # per replica, for a config of length 1


def lenet(data: loader.Dataset) -> nn.Module:
    return models.build("lenet", data.channels, data.size, data.classes)


def allcnn(width: int) -> Callable[[loader.Dataset], nn.Module]:
    """Return a builder of All-CNN without dropout; its settings width is 96."""

    def build(data: loader.Dataset) -> nn.Module:
        model = models.AllCNN(data.channels, data.size, data.classes, dropout=0.0, width=width)
        return model.to(memory_format=torch.channels_last)

    return build


TASKS = {
    "cifar-5000": Task("cifar10", 5000, 2, allcnn(16), True, 1e-3, 1000),
    "mnist-2000": Task("mnist", 2000, 1, lenet, False, 0.0, 600),
    "mnist": Task("mnist", 60_000, 1, lenet, False, 0.0, 1000),
    "cifar-width-32": Task("cifar10", 50_000, 1, allcnn(32), True, 1e-3, 3910),
}

# The outer update moves the anchor by outer_lr times its gradient. "lr", Parle's default, follows lr when lr drops; a
# number stays constant. length multiplies the steps, scoping_rate the growth of gamma_k and c_k (0 is constant).
# averages are decays per AVERAGE_EVERY steps. The split "validation" tests on training images that are not trained on.
# amp computes forward and backward passes in bfloat16.
DEFAULTS: Config = {
    **PRESETS["parle"],
    **dict(replicas=3, alpha=0.75, lr=0.1, momentum=0.9, outer_lr="lr", outer_momentum=0.9),
    **dict(length=1, scoping_rate=1, frac=1.0, schedule="drops", split="test", averages=[], amp=False),
    **dict(decay_inner_lr=True, keep_inner_momentum=True, reset_replicas=False),
}
SGD: Config = PRESETS["sgd"] | dict(outer_lr="lr", outer_momentum=0.9)
ELASTIC_SGD: Config = PRESETS["elastic-sgd"] | dict(replicas=3, rho=1 / 3)
# c_k is at its maximum, so that the master moves by outer_lr (1 + COUPLING_MAX) towards the mean of the replicas
PERIODIC_AVERAGING: Config = dict(gamma=0.0, alpha=0.0, rho=COUPLING_MAX, reset_replicas=True)
LOCAL_SGD: Config = PERIODIC_AVERAGING | dict(outer_lr=1 / (1 + COUPLING_MAX), outer_momentum=0.0)
DILOCO: Config = PERIODIC_AVERAGING | dict(outer_lr=0.7 / (1 + COUPLING_MAX), outer_momentum=0.9)


def load_data(task: Task, raw: Path | None, proc: Path, split: str = "test") -> loader.Dataset:
    """Return the task's data; for the split "validation" its test images are training images not trained on."""
    data = loader.load(task.dataset, raw, proc)
    shuffle = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    train, held_out = shuffle[: task.num_train_images], shuffle[task.num_train_images :][:NUM_VALIDATION_IMAGES]
    if split == "validation":
        if not len(held_out):
            train, held_out = train[:-NUM_VALIDATION_IMAGES], train[-NUM_VALIDATION_IMAGES:]
        data = data._replace(test_images=data.train_images[held_out], test_labels=data.train_labels[held_out])

    def downsample(images: Tensor) -> Tensor:
        if task.downsample == 1:
            return images
        small = F.avg_pool2d(images.permute(0, 3, 1, 2).float(), task.downsample)
        return small.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    return data._replace(
        train_images=downsample(data.train_images[train]),
        train_labels=data.train_labels[train],
        test_images=downsample(data.test_images),
    )


def run_trial(
    task_name: str, config: Config, seed: int, raw: Path | None, proc: Path, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Train once on one thread and return the row.

    Args:
        checkpoint: file from which the trial resumes, and which it replaces every CHECKPOINT_SECONDS.
    """
    torch.set_num_threads(1)
    training.disable_malloc_trim()
    task, settings, start_time = TASKS[task_name], defaults(task_name) | config, time.perf_counter()
    data, n = load_data(task, raw, proc, settings["split"]), settings["replicas"]
    networks, batches, optimizer = build_replicas(task, settings, seed, data)
    eval_model, steps = task.build_model(data), settings["length"] * task.steps
    eval_steps = [round(fraction * steps) for fraction in EVAL_FRACTIONS] if settings["split"] == "test" else []
    progress = dict(step=0, curve=[], losses=[], nonfinite=0, num_averaged=0, seconds=0.0, revisions=[])
    averages = {decay: torch.zeros_like(optimizer.master) for decay in settings["averages"]}
    if checkpoint and checkpoint.exists():
        progress = load_checkpoint(checkpoint, networks, batches, optimizer, averages)
    progress["revisions"] = list(dict.fromkeys([*progress["revisions"], logger.revision()]))
    next_save = time.perf_counter() + CHECKPOINT_SECONDS
    row = dict(task=task_name, config=config, seed=seed, steps=steps, gradient_evaluations=steps * n)
    for step in range(progress["step"] + 1, steps + 1):
        set_lr(optimizer, settings, SCHEDULES[settings["schedule"]]((step - 1) / steps))
        losses = compute_gradients(networks, batches, settings["amp"])
        progress["losses"] = [*progress["losses"], *losses][-100 * n :]
        try:
            optimizer.step()
            if step == steps:
                optimizer.sync()
        except FloatingPointError:
            return row | dict(error=None, diverged=step, curve=progress["curve"])
        round_ended = optimizer.step_in_round == 0
        if round_ended:
            progress["nonfinite"] += len(optimizer.nonfinite_replicas)
            end_round(networks, optimizer, settings)
            progress["num_averaged"] += 1
            for decay, average in averages.items():
                per_round = decay ** (settings["sync_every"] / AVERAGE_EVERY)
                update_average(average, optimizer.master, count=progress["num_averaged"], decay=per_round)
        if step in eval_steps:
            progress["curve"].append((step, *evaluate_masters(optimizer, averages, eval_model, data)))
        if round_ended and checkpoint and time.perf_counter() >= next_save:
            progress |= dict(step=step, seconds=progress["seconds"] + time.perf_counter() - start_time)
            save_checkpoint(checkpoint, networks, optimizer, averages, progress)
            start_time, next_save = time.perf_counter(), time.perf_counter() + CHECKPOINT_SECONDS
    train_loss = statistics.mean(progress["losses"])
    if not train_loss <= math.log(data.classes):  # NaN, or worse than chance level
        return row | dict(error=None, diverged=steps, curve=progress["curve"])
    _, averaged_errors = evaluate_masters(optimizer, averages, eval_model, data)
    last = evaluation.evaluate(optimizer, eval_model, data, batch_size=BATCH_SIZE, replicas=list(range(n)))
    return row | dict(
        error=last["master_error"],
        averaged_errors=averaged_errors,
        loss=last["master_loss"],
        replica_errors=last["replica_errors"],
        ensemble_error=last["ensemble_error"],
        replica_distance=statistics.mean(last["replica_distances"]),
        train_loss=train_loss,
        nonfinite=progress["nonfinite"],
        curve=progress["curve"],
        seconds=round(progress["seconds"] + time.perf_counter() - start_time, 1),
        revisions=progress["revisions"],
    )


def build_replicas(
    task: Task, settings: Config, seed: int, data: loader.Dataset
) -> tuple[list[nn.Module], list[loader.BatchLoader], Parle]:
    """Return the networks, which have identical initial weights, their batch loaders and their optimizer."""
    networks, batches = [], []
    for replica in range(settings["replicas"]):
        torch.manual_seed(seed)
        networks.append(task.build_model(data).train())
        shard = dict(replica=replica, replicas=settings["replicas"], frac=settings["frac"])
        batches.append(loader.BatchLoader(data, batch_size=BATCH_SIZE, seed=seed, augment=task.augment, **shard))
    names = ("lr", "momentum", "weight_decay", "sync_every", "gamma", "rho", "alpha", "outer_momentum")
    rate = settings["scoping_rate"]
    optimizer = Parle(
        [network.parameters() for network in networks],
        batches_per_epoch=round(batches[0].per_epoch / rate) if rate else NO_SCOPING,
        outer_lr_scale=1.0 if settings["outer_lr"] == "lr" else settings["outer_lr"] / settings["lr"],
        **{name: settings[name] for name in names},
    )
    return networks, batches, optimizer


def compute_gradients(networks: list[nn.Module], batches: list[loader.BatchLoader], amp: bool = False) -> list[float]:
    """Run one forward and backward pass per replica and return the losses."""
    losses = []
    for network, loader_ in zip(networks, batches, strict=True):
        network.zero_grad()
        inputs, targets = next(loader_)
        training.seed_device(torch.device("cpu"), loader_.dropout_seed())
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits = network(inputs)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        losses.append(loss.item())
    return losses


def set_lr(optimizer: Parle, settings: Config, factor: float) -> None:
    """Set the inner and the outer lr by a factor of the schedule. The optimizer stores the outer one in units of lr."""
    lr = settings["lr"] * (factor if settings["decay_inner_lr"] else 1.0)
    outer_lr = settings["lr"] * factor if settings["outer_lr"] == "lr" else settings["outer_lr"]
    for group in optimizer.param_groups:
        group["lr"], group["outer_lr_scale"] = lr, outer_lr / lr


@torch.no_grad()
def end_round(networks: list[nn.Module], optimizer: Parle, settings: Config) -> None:
    """Change momentum and replicas after a synchronization as the config demands."""
    if not settings["keep_inner_momentum"]:
        for state in optimizer.state.values():
            state["inner_momentum_buffer"].zero_()
    if settings["reset_replicas"]:
        for replica in networks:
            optimizer.copy_master_to(replica)
        for parameter, state in optimizer.state.items():
            state["anchor"].copy_(parameter)
            state["inner_avg"].copy_(parameter)


def evaluate_masters(
    optimizer: Parle, averages: dict[float, Tensor], model: nn.Module, data: loader.Dataset
) -> tuple[float, dict[str, float]]:
    """Return the test errors of the master and, by decay, of its averages."""
    optimizer.copy_master_to(model)
    error, errors = test_error(model, data), {}
    sizes = [parameter.numel() for parameter in model.parameters()]
    for decay, average in averages.items():
        with torch.no_grad():
            for parameter, values in zip(model.parameters(), average.split(sizes), strict=True):
                parameter.copy_(values.view(parameter.shape))
        errors[str(decay)] = test_error(model, data)
    return error, errors


def test_error(model: nn.Module, data: loader.Dataset) -> float:
    """Return the test error in percent after recalibrating batch norm."""
    evaluation.recalibrate_batch_norm(model, evaluation.calibration_batches(data, BATCH_SIZE))
    wrong = evaluation.predict(model, data.test_images, data).argmax(1) != data.test_labels
    return 100 * wrong.float().mean().item()


def save_checkpoint(
    path: Path, networks: list[nn.Module], optimizer: Parle, averages: dict[float, Tensor], progress: dict[str, Any]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = dict(networks=[network.state_dict() for network in networks], optimizer=optimizer.state_dict())
    torch.save(content | dict(averages=averages, progress=progress), path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(
    path: Path,
    networks: list[nn.Module],
    batches: list[loader.BatchLoader],
    optimizer: Parle,
    averages: dict[float, Tensor],
) -> dict[str, Any]:
    """Restore a trial and return its progress."""
    content = torch.load(path)
    optimizer.load_state_dict(content["optimizer"])
    for network, state, loader_ in zip(networks, content["networks"], batches, strict=True):
        network.load_state_dict(state)
        loader_.batches_drawn = content["progress"]["step"]
    averages.update(content["averages"])
    return content["progress"]


# Running trials


def defaults(task: str) -> Config:
    return DEFAULTS | dict(weight_decay=TASKS[task].weight_decay)


def config_key(task: str, config: Config) -> str:
    """Return a key that is equal for configs with the same meaning."""
    return json.dumps([task, defaults(task) | config], sort_keys=True)


def missing(name: str, trials: Iterable[tuple[str, Config, int]]) -> Iterator[tuple[str, Config, int]]:
    """Yield the trials (task, config, seed) without a row in the results of `name`, each once."""
    known = {(config_key(row["task"], row["config"]), row["seed"]) for row in results.read_rows(name)}
    for task, config, seed in trials:
        key = config_key(task, config), seed
        if key not in known:
            known.add(key)
            yield task, config, seed


def run_missing(
    name: str, trials: Iterable[tuple[str, Config, int]], raw: Path | None, proc: Path, checkpoints: Path | None = None
) -> None:
    """Run the trials without a row in the results of `name`, in parallel, and append their rows."""
    provenance = results.provenance()
    jobs = list(missing(name, trials))
    if not jobs:
        print(results.nothing_to_run(name))
    with ProcessPoolExecutor(count_cores(), mp_context=get_context("spawn")) as pool:
        running = {}
        for task, config, seed in jobs:
            digest = hashlib.sha256(f"{config_key(task, config)} {seed}".encode()).hexdigest()[:16]
            checkpoint = checkpoints / f"{task}-{digest}.pt" if checkpoints else None
            running[pool.submit(run_trial, task, config, seed, raw, proc, checkpoint)] = checkpoint
        try:
            for number, trial in enumerate(as_completed(running), 1):
                row = trial.result()
                results.append_row(name, row | provenance)
                if running[trial]:
                    running[trial].unlink(missing_ok=True)
                error = "diverged" if row["error"] is None else f"{row['error']:.2f} %"
                print(f"{number}/{len(jobs)}  {row['task']}  {row['config']}  seed {row['seed']}: {error}", flush=True)
        except BaseException:  # otherwise the trials that wait would still be run, without a row
            pool.shutdown(wait=False, cancel_futures=True)
            raise
