"""What the ranks of a test network do: one function each, which takes its place and returns something for JSON.

Also the program that every rank runs: ``scenes.py <scene> <folder> <arguments as JSON>``.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deep_ep_py import Buffer
from deep_ep_py._mpi import mpi_communicator
from deep_ep_py.errors import EPError
from deep_ep_py.launch import Launched, init_from_env
from deep_ep_py.settings import Settings
from deep_ep_py.testing import Case, conformance_v1, conformance_v2, make_inputs

CONNECT_SECONDS = 30.0
GATE_SECONDS = 60.0


def main(scene: str, folder: str, arguments: str) -> None:
    """Run a scene and leave what it returned, or how it failed, in ``folder``."""
    torch.set_num_threads(1)
    launched = init_from_env()
    report: dict[str, Any]
    try:
        report = {"value": SCENES[scene](Place.of(launched, folder), **json.loads(arguments))}
    except Exception:
        report = {"error": traceback.format_exc()}
    written = Path(folder) / f"writing.{launched.rank}"
    written.write_text(json.dumps(report) + "\n")
    written.rename(written.with_name(f"result.{launched.rank}"))  # whole or not at all
    if "error" in report:
        os._exit(1)  # without a farewell: peers may be gone
    launched.barrier()  # no rank may leave while a peer still uses its connections
    launched.close()


@dataclass(frozen=True)
class Place:
    """Where a rank is. ``group``: what buffers are built over; ``folder``: of marks and results, seen by all."""

    group: Any
    rank: int
    num_ranks: int
    folder: Path

    @classmethod
    def of(cls, launched: Launched, folder: str) -> Place:
        group = launched.group if launched.comm is None else mpi_communicator(launched.comm)
        return cls(group, launched.rank, launched.world_size, Path(folder))

    def leave_mark(self, mark: str) -> None:
        (self.folder / f"{mark}.{self.rank}").touch()

    def wait_at_gate(self, gate: str) -> None:
        """Leave a mark, and go on when the test opens the gate: in between, the ranks are silent."""
        self.leave_mark(gate)
        deadline = time.monotonic() + GATE_SECONDS
        while not (self.folder / f"{gate}.open").exists():
            assert time.monotonic() < deadline, f"nobody opened the gate {gate}"
            time.sleep(0.005)


def cases(num_ranks: int) -> tuple[Case, ...]:
    """Uneven token counts, a rank without tokens, experts that the ranks do not divide, rows with scale factors.

    Small, since every rank computes the oracle of all ranks; they share two cores.
    """
    uneven = tuple((7 * r) % 23 for r in range(num_ranks))
    return (
        Case(uneven, hidden=33, num_topk=4, num_experts=2 * num_ranks + 1, dtype=torch.float32),
        Case((9,) * num_ranks, hidden=128, num_topk=4, num_experts=32, dtype=torch.float8_e4m3fn, sf="f32"),
    )


def conform(place: Place, backend: str) -> dict[str, Any]:
    """Both faces against the oracle: compact and expanded, reduced per rank and not, plain rows and scaled ones."""
    rows, scaled = cases(place.num_ranks)
    compact, compact_nosync, expand, single, _ = conformance_v2.MODES
    checks = ((rows, compact_nosync), (rows, expand), (rows, single), (scaled, compact))
    done = conformance_v1.check_batch(place.group, (rows,), backend)
    done += conformance_v2.check_batch(place.group, checks, backend)
    with conformance_v1.open_buffer(place.group, backend) as buffer:
        info = buffer.backend_info()
    found = {"backend": info.name, "refused": info.refused, "domains": info.domains}
    return {"checks": done, "domain": Settings.from_env().domain, "hostname": socket.gethostname(), **found}


def dispatch_at_gates(place: Place, backend: str) -> list[tuple[int, int, str, int, int]]:
    """One dispatch between the gates ``before`` and ``after``: construction and a first one are over by then."""
    with conformance_v1.open_buffer(place.group, backend) as buffer:
        dispatch = _dispatcher(buffer, traffic_case(place.num_ranks), place.rank)
        dispatch()
        place.wait_at_gate("before")
        dispatch()
        place.wait_at_gate("after")
        links = buffer.last_traffic().links
    return [(link.source, link.destination, link.kind, link.rows, link.bytes) for link in links]


def dispatch_some(place: Place, backend: str, times: int) -> dict[int, float]:
    """A few dispatches; the seconds that this rank has waited for each rank of its rail."""
    with conformance_v1.open_buffer(place.group, backend) as buffer:
        dispatch = _dispatcher(buffer, traffic_case(place.num_ranks), place.rank)
        for _ in range(times):
            dispatch()
        return buffer.statistics().wait_seconds


def traffic_case(num_ranks: int) -> Case:
    return Case((128,) * num_ranks, hidden=7168, num_topk=4, num_experts=8 * num_ranks, routing="distinct")


def dispatch_until_error(place: Place, backend: str, timeout_seconds: float) -> dict[str, Any]:
    """Dispatch in a loop, with the mark ``looping`` after a few, until an error of the library ends it."""
    limits = {"timeout_seconds": timeout_seconds, "connect_timeout_seconds": CONNECT_SECONDS}
    settings = replace(Settings.from_env(), **limits)
    buffer = Buffer(place.group, backend=backend, settings=settings)
    dispatch = _dispatcher(buffer, traffic_case(place.num_ranks), place.rank)
    for i in itertools.count():
        begun = time.monotonic()
        try:
            dispatch()
        except EPError as e:
            seconds = {"waited": round(time.monotonic() - begun, 2), "raised_at": time.monotonic()}
            return {"type": type(e).__name__, "ranks": e.ranks, "op": e.op, "phase": e.phase, "text": str(e)} | seconds
        if i == 2:
            place.leave_mark("looping")
    raise AssertionError("the loop has no other end")


def _dispatcher(buffer: Any, case: Case, rank: int) -> Callable[[], Any]:
    mine = make_inputs(case)[rank]
    layout = conformance_v1.layout_arguments(buffer.get_dispatch_layout(mine.topk_idx, case.num_experts))
    topk = {"topk_idx": mine.topk_idx, "topk_weights": mine.topk_weights}
    return lambda: buffer.dispatch(mine.x, **layout, **topk)


SCENES = {scene.__name__: scene for scene in (conform, dispatch_at_gates, dispatch_some, dispatch_until_error)}

if __name__ == "__main__":
    main(*sys.argv[1:])
