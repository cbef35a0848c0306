"""The channel that carries device rows over NCCL, run over gloo and CPU tensors: all of it but NCCL's own calls."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from deep_ep_py._nccl import NcclRows, has_nccl
from deep_ep_py._rows import StagedRows, prefixed
from deep_ep_py.communicator import TorchCommunicator
from deep_ep_py.errors import EPPeerError, EPTimeoutError
from deep_ep_py.testing import Case, conformance_v1, conformance_v2, run_processes
from deep_ep_py.testing.conformance_v2 import Mode
from deep_ep_py.testing.worlds import store_of_processes

pytestmark = pytest.mark.processes


class GlooAsNccl:
    """A gloo group that lets its caller wait for ever, as NCCL's does, and is told how it ends."""

    def __init__(self, store, rank, size):
        self._group = dist.distributed_c10d.ProcessGroupGloo(store, rank, size, timedelta(seconds=600))
        self.ended = ""
        self.late_seconds = 0.0

    def alltoall_base(self, *args):
        return Late(self._group.alltoall_base(*args), self.late_seconds)

    def abort(self):
        self.ended = "aborted"

    def shutdown(self):
        self.ended = "shut down"


class Late:
    """A work whose end is noticed some time after it."""

    def __init__(self, work, seconds):
        self._work = work
        self._until = time.monotonic() + seconds

    def is_completed(self):
        return self._work.is_completed() and time.monotonic() >= self._until

    def wait(self, timeout):
        assert timeout > timedelta(0)
        self._work.wait(timeout)


class OverNcclRows(TorchCommunicator):
    """Every channel is one of NCCL's kind; ``opened`` counts those of all sessions."""

    def __init__(self, group, whole=None):
        super().__init__(group)
        self.opened = 0
        self._whole = whole or self

    def session(self):
        return OverNcclRows(self.group, self)

    def open_rows(self, *, timeout, device=torch.device("cpu")):  # noqa: B008
        store = prefixed(self._channel_key(), self._store)
        group = GlooAsNccl(prefixed("rows", store), self.rank, self.size)
        rows = NcclRows(group, self.rank, self.size, timeout, store=store)
        rows.connect(device)
        self._whole.opened += 1
        return rows


CASES = (
    Case((17, 5), num_experts=7, expert_alignment=4),
    Case((20, 21), hidden=128, dtype=torch.float8_e4m3fn, sf="f32", num_scales=1),
    Case((0, 7)),
    Case((31, 32, 33, 1), num_topk=16, num_experts=32),
    Case((12, 12, 12, 12), num_topk=2, num_experts=2),
)


def conform(group, cases):
    communicator, modes = OverNcclRows(group), (Mode(), Mode(expand=True), Mode(expand=True, sync=False))
    done = conformance_v1.check_batch(communicator, cases, "collective")
    done += conformance_v2.check_batch(communicator, tuple((c, m) for c in cases for m in modes), "collective")
    return done, communicator.opened


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_conformance(num_ranks):
    cases = tuple(case for case in CASES if case.num_ranks == num_ranks)
    expected = 4 * len(cases)
    for done, opened in run_processes(num_ranks, conform, cases):
        assert done == expected
        assert opened >= expected


def exchange(rows, size):
    mine, theirs = torch.arange(size), torch.empty(size, dtype=torch.int64)
    rows.all_to_all_single(theirs, mine, [1] * size, [1] * size)
    return theirs.tolist()


def opened(group, timeout):
    communicator = OverNcclRows(group)
    communicator.exchange(b"", timeout=20, what="test")
    rows = communicator.open_rows(timeout=timeout)
    inner = rows._group
    assert exchange(rows, group.size()) == [group.rank()] * group.size()
    return rows, inner


def late(group):
    """Rank 1 does not come: the others name it at the deadline, which their group has not, and abort the exchange."""
    rows, inner = opened(group, 1.0)
    store = store_of_processes()
    if group.rank() == 1:
        store.wait(["raised 0", "raised 2"])
        rows.close()
        return inner.ended
    start = time.monotonic()
    with pytest.raises(EPTimeoutError) as caught:
        exchange(rows, group.size())
    assert caught.value.ranks == (1,)
    assert time.monotonic() - start > 0.9
    with pytest.raises(EPTimeoutError):
        exchange(rows, group.size())
    store.set(f"raised {group.rank()}", "")
    rows.close()
    rows.close()
    return inner.ended


def test_rank_that_is_late():
    assert run_processes(3, late) == ["aborted", "shut down", "aborted"]


def leaves(group):
    """Rank 1 leaves, and the others wait for it: they hear of it long before the deadline."""
    rows, inner = opened(group, 60.0)
    store = store_of_processes()
    if group.rank() == 1:
        rows.close()
        store.wait(["raised 0", "raised 2"])
        return inner.ended
    start = time.monotonic()
    with pytest.raises(EPPeerError, match="left in the middle") as caught:
        exchange(rows, group.size())
    assert caught.value.ranks == (1,)
    assert time.monotonic() - start < 30, "at the deadline only"
    store.set(f"raised {group.rank()}", "")
    rows.close()
    return inner.ended


def test_rank_that_leaves():
    assert run_processes(3, leaves) == ["aborted", "shut down", "aborted"]


def parts(group):
    """Rank 1 is through with the last exchange and leaves; rank 0 has yet to see its end, and is not disturbed."""
    rows, inner = opened(group, 60.0)
    inner.late_seconds = 1.0 if group.rank() == 0 else 0.0
    assert exchange(rows, group.size()) == [group.rank()] * group.size()
    rows.close()
    time.sleep(2)
    return inner.ended


def test_parting_is_no_failure():
    assert run_processes(2, parts) == ["shut down", "shut down"]


def staged(group):
    """A group without NCCL carries device rows by way of the host."""
    assert not has_nccl(group, torch.device("cuda"))
    communicator = TorchCommunicator(group)
    assert not communicator.carries_cuda
    communicator.exchange(b"", timeout=20, what="test")
    rows = communicator.open_rows(timeout=20, device=torch.device("cuda"))
    assert isinstance(rows, StagedRows)
    found = exchange(rows, group.size())
    rows.close()
    return found


def test_group_without_nccl():
    assert run_processes(2, staged) == [[0, 0], [1, 1]]
