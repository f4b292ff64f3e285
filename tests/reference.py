"""Parle in float64 numpy, with a loop over the replicas, written from the equations of the paper.

It imports nothing from the project. Both optimizers are compared with it, buffer by buffer, after every step.
"""

import numpy as np


class Reference:
    """n replicas that start at `x0`, (P,). Each call of `step` is one mini-batch of every replica.

    gamma0 and rho0 are the initial coefficients; nb is the number of mini-batches in one pass. L is a number or "auto".
    lr and weight_decay are numbers, or vectors (P,) where parameter groups differ; "auto" reads the first element.
    """

    def __init__(self, x0, n, L, nb, lr, momentum, weight_decay, gamma0, rho0, alpha, s=1.0, outer_momentum=None):
        self.n, self.L, self.nb, self.lr, self.mu, self.weight_decay = n, L, nb, lr, momentum, weight_decay
        self.gamma0, self.rho0, self.alpha, self.s = gamma0, rho0, alpha, s
        self.outer_mu = momentum if outer_momentum is None else outer_momentum
        self.k = 0  # rounds done
        self.i = 0  # steps done in this round
        self.xa = np.tile(np.asarray(x0, dtype=np.float64), (n, 1))
        self.y, self.z = self.xa.copy(), self.xa.copy()
        self.u, self.v = np.zeros_like(self.xa), np.zeros_like(self.xa)
        self.x = self.xa.mean(0)

    def step(self, gradients):
        """Update every replica from `gradients`, (n, P), of the loss at y."""
        self.growth = (1 + 1 / (2 * self.nb)) ** self.k
        gamma = min(self.gamma0 * self.growth, 1.0)
        if self.i == 0:
            self.L_k = max(1, round(np.ravel(self.lr)[0] / gamma)) if self.L == "auto" else self.L
            self.y, self.z = self.xa.copy(), self.xa.copy()
        c = self.coupling()
        self.i += 1

        if self.L_k == 1:
            for a in range(self.n):
                d = gradients[a] + self.weight_decay * self.xa[a] + c * (self.xa[a] - self.x)
                self.u[a] = self.mu * self.u[a] + d
                self.xa[a] = self.xa[a] - self.lr * (d + self.mu * self.u[a])
            self.x = self.xa.mean(0)
            self.y = self.xa.copy()
            self.k, self.i = self.k + 1, 0
            return
        for a in range(self.n):
            g = gradients[a] + self.weight_decay * self.y[a] + gamma * (self.y[a] - self.xa[a])
            self.u[a] = self.mu * self.u[a] + g
            self.y[a] = self.y[a] - self.lr * (g + self.mu * self.u[a])
            self.z[a] = self.alpha * self.z[a] + (1 - self.alpha) * self.y[a]
        if self.i == self.L_k:
            self.sync()

    def sync(self):
        """End the round, after L steps or earlier. Does nothing if there was no step since the last sync."""
        if self.i == 0:
            return
        c, z = self.coupling(), self.z.mean(0)
        for a in range(self.n):
            d = (self.xa[a] - self.z[a]) + c * (self.xa[a] - z)
            self.v[a] = self.outer_mu * self.v[a] + d
            self.xa[a] = self.xa[a] - self.s * self.lr * (d + self.outer_mu * self.v[a])
        self.x = self.xa.mean(0)
        self.y = self.xa.copy()
        self.k, self.i = self.k + 1, 0

    def coupling(self):
        return min(self.rho0 * self.L_k * self.n * self.growth, 10.0)
