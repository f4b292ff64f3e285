"""The methods of benchmarks/baselines.py: two ranks against numpy references, messages, tuning, table.

Under mpiexec this file itself steps every method: mpiexec -n 2 python tests/test_baselines.py
"""

import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

sys.path.insert(0, str(Path(__file__).parent.parent))

import loader
import models
from benchmarks import baseline_optimizers, baselines, results
from parle import rank_exit
from parle.distributed import MPIGroup
from tests.toy import run_ranks

STEPS, P, NB = 12, 40, 4  # P exceeds the floats that are sent besides a vector
LR = 0.1
rng = np.random.default_rng(0)
CURVATURE = rng.uniform(0.5, 2.0, P)
TARGETS = rng.normal(size=(STEPS, 2, P))  # minimum of each rank's loss ½ Σ h (y − b)² at each step
SHORT = {  # settings for 12 steps
    "parle": dict(sync_every=3),
    "entropy-sgd": dict(sync_every=3),
    "elastic-sgd": dict(rho=0.3),
    "postlocal-sgd": dict(sync_every=3, warmup_steps=4),
    "diloco": dict(sync_every=3),
    "published script": dict(sync_every=3, gamma=0.1, rho=0.1),
}


class Quadratic(nn.Module):
    """A quadratic loss of two parameter tensors, since the published script counts tensors."""

    def __init__(self):
        super().__init__()
        self.head, self.tail = (nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in (3, P - 3))

    def forward(self, target):
        return (torch.tensor(CURVATURE) * (torch.cat([self.head, self.tail]) - target).square()).sum() / 2


class Reference:
    """A reference for two ranks in one process: `step(t)` updates the weights y, (2, P)."""

    def __init__(self):
        self.y = np.ones((2, P))
        self.u = np.zeros((2, P))

    def gradient(self, t):
        return CURVATURE * (self.y - TARGETS[t])

    def nesterov(self, gradient):
        self.u = 0.9 * self.u + gradient
        self.y = self.y - LR * (gradient + 0.9 * self.u)


class DataParallel(Reference):
    def step(self, t):
        self.nesterov(self.gradient(t).mean(0))


class PostLocal(Reference):
    def step(self, t):
        self.nesterov(self.gradient(t).mean(0) if t < 4 else self.gradient(t))
        if t >= 4 and (t - 4) % 3 == 0:
            self.y = np.tile(self.y.mean(0), (2, 1))


class DiLoCo(Reference):
    def __init__(self):
        super().__init__()
        self.x, self.v = np.ones(P), np.zeros(P)

    def step(self, t):
        self.nesterov(self.gradient(t))
        if (t + 1) % 3 == 0:
            difference = self.x - self.y.mean(0)
            self.v = 0.9 * self.v + difference
            self.x = self.x - 0.7 * (difference + 0.9 * self.v)
            self.y = np.tile(self.x, (2, 1))


class Elastic(Reference):
    def step(self, t):
        coupling = 0.3 * 2 * (1 + 1 / (2 * NB)) ** t
        self.nesterov(self.gradient(t) + min(coupling, 10) * (self.y - self.y.mean(0)))


class Published(Reference):
    def __init__(self):
        super().__init__()
        self.xa, self.z, self.v, self.t = self.y, self.y, self.u, 0

    def step(self, t):
        gamma = 0.1 * (1 + 0.5 / NB) ** (self.t // 3)
        gradient = self.gradient(t) + min(gamma, 1) * (self.y - self.xa)
        self.u = 0.9 * self.u + gradient
        self.y = self.y - LR * (gradient + self.u)
        self.z = 0.75 * self.z + 0.25 * self.y
        self.t += 2  # tensors
        if (t + 1) % 3 == 0:
            rho = 0.1 * 3 * 2 * (1 + 0.5 / NB) ** (self.t // 3)
            gradient = (self.xa - self.z) + min(rho, 10) * (self.xa - self.z.mean(0))
            self.v = 0.9 * self.v + gradient
            self.y = self.y - LR * (gradient + self.v)
            self.xa = self.y


REFERENCES = {
    "sgd": DataParallel,
    "ddp": DataParallel,
    "postlocal-sgd": PostLocal,
    "diloco": DiLoCo,
    "elastic-sgd": Elastic,
    "published script": Published,
}


def short_settings(name):
    return baseline_optimizers.first_settings(baseline_optimizers.methods(2)[name]) | SHORT.get(name, {})


def take_steps(world, name, prepare=lambda network: None):
    """Step a method on this rank, and compare its weights with the reference after every step."""
    own = {key: value for key, value in short_settings(name).items() if key not in ("lr_drops", "lr_decay")}
    model, reference = Quadratic(), REFERENCES.get(name, Reference)()
    network, optimizer = baseline_optimizers.methods(2)[name].build(model, world, NB, **own)
    prepare(network)
    for t in range(STEPS):
        optimizer.zero_grad()
        network(torch.tensor(TARGETS[t, world.rank])).backward()
        optimizer.step()
        if name in REFERENCES:
            reference.step(t)
            weights = torch.cat([model.head, model.tail]).detach().numpy()
            np.testing.assert_allclose(weights, reference.y[world.rank], rtol=1e-10, err_msg=f"{name}, step {t}")


@pytest.mark.parametrize("name", ["diloco", "published script"])
def test_own_baselines_equal_their_reference(name):
    def count_messages(world):
        with mock.patch.object(world, "all_reduce", wraps=world.all_reduce) as all_reduce:
            take_steps(world, name)
        return all_reduce.call_count

    expected = baseline_optimizers.methods(2)[name].num_messages(STEPS, short_settings(name))
    assert run_ranks(2, count_messages) == [expected, expected]


def check_steps(world, name):
    """Compare a method with its reference, and count its messages."""

    def prepare(network):
        if name == "ddp":
            network.register_comm_hook(None, allreduce_hook)  # its own reducer cannot be patched to count messages

    with (
        mock.patch.object(MPIGroup, "all_reduce", autospec=True, side_effect=MPIGroup.all_reduce) as mpi,
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as gloo,
    ):
        take_steps(world, name, prepare)
    sent = [call.args[1] for call in mpi.call_args_list] + [call.args[0] for call in gloo.call_args_list]
    expected = baseline_optimizers.methods(2)[name].num_messages(STEPS, short_settings(name))
    assert sum(len(vector) >= P for vector in sent) == expected, name


def small_network(name, channels, size, classes):
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 20), nn.Dropout(0.25), nn.Linear(20, classes))


