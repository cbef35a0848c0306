"""Plans: where every row goes, as one rank knows it. One tensor of integers, so that it passes through whatever
carries tensors (an autograd graph, a compiled graph, a checkpointed region) and outlives the buffer that made it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from . import _C
from .errors import EPArgumentError

#: Bit of a plan's target: another, later slot of the token stands for the same row.
SHARED_ROW = 1 << 62

#: How a plan's columns are read. ``rank``: column r is destination rank r (V1). ``topk``: column k is slot k and a
#: destination's row is shared by all slots that select it (V2 compact). ``expand``: each slot has its own row.
PlanLayout = Literal["rank", "topk", "expand"]

#: What a packed plan on a GPU carries as an attribute: its header, as far as the host knows it.
_KNOWN = "_deep_ep_plan"

#: By the number that stands in the header.
LAYOUTS: tuple[PlanLayout, ...] = ("rank", "topk", "expand")


class Plan(NamedTuple):
    """A packed plan that has been read; see :meth:`of`. csrc/protocol/packed_plan.hpp has its form.

    Attributes:
        packed: int64, 1-D contiguous, where the rows are.
        layout_number: index in ``LAYOUTS``.
        num_tokens, num_slots: T and W.
        num_ranks, rank: R, and the rank whose plan this is.
        num_local: experts of this rank (0 where a V1 handle did not carry their counts).
        num_rows: rows of this rank's output that the plan fills or spans (expanded: alignment gaps included).
        num_output_rows: rows of the output tensors (``num_rows``, or the worst case where counts were not synced).
        num_recv_tokens: unique tokens received, N.
        digest: equal on all ranks for one plan; a function of every rank's routing, so that plans of different routings
            have different ones (layout ``rank``: of the counts alone). Guards against mixed-up handles.
        expert_alignment: the multiple at which expanded blocks start, and to which reported counts are rounded up.
        num_max_tokens_per_rank: M, the stride of global token indices in the metadata.
        num_domains: D where rows take two hops, across domains and inside one; 0 where they take one.
        num_relayed, relay_slots: tokens of other domains that this rank places for its rail; columns of their targets.
        recv_src_idx: of the plan behind a V1 handle on a CPU: [num_output_rows] int32, the received tokens' indices at
            their source. Its dispatch may still be writing it. Else None.

    On a GPU the header may be there alone: ``num_rows``, ``num_recv_tokens`` and ``digest`` are -1 where the host never
    waited for the counts.
    """

    packed: torch.Tensor
    layout_number: int
    num_tokens: int
    num_slots: int
    num_ranks: int
    rank: int
    num_local: int
    num_rows: int
    num_output_rows: int
    num_recv_tokens: int
    digest: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_domains: int
    num_relayed: int
    relay_slots: int
    recv_src_idx: torch.Tensor | None = None

    @classmethod
    def of(cls, packed: torch.Tensor, recv_src_idx: torch.Tensor | None = None) -> Plan:
        """Read a packed plan. On a GPU the host waits for the device to hand over header and counts, unless the tensor
        is the very one that :meth:`remember` returned.

        Raises:
            EPArgumentError: the tensor is no plan; or it would have to be read while a CUDA graph is captured.
        """
        if packed.dtype != torch.int64 or packed.dim() != 1 or not packed.is_contiguous():
            got = f"{packed.dtype} {list(packed.shape)} on {packed.device}"
            raise EPArgumentError.of("handle", "the plan of a dispatch: contiguous torch.int64 [n]", got)
        if packed.is_cpu:
            return cls(packed, *_C.read_plan(packed.data_ptr(), packed.numel()), recv_src_idx)
        known = getattr(packed, _KNOWN, None)
        if known is None:
            host = _header_on_host(packed)
            known = _C.read_plan(host.data_ptr(), host.numel())
        return cls(packed, *known)

    def remember(self) -> torch.Tensor:
        """``packed``; on a GPU it keeps what the host knows, for :meth:`of`, as long as it is this tensor and no copy.

        The numbers alone: with the plan itself, the tensor would hold itself.
        """
        if not self.packed.is_cpu:
            setattr(self.packed, _KNOWN, self[1:])
        return self.packed

    def sent_minus_received(self) -> int:
        """Hashes of the tokens that this rank sends minus hashes of those that it receives, for a V1 handle; else 0.
        They add up to 0 (modulo 2**64) over the ranks' plans of one dispatch. To be called behind that dispatch."""
        if self.recv_src_idx is None:
            return 0
        return _C.sent_minus_received(plan=self.packed.data_ptr(), recv_src_idx=self.recv_src_idx.data_ptr())

    @property
    def layout(self) -> PlanLayout:
        """How columns of ``targets`` are read."""
        return LAYOUTS[self.layout_number]

    @classmethod
    def pack(
        cls,
        *,
        layout: PlanLayout,
        targets: torch.Tensor,
        rank_prefix: torch.Tensor,
        expert_counts: torch.Tensor,
        rank: int,
        num_rows: int,
        num_output_rows: int,
        num_recv_tokens: int,
        digest: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        relay_counts: torch.Tensor | None = None,
        relay: torch.Tensor | None = None,
    ) -> Plan:
        """A plan from its parts: ``targets`` [T, W], ``rank_prefix`` [R, R], ``expert_counts`` [E_local]; over several
        domains ``relay_counts`` [D] and ``relay`` [n, W'] int64."""
        sizes = (*targets.shape, rank_prefix.shape[0], rank, expert_counts.numel())
        rest = (num_rows, num_output_rows, num_recv_tokens, digest, expert_alignment, num_max_tokens_per_rank)
        hops = (0, 0, 0) if relay_counts is None or relay is None else (relay_counts.shape[0], *relay.shape)
        words = (_C.plan_magic, LAYOUTS.index(layout), *sizes, *rest, *hops)
        header = torch.tensor(words, dtype=torch.int64, device=targets.device)
        counts = torch.cat([rank_prefix.flatten(), expert_counts]).to(torch.int32)
        if counts.numel() % 2:
            counts = torch.cat([counts, counts.new_zeros(1)])
        parts = [header, counts.view(torch.int64), targets.flatten()]
        if relay_counts is not None and relay is not None:
            parts += [relay_counts, relay.flatten()]
        packed = torch.cat(parts)
        return cls.of(packed) if packed.is_cpu else cls(packed, words[1], *words[2:])

    @property
    def targets(self) -> torch.Tensor:
        """[T, W] int64 (W: slots, or ranks for ``rank``): -1 where a token goes nowhere, else ``destination rank << 32
        | row in its output``, with bit 62 (``SHARED_ROW``) set on all but the last slot that shares a row: rows move
        and are added at the last one, weights are read at every one.
        """
        first = plan_words(0, 0, self.num_ranks, self.num_local)
        return self.packed[first : first + self.num_tokens * self.num_slots].view(self.num_tokens, self.num_slots)

    @property
    def relay_counts(self) -> torch.Tensor:
        """[D] int64: tokens that this rank relays for the rank of its rail in each domain; 0 for its own."""
        first = self.packed.numel() - self.num_relayed * self.relay_slots
        return self.packed[first - self.num_domains : first]

    @property
    def relay(self) -> torch.Tensor:
        """[num_relayed, relay_slots] int64: the targets, in this rank's domain, of the tokens that it relays: by origin
        domain ascending, then as the origin numbers them."""
        first = self.packed.numel() - self.num_relayed * self.relay_slots
        return self.packed[first:].view(self.num_relayed, self.relay_slots)

    @property
    def rank_prefix(self) -> torch.Tensor:
        """[R, R] int32, entry [s, r]: tokens that sources 0..s send to rank r."""
        return self._counts(0, self.num_ranks**2).view(self.num_ranks, self.num_ranks)

    @property
    def expert_counts(self) -> torch.Tensor:
        """[E_local] int32: received slots of each local expert, not aligned."""
        return self._counts(self.num_ranks**2, self.num_local)

    def copy_expert_counts(self) -> torch.Tensor:
        """``expert_counts``, in memory of their own; faster than a clone, which takes three views."""
        if not self.packed.is_cpu:
            return self.expert_counts.clone()
        counts = torch.empty(self.num_local, dtype=torch.int32, device="cpu")
        _C.copy_expert_counts(self.packed.data_ptr(), counts.data_ptr())
        return counts

    @property
    def rows_on_device(self) -> torch.Tensor:
        """[] int64: ``num_rows``, known or not."""
        return self.packed[_ROWS_WORD]

    def _counts(self, first: int, size: int) -> torch.Tensor:
        return self.packed[_C.plan_header_words :].view(torch.int32)[first : first + size]


