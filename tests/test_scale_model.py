"""The scale model: its bytes against the ledgers of worlds that ran, its routings, its formula, its command."""

import json

import numpy as np
import pytest
import torch
from traffic_world import WORLDS, run_v2

from deep_ep_py import scale_report
from deep_ep_py.__main__ import main
from deep_ep_py.errors import EPArgumentError
from deep_ep_py.scale_model import Cluster, Counts, Workload, bytes_of, count, times_of
from deep_ep_py.testing import Case, make_inputs

BF16 = Case((9, 0, 7, 5, 4, 6), hidden=24, num_topk=4, num_experts=13, routing="masked", expert_alignment=4)
FP8 = Case((6, 7, 8, 9, 0, 5), hidden=40, num_topk=3, num_experts=8, dtype=torch.float8_e4m3fn, sf="f32", num_scales=2)
DUPLICATES = Case((5, 6, 7, 8, 4, 3), hidden=16, num_topk=6, num_experts=7, routing="duplicates")
PARTS = ("rows", "routing", "control")


def ids(value):
    return value.id


def ledgers(ranks, op):
    """{(source, destination): (rows, routing, control)}, added up over the ledgers of all ranks."""
    found = {}
    for of_rank in ranks:
        for link in of_rank[op][0].links:
            before = found.get((link.source, link.destination), (0, 0, 0))
            parts = tuple(n + getattr(link, part) for n, part in zip(before, PARTS, strict=True))
            found[link.source, link.destination] = parts
    return found


def modelled(moved):
    """The same of the model's matrices."""
    parts = [getattr(moved, part) for part in PARTS]
    return {
        (int(s), int(d)): tuple(int(part[s, d]) for part in parts) for s, d in zip(*moved.total.nonzero(), strict=True)
    }


@pytest.mark.parametrize("multiple", [True, False], ids=["multiple", "single"])
@pytest.mark.parametrize("case", [BF16, FP8, DUPLICATES], ids=ids)
@pytest.mark.parametrize("world", WORLDS, ids=ids)
def test_bytes_are_the_ledgers(world, case, multiple):
    case = Case(**{**vars(case), "num_tokens": case.num_tokens[: world.num_ranks]})
    inputs = make_inputs(case)
    cluster = Cluster(world.domains, link_gbps=1, memory_gbps=1)
    counts = count([mine.topk_idx.numpy() for mine in inputs], cluster, case.num_experts)
    for (expand, weights), ranks in run_v2(world, case, multiple=multiple).items():
        for op in ("dispatch", "cached", "combine"):
            load = Workload(
                row_bytes=case.hidden * case.dtype.itemsize,
                sf_bytes=case.num_scales * 4 if case.sf else 0,
                combined_row_bytes=case.hidden * case.row_dtype.itemsize,
                num_experts=case.num_experts,
                num_topk=case.num_topk,
                expand=expand,
                cached=op == "cached",
                weights=weights,
                combine_weights=weights,
                multiple_reduction=multiple,
            )
            name = "combine" if op == "combine" else "dispatch"
            assert modelled(bytes_of(name, world.backend, counts, load, cluster)) == ledgers(ranks, op), (op, expand)


def test_the_backend_that_the_library_would_choose():
    assert Cluster((4,), 1, 1).choose("auto") == "shm"
    assert Cluster((2, 2), 1, 1).choose("auto") == "hybrid"
    assert Cluster((3, 1), 1, 1).choose("auto") == "collective"
    assert Cluster((2, 2), 1, 1).choose("collective") == "collective"
    for nodes, backend in (((2, 2), "shm"), ((3, 1), "hybrid")):
        with pytest.raises(EPArgumentError, match="backend"):
            Cluster(nodes, 1, 1).choose(backend)


def load_of(width, **more):
    return Workload(row_bytes=width, sf_bytes=0, combined_row_bytes=width, num_experts=2, num_topk=1, **more)


def counts_between_two(crossing):
    """Two ranks: rank 0 sends so many tokens to rank 1, each keeps 10."""
    to_rank = np.array([[10, crossing], [0, 10]])
    return Counts(np.array([10 + crossing, 10]), to_rank, to_rank, np.array([[0, crossing], [0, 0]]))


