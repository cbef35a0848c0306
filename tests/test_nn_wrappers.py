"""nn.MoELayer under DDP, FSDP2, distributed checkpoints and the like: it is the same model as in one process."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from nn_world import (
    MORE,
    OTHERS,
    STEPS,
    WRAPPERS,
    Model,
    load,
    loading_world,
    optimizer_of,
    reset,
    same,
    state_of,
    train,
    wrapped_world,
)

from deep_ep_py.testing.worlds import run_processes

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the weights of one process at the start, after STEPS and after MORE of them."""
    folder = tmp_path_factory.mktemp("wrapped")
    model = Model()
    reset(model)
    optimizer = optimizer_of(model)
    reference = {"start": state_of(model)}
    norms = train(model, optimizer, range(STEPS))
    reference["trained"] = state_of(model)
    norms += train(model, optimizer, range(STEPS, STEPS + MORE))
    reference["trained more"], reference["norms"] = state_of(model), norms
    assert all(not torch.equal(reference["start"][k], w) for k, w in reference["trained"].items())
    torch.save(reference, folder / "reference.pt")
    return folder


@pytest.fixture(scope="module")
def wrapped(folder):
    """Of so many ranks, what went wrong on each; worlds run once."""
    return cache(lambda num_ranks: run_processes(num_ranks, wrapped_world, str(folder), timeout_seconds=110))


@pytest.fixture(scope="module")
def loaded(folder, wrapped):
    for num_ranks, _ in WRAPPERS:
        wrapped(num_ranks)
    return run_processes(3, loading_world, str(folder), timeout_seconds=110)


@pytest.mark.parametrize(("num_ranks", "name"), WRAPPERS)
def test_wrapped_model_trains_as_in_one_process(wrapped, num_ranks, name):
    assert [found[name] for found in wrapped(num_ranks)] == [""] * num_ranks


@pytest.mark.parametrize("name", OTHERS)
def test_two_ranks(wrapped, name):
    assert [found[name] for found in wrapped(2)] == ["", ""]


@pytest.mark.parametrize("key", WRAPPERS, ids=str)
def test_checkpoint_goes_on_in_new_processes_of_another_number(loaded, key):
    assert [found[key] for found in loaded] == ["", "", ""]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("key", WRAPPERS, ids=str)
def test_checkpoint_goes_on_in_one_process(folder, wrapped, key):
    wrapped(key[0])
    reference = torch.load(folder / "reference.pt")
    model = Model()
    optimizer = optimizer_of(model)
    load(model, optimizer, folder / "{} {}".format(*key), no_dist=True)
    same(state_of(model), reference["trained"])
    train(model, optimizer, range(STEPS, STEPS + MORE))
    same(state_of(model), reference["trained more"])
