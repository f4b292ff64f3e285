"""Random trials of parle_gpu.Parle in lockstep with the float64 reference.

hypothesis generates cases that tests/lockstep.py does not cover: parameters of any shape, all hyperparameters of every
group, and steps at which gradients are missing, hyperparameters change, a round ends early or the run is resumed. It
prints the simplest trial that fails.
"""

import io

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from torch import nn

from parle_gpu import Parle
from tests.reference import Reference

# Every run draws the same trials. Phase.explain is omitted: it takes longer than shrinking.
REPRODUCIBLE = dict(derandomize=True, database=None, deadline=None, phases=[Phase.generate, Phase.shrink])
TOLERANCE = 1e-11  # relative to the largest element of all vectors
IN_REFERENCE = dict(gamma="gamma0", rho="rho0", outer_lr_scale="s")  # where the names differ
HYPERPARAMETERS = dict(  # small enough that trials rarely diverge, which would hide errors in small vectors
    lr=st.floats(0, 0.15),
    momentum=st.floats(0, 0.95),
    weight_decay=st.floats(0, 0.5),
    gamma=st.just(0.0) | st.floats(0, 1.5),
    rho=st.floats(0, 0.6),
    alpha=st.floats(0, 0.95),
    outer_lr_scale=st.floats(0, 1.5),
    outer_momentum=st.floats(0, 0.95),
)
SHAPE = array_shapes(min_dims=0, max_dims=4, max_side=3) | st.sampled_from([(0,), (2, 0, 3)])


@st.composite
def trials(draw, sync_every):
    """Draw the arguments of `Trial` and those of its `segment`s. L may change within the strategy `sync_every`."""
    n, L = draw(st.integers(1, 4)), draw(sync_every)
    hyperparameters = HYPERPARAMETERS | (dict(gamma=st.floats(0.02, 0.1)) if L == "auto" else {})  # up to 8 steps
    parameters = st.lists(st.tuples(SHAPE, st.booleans()), min_size=1, max_size=3)
    groups = draw(st.lists(st.tuples(st.fixed_dictionaries(hyperparameters), parameters), min_size=1, max_size=3))
    groups[0][1].insert(0, ((2,), True))  # L = auto reads the first group, but in the reference the first element
    trainable = sum(trainable for _, own in groups for _, trainable in own)
    common = dict(batches_per_epoch=draw(st.integers(1, 20)), master_average=draw(st.just(0.0) | st.floats(0.01, 0.95)))
    trial = dict(n=n, sync_every=L, groups=groups, **common)
    segment = dict(
        steps=st.integers(1, 6),
        missing=st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, trainable - 1))),
        sync_every=sync_every,
        group=st.integers(0, len(groups) - 1),
        changes=st.fixed_dictionaries({}, optional=hyperparameters),
        ending=st.sampled_from(["continue", "sync", "resume"]),
    )
    return trial, draw(st.lists(st.fixed_dictionaries(segment), min_size=3, max_size=8))


