"""How many bytes of heap a routing of a given size needs."""

from __future__ import annotations


def elastic_heap_bytes(num_ranks: int, num_max_tokens: int, hidden: int, num_topk: int, use_fp8: bool) -> int:
    """Heap of one rank with which a dispatch, its combine and one more dispatch of up to M tokens never grow it.

    Received rows (bf16, or fp8 with a float32 scale factor per 128 channels) and their ids and weights, one copy of the
    rows for a combine whose input lies elsewhere, and its result; 0 where the sizes are not named.
    """
    if num_max_tokens == 0 or hidden == 0:
        return 0
    bf16_row = 2 * hidden
    row = hidden + 4 * -(-hidden // 128) if use_fp8 else bf16_row
    small = 12 * max(num_topk, 8) + 64
    received = num_ranks * num_max_tokens
    slack = 1 << 20
    return received * (row + small) + received * (bf16_row + small) + 2 * num_max_tokens * bf16_row + slack
