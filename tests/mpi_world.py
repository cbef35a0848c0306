"""One rank of ``mpirun``: ``mpi_world.py <folder> <scene> ...``, led by test_mpi.py.

A scene gets ``MPI.COMM_WORLD`` and returns what it saw, which is written to ``<folder>/<scene>.<rank>.json``. A rank
that fails writes its traceback there and ends the job.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from mpi4py import MPI
from test_communicator import BODIES

from deep_ep_py._mpi import MpiRows, is_mpi, mpi_communicator
from deep_ep_py.buffer import Buffer
from deep_ep_py.errors import EPArgumentError, EPPeerError, EPTimeoutError
from deep_ep_py.settings import Settings
from deep_ep_py.testing import Case
from deep_ep_py.testing import conformance_v1 as v1
from deep_ep_py.testing import conformance_v2 as v2

DTYPES = (
    *(torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
FOLDER = Path(sys.argv[1])


# Nothing goes wrong ---------------------------------------------------------------------------------------------------


def contract(world):
    """What communicators of threads and of torch hold to."""
    for body in BODIES:
        body(mpi_communicator(world))


def one_duplicate(world):
    assert is_mpi(world)
    assert not is_mpi(world.rank)
    first, again, other = mpi_communicator(world), mpi_communicator(world), mpi_communicator(world.Dup())
    assert first._duplicate is again._duplicate is not other._duplicate
    for c in (other, first):
        c.exchange(b"", timeout=20, what="one duplicate")
    assert MPI.Comm.Compare(first._duplicate.comm, world) == MPI.CONGRUENT
    assert first._duplicate.comm.Get_errhandler() == MPI.ERRORS_RETURN
    for refused in (MPI.COMM_NULL, None):
        with pytest.raises(EPArgumentError):
            mpi_communicator(refused)


def bytes_of_rows(source, target, number):
    """[rows, 16]: what ``source`` sends to ``target`` in its transfer ``number``; every rank can compute it."""
    generator = random.Random(f"{source} {target} {number}")
    rows = generator.choice([0, 0, 1, 3, 40])
    return torch.tensor(list(generator.randbytes(16 * rows)), dtype=torch.uint8).reshape(rows, 16)


def post(channel, rank, size, number, dtype):
    """Start transfer ``number``; returns it with what it will bring and what that must be."""
    sent = [bytes_of_rows(rank, r, number) for r in range(size)]
    wanted = [bytes_of_rows(r, rank, number) for r in range(size)]
    if dtype is torch.bool:
        sent, wanted = [t & 1 for t in sent], [t & 1 for t in wanted]
    out = [torch.zeros_like(t).view(dtype) for t in wanted]
    return channel.start(out, [t.view(dtype) for t in sent]), out, wanted


def same_bytes(rank, out, wanted):
    return all(torch.equal(out[r].view(torch.uint8), wanted[r]) for r in range(len(out)) if r != rank)


def many_transfers(world):
    """Random splits, zero rows, every dtype; several transfers under way on two channels, one of them in pieces."""
    c = mpi_communicator(world)
    c.exchange(b"", timeout=20, what="rows")
    whole, pieces = c.open_pairs(timeout=20), c.open_pairs(timeout=20)
    pieces.piece_bytes = 100
    assert MpiRows.piece_bytes == 1 << 30
    moved = 0
    for turn in range(3):
        under_way = []
        for i, dtype in enumerate(DTYPES):
            order = (whole, pieces) if c.rank % 2 else (pieces, whole)  # channels are mutually unordered
            both = ((channel, (turn, i, channel is whole)) for channel in order)
            under_way += [post(channel, c.rank, c.size, number, dtype) for channel, number in both]
        for transfer, out, wanted in under_way:
            transfer.wait()
            assert transfer.done()
            assert same_bytes(c.rank, out, wanted)
            transfer.wait()
            moved += sum(map(len, out))
    assert not whole._under_way
    transfer, out, wanted = post(whole, c.rank, c.size, 9, torch.float32)
    until = time.monotonic() + 20
    while not transfer.done():
        assert time.monotonic() < until
    assert same_bytes(c.rank, out, wanted)
    for channel in (whole, pieces):
        channel.close()
        channel.close()
        with pytest.raises(EPPeerError):
            channel.start(out, out)
    return moved


def subsets(world):
    """Two halves at the same time, then reversed pairs, then all; constructions of one do not count in the others."""
    c = mpi_communicator(world)
    c.exchange(b"", timeout=20, what="all")
    halves = [r for r in range(c.size) if r % 2 == c.rank % 2]
    pair = sorted((c.rank, c.rank ^ 1), reverse=True)
    for turn, members in enumerate((halves, pair, range(c.size))):
        some = c.subset(members)
        assert (some.rank, some.size) == (list(members).index(c.rank), len(members))
        for _ in range(1 + (turn == 0 and c.rank % 2)):  # one half constructs once more
            wanted = [b"%d" % r for r in members]
            assert some.session().exchange(b"%d" % c.rank, timeout=20, what="some") == wanted
        channel = some.open_pairs(timeout=20)
        transfer, out, wanted = post(channel, some.rank, some.size, turn, torch.float32)
        transfer.wait()
        assert same_bytes(some.rank, out, wanted)
        channel.close()
    inner = c.subset([1, 2, 3]).subset([2, 0]) if c.rank in (1, 3) else None
    if inner is not None:
        assert inner.exchange(b"%d" % c.rank, timeout=20, what="inner") == [b"3", b"1"]


def oracle(world):
    """Round trips of both faces on `collective`, two buffers at a time."""
    tokens = (5, 0, 17, 8)
    cases = (Case(tokens), Case(tokens, dtype=torch.float32, num_experts=6, routing="duplicates"))
    first, second = mpi_communicator(world), mpi_communicator(world)
    with v1.open_buffer(first, "collective"):
        assert v1.check_batch(second, cases, "collective") == len(cases)
    fp8 = Case(tokens, dtype=torch.float8_e4m3fn, sf="f32")
    modes = ((cases[0], v2.Mode()), (cases[1], v2.Mode(expand=True, multiple=False)), (fp8, v2.Mode(expand=True)))
    with v2.open_buffer(first, "collective"):
        assert v2.check_batch(second, modes, "collective") == len(modes)


# Ranks do not come, are interrupted, stop -----------------------------------------------------------------------------


def never_came(world):
    """The last rank does not come to the very first construction, when there is no duplicate yet."""
    comm = world.Dup()
    late = world.size - 1
    if world.rank == late:
        time.sleep(2.0)
        seen = None
    else:
        with pytest.raises(EPTimeoutError) as caught:
            mpi_communicator(comm).exchange(b"", timeout=1.0, what="Buffer")
        seen = [list(caught.value.ranks), caught.value.op, caught.value.phase, str(caught.value)]
    c = mpi_communicator(comm)
    assert c.exchange(b"%d" % c.rank, timeout=20, what="Buffer") == [b"%d" % r for r in range(c.size)]
    return seen


def interrupted(world):
    """Ctrl-C on rank 0, which waits for the last rank: first in an exchange, then for rows. The others hear of it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    comm = world.Dup()
    last = world.size - 1
    c = mpi_communicator(comm)
    c.exchange(b"", timeout=20, what="first")

    def wait_for_the_last(wait, error):
        start = time.monotonic()
        if c.rank == 0:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                wait()
            seen = None
        else:
            with pytest.raises(error) as caught:
                wait()
            seen = [type(caught.value).__name__, list(caught.value.ranks)]
        assert time.monotonic() - start < 20, "at the deadline only"
        return seen

    seen = []
    if c.rank != last:
        seen.append(wait_for_the_last(lambda: c.exchange(b"", timeout=30, what="interrupted"), EPTimeoutError))
    world.Barrier()
    if c.rank == last:
        with pytest.raises(EPTimeoutError):
            c.exchange(b"", timeout=30, what="interrupted")
    c.exchange(b"", timeout=20, what="again")
    channel = c.open_pairs(timeout=30)
    one, none = torch.ones(1), torch.ones(0)
    if c.rank != last:
        # Rank 0 waits for rows of the last rank only, and is gone before it begins what the others wait for.
        outputs = [one.clone() if r == last or c.rank else none for r in range(c.size)]
        transfer = channel.start(outputs, [one if c.rank else none] * c.size)
        try:
            seen.append(wait_for_the_last(transfer.wait, EPPeerError))
        finally:
            channel.close()
        assert transfer.done()
        with pytest.raises(EPPeerError):
            transfer.wait()
    channel.close()
    world.Barrier()
    return seen


