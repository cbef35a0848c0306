"""A hint reserves and a named size is ready: what the kernel has given out for heaps, and what is mapped of it."""

from __future__ import annotations

import gc
import os
import re
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import deep_ep_py as ep
from deep_ep_py.settings import Settings, available_memory_bytes
from deep_ep_py.sizes import elastic_heap_bytes
from deep_ep_py.testing import run_threads

MIB = 1 << 20
HINT = 256 * MIB
#: Control segments, and the huge page with which every heap begins, of two ranks.
FEW = 12 * MIB
NUM_TOKENS, HIDDEN = 2048, 1024
SIZES = {"num_max_tokens_per_rank": NUM_TOKENS, "hidden": HIDDEN, "num_topk": 2}
NAMED = elastic_heap_bytes(2, NUM_TOKENS, HIDDEN, 2, False)


class Memory(NamedTuple):
    """Of the heaps of this process, in bytes: what the kernel has given out, and what mappings have present of it."""

    used: int
    mapped: int


def heap_file(fd: Path) -> os.stat_result | None:
    try:
        return fd.stat() if "memfd:deep_ep_py" in str(fd.readlink()) else None
    except OSError:  # closed meanwhile
        return None


def memory() -> Memory:
    files = map(heap_file, Path("/proc/self/fd").iterdir())
    used = {status.st_ino: status.st_blocks * 512 for status in files if status is not None}
    text = Path("/proc/self/smaps").read_text()
    mapped = re.findall(r"memfd:deep_ep_py.*?\nRss:\s+(\d+) kB", text, re.DOTALL)
    return Memory(sum(used.values()), sum(map(int, mapped)) * 1024)


def two_ranks(build, act=lambda buffer: None):
    """Memory after ``build(communicator)``, and after ``act(buffer)``; more than there was before."""
    gc.collect()  # what other tests still hold
    before, meeting = memory(), threading.Barrier(2, timeout=60)

    def measure(rank):
        meeting.wait()
        now = memory() if rank == 0 else None
        meeting.wait()
        return now and Memory(now.used - before.used, now.mapped - before.mapped)

    def body(communicator):
        buffer = build(communicator)
        built = measure(communicator.rank)
        kept = act(buffer)
        acted = measure(communicator.rank)
        del kept
        buffer.destroy()
        return built, acted

    return run_threads(2, body)[0]


def exchange(buffer: ep.ElasticBuffer) -> object:
    """Every rank receives all rows of both, 16 MiB, and keeps them."""
    idx = torch.tensor([[0, 1]]).repeat(NUM_TOKENS, 1)
    got = buffer.dispatch(torch.ones(NUM_TOKENS, HIDDEN), idx, num_experts=2)
    buffer.barrier()
    return got


RECEIVED = 2 * 2 * NUM_TOKENS * HIDDEN * 4


@pytest.mark.parametrize("hint", [HINT, 2 * HINT])
def test_a_hint_in_bytes_touches_nothing(hint):
    built, _ = two_ranks(lambda c: ep.Buffer(c, hint, backend="shm"))
    assert built.used < FEW and built.mapped < 2 * FEW, built


