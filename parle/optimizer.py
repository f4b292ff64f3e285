"""ParleBase: the torch.optim API over flat vectors, shared by both Parle classes. Subclasses add communication.

A subclass defines `_average_replicas`, over all replicas, and may define `_average_gradient`, over the processes that
share one replica.
"""

import abc
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parle.algorithm import COUPLING_MAX, GAMMA_MAX, inner_step, outer_step, scoped, steps_per_round

PIGGYBACK_SIZE = 5  # floats that the caller may append to the weights in each round's message
# They are followed by the fraction of the replicas that are finite and by one float for the subclass.
MESSAGE_TAIL = PIGGYBACK_SIZE + 2


class GroupVectors(NamedTuple):
    """One parameter group's slices of its replica's vectors and of the master's, each (p,).

    With L = 1 there is no outer momentum, anchor or inner average. `master` is None on a device that needs no copy of
    it, and `master_momentum` is None everywhere but on the home replica.
    """

    group: int  # index into param_groups
    weights: Tensor
    gradient: Tensor
    inner_momentum: Tensor
    outer_momentum: Tensor | None
    anchor: Tensor | None
    inner_avg: Tensor | None
    master: Tensor | None
    master_momentum: Tensor | None


class FlatReplica:
    """The flat vectors of one replica, each (P,), on its device. Its parameters become views into `weights`.

    Views keep the strides of their parameter, channels_last included. P counts the trainable parameters.
    """

    def __init__(self, parameters: list[nn.Parameter], has_inner_loop: bool):
        self.parameters = _trainable(parameters)
        self.frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        self.strides = [_dense_strides(parameter) for parameter in self.parameters]
        size, like = sum(parameter.numel() for parameter in self.parameters), self.parameters[0]
        self.weights = torch.empty(size, dtype=like.dtype, device=like.device)
        self.piggyback = torch.zeros(PIGGYBACK_SIZE, dtype=like.dtype, device=like.device)
        for parameter, view in zip(self.parameters, self.views(self.weights), strict=True):
            view.copy_(parameter)
            parameter.data = view  # no other way to move a parameter's storage keeps modules and autograd attached
        self.addresses = [parameter.data_ptr() for parameter in self.parameters]

        # keyed by the names that state_dict uses for each parameter
        self.state = {"inner_momentum_buffer": torch.zeros_like(self.weights)}
        if has_inner_loop:
            self.state["outer_momentum_buffer"] = torch.zeros_like(self.weights)
            self.state["anchor"] = torch.empty_like(self.weights)
            self.state["inner_avg"] = torch.empty_like(self.weights)
        self.groups: list[GroupVectors] = []

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def use_message(self, message: Tensor) -> None:
        """Use the start of `message`, (P + MESSAGE_TAIL,), as the gradient. All replicas of this device share it."""
        self.message, self.gradient = message, message[: len(self.weights)]
        self.gradient_views = self.views(self.gradient)

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return `vector` as tensors with the shapes and strides of the parameters."""
        views, start = [], vector.storage_offset()
        for parameter, strides in zip(self.parameters, self.strides, strict=True):
            views.append(vector.as_strided(parameter.shape, strides, start))
            start += parameter.numel()
        return views

    def check_parameters(self) -> None:
        """Check that the parameters are still those that Parle was built from. Raises: RuntimeError."""
        if [parameter.data_ptr() for parameter in self.parameters] != self.addresses:
            raise RuntimeError("A parameter no longer shares the optimizer's memory: build Parle after model.to(...)")
        if any(parameter.grad is not None for parameter in self.frozen):
            raise RuntimeError("A parameter that was frozen when Parle was built now has a gradient: build a new Parle")

    def collect_gradient(self) -> None:
        """Copy the parameters' gradients into `gradient`. None counts as zero: every rank sends the same message."""
        pairs = [
            (view, parameter.grad)
            for view, parameter in zip(self.gradient_views, self.parameters, strict=True)
            if parameter.grad is not None
        ]
        if len(pairs) < len(self.parameters):
            self.gradient.zero_()
        if pairs:
            torch._foreach_copy_(*zip(*pairs, strict=True))  # one call takes half the time of one call per tensor


