"""Memory that is not what was announced is refused before anything in it is trusted."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct

import pytest
from fault_world import leftovers

from deep_ep_py import _C
from deep_ep_py.errors import EPError

EPOCH, RANKS = 1234567, 2


def engine(rank: int, epoch: int = EPOCH, num_ranks: int = RANKS):
    return _C.Engine(
        epoch=epoch,
        rank=rank,
        num_ranks=num_ranks,
        timeout_seconds=2.0,
        spin_microseconds=0.0,
        max_heap_bytes=0,
        heap_bytes=0,
        num_threads=1,
    )


def forged(template: int, size: int, *, seal: bool = True, change: tuple[int, bytes] | None = None) -> int:
    """A descriptor of memory that begins like the segment ``template``, but for what is changed."""
    fd = os.memfd_create("forged", os.MFD_ALLOW_SEALING)
    with mmap.mmap(os.dup(template), 4096, prot=mmap.PROT_READ) as original:
        head = bytearray(original[:128])
    if change is not None:
        head[change[0] : change[0] + len(change[1])] = change[1]
    os.ftruncate(fd, size)
    os.pwrite(fd, head, 0)
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


@pytest.fixture
def pair():
    one, two = engine(0), engine(1)
    yield one, two
    one.close(grace_seconds=0.0)
    two.close(grace_seconds=0.0)


def test_the_right_ones_connect(pair):
    ends = [e.endpoint() for e in pair]
    for e in pair:
        e.connect(ends)


def test_a_perfect_forgery_is_the_control_of_the_tests_below(pair):
    pid, fd, size = pair[1].endpoint()
    pair[0].connect([pair[0].endpoint(), (pid, forged(fd, size), size)])


@pytest.mark.parametrize(
    ("field", "offset", "value"),
    [
        ("magic", 0, struct.pack("<Q", 1)),
        ("version", 8, struct.pack("<I", 99)),
        ("kind", 12, struct.pack("<I", 2)),
        ("epoch", 16, struct.pack("<Q", EPOCH + 1)),
        ("rank", 24, struct.pack("<i", 0)),
        ("num_ranks", 28, struct.pack("<i", 3)),
        ("id", 32, struct.pack("<Q", 1)),
        ("bytes", 40, struct.pack("<Q", 4096)),
    ],
)
def test_corrupt_header(pair, field, offset, value):
    pid, fd, size = pair[1].endpoint()
    fake = forged(fd, size, change=(offset, value))
    try:
        with pytest.raises(EPError, match="foreign, stale or corrupt") as caught:
            pair[0].connect([pair[0].endpoint(), (pid, fake, size)])
        assert "rank 1" in str(caught.value)
    finally:
        os.close(fake)


def test_memory_that_could_shrink(pair):
    pid, fd, size = pair[1].endpoint()
    fake = forged(fd, size, seal=False)
    try:
        with pytest.raises(EPError, match="sealed against shrinking"):
            pair[0].connect([pair[0].endpoint(), (pid, fake, size)])
    finally:
        os.close(fake)


@pytest.mark.parametrize("change", [-4096, 4096])
def test_another_size(pair, change):
    pid, fd, size = pair[1].endpoint()
    fake = forged(fd, size + change)
    try:
        with pytest.raises(EPError, match="is not ours"):
            pair[0].connect([pair[0].endpoint(), (pid, fake, size)])
    finally:
        os.close(fake)


def test_a_file_of_another_kind(pair, tmp_path):
    pid, _, size = pair[1].endpoint()
    reader, writer = os.pipe()
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    with path.open("r+b") as file:
        for fd in (reader, file.fileno()):
            with pytest.raises(EPError, match="rank 1"):
                pair[0].connect([pair[0].endpoint(), (pid, fd, size)])
    os.close(reader)
    os.close(writer)


def test_stale_memory_of_an_earlier_buffer(pair):
    earlier = engine(1, epoch=EPOCH - 1)
    with pytest.raises(EPError, match="stale"):
        pair[0].connect([pair[0].endpoint(), earlier.endpoint()])
    pid, fd, size = earlier.endpoint()
    earlier.close(grace_seconds=0.0)
    del earlier
    with pytest.raises(EPError, match="rank 1"):
        pair[0].connect([pair[0].endpoint(), (pid, fd, size)])


def test_a_process_that_is_gone(pair):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    _, fd, size = pair[1].endpoint()
    with pytest.raises(EPError, match="rank 1"):
        pair[0].connect([pair[0].endpoint(), (child, fd, size)])


def test_refusals_leave_nothing():
    before = len(leftovers())
    for _ in range(20):
        one, two = engine(0), engine(1, epoch=EPOCH + 1)
        with pytest.raises(EPError):
            one.connect([one.endpoint(), two.endpoint()])
        del one, two
    assert len(leftovers()) <= before