@pytest.mark.parametrize("backend", ["hybrid", "collective"])
def test_a_slow_link_is_what_takes_the_time(backend):
    # 8 Gbit/s: a byte a nanosecond. Rows of 1 MB, so that what goes with them is nothing.
    cluster = Cluster((1, 1), link_gbps=8, memory_gbps=8e6)
    load, counts = load_of(1_000_000, cached=True, weights=False), counts_between_two(30)
    for op, way in (("dispatch", "wire out of node 0"), ("combine", "wire out of node 1")):
        moved = bytes_of(op, backend, counts, load, cluster).total
        times = times_of(op, backend, moved, counts, load, cluster)
        assert times.total == pytest.approx(0.030, rel=0.01)
        assert times.bottleneck == way


def test_wire_and_memory_overlap_in_two_hops_only():
    load, counts = load_of(1_000_000, cached=True, weights=False), counts_between_two(30)
    cluster = Cluster((1, 1), link_gbps=8, memory_gbps=16, link_latency_us=1000)

    def times(backend):
        return times_of(
            "dispatch", backend, bytes_of("dispatch", backend, counts, load, cluster).total, counts, load, cluster
        )

    flat, two = times("collective"), times("hybrid")
    # Two exchanges: record, rows. Each rank packs or takes apart 30 rows, and its own 10 both.
    assert flat.total == pytest.approx(0.030 + 0.025 + 2 * 0.001, rel=0.01)
    # Rank 1 takes 30 rows from the wire, and places them and its own 10. A chunk is 8 rows of 1 MB.
    assert two.memory == pytest.approx([0.020, 0.035], rel=0.01)
    assert two.bottleneck == "memory of rank 1"
    assert two.fill == pytest.approx(0.008)
    assert two.total == pytest.approx(0.030 + 0.008 + 2 * 0.001, rel=0.01)


def test_one_node_is_its_memory():
    counts, load = count([np.array([[0], [1]]), np.array([[1]])], Cluster((2,), 1, 1), 2), load_of(1000)
    moved = bytes_of("combine", "shm", counts, load, Cluster((2,), 1, 8)).total
    times = times_of("combine", "shm", moved, counts, load, Cluster((2,), 1, 8))
    assert times.total == pytest.approx(4e-6)  # rank 0 reads two rows and writes two sums
    assert times.wire == 0


def test_sampled_experts_are_different_and_in_few_groups():
    sampled = list(scale_report.sample(2, 2000, 64, 6, 8, 3, seed=5))
    assert [s.shape for s in sampled] == [(2000, 6)] * 2
    assert (sampled[0] != sampled[1]).any()
    for topk_idx in sampled:
        assert topk_idx.min() >= 0
        assert topk_idx.max() < 64
        in_order = np.sort(topk_idx, axis=1)
        assert (in_order[:, 1:] != in_order[:, :-1]).all()
        groups = in_order // 8
        assert (1 + (groups[:, 1:] != groups[:, :-1]).sum(1)).max() <= 3
        shares = np.bincount(topk_idx.reshape(-1), minlength=64) / topk_idx.size * 64
        assert shares.min() > 0.7  # each has about 188 of 12000
        assert shares.max() < 1.3


def test_group_limited_routing_crosses_less():
    """4 of 8 groups on 8 nodes: a token reaches at most 4 of them, whatever its 8 experts are."""
    cluster = Cluster((1,) * 8, 1, 1)
    free = count(scale_report.sample(8, 500, 256, 8, 8, 8, 0), cluster, 256)
    limited = count(scale_report.sample(8, 500, 256, 8, 8, 4, 0), cluster, 256)
    assert limited.to_rank.sum(1).max() <= 4 * 500
    # A node is left out where all 8 experts are among those elsewhere: 224 of 256, or 96 of the 128 of 4 groups.
    expected_free = 8 * (1 - np.prod([(224 - i) / (256 - i) for i in range(8)]))
    expected_limited = 4 * (1 - np.prod([(96 - i) / (128 - i) for i in range(8)]))
    assert free.to_rank.sum() / 4000 == pytest.approx(expected_free, rel=0.02)
    assert limited.to_rank.sum() / 4000 == pytest.approx(expected_limited, rel=0.02)


SMALL = ("plan", "--tokens", "30", "--hidden", "256", "--experts", "16", "--topk", "4", "--ranks-per-node", "2")


