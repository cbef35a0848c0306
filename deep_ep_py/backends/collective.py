"""``collective``: rows move through any communicator's row exchange. The slow path that is always correct.

Every operation is a rendezvous (:mod:`._record`), then exchanges whose sizes every rank can compute. A dispatch sends a
row once to each destination, which copies it to its slots' rows; a combine asks each holder for the rows that the plan
names and adds them (:mod:`._recipe`). Memory is ordinary memory on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._rows import RowChannel
from ..communicator import Communicator
from ..errors import EPError
from ..event import CompletionEvent
from ..layout import target_rows
from ..settings import Settings
from ..types import Combined, CombineSpec, DispatchSpec
from ._checks import check_combine, check_dispatch, check_worst_case, combine_agrees_on, dispatch_agrees_on
from ._deliver import Delivery, allocate
from ._ordered import OrderedBackend
from ._recipe import combine_rows, combine_weights, positions
from ._record import all_gather
from ._routing import Counts, own_layout

__all__ = ["CollectiveBackend"]


class CollectiveBackend(OrderedBackend):
    """One rank's end. Construction is collective: it opens a row channel of its own.

    Raises:
        EPTimeoutError: a rank did not come to the construction within ``settings.connect_timeout_seconds``.
        EPBackendUnavailableError: the communicator cannot carry rows here.
    """

    name = "collective"

    def __init__(self, communicator: Communicator, settings: Settings) -> None:
        super().__init__(communicator.rank, communicator.size)
        communicator.exchange(b"", timeout=settings.connect_timeout_seconds, what="backend collective")
        self._channel: RowChannel = communicator.open_rows(timeout=settings.timeout_seconds)

    def _begin_dispatch(self, spec: DispatchSpec, previous: Sequence[CompletionEvent]) -> Delivery:
        agree = dispatch_agrees_on(spec)
        worst = -1 if spec.num_worst_tokens is None else spec.num_worst_tokens
        tell = {"num_worst_tokens": worst, "num_tokens": spec.x.shape[0]}
        op = "dispatch" if spec.plan is None else "cached dispatch"
        records = self._meet(op, agree, tell, lambda: check_dispatch(spec), previous)
        plan = spec.plan
        if plan is None:
            in_rank, per_expert = own_layout(spec, self.num_ranks)
            told = self._gather(torch.cat([in_rank.sum(0, dtype=torch.int64), per_expert]))
            self._statistics.rendezvous_with_counts += 1
            counts = Counts(spec, *told.split([self.num_ranks, per_expert.numel()], 1))
            check_worst_case(counts.rows_to.tolist(), [r.tell["num_worst_tokens"] for r in records], self._order.seq)
            targets = counts.route(spec, spec.topk_idx, spec.is_token_in_rank, self.rank)
            num_max_tokens = spec.num_max_tokens_per_rank or max(r.tell["num_tokens"] for r in records)
            plan = counts.plan(spec, targets, self.rank, num_max_tokens, self._order.seq)
        return Delivery(spec, allocate(spec, plan, self.num_ranks), self.rank, self.num_ranks, self._order.seq)

    def _deliver(self, delivery: Delivery) -> None:
        self._order.at = ("dispatch", "arrive", delivery.seq)
        delivery.run(self._channel)

    # Combine --------------------------------------------------------------------------------------------------------

    def _outputs(self, spec: CombineSpec) -> Combined:
        num_tokens, num_columns = spec.plan.num_tokens, spec.plan.num_slots
        combined_x = torch.empty((num_tokens, spec.y.shape[-1]), dtype=spec.y.dtype, device="cpu")
        weights = None
        if spec.weights is not None:
            num_topk = num_columns if spec.plan.layout == "expand" else spec.weights.shape[-1]
            weights = torch.empty((num_tokens, num_topk), dtype=spec.weights.dtype, device="cpu")
        return Combined(combined_x, weights)

    def _combine(self, spec: CombineSpec, previous: Sequence[CompletionEvent], result: Combined) -> None:
        self._meet("combine", combine_agrees_on(spec), {}, lambda: check_combine(spec), previous)
        self._order.enter("pull")
        index, wanted, position = positions(spec.plan, self.num_ranks)
        ones = [1] * self.num_ranks
        asked_of_me = torch.empty(self.num_ranks, dtype=torch.int64, device="cpu")
        asked = torch.tensor(wanted, dtype=torch.int64, device="cpu")
        self._channel.all_to_all_single(asked_of_me, asked, ones, ones)
        given = asked_of_me.tolist()
        rows_of_mine = torch.empty(sum(given), dtype=torch.int64, device="cpu")
        rows = target_rows(spec.plan.targets).reshape(-1)[index]
        self._channel.all_to_all_single(rows_of_mine, rows, given, wanted)

        def pull(mine: torch.Tensor) -> torch.Tensor:
            out = torch.empty((sum(wanted), mine.shape[1]), dtype=mine.dtype, device="cpu")
            self._channel.all_to_all_single(out, mine.index_select(0, rows_of_mine), wanted, given)
            return out

        pulled = pull(spec.y)
        combine_rows(result.combined_x, pulled, spec.plan, position, spec.bias, spec.reduce_per_rank)
        if spec.weights is not None and result.combined_topk_weights is not None:
            weights = spec.weights if spec.weights.dim() == 2 else spec.weights[:, None]
            combine_weights(result.combined_topk_weights, pull(weights), spec.plan, position)

    # The rest -------------------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")

    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        return all_gather(self._channel, self.num_ranks, own)

    def _tell_peers(self, error: EPError) -> None:  # noqa: ARG002
        self._channel.close()

    def _release(self) -> None:
        self._channel.close()
