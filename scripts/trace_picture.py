"""Records a trace of two ranks and draws it: ``docs/trace.png``.

    python scripts/trace_picture.py [--trace trace.json] [--picture docs/trace.png]

Two ranks are threads of one process, so that one profiler records both and their background threads. Each sends its
tokens while it multiplies matrices, computes on what it received, and brings the rows back while it multiplies again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import deep_ep_py as ep
from deep_ep_py.testing import run_threads

Event = dict[str, Any]

NUM_RANKS, NUM_TOKENS, HIDDEN, NUM_EXPERTS, NUM_TOPK = 2, 4096, 2048, 16, 4
COLORS = {
    "dispatch": "#9ecae1",
    "dispatch_plan": "#3182bd",
    "dispatch_rows": "#08519c",
    "combine": "#fdd0a2",
    "combine_rows": "#d94801",
    "wait": "#bdbdbd",
    "aten::mm": "#a1d99b",
}


def step(buffer: ep.ElasticBuffer, x: torch.Tensor, topk_idx: torch.Tensor, weight: torch.Tensor) -> None:
    rows, _, _, handle, arrived = buffer.dispatch(x, topk_idx, num_experts=NUM_EXPERTS, async_with_compute_stream=True)
    torch.mm(x[:16], weight)
    arrived.current_stream_wait()
    torch.mm(rows[:16], weight)  # what experts would do
    _, _, returned = buffer.combine(rows, handle, async_with_compute_stream=True)
    torch.mm(x[:16], weight)
    returned.current_stream_wait()


def record(path: Path) -> dict[int, str]:
    """Write the trace; the ranks' threads by number."""
    meeting = threading.Barrier(NUM_RANKS)

    def body(communicator: Any) -> int:
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(communicator.rank)
        x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
        topk_idx = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator).topk(NUM_TOPK)[1]
        weight = torch.randn(HIDDEN, HIDDEN, generator=generator)
        with ep.ElasticBuffer(communicator, backend="shm") as buffer:
            for _ in range(5):
                step(buffer, x, topk_idx, weight)
            all_threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
            profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True, experimental_config=all_threads)
            if communicator.rank == 0:
                profiler.start()
            meeting.wait()
            step(buffer, x, topk_idx, weight)
            meeting.wait()
            if communicator.rank == 0:
                profiler.stop()
                profiler.export_chrome_trace(str(path))
            buffer.barrier()
        return threading.get_native_id()

    return {thread: f"rank {r}" for r, thread in enumerate(run_threads(NUM_RANKS, body))}


def named(shown: list[Event], ranks: dict[int, str]) -> dict[int, str]:
    """Every thread by number. A worker is that of the rank whose combine has as many rows."""
    rows = {e["tid"]: e["args"]["Input Dims"][0] for e in shown if e["name"] in ("combine", "combine_rows")}
    workers = {
        tid: f"{rank}, worker"
        for tid in rows
        for caller, rank in ranks.items()
        if tid != caller and rows[caller] == rows[tid]
    }
    return ranks | workers


def draw(trace: Path, ranks: dict[int, str], picture: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("ph") == "X"]
    shown = [e | {"name": e["name"].removeprefix("deep_ep_py::")} for e in events]
    shown = [e for e in shown if e["name"] in COLORS]
    names, begin = named(shown, ranks), min(e["ts"] for e in shown)
    order = sorted(names, key=names.__getitem__, reverse=True)
    figure, axes = plt.subplots(figsize=(11, 3.4), dpi=110)
    for e in shown:  # an inner range is drawn over the one around it, and half as high
        inner = e["name"] == "dispatch_plan"
        axes.barh(
            order.index(e["tid"]),
            e["dur"] / 1e3,
            left=(e["ts"] - begin) / 1e3,
            height=0.35 if inner else 0.7,
            zorder=3 if inner else 2,
            color=COLORS[e["name"]],
        )
    axes.set_yticks(range(len(order)), [names[tid] for tid in order])
    axes.set_xlabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    patches = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    labels = [name if "::" in name else f"deep_ep_py::{name}" for name in COLORS]
    figure.legend(patches, labels, loc="upper center", ncol=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.88))
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--picture", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "trace.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = options.trace or Path(folder) / "trace.json"
        draw(trace, record(trace), options.picture)


if __name__ == "__main__":
    main()
