"""Parle over MPI: a rank trains a replica (or several ranks one, data-parallel), one allreduce a round couples them.

python parle_mpi.py -n 3                      # starts its own three ranks
mpirun -n 12 python parle_mpi.py              # 12 replicas
mpirun -n 12 python parle_mpi.py -n 3         # 3 replicas, each data-parallel over 4 ranks
"""

import argparse
import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import engine
import loader
import models
import options
import ranks
from optimizer import Replica, ReplicaOptimizer
from report import Report, surroundings

if TYPE_CHECKING:
    from mpi4py import MPI


class Parle(ReplicaOptimizer):
    """Parle with its replicas on MPI ranks: at every L-th `step()`, one allreduce of one flat vector.

        for inputs, targets in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        optimizer.copy_master_to(evaluation_model)

    The equations are in parle.py; this is how their letters are named here:

        y, x^a, z^a    the parameters themselves, state "anchor" and "inner_avg"
        u, v           state "inner_momentum_buffer" and "outer_momentum_buffer"
        x              `master`, (P,): the trainable parameters, flat; the same on every rank
        γ, ρ, L, s, μ' gamma, rho, sync_every, outer_step, outer_momentum

    Building it is collective: rank 0's parameters are sent to all. A parameter without a gradient counts as one with
    a zero gradient, so weight decay and momentum still move it; give frozen ones requires_grad=False before.

    Args:
        params: as for any torch optimizer; float32 (or all float64) and on one device.
        comm: the communicator of all ranks of all replicas.
        lr: step size of the inner and the outer update.
        momentum: Nesterov's, of the inner update.
        weight_decay: L2 penalty, in the inner update alone.
        sync_every: L, mini-batches per round, or "auto" for max(1, round(lr / γ_k)), with the first group's lr and γ.
        gamma: initial coefficient of the pull towards the anchor; it grows, up to 1.
        rho: initial coefficient of the pull towards the mean, per update of a replica; ρ L n grows, up to 10.
        alpha: what z^a keeps at each mini-batch; 0 makes z^a the last iterate.
        outer_step: step of the outer update in units of lr. Unused, with alpha and gamma, where L = 1.
        outer_momentum: Nesterov's, of the outer update; by default as `momentum`.
        batches_per_epoch: mini-batches in one pass over the data; sets how fast gamma and rho grow.
        replicas: by default one per rank. Fewer make groups of comm.size / replicas neighbouring ranks, data-parallel
            inside, whose gradients `step()` averages before its update.

    Raises:
        ValueError: an invalid value, or one that differs between ranks.
    """

    def __init__(
        self,
        params: Iterable[Any],
        comm: "MPI.Comm",
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
        replicas: int | None = None,
    ):
        replicas = comm.size if replicas is None else replicas
        if not (isinstance(replicas, int) and replicas >= 1 and comm.size % replicas == 0):
            raise ValueError(f"Invalid replicas value: {replicas}, for {comm.size} ranks")
        super().__init__(
            params,
            replicas,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            sync_every=sync_every,
            gamma=gamma,
            rho=rho,
            alpha=alpha,
            outer_step=outer_step,
            outer_momentum=outer_momentum,
            batches_per_epoch=batches_per_epoch,
        )
        settings = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        shapes = [tuple(parameter.shape) for parameter in self._home.parameters]
        ranks.check_same(comm, dict(replicas=replicas, parameters=shapes, groups=settings))
        self.comm = comm
        self.team = comm.Split(comm.rank // (comm.size // replicas))  # the ranks of this replica
        # MPI from wheels cannot read a GPU's memory: messages are staged in the host's, pinned for CUDA's copies
        message = self._home.message
        device = message.device.type
        self._staging = (
            None if device == "cpu" else torch.empty_like(message, device="cpu", pin_memory=device == "cuda")
        )
        with torch.no_grad():
            for tensor in [self._home.weights, *self._frozen]:
                host = tensor.cpu().contiguous()
                ranks.broadcast(comm, host)
                tensor.copy_(host)
            for name in {"anchor", "inner_avg", "master"} & self._home.state.keys():
                self._home.state[name].copy_(self._home.weights)

    def _mean_gradient(self, replica: Replica) -> None:
        self._mean(self.team, replica.gradient)

    def _mean_messages(self) -> None:
        # the ranks of one replica hold the same z^a, so the mean over all ranks is the mean over the replicas
        home = self._home
        self._mean(self.comm, home.message if self.num_replicas > 1 else home.riders)

    def _mean(self, comm: "MPI.Comm", vector: Tensor) -> None:
        if comm.size == 1:
            return
        if self._staging is not None:
            torch.accelerator.synchronize(vector.device)  # what is still computing is not time spent communicating
        start = time.perf_counter()
        if self._staging is None:
            ranks.add(comm, vector)
        else:
            host = self._staging[: len(vector)]
            host.copy_(vector)  # returns when it is there, so MPI reads what was computed
            ranks.add(comm, host)
            vector.copy_(host)
        vector.div_(comm.size)
        self.sync_seconds += time.perf_counter() - start


def main() -> None:
    parser = options.parser("parle_mpi.py", "Parle over MPI: replicas on ranks, coupled by one allreduce a round.")
    comm = None
    try:
        if ranks.launched() is None:
            args = options.resolve(parser.parse_args(), None)
            options.check(args, None)
            start(args.replicas)
        comm = world()
        run(ranks.together(comm, parser.parse_args, True, options.Mistake), comm)
    except (options.Mistake, ranks.Disagreement, loader.DataError) as mistake:
        options.tell(parser.prog, mistake)
        if comm is not None:
            ranks.gather(comm, None)  # every rank has the same to say, and none ends before the first has said it
            sys.modules["mpi4py.MPI"].Finalize()
        sys.exit(2)


def start(replicas: int) -> None:
    try:
        ranks.start(replicas)
    except OSError as error:
        raise options.Mistake(str(error)) from error


def world() -> "MPI.Comm":
    """All ranks. Raises: Mistake."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise options.Mistake(f"mpi4py finds no MPI library ({error}): pip install mpich") from error
    comm = MPI.COMM_WORLD
    _, size = ranks.launched() or (0, None)
    if size not in (None, comm.size):
        raise options.Mistake(
            f"the launcher started {size} ranks but {MPI.get_vendor()[0]}, the MPI of mpi4py, sees {comm.size}: "
            "use its own mpiexec, or install mpi4py for the launcher's MPI"
        )
    return comm


def run(given: argparse.Namespace, comm: "MPI.Comm") -> None:
    """Train as the arguments say."""
    own = {"data", "proc", "out", "device"}  # what may differ between machines
    ranks.check_same(comm, {name: value for name, value in vars(given).items() if name not in own})
    node = ranks.node(comm)
    torch.set_num_threads(ranks.threads(node))
    args = options.resolve(given, comm.size)

    def check() -> torch.device:
        options.check(args, comm.size)
        return options.device(args.device, node.rank)

    device = ranks.together(comm, check, True, options.Mistake)
    try:
        data = load(args, comm, node)
    except loader.Unreachable as error:
        if given.dataset or given.data:
            raise
        if comm.rank == 0:
            print(
                f"WARNING: training on digits, scikit-learn's 8 x 8 images, instead of {args.dataset}: {error}",
                flush=True,
            )
        given.dataset = "digits"
        args = options.resolve(given, comm.size)
        data = load(args, comm, node)
    data = data.to(device)

    ranks_per_replica = comm.size // args.replicas
    replica, part = divmod(comm.rank, ranks_per_replica)
    batches = loader.Batches(
        data,
        batch_size=args.batch_size,
        seed=args.seed,
        replica=replica,
        replicas=args.replicas,
        frac=args.frac,
        augment=args.augment,
        part=(part, ranks_per_replica),
    )
    torch.manual_seed(args.seed)
    model, evaluation_model = (
        models.build(args.model, data.channels, data.size, data.classes, args.dropout).to(device) for _ in range(2)
    )
    torch.manual_seed(loader.random_seed(args.seed, loader.Stream.DROPOUT, replica, part))
    optimizer = Parle(
        model.parameters(),
        comm,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        sync_every=args.sync_every,
        gamma=args.gamma,
        rho=args.rho,
        alpha=args.alpha,
        outer_step=args.outer_step,
        outer_momentum=args.outer_momentum,
        batches_per_epoch=batches.per_epoch,
        replicas=args.replicas,
    )
    team = engine.Team(part, ranks_per_replica, functools.partial(ranks.add, optimizer.team))
    everyone = engine.Team(comm.rank, comm.size, functools.partial(ranks.add, comm))

    report = open_report(args, comm)
    start_event = {
        "event": "start",
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "dataset": args.dataset,
        "origin": data.origin,
        "replicas": args.replicas,
        "sync_every": args.sync_every,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "images": len(data.train_labels),
        "batches_per_epoch": batches.per_epoch,
        "rounds": engine.count_rounds(args.epochs, batches.per_epoch),
        "ranks": comm.size,
        "threads": torch.get_num_threads(),
        "devices": ranks.gather(comm, str(device)),
        "mpi": ranks.library(),
        **surroundings(),
    }
    evaluate = functools.partial(
        engine.evaluate,
        optimizer,
        evaluation_model,
        data,
        batch_size=args.batch_size,
        replicas=[replica],
        team=team,
        world=everyone,
    )
    events = engine.train(
        [model],
        [batches],
        optimizer,
        evaluate,
        epochs=args.epochs,
        lr_drops=args.lr_drops,
        lr_decay=args.lr_decay,
        eval_every=args.eval_every,
        amp=args.amp == "bf16",
        team=team,
        world=everyone,
    )
    for event in itertools.chain([start_event], events):
        if report:
            if event["event"] == "eval":
                report.save_master(evaluation_model)
            report(event)


def load(args: argparse.Namespace, comm: "MPI.Comm", node: "MPI.Comm") -> loader.Dataset:
    """The data. One rank downloads and pre-processes, then one of each node unless proc/ is shared; then all map it."""

    def build() -> loader.Dataset:
        return loader.load(args.dataset, args.data, args.proc, args.whiten)

    for here in (comm.rank == 0, node.rank == 0):
        ranks.together(comm, build, here, loader.DataError)
    return ranks.together(comm, build, True, loader.DataError)


def open_report(args: argparse.Namespace, comm: "MPI.Comm") -> Report | None:
    """Rank 0's report, in --out or a new folder below runs/."""

    def open_folder() -> Report:
        label = f"{args.model} on {args.dataset}"
        if args.out is not None:
            return Report(args.out, label)
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{args.model}-{args.dataset}"
        for suffix in ("", *(f"-{i}" for i in range(2, 100))):  # runs may start in the same second
            with contextlib.suppress(FileExistsError):
                return Report(Path("runs") / f"{name}{suffix}", label)
        raise FileExistsError(f"runs/{name}")

    try:
        return ranks.together(comm, open_folder, comm.rank == 0, OSError)
    except OSError as error:
        raise options.Mistake(f"--out: {error}; name a new folder") from error


if __name__ == "__main__":
    ranks.run(main)