def how_it_ends(transfer):
    try:
        transfer.wait()
    except EPTimeoutError as e:
        return [list(e.ranks), e.seconds]


def deadline_of_rows(world):
    """Rank 2 is there and starts nothing. Everyone waits for its rows; rank 1 also for it to take what it sends."""
    c = mpi_communicator(world)
    c.exchange(b"", timeout=20, what="rows")
    receiving, sending = c.open_pairs(timeout=1.0), c.open_pairs(timeout=1.0)
    seen = []
    if c.rank != 2:
        few, none = torch.ones(1), torch.ones(0)
        many = torch.ones(1 << 20)  # no library sends so much before the receiver has asked for it
        transfers = [
            receiving.start([torch.zeros(1) for _ in range(c.size)], [few] * c.size),
            sending.start([none] * c.size, [none, none, many if c.rank == 1 else none, none]),
        ]
        seen = [how_it_ends(transfer) for _ in range(2) for transfer in transfers]
        assert all(t.done() for t in transfers)
        with pytest.raises(EPTimeoutError):
            receiving.start([none] * c.size, [none] * c.size)
        assert max(range(c.size), key=receiving.waited.__getitem__) == 2
    for channel in (receiving, sending):
        channel.close()
    world.Barrier()
    return seen


def stopped(world):
    """The last rank stops in a loop of dispatches; the test wakes it when the others have told what they saw."""
    (FOLDER / f"pid.{world.rank}").write_text(str(os.getpid()))
    settings = Settings(timeout_seconds=2.0, connect_timeout_seconds=20.0)
    case = Case((4,) * world.size)
    buffer = Buffer(mpi_communicator(world), backend="collective", settings=settings)
    seen = None
    try:
        for turn in range(4):
            if turn == 2 and world.rank == world.size - 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            v1.dispatch(buffer, case, world.rank)
    except (EPTimeoutError, EPPeerError) as e:
        seen = [type(e).__name__, list(e.ranks), e.op, turn]
    buffer.destroy()
    return seen


def run(world, scene):
    path = FOLDER / f"{scene}.{world.rank}.json"
    try:
        answer = {"seen": globals()[scene](world)}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    path.with_suffix(".new").write_text(json.dumps(answer))
    path.with_suffix(".new").rename(path)
    if "error" in answer:
        world.Abort(1)


def main():
    signal.alarm(100)  # whatever happens to mpirun and the test, no rank stays behind
    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    # A user's receive that takes anything, on the very communicator: no message of ours may end in it.
    caught = bytearray(1 << 22)
    wildcard = world.Irecv(caught, MPI.ANY_SOURCE, MPI.ANY_TAG)
    for scene in sys.argv[2:]:
        run(world, scene)
    if wildcard.Test():
        run(world, "a message of ours met the user's receive")
    wildcard.Cancel()
    wildcard.Wait()


if __name__ == "__main__":
    main()
