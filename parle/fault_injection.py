"""Faults on purpose, for the tests of what survives them: PARLE_FAULT=KIND:REPLICA:ROUND strikes as that round begins.

raise    an exception        kill     SIGKILL, as when memory runs out
stall    sleep for ever      poison   NaN in the replica's weights
"""

import os
import signal
import time
from typing import Any

from parle.optimizer import ReplicaOptimizer


def inject(optimizer: ReplicaOptimizer, replicas: list[int]) -> None:
    """Arm the fault that the environment names, if it is for one of the replicas that live here."""
    if "PARLE_FAULT" not in os.environ:
        return
    kind, replica, round = os.environ["PARLE_FAULT"].split(":")
    if kind not in ("raise", "kill", "stall", "poison"):
        raise ValueError(f"Invalid PARLE_FAULT: {kind}")
    if int(replica) not in replicas:
        return

    def strike(*_: Any) -> None:
        if (optimizer.rounds + 1, optimizer.batches) != (int(round), 0):
            return
        if kind == "raise":
            raise RuntimeError("a fault on purpose")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stall":
            time.sleep(1e6)
        if kind == "poison":
            optimizer.vectors[replicas.index(int(replica))]["weights"].fill_(float("nan"))

    optimizer.register_step_pre_hook(strike)
