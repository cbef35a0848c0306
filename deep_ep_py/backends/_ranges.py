"""A backend as the engine drives it while a profiler runs: each part of an operation is a range of the trace."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from ..event import CompletionEvent
from ..profiling import Range, rows_span, span
from ..types import Combined, CombineSpec, Dispatched, DispatchSpec
from .base import Backend, Flight


class RangedBackend:
    """See :class:`.base.Mover`; of one operation."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._here: AbstractContextManager[None] = nullcontext()

    def prepare(
        self, spec: DispatchSpec, *, background: bool = False, previous: Sequence[CompletionEvent] = ()
    ) -> Flight:
        with span("dispatch_plan"):
            flight = self._backend.prepare(spec, background=background, previous=previous)
        return self._with_range(flight, rows_span("dispatch_rows", spec.x, spec.sf, flight.result.plan), background)

    def dispatch_send(self, flight: Flight) -> None:
        with self._here:
            self._backend.dispatch_send(flight)

    def dispatch_recv(self, flight: Flight) -> Dispatched:
        return self._backend.dispatch_recv(flight)

    def prepare_combine(
        self, spec: CombineSpec, *, background: bool = False, previous: Sequence[CompletionEvent] = ()
    ) -> Flight:
        flight = self._backend.prepare_combine(spec, background=background, previous=previous)
        return self._with_range(flight, rows_span("combine_rows", spec.y, None, spec.plan), background)

    def combine_send(self, flight: Flight) -> None:
        with self._here:
            self._backend.combine_send(flight)

    def combine_recv(self, flight: Flight) -> Combined:
        return self._backend.combine_recv(flight)

    def abort(self, flight: Flight) -> None:
        self._backend.abort(flight)

    def _with_range(self, flight: Flight, rows: Range, background: bool) -> Flight:
        """The range is entered where rows move: in the thread that works in the background, or here."""
        if background:
            flight.span = rows
        else:
            self._here = rows
        return flight
