"""What buffers are made of, what they say of themselves, and how they end."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from deep_ep_py import Buffer, ElasticBuffer, EPArgumentError, EPError, get_physical_domain_size
from deep_ep_py.communicator import thread_world
from deep_ep_py.testing import run_processes, run_threads

SIZES = {"num_max_tokens_per_rank": 8, "hidden": 4, "num_topk": 1}


# Groups of torch ------------------------------------------------------------------------------------------------------


def pair(buffer: ElasticBuffer) -> None:
    """One token to every rank, and back."""
    x = torch.arange(buffer.num_ranks * 4.0).view(-1, 4) + 100 * buffer.rank_idx
    rows, _, _, handle, _ = buffer.dispatch(x, torch.arange(buffer.num_ranks)[:, None], num_experts=buffer.num_ranks)
    assert torch.equal(buffer.combine(rows, handle)[0], x)


def every_kind_of_group(group: dist.ProcessGroup) -> bool:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    ep = mesh["ep"]
    hint = ElasticBuffer.get_buffer_size_hint(thread_world(2)[0], 8, 4)
    ranks = dist.get_process_group_ranks(ep.get_group())
    for given, is_mesh in ((ep, True), (ep.get_group(), False), (ep.get_group().group_name, False)):
        buffer = ElasticBuffer(given, **SIZES)
        assert (buffer.num_ranks, buffer.rank_idx) == (2, ranks.index(dist.get_rank()))
        assert buffer.mesh is (given if is_mesh else None)
        assert dist.get_process_group_ranks(buffer.group) == ranks
        pair(buffer)
        buffer.destroy()
        assert buffer.group is None and buffer.mesh is None
        assert ElasticBuffer.get_buffer_size_hint(given, 8, 4) == hint
    with Buffer(mesh["dp"]) as v1:
        assert (v1.mesh, v1.group_size) == (mesh["dp"], 2)
    assert get_physical_domain_size(ep) == (1, 2)
    whole = init_device_mesh("cpu", (4,))
    with ElasticBuffer(whole, **SIZES) as buffer:
        pair(buffer)
    nameless = init_device_mesh("cpu", (2, 2))
    for face in (Buffer, ElasticBuffer):
        with pytest.raises(EPArgumentError, match=r"one dimension; pass one of them by name: mesh\['ep'\]"):
            face(mesh)
        with pytest.raises(EPArgumentError, match="mesh_dim_names"):
            face(nameless)
        with pytest.raises(EPArgumentError, match=r"group_name says: one of .*got 'no such group'"):
            face("no such group")
    part = DeviceMesh("cpu", [0, 1])
    if group.rank() > 1:
        with pytest.raises(EPArgumentError, match="that this rank is a member of"):
            ElasticBuffer(part)
    return True


@pytest.mark.processes
def test_meshes_names_and_groups() -> None:
    assert run_processes(4, every_kind_of_group) == [True] * 4


# One buffer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", [Buffer, ElasticBuffer])
def test_context_copies_and_pickles(face: type[Buffer | ElasticBuffer]) -> None:
    def body(c: object) -> None:
        with face(c) as buffer:
            assert buffer.group is c and buffer.mesh is None
            assert copy.deepcopy(buffer) is buffer
            assert copy.deepcopy({"b": buffer})["b"] is buffer
            with pytest.raises(EPError, match=f"an? {face.__name__} cannot be pickled"):
                pickle.dumps(buffer)
        assert buffer.group is None
        with pytest.raises(EPError, match=r"destroyed|closed"):
            buffer.empty((1, 4), torch.float32)
        buffer.destroy()
        with pytest.raises(KeyError), face(c) as buffer:
            raise KeyError
        assert buffer.group is None

    run_threads(2, body)
