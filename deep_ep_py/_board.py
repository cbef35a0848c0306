"""Marks that ranks leave for each other in a torch store, in a way that never makes anybody wait: the store may be on
the host that is cut off, and then a call into it returns when TCP gives up, which is minutes later.

Part of :mod:`deep_ep_py.communicator`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

_LOOK_SECONDS = 0.25  # how often a wait looks for marks


class Board:
    """One rank's view. Everything that talks to the store does so in a thread that may be left behind."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._found: set[str] = set()
        self._asking: threading.Thread | None = None
        self._next = time.monotonic() + _LOOK_SECONDS

    def leave(self, mark: str) -> None:
        """Leave a mark; returns at once."""
        store = self._store
        if store is not None:
            self._talk(lambda: store.set(mark, b"1"))

    def close(self) -> None:
        """Let go of the store; what is under way ends by itself. Later questions find what was found before."""
        self._store = None

    def look(self, marks: Sequence[str]) -> set[str]:
        """Those of ``marks`` that the last answer showed; asks again now and then."""
        now = time.monotonic()
        if now > self._next and not self._is_asking():
            self._next = now + _LOOK_SECONDS
            self._asking = self._talk(lambda: self._read(marks))
        return self._found

    def ask(self, marks: Sequence[str], seconds: float) -> set[str] | None:
        """Those of ``marks`` that are there after ``seconds``, or once all are; None: the store does not answer."""
        answered = threading.Event()

        def watch() -> None:
            deadline = time.monotonic() + seconds
            while not self._read(marks) >= set(marks) and time.monotonic() < deadline:
                time.sleep(0.02)
            answered.set()

        if self._asking is not None:
            self._asking.join(seconds)  # a look that is under way answers soon, unless the store is silent
        if self._is_asking():
            return None
        self._asking = self._talk(watch)
        return self._found if answered.wait(2 * seconds) else None

    def _read(self, marks: Sequence[str]) -> set[str]:
        store = self._store
        if store is not None:
            self._found = {mark for mark in marks if store.check([mark])}
        return self._found

    def _is_asking(self) -> bool:
        return self._asking is not None and self._asking.is_alive()

    def _talk(self, question: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            with suppress(RuntimeError):  # the store's server is gone
                question()

        thread = threading.Thread(target=run, name="deep_ep_py-store", daemon=True)
        thread.start()
        return thread
