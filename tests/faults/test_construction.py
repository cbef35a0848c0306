"""Construction where ranks differ, or one does not come: every rank gets an answer that names the field or the rank."""

from __future__ import annotations

import threading
import time

import pytest
from fault_world import SMALL, World, leftovers, run_world, shm_settings, use

from deep_ep_py import Buffer, ElasticBuffer
from deep_ep_py.communicator import thread_world
from deep_ep_py.errors import EPArgumentError, EPMismatchError, EPTimeoutError
from deep_ep_py.testing import run_threads


def differing(comm, build, field, values):
    with pytest.raises(EPMismatchError) as caught:
        build(comm)
    assert caught.value.field == field
    assert caught.value.values == values
    assert field in str(caught.value)
    use(Buffer(comm, settings=shm_settings()), comm.rank, SMALL)  # the group is as good as before


def buffer_of_bytes(comm):
    return Buffer(comm, 1 << (20 + comm.rank), settings=shm_settings())


def buffer_of_backend(comm):
    return Buffer(comm, backend="collective" if comm.rank == 2 else "shm", settings=shm_settings())


def buffer_of_class(comm, num_bytes):
    return (ElasticBuffer if comm.rank == 1 else Buffer)(comm, num_bytes, settings=shm_settings())


@pytest.mark.parametrize(
    ("build", "field", "values"),
    [
        (buffer_of_bytes, "num_nvl_bytes", {0: 1 << 20, 1: 1 << 21, 2: 1 << 22}),
        (buffer_of_backend, "backend", {0: "shm", 1: "shm", 2: "collective"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unequal_arguments(build, field, values):
    run_threads(3, differing, build, field, values)


def classes(comm):
    """Which buffer is meant comes before its arguments, also before one that is refused."""
    for num_bytes in (1 << 20, -1 if comm.rank else 0):
        with pytest.raises(EPMismatchError) as caught:
            buffer_of_class(comm, num_bytes)
        assert caught.value.field == "class"
        assert caught.value.values == {0: "Buffer", 1: "ElasticBuffer", 2: "Buffer"}


def test_unequal_classes():
    run_threads(3, classes)


def elastic(comm, field):
    with pytest.raises(EPMismatchError) as caught:
        ElasticBuffer(comm, settings=shm_settings(), **{field: 8 * (1 + (comm.rank == 1))})
    assert caught.value.field == field
    assert caught.value.values == {0: 8, 1: 16, 2: 8}


@pytest.mark.parametrize("field", ["num_max_tokens_per_rank", "hidden", "num_topk"])
def test_unequal_elastic_arguments(field):
    run_threads(3, elastic, field)


def refused(comm):
    with pytest.raises(EPArgumentError) as caught:
        Buffer(comm, -1 if comm.rank == 1 else 0, settings=shm_settings())
    assert "num_nvl_bytes" in str(caught.value)
    if comm.rank != 1:
        assert caught.value.ranks == (1,)
    use(Buffer(comm, settings=shm_settings()), comm.rank, SMALL)


def test_refused_on_one_rank():
    run_threads(3, refused)


def test_rank_that_never_constructs():
    world, errors = thread_world(3), {}

    def body(comm):
        begin = time.monotonic()
        with pytest.raises(EPTimeoutError) as caught:
            Buffer(comm, settings=shm_settings(connect_timeout_seconds=0.5))
        errors[comm.rank] = (caught.value.ranks, time.monotonic() - begin, str(caught.value))

    threads = [threading.Thread(target=body, args=(world[r],)) for r in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert set(errors) == {0, 2}
    for ranks, seconds, message in errors.values():
        assert ranks == (1,)
        assert seconds > 0.4
        assert "1" in message and "0.5 s" in message


def never(world: World):
    if world.rank == 1:
        time.sleep(1.5)
        return None
    with pytest.raises(EPTimeoutError) as caught:
        Buffer(world.group, settings=shm_settings(connect_timeout_seconds=0.7))
    assert not leftovers(), leftovers()
    return caught.value.ranks


@pytest.mark.processes
def test_process_that_never_constructs():
    ranks = run_world(3, never)
    assert [r.result for r in ranks] == [(1,), None, (1,)]


class LeftError(Exception):
    pass


def exchanges(comm, backend):
    """What a construction exchanges, step by step."""
    session, steps = comm.session(), []
    inner, comm.session = session.exchange, lambda: session

    def exchange(payload, *, timeout, what):
        steps.append(what)
        return inner(payload, timeout=timeout, what=what)

    session.exchange = exchange
    Buffer(comm, settings=shm_settings(backend=backend)).destroy()
    return steps


def left_before(comm, backend, step):
    """Rank 1 comes to every exchange of the construction but ``step``; rank 0 waits there as long as in any other."""
    session = comm.session()
    inner, comm.session = session.exchange, lambda: session

    def exchange(payload, *, timeout, what):
        if comm.rank == 1 and what == step:
            raise LeftError
        return inner(payload, timeout=timeout, what=what)

    session.exchange = exchange
    with pytest.raises(LeftError if comm.rank == 1 else EPTimeoutError) as caught:
        Buffer(comm, settings=shm_settings(backend=backend, timeout_seconds=3.0, connect_timeout_seconds=0.3))
    if comm.rank == 0:
        assert caught.value.ranks == (1,)
        assert f"did not come to {step} within 0.3 s" in str(caught.value)


@pytest.mark.parametrize("backend", ["shm", "collective"])
def test_rank_that_leaves_a_construction(backend):
    steps = run_threads(2, exchanges, backend)[0]
    assert len(steps) >= 2
    for step in steps:
        run_threads(2, left_before, backend, step)
