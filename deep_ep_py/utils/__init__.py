"""DeepEP's ``deep_ep.utils``, as far as programs import it: the events."""

from __future__ import annotations

from ..event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