class Trial:
    """An optimizer and the reference, which undergo the same steps and changes.

    Args:
        groups: hyperparameters of each group, and for each of its parameters the shape and whether it is trainable.
        common: what the groups share, sync_every, batches_per_epoch and master_average.
    """

    def __init__(self, n, groups, **common):
        self.n, self.groups, self.common = n, groups, common
        self.hyperparameters = [values for values, _ in groups]
        self.random = np.random.default_rng(0)
        self.build()
        self.frozen = [parameter.clone() for parameter in self.parameters(0, trainable=False)]
        x0 = np.concatenate([parameter.numpy(force=True).ravel() for parameter in self.parameters(0)])
        shared = dict(L=common["sync_every"], nb=common["batches_per_epoch"], beta=common["master_average"])
        self.reference = Reference(x0, n, **shared, **self.vectors())

    def build(self):
        """Build the optimizer of new parameters, with the hyperparameters of the start."""
        self.replicas = [
            [dict(params=[self.parameter(*each) for each in own], **values) for values, own in self.groups]
            for _ in range(self.n)
        ]
        self.optimizer = Parle(self.replicas, lr=0.1, **self.common)

    def parameter(self, shape, trainable):
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return nn.Parameter(torch.tensor(self.random.normal(size=shape)).to(memory_format=layout), trainable)

    def parameters(self, replica, trainable=True):
        return [p for group in self.replicas[replica] for p in group["params"] if p.requires_grad == trainable]

    def vectors(self):
        """Return the hyperparameters of every element, (P,), by their names in the reference."""
        sizes = [sum(p.numel() for p in group["params"] if p.requires_grad) for group in self.replicas[0]]
        return {
            IN_REFERENCE.get(name, name): np.repeat([values[name] for values in self.hyperparameters], sizes)
            for name in HYPERPARAMETERS
        }

    def segment(self, steps, missing, sync_every, group, changes, ending):
        """Step, change L and hyperparameters of one group, and perhaps end the round or resume the run."""
        for _ in range(steps):
            self.step(missing)
            self.compare()
        self.hyperparameters[group] = self.hyperparameters[group] | changes
        vars(self.reference).update(self.vectors(), L=sync_every)
        for number, own in enumerate(self.optimizer.param_groups):
            own["sync_every"] = sync_every
            if number % len(self.groups) == group:
                own.update(changes)
        if ending != "continue":
            getattr(self, ending)()
            self.compare()

    def step(self, missing):
        """Step with random gradients; those of the (replica, parameter) pairs in `missing` are None."""
        gradients = self.random.normal(size=self.reference.y.shape)
        for a in range(self.n):
            end = 0
            for number, parameter in enumerate(self.parameters(a)):
                start, end = end, end + parameter.numel()
                parameter.grad = torch.tensor(gradients[a, start:end]).reshape(parameter.shape)
                if (a, number) in missing:
                    parameter.grad, gradients[a, start:end] = None, 0
        self.reference.step(gradients)
        self.optimizer.step()

    def sync(self):
        self.reference.sync()
        self.optimizer.sync()

    def resume(self):
        """Continue with a new optimizer of new parameters."""
        saved = io.BytesIO()
        torch.save([[group["params"] for group in self.optimizer.param_groups], self.optimizer.state_dict()], saved)
        saved.seek(0)
        parameters, state = torch.load(saved)
        self.build()
        with torch.no_grad():
            for group, values in zip(self.optimizer.param_groups, parameters, strict=True):
                for parameter, value in zip(group["params"], values, strict=True):
                    parameter.copy_(value)
        self.optimizer.load_state_dict(state)

    def compare(self):
        reference, state = self.reference, self.optimizer.state
        assert (self.optimizer.rounds_done, self.optimizer.step_in_round) == (reference.k, reference.i)
        expected = {"inner_momentum_buffer": reference.u}
        if self.common["sync_every"] != 1:
            expected |= {"outer_momentum_buffer": reference.v, "anchor": reference.xa}
        if reference.i:  # it is unused between rounds
            expected["inner_avg"] = reference.z
        scale = max(abs(values).max() for values in (reference.y, *expected.values()))
        for a in range(self.n):
            own = self.parameters(a)
            pairs = {name: ([state[p][name] for p in own], values[a]) for name, values in expected.items()}
            pairs["y"] = own, reference.y[a]
            if a == 0:
                pairs["master"] = [state[p]["master"] for p in own], reference.x
                if reference.beta and reference.k:
                    pairs["master_average"] = [state[p]["master_average"] for p in own], reference.xbar
            for name, (tensors, values) in pairs.items():
                got = np.concatenate([tensor.numpy(force=True).ravel() for tensor in tensors])
                error = abs(got - values).max() / scale
                assert error < TOLERANCE, f"{name} of replica {a} is off by {error:.1e}"
            for parameter, value in zip(self.parameters(a, trainable=False), self.frozen, strict=True):
                assert torch.equal(parameter, value), f"a frozen parameter of replica {a} has changed"


@pytest.mark.filterwarnings("ignore:Training may diverge", "ignore:No parameter of replica")  # both are intended here
@pytest.mark.parametrize("examples", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sync_every", [st.just(1), st.integers(2, 6), st.just("auto")], ids=["1", "2 to 6", "auto"])
def test_random_trials_equal_the_reference(sync_every, examples):
    @settings(max_examples=examples, **REPRODUCIBLE)
    @given(trials(sync_every))
    def check(drawn):
        arguments, segments = drawn
        trial = Trial(**arguments)
        trial.compare()
        for segment in segments:
            trial.segment(**segment)

    check()
