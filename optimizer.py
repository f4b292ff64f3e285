"""What both Parle classes share: torch.optim's contract over flat vectors. Communication is left to the subclass.

A subclass defines `_mean_gradient`, over what one replica is spread over, and `_mean_messages`, over the replicas.
"""

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parle import GAMMA_CAP, PULL_CAP, descend, move_anchor, round_length, scope

RIDERS = 4  # floats that travel behind the weights in a round's message, the last of them lr


class Replica:
    """The flat vectors of one replica, each (P,), on its device. Its parameters become views into `weights`.

    Views keep their parameter's strides, so channels_last weights stay so. P counts the trainable parameters.
    """

    def __init__(self, parameters: list[nn.Parameter], has_inner_loop: bool):
        self.parameters = parameters
        # empty_like has the parameter's own strides, unless it has gaps or overlaps: then dense ones
        self.strides = [torch.empty_like(parameter).stride() for parameter in parameters]
        size, like = sum(parameter.numel() for parameter in parameters), parameters[0]
        self.weights = torch.empty(size, dtype=like.dtype, device=like.device)
        self.message = torch.zeros(size + RIDERS, dtype=like.dtype, device=like.device)
        self.gradient, self.riders = self.message[:size], self.message[size:]
        for parameter, view in zip(parameters, self.views(self.weights), strict=True):
            view.copy_(parameter)
            parameter.data = view  # no other way to move a parameter's storage keeps modules and autograd attached
        self.gradient_views = self.views(self.gradient)
        self.addresses = [parameter.data_ptr() for parameter in parameters]

        # by the names under which state_dict keeps them, parameter by parameter
        self.state = {"inner_momentum_buffer": torch.zeros_like(self.weights)}
        if has_inner_loop:
            self.state["outer_momentum_buffer"] = torch.zeros_like(self.weights)
            self.state["anchor"] = self.weights.clone()
            self.state["inner_avg"] = self.weights.clone()

    def views(self, vector: Tensor) -> list[Tensor]:
        """`vector` cut into tensors of the parameters' shapes and strides."""
        views, start = [], vector.storage_offset()
        for parameter, strides in zip(self.parameters, self.strides, strict=True):
            views.append(vector.as_strided(parameter.shape, strides, start))
            start += parameter.numel()
        return views

    def gather_gradient(self) -> None:
        """Copy the parameters' gradients into `gradient`. None is zero: no rank may skip what another one sends."""
        if [parameter.data_ptr() for parameter in self.parameters] != self.addresses:
            raise RuntimeError("A parameter has left the optimizer's vector: build Parle after model.to(...)")
        pairs = [
            (view, parameter.grad)
            for view, parameter in zip(self.gradient_views, self.parameters, strict=True)
            if parameter.grad is not None
        ]
        if len(pairs) < len(self.parameters):
            self.gradient.zero_()
        if pairs:
            torch._foreach_copy_(*zip(*pairs, strict=True))  # one call takes half the time of one for each


class Part(NamedTuple):
    """What one group has of its replica's vectors, and of the home's for the master: slices, (p,). None with L = 1."""

    weights: Tensor
    gradient: Tensor
    inner_momentum: Tensor
    outer_momentum: Tensor | None
    anchor: Tensor | None
    inner_avg: Tensor | None
    master: Tensor
    master_momentum: Tensor | None


