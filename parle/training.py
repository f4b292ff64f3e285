"""The training loop, as a generator of events."""

import contextlib
import ctypes
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from parle.distributed import Group, Groups
from parle.evaluation import running_stats
from parle.optimizer import ParleBase

if TYPE_CHECKING:
    from loader import BatchLoader

LOG_EVERY = 25  # steps per `round` event; with shorter rounds an event covers several
# Slots of the optimizer's piggyback: two sums since the last event, a squared distance, two requests
LOSS, ERRORS, DISTANCE, SAVE, STOP = range(5)


class LocalReplica(NamedTuple):
    """A replica that this process trains, by itself or together with other ranks."""

    number: int
    network: nn.Module
    batches: "BatchLoader"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The length of a run, and when lr drops and the run is evaluated and saved. An epoch is nb rounds."""

    epochs: float
    lr_drops: Sequence[float] = ()  # epochs
    lr_decay: float = 1.0  # factor of lr at each drop
    eval_every: int | None = None  # rounds, in addition to every epoch's end
    checkpoint_every: int | None = None  # rounds, in addition to every epoch's end

    def num_rounds(self, batches_per_epoch: int) -> int:
        """Return the length of the run: at least one round."""
        return max(1, round(self.epochs * batches_per_epoch))

    def lr_milestones(self, batches_per_epoch: int) -> list[int]:
        """Return the numbers of rounds after which lr drops, each at least 1."""
        return [max(1, round(epoch * batches_per_epoch)) for epoch in self.lr_drops]


@dataclasses.dataclass
class TrainState:
    """The progress of a run beyond the optimizer's own counters. Checkpoints store it."""

    steps_done: int = 0  # of each replica
    images_seen: int = 0  # by all replicas
    steps_since_log: int = 0
    train_seconds: float = 0.0  # as of the last checkpoint; excludes evaluation and checkpoints
    train_seconds_logged: float = 0.0  # at the last `round` event
    sync_seconds: float = 0.0  # mean over the ranks
    straggler_seconds: float = 0.0  # the part of sync_seconds spent waiting for the slowest rank
    last_eval_round: int = 0
    master_error: float | None = None  # percent, of the last evaluation
    best_master_error: float | None = None

    def __post_init__(self) -> None:
        """Check the values, which may come from a file. Raises: ValueError."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:  # not evaluated yet
                continue
            kinds = int if isinstance(field.default, int) else int | float
            may_be_nan = field.default is None  # an error
            if not isinstance(value, kinds) or not (value >= 0 or (may_be_nan and math.isnan(value))):
                raise ValueError(f"Invalid {field.name} value: {value}")


class StopRequest:
    """Requests made by signals: to `save` a checkpoint, or to save and `stop`."""

    save = stop = False


class TrainTimer:
    """Adds up the seconds of training; `paused` excludes evaluation and checkpoints."""

    def __init__(self, seconds: float):
        self.seconds, self.resumed = seconds, time.perf_counter()

    def read(self) -> float:
        now = time.perf_counter()
        self.seconds, self.resumed = self.seconds + now - self.resumed, now
        return self.seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.read()
        yield
        self.resumed = time.perf_counter()


def train(
    replicas: Sequence[LocalReplica],
    optimizer: ParleBase,
    schedule: Schedule,
    *,
    evaluate: Callable[[], dict[str, Any]],
    save: Callable[[TrainState], None] = lambda state: None,
    state: TrainState | None = None,
    stop_request: StopRequest | None = None,
    amp: bool = False,
    groups: Groups = Groups(),
) -> Iterator[dict[str, Any]]:
    """Train the local replicas and yield the log's `round`, `nonfinite`, `eval` and `finished` events. Collective.

    A stop request ends the run without a `finished` event: after the current step in a single process, after the
    current round if there are several, since every rank must stop at the same point.

    Args:
        replicas: in the order of the optimizer's.
        evaluate: returns the fields of an `eval` event; called at every epoch's end, every `eval_every` rounds and
            at the end.
        save: writes a checkpoint; called at every epoch's end, every `checkpoint_every` rounds and on request.
        state: of the run to resume, whose optimizer was restored.
        amp: compute forward and backward passes in bfloat16.
    """
    nb, batch_size = replicas[0].batches.per_epoch, replicas[0].batches.batch_size
    num_rounds = schedule.num_rounds(nb)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, schedule.lr_milestones(nb), schedule.lr_decay)
    scheduler.last_epoch = optimizer.rounds_done
    state, request = state or TrainState(), stop_request or StopRequest()
    for replica in replicas:
        replica.batches.batches_drawn = state.steps_done
        replica.network.train()
    devices = [network_devices(replica.network) for replica in replicas]
    piggyback_slots = [piggyback.unbind() for piggyback in optimizer.piggyback]  # views
    precision = torch.autocast(devices[0][0].type, torch.bfloat16) if amp else contextlib.nullcontext()
    images_per_step = batch_size * optimizer.num_replicas
    loss_scale = groups.replica.size / batch_size  # averaged over the ranks of a replica: the mean over the mini-batch

    started, timer = time.perf_counter(), TrainTimer(state.train_seconds)
    sync_seconds_logged = optimizer.sync_seconds
    sync_seconds: list[float] = []  # of each event since the last checkpoint

    def should_evaluate(done: int) -> bool:
        every = schedule.eval_every
        return done % nb == 0 or done == num_rounds or (every is not None and done % every == 0)

    def run_evaluation(done: int) -> dict[str, Any]:
        result = evaluate()
        state.master_error, best = result["master_error"], state.best_master_error
        state.best_master_error = state.master_error if best is None else min(best, state.master_error)
        state.last_eval_round = done
        return {"event": "eval", "round": done, "epoch": done / nb, "train_seconds": timer.seconds, **result}

    def save_checkpoint() -> None:
        with timer.paused():
            state.train_seconds = timer.seconds
            _add_sync_seconds(state, sync_seconds, groups.world)
            save(state)
        request.save = False

    done = optimizer.rounds_done
    if state.steps_done and state.last_eval_round < done and optimizer.step_in_round == 0 and should_evaluate(done):
        with timer.paused():
            yield run_evaluation(done)  # the run was killed between this round and its evaluation
    while optimizer.rounds_done < num_rounds:
        optimizer.zero_grad()
        for replica, places, slots in zip(replicas, devices, piggyback_slots, strict=True):
            inputs, targets = next(replica.batches)
            for index, device in enumerate(places):
                seed_device(device, replica.batches.dropout_seed(index))
            with precision:
                logits = replica.network(inputs)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum") * loss_scale
            loss.backward()
            slots[LOSS].add_(loss.detach())
            slots[ERRORS].add_((logits.detach().argmax(1) != targets).sum() * loss_scale)
            slots[SAVE].fill_(request.save)
            slots[STOP].fill_(request.stop)
        optimizer.step()
        state.steps_done, state.steps_since_log = state.steps_done + 1, state.steps_since_log + 1
        state.images_seen += images_per_step
        round_ended, done = optimizer.step_in_round == 0, optimizer.rounds_done
        if not round_ended and (groups.world.size > 1 or not (request.save or request.stop)):
            continue

        if round_ended and optimizer.nonfinite_replicas:
            for statistics in (value for replica in replicas for value in running_stats(replica.network)):
                if not statistics.isfinite().all():
                    statistics.zero_()  # training the restarted replica fills them again
            yield {"event": "nonfinite", "round": done, "replicas": optimizer.nonfinite_replicas}
        saves, stops = request.save, request.stop
        if groups.world.size > 1:  # any rank's request, which the sync has sent to all
            saves, stops = (optimizer.piggyback[0][SAVE:] > 0).tolist()
        epoch_ended = round_ended and (done % nb == 0 or done == num_rounds)
        evaluates = round_ended and should_evaluate(done)
        every = schedule.checkpoint_every
        saves |= stops or epoch_ended or (round_ended and every is not None and done % every == 0)
        lr = optimizer.param_groups[0]["lr"]
        if round_ended:
            scheduler.step()
        if evaluates or (round_ended and state.steps_since_log >= LOG_EVERY):
            loss_sum, errors, squared_distance = optimizer.piggyback[0][:SAVE].tolist()  # waits for the device
            train_seconds = timer.read()
            sync_seconds.append(optimizer.sync_seconds - sync_seconds_logged)
            sync_seconds_logged = optimizer.sync_seconds
            images_per_second = state.steps_since_log * images_per_step / (train_seconds - state.train_seconds_logged)
            yield {
                "event": "round",
                "round": done,
                "epoch": done / nb,
                "train_seconds": train_seconds,
                "train_loss": loss_sum / state.steps_since_log,
                "train_error": 100 * errors / state.steps_since_log,
                "lr": lr,
                "gamma_k": optimizer.param_groups[0]["gamma_k"],
                "coupling_k": optimizer.param_groups[0]["coupling_k"],
                "replica_distance_rms": squared_distance**0.5,
                "sync_seconds": sync_seconds[-1],
                "images_per_second": images_per_second,
            }
            state.steps_since_log, state.train_seconds_logged = 0, train_seconds
            for piggyback, distance in zip(optimizer.piggyback, optimizer.distances(), strict=True):
                piggyback.zero_()
                piggyback[DISTANCE] = distance**2
        if evaluates:
            if stops and done < num_rounds:  # the time limit after a stop signal may be shorter than an evaluation
                save_checkpoint()
            with timer.paused():
                yield run_evaluation(done)
        if saves:
            save_checkpoint()
        if stops and done < num_rounds:
            return

    yield {
        "event": "finished",
        "train_seconds": timer.seconds,
        "wall_seconds": time.perf_counter() - started,
        "master_error": state.master_error,
        "best_master_error": state.best_master_error,
        "sync_seconds": state.sync_seconds,
        "straggler_seconds": state.straggler_seconds,
        "images_seen": state.images_seen,
    }


def disable_malloc_trim() -> None:
    """Keep glibc from returning freed memory to the kernel, in this process. For programs, not for libraries.

    Otherwise every step frees megabytes of activations and allocates them again, with a page fault per page. Older
    versions of glibc refuse an mmap threshold above 32 MiB. Then neither is set: either one disables glibc's dynamic
    mmap threshold, and with the trim threshold alone a step of LeNet takes 1.7 times as long.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        if libc.mallopt(mmap_threshold, 2**31 - 1):
            libc.mallopt(trim_threshold, 2**31 - 1)


def network_devices(network: nn.Module) -> list[torch.device]:
    """Return the devices that `network` computes on: several with torch's DataParallel."""
    first = next(network.parameters()).device
    if isinstance(network, nn.DataParallel):
        return [torch.device(first.type, index) for index in network.device_ids] or [first]
    return [first]


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the random numbers of `device`: dropout then depends on the mini-batch only."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # 1 µs; torch.manual_seed seeds every type of device in 70 µs
    else:
        with torch.accelerator.device_index(device.index):
            torch.get_device_module(device).manual_seed(seed)


def _add_sync_seconds(state: TrainState, seconds: list[float], world: Group) -> None:
    """Add the communication time of each event, averaged over the ranks, and how much of it was waiting.

    The last rank to reach a sync waits for no other, so its time is the cost of the sync itself.
    """
    seconds_by_rank = torch.zeros(world.size, len(seconds), dtype=torch.float64)
    seconds_by_rank[world.rank] = torch.tensor(seconds, dtype=torch.float64)
    world.all_reduce(seconds_by_rank)
    total = float(seconds_by_rank.sum()) / world.size
    state.sync_seconds += total
    state.straggler_seconds += total - float(seconds_by_rank.amin(0).sum())
    seconds.clear()
