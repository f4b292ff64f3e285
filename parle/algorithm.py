"""The algorithm of Parle (Chaudhari et al., 2017), tensor by tensor. No communication, no I/O.

Every replica a of n holds its weights y (what the network computes with), an anchor x^a, an inner average z^a and
two momentum buffers, u (inner) and v (outer). The master x is the mean of the anchors. Round k is L mini-batches and
one synchronization; an epoch is nb rounds, nb being the number of mini-batches in one pass over the data.

    round start    y = x^a,   z^a = x^a
    L times        d = ∇f(y) + weight_decay·y + γ_k (y − x^a)
                   u ← μ u + d;    y ← y − lr (d + μ u)                 descend()
                   z^a ← α z^a + (1−α) y
    round end      z = mean over a of z^a                               the only communication
                   d = (x^a − z^a) + c_k (x^a − z)
                   v ← μ' v + d;   x^a ← x^a − s lr (d + μ' v)          move_anchor()
    scoping        γ_k = min(γ (1 + 1/(2 nb))^k, 1)                     scope()
                   c_k = min(ρ L n (1 + 1/(2 nb))^k, 10)

With L = 1 there is no inner loop: y is the anchor itself, and each step is descend() towards the master with c_k in
the place of γ_k, after which x = mean over a of y.

γ and ρ are coefficients, and 0 switches the coupling off. The paper and the original's README write their inverses,
100 (1 − 1/(2 nb))^k, which fall where these grow. ρ stands for one update of one replica; a round stands for L
updates of n replicas, hence c_k's factor L n, as in the published code.
"""

from torch import Tensor
from torch.optim.sgd import sgd

GAMMA_CAP = 1.0  # of γ_k, as in the authors' code
PULL_CAP = 10.0  # of c_k, as in the authors' code

# What makes each special case of the algorithm. `replicas` None is the user's number; elastic-sgd starts at ρ n = 1.
PRESETS = {
    "parle": dict(replicas=None, sync_every=25, gamma=0.01, rho=0.01),
    "entropy-sgd": dict(replicas=1, sync_every=25, gamma=0.01, rho=0.0),
    "elastic-sgd": dict(replicas=None, sync_every=1, gamma=0.0, rho="1/n"),
    "sgd": dict(replicas=1, sync_every=1, gamma=0.0, rho=0.0),
}


def scope(coefficient: float, rounds: int, batches_per_epoch: int, cap: float) -> float:
    """A coefficient after so many rounds: it grows by e^0.5 = 1.65 an epoch, up to `cap`."""
    try:
        return min(coefficient * (1 + 0.5 / batches_per_epoch) ** rounds, cap)
    except OverflowError:  # after 1,419 epochs
        return cap if coefficient else 0.0


def round_length(sync_every: int | str, lr: float, gamma: float) -> int:
    """L of the round that starts with this lr and this scoped gamma; `auto` is the original's L = gamma × lr."""
    return max(1, round(lr / gamma)) if sync_every == "auto" else sync_every


def nesterov(
    weights: Tensor, gradient: Tensor, momentum_buffer: Tensor, *, lr: float, momentum: float, weight_decay: float = 0.0
) -> None:
    """u ← μ u + d;  y ← y − lr (d + μ u), in place: torch.optim.SGD's own kernel, a single pass over (P,) vectors.

    With momentum 0 it leaves the buffer alone.
    """
    settings = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, dampening=0.0, nesterov=True, maximize=False)
    sgd([weights], [gradient], [momentum_buffer], fused=True, **settings)


def descend(
    weights: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor,
    center: Tensor,
    *,
    pull: float,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """One inner step of `weights` down the loss's `gradient`, pulled towards `center`. All are (P,).

    Within a round, `center` is the anchor and `pull` is γ_k; with L = 1 they are the master and c_k. In place:
    `weights` and `momentum_buffer` are updated, `gradient` is used up.
    """
    if pull:
        gradient.sub_(center, alpha=pull)
    nesterov(weights, gradient, momentum_buffer, lr=lr, momentum=momentum, weight_decay=weight_decay + pull)


def move_anchor(
    anchor: Tensor,
    inner_avg: Tensor,
    mean_avg: Tensor,
    momentum_buffer: Tensor,
    *,
    pull: float,
    lr: float,
    momentum: float,
) -> None:
    """The outer step of an anchor x^a, by its own z^a and the mean z of all, each (P,); `lr` is s lr. In place.

    It is linear, so the mean of the anchors obeys it too, with the mean of the z^a as its own: given the master, z,
    z and the mean momentum, it moves the master without another message.
    """
    gradient = (anchor - inner_avg).add_(anchor - mean_avg, alpha=pull)
    nesterov(anchor, gradient, momentum_buffer, lr=lr, momentum=momentum)
