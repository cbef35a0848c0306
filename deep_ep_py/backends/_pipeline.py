"""Chunks on the wire while others are worked on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from .._pairs import Transfer

#: Chunks on their way at once: one that the wire carries, one that it takes next, one that is being taken in.
DEPTH = 3

#: Work done between two looks at the wire.
SLICE_BYTES = 1 << 20

_CHUNK_SECONDS = 10e-3  # of the wire: short beside a whole operation, long beside the cost of one transfer
_FIRST_CHUNK_BYTES = 512 << 10  # before anything is known of the link
_LEAST_CHUNK_BYTES, _MOST_CHUNK_BYTES = 64 << 10, 8 << 20
_LEAST_MEASURED_BYTES = 256 << 10


def chunk_rows(row_bytes: int, bytes_per_second: float) -> int:
    """Rows of a chunk, for a link of which a rank can use so much (0: not known)."""
    wanted = int(bytes_per_second * _CHUNK_SECONDS) or _FIRST_CHUNK_BYTES
    return max(1, min(max(wanted, _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES) // max(row_bytes, 1))


class Pace:
    """What is known of the way across: how many bytes a second a rank can send, and so how large chunks should be.

    Attributes:
        measured: by this rank, in its last large operation, unless it was given; 0: nothing yet.
        agreed: the highest that any rank told at the last rendezvous, so that all ranks cut alike.
    """

    def __init__(self, given: float) -> None:
        """``given``: bytes a second of one rank; 0: to be measured."""
        self._given = given
        self.measured = given
        self.agreed = 0.0

    def chunk_rows(self, row_bytes: int) -> int:
        return chunk_rows(row_bytes, self.agreed)

    def measure(self, num_bytes: int, seconds: float) -> None:
        if not self._given and num_bytes >= _LEAST_MEASURED_BYTES and seconds > 0:
            self.measured = num_bytes / seconds


def run(
    rounds: int, begin: Callable[[int], Transfer], arrived: Callable[[int], None], other_work: Iterator[None]
) -> float:
    """Start every chunk in order, take each in when it has come, and do ``other_work`` while the wire is busy.

    Returns the seconds from the first start to the last arrival.
    """
    under_way: deque[Transfer] = deque()
    started, taken, more = 0, 0, True
    first = last = time.monotonic()
    while taken < rounds or more:
        while started < rounds and len(under_way) < DEPTH:
            under_way.append(begin(started))
            started += 1
        if under_way and (not more or under_way[0].done()):
            under_way.popleft().wait()
            last = time.monotonic()
            arrived(taken)
            taken += 1
        elif more:
            more = next(other_work, _END) is not _END
    return last - first


_END = object()
