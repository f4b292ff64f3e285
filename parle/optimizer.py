"""ParleBase: the torch.optim API over flat vectors, shared by both Parle classes. Subclasses add communication.

A subclass defines `_sum_over_replicas` and `_compare_settings`, over all replicas. With several processes it also
defines `_average_gradient`, over those that share a replica, and `_broadcast_replica` and `_any_process`, over all.
"""

import abc
import contextlib
import dataclasses
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parle.agreement import checksum, describe, find_nonfinite
from parle.algorithm import (
    COUPLING_MAX,
    GAMMA_MAX,
    inner_step,
    outer_step,
    pull,
    scoped,
    steps_per_round,
    update_average,
)
from parle.flat_replica import (
    AVERAGE_NORM,
    CHECKSUM,
    MASTER_NORM,
    PIGGYBACK,
    FlatReplica,
    GroupVectors,
    padded_size,
    trainable,
)
from parle.inner import (
    INNER,
    SHARED,
    InnerFunction,
    build_inner,
    check_settings_unchanged,
    inner_settings,
    load_inner_state,
    update_settings,
)
from parle.validation import (
    check_hyperparameters,
    check_parameters,
    check_replicas_match,
    check_shared,
    check_state,
    sync_kind,
)


@dataclasses.dataclass
class Status:
    """Attributes that the optimizer assigns after construction.

    They are in a separate object because wrappers (Lightning's, Fabric's) inherit from the optimizer's class: a method
    called on a wrapper would assign the attribute to the wrapper only.
    """

    nonfinite: list[int] = dataclasses.field(default_factory=list)  # replicas to restart
    restarted: list[int] = dataclasses.field(default_factory=list)  # by the last sync
    pending_result: tuple[Tensor, torch.Event] | None = None  # of the last sync, being copied to the host
    is_first_step: bool = True
    gradients_are_averaged: bool = False
    holds_master: bool = False
    sync_seconds: float = 0.0


