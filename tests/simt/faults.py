"""What goes wrong, on the emulation and on shared memory: the same errors in the same words, on every rank, and what is
usable afterwards. A program: see conformance.py.

    PYTHONPATH=.:tests DEEP_EP_SIMT_LIBRARY=<build>/libdeep_ep_simt.so python -m simt.faults
"""

from __future__ import annotations

import torch
from simt import emulated

from deep_ep_py import ElasticBuffer
from deep_ep_py.errors import EPError
from deep_ep_py.testing import run_threads

EXPERTS, TOKENS, HIDDEN, TOPK = 6, 10, 24, 3
NONE = torch.tensor(99)  # no expert of that number


def inputs(rank, **changed):
    seeded = torch.Generator().manual_seed(rank)
    found = {
        "x": torch.randn(TOKENS, HIDDEN, generator=seeded),
        "topk_idx": torch.rand(TOKENS, EXPERTS, generator=seeded).topk(TOPK).indices,
        "num_experts": EXPERTS,
        "num_max_tokens_per_rank": TOKENS,
    }
    return found | changed


def works(buffer, rank):
    mine = inputs(rank)
    recv_x, _, _, handle, _ = buffer.dispatch(**mine)
    combined, _, _ = buffer.combine(recv_x, handle)
    home = torch.div(mine["topk_idx"], EXPERTS // buffer.num_ranks, rounding_mode="floor")
    times = torch.stack([(home == r).any(1) for r in range(buffer.num_ranks)]).sum(0)
    expected = torch.zeros_like(mine["x"])
    for _ in range(int(times.max())):
        expected = torch.where((times > 0)[:, None], expected + mine["x"], expected)
        times = times - 1
    assert torch.equal(combined, expected), "the round trip afterwards"


# Each: what one rank says in place of what all others say. The error is everybody's, and the buffer stays usable.
AGREED = {
    "a dtype": lambda mine: mine | {"topk_idx": mine["topk_idx"].int()},
    "an expert": lambda mine: mine | {"topk_idx": mine["topk_idx"].index_put((torch.tensor(4), torch.tensor(1)), NONE)},
    "hidden": lambda mine: mine | {"x": mine["x"][:, :-1].contiguous()},
    "experts": lambda mine: mine | {"num_experts": EXPERTS + 1},
    "alignment": lambda mine: mine | {"expert_alignment": 4},
    "expanded": lambda mine: mine | {"do_expand": True},
}


def agreed(group, backend, change):
    buffer = ElasticBuffer(group, backend=backend, num_cpu_timeout_secs=20)
    mine = inputs(group.rank)
    found = raised(lambda: buffer.dispatch(**(AGREED[change](mine) if group.rank == 1 else mine)))
    works(buffer, group.rank)
    buffer.destroy()
    return found


def raised(act):
    try:
        act()
    except EPError as e:
        return type(e).__name__, str(e), e.op, e.ranks
    return None


def without_sync(group):
    """Found behind the host's back: the next call raises, on every rank, and the one behind it works."""
    buffer = ElasticBuffer(group, backend="cuda_peer", num_cpu_timeout_secs=20)
    # More rows than the worst case has, since a token may name an expert twice, and this one does so all the time.
    repeated = torch.full((TOKENS, TOPK), 0)
    mine = inputs(group.rank, topk_idx=repeated, num_experts=group.size, do_cpu_sync=False, do_expand=True)
    buffer.dispatch(**mine)
    kind, text, op, _ = raised(lambda: buffer.dispatch(**inputs(group.rank)))
    assert (kind, op) == ("EPArgumentError", "dispatch"), (kind, op, text)
    assert "rank 0 receives" in text and "do_cpu_sync" in text, text
    works(buffer, group.rank)
    buffer.destroy()


def out_of_memory(group, operation):
    """One rank has none before it published anything: the others raise too, and all stay in step."""
    buffer = ElasticBuffer(group, backend="cuda_peer", num_cpu_timeout_secs=20)
    mine = inputs(group.rank, do_cpu_sync=False)
    recv_x, _, _, handle, _ = buffer.dispatch(**mine)
    machine = buffer._engine.backend._machine
    if group.rank == 1:

        def fail(*_):
            del machine._empty
            raise MemoryError("planted")

        machine._empty = fail
    act = {
        "dispatch": lambda: buffer.dispatch(**mine),
        "exact": lambda: buffer.dispatch(**inputs(group.rank)),
        "cached dispatch": lambda: buffer.dispatch(mine["x"], handle=handle),
        "combine": lambda: buffer.combine(recv_x.clone(), handle),
    }[operation]
    told = []
    for step in (act, lambda: buffer.barrier(with_cpu_sync=True)):  # where the call did not wait, the barrier looks
        try:
            step()
        except (EPError, MemoryError) as e:  # noqa: PERF203
            told.append(str(e))
    assert told and any(word in told[0] for word in ("planted", "cannot grow")), told
    works(buffer, group.rank)
    buffer.destroy()


def missing(group, backend):
    """Rank 1 does not come: the others name it, and their buffers are at an end."""
    buffer = ElasticBuffer(group, backend=backend, num_cpu_timeout_secs=1)
    if group.rank == 1:
        group.exchange(b"", timeout=30, what="the others have given up")
        return None
    found = [raised(lambda: buffer.dispatch(**inputs(group.rank))) for _ in range(2)]
    group.exchange(b"", timeout=30, what="the others have given up")
    assert found[0][0] == found[1][0] == "EPTimeoutError", found
    return found[0][0], found[0][2], found[0][3]


def main() -> None:
    emulated.install()
    torch.set_num_threads(1)
    for change in AGREED:
        on_host, on_device = (run_threads(2, agreed, backend, change) for backend in ("shm", "cuda_peer"))
        print(change, on_device, flush=True)
        assert None not in on_device
        assert on_device == on_host, (on_device, on_host)
    run_threads(3, without_sync)
    for operation in ("dispatch", "exact", "cached dispatch", "combine"):
        run_threads(2, out_of_memory, operation)
    on_host, on_device = (run_threads(3, missing, backend) for backend in ("shm", "cuda_peer"))
    assert on_device == on_host, (on_device, on_host)
    assert on_device[0] == ("EPTimeoutError", "dispatch", (1,)), on_device
    print("passed")


if __name__ == "__main__":
    main()
