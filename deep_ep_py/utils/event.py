"""DeepEP's ``deep_ep.utils.event``."""

from __future__ import annotations

from ..event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
