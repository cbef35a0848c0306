"""Hundreds of training steps leave nothing behind: memory, descriptors, handles and operations stay as many."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

import deep_ep_py as ep
from deep_ep_py import registry
from deep_ep_py.nn import MoELayer, RouterConfig
from deep_ep_py.testing.worlds import run_processes

WARM = 150


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def standing(buffer) -> dict[str, int]:
    gc.collect()
    buffer.barrier()  # combines' copies are given back when every reader has told so
    statistics = buffer.statistics()
    return {
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "tensors": sum(isinstance(o, torch.Tensor) for o in gc.get_objects()),
        "handles": sum(isinstance(o, ep.PlanHandle) for o in gc.get_objects()),
        "operations under way": len(buffer._flights._flights),
        "buffers": len(registry._buffers),
        "heap": statistics.heap_bytes,
        "segments": statistics.segments,
    }


def train(group, num_steps, leak):
    """Two layers over one buffer, sizes that change, a rank without tokens now and then."""
    torch.manual_seed(7)
    buffer = ep.ElasticBuffer(group, num_max_tokens_per_rank=64, hidden=64, num_topk=2)
    layers = torch.nn.ModuleList(
        [
            MoELayer(64, 32, 6, 2, buffer, router=RouterConfig.deepseek_v3(1, 1), shared_width=32),
            MoELayer(64, 32, 6, 2, buffer, separate_plan=True),
        ]
    )
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-3)
    kept, before, resident = [], {}, 0
    for step in range(num_steps):
        if step == WARM:
            before, resident = standing(buffer), resident_bytes()
        n = 0 if (step + group.rank()) % 9 == 0 else 24 + (7 * step + 5 * group.rank()) % 40
        x = torch.randn(n, 64)
        y, aux_loss, load = layers[0](x)
        y = layers[1](torch.nn.functional.rms_norm(x + y, (64,))).output
        (y.square().sum() + aux_loss).backward()
        if leak and step % 2:
            kept.append(y)  # what a program that loses its graphs would do
        optimizer.step()
        optimizer.zero_grad()
        layers[0].router.update_expert_bias(load, group=group)
    return before, standing(buffer), resident_bytes() - resident


@pytest.mark.processes
def test_nothing_is_left_behind():
    for before, after, grown in run_processes(2, train, 500, False, timeout_seconds=110):
        assert after == before
        assert grown < 8 << 20, f"{grown >> 10} KiB more than after {WARM} steps"


@pytest.mark.processes
def test_what_is_left_behind_shows():
    for before, after, _ in run_processes(2, train, WARM + 50, True, timeout_seconds=110):
        assert after["tensors"] > before["tensors"] + 20