#: The plan's fields are the header's words, but for the first of each.
_ROWS_WORD = Plan._fields.index("num_rows")


def _header_on_host(packed: torch.Tensor) -> torch.Tensor:
    """As long as ``packed``, on the CPU; header and counts alone are there, which is what reading checks."""
    if packed.is_cuda and torch.cuda.is_current_stream_capturing():
        raise EPArgumentError.of(
            "handle",
            "one whose sizes the host knows while a CUDA graph is captured: the tensors that dispatch returned, "
            "not copies of them",
            "a plan that would have to be read from the device, for which the host must wait",
        )
    host = torch.empty(packed.shape, dtype=torch.int64, device="cpu")
    read = min(_C.plan_header_words, packed.numel())
    host[:read] = packed[:read]
    if read == _C.plan_header_words:
        num_ranks, num_local = (int(host[Plan._fields.index(name)]) for name in ("num_ranks", "num_local"))
        # Nonsense leaves nothing to copy, or everything, and is found where the header is checked.
        words = min(max(plan_words(0, 0, num_ranks, num_local), read), packed.numel())
        host[read:words] = packed[read:words]
    return host


def plan_words(num_tokens: int, num_slots: int, num_ranks: int, num_local: int) -> int:
    """Elements of a packed plan. Not asked of the core, which checks it: compilers pass symbols for sizes."""
    return _C.plan_header_words + (num_ranks * num_ranks + num_local + 1) // 2 + num_tokens * num_slots
