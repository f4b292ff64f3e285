"""The optimizer that the argument `inner` builds. Parle's groups hold its settings, and Parle's state its state."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

SHARED = ("lr", "momentum", "weight_decay")  # settings of Parle's own groups, where schedulers change them
INNER = "inner"  # the key of its other settings in Parle's groups, and of its state in that of each parameter

InnerFunction = Callable[[list[Any]], torch.optim.Optimizer]


def build_inner(inner: InnerFunction, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the inner optimizer of one replica.

    Args:
        groups: of this replica, each with what the user passed for it: parameters, or parameters and settings. A
            single group without settings is passed to `inner` as a list of parameters.

    Raises:
        ValueError: it is not an optimizer of these parameters, or Parle cannot step it.
    """
    has_settings = len(groups) > 1 or len(groups[0]) > 1
    optimizer = inner([dict(group) for group in groups] if has_settings else list(groups[0]["params"]))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"Invalid inner value: it must return a torch optimizer, not a {type(optimizer).__name__}")
    own, theirs = ([list(map(id, group["params"])) for group in source] for source in (groups, optimizer.param_groups))
    if own != theirs:
        raise ValueError(
            "Invalid inner value: it must return an optimizer of the parameters or groups that it is given, in their "
            "order; to split them into groups, pass the groups to Parle"
        )
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY
    for name, parameter in inspect.signature(optimizer.step).parameters.items():
        if parameter.kind in kinds and parameter.default is inspect.Parameter.empty:
            raise ValueError(
                f"Invalid inner value: the step of {type(optimizer).__name__} needs a {name}, but Parle calls step() "
                "once per mini-batch, after its backward pass: use an optimizer whose step needs no argument"
            )
    if any("lr" not in group for group in optimizer.param_groups):
        raise ValueError(
            f"Invalid inner value: {type(optimizer).__name__} has no lr, which scales the pull to the anchor"
        )
    return optimizer


def inner_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings of an inner optimizer's group that Parle's groups lack."""
    return {name: value for name, value in group.items() if name not in ("params", "param_names", *SHARED)}


def update_settings(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Copy the settings in Parle's groups, which schedulers and users may have changed, into an inner optimizer."""
    for inner_group, group in zip(optimizer.param_groups, groups, strict=True):
        inner_group.update(group[INNER])
        inner_group.update({name: group[name] for name in SHARED if name in inner_group})


def load_inner_state(optimizer: torch.optim.Optimizer, states: Mapping[nn.Parameter, dict[str, Any]]) -> None:
    """Replace the state of an inner optimizer by copies of the states by parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {index: states.get(parameter, {}).get(INNER) for index, parameter in enumerate(parameters)}
    groups = optimizer.state_dict()["param_groups"]
    # the optimizer itself knows the dtype and device of each state
    optimizer.load_state_dict(
        dict(state=copy.deepcopy({i: state for i, state in own.items() if state}), param_groups=groups)
    )


def check_settings_unchanged(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that a step has changed no setting, which Parle would not save, and that all state is of parameters.

    Raises:
        RuntimeError: the optimizer keeps its progress elsewhere.
    """
    if len(optimizer.state) > sum(len(group["params"]) for group in groups):
        raise RuntimeError(
            f"{type(optimizer).__name__} keeps state that belongs to no parameter, which Parle does not support"
        )
    for inner_group, group in zip(optimizer.param_groups, groups, strict=True):
        settings = inner_settings(inner_group) | {name: inner_group[name] for name in SHARED if name in inner_group}
        saved = group[INNER] | {name: group[name] for name in SHARED}
        changed = [name for name, value in settings.items() if name not in saved or saved[name] is not value]
        if changed:
            raise RuntimeError(
                f"{type(optimizer).__name__} keeps its progress ({', '.join(changed)}) in its parameter groups, which "
                "Parle does not support: use an inner optimizer that keeps it in its state"
            )


def find_numbers(settings: Mapping[str, Any]) -> dict[str, float]:
    """Return the settings that are numbers, or tuples of numbers, by name."""
    found = {}
    for name, value in sorted(settings.items()):
        for index, element in enumerate(value if isinstance(value, tuple | list) else [value]):
            if isinstance(element, bool | int | float):
                found[f"{name}[{index}]" if isinstance(value, tuple | list) else name] = element
    return found
