"""Checks of parle_mpi.Parle on several ranks, beyond the equations, which lockstep.py checks.

mpiexec -n 4 python tests/mpi_checks.py
torchrun --nproc-per-node 4 tests/mpi_checks.py
"""

import copy
import functools
import gc
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import loader
from parle import evaluation, rank_exit, training
from parle.distributed import CollectiveTimeout, Group
from tests import ranks
from tests.ranks import Parle

SETTINGS = dict(lr=0.1, sync_every=2, batches_per_epoch=10)


def identical(comm, tensor):
    """Return whether a tensor is bitwise the same on all ranks."""
    return len(set(comm.allgather(tensor.detach().numpy().tobytes()))) == 1


def error_message(error, action):
    """Return the message of the error that `action` must raise."""
    try:
        action()
    except error as caught:
        return str(caught)
    raise AssertionError(f"no {error.__name__}")


def take_steps(optimizer, count, comm):
    """Take steps whose gradients differ between ranks and steps."""
    for step in range(count):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, step + comm.rank + 1.0)
        optimizer.step()


def check_data_parallel(comm, single):
    """Several ranks of one replica train as one rank does, although their shards of a mini-batch differ in size."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (330, 4, 4, 1), dtype=torch.uint8, generator=random)
    labels = (images.float().mean((1, 2, 3)) > 128).long()
    data = loader.Dataset("random", images[:300], labels[:300], images[300:], labels[300:], *torch.ones(2, 1) * 128, 2)
    results = []
    for world in (comm, single):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 2))
        batches = loader.BatchLoader(data, batch_size=50, seed=5, shard=(world.rank, world.size))
        optimizer = Parle(model.parameters(), world, lr=0.05, sync_every=5, batches_per_epoch=10, replicas=1)
        groups = dict(groups=optimizer.groups)
        evaluate = functools.partial(
            evaluation.evaluate, optimizer, copy.deepcopy(model), data, batch_size=50, replicas=[0], **groups
        )
        replicas = [training.LocalReplica(0, model, batches)]
        schedule = training.Schedule(epochs=1)
        events = list(training.train(replicas, optimizer, schedule, evaluate=evaluate, **groups))
        train, test = events[-3], events[-2]
        results.append((optimizer.master, train["train_loss"], test["master_loss"], test["master_error"]))
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(torch.as_tensor(ours), torch.as_tensor(expected), rtol=1e-5, atol=1e-6), (ours, expected)


def check_clipping_equals_one_process(comm, single):
    """With average_gradients(), clip_grad_norm_ sees the gradient of the whole mini-batch."""
    random = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(12 * comm.size, 6, generator=random), torch.arange(12 * comm.size) % 3
    trained = []
    for world in (comm, single):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer = Parle(model.parameters(), world, replicas=1, **SETTINGS)
        own = slice(world.rank, None, world.size)
        for step in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[own].double()), targets[own]).backward()
            if step == 3:
                optimizer.average_gradients()  # as if a GradScaler skipped the step
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[own].double()), targets[own]).backward()
            if step != 4:  # step() then averages by itself
                optimizer.average_gradients()
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                assert norm > 0.05
            optimizer.step()
        trained.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*trained, rtol=1e-6, atol=0)


def check_inner_optimizer(comm, single):
    """With AdamW inside, the ranks of a replica equal one process on the whole mini-batch, and all masters agree."""
    random = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(12 * comm.size, 6, generator=random), torch.arange(12 * comm.size) % 3
    settings = dict(inner=functools.partial(torch.optim.AdamW, lr=0.01), sync_every=3, batches_per_epoch=10)
    trained = []
    for world, replicas in ((comm, 1), (single, 1), (comm, 2)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer = Parle(model.parameters(), world, replicas=replicas, **settings)
        own = slice(world.rank, None, world.size)
        for step in range(7):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[own].double()), targets[own]).backward()
            if step == 3:
                optimizer.average_gradients()
            optimizer.step()
        trained.append(optimizer.master)
    torch.testing.assert_close(*trained[:2], rtol=1e-6, atol=0)
    assert identical(comm, trained[2]) and not torch.allclose(trained[2], trained[0])
    inner = functools.partial(torch.optim.AdamW, lr=0.01, betas=(0.9, 0.9 + 0.01 * comm.rank))
    different = functools.partial(Parle, model.parameters(), comm, inner=inner, batches_per_epoch=10)
    assert "betas[1]" in error_message(ValueError, different)


def check_ranks_start_identical(comm):
    """Ranks start from rank 0's parameters and buffers; all hold the same master."""
    torch.manual_seed(comm.rank)
    parameters = [nn.Parameter(torch.randn(1000)), nn.Parameter(torch.randn(3), requires_grad=False)]
    buffers = [
        torch.randn(4, 3).t(),
        torch.tensor(comm.rank),
        torch.randn(5).bfloat16() > 0,
        torch.randn(()).bfloat16(),
    ]
    optimizer = Parle(parameters, comm, lr=0.1, sync_every=3, batches_per_epoch=10, replicas=comm.size // 2 or 1)
    assert all(identical(comm, parameter) for parameter in parameters)
    replica_comm = comm.Split(comm.rank // (comm.size // optimizer.num_replicas))
    for _ in range(7):
        parameters[0].grad = torch.randn(1000)
        optimizer.step()
        assert identical(comm, optimizer.master)
        assert identical(replica_comm, parameters[0])
    weights = comm.allgather(parameters[0].detach().numpy().tobytes())
    assert len(set(weights)) == optimizer.num_replicas
    Parle([nn.Parameter(torch.zeros(2))], comm, buffers=buffers, **SETTINGS)
    assert all(identical(comm, buffer.float()) for buffer in buffers)


def check_piggyback(comm):
    optimizer = Parle([nn.Parameter(torch.randn(5))], comm, **SETTINGS)
    optimizer.piggyback[0][1] = comm.rank
    optimizer.step()
    assert optimizer.piggyback[0].tolist() == [0, comm.rank, 0, 0, 0]
    optimizer.step()
    assert optimizer.piggyback[0].tolist() == [0, (comm.size - 1) / 2, 0, 0, 0]


def check_mismatched_construction(comm):
    last = comm.rank == comm.size - 1
    frozen = nn.Parameter(torch.zeros(3 + last), requires_grad=False)
    for parameters, settings, words in (
        ([nn.Parameter(torch.zeros(5))], dict(lr=0.1 + last), ["lr of group 0", "0.1", "1.1"]),
        ([nn.Parameter(torch.zeros(5))], dict(master_average=0.5 * last), ["master_average of group 0", "0.5"]),
        ([nn.Parameter(torch.zeros(5 + last))], {}, ["parameters", "5", "6"]),
        ([nn.Parameter(torch.zeros(4, 3) if not last else torch.zeros(3, 4).t())], {}, ["strides"]),
        ([nn.Parameter(torch.zeros(5).to(torch.float64 if last else torch.float32))], {}, ["float32", "float64"]),
        ([nn.Parameter(torch.zeros(5)), frozen], {}, ["frozen_parameters", "3", "4"]),
        ([nn.Parameter(torch.zeros(5))], dict(buffers=[torch.zeros(2 + last)]), ["buffers", "2", "3"]),
        ([nn.Parameter(torch.zeros(5))], dict(rho=-1.0 if last else 0.01), ["Invalid rho value: -1"]),
        ([nn.Parameter(torch.zeros(5))], dict(replicas=3 if last else 1), ["Invalid replicas value: 3"]),
        ([nn.Parameter(torch.zeros(5))], dict(replicas=comm.size if last else 1), ["replicas is 1", "rank 3"]),
        ([dict(params=[nn.Parameter(torch.zeros(5))]) for _ in range(1 + last)], {}, ["groups is 1", "2 on rank 3"]),
        ([nn.Parameter(torch.zeros(5).to("meta" if last else "cpu"))], {}, ["meta"]),
    ):
        message = error_message(ValueError, lambda: Parle(parameters, comm, **SETTINGS | settings))  # noqa: B023
        assert all(word in message for word in words), message


def check_mismatch_between_ranks(comm):
    """A setting that differs raises on every rank at the next sync; the message has group, setting and values."""
    wanted = dict(lr=[0.1, 0.2, 0.15], rho=[0.01, 0.02], outer_lr_scale=[1.0, 2.0], momentum=[0.9, 0.8])
    wanted |= dict(weight_decay=[0.0, 0.1], alpha=[0.75, 0.5], gamma=[0.01, 0.1], rounds_done=[1, 7])
    for index, (name, values) in enumerate(wanted.items()):
        group, start = index % 2, index % 3 != 0
        optimizer = Parle([dict(params=[nn.Parameter(torch.zeros(5))]) for _ in range(2)], comm, **SETTINGS)
        take_steps(optimizer, 2 if start else 0, comm)
        if name == "rounds_done":
            for each in optimizer.param_groups:
                each[name] = values[comm.rank % len(values)]
        else:
            optimizer.param_groups[group][name] = values[comm.rank % len(values)]
        message = error_message(RuntimeError, lambda: take_steps(optimizer, 2, comm))  # noqa: B023
        group = 0 if name == "rounds_done" else group
        assert f"{name} of group {group} is {values[0]} on rank 0 and {values[1]} on rank 1" in message, message


def check_state_loaded_on_one_rank(comm):
    """The counters of one rank single_rank change: an error on every rank, before and after the first step."""
    for steps in (0, 2):
        optimizer, other = (Parle([nn.Parameter(torch.zeros(5))], comm, **SETTINGS) for _ in range(2))
        take_steps(other, 4, comm)
        take_steps(optimizer, steps, comm)
        if comm.rank == 1:
            optimizer.load_state_dict(other.state_dict())
        assert "rounds_done" in error_message(RuntimeError, lambda: take_steps(optimizer, 2, comm))  # noqa: B023


def check_state_of_another_replica_is_rejected(comm):
    """All ranks load what rank 0 saved: then the master would not be the mean of the anchors."""
    optimizer = Parle([nn.Parameter(torch.zeros(5))], comm, **SETTINGS)
    take_steps(optimizer, 3, comm)
    state = comm.bcast(optimizer.state_dict())
    if comm.rank == 0:
        optimizer.load_state_dict(state)
    else:
        assert "reset()" in error_message(ValueError, lambda: optimizer.load_state_dict(state))


def check_states_of_different_runs(comm):
    """Then the ranks hold different masters, which every rank notices at the next sync."""
    parameters = [nn.Parameter(torch.full((5,), start)) for start in (0.0, 1.0)]
    optimizer, other = (Parle([parameter], comm, **SETTINGS) for parameter in parameters)
    for each in (optimizer, other):
        take_steps(each, 2, comm)
    if comm.rank == 1:
        optimizer.load_state_dict(other.state_dict())
        parameters[0].data.copy_(parameters[1])
    assert "master differs" in error_message(RuntimeError, lambda: take_steps(optimizer, 2, comm))


def check_drift_within_a_replica(comm):
    """Ranks that share a replica must hold the same weights."""

    def change_weights(parameter, optimizer):
        if comm.rank == 1:
            parameter.data[0] += 0.1

    def average_too_early(parameter, optimizer):
        optimizer.average_gradients()
        parameter.grad += comm.rank

    for change in (change_weights, average_too_early):
        for replicas in (comm.size // 2, 1):
            parameter = nn.Parameter(torch.ones(5))
            optimizer = Parle([parameter], comm, replicas=replicas, **SETTINGS)
            take_steps(optimizer, 3, comm)
            parameter.grad = torch.ones(5)
            change(parameter, optimizer)
            message = error_message(RuntimeError, optimizer.step)
            assert "replica 0" in message and "reset()" in message, message
            optimizer.reset()
            take_steps(optimizer, 4, comm)


def check_recovery_from_an_error(comm):
    """After an error in a sync, the next step tries again."""
    optimizer = Parle([nn.Parameter(torch.zeros(5))], comm, **SETTINGS)
    take_steps(optimizer, 3, comm)
    optimizer.param_groups[0]["lr"] = 0.1 + comm.rank
    error_message(RuntimeError, lambda: take_steps(optimizer, 1, comm))
    optimizer.param_groups[0]["lr"] = 0.1
    take_steps(optimizer, 1, comm)
    assert (optimizer.rounds_done, optimizer.step_in_round) == (2, 0)


def check_weights_loaded_after_building(comm):
    """Before the first step rank 0's weights are copied to all ranks, with a warning; later every rank raises."""
    for sync_every in (1, 2, "auto"):
        parameter, frozen = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2), requires_grad=False)
        optimizer = Parle([parameter, frozen], comm, **SETTINGS | dict(sync_every=sync_every))
        with torch.no_grad():
            parameter.fill_(3.0 + comm.rank)
            frozen.fill_(comm.rank)
        parameter.grad = torch.zeros(5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert "reset()" in str(caught[0].message)
        optimizer.sync()
        assert parameter.tolist() == optimizer.master.tolist() == [3.0] * 5 and frozen.tolist() == [0, 0]
    optimizer = Parle([parameter], comm, **SETTINGS)
    take_steps(optimizer, 2, comm)
    if comm.rank == 1:
        parameter.data.clamp_(-0.01, 0.01)
    assert "reset()" in error_message(RuntimeError, lambda: take_steps(optimizer, 2, comm))
    for source in (0, comm.size - 1):
        with torch.no_grad():
            parameter.fill_(comm.rank)
        optimizer.reset(source)
        assert parameter.tolist() == optimizer.master.tolist() == [source] * 5
        take_steps(optimizer, 4, comm)
    assert "from_replica" in error_message(ValueError, lambda: optimizer.reset(comm.size))


def check_nonfinite(comm, sync_every, message_dtype=None):
    """Every rank lists the replica with NaN, which restarts from the mean of the others without momentum."""
    failed = comm.size - 1
    parameter = nn.Parameter(torch.full((5,), 10.0))
    settings = dict(sync_every=sync_every, master_average=0.5, message_dtype=message_dtype)
    optimizer = Parle([parameter], comm, lr=0.1, batches_per_epoch=10, **settings)
    for number in range(3):
        if number == 1 and comm.rank == failed:
            with torch.no_grad():
                parameter.fill_(torch.nan)
        for _ in range(sync_every):
            parameter.grad = torch.full((5,), comm.rank + 1.0)
            optimizer.step()
        assert optimizer.nonfinite_replicas == ([failed] if number == 1 else [])
        assert optimizer.master.isfinite().all() and parameter.isfinite().all()
        average = optimizer.state[parameter]["master_average"]
        assert identical(comm, optimizer.master) and identical(comm, average) and average.isfinite().all()
        anchors = torch.tensor(comm.allgather(parameter.tolist()))
        torch.testing.assert_close(
            optimizer.master, anchors.mean(0), atol=1e-5 if message_dtype is None else 1e-3, rtol=0
        )
        if number == 1 and comm.rank == failed:
            assert torch.equal(parameter, optimizer.master)
            assert not optimizer.state[parameter]["inner_momentum_buffer"].any()
            if message_dtype is not None:
                assert not optimizer.state[parameter]["message_error"].any()
    return optimizer.master


def check_nonfinite_rank_of_a_replica(comm):
    """All ranks of a replica restart together, also if only one of them is not finite."""
    for sync_every in (1, 2):
        parameter = nn.Parameter(torch.ones(5))
        optimizer = Parle([parameter], comm, lr=0.1, sync_every=sync_every, batches_per_epoch=10, replicas=2)
        for _ in range(sync_every):
            parameter.grad = torch.ones(5)
            optimizer.piggyback[0][0] = torch.inf if comm.rank == 1 else 1.0
            optimizer.step()
        assert optimizer.nonfinite_replicas == [0]
        assert identical(comm, optimizer.master) and optimizer.piggyback[0][0] == 1
        replicas = torch.tensor(comm.allgather(parameter.tolist()))
        assert replicas.isfinite().all() and torch.equal(replicas[0], replicas[1])
        assert torch.equal(replicas[0], optimizer.master)
        torch.testing.assert_close(optimizer.master, replicas.mean(0))
        optimizer = Parle([parameter], comm, lr=0.1, sync_every=sync_every, batches_per_epoch=10, replicas=1)
        optimizer.piggyback[0][0] = torch.inf if comm.rank == 1 else 1.0
        assert "All replicas" in error_message(FloatingPointError, lambda: take_steps(optimizer, 2, comm))  # noqa: B023
        assert identical(comm, optimizer.master) and identical(comm, parameter)


def check_half_precision(comm):
    """Masters follow those of float32 messages for 500 rounds; NaN and ranks that share a replica do no harm."""
    curvature = torch.linspace(0.2, 2.0, 21)
    minimum = torch.linspace(-3, 3, 21) + comm.rank
    masters = {}
    for message_dtype in (None, torch.float16, torch.bfloat16):
        for replicas in (comm.size, comm.size // 2):
            parameter, random = nn.Parameter(torch.zeros(21)), torch.Generator().manual_seed(comm.rank)
            optimizer = Parle(
                [parameter],
                comm,
                replicas=replicas,
                message_dtype=message_dtype,
                lr=0.05,
                sync_every=2,
                batches_per_epoch=50,
            )
            for _ in range(1000):
                noise = torch.randn(21, generator=random)
                parameter.grad = curvature * (parameter.detach() - minimum) + noise
                optimizer.step()
            assert identical(comm, optimizer.master)
            anchors = torch.tensor(comm.allgather(parameter.tolist()))
            torch.testing.assert_close(optimizer.master, anchors.mean(0), rtol=0, atol=0.01)
            masters.setdefault(message_dtype, []).append(optimizer.master)
    for message_dtype, tolerance in ((torch.float16, 5e-4), (torch.bfloat16, 4e-3)):
        torch.testing.assert_close(masters[message_dtype], masters[None], rtol=0, atol=tolerance)
        assert not torch.equal(masters[message_dtype][0], masters[None][0])


def check_communicators(comm, single):
    """Optimizers use duplicates of the caller's communicator, which are freed with them, and none for a single rank."""
    single_rank = Parle([nn.Parameter(torch.ones(2))], single, **SETTINGS)
    assert type(single_rank.groups.world) is type(single_rank.groups.replica) is Group
    for replicas in (comm.size, comm.size // 2, 1):
        optimizer = Parle([nn.Parameter(torch.ones(2))], comm, replicas=replicas, **SETTINGS)
        request = comm.Irecv(bytearray(1))  # of any tag: must not receive the optimizer's messages
        take_steps(optimizer, 2, comm)
        assert not request.Test()
        request.Cancel()
        request.Wait()
        groups = optimizer.groups
        assert (type(groups.replica) is Group) == (replicas == comm.size)
        del optimizer
        gc.collect()
        Parle([nn.Parameter(torch.ones(2))], comm, **SETTINGS)  # frees what was released
        assert not groups.world.comm and not getattr(groups.replica, "comm", None)  # MPI.COMM_NULL
    for _ in range(150):  # until the garbage collector runs, perhaps in the middle of an MPI call
        error_message(ValueError, lambda: Parle([nn.Parameter(torch.ones(2))], comm, **SETTINGS | dict(lr=-1.0)))


def check_timeout(comm):
    """A rank that skips a step is named by the others; must be the last check, since it aborts all ranks."""
    optimizer = Parle([nn.Parameter(torch.ones(2))], comm, timeout=1.5, **SETTINGS)
    take_steps(optimizer, 4, comm)
    take_steps(optimizer, 1 if comm.rank == 2 else 2, comm)
    time.sleep(60)


def main():
    comm, single = ranks.start()
    check_data_parallel(comm, single)
    check_clipping_equals_one_process(comm, single)
    check_inner_optimizer(comm, single)
    for sync_every in (1, 2):
        masters = [check_nonfinite(comm, sync_every, message_dtype) for message_dtype in (None, torch.float16)]
        torch.testing.assert_close(*masters, rtol=0, atol=2e-3)
    check_nonfinite_rank_of_a_replica(comm)
    check_ranks_start_identical(comm)
    check_piggyback(comm)
    check_half_precision(comm)
    check_mismatched_construction(comm)
    check_mismatch_between_ranks(comm)
    check_state_loaded_on_one_rank(comm)
    check_state_of_another_replica_is_rejected(comm)
    check_states_of_different_runs(comm)
    check_drift_within_a_replica(comm)
    check_recovery_from_an_error(comm)
    check_weights_loaded_after_building(comm)
    if not isinstance(comm, ranks.TorchRanks):
        check_communicators(comm, single)
    comm.allgather(None)
    if comm.rank == 0:
        print("all checks passed", flush=True)
    try:
        check_timeout(comm)
    except CollectiveTimeout as error:
        print(f"rank {comm.rank}: {error}", file=sys.stderr, flush=True)
        time.sleep(2)  # the others print theirs
        comm.Abort(3)


if __name__ == "__main__":
    rank_exit.run_or_abort(main)
