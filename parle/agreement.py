"""Agreement between replicas and ranks: their settings, flags and norms, which travel at the end of each message."""

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from parle.flat_replica import AVERAGE_NORM, CHECKSUM, MASTER_NORM, NUM_CHANGED, ROW_SIZE, ROWS
from parle.inner import INNER, find_numbers


def checksum(groups: Sequence[dict[str, Any]], names: Sequence[str]) -> int:
    """Return a nonzero 22-bit checksum of these settings of parameter groups, which float32 represents exactly."""
    values = [
        -1.0 if value == "auto" else min(value, 3e38) for group in groups for value in _settings(group, names).values()
    ]
    # in float32, since a schedule computed on another machine may differ in the last digits
    return zlib.crc32(struct.pack(f"{len(values)}f", *values)) % 2**22 + 1


def describe(groups: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, str]:
    """Return these settings of parameter groups by name, with the precision of `checksum`."""
    return {
        f"{name} of group {index}": str(value if isinstance(value, str | int) else np.float32(value))
        for index, group in enumerate(groups)
        for name, value in _settings(group, names).items()
    }


def _settings(group: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return these settings of a group, and the numbers among those of its inner optimizer, if any."""
    numbers = find_numbers(group.get(INNER, {}))
    return {name: group[name] for name in names} | {f"inner {name}": value for name, value in numbers.items()}


def find_nonfinite(
    tail: Tensor,
    num_replicas: int,
    ranks_per_replica: int,
    round_number: int,
    compare_settings: Callable[[], None] | None = None,
) -> list[int]:
    """Return the numbers of the replicas that are not finite.

    Args:
        tail: the end of the summed message, in host memory.
        compare_settings: collective; raises RuntimeError for the first setting that differs.

    Raises:
        RuntimeError: replicas or ranks do not agree.
        FloatingPointError: no replica is finite.
    """
    flags = tail.tolist()
    rows = [flags[start : start + ROW_SIZE] for start in range(ROWS.start, len(flags), ROW_SIZE)]
    if any(abs(row[CHECKSUM]) != abs(rows[0][CHECKSUM]) for row in rows):
        if compare_settings is not None:
            compare_settings()
        raise RuntimeError(f"Settings differed between replicas in round {round_number}: use the same ones for all")
    if flags[NUM_CHANGED]:
        raise RuntimeError(
            f"Weights were changed between two rounds (on {int(flags[NUM_CHANGED])} of {len(rows)} ranks or replicas) "
            "and no longer equal the anchor: call reset() on every rank after loading weights, and clip or project "
            "weights only while step_in_round > 0"
        )
    if not _nearly_equal(row[MASTER_NORM] for row in rows):
        raise RuntimeError(
            f"The master differs between ranks in round {round_number}: load states of the same run on every rank, or "
            "call reset()"
        )
    nonfinite = []
    for number in range(num_replicas):
        own = rows[number * ranks_per_replica :][:ranks_per_replica]
        if any(row[CHECKSUM] < 0 for row in own):
            nonfinite.append(number)
        elif not _nearly_equal(row[AVERAGE_NORM] for row in own):
            raise RuntimeError(
                f"The ranks of replica {number} hold different weights in round {round_number}: change weights and "
                "gradients identically on all of them, call average_gradients() after the last backward pass, and "
                "then call reset()"
            )
    if len(nonfinite) == num_replicas:
        raise FloatingPointError(f"All replicas are NaN or infinite after round {round_number}: use a lower lr")
    return nonfinite


def _nearly_equal(norms: Iterator[float]) -> bool:
    """Return whether squared norms agree up to rounding, which differs between CPUs."""
    values = list(norms)
    return max(values) <= min(values) * (1 + 1e-4)
