"""One routing over crossed domains, and the usual operation on it: tests of what goes wrong over two hops."""

from __future__ import annotations

from collective_cases import Routing, dispatch, same, v2_spec

CROSSED = ((0, 3), (1, 2))
ROUTING = Routing(4, tokens=(30, 0, 40, 20))


def usual(backend, rank, **more):
    return dispatch(backend, v2_spec(ROUTING, rank, expand=False, **more))


def works(backend, rank, before):
    same(usual(backend, rank).recv_x, before.recv_x, "afterwards")
