"""What peers.py compares: every method as a model's output and an optimizer, its settings, and what it sends."""

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

import options
import ranks
from optimizer import Replica
from parle import GAMMA_CAP, PULL_CAP, nesterov, scope
from parle_mpi import Parle

if TYPE_CHECKING:
    from mpi4py import MPI

GRID = {"lr": [0.1, 0.05], "drops": [[0.5, 0.75], [0.7, 0.9]]}  # drops are shares of the run
NESTEROV = dict(momentum=0.9, nesterov=True)


# Each method is built from the model: what computes its output, and what has step(). `nb` is of one pass over the data.


def parle(model: nn.Module, comm: "MPI.Comm", nb: int, **settings: Any) -> tuple[nn.Module, Parle]:
    return model, Parle(model.parameters(), comm, batches_per_epoch=nb, **settings)


def ddp(model: nn.Module, comm: "MPI.Comm", nb: int, *, lr: float) -> tuple[nn.Module, torch.optim.SGD]:
    return data_parallel(model), torch.optim.SGD(model.parameters(), lr, fused=True, **NESTEROV)


def postlocal(
    model: nn.Module, comm: "MPI.Comm", nb: int, *, lr: float, sync_every: int, warmup: int
) -> tuple[nn.Module, PostLocalSGDOptimizer]:
    """As torch's documentation has it: for `warmup` steps gradients are averaged, then weights every `sync_every`."""
    model.to(memory_format=torch.contiguous_format)  # the averager makes weights so, but not their momenta
    warnings.filterwarnings("ignore", "Grad strides do not match")  # where a dimension of size 1 differs; in backward()
    network, sgd = ddp(model, comm, nb, lr=lr)
    alone = PostLocalSGDState(None, None, start_localSGD_iter=warmup, post_local_gradient_allreduce=False)
    network.register_comm_hook(alone, post_localSGD_hook)
    return network, PostLocalSGDOptimizer(sgd, PeriodicModelAverager(period=sync_every, warmup_steps=warmup))


