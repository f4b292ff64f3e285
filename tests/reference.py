"""Parle in float64 numpy, with a loop over the replicas, written from the equations of the paper.

It imports nothing from the project. Both optimizers are compared with it, buffer by buffer, after every step.
"""

import numpy as np


class Reference:
    """n replicas that start at `x0`, (P,). Each call of `step` is one mini-batch of every replica.

    gamma0 and rho0 are the initial coefficients; nb is the number of mini-batches in one pass. L is a number or "auto".
    The other hyperparameters are numbers, or vectors (P,) where parameter groups differ; "auto" reads their first
    element. They may change at any time: L, gamma0 and rho0 count when a round starts, the others when they are used.
    """

    def __init__(
        self, x0, n, L, nb, lr, momentum, weight_decay, gamma0, rho0, alpha, s=1.0, outer_momentum=None, beta=0.0
    ):
        self.n, self.L, self.nb, self.lr, self.momentum, self.weight_decay = n, L, nb, lr, momentum, weight_decay
        self.gamma0, self.rho0, self.alpha, self.s = gamma0, rho0, alpha, s
        self.outer_momentum = momentum if outer_momentum is None else outer_momentum
        self.k = 0  # rounds done
        self.i = 0  # steps done in this round
        self.xa = np.tile(np.asarray(x0, dtype=np.float64), (n, 1))
        self.y, self.z = self.xa.copy(), self.xa.copy()
        self.u, self.v = np.zeros_like(self.xa), np.zeros_like(self.xa)
        self.x, self.master_momentum = self.xa.mean(0), self.v.mean(0)
        self.beta, self.masters = beta, []  # every x, oldest first

    def step(self, gradients):
        """Update every replica from `gradients`, (n, P), of the loss at y."""
        if self.i == 0:
            growth = (1 + 1 / (2 * self.nb)) ** self.k
            self.gamma = np.minimum(self.gamma0 * growth, 1.0)
            self.L_k = max(1, round(np.ravel(self.lr / self.gamma)[0])) if self.L == "auto" else self.L
            self.c = np.minimum(self.rho0 * self.L_k * self.n * growth, 10.0)
            self.y, self.z = self.xa.copy(), self.xa.copy()
        self.i += 1

        if self.L_k == 1:
            for a in range(self.n):
                d = gradients[a] + self.weight_decay * self.xa[a] + self.c * (self.xa[a] - self.x)
                nesterov(self.xa[a], self.u[a], d, self.lr, self.momentum)
            self.x = self.mean(self.xa)
            self.masters.append(self.x)
            self.y = self.xa.copy()
            self.k, self.i = self.k + 1, 0
            return
        for a in range(self.n):
            g = gradients[a] + self.weight_decay * self.y[a] + self.gamma * (self.y[a] - self.xa[a])
            nesterov(self.y[a], self.u[a], g, self.lr, self.momentum)
            self.z[a] = self.alpha * self.z[a] + (1 - self.alpha) * self.y[a]
        if self.i == self.L_k:
            self.sync()

    def sync(self):
        """End the round, after L steps or earlier. Does nothing if there was no step since the last sync."""
        if self.i == 0:
            return
        z = self.mean(self.z)
        for a in range(self.n):
            d = (self.xa[a] - self.z[a]) + self.c * (self.xa[a] - z)
            nesterov(self.xa[a], self.v[a], d, self.s * self.lr, self.outer_momentum)
        self.move_master(z)
        self.masters.append(self.x)
        self.y = self.xa.copy()
        self.k, self.i = self.k + 1, 0

    def mean(self, vectors):
        """Return the mean of `vectors`, (n, P), over the replicas."""
        return vectors.mean(0)

    def move_master(self, z):
        self.x, self.master_momentum = self.xa.mean(0), self.v.mean(0)

    @property
    def xbar(self):
        """The exponential average of all masters after a round, with weights that add up to one."""
        weights = self.beta ** np.arange(len(self.masters))[::-1]
        return np.average(self.masters, axis=0, weights=weights)


class HalfPrecisionReference(Reference):
    """Replicas send differences from the master in float16, with the rounding error of the previous message.

    Replica `adders[j]` adds up element j and keeps the rounding error of the sum.
    """

    def __init__(self, *arguments, adders, **settings):
        super().__init__(*arguments, **settings)
        self.adders, self.e = adders, np.zeros_like(self.xa)

    def mean(self, vectors):
        differences = vectors - self.x + self.e
        messages = differences.astype(np.float16)
        total = messages.astype(np.float32).sum(0)
        rounded = total.astype(np.float16)
        self.e = differences - messages
        self.e[self.adders, np.arange(len(total))] += total - rounded
        return self.x + rounded / np.float64(self.n)

    def move_master(self, z):
        """Move the master as if z were exactly the mean of the z^a."""
        self.x = self.x.copy()
        nesterov(self.x, self.master_momentum, (1 + self.c) * (self.x - z), self.s * self.lr, self.outer_momentum)


def nesterov(weights, buffer, d, lr, momentum):
    """Update `weights` and `buffer` in place. As in torch.optim.SGD, momentum 0 leaves the buffer unchanged."""
    buffer[:] = np.where(momentum, momentum * buffer + d, buffer)
    weights -= lr * (d + momentum * buffer)
