"""What a buffer writes to ``logging.getLogger("deep_ep_py")``: warnings and errors once for each buffer and cause."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Protocol

from .errors import EPError, EPPeerError, EPTimeoutError

_log = logging.getLogger("deep_ep_py")


def backend_chosen(name: str, refused: Mapping[str, str], *, by_auto: bool, num_domains: int) -> None:
    """Warn where ``auto`` took a slower backend than the first. ``hybrid`` over several domains is no such case: memory
    of other machines cannot be mapped."""
    if not by_auto or not refused:
        return
    why = "; ".join(f"{other}: {reason}" for other, reason in refused.items())
    if name == "hybrid" and num_domains > 1:
        _log.info("backend 'hybrid' carries the rows of %d domains (%s)", num_domains, why)
        return
    _log.warning(
        "backend 'auto' took %r, which is slower than %r. Why not the others: %s. Remedy: remove the reason ("
        "`python -m deep_ep_py doctor` tells what this machine can run), or name the backend "
        "(DEEP_EP_PY_BACKEND=%s) to accept it without this warning.",
        name,
        next(iter(refused)),
        why,
        name,
    )


class _Backend(Protocol):
    rank: int
    num_ranks: int

    def poisoned(self) -> bool: ...


class Failures:
    """The line that says why a buffer can do no more operations."""

    def __init__(self, backend: _Backend) -> None:
        self._backend = weakref.ref(backend)  # an event may outlive the buffer
        self._told = False

    def note(self, error: BaseException) -> None:
        """An operation raised ``error``."""
        backend = self._backend()
        if self._told or backend is None:
            return
        if not isinstance(error, (EPTimeoutError, EPPeerError)) and not backend.poisoned():
            return
        self._told = True
        at = f" in {error.op} (operation {error.seq}, phase {error.phase})" if isinstance(error, EPError) else ""
        _log.error(
            "rank %d of %d: this buffer failed%s and can do no more operations: %s: %s",
            backend.rank,
            backend.num_ranks,
            at,
            type(error).__name__,
            error,
        )


class HeapNotices:
    """What is worth knowing of one rank's heap. Args: rank: as errors name it. limit: ``max_heap_bytes`` as chosen."""

    def __init__(self, rank: int, limit: int) -> None:
        self._rank = rank
        self._limit = limit
        self._told = False

    def growth(self, num_segments: int, heap_bytes: int) -> None:
        """It has more segments than before."""
        _log.info(
            "rank %d: the heap has grown to %d MiB in %d segments; an ElasticBuffer that is told "
            "num_max_tokens_per_rank, hidden and num_topk prepares it at construction",
            self._rank,
            heap_bytes >> 20,
            num_segments,
        )

    def ordinary_memory(self, held_bytes: int) -> None:
        """A result does not stay in the heap."""
        if self._told:
            return
        self._told = True
        _log.warning(
            "rank %d: results go to ordinary memory, at the cost of another copy: tensors of this buffer that are "
            "still referenced hold %d MiB of a heap that may give %d MiB. Remedy: drop received tensors sooner, use "
            "fewer tokens per call, or raise Settings.max_heap_bytes (DEEP_EP_PY_MAX_HEAP_BYTES).",
            self._rank,
            held_bytes >> 20,
            self._limit >> 20,
        )
