"""Faults for the tests of fault tolerance: PARLE_FAULT=KIND:REPLICA:ROUND takes effect as that round begins.

It is ignored outside of tests, which set PARLE_TESTING=1.

raise    raise an exception      kill     SIGKILL, as when memory runs out
hang     sleep forever           nan      fill the replica's gradient with NaN
"""

import os
import signal
import time
from typing import Any

from parle.optimizer import ParleBase

KINDS = ("raise", "kill", "hang", "nan")


def inject_fault(optimizer: ParleBase, replicas: list[int]) -> None:
    """Register the fault that the environment requests, if it is for one of the local replicas."""
    if "PARLE_FAULT" not in os.environ or os.environ.get("PARLE_TESTING") != "1":
        return
    kind, replica, round_number = os.environ["PARLE_FAULT"].split(":")
    if kind not in KINDS:
        raise ValueError(f"Invalid PARLE_FAULT: {kind}")
    if int(replica) not in replicas:
        return

    def fault(*_: Any) -> None:
        if (optimizer.rounds_done + 1, optimizer.step_in_round) != (int(round_number), 0):
            return
        if kind == "raise":
            raise RuntimeError("injected fault")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(1e6)
        if kind == "nan":
            local = list(dict.fromkeys(group["replica"] for group in optimizer.param_groups))
            number = local[replicas.index(int(replica))]
            for group in optimizer.param_groups:
                for parameter in group["params"] if group["replica"] == number else ():
                    parameter.grad.fill_(float("nan"))

    optimizer.register_step_pre_hook(fault)
