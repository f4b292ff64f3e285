"""Validation of parameters, groups and loaded counters. All functions raise ValueError."""

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parle.flat_replica import dense_strides, trainable
from parle.inner import INNER

MAX_STEPS = 2**53  # of a round with sync_every="auto": beyond, floats are no longer integers


def sync_kind(sync_every: int | str) -> int | str:
    """Return the kind of L, which determines the state vectors: 1, "auto", or 2 for any larger number."""
    return min(sync_every, 2) if isinstance(sync_every, numbers.Integral) else sync_every


def check_parameters(parameters: list[nn.Parameter]) -> None:
    """Check that the trainable parameters of one replica can form one flat vector. Raises: ValueError."""
    trained = trainable(parameters)
    if not trained:
        raise ValueError("Parle needs at least one parameter with requires_grad=True")
    for parameter in parameters:
        if parameter.is_meta:
            raise ValueError("A parameter is on the meta device: call to_empty(device=...) and load weights first")
        if type(parameter.detach()) is not Tensor:
            raise ValueError(
                f"A parameter is of type {type(parameter.detach()).__name__}, but Parle needs plain tensors: do not "
                "shard or quantize the model"
            )
    if any(parameter.is_cpu and parameter.is_shared() for parameter in trained):
        raise ValueError(
            "A parameter is in shared memory, and Parle moves parameters to other memory: do not call "
            "share_memory(), and update a shared model with copy_master_to()"
        )
    if len(set(trained)) < len(trained):
        raise ValueError("A parameter appears twice: pass a tied parameter only once, as model.parameters() does")
    nonempty = [parameter for parameter in trained if parameter.numel()]
    if len({parameter.data_ptr() for parameter in nonempty}) < len(nonempty):
        raise ValueError("Two parameters share their memory; tie them as one nn.Parameter instead")
    kinds = {(parameter.dtype, parameter.device) for parameter in trained}
    if len(kinds) > 1 or trained[0].dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"The parameters of a replica must be float32 (or all float64) on one device, not {kinds}: convert "
            "the model with model.float() and move it to one device"
        )


def check_replicas_match(groups: list[dict[str, Any]]) -> None:
    """Check that replicas differ only in the device and the values of their parameters. Raises: ValueError."""
    kinds: dict[int, list[Any]] = {}
    for group in groups:
        tensors = [(p.shape, dense_strides(p), p.dtype, p.requires_grad) for p in group["params"]]
        settings = {name: value for name, value in group.items() if name not in ("params", "param_names", "replica")}
        kinds.setdefault(group["replica"], []).append((tensors, settings))
    first, *others = kinds
    for replica in others:
        if kinds[replica] != kinds[first]:
            raise ValueError(
                f"Replica {replica} and replica {first} differ in shapes, strides, dtypes, requires_grad or settings: "
                "build all replicas identically"
            )


def check_shared(groups: list[dict[str, Any]]) -> None:
    """Check that all groups agree on L, nb, the master's average and the counters. Raises: ValueError."""
    names = ("sync_every", "batches_per_epoch", "master_average")
    for name in (*names, "rounds_done", "step_in_round", "steps_per_round", "rounds_averaged"):
        values = [group[name] for group in groups]
        if any(value != values[0] for value in values):
            raise ValueError(f"Invalid {name} values: {values}; all groups must have the same value")


def check_hyperparameters(group: dict[str, Any]) -> None:
    """Check the values of a group. Raises: ValueError, as torch.optim does."""
    for name in ("lr", "weight_decay", "gamma", "rho", "outer_lr_scale"):
        if not (isinstance(group[name], numbers.Real | Tensor) and 0.0 <= group[name] < math.inf):
            raise ValueError(f"Invalid {name} value: {group[name]}; use a finite number of at least 0")
    for name in ("momentum", "alpha", "outer_momentum", "master_average"):
        if not (isinstance(group[name], numbers.Real) and 0.0 <= group[name] < 1.0):
            raise ValueError(f"Invalid {name} value: {group[name]}; use a number in [0, 1)")
    for name in ("sync_every", "batches_per_epoch"):
        if name == "sync_every" and group[name] == "auto":
            if not (group["gamma"] > 0 and group["lr"] / group["gamma"] < MAX_STEPS):
                raise ValueError("Invalid sync_every value: auto; it needs a gamma that is not 0, nor tiny beside lr")
        elif not (isinstance(group[name], numbers.Integral) and group[name] >= 1):
            raise ValueError(f"Invalid {name} value: {group[name]}; use an integer of at least 1")