def data_parallel(model: nn.Module) -> DistributedDataParallel:
    """Without its broadcast of batch-norm statistics: they are recomputed before every test."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # the flag's new name is of torch 2.15
        return DistributedDataParallel(model, broadcast_buffers=False)


class DiLoCo(torch.optim.SGD):
    """Douillard et al., 2023, with SGD inside: every L steps x ← x − outer_lr · Nesterov(mean over a of (x − y^a))."""

    def __init__(
        self, model: nn.Module, comm: "MPI.Comm", *, lr: float, sync_every: int, outer_lr: float, outer_momentum: float
    ):
        self.comm, self.sync_every, self.batches = comm, sync_every, 0
        self.outer = dict(lr=outer_lr, momentum=outer_momentum)
        self.weights = flatten(model).weights
        self.start, self.outer_buffer = self.weights.clone(), torch.zeros_like(self.weights)
        super().__init__(model.parameters(), lr, fused=True, **NESTEROV)

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        self.batches += 1
        if self.batches % self.sync_every == 0:
            nesterov(self.start, mean(self.comm, self.start - self.weights), self.outer_buffer, **self.outer)
            self.weights.copy_(self.start)


class Published(torch.optim.Optimizer):
    """The update of the authors' parle_mpi.py of 2018, on flat vectors and without its aliasing on a CPU.

    Kept: the scoping counter grows once per tensor, momentum is not Nesterov's, the outer step starts from y, z^a is
    never reset, and a round sends a second message. But the replicas start alike.
    """

    MOMENTUM, ALPHA = 0.9, 0.75  # not to be chosen there

    def __init__(
        self, model: nn.Module, comm: "MPI.Comm", nb: int, *, lr: float, sync_every: int, gamma: float, rho: float
    ):
        super().__init__(model.parameters(), dict(lr=lr))
        self.comm, self.nb, self.sync_every = comm, nb, sync_every
        self.gamma, self.pull = gamma, rho * sync_every * comm.size
        self.replica = flatten(model)
        self.replica.use(torch.zeros_like(self.replica.weights))
        self.y, self.batches = self.replica.weights, 0
        self.anchor, self.z = self.y.clone(), self.y.clone()
        self.u, self.v = torch.zeros_like(self.y), torch.zeros_like(self.y)

    @torch.no_grad()
    def step(self) -> None:
        self.replica.gather_gradient()
        gamma = scope(self.gamma, self._count(), self.nb, GAMMA_CAP)
        self._descend(self.replica.gradient + gamma * (self.y - self.anchor), self.u)
        self.z.lerp_(self.y, 1 - self.ALPHA)
        self.batches += 1
        if self.batches % self.sync_every == 0:
            pull = scope(self.pull, self._count(), self.nb, PULL_CAP)
            z = mean(self.comm, self.z.clone())
            self._descend((self.anchor - self.z) + pull * (self.anchor - z), self.v)
            self.anchor.copy_(self.y)
            mean(self.comm, self.anchor.clone())  # sent there, to be tested; here the test takes a mean itself

    def _count(self) -> int:
        return self.batches * len(self.replica.parameters) // self.sync_every

    def _descend(self, gradient: Tensor, buffer: Tensor) -> None:
        buffer.mul_(self.MOMENTUM).add_(gradient)
        self.y.sub_(gradient + buffer, alpha=self.param_groups[0]["lr"])


@torch.no_grad()
def flatten(model: nn.Module) -> Replica:
    """Its weights become views of one vector."""
    return Replica(list(model.parameters()), has_inner_loop=False)


def mean(comm: "MPI.Comm", vector: Tensor) -> Tensor:
    """Over the ranks, in place."""
    ranks.add(comm, vector)
    return vector.div_(comm.size)


def each_round(steps: int, settings: dict[str, Any]) -> int:
    return steps // settings["sync_every"]


class Method(NamedTuple):
    build: Callable[..., tuple[nn.Module, torch.optim.Optimizer]]
    settings: dict[str, Any]  # what is not chosen
    grid: dict[str, list[Any]] = GRID
    messages: Callable[[int, dict[str, Any]], int] = each_round  # vectors of P floats from each rank, in so many steps
    shares: bool = False  # the ranks share each mini-batch
    chosen_as: str | None = None  # the grid is that other method's, whose equations are the same


def methods(n: int) -> dict[str, Method]:
    """Each for n ranks. Those of our own class have the settings that the program's flags give."""

    def ours(*flags: str, **more: Any) -> Method:
        args = options.resolve(options.parser("", "").parse_args(flags), n)
        names = ["replicas", "momentum", "weight_decay", "sync_every", "gamma", "rho", "alpha"]
        names += ["outer_step", "outer_momentum"]
        return Method(parle, {name: getattr(args, name) for name in names} | dict(decay=args.lr_decay), **more)

    shared = dict(messages=lambda steps, settings: steps, shares=True)
    rule = dict(sync_every=25, decay=0.2)
    return {
        "parle": ours(grid=GRID | {"rho": [0.01, 0.1]}),
        "ddp": Method(ddp, dict(decay=0.2), **shared),
        "sgd": ours("--method", "sgd", **shared, chosen_as="ddp"),
        "entropy-sgd": ours("--method", "entropy-sgd", **shared),
        "elastic-sgd": ours("--method", "elastic-sgd", grid=GRID | {"rho": [1 / n, 0.1 / n]}),
        "postlocal-sgd": Method(
            postlocal,
            rule,
            GRID | {"warmup": [100, 500]},
            lambda steps, own: own["warmup"] + math.ceil((steps - own["warmup"]) / own["sync_every"]),
        ),
        "diloco": Method(
            lambda model, comm, nb, **settings: (model, DiLoCo(model, comm, **settings)),
            rule | dict(outer_lr=0.7),
            GRID | {"outer_momentum": [0.9, 0.5]},
        ),
        "published": Method(
            lambda model, comm, nb, **settings: (model, Published(model, comm, nb, **settings)),
            rule | dict(gamma=0.01, rho=0.01, decay=0.1),
            messages=lambda steps, settings: 2 * each_round(steps, settings),
        ),
    }


def first_settings(method: Method) -> dict[str, Any]:
    """Those with which its grid starts."""
    return method.settings | {knob: values[0] for knob, values in method.grid.items()}
