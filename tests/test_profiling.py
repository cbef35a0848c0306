"""The ranges that torch.profiler shows of each face: their names, threads, figures, and what lies in what."""

from __future__ import annotations

import json
import threading
from typing import Any, NamedTuple

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import deep_ep_py as ep
from deep_ep_py.testing import BACKENDS, run_threads
from deep_ep_py.testing.cases import settings_for

NUM_RANKS, NUM_EXPERTS, HIDDEN = 2, 4, 6
#: Of rank 0. A token with two experts of one rank is one row; one without experts is none: 1 + 2 + 0 + 1 rows.
TOPK_IDX = torch.tensor([[0, 1], [0, 2], [-1, -1], [3, -1]])
TOKENS, ROWS, ROW_BYTES = 4, 4, HIDDEN * 4


class Shown(NamedTuple):
    """A range of the trace."""

    name: str
    thread: int
    begin: float
    end: float
    args: dict[str, Any]


def recorded(work, path, *, shapes: bool = True, all_threads: bool = False) -> list[Shown]:
    """What the trace of ``work`` has of ours, by time."""
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=all_threads)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=shapes, experimental_config=config) as p:
        work()
    p.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    ours = [e for e in events if e.get("ph") == "X" and e["name"].startswith("deep_ep_py::")]
    found = [Shown(e["name"][12:], e["tid"], e["ts"], e["ts"] + e["dur"], e["args"]) for e in ours]
    return sorted(found, key=lambda s: s.begin)


def x_of(rank: int) -> torch.Tensor:
    return torch.full((TOKENS, HIDDEN), float(rank + 1))


def v1(buffer: ep.Buffer, rank: int, background: bool) -> None:
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(TOPK_IDX, NUM_EXPERTS)
    layout = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
    weights = torch.ones(TOPK_IDX.shape)
    got = buffer.dispatch(x_of(rank), **layout, topk_idx=TOPK_IDX, topk_weights=weights, async_finish=background)
    if background:
        got[-1].current_stream_wait()
    done = buffer.combine(got[0], got[4], async_finish=background)
    if background:
        done[-1].current_stream_wait()


def v2(buffer: ep.ElasticBuffer, rank: int, background: bool) -> None:
    got = buffer.dispatch(x_of(rank), TOPK_IDX, num_experts=NUM_EXPERTS, async_with_compute_stream=background)
    if background:
        got[-1].current_stream_wait()
    done = buffer.combine(got[0], got[3], async_with_compute_stream=background)
    if background:
        done[-1].current_stream_wait()


def operators(buffer: ep.ElasticBuffer, rank: int, background: bool) -> None:
    handle = ep.plan(TOPK_IDX, buffer, NUM_EXPERTS)
    if background:
        rows, _ = ep.dispatch(x_of(rank), None, handle, async_finish=True).wait()
        ep.combine(rows, handle, async_finish=True).wait()
    else:
        x = x_of(rank).requires_grad_()
        ep.combine(ep.dispatch(x, None, handle)[0], handle).sum().backward()


FACES = {"v1": (ep.Buffer, v1), "v2": (ep.ElasticBuffer, v2), "operators": (ep.ElasticBuffer, operators)}
#: (face, in the background, of all threads) -> what rank 0's trace shows; and its thread.
Traces = dict[tuple[str, bool, bool], tuple[list[Shown], int]]


@pytest.fixture(scope="module", params=BACKENDS)
def traces(request, tmp_path_factory) -> Traces:
    path, backend = tmp_path_factory.mktemp("traces") / "trace.json", request.param
    meeting = threading.Barrier(NUM_RANKS, timeout=60)

    def body(communicator) -> Traces:
        found = {}
        for face, (kind, work) in FACES.items():
            settings = settings_for(backend, communicator.rank, NUM_RANKS)
            buffer = kind(communicator, backend=backend, settings=settings)
            for background in (False, True):
                for all_threads in (False, True):
                    work(buffer, communicator.rank, background)

                    def observed(face=face, buffer=buffer, work=work, background=background):
                        meeting.wait()  # every rank's ranges fall into rank 0's trace
                        work(buffer, communicator.rank, background)
                        if face != "operators":
                            buffer._engine.barrier()
                        meeting.wait()

                    if communicator.rank:
                        observed()
                    else:
                        shown = recorded(observed, path, all_threads=all_threads)
                        found[face, background, all_threads] = shown, threading.get_native_id()
            buffer._engine.barrier()
            buffer.destroy()
        return found

    return run_threads(NUM_RANKS, body, timeout_seconds=120)[0]


