"""FlatReplica: the parameters and states of one replica as flat vectors, and the message that it sends."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

ALIGNMENT = 16  # bytes, which vectorized kernels need
# The end of each message: the caller's floats, the number of replicas whose weights other code has changed, and a row
# per sender (a rank, or a replica of this process): the checksum of its settings, negated if it is not finite, and the
# squared norms of its average and of its master, or 0 where there is nothing to compare
PIGGYBACK_SIZE = 5
PIGGYBACK, NUM_CHANGED, ROWS = slice(PIGGYBACK_SIZE), PIGGYBACK_SIZE, slice(PIGGYBACK_SIZE + 1, None)
CHECKSUM, AVERAGE_NORM, MASTER_NORM = range(3)
ROW_SIZE = 3


class GroupVectors(NamedTuple):
    """One parameter group's slices of its replica's vectors and of the master's, each (p,).

    With `inner` there is no inner momentum, and with L = 1 no outer momentum, anchor or inner average. `master` is None
    on a device that needs no copy of it, and `master_momentum` is None except for the replica whose device holds the
    master.
    """

    group: int  # index into param_groups
    weights: Tensor
    gradient: Tensor
    inner_momentum: Tensor | None
    outer_momentum: Tensor | None
    anchor: Tensor | None
    inner_avg: Tensor | None
    replica_mean: Tensor  # z after a synchronization; a device's replicas share it
    master: Tensor | None
    master_momentum: Tensor | None


class FlatReplica:
    """The flat vectors of one replica, each (P,), on its device. Its parameters become views into `weights`.

    P counts the trainable parameters and the zeros that fill up each one to a multiple of 16 bytes. Views keep the
    strides of their parameter, channels_last included.

    Args:
        num_senders: number of rows at the end of the message.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        buffers: Iterable[Tensor] = (),
        *,
        has_inner_loop: bool,
        has_inner_momentum: bool = True,
        has_message_error: bool = False,
        num_senders: int = 1,
    ):
        self.parameters = trainable(parameters)
        self.frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        self.buffers = list(buffers)
        self.strides = [dense_strides(parameter) for parameter in self.parameters]
        like = self.parameters[0]
        self.weights = like.new_zeros(sum(padded_size([parameter]) for parameter in self.parameters))
        # changed_flag is 1 if other code changed the weights before the round started
        self.flags = like.new_zeros(PIGGYBACK_SIZE + 1)
        self.piggyback, self.changed_flag = self.flags[PIGGYBACK], self.flags[NUM_CHANGED]
        self.zero = like.new_zeros(())
        # The memory of the gradient carries the message: a synchronization needs no gradient
        self.message = like.new_zeros(len(self.weights) + PIGGYBACK_SIZE + 1 + ROW_SIZE * num_senders)
        self.gradient, self.tail = self.message[: len(self.weights)], self.message[len(self.weights) :]
        self.rows = self.tail[ROWS].view(num_senders, ROW_SIZE)
        self.gradient_views = self.views(self.gradient)
        for parameter, view in zip(self.parameters, self.views(self.weights), strict=True):
            view.copy_(parameter)
            parameter.data = view  # the only way that keeps the Parameter object
        self.addresses = [parameter.data_ptr() for parameter in self.parameters]
        self.has_gradient = True  # of any parameter, since the round started

        # keyed by the names that state_dict uses for each parameter
        self.state = {"inner_momentum_buffer": torch.zeros_like(self.weights)} if has_inner_momentum else {}
        if has_inner_loop:
            self.state["outer_momentum_buffer"] = torch.zeros_like(self.weights)
            self.state["anchor"] = torch.empty_like(self.weights)
            self.state["inner_avg"] = torch.empty_like(self.weights)
        if has_message_error:
            self.state["message_error"] = torch.zeros_like(self.weights)
        self.groups: list[GroupVectors] = []

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def own_state(self) -> dict[str, Tensor]:
        """The state without the master's."""
        return {name: vector for name, vector in self.state.items() if not name.startswith("master")}

    @property
    def replicated_tensors(self) -> list[Tensor]:
        """Tensors that must start identical in all replicas: weights, frozen parameters and buffers."""
        return [self.weights, *self.frozen, *self.buffers]

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return `vector` as tensors with the shapes and strides of the parameters.

        Each has a separate storage over the same memory. Otherwise safetensors and pickle treat them as shared
        tensors and save duplicates, the whole vector, or nothing.
        """
        views, start = [], vector.storage_offset()
        for parameter, strides in zip(self.parameters, self.strides, strict=True):
            views.append(torch.from_dlpack(vector.as_strided(parameter.shape, strides, start)))
            start += padded_size([parameter])
        return views

    def check_unchanged(self) -> None:
        """Check that the parameters are still those that Parle was built from. Raises: RuntimeError."""
        if [parameter.data_ptr() for parameter in self.parameters] != self.addresses:
            raise RuntimeError(
                "A parameter's memory was replaced after Parle was built, as by model.to(...): build Parle after that"
            )
        if any(parameter.grad is not None for parameter in self.frozen):
            raise RuntimeError("A parameter that was frozen when Parle was built now has a gradient: build a new Parle")
        if not all(parameter.requires_grad for parameter in self.parameters):
            raise RuntimeError(
                "A parameter was frozen after Parle was built, but weight decay and momentum would still change it: "
                "build a new Parle"
            )

    def flatten_gradients(self) -> None:
        """Copy the parameters' gradients into `gradient`. None becomes zero: messages look the same on every rank."""
        pairs = [
            (view, parameter.grad)
            for view, parameter in zip(self.gradient_views, self.parameters, strict=True)
            if parameter.grad is not None
        ]
        if len(pairs) < len(self.parameters):
            self.gradient.zero_()
        if not pairs:
            return
        self.has_gradient = True
        try:
            torch._foreach_copy_(*zip(*pairs, strict=True))  # one call takes half the time of one call per tensor
        except RuntimeError as error:
            if any(gradient.layout != torch.strided for _, gradient in pairs):
                raise RuntimeError(
                    "Parle needs dense gradients, not sparse ones: use nn.Embedding(..., sparse=False)"
                ) from error
            raise

    def detect_gradient(self) -> None:
        self.has_gradient |= any(parameter.grad is not None for parameter in self.parameters)

    def write_back_gradient(self) -> None:
        for parameter, view in zip(self.parameters, self.gradient_views, strict=True):
            if parameter.grad is None:
                parameter.grad = view.clone()
            else:
                parameter.grad.copy_(view)

    def detect_external_change(self) -> None:
        """Set `changed_flag` if the weights differ from the anchor at the start of a round.

        The memory of the gradient is free then.
        """
        difference = torch.sub(self.weights, self.state["anchor"], out=self.gradient)
        self.changed_flag.copy_(difference.dot(difference) != 0)  # the fastest reduction; below 1e-22 it is 0

    def write_message(self, average: Tensor, sender: int, checksum: int) -> None:
        """Write `average`, (P,), the flags and the sender's checksum, or zeros if the former are not finite."""
        # A finite sum proves that every element is finite, with a single read of the vector. For a scalar,
        # x - x == 0 is faster than isfinite()
        total = average.sum() + self.piggyback.sum()
        is_finite = total - total == 0
        if not average.is_cpu:
            torch.where(is_finite, average, self.zero, out=self.gradient)
        elif is_finite:  # nothing to wait for, and torch.where takes six times as long as a copy there
            self.gradient.copy_(average)
        else:
            self.gradient.zero_()
        torch.where(is_finite, self.flags, self.zero, out=self.tail[: len(self.flags)])
        self.rows.zero_()
        self.rows[sender, CHECKSUM] = torch.where(is_finite, checksum, -checksum)


def trainable(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def padded_size(parameters: list[nn.Parameter]) -> int:
    """Return the number of elements that parameters take in a flat vector, including the padding of each."""
    return sum(
        -(-parameter.numel() * parameter.element_size() // ALIGNMENT) * ALIGNMENT // parameter.element_size()
        for parameter in parameters
    )


def dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """Return the parameter's strides, or dense ones if it has gaps or overlaps."""
    return torch.empty_like(parameter, device="meta").stride()
