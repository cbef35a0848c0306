"""Rows that pairs of ranks exchange in the tests of :mod:`deep_ep_py._pairs`: no two transfers have the same."""

from __future__ import annotations

import torch

SECONDS = 20.0


def amount(source, target, turn):
    """Rows from one rank to another in some transfer; often none, sometimes in one direction only."""
    return (0, 3, 0, 1, 700)[(source * 7 + target * 3 + turn) % 5]


def rows(source, target, turn, dtype=torch.float32):
    n = amount(source, target, turn)
    return (torch.arange(n * 5).view(n, 5) + 1000 * source + 100 * target + 10 * turn).to(dtype)


def begin(channel, rank, size, turn, dtype=torch.float32):
    """A transfer that has been started, and what must come."""
    inputs = [rows(rank, r, turn, dtype) for r in range(size)]
    outputs = [torch.full_like(rows(r, rank, turn, dtype), -1) for r in range(size)]
    return channel.start(outputs, inputs), outputs


def check(outputs, rank, turn, dtype=torch.float32):
    for r, got in enumerate(outputs):
        if r != rank:
            assert torch.equal(got, rows(r, rank, turn, dtype)), (r, rank, turn)


def exchange(c, channel):
    return channel.start([torch.zeros(2) for _ in range(c.size)], [torch.ones(2) for _ in range(c.size)])
