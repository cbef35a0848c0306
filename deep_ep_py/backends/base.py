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
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..errors import EPError
from ..event import CompletionEvent
from ..plans import Plan, PlanLayout
from ..profiling import Range
from ..types import Combined, CombineSpec, Dispatched, DispatchSpec


@dataclass(slots=True, eq=False)
class Flight:
    """One operation under way.

    Attributes:
        result: what the operation delivers; tensors exist from ``prepare`` on and are complete after the last half.
        event: completion of a background operation; None for one that runs in the calling thread.
        state: the backend's own.
        span: the profiler's range for what is left to a thread in the background; None: there is no profiler.
    """

    result: Any
    event: CompletionEvent | None = None
    state: Any = None
    span: Range | None = None


@dataclass(slots=True, eq=False)
class Relayed:
    """Tokens of one origin that a rank places in its domain: its own, or those that it relays for a rank of its rail.

    Attributes:
        targets: [n, W] int64 contiguous, of the buffer's ranks; those of other domains are skipped.
        x, sf: [n, ..] rows of bytes, unit stride in a row; None where other calls place them.
        small: ids, weights and source indices are placed by this call; with them
        tokens: [n] int32, indices at the origin (None: 0, 1, ...); topk_idx: [n, K] int64; topk_weights: [n, K];
            first_token: [U] int64, expanded: the origin's first among each destination's unique tokens.
    """

    targets: torch.Tensor
    x: torch.Tensor | None = None
    sf: torch.Tensor | None = None
    small: bool = False
    tokens: torch.Tensor | None = None
    topk_idx: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    first_token: torch.Tensor | None = None


@dataclass(slots=True)
class Statistics:
    """Counters of one backend object; all monotone but ``heap_bytes``, ``held_bytes`` and ``segments``.

    Attributes:
        operations: rendezvous held. rendezvous_with_counts: those that exchanged counts.
        second_records: dispatches whose first offers were too small.
        heap_bytes: of this rank's heap. held_bytes: of it, in tensors and under way. segments: pieces it grew in.
        moved_to_ordinary_memory: results that did not stay in the heap, because the user holds its limit already.
        copied_combine_inputs: combines whose rows had to be copied into the heap first.
        wait_seconds: by rank, seconds that this rank has waited for it. A wait for several ranks counts for the one
            that was seen last, so the largest number names the rank that holds the others up. ``collective`` learns it
            one operation later: when all ranks met, the one that waited least came last, and the others waited for it,
            by as much as they waited longer. Over several domains: the ranks of this rank's rail and of its domain.
            Empty where kernels wait (``cuda_peer``).
    """

    operations: int = 0
    rendezvous_with_counts: int = 0
    second_records: int = 0
    heap_bytes: int = 0
    held_bytes: int = 0
    segments: int = 0
    moved_to_ordinary_memory: int = 0
    copied_combine_inputs: int = 0
    wait_seconds: dict[int, float] = field(default_factory=dict)


class Mover(Protocol):
    """What moves the rows of operations. ``previous`` are events to be waited for before anything is published."""

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


class Backend(Mover, Protocol):
    """A mover of rows, and all that belongs to one.

    Attributes:
        device: of every tensor that it takes and makes. comm_stream: the torch.cuda.Stream on which rows move; None
            where there are no streams.
    """

    name: str
    rank: int
    num_ranks: int
    device: torch.device

    @property
    def comm_stream(self) -> Any: ...

    def barrier(self, *, host: bool = True) -> None:
        """Return when every rank has called it; earlier operations are then complete here. With ``host`` off, where
        operations are those of a stream, only the stream waits."""

    def fail(self, op: str, message: str) -> None:
        """Take this rank's place in the order of operations with a failed record, so that its peers raise too.

        Returns when every peer has seen it; the caller then raises its own error.
        """

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor from which combine needs no copy, where the backend has such memory; else an ordinary one."""

    def statistics(self) -> Statistics: ...

    def poisoned(self) -> bool:
        """Whether a failure has made every later operation impossible, where the error's type does not say it."""

    def close(self) -> None:
        """Give everything back. Idempotent, not collective; tensors and plans stay valid."""


class Domain(Backend, Protocol):
    """A backend whose operations can be run in pieces, as the inner hop of ranks in several domains."""

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """[U, ...]: everyone's ``own``, contiguous and equal in shape."""

    def hop_begin(self, spec: DispatchSpec, plan: Plan, tokens_to: torch.Tensor, rows_to: torch.Tensor) -> Flight:
        """Begin a dispatch whose counts all ranks know: ``tokens_to`` and ``rows_to`` [R] int64, of every rank."""

    def place(self, flight: Flight, source: Relayed) -> None:
        """Write rows, or what goes beside them, at their final place. Any number of times."""

    def hop_finish(self, flight: Flight) -> None:
        """Everything is placed: signal, and wait for the others. ``flight.result`` is complete."""

    def pull_begin(self, spec: CombineSpec) -> Any:
        """Publish where the rows lie that this rank's experts made, and learn where everyone's do."""

    def pull(
        self,
        flight: Any,
        layout: PlanLayout,
        targets: torch.Tensor,
        reduce_per_rank: bool,
        verbatim: bool,
        out: torch.Tensor | None,
        out_weights: torch.Tensor | None,
    ) -> None:
        """The sums of this domain's rows of some tokens; ``out`` [n, H], ``out_weights`` [n, ..], or None.
        ``verbatim``: one slot each, whose row is fetched as it is."""

    def pull_end(self, flight: Any) -> None:
        """Nothing more is read."""

    def reduce(
        self,
        layout: PlanLayout,
        home: torch.Tensor,
        rows: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        out: Combined,
        first: int,
        end: int,
        biases: Sequence[torch.Tensor],
        max_threads: int,
    ) -> None:
        """Tokens [first, end) of ``out`` from what the domains returned: ``home`` names domain and row; ``rows`` and
        ``weights`` by domain, either of them empty."""

    def poison(self, error: EPError) -> None:
        """Peers in this domain raise ``error`` from now on."""
