"""Injected faults: PARLE_FAULT."""

import pytest
import torch
from torch import nn

from parle import fault_injection
from parle_gpu import Parle


@pytest.fixture
def optimizer():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones(2)
    return Parle([[w] for w in weights], lr=0.1, sync_every=2, batches_per_epoch=4)


@pytest.fixture
def arm(optimizer, monkeypatch):
    def arm(fault, replicas=(0, 1)):
        monkeypatch.setenv("PARLE_FAULT", fault)
        fault_injection.inject_fault(optimizer, list(replicas))

    return arm


@pytest.mark.parametrize(("kind", "replica"), [("explode", 0), ("", 7), ("Kill", 7), ("nan ", 0)])
def test_unknown_kind_is_refused_on_every_rank(kind, replica, arm):
    """Otherwise a test would pass although its fault is never injected."""
    with pytest.raises(ValueError, match="PARLE_FAULT"):
        arm(f"{kind}:{replica}:1")


@pytest.mark.parametrize(
    ("replica", "round", "nonfinite"), [(1, 2, [[], [1], []]), (0, 3, [[], [], [0]]), (7, 2, [[]] * 3)]
)
def test_nan_affects_one_replica_in_one_round(replica, round, nonfinite, arm, optimizer):
    arm(f"nan:{replica}:{round}")
    seen = []
    for step in range(6):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(2)
        optimizer.step()
        if step % 2:
            seen.append(optimizer.nonfinite_replicas)
    assert seen == nonfinite


def test_exception_is_raised_at_the_start_of_the_round(arm, optimizer):
    arm("raise:1:2")
    optimizer.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match="fault"):
        optimizer.step()
    assert (optimizer.rounds_done, optimizer.step_in_round) == (1, 0)


@pytest.mark.parametrize("missing", ["PARLE_FAULT", "PARLE_TESTING"])
def test_without_both_variables_nothing_is_injected(missing, optimizer, monkeypatch):
    monkeypatch.setenv("PARLE_FAULT", "raise:0:1")
    monkeypatch.delenv(missing)
    hooks = []
    monkeypatch.setattr(optimizer, "register_step_pre_hook", hooks.append)
    fault_injection.inject_fault(optimizer, [0, 1])
    assert hooks == []
