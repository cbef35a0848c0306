"""What a user without this library writes: ``dist.all_to_all_single`` over gloo, with permutes in torch.

Included, as V2's calls include it: finding destinations in topk_idx, the exchange of counts, ids and weights beside the
rows. Ids and weights travel together in one exchange. Two forms:

- :class:`GlooPeer`, as it is usually written: fresh tensors in every call (sizes change from step to step), and a sum
  in float32 by ``index_add_``, rounded once: the numerics of this library.
- :class:`TunedGlooPeer`: buffers allocated once, at their exact size, warm; and a sum by ``embedding_bag``, of six ways
  to write it in torch the fastest on CPU, although it rounds to bfloat16 after every addition.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .routing import Problem, all_rows


class GlooPeer:
    def __init__(self, problem: Problem, fp8: bool = False) -> None:
        shape, me = problem.shape, problem.rank
        self._problem, self._fp8 = problem, fp8
        sent = sum(problem.counts[me])
        payload = _packed(*problem.fp8_x) if fp8 else problem.x
        self._x = payload
        self._meta = torch.cat([problem.topk_idx.view(torch.uint8), problem.topk_weights.view(torch.uint8)], 1)
        self._send_x, self._recv_x = (payload.new_empty((n, payload.shape[1])) for n in (sent, problem.num_recv))
        width = 12 * shape.num_topk
        self._send_meta, self._recv_meta = (
            torch.empty((n, width), dtype=torch.uint8) for n in (sent, problem.num_recv)
        )
        for buffer in (self._send_x, self._recv_x, self._send_meta, self._recv_meta):
            buffer.zero_()

    def _prepare(self, tokens: Tensor, num_received: int) -> None:
        """Send buffers filled, receive buffers ready."""
        self._send_x, self._send_meta = self._x[tokens], self._meta[tokens]
        self._recv_x, self._recv_meta = (b.new_empty((num_received, b.shape[1])) for b in (self._x, self._meta))

    def _sum(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """[T, H]: each token's rows added."""
        total = torch.zeros((self._problem.shape.num_tokens, rows.shape[1]), dtype=torch.float32)
        return total.index_add_(0, tokens, rows.float()).to(rows.dtype)

    def _back(self) -> Tensor:
        return torch.empty_like(self._send_x)

    def dispatch(self) -> tuple[list[int], list[int], Tensor]:
        """Returns what combine needs: rows received and sent per rank, and the source token of each sent row."""
        p = self._problem
        share = p.shape.num_experts // p.size
        in_rank = torch.zeros((p.shape.num_tokens, p.size), dtype=torch.bool)
        in_rank.scatter_(1, p.topk_idx // share, True)
        tokens = in_rank.t().nonzero()[:, 1]
        send_counts = in_rank.sum(0)
        recv_counts = torch.empty_like(send_counts)
        dist.all_to_all_single(recv_counts, send_counts)
        sent, received = send_counts.tolist(), recv_counts.tolist()
        self._prepare(tokens, sum(received))
        dist.all_to_all_single(self._recv_x, self._send_x, received, sent)
        dist.all_to_all_single(self._recv_meta, self._send_meta, received, sent)
        return received, sent, tokens

    def combine(self, received: list[int], sent: list[int], tokens: Tensor) -> Tensor:
        """A plain sum of each token's rows. The rows are those dispatched."""
        back = self._back()
        dist.all_to_all_single(back, self._recv_x, sent, received)
        return self._sum(tokens, back)

    def check(self) -> str:
        """Empty, or what is wrong."""
        p = self._problem
        source, token = p.received()
        got = self.dispatch()

        def same_rows(at: slice) -> bool:
            rows = p.fp8_rows if self._fp8 else p.rows
            expected = rows(source[at], token[at])
            return torch.equal(self._recv_x[at], _packed(*expected) if isinstance(expected, tuple) else expected)

        if not all_rows(len(source), same_rows):
            return "gloo: dispatch delivers other rows"
        if self._fp8:
            return ""
        self._recv_x.mul_(p.scale(p.rank))
        combined = self.combine(*got)

        def near(at: slice) -> bool:
            # A token's rows differ by positive factors, so nothing cancels, and each addition errs by one unit at most.
            return torch.allclose(combined[at], p.combined(False, at), rtol=p.size * 2.0**-7, atol=0.0)

        return "" if all_rows(len(p.x), near) else "gloo: combine returns another sum"


class TunedGlooPeer(GlooPeer):
    def _prepare(self, tokens: Tensor, num_received: int) -> None:
        torch.index_select(self._x, 0, tokens, out=self._send_x)
        torch.index_select(self._meta, 0, tokens, out=self._send_meta)

    def _back(self) -> Tensor:
        return self._send_x  # its rows are on their way already

    def _sum(self, tokens: Tensor, rows: Tensor) -> Tensor:
        by_token = torch.argsort(tokens, stable=True)
        per_token = torch.bincount(tokens, minlength=self._problem.shape.num_tokens)
        offsets = torch.cumsum(per_token, 0) - per_token
        return torch.nn.functional.embedding_bag(by_token, rows, offsets, mode="sum")


def _packed(rows: Tensor, sf: Tensor) -> Tensor:
    """fp8 rows and their scale factors as one row of bytes: one exchange and one permute less for the user."""
    return torch.cat([rows.view(torch.uint8), sf.view(torch.uint8)], 1)
