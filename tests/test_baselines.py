"""The methods of benchmarks/peers.py on two ranks beside numpy's, what they send, the choice of settings, the table.

Under mpiexec this file itself steps every method: mpiexec -n 2 python tests/test_peers.py
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
import ranks
from benchmarks import claim, peers, record, rules

STEPS, P, NB = 12, 10, 4
LR = 0.1
rng = np.random.default_rng(0)
CURVATURE = rng.uniform(0.5, 2.0, P)
TARGETS = rng.normal(size=(STEPS, 2, P))  # where each rank's loss, ½ Σ h (y − b)², is least at each step
SHORT = {  # so that something happens within 12 steps
    "parle": dict(sync_every=3),
    "entropy-sgd": dict(sync_every=3),
    "elastic-sgd": dict(rho=0.3),
    "postlocal-sgd": dict(sync_every=3, warmup=4),
    "diloco": dict(sync_every=3),
    "published": dict(sync_every=3, gamma=0.1, rho=0.1),
}


class Quadratic(nn.Module):
    """In two tensors, since the published rule counts them."""

    def __init__(self):
        super().__init__()
        self.head, self.tail = (nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in (3, P - 3))

    def forward(self, target):
        return (torch.tensor(CURVATURE) * (torch.cat([self.head, self.tail]) - target).square()).sum() / 2


class Numpy:
    """Two ranks in one loop, from the equations: `step` gives the weights (2, P) after step t."""

    def __init__(self):
        self.y = np.ones((2, P))
        self.u = np.zeros((2, P))

    def gradient(self, t):
        return CURVATURE * (self.y - TARGETS[t])

    def nesterov(self, gradient):
        self.u = 0.9 * self.u + gradient
        self.y = self.y - LR * (gradient + 0.9 * self.u)


class DataParallel(Numpy):
    def step(self, t):
        self.nesterov(self.gradient(t).mean(0))


class PostLocal(Numpy):
    def step(self, t):
        self.nesterov(self.gradient(t).mean(0) if t < 4 else self.gradient(t))
        if t >= 4 and (t - 4) % 3 == 0:
            self.y = np.tile(self.y.mean(0), (2, 1))


class DiLoCo(Numpy):
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


class Elastic(Numpy):
    def step(self, t):
        pull = 0.3 * 2 * (1 + 1 / (2 * NB)) ** t
        self.nesterov(self.gradient(t) + min(pull, 10) * (self.y - self.y.mean(0)))


class Published(Numpy):
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


RULES = {
    "sgd": DataParallel,
    "ddp": DataParallel,
    "postlocal-sgd": PostLocal,
    "diloco": DiLoCo,
    "elastic-sgd": Elastic,
    "published": Published,
}


def lockstep(comm, name):
    """Step a method and compare its weights with numpy's, where there are, and its messages with what it says."""
    method = rules.methods(2)[name]
    settings = rules.first_settings(method) | SHORT.get(name, {})
    own = {knob: value for knob, value in settings.items() if knob not in ("drops", "decay")}
    model, rule = Quadratic(), RULES.get(name, Numpy)()
    network, optimizer = method.build(model, comm, NB, **own)
    if name == "ddp":
        network.register_comm_hook(None, allreduce_hook)  # its own reducer sends where nobody can count
    with (
        mock.patch.object(ranks, "add", wraps=ranks.add) as mpi,
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as gloo,
    ):
        for t in range(STEPS):
            optimizer.zero_grad()
            network(torch.tensor(TARGETS[t, comm.rank])).backward()
            optimizer.step()
            if name in RULES:
                rule.step(t)
                weights = torch.cat([model.head, model.tail]).detach().numpy()
                np.testing.assert_allclose(weights, rule.y[comm.rank], rtol=1e-10, err_msg=f"{name}, step {t}")
    sent = [call.args[1] for call in mpi.call_args_list] + [call.args[0] for call in gloo.call_args_list]
    assert sum(len(vector) >= P for vector in sent) == method.messages(STEPS, settings), name


def trained_alike(comm, proc):
    """Data-parallel SGD by DDP and by our class is one run, of LeNet with dropout, as the loop has it."""
    data = loader.load("digits", proc=proc)
    curves = []
    for name in ("ddp", "sgd"):
        method = rules.methods(2)[name]
        settings = rules.first_settings(rules.methods(2)["ddp"])
        settings = method.settings | {knob: settings[knob] for knob in rules.GRID}
        row = peers.train(method, settings, 1, data, comm, [2, 5])
        assert row["bytes"] == 4 * 132_220 * 10  # 128 images on each rank are two steps
        curves.append([(batches, error) for batches, _, error in row["curve"]])
    assert curves[0] == curves[1]


def each_has_its_own_data(comm, proc):
    """The ranks are replicas, or share a mini-batch, as the method has it."""
    data = loader.load("digits", proc=proc)
    for name, own in (("ddp", dict(part=(comm.rank, 2))), ("postlocal-sgd", dict(replica=comm.rank, replicas=2))):
        method = rules.methods(2)[name]
        with mock.patch.object(loader, "Batches", wraps=loader.Batches) as batches:
            peers.train(method, rules.first_settings(method), 1, data, comm, [1])
        assert own.items() <= batches.call_args.kwargs.items(), name


def main():
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(comm.bcast(folder), "store").as_uri()
        dist.init_process_group("gloo", init_method=store, rank=comm.rank, world_size=comm.size)
        for name in rules.methods(2):
            lockstep(comm, name)
        each_has_its_own_data(comm, Path(sys.argv[1]))
        trained_alike(comm, Path(sys.argv[1]))
        dist.destroy_process_group()
        comm.Barrier()
    if comm.rank == 0:
        print("all equal")