def test_what_a_hint_reserves_is_used_as_rows_come():
    statistics = []

    def act(buffer):
        got = exchange(buffer)
        statistics.append(buffer.statistics())
        return got

    built, acted = two_ranks(lambda c: ep.ElasticBuffer(c, HINT, backend="shm"), act)
    assert built.used < FEW, built
    assert RECEIVED <= acted.used < RECEIVED + 2 * FEW, acted
    # In the receiver's mapping and in that of its peer, which writes there.
    assert 2 * RECEIVED <= acted.mapped < 2 * (RECEIVED + 2 * FEW), acted
    for s in statistics:
        assert s.segments == 1 and s.second_records == 0, s
        assert s.heap_bytes >= min(HINT, available_memory_bytes() // 5), s


def test_named_sizes_are_ready():
    built, _ = two_ranks(lambda c: ep.ElasticBuffer(c, **SIZES, backend="shm"))
    assert 2 * NAMED <= built.used < 2 * NAMED + FEW, built
    assert built.mapped >= 4 * NAMED, "of every rank in both mappings"


def test_named_sizes_are_ready_in_what_a_larger_hint_reserves():
    built, _ = two_ranks(lambda c: ep.ElasticBuffer(c, HINT, **SIZES, backend="shm"))
    assert 2 * NAMED <= built.used < 2 * NAMED + FEW, built


def test_settings_heap_bytes_are_ready():
    built, _ = two_ranks(lambda c: ep.Buffer(c, HINT, backend="shm", settings=Settings(heap_bytes=20 * MIB)))
    assert 40 * MIB <= built.used < 40 * MIB + FEW, built


def test_an_output_of_fixed_size_is_touched_where_its_rows_are():
    def act(buffer):
        few = torch.tensor([[0, 1]]).repeat(8, 1)
        x = torch.ones(8, HIDDEN)
        most = {"num_max_tokens_per_rank": 16 * NUM_TOKENS, "do_cpu_sync": False}
        got = [buffer.dispatch(x, few, num_experts=2, **most) for _ in range(2)]
        assert got[1][0].shape[0] == 32 * NUM_TOKENS  # 256 MiB
        buffer.barrier()
        return got

    _, acted = two_ranks(lambda c: ep.ElasticBuffer(c, backend="shm"), act)
    assert acted.used < 3 * FEW, acted


# --- how much there is ------------------------------------------------------------------------------------------------

GIB = 1 << 30


def machine(root: Path, *lines: str, **limits: str) -> int:
    """Available memory where /proc says ``lines`` of groups, and limits lie at paths written with ``__`` for ``/``."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {64 * GIB // 1024} kB\n")
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
    for path, text in limits.items():
        file = root / "sys/fs/cgroup" / path.replace("__", "/").replace("DOT", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return available_memory_bytes(root)


V1 = ("9:name=systemd:/job", "4:cpu,memory:/slurm/job_7", "2:cpuset:/", "0::/")
NO_LIMIT_V1 = "9223372036854771712"


def test_available_without_groups(tmp_path):
    assert machine(tmp_path) == 64 * GIB


def test_available_in_a_group_of_version_1(tmp_path):
    folder = "memory__slurm__job_7__memory"
    limits = {f"{folder}DOTlimit_in_bytes": str(8 * GIB), f"{folder}DOTusage_in_bytes": str(3 * GIB)}
    assert machine(tmp_path, *V1, **limits) == 5 * GIB


def test_available_in_a_container_of_version_1(tmp_path):
    """Its own group is mounted where the root group would be; the path that /proc names is not there."""
    limits = {"memory__memoryDOTlimit_in_bytes": str(2 * GIB), "memory__memoryDOTusage_in_bytes": "0"}
    assert machine(tmp_path, *V1, **limits) == 2 * GIB


def test_available_in_a_group_of_version_1_without_limit(tmp_path):
    assert machine(tmp_path, *V1, memory__slurm__job_7__memoryDOTlimit_in_bytes=NO_LIMIT_V1) == 64 * GIB


def test_available_in_a_group_of_version_2(tmp_path):
    """The group around it has the smaller limit; its own says none."""
    limits = {"podDOTslice__memoryDOTmax": str(6 * GIB), "podDOTslice__memoryDOTcurrent": str(GIB)}
    limits["podDOTslice__one__memoryDOTmax"] = "max"
    assert machine(tmp_path, "0::/pod.slice/one", **limits) == 5 * GIB


def test_available_where_usage_exceeds_the_limit(tmp_path):
    limits = {"one__memoryDOTmax": str(GIB), "one__memoryDOTcurrent": str(2 * GIB)}
    assert machine(tmp_path, "0::/one", **limits) == 0