class ParleBase(torch.optim.Optimizer, abc.ABC):
    """The torch.optim side of Parle: parameter groups, state, step. The symbols of parle/algorithm.py:

        y, x^a, z^a    the parameters themselves and the states "anchor" and "inner_avg"
        u, v           the states "inner_momentum_buffer" and "outer_momentum_buffer"
        x              `master`, (P,): the trainable parameters of a replica as one flat vector
        x̄              the states "master_average", where the setting master_average is not 0
        e^a            the state "message_error", where message_dtype is set
        γ, ρ, L, s, μ' gamma, rho, sync_every, outer_lr_scale, outer_momentum
        β              master_average

    A parameter without a gradient is treated as having a zero gradient, so weight decay and momentum still move it; set
    requires_grad=False on frozen parameters before building Parle. Each group belongs to the replica that its key
    `replica` names. Counters and scheduled values live in the groups, where every torch tool saves and restores them:
    `rounds_done`, `step_in_round`, `rounds_averaged` (the rounds in x̄), and for the current round `steps_per_round`
    (L_k), `gamma_k` and `coupling_k` (c_k).

    Args:
        params: as for any torch optimizer; the parameters of one replica are float32 (or all float64) on one device.
        num_replicas: n, including the replicas that live in other processes.
        buffers: the buffers that must start identical, keyed by replica number.
        lr: step size of the inner and the outer update.
        momentum: Nesterov momentum of the inner update; default: 0.9.
        weight_decay: L2 penalty, in the inner update only; default: 0.
        inner: function that builds another inner optimizer from the parameters of a replica, or from its groups if
            `params` are groups, such as `lambda params: torch.optim.AdamW(params, lr=3e-4)`. It replaces lr, momentum
            and weight_decay, which Parle's groups take from it; they hold its other settings under "inner". What is
            changed in Parle's groups takes effect at the next step.
        sync_every: L, steps per round, or "auto" for max(1, round(lr / γ_k)) with the first group's lr and γ.
        gamma: initial coefficient of the coupling to the anchor; it grows up to 1.
        rho: initial coefficient of the coupling to the mean, per update of a replica; ρ L n grows up to 10.
        alpha: weight of the previous value in the running average z^a; 0 makes z^a the last iterate.
        outer_lr_scale: outer lr in units of lr; default: 1. Unused, like alpha and gamma, where L = 1. On average the
            outer update is a step of s lr (1 + c_k) toward z. If this exceeds (2 + 2 μ') / (1 + 2 μ'), training may
            diverge, and a warning is given; c_k grows up to 10. With `inner` it is the size of that step,
            independent of lr and c_k; default: 0.9.
        outer_momentum: Nesterov momentum of the outer update; default: `momentum`, and with `inner` 0.
        master_average: β, the decay per round of an average of the master, which is then what `copy_master_to` and
            `master_weights` give. Training does not depend on it. 0: no average.
        batches_per_epoch: mini-batches in one pass over the data; sets how fast gamma and rho grow.

    Raises:
        ValueError: an invalid value.
    """

    ranks_per_replica, rank_in_replica = 1, 0
    replica_number = 0  # default of the groups' key `replica`
    message_dtype: torch.dtype | None = None  # half precision

    def __init__(
        self,
        params: Iterable[Any],
        num_replicas: int,
        buffers: Mapping[int, Iterable[Tensor]],
        *,
        lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        inner: InnerFunction | None = None,
        sync_every: int | str = 25,
        gamma: float = 0.01,
        rho: float = 0.01,
        alpha: float = 0.75,
        outer_lr_scale: float | None = None,
        outer_momentum: float | None = None,
        master_average: float = 0.0,
        batches_per_epoch: int,
    ):
        self.num_replicas = num_replicas
        self._inner_function, self._inner_groups = inner, []
        rates = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        given = [name for name, value in rates.items() if value is not None]
        if inner is not None and given:
            raise ValueError(f"Invalid {given[0]} value: {rates[given[0]]}; with inner, set it in the inner optimizer")
        if inner is None and lr is None:
            raise TypeError("Parle needs lr, or the function inner")
        defaults = dict(lr=0.0, momentum=0.9 if inner is None else 0.0, weight_decay=0.0)
        rates = defaults | {name: rates[name] for name in given}
        if outer_lr_scale is None:
            outer_lr_scale = 1.0 if inner is None else 0.9
        outer = dict(alpha=alpha, outer_lr_scale=outer_lr_scale, outer_momentum=outer_momentum)
        coupling = dict(sync_every=sync_every, gamma=gamma, rho=rho, batches_per_epoch=batches_per_epoch)
        coupling |= dict(replica=self.replica_number, num_replicas=num_replicas)
        average = dict(master_average=master_average, rounds_averaged=0)
        counters = dict(rounds_done=0, step_in_round=0, steps_per_round=0, gamma_k=0.0, coupling_k=0.0)
        super().__init__(params, rates | outer | coupling | average | counters)

        check_shared(self.param_groups)
        self._sync_kind = sync_kind(self.param_groups[0]["sync_every"])
        if inner is not None and self._sync_kind == "auto":
            raise ValueError("Invalid sync_every value: auto; with inner, lr has another scale: use a number")
        check_replicas_match(self.param_groups)
        owned: dict[int, list[nn.Parameter]] = {}
        for group in self.param_groups:
            owned.setdefault(group["replica"], []).extend(group["params"])
        for parameters in owned.values():
            check_parameters(parameters)
        self._compared_names = [name for name in self.defaults if name != "replica"]
        self._original_params = [list(group["params"]) for group in self.param_groups]
        self._status = Status()
        self._warned: set[str] = set()
        with torch.no_grad():
            self._replicas = {
                number: FlatReplica(
                    parameters,
                    buffers.get(number, ()),
                    has_inner_loop=self._sync_kind != 1,
                    has_inner_momentum=inner is None,
                    has_message_error=self.message_dtype is not None,
                    num_senders=self._num_senders,
                )
                for number, parameters in owned.items()
            }
            self._master_replica = next(iter(self._replicas.values()))  # its device holds the master
            self._first_replica_on: dict[torch.device, FlatReplica] = {}  # whose message sums those of its device
            self._masters: dict[torch.device, Tensor] = {}  # other devices need one only where L may be 1
            for replica in self._replicas.values():
                if replica.device not in self._first_replica_on:
                    self._first_replica_on[replica.device] = replica
                    if replica is self._master_replica or self._sync_kind in (1, "auto"):
                        self._masters[replica.device] = torch.empty_like(replica.weights)
            self._master_replica.state["master"] = self._masters[self._master_replica.device]
            if self._sync_kind != 1:
                self._master_replica.state["master_momentum_buffer"] = torch.zeros_like(self._master_replica.weights)
            if self.param_groups[0]["master_average"]:
                self._master_replica.state["master_average"] = torch.empty_like(self._master_replica.weights)
        self._inner: dict[int, torch.optim.Optimizer] = {}  # by replica
        if inner is not None:
            for number in self._replicas:
                self._build_inner(number)
                self._adopt_settings(number)
        self._split_into_groups()
        for replica in self._replicas.values():  # expose the flat vectors parameter by parameter
            for name, vector in replica.state.items():
                for parameter, view in zip(replica.parameters, replica.views(vector), strict=True):
                    self.state[parameter][name] = view

    # Communication, defined by the subclass

    @abc.abstractmethod
    def _sum_over_replicas(self) -> None:
        """Sum the messages of `_first_replica_on`, each the sum over its device, over all senders, in place.

        With one replica, only the tail needs to be summed.
        """

    @abc.abstractmethod
    def _compare_settings(self) -> None:
        """Check that all replicas have the same settings and counters. Collective. Raises: RuntimeError."""

    def _average_gradient(self, replica: FlatReplica) -> None:
        """Average `replica.gradient` over the processes that share this replica, in place."""

    def _broadcast_replica(self, number: int) -> FlatReplica:
        """Return a local replica with the parameters and buffers of replica `number`."""
        return self._replicas[number]

    def _any_process(self, flag: bool) -> bool:
        """Return whether any process passes True."""
        return flag

    # The algorithm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every replica from its gradient; every L-th call ends the round with `sync()`.

        Every rank must make the same number of calls. Returns the value of `closure`, if given.

        Raises:
            RuntimeError: parameters, settings or weights were changed in an unsupported way.
        """
        self._check_not_in_master_weights()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._status.is_first_step:
            self._start()
        if self.step_in_round == 0:
            self._begin_round()
        single_step = self.param_groups[0]["steps_per_round"] == 1
        for number, replica in self._replicas.items():
            if self._inner:
                self._step_inner(number, replica, single_step)
            else:
                self._step_sgd(replica, single_step)
            for vectors in replica.groups:
                group = self.param_groups[vectors.group]
                if not single_step:
                    vectors.inner_avg.lerp_(vectors.weights, 1 - group["alpha"])
                group["step_in_round"] += 1
            torch.autograd.graph.increment_version(replica.parameters)  # as if each had been updated in place
        self._status.gradients_are_averaged = False
        if self.step_in_round >= self.param_groups[0]["steps_per_round"]:  # more if a sync has failed
            self.sync()
        return loss

    def _step_sgd(self, replica: FlatReplica, single_step: bool) -> None:
        replica.flatten_gradients()
        if not self._status.gradients_are_averaged:
            self._average_gradient(replica)
        for vectors in replica.groups:
            group = self.param_groups[vectors.group]
            inner_step(
                vectors.weights,
                vectors.gradient,
                vectors.inner_momentum,
                vectors.master if single_step else vectors.anchor,
                coupling=group["coupling_k"] if single_step else group["gamma_k"],
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
            )

    def _step_inner(self, number: int, replica: FlatReplica, single_step: bool) -> None:
        """Pull a replica to its anchor and call its inner optimizer, which reads the parameters' own gradients."""
        replica.detect_gradient()
        if self.ranks_per_replica > 1 and not self._status.gradients_are_averaged:
            replica.flatten_gradients()
            self._average_gradient(replica)
            replica.write_back_gradient()
        for vectors in replica.groups:
            group = self.param_groups[vectors.group]
            anchor, name = (vectors.master, "coupling_k") if single_step else (vectors.anchor, "gamma_k")
            pull(vectors.weights, anchor, coupling=group[name], lr=group["lr"])
        update_settings(self._inner[number], self._groups_of(number))
        self._inner[number].step()
        check_settings_unchanged(self._inner[number], self._groups_of(number))

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Average the parameters' gradients over the ranks that share a replica. Collective.

        Call it after the last backward pass and before code that reads gradients, such as clipping; `step()` then does
        not average again. It does nothing if each replica has one rank.
        """
        self._check_not_in_master_weights()
        if self.ranks_per_replica > 1:
            for replica in self._replicas.values():
                replica.flatten_gradients()
                self._average_gradient(replica)
                replica.write_back_gradient()
            self._status.gradients_are_averaged = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as any torch optimizer does."""
        self._status.gradients_are_averaged = False
        _without_dynamo(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    def _start(self) -> None:
        """Check before the first step that all ranks have the same settings, and adopt weights that were loaded."""
        self._compare_settings()
        self._status.is_first_step = False
        if self.rounds_done or self.step_in_round:  # a state was loaded
            return
        is_changed = any(
            not torch.equal(
                replica.weights.nan_to_num(),
                replica.state.get("anchor", self._masters.get(replica.device)).nan_to_num(),
            )
            for replica in self._replicas.values()
        )
        if self._any_process(is_changed):
            warnings.warn(
                "The weights were changed after Parle was built, so all replicas now start from those of replica 0. "
                "Load weights before building Parle, or call reset() afterwards",
                stacklevel=5,
            )
            self.reset()

    def _begin_round(self) -> None:
        self._check_groups()
        for number, replica in self._replicas.items():
            replica.check_unchanged()  # takes 50 µs of LeNet's 13 ms per step, so not in every step
            if not replica.has_gradient:
                self._warn_once(
                    "no gradient",
                    f"No parameter of replica {number} had a gradient in the last round: call backward() before "
                    "step(), and build Parle after replacing parameters, as by load_state_dict(assign=True)",
                )
            replica.has_gradient = False
        first = self.param_groups[0]
        for group in self.param_groups:
            k, nb = group["rounds_done"], group["batches_per_epoch"]
            group["gamma_k"] = scoped(group["gamma"], k, nb, GAMMA_MAX)
            group["steps_per_round"] = steps_per_round(first["sync_every"], first["lr"], first["gamma_k"])
            group["coupling_k"] = scoped(
                group["rho"] * group["steps_per_round"] * self.num_replicas, k, nb, COUPLING_MAX
            )
            outer_step_size = _outer_lr(group) * (1 + group["coupling_k"])
            limit = (2 + 2 * group["outer_momentum"]) / (1 + 2 * group["outer_momentum"])
            if group["steps_per_round"] > 1 and outer_step_size > limit:
                formula, remedy = "outer_lr_scale * lr * (1 + coupling_k)", "lr, outer_lr_scale or rho"
                if self._inner:
                    formula = remedy = "outer_lr_scale"
                self._warn_once(
                    "unstable",
                    f"Training may diverge: the outer step, {formula}, is {outer_step_size:.3g}, above the stability "
                    f"limit {limit:.3g}: use a lower {remedy}",
                )
        for replica in self._replicas.values() if self._sync_kind != 1 else ():
            replica.detect_external_change()
            replica.state["inner_avg"].copy_(replica.weights)
        if self._sync_kind == "auto" and first["steps_per_round"] == 1:  # after a longer round only one device has it
            self._copy_master_to_devices()

    @torch.no_grad()
    def sync(self) -> None:
        """End the round: couple the replicas through their mean and move the master.

        This is the only communication between replicas.

        `step()` calls it. Call it yourself only to end a round early, as at the end of training, and then on every
        rank. It does nothing if there was no step since the last call.

        A replica whose weights or piggyback are not finite is left out of the mean, restarts without momentum from the
        mean of the other anchors, which becomes the master, and is listed in `nonfinite_replicas`. With an accelerator
        the restart, or the error, comes one sync later: by then its flags have reached the host, which does not wait.

        Raises:
            FloatingPointError: no replica is finite, or their mean is not.
            RuntimeError: settings or counters differ between replicas, or weights were changed between two rounds.
        """
        if self.step_in_round == 0:
            return
        self._check_not_in_master_weights()
        single_step = self.param_groups[0]["steps_per_round"] == 1
        for replica in self._replicas.values() if not single_step else ():
            replica.check_unchanged()
        self._read_pending_result()
        nonfinite = self._restart()
        for number, replica in self._replicas.items():
            average = replica.weights if single_step else replica.state["inner_avg"]
            sender = number * self.ranks_per_replica + self.rank_in_replica
            replica.write_message(average, sender, checksum(self._groups_of(number), self._compared_names))
            if self.ranks_per_replica > 1:
                replica.rows[sender, AVERAGE_NORM] = replica.gradient.dot(replica.gradient)
            if self._num_senders > len(self._replicas):  # several processes have a master
                replica.rows[sender, MASTER_NORM] = self._master.dot(self._master)
        self._sum_averages()
        if self._host_reads_without_blocking:
            self._status.nonfinite = self._check_flags(self._master_replica.tail, self.rounds_done + 1)
        for first in self._first_replica_on.values():
            num_finite = (first.rows[:, CHECKSUM] > 0).sum()
            first.tail[PIGGYBACK].div_(num_finite)
            if self.num_replicas > 1:
                first.gradient.div_(num_finite)
            elif not self._host_reads_without_blocking:  # 0 / 0 is NaN, as the mean of several replicas would be
                first.gradient.div_(num_finite == self._num_senders)
        self._end_round(single_step)
        if self._host_reads_without_blocking:
            self._check_master(self._master.sum())
            nonfinite = self._restart()
        else:
            flags = torch.cat([self._master_replica.tail, self._master.sum().reshape(1)]).to("cpu", non_blocking=True)
            event = torch.Event(self._master_replica.device)
            event.record(torch.accelerator.current_stream(self._master_replica.device))
            self._status.pending_result = flags, event
        if self.averages_master:
            self._update_average()
        self._status.restarted = nonfinite

    def _end_round(self, single_step: bool) -> None:
        """Update the anchors and the master with the mean that the messages hold."""
        for replica in self._replicas.values():
            replica.piggyback.copy_(self._first_replica_on[replica.device].tail[PIGGYBACK])
            for vectors in replica.groups:
                group, mean = self.param_groups[vectors.group], vectors.replica_mean
                outer = dict(
                    coupling=group["coupling_k"],
                    lr=_outer_lr(group),
                    momentum=group["outer_momentum"],
                )
                if not single_step:
                    outer_step(vectors.anchor, vectors.inner_avg, mean, vectors.outer_momentum, **outer)
                    vectors.weights.copy_(vectors.anchor)
                    if replica is self._master_replica:
                        outer_step(vectors.master, mean, mean, vectors.master_momentum, **outer)
                elif vectors.anchor is not None:
                    vectors.anchor.copy_(vectors.weights)
                group["rounds_done"] += 1
                group["step_in_round"] = 0
            torch.autograd.graph.increment_version(replica.parameters)
        if single_step:
            for device, master in self._masters.items():
                master.copy_(self._first_replica_on[device].gradient)

    def _update_average(self) -> None:
        for group in self.param_groups:
            group["rounds_averaged"] += 1
        count, decay = (self.param_groups[0][name] for name in ("rounds_averaged", "master_average"))
        update_average(self._evaluated_master, self._master, count=count, decay=decay)

    def _sum_averages(self) -> None:
        """Sum the messages of a synchronization, which may be rounded, unlike those of a restart."""
        self._sum_messages()

    def _sum_messages(self) -> None:
        """Add up the messages of all replicas, on each device and then over all of them."""
        for replica in self._replicas.values():
            first = self._first_replica_on[replica.device]
            if replica is not first:
                first.message.add_(replica.message)
        self._sum_over_replicas()

    def _read_pending_result(self, is_collective: bool = True) -> None:
        """Check the flags of the last sync if they are unread. Raises: as `sync`."""
        if self._status.pending_result is not None:
            (flags, event), self._status.pending_result = self._status.pending_result, None
            event.synchronize()
            self._status.nonfinite = self._check_flags(flags[:-1], self.rounds_done, is_collective)
            self._check_master(flags[-1])

    def _check_flags(self, tail: Tensor, round_number: int, is_collective: bool = True) -> list[int]:
        """Return the replicas that are not finite, from the tail of the summed message. Raises: as `sync`."""
        compare = self._compare_settings if is_collective else None
        return find_nonfinite(tail, self.num_replicas, self.ranks_per_replica, round_number, compare)

    def _settings(self, number: int) -> dict[str, str]:
        """Return the settings and counters of a replica's groups by name."""
        return describe(self._groups_of(number), self._compared_names)

    def _check_master(self, total: Tensor) -> None:
        if not math.isfinite(total):
            raise FloatingPointError(f"The master is NaN or infinite after round {self.rounds_done}: use a lower lr")

    def _restart(self) -> list[int]:
        """Restart the nonfinite replicas from the mean of the others, which becomes the master. Collective.

        Their momentum is zero. Returns their numbers.
        """
        nonfinite, self._status.nonfinite = self._status.nonfinite, []
        if not nonfinite:
            return []
        restarted = [self._replicas[number] for number in nonfinite if number in self._replicas]
        for number in self._inner.keys() & set(nonfinite):
            self._build_inner(number)
        for replica in restarted:
            for vector in (replica.weights, *replica.own_state.values()):
                vector.zero_()
        num_others = self.num_replicas - len(nonfinite)
        if self._sync_kind == 1:
            self._average_vectors([replica.weights for replica in self._replicas.values()], num_others, self._master)
        else:
            states = [replica.state for replica in self._replicas.values()]
            momentum = self._master_replica.state["master_momentum_buffer"]
            self._average_vectors([state["anchor"] for state in states], num_others, self._master)
            self._average_vectors([state["outer_momentum_buffer"] for state in states], self.num_replicas, momentum)
        self._copy_master_to_devices()
        for replica in restarted:
            for vector in (replica.weights, *map(replica.state.get, {"anchor", "inner_avg"} & replica.state.keys())):
                vector.copy_(self._master)
            replica.changed_flag.zero_()
            torch.autograd.graph.increment_version(replica.parameters)
        return nonfinite

    def _average_vectors(self, vectors: list[Tensor], num_replicas: int, mean: Tensor) -> None:
        """Set `mean`, (P,), to the sum over all replicas of their `vectors` / `num_replicas`, by another message."""
        for replica, vector in zip(self._replicas.values(), vectors, strict=True):
            replica.message.zero_()
            replica.gradient.copy_(vector)
        self._sum_messages()
        torch.div(self._master_replica.gradient, num_replicas * self.ranks_per_replica, out=mean)

    @torch.no_grad()
    def reset(self, from_replica: int = 0) -> None:
        """Copy the current weights of one replica to all replicas, anchors, the master and its average. Collective.

        Call it on every rank after loading weights. Frozen parameters and buffers are copied too. All momentum and the
        piggyback are zero afterwards, and the current round starts again; `rounds_done` stays, and with it γ_k and c_k.

        Raises:
            ValueError: there is no such replica.
        """
        if from_replica not in range(self.num_replicas):
            raise ValueError(f"Invalid from_replica value: {from_replica}; use 0 to {self.num_replicas - 1}")
        self._check_not_in_master_weights()
        for replica in self._replicas.values():
            replica.check_unchanged()
        source = self._broadcast_replica(from_replica)
        for replica in self._replicas.values():
            if replica is not source:
                for target, tensor in zip(replica.replicated_tensors, source.replicated_tensors, strict=True):
                    target.copy_(tensor)
            for name, vector in replica.state.items():
                if name.endswith(("momentum_buffer", "error")):
                    vector.zero_()
                else:
                    vector.copy_(replica.weights)
            replica.flags.zero_()
            torch.autograd.graph.increment_version(replica.parameters)
        for number in self._inner:
            self._build_inner(number)
        self._copy_master_to_devices()
        self._status.pending_result, self._status.nonfinite = None, []
        for group in self.param_groups:
            group["step_in_round"] = group["rounds_averaged"] = 0

    # Read access

    @property
    def nonfinite_replicas(self) -> list[int]:
        """Numbers of the replicas that the last sync restarted."""
        return self._status.restarted

    @property
    def sync_seconds(self) -> float:
        """Seconds spent communicating, including waiting for other ranks."""
        return self._status.sync_seconds

    @property
    def rounds_done(self) -> int:
        return self.param_groups[0]["rounds_done"]

    @property
    def step_in_round(self) -> int:
        """Steps done in the current round."""
        return self.param_groups[0]["step_in_round"]

    @property
    def averages_master(self) -> bool:
        """Whether `copy_master_to` and `master_weights` give an average of the master."""
        return "master_average" in self._master_replica.state

    @property
    def master(self) -> Tensor:
        """A copy of the mean of the anchors as of the last sync, (P,), as torch's `parameters_to_vector` arranges it.

        It has the trainable parameters in group order. This is x, also with `master_average`.
        """
        return torch.cat([view.reshape(-1) for view in self._master_replica.views(self._master)])

    @property
    def piggyback(self) -> list[Tensor]:
        """Five floats per local replica, (5,), for the caller's use: a sync replaces them with their mean."""
        return [replica.piggyback for replica in self._replicas.values()]

    @torch.no_grad()
    def distances(self) -> list[Tensor]:
        """Return ‖y − x‖ / ‖x‖, the distance to the master, for each local replica: a scalar on its device.

        Between rounds y is the anchor.
        """
        self._check_not_in_master_weights()
        masters = {replica.device: self._master.to(replica.device) for replica in self._replicas.values()}
        pairs = ((replica.weights, masters[replica.device]) for replica in self._replicas.values())
        return [(weights - master).norm() / master.norm() for weights, master in pairs]

    def copy_master_to(self, target: nn.Module | Iterable[Tensor], *, averaged: bool = True) -> None:
        """Copy the master into an evaluation model. The caller recomputes batch-norm statistics.

        With `master_average` this is the average x̄ of the master.

        Warns if there were steps since the last sync, which the master does not contain.

        Args:
            target: a model like the replicas, or its parameters in the optimizer's order. A model is enough if Parle
                was built from one group in the model's order or from named parameters.
            averaged: False gives x itself, also with `master_average`.

        Raises:
            ValueError: the target's parameters do not match.
        """
        self._warn_if_not_synchronized(stacklevel=3)
        self._read_pending_result(is_collective=False)
        self._copy_to(target, self._master_replica, self._evaluated_master if averaged else self._master)

    def copy_replica_to(self, target: nn.Module | Iterable[Tensor], index: int = 0) -> None:
        """Copy the weights of this process's replica `index` into a model, as `copy_master_to` does with the master."""
        self._check_not_in_master_weights()
        replica = list(self._replicas.values())[index]
        self._copy_to(target, replica, replica.weights)

    @contextlib.contextmanager
    def master_weights(self) -> Iterator[None]:
        """Load the master, or its average, into the local replicas' parameters, and restore their weights afterwards.

        For evaluation with the training model. The caller recomputes batch-norm statistics within the block, if there
        are any. Warns as `copy_master_to` does. Calls of `step` and other changes raise RuntimeError within the block.
        """
        self._warn_if_not_synchronized(stacklevel=4)
        self._check_not_in_master_weights()
        self._read_pending_result(is_collective=False)
        with torch.no_grad():
            for replica in self._replicas.values():
                replica.gradient.copy_(replica.weights)  # its memory is free between steps
                replica.weights.copy_(self._evaluated_master)
                torch.autograd.graph.increment_version(replica.parameters)
        self._status.holds_master = True
        try:
            yield
        finally:
            self._status.holds_master = False
            with torch.no_grad():
                for replica in self._replicas.values():
                    replica.weights.copy_(replica.gradient)
                    torch.autograd.graph.increment_version(replica.parameters)

    # state_dict

    def state_dict(self) -> dict[str, Any]:
        """Return the state as any torch optimizer does; with `inner`, its state is "inner" in that of a parameter."""
        for number, optimizer in self._inner.items():
            for parameter in self._replicas[number].parameters:
                self.state[parameter][INNER] = optimizer.state.get(parameter, {})
        return _without_dynamo(torch.optim.Optimizer.state_dict)(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, as any torch optimizer does. Raises: ValueError, and changes nothing."""
        _without_dynamo(torch.optim.Optimizer.load_state_dict)(self, state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copy a loaded state. `load_state_dict` calls this between its pre-hooks and its post-hooks.

        Args:
            state: "param_groups", and "state" by parameter.

        Raises:
            ValueError: the state does not fit. In that case nothing is changed.
        """
        self._check_not_in_master_weights()
        groups, values = state["param_groups"], state["state"]
        check_state(groups, values, self.param_groups, self.state, self.defaults)
        with torch.no_grad():
            for parameter, vectors in self.state.items():
                for name in vectors.keys() - {INNER}:
                    vectors[name].copy_(values[parameter][name])
        self.param_groups = groups
        for optimizer in self._inner.values():
            load_inner_state(optimizer, values)
        for replica in self._replicas.values():
            replica.changed_flag.zero_()
            replica.has_gradient = True
        self._status.pending_result, self._status.nonfinite = None, []
        self._status.gradients_are_averaged = False
        self._copy_master_to_devices()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("A Parle optimizer cannot be pickled or deep-copied: save its state_dict() and build a new one")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_replicas"):
            raise RuntimeError(
                "Parle cannot add parameter groups after construction: pass all groups when you build it"
            )
        settings = {}
        if self._inner_function is not None:
            names = param_group.keys() - {"params", "param_names", "initial_lr"} - (self.defaults.keys() - set(SHARED))
            settings = {name: param_group[name] for name in names}
            param_group = {name: value for name, value in param_group.items() if name not in names}
        _without_dynamo(torch.optim.Optimizer.add_param_group)(self, param_group)
        group = self.param_groups[-1]
        if group["outer_momentum"] is None:
            group["outer_momentum"] = group["momentum"]
        if self._inner_function is None:
            check_hyperparameters(group)
        else:
            self._inner_groups.append(dict(params=group["params"]) | settings)

    def _build_inner(self, number: int) -> None:
        """Build the inner optimizer of a replica, which has no state yet."""
        own = [self._inner_groups[i] for i, group in enumerate(self.param_groups) if group["replica"] == number]
        self._inner[number] = build_inner(self._inner_function, own)
        for parameter in self._replicas[number].parameters:
            self.state[parameter].pop(INNER, None)

    def _adopt_settings(self, number: int) -> None:
        """Set the groups of a replica from those of its inner optimizer."""
        for group, inner_group in zip(self._groups_of(number), self._inner[number].param_groups, strict=True):
            group |= {name: inner_group[name] for name in SHARED if name in inner_group}
            group[INNER] = inner_settings(inner_group)
            check_hyperparameters(group)

    @property
    def _master(self) -> Tensor:
        return self._master_replica.state["master"]

    @property
    def _evaluated_master(self) -> Tensor:
        """The average of the master, or the master if there is none."""
        return self._master_replica.state.get("master_average", self._master)

    @property
    def _host_reads_without_blocking(self) -> bool:
        """True if reading the device's memory does not block the host."""
        return self._master_replica.device.type == "cpu"

    @property
    def _num_senders(self) -> int:
        return self.num_replicas * self.ranks_per_replica

    def _groups_of(self, number: int) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["replica"] == number]

    def _copy_master_to_devices(self) -> None:
        for device, master in self._masters.items():
            if device != self._master_replica.device:
                master.copy_(self._master)

    def _split_into_groups(self) -> None:
        for number, replica in self._replicas.items():
            indices = [i for i, group in enumerate(self.param_groups) if group["replica"] == number]
            sizes = [padded_size(trainable(self.param_groups[i]["params"])) for i in indices]
            own = ("inner_momentum_buffer", "outer_momentum_buffer", "anchor", "inner_avg")
            mean = self._first_replica_on[replica.device].gradient
            momentum = (
                self._master_replica.state.get("master_momentum_buffer") if replica is self._master_replica else None
            )
            vectors = [replica.weights, replica.gradient, *(replica.state.get(name) for name in own)]
            vectors += [mean, self._masters.get(replica.device), momentum]
            columns = [[None] * len(indices) if vector is None else vector.split(sizes) for vector in vectors]
            replica.groups = list(map(GroupVectors, indices, *columns))

    def _check_groups(self) -> None:
        """Check that the groups are the original ones, with valid values. Raises: RuntimeError, ValueError."""
        now = [list(map(id, group["params"])) for group in self.param_groups]
        if now != [list(map(id, parameters)) for parameters in self._original_params]:
            raise RuntimeError("Parameter groups or their parameters were replaced or removed: build a new Parle")
        for group in self.param_groups:
            check_hyperparameters(group)
        check_shared(self.param_groups)
        if sync_kind(self.param_groups[0]["sync_every"]) != self._sync_kind:
            raise ValueError(
                f"Invalid sync_every value: {self.param_groups[0]['sync_every']}; it cannot change from or to 1 or "
                "auto: build a new Parle"
            )
        if (self.param_groups[0]["master_average"] > 0) != self.averages_master:
            raise ValueError(
                f"Invalid master_average value: {self.param_groups[0]['master_average']}; it cannot change from or to "
                "0: build a new Parle"
            )

    def _check_not_in_master_weights(self) -> None:
        if self._status.holds_master:
            raise RuntimeError("Within master_weights() the parameters hold the master: leave the block first")

    def _warn_if_not_synchronized(self, stacklevel: int) -> None:
        if self.step_in_round:
            steps = f"{self.step_in_round} step{'s' * (self.step_in_round > 1)}"
            warnings.warn(
                f"The master does not contain the {steps} since the last synchronization: call sync() on every rank "
                "first",
                stacklevel=stacklevel,
            )

    def _warn_once(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, stacklevel=6)  # of the caller of step(), which torch wraps twice

    @torch.no_grad()
    def _copy_to(self, target: nn.Module | Iterable[Tensor], replica: FlatReplica, vector: Tensor) -> None:
        groups = [self.param_groups[vectors.group] for vectors in replica.groups]
        sources = [parameter for group in groups for parameter in group["params"]]
        values = dict(zip(replica.parameters, replica.views(vector), strict=True))
        if not isinstance(target, nn.Module):
            targets = list(target)
        elif "param_names" in groups[0]:
            targets = _parameters_by_name(target, [name for group in groups for name in group["param_names"]])
        elif len(groups) == 1:
            targets = list(target.parameters())
        else:
            raise ValueError(
                "Parle has several groups without parameter names: pass a list of the target's parameters in the "
                "groups' order, or build Parle from named parameters"
            )
        if [parameter.shape for parameter in targets] != [parameter.shape for parameter in sources]:
            raise ValueError(
                "The target's parameters differ in shape, number or order from those that Parle was built from"
            )
        for parameter, source in zip(targets, sources, strict=True):
            parameter.copy_(values.get(source, source))


def _without_dynamo(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of torch's optimizers without its decorator, which hides it from torch.compile.

    The first call of a decorated method imports torch._dynamo. That doubles the CPU time in which a process starts; a
    process that compiles has imported it already.
    """
    return method if "torch._dynamo" in sys.modules else getattr(method, "__wrapped__", method)


def _outer_lr(group: dict[str, Any]) -> float:
    """Return s lr; with another inner optimizer, whose lr may have any scale, s / (1 + c_k)."""
    return group["outer_lr_scale"] * (1 / (1 + group["coupling_k"]) if INNER in group else group["lr"])


def _parameters_by_name(model: nn.Module, names: list[str]) -> list[nn.Parameter]:
    """Return the parameters of `model` with these names, with or without wrappers. Raises: ValueError."""
    named = dict(model.named_parameters())
    if not named.keys() >= set(names):
        names = list(map(_without_wrappers, names))
        if len(set(names)) < len(names):
            raise ValueError("Names of the optimizer's parameters differ only by the prefix of a wrapper")
        named = {_without_wrappers(name): parameter for name, parameter in named.items()}
    missing = [name for name in names if name not in named]
    if missing:
        raise ValueError(
            f"The target has no parameters named {', '.join(missing)}: pass a model of the same architecture"
        )
    return [named[name] for name in names]


def _without_wrappers(name: str) -> str:
    """Return a parameter's name without the prefixes of torch.compile, DataParallel and DistributedDataParallel."""
    name = re.sub(r"(^|(?<=\.))_orig_mod\.", "", name)  # also of submodules
    return re.sub(r"^(module\.)+", "", name)
