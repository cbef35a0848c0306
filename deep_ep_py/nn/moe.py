"""A whole expert-parallel Mixture-of-Experts layer: the worked example of the differentiable ops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..autograd import combine, dispatch, plan, plan_and_dispatch
from ..communicator import thread_world
from ..elastic import ElasticBuffer
from ..errors import EPArgumentError
from .data_parallel import check_ddp
from .experts import GroupedExperts, SharedExpert
from .router import Router, RouterConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class MoEOutput(NamedTuple):
    """What the layer returns.

    Attributes:
        output: [*, H] of the input's dtype (under autocast: of autocast's).
        aux_loss: scalar float32, the router's weighted auxiliary losses of this rank's tokens: add it to the loss. 0
            without any.
        num_tokens_per_expert: [E] int64, the load that this rank's tokens put on each expert, for
            ``layer.router.update_expert_bias`` and for plots.
    """

    output: torch.Tensor
    aux_loss: torch.Tensor
    num_tokens_per_expert: torch.Tensor


class MoELayer(nn.Module):
    """Router, dispatch, experts, combine; the experts are spread over the ranks of a buffer, the rest is on each rank.

    A forward pass is collective over the buffer's group (all ranks, same order of layers, also with zero tokens), and
    so is its backward pass. It changes nothing in the module: what training needs beside the output is returned. So the
    layer composes with ``torch.compile(fullgraph=True)`` and with activation checkpointing.

    Gradients: those of the experts are sums over the tokens of all ranks; those of the router and the shared expert
    are of this rank's tokens, to be summed over ranks. Where the loss is a mean over all ranks' tokens, and every rank
    holds the mean over its own, divide both sums by R (``layer.experts.gradient_divisor`` is for that). A parameter
    whose expert got no token has a gradient of zeros.

    Args:
        hidden: H. width: inner width of an expert. num_experts: E, over all ranks. num_topk: K.
        buffer: whose ranks hold the experts; layers may share one. None: an own one of a single rank, this process.
        router: how to score and choose; None is ``RouterConfig()``.
        shared_width: inner width of an expert that all tokens pass, as DeepSeekMoE has it (arXiv 2401.06066); 0: none.
        expert_alignment: rows of an expert start at a multiple of it, zeros between. None: 8 on a GPU, which torch's
            grouped kernel wants of 16-bit rows (their gradient in the weights reads 16 bytes at a time); 1 on a CPU,
            where more only adds rows.
        overlap_shared: compute the shared expert while rows travel, and its backward pass while gradients do.
        separate_plan: plan, then dispatch, instead of both in one rendezvous: for selective activation checkpointing
            that saves what ``torch.ops.deep_ep_py.plan.default`` returns, so that recomputation exchanges no counts.
        ep_mesh: a DeviceMesh of one dimension over the buffer's ranks. The experts' parameters become DTensors of it.
            To shard them further by FSDP, it must be a dimension of the mesh that has FSDP's dimension too. None: the
            mesh that the buffer was made of, or one of its process group. Without any (threads, MPI), and where the
            buffer has one rank, parameters are plain tensors of this rank's experts.
        device, dtype: of the parameters; the router is float32 in any case. Parameters and tokens must be on the
            buffer's device when the layer is called.

    Raises:
        EPArgumentError: as RouterConfig and Router; ``ep_mesh`` does not have the ranks of the buffer.
        EPError: in a forward pass, by a DistributedDataParallel that does not leave out the experts; see
            :func:`.prepare_ddp`.

    Example::

        layer = MoELayer(1024, 512, 64, 6, buffer, router=RouterConfig.deepseek_v3(), shared_width=512)
        y, aux_loss, load = layer(x)
        (loss(y) + aux_loss).backward()
        optimizer.step()
        layer.router.update_expert_bias(load, group=group)
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        num_experts: int,
        num_topk: int,
        buffer: ElasticBuffer | None = None,
        *,
        router: RouterConfig | None = None,
        shared_width: int = 0,
        expert_alignment: int | None = None,
        overlap_shared: bool = True,
        separate_plan: bool = False,
        ep_mesh: DeviceMesh | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.buffer = buffer if buffer is not None else ElasticBuffer(thread_world(1)[0], hidden=hidden)
        if self.buffer.group is None:
            raise EPArgumentError.of("buffer", "a buffer that is not destroyed", repr(buffer))
        if expert_alignment is None:
            expert_alignment = 1 if self.buffer.device.type == "cpu" else 8
        self.expert_alignment, self.overlap_shared, self.separate_plan = expert_alignment, overlap_shared, separate_plan
        rank, num_ranks = self.buffer.rank_idx, self.buffer.num_ranks
        mesh = _mesh_of(self.buffer, ep_mesh)
        self.router = Router(hidden, num_experts, num_topk, router, device=device)
        self.experts = GroupedExperts(
            hidden, width, num_experts, rank, num_ranks, mesh=mesh, device=device, dtype=dtype
        )
        self.shared = SharedExpert(hidden, shared_width, device=device, dtype=dtype) if shared_width else None

    def forward(self, x: torch.Tensor) -> MoEOutput:
        """The layer over this rank's tokens x [*, S, H] (S: length of a sequence, where a loss is taken over them)."""
        check_ddp()
        self.buffer._check("x", x)
        topk_idx, topk_weights, aux_loss, load = self.router(x)
        tokens = x.reshape(-1, x.shape[-1])
        if torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(torch.get_autocast_dtype(x.device.type))

        num_experts, alignment = self.router.num_experts, self.expert_alignment
        overlap: Any = self.shared is not None and self.overlap_shared
        # Expanded: one row per token and slot, sorted by expert, so that nothing is left to permute.
        if self.separate_plan:
            handle = plan(
                topk_idx, self.buffer, num_experts, expand=True, expert_alignment=alignment, placement="chunked"
            )
            arriving = dispatch(tokens, topk_weights, handle, async_finish=overlap)
        else:
            arriving = plan_and_dispatch(
                tokens,
                topk_idx,
                topk_weights,
                self.buffer,
                num_experts,
                expand=True,
                expert_alignment=alignment,
                placement="chunked",
                async_finish=overlap,
            )
        shared = self.shared(tokens) if self.shared is not None else None
        received = arriving.wait() if overlap else arriving
        recv_x, row_weights, handle = (*received, handle) if self.separate_plan else received

        y = self.experts(recv_x, handle.expert_offsets, row_weights)
        # As a bias: the shared expert's output starts the sum, which is rounded once.
        output = combine(y, handle, bias=shared)
        # Not a view in autograd's sense: a change in place of a view would drop the hooks that FSDP puts on outputs.
        return MoEOutput(torch.ops.aten._unsafe_view(output, x.shape), aux_loss, load)


def _mesh_of(buffer: ElasticBuffer, given: DeviceMesh | None) -> DeviceMesh | None:
    """The mesh of the experts' parameters; see MoELayer."""
    mesh = buffer._mesh() if given is None else given
    if mesh is not None:
        ranks = (mesh.size(), mesh.get_local_rank()) if mesh.ndim == 1 else None
        if ranks != (buffer.num_ranks, buffer.rank_idx):
            expected = f"a DeviceMesh of one dimension whose {buffer.num_ranks} ranks are those of the buffer, in order"
            raise EPArgumentError.of("ep_mesh", expected, mesh)
    return mesh
