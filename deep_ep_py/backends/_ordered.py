"""What backends written in Python share: an operation takes its place in the order, and runs there or behind others."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from .._rows import CPU
from ..errors import EPArgumentError, EPError
from ..event import CompletionEvent
from ..types import Combined, CombineSpec, Dispatched, DispatchSpec
from ._order import Order
from ._record import Record, meet, take_part
from ._streams import streams_of
from ._worker import Completion
from .base import Flight, Statistics


class OrderedBackend(ABC):
    """See :class:`.base.Backend`. A backend says how a dispatch begins and ends, and how a combine runs."""

    name: str

    def __init__(self, rank: int, num_ranks: int, device: torch.device = CPU) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        self._streams = streams_of(device)
        self.comm_stream = self._streams.comm_stream
        self._order = Order(f"deep_ep_py-{self.name}-{rank}", rank, self._tell_peers)
        self._statistics = Statistics()

    @abstractmethod
    def _begin_dispatch(self, spec: DispatchSpec, previous: Sequence[CompletionEvent]) -> Any:
        """Meet, and settle where rows go; has ``result``, the outputs."""

    @abstractmethod
    def _deliver(self, begun: Any) -> None:
        """Move the rows of a dispatch that was begun."""

    @abstractmethod
    def _outputs(self, spec: CombineSpec) -> Combined:
        """Tensors for a combine's results."""

    @abstractmethod
    def _combine(self, spec: CombineSpec, previous: Sequence[CompletionEvent], result: Combined) -> None:
        """Meet, and fill ``result``."""

    @abstractmethod
    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        """Everyone's ``own`` [n], as [R, n] by rank."""

    @abstractmethod
    def _tell_peers(self, error: EPError) -> None:
        """This rank goes on no more: peers shall not wait for it."""

    @abstractmethod
    def _release(self) -> None:
        """Give back channels and memory."""

    def prepare(
        self, spec: DispatchSpec, *, background: bool = False, previous: Sequence[CompletionEvent] = ()
    ) -> Flight:
        """Begin a dispatch; see :class:`.base.Backend`. Blocks for the rendezvous, in the background too.

        Raises:
            EPArgumentError, EPMismatchError: on every rank; nothing has moved and the buffer stays usable.
            EPTimeoutError, EPPeerError: ranks did not come or are gone; the buffer is poisoned.
        """
        self._refuse_capture("dispatch")
        turn = self._streams.turn()

        def begin() -> Any:
            with turn.on_stream():
                return self._begin_dispatch(spec, previous)

        begun = self._order.run("dispatch", begin, background)
        out: Dispatched = _as_returned(begun.result)
        turn.lend((out.recv_x, out.recv_sf, out.recv_topk_idx, out.recv_topk_weights, out.recv_meta, out.plan.packed))
        return Flight(out, Completion() if background else None, (begun, turn))

    def dispatch_send(self, flight: Flight) -> None:
        (begun, turn), flight.state = flight.state, None

        def deliver() -> None:
            with turn.on_stream():
                self._deliver(begun)
            turn.finish()

        self._order.start("dispatch", deliver, flight.event, flight.span)

    def dispatch_recv(self, flight: Flight) -> Dispatched:
        result: Dispatched = flight.result
        return result

    def prepare_combine(
        self, spec: CombineSpec, *, background: bool = False, previous: Sequence[CompletionEvent] = ()
    ) -> Flight:
        """Begin a combine: outputs only, behind nothing that is under way. Ranks meet in ``combine_send``, which raises
        what :meth:`prepare` would."""
        self._order.check()
        self._refuse_capture("combine")
        turn = self._streams.turn()
        with turn.on_stream():
            result = self._outputs(spec)
        turn.lend((result.combined_x, result.combined_topk_weights))
        return Flight(_as_returned(result), Completion() if background else None, (spec, tuple(previous), result, turn))

    def combine_send(self, flight: Flight) -> None:
        (spec, previous, result, turn), flight.state = flight.state, None

        def combine() -> None:
            with turn.on_stream():
                self._combine(spec, previous, result)
            turn.finish()

        self._order.start("combine", combine, flight.event, flight.span)

    def combine_recv(self, flight: Flight) -> Combined:
        result: Combined = flight.result
        return result

    def abort(self, flight: Flight) -> None:  # noqa: ARG002
        """See :class:`.base.Backend`."""
        self._order.give_up("a dispatch was begun and then given up")

    def barrier(self, *, host: bool = True) -> None:  # noqa: ARG002
        self._order.run("barrier", lambda: self._meet("barrier", {}, {}), background=False)

    def fail(self, op: str, message: str) -> None:
        def announce() -> None:
            meet(self._gather, Record(op, self._order.begin(op), failed=message))

        self._order.run(op, announce, background=False)

    def statistics(self) -> Statistics:
        return copy.deepcopy(self._statistics)

    def poisoned(self) -> bool:
        return self._order.poisoned

    def close(self) -> None:
        """Wait for this rank's own operations in flight, then leave; peers are not waited for."""
        self._order.close(self._release)

    def _refuse_capture(self, op: str) -> None:
        why = self._streams.refusal()
        if why:
            self.fail(op, why)
            raise EPArgumentError(why, op=op)

    def _meet(
        self,
        op: str,
        agree: dict[str, int | str],
        tell: dict[str, Any],
        check: Callable[[], None] = lambda: None,
        previous: Sequence[CompletionEvent] = (),
    ) -> list[Record]:
        """Take the operation's place in the order; everyone's records."""
        record = Record(op, self._order.begin(op), agree, tell)
        records = take_part(self._gather, self.rank, record, check, previous)
        self._statistics.operations += 1
        return records


def _as_returned(result: Any) -> Any:
    """The same memory as tensors whose version counters are their own. A caller may save for a backward pass what it
    was given; what is written to it behind an event must not count as a change that the caller made.
    """
    tensors = {f.name: t.data for f in fields(result) if isinstance(t := getattr(result, f.name), torch.Tensor)}
    return replace(result, **tensors)
