"""The algorithm of Parle (Chaudhari et al., 2017) as functions of tensors, without communication or I/O.

Each of n replicas a holds its parameters y (what the network computes with), an anchor x^a, an inner average z^a and
two momentum buffers, u (inner) and v (outer). The master x is the mean of the anchors. Round k is L steps, one
mini-batch each, followed by one synchronization; an epoch is nb rounds, where nb is the number of mini-batches in one
pass over the data.

    round start    y = x^a,   z^a = x^a
    L times        d = ∇f(y) + weight_decay·y + γ_k (y − x^a)
                   u ← μ u + d;    y ← y − lr (d + μ u)                 inner_step()
                   z^a ← α z^a + (1−α) y
    round end      z = mean over a of z^a                               the only communication
                   d = (x^a − z^a) + c_k (x^a − z)
                   v ← μ' v + d;   x^a ← x^a − s lr (d + μ' v)          outer_step()
    scoping        γ_k = min(γ (1 + 1/(2 nb))^k, 1)                     scoped()
                   c_k = min(ρ L n (1 + 1/(2 nb))^k, 10)
    not in paper   x̄ ← x̄ + (1−β) / (1−β^m) (x − x̄)                     update_average()

Messages in half precision send z^a − x, with the rounding error of the previous message:

                   m^a = round(z^a − x + e^a);    e^a ← z^a − x + e^a − m^a
                   z = x + mean over a of m^a                          round_message()

x̄ is the average of the master over rounds, m the number of rounds in it; it affects no other quantity, and β = 0
switches it off.

Another inner optimizer replaces inner_step() by y ← y − lr γ_k (y − x^a), decoupled as AdamW's weight decay is, and
that optimizer's own step. Its lr is on a different scale, so the outer step takes s / (1 + c_k) in place of s lr: on
average it moves x toward z by the fraction s, independent of lr and c_k.

With L = 1 there is no inner loop: y is the anchor itself. Each step is inner_step() with the master in place of the
anchor and c_k in place of γ_k, followed by x = mean over a of y.

γ and ρ are coefficients; 0 switches the coupling off. The paper and the README of the authors' script state their
inverses, 100 (1 − 1/(2 nb))^k, which decrease where these grow. ρ refers to one update of one replica. A round
comprises L updates of n replicas, hence the factor L n in c_k, as in the published code.
"""

import torch
from torch import Tensor
from torch.optim.sgd import sgd

GAMMA_MAX = 1.0  # upper bound of γ_k, as in the authors' code
COUPLING_MAX = 10.0  # upper bound of c_k, as in the authors' code

# The settings that turn Parle into each special case. `replicas` None leaves n to the user; elastic-sgd starts at
# ρ n = 1.
PRESETS = {
    "parle": dict(replicas=None, sync_every=25, gamma=0.01, rho=0.01),
    "entropy-sgd": dict(replicas=1, sync_every=25, gamma=0.01, rho=0.0),
    "elastic-sgd": dict(replicas=None, sync_every=1, gamma=0.0, rho="1/n"),
    "sgd": dict(replicas=1, sync_every=1, gamma=0.0, rho=0.0),
}


def scoped(coefficient: float, rounds_done: int, batches_per_epoch: int, maximum: float) -> float:
    """Return a coefficient after `rounds_done` rounds: it grows by e^0.5 = 1.65 per epoch, up to `maximum`."""
    try:
        return min(coefficient * (1 + 0.5 / batches_per_epoch) ** rounds_done, maximum)
    except OverflowError:  # after 1,419 epochs
        return maximum if coefficient else 0.0


def steps_per_round(sync_every: int | str, lr: float, gamma: float) -> int:
    """Return L for a round that starts with this lr and gamma_k; "auto" is L = gamma × lr of the authors' README."""
    return max(1, round(lr / gamma)) if sync_every == "auto" else sync_every


def nesterov_step(
    weights: Tensor, gradient: Tensor, momentum_buffer: Tensor, *, lr: float, momentum: float, weight_decay: float = 0.0
) -> None:
    """Apply u ← μ u + d;  y ← y − lr (d + μ u) in place, with the fused kernel of torch.optim.SGD: one pass over (P,).

    With momentum 0 the buffer is left unchanged.
    """
    settings = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, dampening=0.0, nesterov=True, maximize=False)
    sgd([weights], [gradient], [momentum_buffer], fused=True, **settings)


def inner_step(
    weights: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor,
    anchor: Tensor,
    *,
    coupling: float,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Update `weights` in place by the loss's `gradient` and the coupling to `anchor`; all are (P,).

    Within a round `anchor` is x^a and `coupling` is γ_k; with L = 1 they are the master and c_k. `momentum_buffer` is
    updated, and the contents of `gradient` are overwritten.
    """
    if coupling:
        gradient.sub_(anchor, alpha=coupling)
    nesterov_step(weights, gradient, momentum_buffer, lr=lr, momentum=momentum, weight_decay=weight_decay + coupling)


def pull(weights: Tensor, anchor: Tensor, *, coupling: float, lr: float) -> None:
    """Move `weights` toward `anchor`, both (P,), by lr · coupling of their difference, in place, but not beyond it."""
    weights.lerp_(anchor, min(lr * coupling, 1.0))


def outer_step(
    anchor: Tensor,
    inner_avg: Tensor,
    replica_mean: Tensor,
    momentum_buffer: Tensor,
    *,
    coupling: float,
    lr: float,
    momentum: float,
) -> None:
    """Update an anchor x^a in place from its own z^a and the mean z over the replicas, each (P,); `lr` is s lr.

    The update is linear, so the mean of the anchors obeys it with z in place of z^a and the mean of the momentum
    buffers: called with the master, z and z, it moves the master without another message.
    """
    gradient = (anchor - inner_avg).add_(anchor - replica_mean, alpha=coupling)
    nesterov_step(anchor, gradient, momentum_buffer, lr=lr, momentum=momentum)


def round_message(message: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """Return m = `message` + `error` rounded to `dtype`, and set `error` to what rounding removed; all are (P,).

    Since the error is part of the next message, the sum of all messages is exact up to the last error: error feedback
    (Seide et al. 2014). `message` is overwritten.
    """
    message.add_(error)
    rounded = message.to(dtype)
    torch.sub(message, rounded, out=error)
    return rounded


def update_average(average: Tensor, value: Tensor, *, count: int, decay: float) -> None:
    """Update an exponential average in place with its `count`-th value, counted from 1.

    Equals avg ← decay·avg + (1−decay)·value from avg = 0, divided by 1 − decay^count, the bias correction of Adam: the
    average of equal values is that value from the first one on.
    """
    average.lerp_(value, (1 - decay) / (1 - decay**count))
