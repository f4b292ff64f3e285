"""The methods that baselines.py compares: each one's model and optimizer, its settings, its grid, and what it sends."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from parle import cli
from parle.algorithm import COUPLING_MAX, GAMMA_MAX, nesterov_step, scoped
from parle.distributed import Group, MPIGroup
from parle.flat_replica import FlatReplica
from parle_mpi import Parle

GRID = {"lr": [0.1, 0.05], "lr_drops": [[0.5, 0.75], [0.7, 0.9]]}  # lr_drops are fractions of the run
NESTEROV = dict(momentum=0.9, nesterov=True)


# Each function builds the network to call and the optimizer to step. `nb` is the number of batches in one pass.


def build_parle(model: nn.Module, world: MPIGroup, nb: int, **settings: Any) -> tuple[nn.Module, Parle]:
    return model, Parle(model.parameters(), world.comm, batches_per_epoch=nb, **settings)


def build_ddp(model: nn.Module, world: MPIGroup, nb: int, *, lr: float) -> tuple[nn.Module, torch.optim.SGD]:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.15 renames broadcast_buffers
        # batch-norm statistics are recalibrated before every test, so they need not be sent
        network = DistributedDataParallel(model, broadcast_buffers=False)
    return network, torch.optim.SGD(model.parameters(), lr, fused=True, **NESTEROV)


def build_postlocal_sgd(
    model: nn.Module, world: MPIGroup, nb: int, *, lr: float, sync_every: int, warmup_steps: int
) -> tuple[nn.Module, PostLocalSGDOptimizer]:
    """Follow torch's documentation: average gradients for `warmup_steps`, then weights every `sync_every` steps."""
    model.to(memory_format=torch.contiguous_format)  # the averager makes weights contiguous, but not their momenta
    warnings.filterwarnings("ignore", "Grad strides do not match")  # from backward(), for dimensions of size 1
    network, sgd = build_ddp(model, world, nb, lr=lr)
    state = PostLocalSGDState(None, None, start_localSGD_iter=warmup_steps, post_local_gradient_allreduce=False)
    network.register_comm_hook(state, post_localSGD_hook)
    return network, PostLocalSGDOptimizer(sgd, PeriodicModelAverager(period=sync_every, warmup_steps=warmup_steps))


def build_diloco(model: nn.Module, world: MPIGroup, nb: int, **settings: Any) -> tuple[nn.Module, "DiLoCo"]:
    return model, DiLoCo(model, world, **settings)


def build_published(model: nn.Module, world: MPIGroup, nb: int, **settings: Any) -> tuple[nn.Module, "PublishedParle"]:
    return model, PublishedParle(model, world, nb, **settings)


class DiLoCo(torch.optim.SGD):
    """DiLoCo (Douillard et al., 2023) with SGD as the inner optimizer.

    Every L steps: x ← x − outer_lr · Nesterov(mean over a of (x − y^a)).
    An outer lr of 1 without momentum makes this local SGD.
    """

    def __init__(
        self, model: nn.Module, world: MPIGroup, *, lr: float, sync_every: int, outer_lr: float, outer_momentum: float
    ):
        self.world, self.sync_every, self.steps_done = world, sync_every, 0
        self.outer = dict(lr=outer_lr, momentum=outer_momentum)
        self.weights = flatten(model).weights
        self.anchor, self.outer_buffer = self.weights.clone(), torch.zeros_like(self.weights)
        super().__init__(model.parameters(), lr, fused=True, **NESTEROV)

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        self.steps_done += 1
        if self.steps_done % self.sync_every == 0:
            gradient = average(self.world, self.anchor - self.weights)
            nesterov_step(self.anchor, gradient, self.outer_buffer, **self.outer)
            self.weights.copy_(self.anchor)


