"""Signals: save and stop, save and continue."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from parle import supervision
from parle.training import StopRequest

EXIT_RESUMABLE = os.EX_TEMPFAIL  # 75: the run was stopped by a signal and can be resumed


def ignore_sigusr1() -> None:
    """Ignore SIGUSR1 before and after training: a warning from a cluster's scheduler must not end the program."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@contextlib.contextmanager
def handle_signals() -> Iterator[StopRequest]:
    """Turn signals into requests: SIGINT, SIGTERM and SIGHUP to save and stop, SIGUSR1 to save and continue.

    A second SIGINT raises KeyboardInterrupt. Stop signals that the parent ignores, as under nohup, stay ignored.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            request.save = True
        elif request.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            request.stop = True

    numbers = (*supervision.unignored(supervision.STOP_SIGNALS), signal.SIGUSR1)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