class ParleBase(torch.optim.Optimizer, abc.ABC):
    """The torch.optim side of Parle: parameter groups, state, step. The symbols of parle/algorithm.py:

        y, x^a, z^a    the parameters themselves and the states "anchor" and "inner_avg"
        u, v           the states "inner_momentum_buffer" and "outer_momentum_buffer"
        x              `master`, (P,): the trainable parameters of a replica as one flat vector
        γ, ρ, L, s, μ' gamma, rho, sync_every, outer_lr_scale, outer_momentum

    A parameter without a gradient counts as one with a zero gradient, so weight decay and momentum still move it; set
    requires_grad=False on frozen parameters before building Parle. Each group belongs to the replica that its key
    `replica` names. Counters and scheduled values live in the groups, where every torch tool saves and restores them:
    `rounds_done`, `step_in_round`, and for the current round `steps_per_round` (L_k), `gamma_k` and `coupling_k` (c_k).

    Args:
        params: as for any torch optimizer; the parameters of one replica are float32 (or all float64) on one device.
        num_replicas: n, including the replicas that live in other processes.
        lr: step size of the inner and the outer update.
        momentum: Nesterov momentum of the inner update.
        weight_decay: L2 penalty, in the inner update only.
        sync_every: L, steps per round, or "auto" for max(1, round(lr / γ_k)) with the first group's lr and γ.
        gamma: initial coefficient of the coupling to the anchor; it grows up to 1.
        rho: initial coefficient of the coupling to the mean, per update of a replica; ρ L n grows up to 10.
        alpha: weight of the previous value in the running average z^a; 0 makes z^a the last iterate.
        outer_lr_scale: step size of the outer update in units of lr. Unused, like alpha and gamma, where L = 1. On
            average the outer update is a step of s lr (1 + c_k) toward z. Training may diverge while this exceeds
            (2 + 2 μ') / (1 + 2 μ'); c_k grows up to 10.
        outer_momentum: Nesterov momentum of the outer update; default: `momentum`.
        batches_per_epoch: mini-batches in one pass over the data; sets how fast gamma and rho grow.

    Raises:
        ValueError: an invalid value.
    """

    sync_seconds: float  # spent communicating, including waiting for other ranks

    def __init__(
        self,
        params: Iterable[Any],
        num_replicas: int,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        sync_every: int | str = 25,
        gamma: float = 0.01,
        rho: float = 0.01,
        alpha: float = 0.75,
        outer_lr_scale: float = 1.0,
        outer_momentum: float | None = None,
        batches_per_epoch: int,
    ):
        self.num_replicas = num_replicas
        rates = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        outer = dict(alpha=alpha, outer_lr_scale=outer_lr_scale, outer_momentum=outer_momentum)
        coupling = dict(sync_every=sync_every, gamma=gamma, rho=rho, batches_per_epoch=batches_per_epoch, replica=0)
        counters = dict(rounds_done=0, step_in_round=0, steps_per_round=0, gamma_k=0.0, coupling_k=0.0)
        super().__init__(params, rates | outer | coupling | counters)

        sync_every, _ = self._shared("sync_every"), self._shared("batches_per_epoch")
        has_inner_loop = sync_every != 1
        _check_replicas_match(self.param_groups)
        owned: dict[int, list[nn.Parameter]] = {}
        for group in self.param_groups:
            owned.setdefault(group["replica"], []).extend(group["params"])
        for parameters in owned.values():
            _check_parameters(_trainable(parameters))
        with torch.no_grad():
            self._replicas = {a: FlatReplica(parameters, has_inner_loop) for a, parameters in owned.items()}
            self._home = next(iter(self._replicas.values()))  # its device holds the master
            self._messages: dict[torch.device, Tensor] = {}  # of each device, (P + MESSAGE_TAIL,)
            self._masters: dict[torch.device, Tensor] = {}  # other devices need one only where L may be 1
            for replica in self._replicas.values():
                if replica.device not in self._messages:
                    self._messages[replica.device] = replica.weights.new_zeros(len(replica.weights) + MESSAGE_TAIL)
                    if replica is self._home or sync_every in (1, "auto"):
                        self._masters[replica.device] = torch.empty_like(replica.weights)
                replica.use_message(self._messages[replica.device])
            self._home.state["master"] = self._masters[self._home.device]
            if has_inner_loop:
                self._home.state["master_momentum_buffer"] = torch.zeros_like(self._home.weights)
            self._broadcast_initial()
        self.nonfinite_replicas: list[int] = []
        self._split_into_groups()
        self._link_state()

    # Communication, defined by the subclass

    def _average_gradient(self, replica: FlatReplica) -> None:
        """Average `replica.gradient` over the processes that share this replica, in place."""

    @abc.abstractmethod
    def _average_replicas(self) -> None:
        """Replace each of `_messages`, the sum over the replicas of its device, by the mean over all replicas."""

    def _union_over_processes(self, replicas: list[int]) -> list[int]:
        """Return the replica numbers that any process passes, on every process."""
        return replicas

    # The algorithm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every replica from its gradient; every L-th call ends the round with `sync()`.

        Every rank must make the same number of calls. Returns the value of `closure`, if given.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.step_in_round == 0:
            self._begin_round()
        for replica in self._replicas.values():
            replica.collect_gradient()
            self._average_gradient(replica)
            for vectors in replica.groups:
                group = self.param_groups[vectors.group]
                single_step = group["steps_per_round"] == 1
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
                if not single_step:
                    vectors.inner_avg.lerp_(vectors.weights, 1 - group["alpha"])
                group["step_in_round"] += 1
        if self.step_in_round == self.param_groups[0]["steps_per_round"]:
            self.sync()
        return loss

    def _begin_round(self) -> None:
        for replica in self._replicas.values():
            replica.check_parameters()  # 50 µs of LeNet's 13 ms, so at both ends of a round instead of every step
        first = self.param_groups[0]
        for group in self.param_groups:
            k, nb = group["rounds_done"], group["batches_per_epoch"]
            group["gamma_k"] = scoped(group["gamma"], k, nb, GAMMA_MAX)
            group["steps_per_round"] = steps_per_round(first["sync_every"], first["lr"], first["gamma_k"])
            group["coupling_k"] = scoped(
                group["rho"] * group["steps_per_round"] * self.num_replicas, k, nb, COUPLING_MAX
            )
        if first["steps_per_round"] > 1:
            for replica in self._replicas.values():
                replica.state["anchor"].copy_(replica.weights)
                replica.state["inner_avg"].copy_(replica.weights)
        elif first["sync_every"] == "auto":  # after a longer round only the home device has the master
            self._share_master()

    @torch.no_grad()
    def sync(self) -> None:
        """End the round: couple the replicas through their mean and move the master. The only communication.

        `step()` calls it. Call it yourself only to end a round early, as at the end of training, and then on every
        rank. It does nothing if there was no step since the last call.

        A replica whose weights or piggyback are not finite is left out of the mean, restarts from the master and is
        listed in `nonfinite_replicas`.

        Raises:
            FloatingPointError: no replica is finite, or their mean is not.
        """
        if self.step_in_round == 0:
            return
        single_step = self.param_groups[0]["steps_per_round"] == 1
        for replica in self._replicas.values() if not single_step else ():
            replica.check_parameters()
        for message in self._messages.values():
            message.zero_()
        nonfinite = []
        for number, replica in self._replicas.items():
            average = replica.weights if single_step else replica.state["inner_avg"]
            # a finite sum proves that every element is finite, with a single read of the vector
            if not (average.sum() + replica.piggyback.sum()).isfinite():
                nonfinite.append(number)
                continue
            replica.gradient.add_(average)
            replica.message[-MESSAGE_TAIL:-2].add_(replica.piggyback)
            replica.message[-2] += 1
        self._average_replicas()
        finite_fraction = float(self._home.message[-2])
        self.nonfinite_replicas = [] if finite_fraction == 1 else self._union_over_processes(nonfinite)
        if not finite_fraction:
            raise FloatingPointError(
                f"all replicas are NaN or infinite after round {self.rounds_done + 1}: use a lower lr"
            )
        if self.nonfinite_replicas:
            for message in self._messages.values():
                message[:-1].div_(finite_fraction)  # the mean over the finite replicas
        for replica in self._replicas.values():
            replica.piggyback.copy_(replica.message[-MESSAGE_TAIL:-2])
            for vectors in replica.groups:
                group, mean = self.param_groups[vectors.group], vectors.gradient
                outer = dict(
                    coupling=group["coupling_k"],
                    lr=group["outer_lr_scale"] * group["lr"],
                    momentum=group["outer_momentum"],
                )
                if not single_step:
                    outer_step(vectors.anchor, vectors.inner_avg, mean, vectors.outer_momentum, **outer)
                    vectors.weights.copy_(vectors.anchor)
                    if replica is self._home:
                        outer_step(vectors.master, mean, mean, vectors.master_momentum, **outer)
                group["rounds_done"] += 1
                group["step_in_round"] = 0
        if single_step:
            for device, master in self._masters.items():
                master.copy_(self._messages[device][: len(master)])
        if not self.master.sum().isfinite():
            raise FloatingPointError(f"the master is NaN or infinite after round {self.rounds_done}: use a lower lr")
        for number in nonfinite:
            self._restart(self._replicas[number])

    def _restart(self, replica: FlatReplica) -> None:
        """Restart a replica from the master, with zero momentum."""
        for vector in replica.state.values():
            if vector is not self.master and vector is not self._home.state.get("master_momentum_buffer"):
                vector.zero_()
        for vector in (replica.weights, *(replica.state[n] for n in ("anchor", "inner_avg") if n in replica.state)):
            vector.copy_(self.master)

    # Contents of a checkpoint

    @property
    def vectors(self) -> list[dict[str, Tensor]]:
        """The flat vectors and the piggyback of each local replica, by name; not copies."""
        own = ("inner_momentum_buffer", "outer_momentum_buffer", "anchor", "inner_avg")
        return [
            dict(weights=replica.weights, piggyback=replica.piggyback)
            | {name: replica.state[name] for name in own if name in replica.state}
            for replica in self._replicas.values()
        ]

    @property
    def shared(self) -> dict[str, Tensor]:
        """The master and its momentum; not copies."""
        names = ("master", "master_momentum_buffer")
        return {name: self._home.state[name] for name in names if name in self._home.state}

    @property
    def counters(self) -> dict[str, float]:
        """Counters and scheduled values of the groups. Set it after `vectors` and `shared`."""
        names = ("rounds_done", "step_in_round", "steps_per_round", "gamma_k", "coupling_k", "lr")
        return {name: self.param_groups[0][name] for name in names}

    @counters.setter
    def counters(self, values: dict[str, float]) -> None:
        for group in self.param_groups:
            group.update(values)
        self._share_master()

    # Read access

    @property
    def rounds_done(self) -> int:
        return self.param_groups[0]["rounds_done"]

    @property
    def step_in_round(self) -> int:
        """Steps done in the current round."""
        return self.param_groups[0]["step_in_round"]

    @property
    def master(self) -> Tensor:
        """The mean of the anchors as of the last sync: (P,), the trainable parameters in group order."""
        return self._home.state["master"]

    @property
    def piggyback(self) -> list[Tensor]:
        """Five floats per local replica, (5,), for the caller's use: a sync replaces them by their mean over all."""
        return [replica.piggyback for replica in self._replicas.values()]

    @torch.no_grad()
    def distances(self) -> list[Tensor]:
        """Return ‖y − x‖ / ‖x‖, the distance to the master, for each local replica: a scalar on its device.

        Between rounds y is the anchor.
        """
        masters = {replica.device: self.master.to(replica.device) for replica in self._replicas.values()}
        pairs = ((replica.weights, masters[replica.device]) for replica in self._replicas.values())
        return [(weights - master).norm() / master.norm() for weights, master in pairs]

    def copy_master_to(self, target: nn.Module | Iterable[Tensor]) -> None:
        """Copy the master into an evaluation model. The caller recomputes batch-norm statistics.

        Args:
            target: a model like the replicas, or its parameters in the optimizer's order. A model is enough if Parle
                was built from one group in the model's order or from named parameters.

        Raises:
            ValueError: the target's parameters do not match.
        """
        self._copy_to(target, self._home, self.master)

    def copy_replica_to(self, target: nn.Module | Iterable[Tensor], replica: int = 0) -> None:
        """Copy the weights of replica number `replica` into a model, as `copy_master_to` does with the master."""
        self._copy_to(target, self._replicas[replica], self._replicas[replica].weights)

    # state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`, also one saved within a round; load the model's own first. Tensors are copied."""
        own, theirs = (
            [
                *(set(names) for _, names in sorted(state["state"].items())),
                *(group.get("sync_every") == "auto" for group in state["param_groups"]),
            ]
            for state in (self.state_dict(), state_dict)
        )
        if own != theirs:
            raise ValueError(
                "The state_dict is not from a Parle with the same parameters and the same kind of sync_every: "
                "1, auto or another number"
            )
        for group in state_dict["param_groups"]:
            _check_hyperparameters(group)
        super().load_state_dict(state_dict)
        for replica in self._replicas.values():
            for name, vector in replica.state.items():
                for parameter, view in zip(replica.parameters, replica.views(vector), strict=True):
                    view.copy_(self.state[parameter][name])
        self._share_master()
        self._link_state()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("A Parle optimizer cannot be pickled or deep-copied: save its state_dict() and build a new one")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_replicas"):
            raise RuntimeError(
                "A replica is one flat vector, to which no group can be added: pass all groups when you build Parle"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["outer_momentum"] is None:
            group["outer_momentum"] = group["momentum"]
        _check_hyperparameters(group)

    # Helpers

    def _broadcast_initial(self) -> None:
        """Copy the first replica's parameters to all local replicas, their anchors and the master."""
        for replica in self._replicas.values():
            if replica is not self._home:
                replica.weights.copy_(self._home.weights)
                for parameter, first in zip(replica.frozen, self._home.frozen, strict=True):
                    parameter.copy_(first)
            for name in {"anchor", "inner_avg"} & replica.state.keys():
                replica.state[name].copy_(replica.weights)
        self.master.copy_(self._home.weights)
        self._share_master()

    def _share_master(self) -> None:
        for device, master in self._masters.items():
            if device != self._home.device:
                master.copy_(self.master)

    def _split_into_groups(self) -> None:
        for replica in self._replicas.values():
            groups = [i for i, group in enumerate(self.param_groups) if self._replicas[group["replica"]] is replica]
            sizes = [sum(p.numel() for p in _trainable(self.param_groups[i]["params"])) for i in groups]
            own = ("inner_momentum_buffer", "outer_momentum_buffer", "anchor", "inner_avg")
            momentum = self._home.state.get("master_momentum_buffer") if replica is self._home else None
            vectors = [replica.weights, replica.gradient, *(replica.state.get(name) for name in own)]
            vectors += [self._masters.get(replica.device), momentum]
            columns = [[None] * len(groups) if vector is None else vector.split(sizes) for vector in vectors]
            replica.groups = list(map(GroupVectors, groups, *columns))

    def _link_state(self) -> None:
        """Expose the flat vectors as `self.state`, parameter by parameter."""
        for replica in self._replicas.values():
            for name, vector in replica.state.items():
                for parameter, view in zip(replica.parameters, replica.views(vector), strict=True):
                    self.state[parameter][name] = view

    def _shared(self, name: str) -> Any:
        values = [group[name] for group in self.param_groups]
        if any(value != values[0] for value in values):
            raise ValueError(f"Invalid {name} values: {values}; all groups must share one")
        return values[0]

    @torch.no_grad()
    def _copy_to(self, target: nn.Module | Iterable[Tensor], replica: FlatReplica, vector: Tensor) -> None:
        groups = [group for group in self.param_groups if self._replicas[group["replica"]] is replica]
        sources = [parameter for group in groups for parameter in group["params"]]
        values = dict(zip(replica.parameters, replica.views(vector), strict=True))
        if not isinstance(target, nn.Module):
            targets = list(target)
        elif "param_names" in groups[0]:
            named = dict(target.named_parameters())
            targets = [named[name] for group in groups for name in group["param_names"]]
        elif len(groups) == 1:
            targets = list(target.parameters())
        else:
            raise ValueError("With several groups, give the target's parameters in their order, not the model")
        if [parameter.shape for parameter in targets] != [parameter.shape for parameter in sources]:
            raise ValueError("The target's parameters are not those that Parle was built from")
        for parameter, source in zip(targets, sources, strict=True):
            parameter.copy_(values.get(source, source))


def _trainable(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """Return the parameter's strides, or dense ones if it has gaps or overlaps."""
    return torch.empty_like(parameter, device="meta").stride()


def _check_parameters(parameters: list[nn.Parameter]) -> None:
    """Check that the trainable parameters of one replica can form one flat vector. Raises: ValueError."""
    if not parameters:
        raise ValueError("Parle needs at least one parameter with requires_grad=True")
    if len(set(parameters)) < len(parameters):
        raise ValueError("A parameter appears twice; give a shared one once, as model.parameters() does")
    if len({parameter.data_ptr() for parameter in parameters if parameter.numel()}) < sum(
        parameter.numel() > 0 for parameter in parameters
    ):
        raise ValueError("Two parameters share their memory; tie them as one nn.Parameter instead")
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    if len(kinds) > 1 or parameters[0].dtype not in (torch.float32, torch.float64):
        raise ValueError(f"The parameters of a replica must be float32 (or all float64) on one device, not {kinds}")


def _check_replicas_match(groups: list[dict[str, Any]]) -> None:
    """Check that replicas differ only in the device and the values of their parameters. Raises: ValueError."""
    kinds: dict[int, list[Any]] = {}
    for group in groups:
        tensors = [(p.shape, _dense_strides(p), p.dtype, p.requires_grad) for p in group["params"]]
        settings = {name: value for name, value in group.items() if name not in ("params", "param_names", "replica")}
        kinds.setdefault(group["replica"], []).append((tensors, settings))
    first, *others = kinds
    for replica in others:
        if kinds[replica] != kinds[first]:
            raise ValueError(f"Replica {replica} and replica {first} differ in shapes, strides, dtypes or settings")


def _check_hyperparameters(group: dict[str, Any]) -> None:
    """Check the values of a group. Raises: ValueError, as torch.optim does."""
    for name in ("lr", "weight_decay", "gamma", "rho", "outer_lr_scale"):
        if not 0.0 <= group[name] < math.inf:
            raise ValueError(f"Invalid {name} value: {group[name]}")
    for name in ("momentum", "alpha", "outer_momentum"):
        if not 0.0 <= group[name] < 1.0:
            raise ValueError(f"Invalid {name} value: {group[name]}")
    for name in ("sync_every", "batches_per_epoch"):
        automatic = name == "sync_every" and group[name] == "auto" and group["gamma"] > 0
        if not automatic and not (isinstance(group[name], numbers.Integral) and group[name] >= 1):
            raise ValueError(f"Invalid {name} value: {group[name]}")
