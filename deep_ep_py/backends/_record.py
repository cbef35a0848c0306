"""The record that every operation of ``collective`` begins with: what each rank is about to do, and whether all agree.

A record has one size for every operation, so that ranks which disagree about the operation can still read each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .. import _C
from .._rows import RowChannel, name_ranks
from ..errors import EPArgumentError, EPMismatchError
from ..event import CompletionEvent
from ..traffic import RECORD_BYTES
from ._order import Refused

_TEXT_CHARACTERS = 300  # of a failure; json may spend 6 to 12 bytes on one of them


@dataclass(slots=True)
class Record:
    """One rank's announcement of one operation.

    Attributes:
        op: the operation; seq: its number on this buffer.
        agree: what must be equal on all ranks, by the name that users know.
        tell: what peers need to know but may differ.
        failed: why this rank cannot take part; empty where it can.
    """

    op: str
    seq: int
    agree: dict[str, int | str] = field(default_factory=dict)
    tell: dict[str, Any] = field(default_factory=dict)
    failed: str = ""


#: Everyone's tensor [n], as [R, n] by rank.
Gather = Callable[[torch.Tensor], torch.Tensor]


def take_part(
    gather: Gather, rank: int, record: Record, check: Callable[[], None], previous: Sequence[CompletionEvent]
) -> list[Record]:
    """Take the operation's place in the order. What this rank refuses, its peers learn here."""
    refusal: Exception | None = None
    try:
        for event in previous:  # first: what they stand for may be what is checked
            event.wait()
        check()
    except Exception as e:
        refusal = e
        record.failed = str(e) or type(e).__name__
    records = meet(gather, record)
    if refusal is not None:
        raise Refused(refusal)
    judge(records, rank)
    return records


def meet(gather: Gather, record: Record) -> list[Record]:
    """Everyone's record, by rank."""
    record.failed = record.failed[:_TEXT_CHARACTERS]
    while len(data := json.dumps(asdict(record)).encode()) > RECORD_BYTES and record.failed:
        record.failed = record.failed[: len(record.failed) * 3 // 4]
    assert len(data) <= RECORD_BYTES, "a record has outgrown its fixed size"
    own = torch.frombuffer(bytearray(data.ljust(RECORD_BYTES)), dtype=torch.uint8)
    return [Record(**json.loads(row.numpy().tobytes())) for row in gather(own)]


def all_gather(channel: RowChannel, num_ranks: int, own: torch.Tensor) -> torch.Tensor:
    """[R, n]: everyone's ``own`` [n]."""
    everyones = torch.empty((num_ranks, own.numel()), dtype=own.dtype, device="cpu")
    ones = [1] * num_ranks
    channel.all_to_all_single(everyones, own.expand(num_ranks, -1).contiguous(), ones, ones)
    return everyones


def judge(records: Sequence[Record], rank: int) -> None:
    """Raise on every rank where one cannot take part or two disagree. Nothing has moved: the buffer stays usable.

    Raises:
        EPArgumentError: ``ranks`` failed. EPMismatchError: ranks differ in ``field``.
    """
    op, seq = records[rank].op, records[rank].seq
    failed = [r for r, record in enumerate(records) if record.failed]
    if failed:
        first = records[failed[0]]
        message = f"{first.op} was refused on {name_ranks(failed)}: {first.failed}"
        raise EPArgumentError(message, op=op, phase="notify", seq=seq, ranks=failed)
    _same("operation", [record.op for record in records], op, seq)
    for name in dict.fromkeys(name for record in records for name in record.agree):
        _same(name, [record.agree.get(name, "not given") for record in records], op, seq)
    tokens = [record.tell.get("sent_minus_received", 0) for record in records]
    if sum(tokens) % 2**64:
        raise _differ("handle", tokens, op, seq)


def _same(name: str, values: Sequence[int | str], op: str, seq: int) -> None:
    if len(set(values)) > 1:
        raise _differ(name, values, op, seq)


def _differ(name: str, values: Sequence[int | str], op: str, seq: int) -> EPMismatchError:
    """In the sentence of csrc/protocol/agreement.cpp."""
    about = "what the exchange carries" if name == "carries" else name
    shown = ", ".join(f"rank {r}: {v}" for r, v in enumerate(values))
    if name == "handle":
        shown = "the handles of the ranks are not of one dispatch"
    order = name in ("operation", "carries", "handle")
    message = f"{op}: ranks disagree about {about}: {shown}{_C.same_order if order else _C.same_arguments}"
    ranks, by_rank = range(len(values)), dict(enumerate(values))
    return EPMismatchError(message, field=name, values=by_rank, op=op, phase="notify", seq=seq, ranks=ranks)