class PublishedParle(torch.optim.Optimizer):
    """The update of the authors' parle_mpi.py of 2018, on flat vectors and without its aliasing on a CPU.

    Reproduced: the scoping counter grows once per tensor, momentum is not Nesterov's, the outer step starts from y, z^a
    is never reset, and a round sends a second message. Not reproduced: replicas with different initial weights.
    """

    MOMENTUM, ALPHA = 0.9, 0.75  # constants of the script

    def __init__(
        self, model: nn.Module, world: MPIGroup, nb: int, *, lr: float, sync_every: int, gamma: float, rho: float
    ):
        super().__init__(model.parameters(), dict(lr=lr))
        self.world, self.nb, self.sync_every = world, nb, sync_every
        self.gamma, self.coupling = gamma, rho * sync_every * world.size
        self.replica = flatten(model)
        self.y, self.steps_done = self.replica.weights, 0
        self.anchor, self.z = self.y.clone(), self.y.clone()
        self.u, self.v = torch.zeros_like(self.y), torch.zeros_like(self.y)

    @torch.no_grad()
    def step(self) -> None:
        self.replica.flatten_gradients()
        gamma_k = scoped(self.gamma, self._scoping_count(), self.nb, GAMMA_MAX)
        self._update(self.replica.gradient + gamma_k * (self.y - self.anchor), self.u)
        self.z.lerp_(self.y, 1 - self.ALPHA)
        self.steps_done += 1
        if self.steps_done % self.sync_every == 0:
            coupling_k = scoped(self.coupling, self._scoping_count(), self.nb, COUPLING_MAX)
            z = average(self.world, self.z.clone())
            self._update((self.anchor - self.z) + coupling_k * (self.anchor - z), self.v)
            self.anchor.copy_(self.y)
            average(self.world, self.anchor.clone())  # the script's second message; the result is not needed here

    def _scoping_count(self) -> int:
        return self.steps_done * len(self.replica.parameters) // self.sync_every

    def _update(self, gradient: Tensor, buffer: Tensor) -> None:
        buffer.mul_(self.MOMENTUM).add_(gradient)
        self.y.sub_(gradient + buffer, alpha=self.param_groups[0]["lr"])


@torch.no_grad()
def flatten(model: nn.Module) -> FlatReplica:
    """Make the model's weights views into one vector."""
    return FlatReplica(list(model.parameters()), has_inner_loop=False)


def average(world: Group, vector: Tensor) -> Tensor:
    """Average over the ranks, in place."""
    world.all_reduce(vector)
    return vector.div_(world.size)


def once_per_step(steps: int, settings: dict[str, Any]) -> int:
    return steps


def once_per_round(steps: int, settings: dict[str, Any]) -> int:
    return steps // settings["sync_every"]


def twice_per_round(steps: int, settings: dict[str, Any]) -> int:
    return 2 * once_per_round(steps, settings)


def postlocal_messages(steps: int, settings: dict[str, Any]) -> int:
    return settings["warmup_steps"] + math.ceil((steps - settings["warmup_steps"]) / settings["sync_every"])


class Method(NamedTuple):
    build: Callable[..., tuple[nn.Module, torch.optim.Optimizer]]
    fixed: dict[str, Any]  # settings that are not tuned
    grid: dict[str, list[Any]] = GRID
    num_messages: Callable[[int, dict[str, Any]], int] = once_per_round  # parameter-sized vectors each rank sends
    data_parallel: bool = False  # the ranks split each mini-batch
    tuned_as: str | None = None  # use the tuned values of this method, whose equations are the same


def methods(n: int) -> dict[str, Method]:
    """Return every method for n ranks. This project's own methods have the programs' default settings."""

    def ours(*flags: str, **changes: Any) -> Method:
        args = cli.apply_defaults(cli.build_parser("", "").parse_args(flags), n)
        names = ("replicas", "momentum", "weight_decay", "sync_every", "gamma", "rho", "alpha")
        names += ("outer_lr_scale", "outer_momentum", "lr_decay")
        return Method(build_parle, {name: getattr(args, name) for name in names}, **changes)

    data_parallel = dict(num_messages=once_per_step, data_parallel=True)
    local = dict(sync_every=25, lr_decay=0.2)
    return {
        "parle": ours(grid=GRID | {"rho": [0.01, 0.1]}),
        "ddp": Method(build_ddp, dict(lr_decay=0.2), **data_parallel),
        "sgd": ours("--method", "sgd", **data_parallel, tuned_as="ddp"),
        "entropy-sgd": ours("--method", "entropy-sgd", **data_parallel),
        "elastic-sgd": ours("--method", "elastic-sgd", grid=GRID | {"rho": [1 / n, 0.1 / n]}),
        "postlocal-sgd": Method(build_postlocal_sgd, local, GRID | {"warmup_steps": [100, 500]}, postlocal_messages),
        "diloco": Method(build_diloco, local | dict(outer_lr=0.7), GRID | {"outer_momentum": [0.9, 0.5]}),
        "published script": Method(
            build_published, local | dict(gamma=0.01, rho=0.01, lr_decay=0.1), num_messages=twice_per_round
        ),
    }


def first_settings(method: Method) -> dict[str, Any]:
    """Return the settings with the first value of every hyperparameter in the grid."""
    return method.fixed | {parameter: values[0] for parameter, values in method.grid.items()}