def check_equal_runs(world, proc):
    """Train by DDP and by this project's SGD, which must give the same errors."""
    data = loader.load("digits", proc=proc)
    curves = []
    for name in ("ddp", "sgd"):
        method = baseline_optimizers.methods(2)[name]
        settings = baseline_optimizers.first_settings(baseline_optimizers.methods(2)["ddp"])
        settings = method.fixed | {parameter: settings[parameter] for parameter in baseline_optimizers.GRID}
        row = baselines.train(method, settings, 1, data, world, [2, 5])
        assert row["bytes_sent"] == 4 * (17 * 20 + 21 * 10) * 10  # 5 mini-batches per rank are 10 updates
        curves.append([(steps, error) for steps, _, error in row["curve"]])
        stopped = baselines.train(method, settings, 1, data, world, [2, 5], average_decay=0.5, target=100.0)
        ((steps, _, error, averaged),) = stopped["curve"]
        assert (steps, error) == curves[-1][0] and averaged != error
        assert stopped["bytes_sent"] == 4 * (17 * 20 + 21 * 10) * 4
    assert curves[0] == curves[1]


def check_shards(world, proc):
    """Check that ranks are replicas, or split a mini-batch, as the method says."""
    data = loader.load("digits", proc=proc)
    shares = {"ddp": dict(shard=(world.rank, 2)), "postlocal-sgd": dict(replica=world.rank, replicas=2)}
    for name, share in shares.items():
        method = baseline_optimizers.methods(2)[name]
        with mock.patch.object(loader, "BatchLoader", wraps=loader.BatchLoader) as batches:
            baselines.train(method, baseline_optimizers.first_settings(method), 1, data, world, [1])
        assert share.items() <= batches.call_args.kwargs.items(), name


def main():
    from mpi4py import MPI

    world = MPIGroup(MPI.COMM_WORLD)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(models, "build", small_network):
        store = Path(world.comm.bcast(folder), "store").as_uri()
        dist.init_process_group("gloo", init_method=store, rank=world.rank, world_size=world.size)
        for name in baseline_optimizers.methods(2):
            check_steps(world, name)
        check_shards(world, Path(sys.argv[1]))
        check_equal_runs(world, Path(sys.argv[1]))
        dist.destroy_process_group()
        world.comm.Barrier()
    if world.rank == 0:
        print("all equal")


