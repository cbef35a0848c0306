"""The machine's own ceilings, and the floor that follows from them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from deep_ep_py import _C

from .world import World

#: A source that stays in a core's own cache, so that the write probe measures writing.
_SOURCE_BYTES = 256 << 10
#: Above so many bytes the library stores past the caches, and probes use memory rather than caches.
_STREAM_BYTES = 8 << 20
KINDS = ("read", "write", "copy")


@dataclass(frozen=True)
class Traffic:
    """Bytes that an operation has to read and to write, summed over ranks."""

    read: int
    written: int

    def floor_seconds(self, rates: dict[str, float]) -> float:
        """``rates``: bytes per second of all ranks together."""
        return self.read / rates["read"] + self.written / rates["write"]

    def copy_floor_seconds(self, rates: dict[str, float]) -> float:
        """Stricter where reading and writing overlap: what is both read and written goes at a copy's rate."""
        both = min(self.read, self.written)
        return both / rates["copy"] + (self.read - both) / rates["read"] + (self.written - both) / rates["write"]


class Ceilings:
    """Probes of this shape: every rank runs them at the same time, on heap memory of its own.

    ``large`` (an operation moves more than 8 MiB): buffers of ``large_bytes`` a rank, larger than the caches;
    writes and copies are non-temporal. Otherwise: buffers as large as what a rank of this shape writes, ordinary
    stores, so that caches help the probes as they help the operations.
    """

    def __init__(self, world: World, buffer: Any, moved_bytes: int, large_bytes: int, repeats: int) -> None:
        self.large = moved_bytes > _STREAM_BYTES
        self.bytes = large_bytes if self.large else max(moved_bytes, _SOURCE_BYTES)
        self._repeats = repeats
        self._world = world
        self._tensors = [buffer.empty((n,), torch.uint8).fill_(1) for n in (self.bytes, self.bytes, _SOURCE_BYTES)]
        self._from, self._to, self._source = (t.data_ptr() for t in self._tensors)
        for kind in KINDS:  # warm: pages, mappings, code
            self._probe(kind)()

    def _probe(self, kind: str) -> Any:
        def read() -> None:
            _C.probe_read(from_=self._from, bytes=self.bytes)

        def write() -> None:
            for at in range(0, self.bytes, _SOURCE_BYTES):
                size = min(_SOURCE_BYTES, self.bytes - at)
                _C.probe_copy(to=self._to + at, from_=self._source, bytes=size, stream=self.large)

        def copy() -> None:
            _C.probe_copy(to=self._to, from_=self._from, bytes=self.bytes, stream=self.large)

        return {"read": read, "write": write, "copy": copy}[kind]

    def measure(self) -> dict[str, list[float]]:
        """Seconds of each probe on this rank."""
        return {kind: self._world.time(self._probe(kind), self._repeats)[0] for kind in KINDS}

    def rates(self, slowest: dict[str, list[float]]) -> dict[str, float]:
        """Bytes per second of all ranks together; a copy's bytes are counted once. ``slowest``: over ranks."""
        return {kind: self._world.size * self.bytes / statistics.median(slowest[kind]) for kind in KINDS}


def dispatch_traffic(num_tokens: int, num_rows: int, row_bytes: int) -> Traffic:
    """Every token is read once, every received row written once."""
    return Traffic(num_tokens * row_bytes, num_rows * row_bytes)


def combine_traffic(num_tokens: int, num_rows: int, row_bytes: int, *, copied: bool) -> Traffic:
    """Every row is read once, every token written once; rows that are not in the heap are copied there first."""
    extra = num_rows * row_bytes if copied else 0
    return Traffic(num_rows * row_bytes + extra, num_tokens * row_bytes + extra)