class ReplicaOptimizer(torch.optim.Optimizer):
    """The torch.optim side of Parle: groups, state, one step. parle.py has the equations.

    Each group belongs to the replica that its key `replica` names. What counts and what changes from round to round
    lives in the groups, where every torch tool saves and restores it: `rounds` done, `batches` done in this round, and
    of this round `round_length`, L_k; `scoped_gamma`, γ_k; `scoped_rho`, c_k.
    """

    def __init__(self, params: Iterable[Any], num_replicas: int, **hyperparameters: Any):
        self.num_replicas = num_replicas
        self.sync_seconds = 0.0  # spent communicating, waiting for others included
        counters = dict(rounds=0, batches=0, round_length=0, scoped_gamma=0.0, scoped_rho=0.0)
        super().__init__(params, hyperparameters | dict(replica=0) | counters)

        has_inner_loop = self._shared("sync_every") != 1
        self._shared("batches_per_epoch")
        trainable: dict[int, list[nn.Parameter]] = {}
        slices = []
        for group in self.param_groups:
            parameters = trainable.setdefault(group["replica"], [])
            start = sum(parameter.numel() for parameter in parameters)
            parameters += [parameter for parameter in group["params"] if parameter.requires_grad]
            slices.append(slice(start, sum(parameter.numel() for parameter in parameters)))
        self._frozen = [p for group in self.param_groups for p in group["params"] if not p.requires_grad]
        with torch.no_grad():
            self._replicas = {a: Replica(_checked(parameters), has_inner_loop) for a, parameters in trainable.items()}
            self._home = next(iter(self._replicas.values()))  # keeps the master
            self._home.state["master"] = self._home.weights.clone()
            if has_inner_loop:
                self._home.state["master_momentum_buffer"] = torch.zeros_like(self._home.weights)
        self._parts = [self._part(group, part) for group, part in zip(self.param_groups, slices, strict=True)]
        self._link_state()

    # What a subclass communicates

    def _mean_gradient(self, replica: Replica) -> None:
        """Average `replica.gradient` over the ranks or devices of this replica, in place."""

    def _mean_messages(self) -> None:
        """Average `message` over all replicas, in place: the one collective of a round."""
        raise NotImplementedError

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
            if any(parameter.grad is not None for parameter in self._frozen):
                raise RuntimeError(
                    "A parameter was frozen when Parle was built and has a gradient now: build a new one"
                )
            self._mean_gradient(replica)
        for group, part in zip(self.param_groups, self._parts, strict=True):
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

    @torch.no_grad()
    def sync(self) -> None:
        """End the round: couple the replicas by their mean and move the master. One collective.

        `step()` calls it; call it yourself only to end a round early, as at the end of training, and then on every
        rank. Without a mini-batch since the last one there is nothing to do.
        """
        if self.batches == 0:
            return
        single, lr = self.param_groups[0]["round_length"] == 1, self.param_groups[0]["lr"]
        for replica in self._replicas.values():
            replica.gradient.copy_(replica.weights if single else replica.state["inner_avg"])
            replica.riders[-1] = lr
        self._mean_messages()
        if not math.isclose(self._home.riders[-1], lr, rel_tol=1e-5, abs_tol=1e-30):
            raise RuntimeError(
                f"lr is {lr} here and {float(self._home.riders[-1])} on average: schedule it alike everywhere"
            )

        for group, part in zip(self.param_groups, self._parts, strict=True):
            at_home = self._replicas[group["replica"]] is self._home
            outer = dict(
                pull=group["scoped_rho"],
                lr=group["outer_step"] * group["lr"],
                momentum=group["outer_momentum"],
            )
            mean = part.gradient
            if not single:
                move_anchor(part.anchor, part.inner_avg, mean, part.outer_momentum, **outer)
                part.weights.copy_(part.anchor)
                if at_home:
                    move_anchor(part.master, mean, mean, part.master_momentum, **outer)
            elif at_home:
                part.master.copy_(mean)
        for group in self.param_groups:
            group["rounds"] += 1
            group["batches"] = 0

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
        """For each replica here three floats, (3,), for the caller's use: a sync leaves their mean over all."""
        return [replica.riders[:-1] for replica in self._replicas.values()]

    @torch.no_grad()
    def distances(self) -> list[Tensor]:
        """For each replica here ‖y − x‖ / ‖x‖, its distance to the master. Between rounds y is the anchor."""
        return [(replica.weights - self.master).norm() / self.master.norm() for replica in self._replicas.values()]

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
            [set(names) for _, names in sorted(state["state"].items())] for state in (self.state_dict(), state_dict)
        )
        if own != theirs:
            raise ValueError(
                "This is no state_dict of Parle with as many parameters and as it is here, sync_every 1 or not"
            )
        for group in state_dict["param_groups"]:
            _check_hyperparameters(group)
        super().load_state_dict(state_dict)
        for replica in self._replicas.values():
            for name, vector in replica.state.items():
                for parameter, view in zip(replica.parameters, replica.views(vector), strict=True):
                    view.copy_(self.state[parameter][name])
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

    def _part(self, group: dict[str, Any], part: slice) -> Part:
        replica, home = self._replicas[group["replica"]], self._home
        own = ("inner_momentum_buffer", "outer_momentum_buffer", "anchor", "inner_avg")
        sources = [replica.weights, replica.gradient, *(replica.state.get(name) for name in own)]
        sources += [home.state["master"], home.state.get("master_momentum_buffer")]
        return Part(*(None if source is None else source[part] for source in sources))

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


def _checked(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """The trainable parameters of one replica, fit for one flat vector.

    Raises:
        ValueError: they are not.
    """
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
    return parameters


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
