"""What both Parle classes share: torch.optim's contract over flat vectors. Communication is left to the subclass.

A subclass defines `_mean_gradient`, over what one replica is spread over, and `_mean_messages`, over the replicas.
"""

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parle.algorithm import GAMMA_CAP, PULL_CAP, descend, move_anchor, round_length, scope

RIDERS = 5  # floats of the caller's that travel behind the weights in a round's message
TAIL = RIDERS + 2  # and the share of the replicas that are sound, and a float of the subclass's


class Part(NamedTuple):
    """What one group has of its replica's vectors and of the master's: slices, (p,).

    With L = 1 there is no outer momentum, anchor or inner_avg. A device that needs no master has None, and all but
    the home have no momentum for it.
    """

    group: int  # its number
    weights: Tensor
    gradient: Tensor
    inner_momentum: Tensor
    outer_momentum: Tensor | None
    anchor: Tensor | None
    inner_avg: Tensor | None
    master: Tensor | None
    master_momentum: Tensor | None


class Replica:
    """The flat vectors of one replica, each (P,), on its device. Its parameters become views into `weights`.

    Views keep their parameter's strides, so channels_last weights stay so. P counts the trainable parameters.
    """

    def __init__(self, parameters: list[nn.Parameter], has_inner_loop: bool):
        self.parameters = _trainable(parameters)
        self.frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        self.strides = [_dense_strides(parameter) for parameter in self.parameters]
        size, like = sum(parameter.numel() for parameter in self.parameters), self.parameters[0]
        self.weights = torch.empty(size, dtype=like.dtype, device=like.device)
        self.riders = torch.zeros(RIDERS, dtype=like.dtype, device=like.device)
        for parameter, view in zip(self.parameters, self.views(self.weights), strict=True):
            view.copy_(parameter)
            parameter.data = view  # no other way to move a parameter's storage keeps modules and autograd attached
        self.addresses = [parameter.data_ptr() for parameter in self.parameters]

        # by the names under which state_dict keeps them, parameter by parameter
        self.state = {"inner_momentum_buffer": torch.zeros_like(self.weights)}
        if has_inner_loop:
            self.state["outer_momentum_buffer"] = torch.zeros_like(self.weights)
            self.state["anchor"] = torch.empty_like(self.weights)
            self.state["inner_avg"] = torch.empty_like(self.weights)
        self.parts: list[Part] = []

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def use(self, message: Tensor) -> None:
        """Take turns with the other replicas of this device in `message`, (P + TAIL,)."""
        self.message, self.gradient = message, message[: len(self.weights)]
        self.gradient_views = self.views(self.gradient)

    def views(self, vector: Tensor) -> list[Tensor]:
        """`vector` cut into tensors of the parameters' shapes and strides."""
        views, start = [], vector.storage_offset()
        for parameter, strides in zip(self.parameters, self.strides, strict=True):
            views.append(vector.as_strided(parameter.shape, strides, start))
            start += parameter.numel()
        return views

    def check_parameters(self) -> None:
        """Raises: RuntimeError, where they are no longer what Parle was built from."""
        if [parameter.data_ptr() for parameter in self.parameters] != self.addresses:
            raise RuntimeError("A parameter has left the optimizer's vector: build Parle after model.to(...)")
        if any(parameter.grad is not None for parameter in self.frozen):
            raise RuntimeError("A parameter was frozen when Parle was built and has a gradient now: build a new one")

    def gather_gradient(self) -> None:
        """Copy the parameters' gradients into `gradient`. None is zero: no rank may skip what another one sends."""
        pairs = [
            (view, parameter.grad)
            for view, parameter in zip(self.gradient_views, self.parameters, strict=True)
            if parameter.grad is not None
        ]
        if len(pairs) < len(self.parameters):
            self.gradient.zero_()
        if pairs:
            torch._foreach_copy_(*zip(*pairs, strict=True))  # one call takes half the time of one for each


