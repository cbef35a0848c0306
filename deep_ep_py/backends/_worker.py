"""Background operations: one thread runs them in call order and ends when it has nothing to do."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

_IDLE_SECONDS = 0.2  # an idle thread ends by itself, so that it never holds up the interpreter's exit
_SLICE_SECONDS = 0.1  # waits are cut into slices: signal handlers run in between


class Completion:
    """When one background operation is complete, and what it raised. A :class:`~.base.CompletionEvent`."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Wait for the end of the operation; raises what it raised."""
        while not self._ended.wait(_SLICE_SECONDS):
            pass
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        return self._ended.is_set()

    def end(self, error: BaseException | None = None) -> None:
        self._error = error
        self._ended.set()


class Worker:
    """Runs jobs one after the other, in the order of ``submit``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._busy = False
        self._leaving = False
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job; it must not raise."""
        with self._changed:
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=False)
                self._thread.start()
            self._changed.notify_all()

    def is_this_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def drain(self) -> None:
        """Wait until every job is done. From a job itself: nothing to wait for."""
        if self.is_this_thread():
            return
        with self._changed:
            while self._jobs or self._busy:
                self._changed.wait(_SLICE_SECONDS)

    def join(self) -> None:
        """Drain, then see the thread end."""
        thread = self._thread
        self.drain()
        if thread is not None and thread is not threading.current_thread():
            with self._changed:
                self._leaving = True
                self._changed.notify_all()
            thread.join(2 * _IDLE_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                if not self._jobs and not self._leaving:
                    self._changed.wait(_IDLE_SECONDS)
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
                self._busy = True
            job()
            del job  # it holds the operation's tensors