@pytest.mark.slow
def test_two_ranks_equal_the_reference_and_send_as_stated(python, proc):
    loader.load("digits", proc=proc)
    done = python(__file__, proc, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all equal\n"


class Recorder(torch.optim.SGD):
    """SGD that records the lr of every step."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.lrs = []

    def step(self):
        super().step()
        self.lrs.append(self.param_groups[0]["lr"])


def test_lr_drops_at_fractions_of_the_run(comm, proc, monkeypatch):
    recorders = []

    def build(model, world, nb, lr):
        recorders.append(Recorder(model.parameters(), lr))
        return model, recorders[-1]

    monkeypatch.setattr(models, "build", small_network)
    method = baseline_optimizers.Method(build, {}, num_messages=lambda steps, settings: 0)
    settings = dict(lr=0.1, lr_drops=[0.5, 0.75], lr_decay=0.2)
    row = baselines.train(method, settings, 1, loader.load("digits", proc=proc), MPIGroup(comm), [2, 4])
    assert recorders[0].lrs == pytest.approx([0.1, 0.1, 0.02, 0.004])
    assert [steps for steps, *_ in row["curve"]] == [2, 4]


def test_settings_are_tuned_in_turn_on_held_out_images(monkeypatch, comm, proc):
    tried = []

    def run_trial(name, settings, seed, data, world, eval_steps):
        tried.append((settings["lr"], settings["lr_drops"], settings["outer_momentum"]))
        assert (seed, eval_steps) == (41, [1000])
        assert (len(data.train_images), len(data.train_labels)) == (1337, 1337)
        assert (len(data.test_images), len(data.test_labels)) == (100, 100)
        return dict(error=abs(settings["lr"] - 0.06) + settings["lr_drops"][0] + settings["outer_momentum"])

    monkeypatch.setattr(baselines, "run_trial", run_trial)
    monkeypatch.setattr(baselines, "NUM_HELD_OUT", 100)
    settings = baselines.tune("diloco", loader.load("digits", proc=proc), MPIGroup(comm))
    assert (settings["lr"], settings["lr_drops"], settings["outer_momentum"]) == (0.05, [0.5, 0.75], 0.5)
    early, late = [0.5, 0.75], [0.7, 0.9]
    assert [*dict.fromkeys(map(str, tried))] == [
        str(each) for each in [(0.1, early, 0.9), (0.05, early, 0.9), (0.05, late, 0.9), (0.05, early, 0.5)]
    ]


def test_final_rows_have_the_tuned_settings(monkeypatch, comm, proc):
    """A grid may have grown, or tuning been repeated, after the final trials."""
    rows = results.read_rows("baselines")

    def look_up(name, settings, seed, *_):
        (row,) = (row for row in rows if (row["method"], row["settings"], row["seed"]) == (name, settings, seed))
        return row

    monkeypatch.setattr(baselines, "methods", lambda n: baseline_optimizers.methods(2))
    monkeypatch.setattr(baselines, "run_trial", look_up)
    data, final = loader.load("digits", proc=proc), baselines.latest_rows()
    assert {name: rows[0]["settings"] for name, rows in final.items()} == {
        name: baselines.tune(name, data, MPIGroup(comm)) for name in baseline_optimizers.methods(2)
    }


def test_table_has_the_latest_settings_and_the_best_method_first(monkeypatch):
    methods = baseline_optimizers.methods(2)

    def row(name, seed, curve, sent, **changes):
        settings = baseline_optimizers.first_settings(methods[name]) | changes
        common = dict(method=name, settings=settings, seed=seed, ranks=2, steps=2000, bytes_sent=sent)
        return common | dict(curve=curve, seconds=curve[-1][1], cpu_seconds=25, error=curve[-1][2])

    rows = [
        row("diloco", 42, [[50, 1.0, 9.0]], 1e9, lr=0.3),
        row("diloco", 41, [[1000, 1.0, 0.1]], 1e6),
        row("diloco", 44, [[50, 1.0, 9.0]], 1e9, outer_momentum=0.5) | dict(ranks=4),
        row("diloco", 42, [[50, 1.0, 0.9], [100, 2.0, 0.65], [2000, 30.0, 0.55]], 40e6, outer_momentum=0.5),
        row("diloco", 43, [[50, 2.0, 1.1], [100, 4.0, 0.95], [2000, 40.0, 0.65]], 40e6, outer_momentum=0.5),
        row("sgd", 42, [[50, 10.0, 1.2], [100, 20.0, 1.1], [2000, 50.0, 0.45]], 2e9),
        row("sgd", 43, [[50, 10.0, 1.2], [100, 36.0, 1.1], [2000, 50.0, 0.45]], 2e9),
    ]
    monkeypatch.setattr(baselines.results, "read_rows", lambda name: rows)
    header, _, sgd, diloco = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in baselines.table().splitlines()
    )
    assert "35 s" in header[2]
    assert sgd[0] == baselines.LABELS["sgd"] and diloco[0] == baselines.LABELS["diloco"]
    assert sgd[1:5] == ["0.45 ± 0.00", "1.15 ± 0.07", "50.0 ± 0.0", "25.0 ± 0.0"]
    assert sgd[5:] == [*["50.0 ± 0.0"] * 4, "1000", "lr 0.1 ÷ 5 at 0.5 and 0.75", "42, 43"]
    assert diloco[1:5] == ["0.60 ± 0.07", "0.75 ± 0.28", "35.0 ± 7.1", "25.0 ± 0.0"]
    assert diloco[5:10] == ["2.5 ± 2.1", "21.0 ± 26.9", "30.0 (1 of 2)", "—", "20"]
    assert "outer_momentum 0.5" in diloco[10]


if __name__ == "__main__":
    rank_exit.run_or_abort(main)
