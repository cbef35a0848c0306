"""Operations under way, as tensors: a ticket is what an operator that only starts an operation can return."""

from __future__ import annotations

import itertools
import struct
import weakref
from collections.abc import Sequence

import torch

from .errors import EPArgumentError
from .event import EventOverlap


class _Flight(bytearray):
    """Memory of a ticket, so that what the operation delivers lives as long as the ticket's storage, and no longer."""

    results: Sequence[torch.Tensor]
    event: EventOverlap


class Flights:
    """The operations of one buffer that were started and whose tickets live."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._flights: weakref.WeakValueDictionary[int, _Flight] = weakref.WeakValueDictionary()

    def start(self, results: Sequence[torch.Tensor], event: EventOverlap) -> torch.Tensor:
        """The ticket, [1] float64: a dtype that carries gradients, whose whole numbers are exact. On the CPU also where
        rows are on a GPU: it is a number that the host reads, which must not wait for the device to hand it over."""
        number = next(self._numbers)
        flight = _Flight(struct.pack("=d", number))
        flight.results, flight.event = results, event
        self._flights[number] = flight
        return torch.frombuffer(flight, dtype=torch.float64)

    def finish(self, ticket: torch.Tensor) -> list[torch.Tensor]:
        """Wait for the operation (on a GPU: the current stream waits); new tensors over what it delivered.

        Raises:
            EPArgumentError: no such operation. EPError: what the operation raised.
        """
        flight = self._flights.get(int(ticket.item()))
        if flight is None:
            raise EPArgumentError.of(
                "ticket", "that of an operation of this buffer that is under way, waited for once", ticket.item()
            )
        if flight.event.event is not None:
            flight.event.current_stream_wait()
        return [tensor.detach() for tensor in flight.results]
