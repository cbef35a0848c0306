"""Buffers by number: an operator's arguments are tensors and numbers, so that is how it is told its buffer."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

from .errors import EPArgumentError

# The one table of the library. It is weak: it keeps no buffer alive, and an entry goes with its buffer.
_buffers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(buffer: Any) -> int:
    """The number of a new buffer, never given twice in a process."""
    number = next(_numbers)
    _buffers[number] = buffer
    return number


def buffer_of(number: int) -> Any:
    """The buffer of that number.

    Raises:
        EPArgumentError: it is gone.
    """
    buffer = _buffers.get(number)
    if buffer is None:
        raise EPArgumentError.of(
            "handle",
            "one (or a pending operation) whose buffer is alive; keep it until the last backward pass",
            "one whose buffer is gone",
        )
    return buffer
