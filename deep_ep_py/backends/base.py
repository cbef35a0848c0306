"""What a backend is: it moves rows along a plan, and does nothing else.

One interface serves every mover. The engine validates arguments and calls the halves in this order::

    flight = backend.prepare(spec, ...)        # dispatch: rendezvous, shapes, output allocation (blocks for counts)
    backend.dispatch_send(flight)              # place rows, signal
    backend.dispatch_recv(flight)              # wait for every source -> flight.result is complete

    flight = backend.prepare_combine(spec, ...)
    backend.combine_send(flight)               # publish where this rank's rows lie
    backend.combine_recv(flight)               # pull and reduce, release -> flight.result is complete

With ``background=True`` the two halves only enqueue; ``flight.event`` tells when ``flight.result`` is complete.
Operations of one backend object run in call order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..event import CompletionEvent
from ..types import Combined, CombineSpec, Dispatched, DispatchSpec


@dataclass(slots=True, eq=False)
class Flight:
    """One operation under way.

    Attributes:
        result: what the operation delivers; tensors exist from ``prepare`` on and are complete after the last half.
        event: completion of a background operation; None for one that runs in the calling thread.
        state: the backend's own.
    """

    result: Any
    event: CompletionEvent | None = None
    state: Any = None


@dataclass(slots=True)
class Statistics:
    """Counters of one backend object; all monotone but ``heap_bytes``, ``held_bytes`` and ``segments``.

    Attributes:
        operations: rendezvous held. rendezvous_with_counts: those that exchanged counts.
        second_records: dispatches whose first offers were too small.
        heap_bytes: of this rank's heap. held_bytes: of it, in tensors and under way. segments: pieces it grew in.
        moved_to_ordinary_memory: results that did not stay in the heap, because the user holds its limit already.
        copied_combine_inputs: combines whose rows had to be copied into the heap first.
    """

    operations: int = 0
    rendezvous_with_counts: int = 0
    second_records: int = 0
    heap_bytes: int = 0
    held_bytes: int = 0
    segments: int = 0
    moved_to_ordinary_memory: int = 0
    copied_combine_inputs: int = 0


class Backend(Protocol):
    """A mover of rows. ``previous`` are events to be waited for before anything is published."""

    name: str
    rank: int
    num_ranks: int

    def prepare(
        self, spec: DispatchSpec, *, background: bool = False, previous: Sequence[CompletionEvent] = ()
    ) -> Flight:
        """Begin a dispatch: rendezvous with every rank, then outputs of that size. ``Flight.result``: Dispatched."""

    def dispatch_send(self, flight: Flight) -> None: ...

    def dispatch_recv(self, flight: Flight) -> Dispatched: ...

    def prepare_combine(
        self, spec: CombineSpec, *, background: bool = False, previous: Sequence[CompletionEvent] = ()
    ) -> Flight:
        """Begin a combine: outputs of the right size. ``Flight.result``: Combined."""

    def combine_send(self, flight: Flight) -> None: ...

    def combine_recv(self, flight: Flight) -> Combined: ...

    def abort(self, flight: Flight) -> None:
        """A prepared dispatch will not be sent: the buffer is poisoned, so that peers do not wait for its rows."""

    def barrier(self) -> None:
        """Return when every rank has called it; earlier operations are then complete here."""

    def fail(self, op: str, message: str) -> None:
        """Take this rank's place in the order of operations with a failed record, so that its peers raise too.

        Returns when every peer has seen it; the caller then raises its own error.
        """

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor from which combine needs no copy, where the backend has such memory; else an ordinary one."""

    def statistics(self) -> Statistics: ...

    def close(self) -> None:
        """Give everything back. Idempotent, not collective; tensors and plans stay valid."""