def as_json(capsys, *arguments):
    assert main([*SMALL, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_command_in_json(capsys):
    found = as_json(capsys, "--dtype", "fp8", "--groups", "4", "--top-groups", "2")
    assert found["backend"] == "hybrid"
    assert found["cluster"]["nodes"] == [2, 2]
    assert found["workload"]["row_bytes"] == 256
    assert found["workload"]["sf_bytes"] == 8
    assert found["workload"]["combined_row_bytes"] == 512
    for op in ("dispatch", "combine"):
        total = sum(np.array(found[op]["links"][part]) for part in PARTS)
        by_rank = {name: np.array(values) for name, values in found[op]["bytes_by_rank"].items()}
        assert (total.sum(1) == by_rank["local"] + by_rank["domain_out"] + by_rank["wire_out"]).all()
        assert (total.sum(0) == by_rank["local"] + by_rank["domain_in"] + by_rank["wire_in"]).all()
        largest = found[op]["largest_link"]
        across = [total[s, d] for s in range(4) for d in range(4) if s // 2 != d // 2]
        assert largest["bytes"] == total[largest["source"], largest["destination"]] == max(across)
        seconds = found[op]["seconds"]
        wire = max(seconds["wire_out"], seconds["wire_in"])
        assert seconds["total"] == max(wire + seconds["fill"], seconds["memory"]) + seconds["latency"]
    assert sum(found["recv_rows"]) <= 4 * 30 * 4


def test_command_in_words(capsys):
    for arguments, words in (
        ((), ("2 nodes of 2 ranks, backend hybrid", "largest link", "wire_out")),
        (("--nodes", "1"), ("1 node of 2 ranks, backend shm", "largest link", "bottleneck    memory of rank")),
        (("--ranks-per-node", "3,1"), ("2 nodes of 3+1 ranks, backend collective", "wire_in")),
        (("--tokens", "0", "--nodes", "3"), ("received      rows: 0 on every rank",)),
        (("--nodes", "1", "--ranks-per-node", "1"), ("local",)),
    ):
        assert main([*SMALL, *arguments]) == 0
        text = capsys.readouterr().out
        assert text.count("time  ") == 2
        assert all(word in text for word in words), text


def test_command_takes_a_trace(capsys, tmp_path):
    topk_idx = np.stack([np.full((5, 3), 15), np.tile([0, 4, 4], (5, 1)), np.full((5, 3), -1), np.full((5, 3), 2)])
    np.savez(tmp_path / "of_these.npz", other=np.zeros(1), topk_idx=topk_idx.astype(np.int32))
    found = as_json(capsys, "--trace", str(tmp_path / "of_these.npz"))
    assert found["recv_rows"] == [10, 5, 0, 5]
    assert found["workload"]["num_topk"] == 3
    # Of another shape: a pool to draw from. Here all tokens are one.
    np.save(tmp_path / "pool.npy", np.tile([0, 15], (7, 1)))
    found = as_json(capsys, "--trace", str(tmp_path / "pool.npy"))
    assert found["recv_rows"] == [120, 0, 0, 120]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--ranks-per-node", "3,x"), "--ranks-per-node"),
        (("--ranks-per-node", "3,1,2"), "--ranks-per-node"),
        (("--ranks-per-node", "0"), "--ranks-per-node"),
        (("--backend", "shm"), "backend"),
        (("--groups", "3"), "--groups"),
        (("--groups", "8", "--top-groups", "1"), "--topk"),
        (("--top-groups", "2"), "--top-groups"),
        (("--topk", "17"), "--topk"),
        (("--hidden", "0"), "--hidden"),
        (("--link-gbps", "0"), "--link-gbps"),
        (("--link-gbps", "nan"), "--link-gbps"),
        (("--link-latency-us", "-1"), "--link-latency-us"),
        (("--trace", "nowhere.npy"), "nowhere.npy"),
    ],
)
def test_command_refuses(capsys, arguments, says):
    assert main([*SMALL, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err


def test_command_refuses_what_is_no_trace(capsys, tmp_path):
    files = {
        "text.npy": b"no array",
        "floats.npy": np.zeros((3, 2)),
        "flat.npy": np.zeros(3, dtype=np.int64),
        "foreign.npy": np.full((3, 2), 16),
        "empty.npy": np.zeros((0, 2), dtype=np.int64),
    }
    for name, data in files.items():
        if isinstance(data, bytes):
            (tmp_path / name).write_bytes(data)
        else:
            np.save(tmp_path / name, data)
        assert main([*SMALL, "--trace", str(tmp_path / name)]) == 2, name
        assert "--trace" in capsys.readouterr().err
