"""``collective``: rows move through any communicator's row exchange. The slow path that is always correct.

Every operation is a rendezvous (:mod:`._record`), then exchanges whose sizes every rank can compute. A dispatch sends a
row once to each destination, which copies it to its slots' rows; a combine asks each holder for the rows that the plan
names and adds them (:mod:`._recipe`).

Records, counts and routings are the CPU's, wherever tensors lie. Rows on a GPU stay there: they travel over a channel
of their own (:mod:`.._nccl`), and what is done to them is done on the communication stream. Top-k ids, and the plan of
a cached dispatch or a combine, are copied to the host first, and the host waits for each exchange. So a call always
waits for the device, and none can be captured in a CUDA graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .._rows import CPU, RowChannel
from ..communicator import Communicator
from ..errors import EPBackendUnavailableError, EPError
from ..event import CompletionEvent
from ..layout import target_rows
from ..settings import Settings
from ..types import Combined, CombineSpec, DispatchSpec
from ._checks import check_combine, check_dispatch, check_worst_case, combine_agrees_on, dispatch_agrees_on, told_of
from ._deliver import Delivery, allocate
from ._ordered import OrderedBackend
from ._recipe import combine_rows, combine_weights, positions
from ._record import Record, all_gather
from ._routing import Counts, on_host, own_layout, routing_hash, routing_on_host

__all__ = ["CollectiveBackend"]


class CollectiveBackend(OrderedBackend):
    """One rank's end. Construction is collective: it opens row channels of its own.

    Args:
        device: where tensors of calls and results lie.

    Raises:
        EPTimeoutError: a rank did not come to the construction within ``settings.connect_timeout_seconds``.
        EPBackendUnavailableError: the communicator cannot carry rows here.
    """

    name = "collective"

    def __init__(self, communicator: Communicator, settings: Settings, device: torch.device = CPU) -> None:
        super().__init__(communicator.rank, communicator.size, device)
        self._statistics.wait_seconds = {r: 0.0 for r in range(self.num_ranks) if r != self.rank}
        self._gathered = self._waited = 0.0  # seconds: the last gather; the gather of the last operation's records
        communicator.exchange(b"", timeout=settings.connect_timeout_seconds, what="backend collective")
        self._channel = communicator.open_rows(timeout=settings.timeout_seconds)
        #: Of what lies on the device.
        self._rows = self._channel if device.type == "cpu" else self._open_rows(communicator, settings)

    def _open_rows(self, communicator: Communicator, settings: Settings) -> RowChannel:
        """What does not connect for one rank is everybody's affair: the others must not go on without it."""
        rows, refusal = None, ""
        try:
            rows = communicator.open_rows(timeout=settings.timeout_seconds, device=self.device)
        except EPBackendUnavailableError as e:
            refusal = e.reasons.get("collective", str(e))
        timeout, what = settings.connect_timeout_seconds, "device rows"
        answers = communicator.exchange(refusal.encode(), timeout=timeout, what=what)
        failed = {r: a.decode() for r, a in enumerate(answers) if a}
        if rows is None or failed:
            for channel in (rows, self._channel):
                if channel is not None:
                    channel.close()
            why = f"rows on {self.device}: {failed}"
            raise EPBackendUnavailableError(f"collective: {why}", reasons={"collective": why})
        return rows

    def _begin_dispatch(self, given: DispatchSpec, previous: Sequence[CompletionEvent]) -> Delivery:
        agree: dict[str, int | str] = {}
        worst = -1 if given.num_worst_tokens is None else given.num_worst_tokens
        tell = {"num_worst_tokens": worst, "num_tokens": given.x.shape[0], **told_of(given.plan)}
        spec = given

        def check() -> None:
            nonlocal spec
            spec = routing_on_host(given)
            agree.update(dispatch_agrees_on(spec))
            check_dispatch(spec)
            tell["routing"] = routing_hash(spec)

        op = "dispatch" if given.plan is None else "cached dispatch"
        records = self._meet(op, agree, tell, check, previous)
        plan = spec.plan
        if plan is None:
            in_rank, per_expert = own_layout(spec, self.num_ranks)
            told = self._gather(torch.cat([in_rank.sum(0, dtype=torch.int64), per_expert]))
            self._statistics.rendezvous_with_counts += 1
            counts = Counts(spec, *told.split([self.num_ranks, per_expert.numel()], 1))
            check_worst_case(counts.rows_to.tolist(), [r.tell["num_worst_tokens"] for r in records], self._order.seq)
            targets = counts.route(spec, spec.topk_idx, spec.is_token_in_rank, self.rank)
            num_max_tokens = spec.num_max_tokens_per_rank or max(r.tell["num_tokens"] for r in records)
            plan = counts.plan(spec, targets, self.rank, num_max_tokens, [r.tell["routing"] for r in records])
        result = allocate(given, plan, self.num_ranks)
        return Delivery(given, result, plan, self.rank, self.num_ranks, self._order.seq)

    def _deliver(self, delivery: Delivery) -> None:
        self._order.at = ("dispatch", "arrive", delivery.seq)
        delivery.run(self._rows)

    # Combine --------------------------------------------------------------------------------------------------------

    def _outputs(self, spec: CombineSpec) -> Combined:
        num_tokens, num_columns = spec.plan.num_tokens, spec.plan.num_slots
        combined_x = torch.empty((num_tokens, spec.y.shape[-1]), dtype=spec.y.dtype, device=self.device)
        weights = None
        if spec.weights is not None:
            num_topk = num_columns if spec.plan.layout == "expand" else spec.weights.shape[-1]
            weights = torch.empty((num_tokens, num_topk), dtype=spec.weights.dtype, device=self.device)
        return Combined(combined_x, weights)

    def _combine(self, spec: CombineSpec, previous: Sequence[CompletionEvent], result: Combined) -> None:
        agree: dict[str, int | str] = {}

        def check() -> None:
            known = replace(spec, plan=on_host(spec.plan))
            agree.update(combine_agrees_on(known, spec.reduce_per_rank))
            check_combine(known)

        self._meet("combine", agree, told_of(spec.plan), check, previous)
        self._order.enter("pull")
        index, wanted, position = positions(spec.plan, self.num_ranks)
        ones = [1] * self.num_ranks
        asked_of_me = torch.empty(self.num_ranks, dtype=torch.int64, device="cpu")
        asked = torch.tensor(wanted, dtype=torch.int64, device="cpu")
        self._channel.all_to_all_single(asked_of_me, asked, ones, ones)
        given = asked_of_me.tolist()
        rows_of_mine = torch.empty(sum(given), dtype=torch.int64, device=self.device)
        rows = target_rows(spec.plan.targets).reshape(-1)[index]
        self._rows.all_to_all_single(rows_of_mine, rows, given, wanted)

        def pull(mine: torch.Tensor) -> torch.Tensor:
            out = torch.empty((sum(wanted), mine.shape[1]), dtype=mine.dtype, device=self.device)
            self._rows.all_to_all_single(out, mine.index_select(0, rows_of_mine), wanted, given)
            return out

        pulled = pull(spec.y)
        combine_rows(result.combined_x, pulled, spec.plan, position, spec.bias, spec.reduce_per_rank)
        if spec.weights is not None and result.combined_topk_weights is not None:
            weights = spec.weights if spec.weights.dim() == 2 else spec.weights[:, None]
            combine_weights(result.combined_topk_weights, pull(weights), spec.plan, position)

    # The rest -------------------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        begin = time.monotonic()
        everyones = all_gather(self._channel, self.num_ranks, own)
        self._gathered = time.monotonic() - begin
        return everyones

    def _meet(
        self,
        op: str,
        agree: dict[str, int | str],
        tell: dict[str, Any],
        check: Callable[[], None] = lambda: None,
        previous: Sequence[CompletionEvent] = (),
    ) -> list[Record]:
        """Nobody sees who came last to an exchange of all ranks, but that rank waited least: each tells in its next
        record how long it waited."""
        tell["waited"] = self._waited
        records = super()._meet(op, agree, tell, check, previous)
        waits = [r.tell["waited"] for r in records]
        last = waits.index(min(waits))
        if last != self.rank:
            self._statistics.wait_seconds[last] += waits[self.rank] - waits[last]
        self._waited = self._gathered
        return records

    def _tell_peers(self, error: EPError) -> None:  # noqa: ARG002
        self._release()

    def _release(self) -> None:
        self._rows.close()
        self._channel.close()
