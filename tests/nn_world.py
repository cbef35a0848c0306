"""A model with two MoE layers, wrapped in every way that people train with; ranks of the tests in test_nn_wrappers.py.

One process trains on the whole batch, plainly; each world does the same on shares of it. Everything is float64, so that
results agree to the last digits but a few.
"""

from __future__ import annotations

import copy
import math
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._functorch.config
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from deep_ep_py import ElasticBuffer, EPArgumentError
from deep_ep_py.nn import (
    GradScaler,
    GroupedExperts,
    MoELayer,
    SharedExpert,
    clip_grad_norm_,
    parameters_by_mesh,
    prepare_ddp,
)

H, WIDTH, TOPK = 16, 8, 2
EXPERTS = (4, 5)  # of each layer: over 2 ranks even and uneven, over 3 ranks with one that has none
SEQUENCES, LENGTH = 12, 3  # of the whole batch
STEPS, MORE = 5, 2  # before and after the checkpoint
MAX_NORM = 0.05  # clips in every step
DTYPE = torch.float64


class Model(nn.Module):
    """All modules that draw weights are the library's, and draw the same numbers however they are sharded."""

    def __init__(self, buffer=None, mesh=None, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.first = SharedExpert(H, WIDTH, dtype=DTYPE)
        self.layers = nn.ModuleList(
            MoELayer(H, WIDTH, e, TOPK, buffer, ep_mesh=mesh, shared_width=WIDTH, dtype=DTYPE).double() for e in EXPERTS
        )

    def forward(self, x):
        x = x + self.first(x)
        for layer in self.layers:
            y = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
            x = x + y.output
        return x


def reset(model, seed=0):
    """The same weights as those of a model that is built with this random state."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def batch(step, rank=0, num_ranks=1):
    generator = torch.Generator().manual_seed(step)
    whole = torch.randn(SEQUENCES, LENGTH, H, dtype=DTYPE, generator=generator)
    return whole.chunk(num_ranks)[rank]


def optimizer_of(model, by_mesh=False):
    """``by_mesh``: over many tensors at once, as torch does by default on a GPU where all are plain."""
    parameters = [{"params": p} for p in parameters_by_mesh(model.parameters())] if by_mesh else model.parameters()
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-6, foreach=by_mesh)


def loss_of(model, x):
    return (model(x) - x.flip(-1)).square().mean()


def no_reduction(model):
    """Wrappers reduce in the backward pass."""


def train(model, optimizer, steps, reduce=no_reduction, micro_batches=1):
    """Steps of training on this rank's share of each batch; the norms of the gradients."""
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    norms = []
    for step in steps:
        parts = batch(step, rank, num_ranks).chunk(micro_batches)
        for i, x in enumerate(parts):
            waits = isinstance(model, DistributedDataParallel) and i + 1 < len(parts)
            with model.no_sync() if waits else nullcontext():
                (loss_of(model, x) / len(parts)).backward()
        reduce(model)
        norms.append(clip_grad_norm_(model.parameters(), MAX_NORM))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def state_of(model):
    """Full weights of a model in any wrapper, copied."""
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
    return {k.removeprefix("module."): v.clone() for k, v in whole.items()}


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def checkpointed(model, optimizer):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def load(model, optimizer, path, **how):
    state = checkpointed(model, optimizer)
    dcp.load(state, checkpoint_id=path, **how)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


# --- wrappers: (model in its wrapper, what is left to reduce) -------------------------------------------------------


def by_hand(model, mesh):
    """What wrappers do: mean over ranks. Gradients of experts are sums over the ranks of "ep" already."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            dist.all_reduce(parameter.grad.to_local(), group=mesh.get_group("dp"))
        else:
            dist.all_reduce(parameter.grad)
        parameter.grad /= mesh.size()


def plain(buffer, mesh):
    return Model(buffer), partial(by_hand, mesh=mesh)


def ddp(buffer, mesh):
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(prepare_ddp(Model(buffer), mesh["dp"]))
    for layer in model.module.layers:  # replicas begin alike, whatever they were
        of_first = layer.experts.down.to_local().detach().clone()
        dist.broadcast(of_first, dist.get_rank() % 2, group=mesh.get_group("dp"))
        same(layer.experts.down.to_local().detach(), of_first)
    return model, no_reduction


def sharded(model, mesh, compiled=False):
    """As torchtitan lays it out: experts over the dimensions beside "ep", everything else over all ranks."""
    all_ranks = init_device_mesh("cpu", (mesh.size(),))
    for layer in model.layers:
        layer.experts.gradient_divisor = layer.experts.num_ranks
        fully_shard(layer.experts, mesh=mesh[mesh.mesh_dim_names[:-1]])
        if compiled:
            layer.compile(backend="aot_eager")
        fully_shard(layer, mesh=all_ranks)
    return fully_shard(model, mesh=all_ranks)


def fsdp(buffer, mesh, recompute=False, compiled=False):
    return sharded(Model(buffer, mesh["ep"], recompute), mesh, compiled), no_reduction


def fsdp_from_meta(buffer, mesh):
    with torch.device("meta"):
        model = Model(buffer)
    return sharded(model, mesh).to_empty(device="cpu"), no_reduction


def hsdp(buffer, mesh):
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "dp", "ep"))
    return fsdp(buffer, mesh)


#: (ranks, name): how to wrap, and how to train.
WRAPPERS = {
    (2, "plain"): (plain, {}),
    (2, "DDP"): (ddp, {}),
    (2, "FSDP"): (fsdp, {}),
    (2, "FSDP from meta"): (fsdp_from_meta, {}),
    (2, "FSDP compiled, recomputed"): (partial(fsdp, recompute=True, compiled=True), {}),
    (4, "DDP, micro-batches"): (ddp, {"micro_batches": 3}),
    (4, "FSDP"): (fsdp, {}),
    (4, "FSDP from meta, foreach"): (fsdp_from_meta, {"by_mesh": True}),
    (4, "HSDP"): (hsdp, {}),
}


def through(buffer, mesh, folder, name, async_save):
    """Start, train, save, go on; every weight is that of one process."""
    wrap, how = WRAPPERS[mesh.size(), name]
    reference = torch.load(folder / "reference.pt")
    model, reduce = wrap(buffer, mesh)
    reset(model)
    same(state_of(model), reference["start"])
    optimizer = optimizer_of(model, how.get("by_mesh", False))
    go = partial(train, model, optimizer, reduce=reduce, micro_batches=how.get("micro_batches", 1))
    norms = go(range(STEPS))
    same(state_of(model), reference["trained"])
    path = folder / f"{mesh.size()} {name}"
    if async_save:
        dcp.async_save(checkpointed(model, optimizer), checkpoint_id=path).result()
    else:
        dcp.save(checkpointed(model, optimizer), checkpoint_id=path)
    norms += go(range(STEPS, STEPS + MORE))
    same(state_of(model), reference["trained more"])
    same(norms, reference["norms"])


# --- other things that keep or lose experts -------------------------------------------------------------------------


def averages_and_copies(buffer, mesh):
    model, reduce = plain(buffer, mesh)
    reset(model)
    average, twin = AveragedModel(model), copy.deepcopy(model)
    start = state_of(model)
    average.update_parameters(model)
    train(model, optimizer_of(model), range(1), reduce)
    average.update_parameters(model)
    same(state_of(twin), start)
    end, mean = state_of(model), state_of(average.module)
    same({k: mean[k] for k in start}, {k: (start[k] + end[k]) / 2 for k in start})
    twin.load_state_dict(model.state_dict())
    same(state_of(twin), end)
    same(twin(batch(0)), model(batch(0)))


def scaler_skips_on_all_ranks(buffer, mesh):
    model, reduce = plain(buffer, mesh)
    reset(model)
    start = state_of(model)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), GradScaler("cpu", init_scale=64.0)
    gradients = []
    for scale in (scaler.scale, lambda loss: loss):
        scale(loss_of(model, batch(0, dist.get_rank(), 2))).backward()
        reduce(model)
        if not gradients:
            scaler.unscale_(optimizer)
        gradients.append(
            [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
        )
        optimizer.zero_grad()
    same(*gradients)
    scaler.update()
    for rank in range(2):  # an overflow in one rank's experts
        scaler.scale(loss_of(model, batch(0, dist.get_rank(), 2))).backward()
        reduce(model)
        if dist.get_rank() == rank:
            model.layers[0].experts.down.grad.to_local()[0, 0, 0] = torch.inf
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == before / 2
        same(state_of(model), start)
    scaler.scale(loss_of(model, batch(0, dist.get_rank(), 2))).backward()
    reduce(model)
    scaler.step(optimizer)
    assert all(not torch.equal(now, start[name]) for name, now in state_of(model).items())


def refusal(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("not refused")


def norms_where_a_rank_has_no_experts(buffer, mesh):
    def norms(layer):
        reset(layer)
        for parameter in layer.parameters():
            parameter.square().sum().backward()  # the same gradient on any number of ranks
        return [float(clip_grad_norm_(layer.parameters(), 1e9, norm_type)) for norm_type in (1, 2, math.inf)]

    one = norms(MoELayer(H, WIDTH, 1, 1))
    assert norms(MoELayer(H, WIDTH, 1, 1, buffer)) == pytest.approx(one, rel=1e-5)


def compiled_under_a_memory_budget(buffer, mesh):
    """The experts' mesh is an input of the compiled graph, and no exchange runs again in the backward pass."""
    model = Model(buffer)

    def operations(run):
        before = buffer.statistics().operations
        run(batch(0, dist.get_rank(), 2)).sum().backward()
        return buffer.statistics().operations - before

    expected = operations(model)
    with torch._functorch.config.patch(activation_memory_budget=0.1):
        assert operations(torch.compile(model, backend="aot_eager", fullgraph=True)) == expected


def unprepared_ddp_is_refused(buffer, mesh):
    def of_plain_tensors():  # as over a buffer of threads or MPI
        model = Model(buffer)
        for layer in model.layers:
            layer.experts = GroupedExperts(H, WIDTH, 4, dist.get_rank(), 2, dtype=DTYPE)
        return DistributedDataParallel(model)

    def prepared_below_the_root():
        model = Model(buffer)
        prepare_ddp(model.layers)
        return DistributedDataParallel(model, init_sync=False)  # with it, torch refuses DTensors by itself

    for build in (of_plain_tensors, prepared_below_the_root):
        model = build()
        for run in (model, torch.compile(model, backend="eager")):
            raised = str(refusal(partial(run, batch(0))))  # a compiler wraps it in one of its own
            assert "layers.0.experts.gate_up" in raised and "prepare_ddp(model" in raised, raised
    everywhere = DistributedDataParallel(Model())  # all experts on every rank
    everywhere(batch(0)).sum().backward()


def wrong_meshes_are_refused(buffer, mesh):
    for given in (mesh["dp"], mesh):
        error = refusal(partial(Model, buffer, given))
        assert isinstance(error, EPArgumentError) and error.argument == "ep_mesh", error
    for over in (mesh["ep"], init_device_mesh("cpu", (2,))):  # experts would be sharded over the same ranks twice
        refusal(partial(fully_shard, Model(buffer), mesh=over))  # by torch


OTHERS = {
    f.__name__: f
    for f in (
        averages_and_copies,
        scaler_skips_on_all_ranks,
        norms_where_a_rank_has_no_experts,
        compiled_under_a_memory_budget,
        unprepared_ddp_is_refused,
        wrong_meshes_are_refused,
    )
}


# --- worlds ---------------------------------------------------------------------------------------------------------


def attempt(found, key, function, *arguments):
    try:
        function(*arguments)
    except Exception:
        found[key] = traceback.format_exc()
    else:
        found[key] = ""


def wrapped_world(group, folder):
    """What went wrong, by case."""
    folder, found = Path(folder), {}
    mesh = init_device_mesh("cpu", (group.size() // 2, 2), mesh_dim_names=("dp", "ep"))
    buffer = ElasticBuffer(mesh["ep"], hidden=H)
    for number, name in enumerate(name for ranks, name in WRAPPERS if ranks == group.size()):
        attempt(found, name, through, buffer, mesh, folder, name, number == 1)
    if group.size() == 2:
        for name, function in OTHERS.items():
            attempt(found, name, function, buffer, mesh)
    buffer.destroy()
    return found


def go_on(buffer, mesh, folder, key):
    """From a checkpoint of another world."""
    model, reduce = plain(buffer, mesh)
    reset(model, seed=1)
    optimizer = optimizer_of(model, WRAPPERS[key][1].get("by_mesh", False))
    load(model, optimizer, folder / "{} {}".format(*key))
    reference = torch.load(folder / "reference.pt")
    same(state_of(model), reference["trained"])
    train(model, optimizer, range(STEPS, STEPS + MORE), reduce)
    same(state_of(model), reference["trained more"])


def loading_world(group, folder):
    folder, found = Path(folder), {}
    mesh = init_device_mesh("cpu", (1, group.size()), mesh_dim_names=("dp", "ep"))
    buffer = ElasticBuffer(mesh["ep"], hidden=H)
    for key in WRAPPERS:
        attempt(found, key, go_on, buffer, mesh, folder, key)
    buffer.destroy()
    return found
