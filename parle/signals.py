"""What a person or a cluster asks of a run while it trains, by a signal."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from parle.training import Asked

STOPPED = 75  # exit status of a run that was asked to stop: the BSDs' "try again later"


def await_training() -> None:
    """Before and after training there is nothing to save: a warning, by SIGUSR1, does not end the program."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@contextlib.contextmanager
def heard() -> Iterator[Asked]:
    """Within, SIGINT and SIGTERM ask to save and stop, SIGUSR1 to save and go on. A second SIGINT stops at once."""
    asked = Asked()

    def hear(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            asked.save = True
        elif asked.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            asked.stop = True

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