EXPECTED = {
    ("v1", False): "get_dispatch_layout dispatch dispatch_plan dispatch_rows combine combine_rows barrier",
    ("v1", True): "get_dispatch_layout dispatch dispatch_plan wait combine wait barrier",
    ("v2", False): "dispatch dispatch_plan dispatch_rows combine combine_rows barrier",
    ("v2", True): "dispatch dispatch_plan wait combine wait barrier",
    ("operators", False): "plan dispatch_plan dispatch_rows dispatch dispatch_plan dispatch_rows combine combine_rows"
    " dispatch dispatch_plan dispatch_rows combine combine_rows",
    ("operators", True): "plan dispatch_plan dispatch_rows dispatch dispatch_plan finish wait combine finish wait",
}


@pytest.mark.parametrize(("face", "background"), EXPECTED)
@pytest.mark.parametrize("all_threads", [False, True], ids=["its thread", "all threads"])
def test_the_thread_that_calls(traces, face, background, all_threads):
    shown, caller = traces[face, background, all_threads]
    mine = [s for s in shown if s.thread == caller]
    assert " ".join(s.name for s in mine) == EXPECTED[face, background]
    for s in mine:
        if s.name in ("dispatch_plan", "dispatch_rows", "combine_rows"):
            around = [o for o in mine if o.begin <= s.begin and s.end <= o.end and o is not s]
            assert [o.name for o in around][-1] in ("dispatch", "combine", "plan"), f"{s} lies in {around}"


@pytest.mark.parametrize("face", ["v1", "v2"])
def test_what_ranges_say(traces, face):
    shown, _ = traces[face, False, False]
    by_name = {s.name: s.args for s in shown}
    assert by_name["dispatch"]["Input Dims"] == [[TOKENS, HIDDEN]]
    assert (by_name["dispatch"]["tokens"], by_name["dispatch"]["bytes"]) == (TOKENS, TOKENS * ROW_BYTES)
    for name in ("dispatch_rows", "combine_rows"):
        told = [by_name[name][figure] for figure in ("tokens", "rows", "bytes")]
        assert told == [TOKENS, ROWS, ROWS * ROW_BYTES]


@pytest.mark.parametrize("face", FACES)
def test_the_thread_that_works_in_the_background(traces, face):
    """Where all threads are recorded, with figures by their place: x, tokens, rows, bytes."""
    shown, _ = traces[face, True, True]
    callers = {s.thread for s in shown if s.name == "dispatch"}
    moved = [s for s in shown if s.thread not in callers]
    # Both ranks and both workers are threads of this process.
    assert len(callers) == 2
    assert sorted(s.name for s in moved) == ["combine_rows"] * 2 + ["dispatch_rows"] * 2
    assert len({s.thread for s in moved}) >= 2
    for s in moved:
        assert s.args["Concrete Inputs"] == ["", str(TOKENS), str(ROWS), str(ROWS * ROW_BYTES)], s
        assert s.args["Input Dims"][0][1] == HIDDEN


def test_without_shapes_and_failures_inside_a_range(tmp_path):
    """No figures where the profiler asks for none; a call that raises ends its ranges."""

    def body(communicator):
        buffer = ep.ElasticBuffer(communicator, backend="shm")

        def work():
            with pytest.raises(ep.EPArgumentError):
                buffer.dispatch(x_of(0), TOPK_IDX + NUM_EXPERTS, num_experts=NUM_EXPERTS)
            v2(buffer, 0, False)
            v2(buffer, 0, True)

        shown = recorded(work, tmp_path / "trace.json", shapes=False)
        buffer.destroy()
        return shown

    (shown,) = run_threads(1, body)
    assert [s.name for s in shown][:4] == ["dispatch", "dispatch_plan", "dispatch", "dispatch_plan"]
    assert not any("tokens" in s.args for s in shown)
    assert shown[0].end <= shown[2].begin