def check_counters(group: dict[str, Any]) -> None:
    """Check the counters of a loaded group. Raises: ValueError."""
    for name in ("rounds_done", "steps_per_round", "step_in_round", "rounds_averaged"):
        if not (isinstance(group[name], numbers.Integral) and group[name] >= 0):
            raise ValueError(f"Invalid {name} value: {group[name]}; use an integer of at least 0")
    if group["step_in_round"] > group["steps_per_round"]:
        raise ValueError(f"Invalid step_in_round value: {group['step_in_round']} of {group['steps_per_round']}")
    for name in ("gamma_k", "coupling_k"):
        if not (isinstance(group[name], numbers.Real) and 0.0 <= group[name] < math.inf):
            raise ValueError(f"Invalid {name} value: {group[name]}; use a finite number of at least 0")


def check_buffers(buffers: list[Tensor]) -> None:
    """Check that buffers are tensors. Raises: TypeError."""
    for buffer in buffers:
        if not isinstance(buffer, Tensor):
            raise TypeError(f"Invalid buffers value: a {type(buffer).__name__} where a tensor was expected")


def check_state(
    groups: list[dict[str, Any]],
    values: Mapping[nn.Parameter, dict[str, Any]],
    own_groups: list[dict[str, Any]],
    own_values: Mapping[nn.Parameter, dict[str, Tensor]],
    names: Iterable[str],
) -> None:
    """Check that a loaded state fits an optimizer. Raises: ValueError.

    Args:
        groups, values: the loaded parameter groups, and the states by parameter.
        own_groups, own_values: those of the optimizer.
        names: keys that every group must have.
    """
    for index, (group, own) in enumerate(zip(groups, own_groups, strict=True)):
        missing = sorted(set(names) - group.keys())
        if missing:
            raise ValueError(f"The state_dict was not saved by Parle: group {index} has no {', '.join(missing)}")
        if group.get(INNER, {}).keys() != own.get(INNER, {}).keys():
            raise ValueError(
                f"The state_dict was saved with a different inner optimizer: its settings are "
                f"{sorted(group.get(INNER, {}))}, this one's are {sorted(own.get(INNER, {}))}"
            )
        check_hyperparameters(group)
        check_counters(group)
        if group["num_replicas"] != own["num_replicas"]:
            raise ValueError(
                f"The state_dict has {group['num_replicas']} replicas, this optimizer {own['num_replicas']}: to change "
                "their number, load the master into the model and call reset()"
            )
        if group["replica"] != own["replica"]:
            raise ValueError(
                f"The state_dict is of replica {group['replica']}, but group {index} belongs to replica "
                f"{own['replica']}: load on each rank what this rank saved. To start from the weights of one replica, "
                "load them into the model and call reset()"
            )
        if sync_kind(group["sync_every"]) != sync_kind(own["sync_every"]):
            raise ValueError(
                f"The state_dict has sync_every={group['sync_every']}, this optimizer {own['sync_every']}: it cannot "
                "change between 1, auto and larger numbers"
            )
        if (group["master_average"] > 0) != (own["master_average"] > 0):
            raise ValueError(
                f"The state_dict has master_average={group['master_average']}, this optimizer "
                f"{own['master_average']}: it cannot change from or to 0"
            )
    check_shared(groups)
    check_replicas_match(groups)
    for index, parameter in enumerate(parameter for group in groups for parameter in group["params"]):
        own, theirs = (
            {name: _shape(value) for name, value in source.get(parameter, {}).items() if name != INNER}
            for source in (own_values, values)
        )
        if own != theirs:
            raise ValueError(f"The state_dict does not fit parameter {index}, whose states are {own}: it has {theirs}")


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
