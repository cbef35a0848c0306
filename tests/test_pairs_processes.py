"""Pair channels between processes: a peer that goes, a store that falls silent, Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from pair_cases import SECONDS, begin, check, exchange

from deep_ep_py._pairs import TorchPairs, gather
from deep_ep_py.communicator import communicator_of
from deep_ep_py.errors import EPPeerError, EPTimeoutError
from deep_ep_py.testing import run_processes
from deep_ep_py.testing.worlds import process_context, store_of_processes


class Silent:
    """A store that answers until it falls silent; then every call blocks, as where its host is cut off."""

    def __init__(self, store):
        self._store = store
        self.silent = threading.Event()

    def __getattr__(self, name):
        method = getattr(self._store, name)

        def call(*args):
            if self.silent.is_set():
                threading.Event().wait()
            return method(*args)

        return call


def open_torch(rank, size, store, timeout):
    """Gloo itself wants a real store; the board is where a store may fall silent."""
    channel = TorchPairs(dist.PrefixStore("pairs", store), rank, [10 * r for r in range(size)], timeout)
    silent = channel._board._store = Silent(store)
    return channel, silent


def peer_goes(rank, folder, how, ended):
    store = dist.FileStore(f"{folder}/store", 3)
    channel, silent = open_torch(rank, 3, store, 1.5 if how in ("stopped", "silent") else 30.0)
    ones, zeros = [torch.ones(2000)] * 3, [torch.zeros(2000) for _ in range(3)]
    channel.start(zeros, ones).wait()
    silent_store = how == "silent"
    if silent_store:
        silent.silent.set()
    if rank == 2:
        time.sleep(0.3)
        if how == "closed in the middle":  # it has begun what it will not finish
            channel.start(zeros, ones)
        if how.startswith("closed"):
            channel.close()
            time.sleep(3)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    errors = []
    start = time.monotonic()
    # Of three that are under way the first may still find what rank 2 had sent.
    begun = [channel.start(zeros, ones) for _ in range(3)]
    for transfer in begun:
        try:
            transfer.wait()
        except (EPPeerError, EPTimeoutError) as e:  # noqa: PERF203
            errors.append((type(e).__name__, e.ranks))
    seconds = time.monotonic() - start
    start = time.monotonic()
    channel.close()
    ended.put((errors, seconds, time.monotonic() - start))
    # Stay: the other one's errors shall be about rank 2 alone. The test ends all of them.
    time.sleep(60)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("killed", "EPPeerError"),
        ("closed", "EPPeerError"),
        ("closed in the middle", "EPPeerError"),
        ("stopped", "EPTimeoutError"),
        ("silent", "EPTimeoutError"),
    ],
)
def test_a_process_goes(how, error, tmp_path):
    context = process_context("forkserver")
    ended = context.Queue()
    ranks = [context.Process(target=peer_goes, args=(r, tmp_path, how, ended), daemon=True) for r in range(3)]
    for process in ranks:
        process.start()
    try:
        for _ in range(2):
            errors, seconds, closing = ended.get(timeout=40)
            assert len(errors) >= 2
            assert set(errors) == {(error, (20,))}, errors
            assert seconds < 15, "at the deadline only, or never"
            assert closing < 15, "it waits for nobody"
    finally:
        for process in ranks:
            process.kill()
            process.join()


def over_tcp(rank, port, ended):
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
    channel = TorchPairs(dist.PrefixStore("pairs", store), rank, range(2), SECONDS)
    for turn in range(5):
        begun = [begin(channel, rank, 2, turn + i) for i in range(3)]
        for i, (under_way, outputs) in enumerate(begun):
            under_way.wait()
            check(outputs, rank, turn + i)
    gather(channel, rank, 2, torch.zeros(1))
    channel.close()
    ended.put(rank)


@pytest.mark.processes
def test_tcp_store():
    context = process_context("forkserver")
    ended = context.Queue()
    server = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    ranks = [context.Process(target=over_tcp, args=(r, server.port, ended), daemon=True) for r in range(2)]
    for process in ranks:
        process.start()
    try:
        assert {ended.get(timeout=40) for _ in ranks} == {0, 1}
        for process in ranks:
            process.join(timeout=10)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
            process.join()


def interrupted(group):
    c = communicator_of(group)
    channel = c.open_pairs(timeout=30)
    exchange(c, channel).wait()
    if c.rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            exchange(c, channel).wait()
        channel.close()
        store_of_processes().set("interrupted", "")
        return True
    store_of_processes().wait(["interrupted"])
    # Rank 0 had begun the first of these, and closed with its rows under way.
    with pytest.raises(EPPeerError) as caught:
        for _ in range(2):
            exchange(c, channel).wait()
    assert caught.value.ranks == (0,)
    channel.close()
    return True


@pytest.mark.processes
def test_ctrl_c():
    assert run_processes(2, interrupted) == [True, True]
