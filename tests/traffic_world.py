"""Worlds whose ranks keep the ledgers of their operations, and what their channels were really handed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from deep_ep_py import Buffer, ElasticBuffer, Settings, autograd
from deep_ep_py.testing import Case, make_inputs, run_threads
from deep_ep_py.testing import conformance_v1 as v1
from deep_ep_py.traffic import Traffic

Ops = dict[str, tuple[Traffic, Counter]]  # by name: the ledger, and bytes that the channel was handed, by rank


@dataclass(frozen=True)
class World:
    """Ranks of each domain, and the backend that carries their rows."""

    domains: tuple[int, ...]
    backend: str

    @property
    def id(self) -> str:
        return f"{'+'.join(map(str, self.domains))}-{self.backend}"

    @property
    def num_ranks(self) -> int:
        return sum(self.domains)

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        ends = accumulate(self.domains)
        return tuple(tuple(range(end - n, end)) for n, end in zip(self.domains, ends, strict=True))

    def settings(self, rank: int) -> Settings:
        domain = next(d for d, ranks in enumerate(self.members) if rank in ranks)
        return Settings(domain=f"host {domain}", backend=self.backend, timeout_seconds=30)


WORLDS = (
    World((1,), "shm"),
    World((3,), "shm"),
    World((1, 1), "hybrid"),
    World((2, 2), "hybrid"),
    World((3, 3), "hybrid"),
    World((1, 1, 1, 1), "hybrid"),
    World((2,), "hybrid"),
    World((2, 2), "collective"),
    World((3, 1), "collective"),
)


class Watch:
    """Counts the bytes that a buffer's backend hands to its channel, by rank."""

    def __init__(self, buffer: Any) -> None:
        self.buffer, self.backend = buffer, buffer._engine.backend
        self.sent: Counter = Counter()
        name = buffer.backend_info().name
        if name == "hybrid":
            self._start = self.backend._rail.start
            self.backend._rail.start = self.start
        elif name == "collective":
            self._all_to_all = self.backend._channel.all_to_all_single
            self.backend._channel.all_to_all_single = self.all_to_all_single

    def last(self) -> tuple[Traffic, Counter]:
        """The ledger of the last operation, and what the channel was handed since this was asked before."""
        sent, self.sent = self.sent, Counter()
        return self.buffer.last_traffic(), sent

    def start(self, outputs: Any, inputs: Any) -> Any:
        for r, rows in zip(self.backend.domains.rail, inputs, strict=True):
            if r != self.backend.rank:  # the channel leaves out the own entry
                self.sent[r] += rows.nbytes
        return self._start(outputs, inputs)

    def all_to_all_single(self, output: Any, rows: Any, output_splits: list[int], input_splits: list[int]) -> None:
        row_bytes = rows[:1].nbytes if len(rows) else 0
        for r, n in enumerate(input_splits):
            self.sent[r] += n * row_bytes
        self._all_to_all(output, rows, output_splits, input_splits)


def run_v2(world: World, case: Case, *, multiple: bool) -> dict[tuple[bool, bool], list[Ops]]:
    """By (expand, weights) and rank: ``dispatch``, ``cached`` and ``combine``."""
    ranks = run_threads(world.num_ranks, _v2, world, case, multiple)
    return {key: [found[key] for found in ranks] for key in ranks[0]}


def run_v1(world: World, case: Case, with_topk: bool) -> list[Ops]:
    """By rank: ``dispatch``, ``cached`` and ``combine``."""
    return run_threads(world.num_ranks, _v1, world, case, with_topk)


def _v2(comm: Any, world: World, case: Case, multiple: bool) -> dict[tuple[bool, bool], Ops]:
    buffer = ElasticBuffer(comm, allow_multiple_reduction=multiple, settings=world.settings(comm.rank))
    watch = Watch(buffer)
    try:
        return {
            (expand, weights): _v2_round(buffer, watch, case, comm.rank, expand, weights)
            for expand in (False, True)
            for weights in (False, True)
        }
    finally:
        buffer.destroy()


def _v2_round(buffer: Any, watch: Watch, case: Case, rank: int, expand: bool, weights: bool) -> Ops:
    mine, payload, found = make_inputs(case)[rank], v1.payload(case, rank), {}
    topk_weights = mine.topk_weights if weights else None
    *_, recv_weights, handle, _ = buffer.dispatch(
        payload,
        topk_idx=mine.topk_idx,
        topk_weights=topk_weights,
        num_experts=case.num_experts,
        num_max_tokens_per_rank=case.num_max_tokens_per_rank,
        expert_alignment=case.expert_alignment,
        do_expand=expand,
    )
    found["dispatch"] = watch.last()
    buffer.dispatch(payload, topk_weights=topk_weights, handle=handle, do_expand=expand)
    found["cached"] = watch.last()
    y = torch.zeros((handle._plan.num_output_rows, case.hidden), dtype=case.row_dtype)
    buffer.combine(y, handle, topk_weights=recv_weights)
    found["combine"] = watch.last()
    return found


def run_ops(world: World, case: Case) -> list[Ops]:
    """By rank: ``dispatch`` (a plan, which moves rows of no bytes), ``cached`` and ``combine`` of the torch ops."""
    return run_threads(world.num_ranks, _ops, world, case)


def _ops(comm: Any, world: World, case: Case) -> Ops:
    mine = make_inputs(case)[comm.rank]
    buffer = ElasticBuffer(comm, settings=world.settings(comm.rank))
    watch, found = Watch(buffer), {}
    try:
        handle = autograd.plan(mine.topk_idx, buffer, case.num_experts)
        found["dispatch"] = watch.last()
        recv_x, _ = autograd.dispatch(mine.x, mine.topk_weights, handle)
        found["cached"] = watch.last()
        autograd.combine(recv_x, handle)
        found["combine"] = watch.last()
    finally:
        buffer.destroy()
    return found


def _v1(comm: Any, world: World, case: Case, with_topk: bool) -> Ops:
    buffer = Buffer(comm, settings=world.settings(comm.rank))
    watch, found = Watch(buffer), {}
    try:
        recv_x, _, recv_weights, _, handle, _ = v1.dispatch(buffer, case, comm.rank, with_topk=with_topk)
        found["dispatch"] = watch.last()
        buffer.dispatch(v1.payload(case, comm.rank), handle=handle)
        found["cached"] = watch.last()
        rows = (recv_x[0] if isinstance(recv_x, tuple) else recv_x).shape[0]
        y = torch.zeros((rows, case.hidden), dtype=case.row_dtype)
        buffer.combine(y, handle, topk_weights=recv_weights)
        found["combine"] = watch.last()
    finally:
        buffer.destroy()
    return found
