import pytest
import torch
from torch import nn

import faults
from parle_gpu import Parle


@pytest.fixture
def optimizer():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    return Parle([[w] for w in weights], lr=0.1, sync_every=2, batches_per_epoch=4)


@pytest.fixture
def arm(optimizer, monkeypatch):
    def arm(fault, replicas=(0, 1)):
        monkeypatch.setenv("PARLE_FAULT", fault)
        faults.inject(optimizer, list(replicas))

    return arm


@pytest.mark.parametrize("kind", ["explode", "", "Kill", "poison "])
@pytest.mark.parametrize("replica", [0, 7])
def test_an_unknown_kind_is_refused_wherever_its_replica_lives(kind, replica, arm):
    """A test whose fault never strikes would pass."""
    with pytest.raises(ValueError, match=f"Invalid PARLE_FAULT: {kind}"):
        arm(f"{kind}:{replica}:1")


@pytest.mark.parametrize(("replica", "round", "lost"), [(1, 2, [[], [1], []]), (0, 3, [[], [], [0]]), (7, 2, [[]] * 3)])
def test_poison_strikes_one_replica_in_one_round(replica, round, lost, arm, optimizer):
    arm(f"poison:{replica}:{round}")
    seen = []
    for step in range(6):
        optimizer.step()
        if step % 2:
            seen.append(optimizer.lost)
    assert seen == lost


def test_an_exception_strikes_as_the_round_begins(arm, optimizer):
    arm("raise:1:2")
    optimizer.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match="a fault on purpose"):
        optimizer.step()
    assert (optimizer.rounds, optimizer.batches) == (1, 0)


def test_without_a_fault_there_is_none(optimizer, monkeypatch):
    monkeypatch.delenv("PARLE_FAULT", raising=False)
    faults.inject(optimizer, [0, 1])
    assert not optimizer._optimizer_step_pre_hooks