class ReplicaOptimizer(torch.optim.Optimizer):
    """The torch.optim side of Parle: groups, state, one step. parle.py has the equations; here their letters are

        y, x^a, z^a    the parameters themselves, state "anchor" and "inner_avg"
        u, v           state "inner_momentum_buffer" and "outer_momentum_buffer"
        x              `master`, (P,): the trainable parameters of a replica, flat
        γ, ρ, L, s, μ' gamma, rho, sync_every, outer_step, outer_momentum

    A parameter without a gradient counts as one with a zero gradient, so weight decay and momentum still move it; give
    frozen ones requires_grad=False before. Each group belongs to the replica that its key `replica` names. What counts
    and what changes from round to round lives in the groups, where every torch tool saves and restores it: `rounds`
    done, `batches` done in this round, and of this round `round_length`, L_k; `scoped_gamma`, γ_k; `scoped_rho`, c_k.

    Args:
        params: as for any torch optimizer; those of one replica float32 (or all float64) and on one device.
        num_replicas: n, those that live elsewhere included.
        lr: step size of the inner and the outer update.
        momentum: Nesterov's, of the inner update.
        weight_decay: L2 penalty, in the inner update alone.
        sync_every: L, mini-batches per round, or "auto" for max(1, round(lr / γ_k)), with the first group's lr and γ.
        gamma: initial coefficient of the pull towards the anchor; it grows, up to 1.
        rho: initial coefficient of the pull towards the mean, per update of a replica; ρ L n grows, up to 10.
        alpha: what z^a keeps at each mini-batch; 0 makes z^a the last iterate.
        outer_step: step of the outer update in units of lr. Unused, with alpha and gamma, where L = 1. The mean of the
            outer updates is one of s lr (1 + c_k) towards z: rounds may diverge where that, with c_k up to 10, stays
            above (2 + 2 μ') / (1 + 2 μ').
        outer_momentum: Nesterov's, of the outer update; by default as `momentum`.
        batches_per_epoch: mini-batches in one pass over the data; sets how fast gamma and rho grow.

    Raises:
        ValueError: an invalid value.
    """

    sync_seconds: float  # spent communicating, waiting for others included

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
        outer_step: float = 1.0,
        outer_momentum: float | None = None,
        batches_per_epoch: int,
    ):
        self.num_replicas = num_replicas
        rates = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        outer = dict(alpha=alpha, outer_step=outer_step, outer_momentum=outer_momentum)
        coupling = dict(sync_every=sync_every, gamma=gamma, rho=rho, batches_per_epoch=batches_per_epoch, replica=0)
        counters = dict(rounds=0, batches=0, round_length=0, scoped_gamma=0.0, scoped_rho=0.0)
        super().__init__(params, rates | outer | coupling | counters)

        sync_every, _ = self._shared("sync_every"), self._shared("batches_per_epoch")
        has_inner_loop = sync_every != 1
        _check_alike(self.param_groups)
        owned: dict[int, list[nn.Parameter]] = {}
        for group in self.param_groups:
            owned.setdefault(group["replica"], []).extend(group["params"])
        for parameters in owned.values():
            _check_parameters(_trainable(parameters))
        with torch.no_grad():
            self._replicas = {a: Replica(parameters, has_inner_loop) for a, parameters in owned.items()}
            self._home = next(iter(self._replicas.values()))  # its device keeps the master
            self._messages: dict[torch.device, Tensor] = {}  # a device's: of P floats and TAIL more
            self._masters: dict[torch.device, Tensor] = {}  # away from home only where rounds may be of one mini-batch
            for replica in self._replicas.values():
                if replica.device not in self._messages:
                    self._messages[replica.device] = replica.weights.new_zeros(len(replica.weights) + TAIL)
                    if replica is self._home or sync_every in (1, "auto"):
                        self._masters[replica.device] = torch.empty_like(replica.weights)
                replica.use(self._messages[replica.device])
            self._home.state["master"] = self._masters[self._home.device]
            if has_inner_loop:
                self._home.state["master_momentum_buffer"] = torch.zeros_like(self._home.weights)
            self._start_alike()
        self.lost: list[int] = []
        self._cut_into_parts()
        self._link_state()

    # What a subclass communicates

    def _mean_gradient(self, replica: Replica) -> None:
        """Average `replica.gradient` over the ranks of this replica, in place."""

    def _mean_messages(self) -> None:
        """Make of `_messages`, each the sum over the replicas of its device, the mean over all: the communication."""
        raise NotImplementedError

    def _everywhere(self, numbers: list[int]) -> list[int]:
        """Those of every rank together."""
        return numbers

    # The algorithm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """An inner update of every replica from its gradient; every L-th call ends the round with `sync()`.

        Every rank must call it equally often. Returns what `closure` returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.batches == 0:
            self._begin_round()
        for replica in self._replicas.values():
            replica.gather_gradient()
            self._mean_gradient(replica)
            for part in replica.parts:
                group = self.param_groups[part.group]
                single = group["round_length"] == 1
                descend(
                    part.weights,
                    part.gradient,
                    part.inner_momentum,
                    part.master if single else part.anchor,
                    pull=group["scoped_rho"] if single else group["scoped_gamma"],
                    lr=group["lr"],
                    momentum=group["momentum"],
                    weight_decay=group["weight_decay"],
                )
                if not single:
                    part.inner_avg.lerp_(part.weights, 1 - group["alpha"])
                group["batches"] += 1
        if self.batches == self.param_groups[0]["round_length"]:
            self.sync()
        return loss

    def _begin_round(self) -> None:
        for replica in self._replicas.values():
            replica.check_parameters()  # 50 µs of LeNet's 13 ms, so at both ends of a round, not at every step
        first = self.param_groups[0]
        for group in self.param_groups:
            k, nb = group["rounds"], group["batches_per_epoch"]
            group["scoped_gamma"] = scope(group["gamma"], k, nb, GAMMA_CAP)
            group["round_length"] = round_length(first["sync_every"], first["lr"], first["scoped_gamma"])
            group["scoped_rho"] = scope(group["rho"] * group["round_length"] * self.num_replicas, k, nb, PULL_CAP)
        if first["round_length"] > 1:
            for replica in self._replicas.values():
                replica.state["anchor"].copy_(replica.weights)
                replica.state["inner_avg"].copy_(replica.weights)
        elif first["sync_every"] == "auto":  # after a longer round only the home has the master
            self._share_master()

    @torch.no_grad()
    def sync(self) -> None:
        """End the round: couple the replicas by their mean and move the master. The one communication.

        `step()` calls it; call it yourself only to end a round early, as at the end of training, and then on every
        rank. Without a mini-batch since the last one there is nothing to do.

        A replica whose weights or riders are not finite has no part in the mean. It restarts from the master and is
        named in `lost`.

        Raises:
            FloatingPointError: no replica is finite, or their mean is not.
        """
        if self.batches == 0:
            return
        single = self.param_groups[0]["round_length"] == 1
        for replica in self._replicas.values() if not single else ():
            replica.check_parameters()
        for message in self._messages.values():
            message.zero_()
        lost = []
        for number, replica in self._replicas.items():
            average = replica.weights if single else replica.state["inner_avg"]
            # a NaN or an infinity anywhere; no other test reads the vector only once
            if not (average.sum() + replica.riders.sum()).isfinite():
                lost.append(number)
                continue
            replica.gradient.add_(average)
            replica.message[-TAIL:-2].add_(replica.riders)
            replica.message[-2] += 1
        self._mean_messages()
        sound = float(self._home.message[-2])
        self.lost = [] if sound == 1 else self._everywhere(lost)
        if not sound:
            raise FloatingPointError(f"no replica is finite any more after round {self.rounds + 1}: try a lower lr")
        if self.lost:
            for message in self._messages.values():
                message[:-1].div_(sound)  # the mean over those that are
        for replica in self._replicas.values():
            replica.riders.copy_(replica.message[-TAIL:-2])
            for part in replica.parts:
                group, mean = self.param_groups[part.group], part.gradient
                outer = dict(
                    pull=group["scoped_rho"],
                    lr=group["outer_step"] * group["lr"],
                    momentum=group["outer_momentum"],
                )
                if not single:
                    move_anchor(part.anchor, part.inner_avg, mean, part.outer_momentum, **outer)
                    part.weights.copy_(part.anchor)
                    if replica is self._home:
                        move_anchor(part.master, mean, mean, part.master_momentum, **outer)
                group["rounds"] += 1
                group["batches"] = 0
        if single:
            for device, master in self._masters.items():
                master.copy_(self._messages[device][: len(master)])
        if not self.master.sum().isfinite():
            raise FloatingPointError(f"the master is not finite any more after round {self.rounds}: try a lower lr")
        for number in lost:
            self._restart(self._replicas[number])

    def _restart(self, replica: Replica) -> None:
        """From the master, without momentum: what it has is not finite."""
        for vector in replica.state.values():
            if vector is not self.master and vector is not self._home.state.get("master_momentum_buffer"):
                vector.zero_()
        for vector in (replica.weights, *(replica.state[n] for n in ("anchor", "inner_avg") if n in replica.state)):
            vector.copy_(self.master)

    # What a checkpoint holds

    @property
    def vectors(self) -> list[dict[str, Tensor]]:
        """For each replica here its flat vectors by name, and its riders: themselves, not copies."""
        own = ("inner_momentum_buffer", "outer_momentum_buffer", "anchor", "inner_avg")
        return [
            dict(weights=replica.weights, riders=replica.riders)
            | {name: replica.state[name] for name in own if name in replica.state}
            for replica in self._replicas.values()
        ]

    @property
    def shared(self) -> dict[str, Tensor]:
        """The master and its momentum, themselves."""
        names = ("master", "master_momentum_buffer")
        return {name: self._home.state[name] for name in names if name in self._home.state}

    @property
    def counters(self) -> dict[str, float]:
        """What counts and what changes from round to round. Set it after `vectors` and `shared`."""
        names = ("rounds", "batches", "round_length", "scoped_gamma", "scoped_rho", "lr")
        return {name: self.param_groups[0][name] for name in names}

    @counters.setter
    def counters(self, values: dict[str, float]) -> None:
        for group in self.param_groups:
            group.update(values)
        self._share_master()

    # What a caller reads

    @property
    def rounds(self) -> int:
        """Rounds done."""
        return self.param_groups[0]["rounds"]

    @property
    def batches(self) -> int:
        """Mini-batches done in this round."""
        return self.param_groups[0]["batches"]

    @property
    def master(self) -> Tensor:
        """The mean of the replicas' anchors as of the last sync: (P,), the trainable parameters in group order."""
        return self._home.state["master"]

    @property
    def riders(self) -> list[Tensor]:
        """For each replica here five floats, (5,), for the caller's use: a sync leaves their mean over all."""
        return [replica.riders for replica in self._replicas.values()]

    @torch.no_grad()
    def distances(self) -> list[Tensor]:
        """For each replica here ‖y − x‖ / ‖x‖, its distance to the master, a scalar on the replica's device.

        Between rounds y is the anchor.
        """
        masters = {replica.device: self.master.to(replica.device) for replica in self._replicas.values()}
        pairs = ((replica.weights, masters[replica.device]) for replica in self._replicas.values())
        return [(weights - master).norm() / master.norm() for weights, master in pairs]

    def copy_master_to(self, target: nn.Module | Iterable[Tensor]) -> None:
        """Copy the master into an evaluation model. Batch-norm statistics are the caller's to recompute.

        Args:
            target: a model like the replicas, or its parameters in the optimizer's order. A model will do where that
                order is the model's own or where Parle was built from named parameters.

        Raises:
            ValueError: the target's parameters do not match.
        """
        self._copy_to(target, self._home, self.master)

    def copy_replica_to(self, target: nn.Module | Iterable[Tensor], replica: int = 0) -> None:
        """Copy the weights of the replica in groups with this `replica` key, as `copy_master_to` does the master."""
        self._copy_to(target, self._replicas[replica], self._replicas[replica].weights)

    # state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`, in mid-round too, once the model's own has been loaded. The tensors are copied."""
        own, theirs = (
            [
                *(set(names) for _, names in sorted(state["state"].items())),
                *(group.get("sync_every") == "auto" for group in state["param_groups"]),
            ]
            for state in (self.state_dict(), state_dict)
        )
        if own != theirs:
            raise ValueError(
                "No state_dict of Parle with as many parameters and sync_every as it is here: 1, auto or neither"
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
            raise RuntimeError("A replica is one flat vector: give Parle all its groups when it is built")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["outer_momentum"] is None:
            group["outer_momentum"] = group["momentum"]
        _check_hyperparameters(group)

    # Helpers

    def _start_alike(self) -> None:
        """Give every replica here the first one's parameters, and anchors and masters the same."""
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

    def _cut_into_parts(self) -> None:
        for replica in self._replicas.values():
            groups = [i for i, group in enumerate(self.param_groups) if self._replicas[group["replica"]] is replica]
            sizes = [sum(p.numel() for p in _trainable(self.param_groups[i]["params"])) for i in groups]
            own = ("inner_momentum_buffer", "outer_momentum_buffer", "anchor", "inner_avg")
            momentum = self._home.state.get("master_momentum_buffer") if replica is self._home else None
            vectors = [replica.weights, replica.gradient, *(replica.state.get(name) for name in own)]
            vectors += [self._masters.get(replica.device), momentum]
            columns = [[None] * len(groups) if vector is None else vector.split(sizes) for vector in vectors]
            replica.parts = list(map(Part, groups, *columns))

    def _link_state(self) -> None:
        """Show the flat vectors, parameter by parameter, as `self.state`."""
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
    def _copy_to(self, target: nn.Module | Iterable[Tensor], replica: Replica, vector: Tensor) -> None:
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
    """The parameter's own, unless it has gaps or overlaps."""
    return torch.empty_like(parameter, device="meta").stride()


def _check_parameters(parameters: list[nn.Parameter]) -> None:
    """Raises: ValueError, for trainable parameters of one replica that do not fit one flat vector."""
    if not parameters:
        raise ValueError("Parle got no parameter that requires a gradient")
    if len(set(parameters)) < len(parameters):
        raise ValueError("A parameter appears twice; give a shared one once, as model.parameters() does")
    if len({parameter.data_ptr() for parameter in parameters if parameter.numel()}) < sum(
        parameter.numel() > 0 for parameter in parameters
    ):
        raise ValueError("Two parameters share their memory; tie them as one nn.Parameter instead")
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    if len(kinds) > 1 or parameters[0].dtype not in (torch.float32, torch.float64):
        raise ValueError(f"The parameters of a replica must be float32 (or all float64) on one device, not {kinds}")


def _check_alike(groups: list[dict[str, Any]]) -> None:
    """Raises: ValueError, where replicas differ in more than the device and the values of their parameters."""
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
    """Raises: ValueError, as torch.optim does, for what no run could mean."""
    for name in ("lr", "weight_decay", "gamma", "rho", "outer_step"):
        if not 0.0 <= group[name] < math.inf:
            raise ValueError(f"Invalid {name} value: {group[name]}")
    for name in ("momentum", "alpha", "outer_momentum"):
        if not 0.0 <= group[name] < 1.0:
            raise ValueError(f"Invalid {name} value: {group[name]}")
    for name in ("sync_every", "batches_per_epoch"):
        automatic = name == "sync_every" and group[name] == "auto" and group["gamma"] > 0
        if not automatic and not (isinstance(group[name], numbers.Integral) and group[name] >= 1):
            raise ValueError(f"Invalid {name} value: {group[name]}")