def test_two_ranks_step_as_numpy_does_and_send_what_is_said(python, proc):
    loader.load("digits", proc=proc)
    done = python(__file__, proc, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all equal\n"


class Recorder(torch.optim.SGD):
    """Keeps the lr of every step."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.lrs = []

    def step(self):
        super().step()
        self.lrs.append(self.param_groups[0]["lr"])


def test_lr_drops_at_the_shares_of_a_run_that_were_chosen(comm, proc):
    seen = []

    def build(model, comm, nb, lr):
        seen.append(Recorder(model.parameters(), lr))
        return model, seen[-1]

    method = rules.Method(build, {}, messages=lambda steps, settings: 0)
    settings = dict(lr=0.1, drops=[0.5, 0.75], decay=0.2)
    row = peers.train(method, settings, 1, loader.load("digits", proc=proc), comm, [2, 4])
    assert seen[0].lrs == pytest.approx([0.1, 0.1, 0.02, 0.004])
    assert [batches for batches, *_ in row["curve"]] == [2, 4]


def test_what_is_tested_has_batch_norm_statistics_of_its_own(comm, proc):
    data = loader.load("digits", proc=proc)
    torch.manual_seed(0)
    model = models.build("lenet", data.channels, data.size, data.classes)
    errors = peers.tester(data, comm)(model), claim.test(model, data)
    assert errors[0] == pytest.approx(errors[1]) and errors[0] != 0


def test_settings_are_chosen_one_after_the_other_on_held_out_images(monkeypatch, comm, proc):
    tried = []

    def trial(name, settings, seed, data, comm, test_at):
        tried.append((settings["lr"], settings["drops"], settings["outer_momentum"]))
        assert (seed, test_at, len(data.train_labels), len(data.test_labels)) == (41, [1000], 1337, 100)
        return dict(error=abs(settings["lr"] - 0.06) + settings["drops"][0] + settings["outer_momentum"])

    monkeypatch.setattr(peers, "trial", trial)
    monkeypatch.setattr(peers, "HELD_OUT", 100)
    settings = peers.choose("diloco", loader.load("digits", proc=proc), comm)
    assert (settings["lr"], settings["drops"], settings["outer_momentum"]) == (0.05, [0.5, 0.75], 0.5)
    early, late = [0.5, 0.75], [0.7, 0.9]
    assert [*dict.fromkeys(map(str, tried))] == [
        str(each) for each in [(0.1, early, 0.9), (0.05, early, 0.9), (0.05, late, 0.9), (0.05, early, 0.5)]
    ]


def test_our_sgd_takes_what_was_chosen_for_ddp(monkeypatch, comm, proc):
    monkeypatch.setattr(peers, "trial", lambda name, settings, *_: dict(error=settings["lr"], name=name))
    settings = peers.choose("sgd", loader.load("digits", proc=proc), comm)
    assert (settings["lr"], settings["replicas"], settings["sync_every"]) == (0.05, 1, 1)


def test_what_was_tested_is_what_was_chosen(monkeypatch, comm, proc):
    """Of the rows that are kept: a method's grid may have grown, or its choice been run anew, since it was tested."""
    kept = record.read("peers")

    def looked_up(name, settings, seed, *_):
        (row,) = (r for r in kept if (r["method"], r["settings"], r["seed"]) == (name, settings, seed))
        return row

    monkeypatch.setattr(peers, "methods", lambda n: rules.methods(2))
    monkeypatch.setattr(peers, "trial", looked_up)
    data, tested = loader.load("digits", proc=proc), peers.results()
    assert {name: rows[0]["settings"] for name, rows in tested.items()} == {
        name: peers.choose(name, data, comm) for name in rules.methods(2)
    }


@pytest.fixture
def rows(monkeypatch):
    """Made up: two methods with two seeds each, one of them with older settings too, and a choice."""
    methods = rules.methods(2)

    def row(name, seed, curve, sent, **changes):
        settings = rules.first_settings(methods[name]) | changes
        common = dict(method=name, settings=settings, seed=seed, ranks=2, batches=2000, bytes=sent)
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
    monkeypatch.setattr(peers.record, "read", lambda question: rows)
    return rows


def test_the_table_has_the_newest_settings_and_the_best_method_first(rows):
    header, _, sgd, diloco = ([cell.strip() for cell in line.split("|")[1:-1]] for line in peers.table().splitlines())
    assert header[:4] == ["method", "error at equal gradients", "error at 35 s", "seconds in all"]
    assert sgd == [
        *("sgd", "0.45 ± 0.00", "1.15 ± 0.07", "50.0 ± 0.0", "25.0 ± 0.0"),
        *("50.0 ± 0.0", "50.0 ± 0.0", "50.0 ± 0.0", "50.0 ± 0.0", "1000", "lr 0.1 ÷ 5 at 0.5 and 0.75", "42, 43"),
    ]
    assert diloco == [
        *("diloco", "0.60 ± 0.07", "0.75 ± 0.28", "35.0 ± 7.1", "25.0 ± 0.0"),
        *(
            "2.5 ± 2.1",
            "21.0 ± 26.9",
            "30.0 (1 of 2)",
            "—",
            "20",
            "lr 0.1 ÷ 5 at 0.5 and 0.75, outer_momentum 0.5",
            "42, 43",
        ),
    ]


def test_the_figure_is_small(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(record, "FIGURES", tmp_path)
    peers.draw()
    assert 5_000 < (tmp_path / "peers.png").stat().st_size < 100_000


if __name__ == "__main__":
    ranks.run(main)
