"""V1's ``Config``. Its chunk sizes mean nothing here; they are checked and kept, so that programs run unchanged."""

from __future__ import annotations

from .errors import EPArgumentError
from .validate import whole


class Config:
    """Performance knobs of V1's dispatch and combine.

    Args:
        num_sms: upper bound of copy threads on a CPU, of multiprocessors on a GPU; 0: the backend's choice.
        num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens: chunks inside a domain; the first is smaller.
        num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens: chunks across domains; the first is smaller,
            the second is rounded up to a multiple of the first.

    Raises:
        EPArgumentError: a value below 1, or a send chunk not below its receive chunk.
    """

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        self.num_sms = whole("num_sms", num_sms, 0)
        nvl = _chunks("nvl", num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens)
        self.num_max_nvl_chunked_send_tokens, self.num_max_nvl_chunked_recv_tokens = nvl
        send, recv = _chunks("rdma", num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens)
        self.num_max_rdma_chunked_send_tokens = send
        self.num_max_rdma_chunked_recv_tokens = -(-recv // send) * send

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes to start a heap with; always positive. The heap grows where it proves too small.

        Room for one receive chunk of every rank, with scale factors, ids and weights of 128 slots beside each row.
        """
        row = whole("hidden_bytes", hidden_bytes, 0) + hidden_bytes // 32 + 128 * 12 + 64
        ranks = whole("num_ranks", num_ranks, 1)
        return ranks * self.num_max_nvl_chunked_recv_tokens * row

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes to set aside for rows that cross domains: 0, since they pass through the same heap, which grows."""
        whole("hidden_bytes", hidden_bytes, 0)
        whole("num_ranks", num_ranks, 1)
        return 0


def _chunks(kind: str, send: int, recv: int) -> tuple[int, int]:
    send = whole(f"num_max_{kind}_chunked_send_tokens", send, 1)
    recv = whole(f"num_max_{kind}_chunked_recv_tokens", recv, 1)
    if send >= recv:
        raise EPArgumentError.of(f"num_max_{kind}_chunked_send_tokens", f"below the receive chunk, {recv}", send)
    return send, recv


def cuda_kernels_built() -> bool:
    """Whether this build has CUDA kernels; says nothing of a GPU."""
    from .backends import _cuda_library

    return _cuda_library.built()
