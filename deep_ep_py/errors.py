"""Typed errors. Every error a user can cause derives from :class:`EPError` and says what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = [
    "EPArgumentError",
    "EPBackendUnavailableError",
    "EPError",
    "EPMismatchError",
    "EPPeerError",
    "EPTimeoutError",
]


class EPError(RuntimeError):
    """Base of all errors of this library.

    Attributes:
        op: name of the operation (``"dispatch"``, ``"combine"``, ...), empty outside one.
        phase: step of the operation (``"notify"``, ``"arrive"``, ...), empty outside one.
        seq: sequence number of the operation on its buffer, 0 outside one.
        ranks: the ranks that the error is about.
    """

    def __init__(self, message: str, *, op: str = "", phase: str = "", seq: int = 0, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.op = op
        self.phase = phase
        self.seq = seq
        self.ranks = tuple(ranks)


class EPArgumentError(EPError, ValueError):
    """An argument was refused before any byte moved; the buffer stays usable.

    On the rank that passed it, ``argument``, ``expected`` and ``got`` are set. Its peers raise the same type with the
    same text, and ``ranks`` names the caller at fault.
    """

    def __init__(
        self,
        message: str,
        *,
        argument: str = "",
        expected: str = "",
        got: str = "",
        op: str = "",
        phase: str = "",
        seq: int = 0,
        ranks: Sequence[int] = (),
    ) -> None:
        super().__init__(message, op=op, phase=phase, seq=seq, ranks=ranks)
        self.argument = argument
        self.expected = expected
        self.got = got

    @classmethod
    def of(cls, argument: str, expected: str, got: object) -> EPArgumentError:
        """The usual sentence: what was passed, what is wanted."""
        return cls(f"{argument}: expected {expected}, got {got}", argument=argument, expected=expected, got=str(got))


class EPMismatchError(EPError):
    """Ranks disagree about something that must be equal; the buffer stays usable.

    Attributes:
        field: what differs (an argument's name, or ``"operation"``).
        values: each rank's value.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        values: Mapping[int, object] | None = None,
        op: str = "",
        phase: str = "",
        seq: int = 0,
        ranks: Sequence[int] = (),
    ) -> None:
        super().__init__(message, op=op, phase=phase, seq=seq, ranks=ranks)
        self.field = field
        self.values = dict(values or {})


class EPTimeoutError(EPError):
    """A deadline passed; ``ranks`` did not come within ``seconds``. The buffer is poisoned: build a new one."""

    def __init__(
        self,
        message: str,
        *,
        seconds: float = 0.0,
        op: str = "",
        phase: str = "",
        seq: int = 0,
        ranks: Sequence[int] = (),
    ) -> None:
        super().__init__(message, op=op, phase=phase, seq=seq, ranks=ranks)
        self.seconds = seconds


class EPPeerError(EPError):
    """A peer is gone (``ranks``), and ``how`` says how. The buffer is poisoned: build a new one over the survivors."""

    def __init__(
        self,
        message: str,
        *,
        how: str = "",
        op: str = "",
        phase: str = "",
        seq: int = 0,
        ranks: Sequence[int] = (),
    ) -> None:
        super().__init__(message, op=op, phase=phase, seq=seq, ranks=ranks)
        self.how = how


class EPBackendUnavailableError(EPError):
    """No backend (or not the one asked for) works here; ``reasons`` maps each backend to why not."""

    def __init__(self, message: str, *, reasons: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = dict(reasons or {})
