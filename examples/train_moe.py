"""Train a small byte-level Mixture-of-Experts language model on real text, expert parallel × data parallel.

    torchrun --standalone --nproc-per-node 2 examples/train_moe.py --plot run.png
    torchrun --standalone --nproc-per-node 4 examples/train_moe.py --ep 2 --checkpoints runs --checkpoint-every 100
    torchrun --standalone --nproc-per-node 3 examples/train_moe.py --checkpoints runs --resume       # on other ranks

    python examples/train_moe.py --steps 120 --record one.json                                       # one process, then
    torchrun --standalone --nproc-per-node 2 examples/train_moe.py --steps 120 --compare-with one.json

Groups of ``--ep`` consecutive ranks hold one copy of the experts, spread over them; everything else is on every rank.
All ranks read different sequences of one global batch. Gradients are reduced by DistributedDataParallel, those of an
expert between the ranks that hold it (its group's tokens came to it). ``--device cuda`` takes the GPU of ``LOCAL_RANK``
(ranks share GPUs where there are fewer) and NCCL, and needs a library with CUDA kernels.

How near the curves of different numbers of ranks are: the same float32 numbers are added in another order, a change no
larger than that of ``--perturb``, which raises each initial weight by one unit in the last place; so that is the
yardstick. Both change losses by about 1e-6 (float32 resolves 2.4e-7 there; the default tolerance is 1e-5) until some
token has two experts that are equally good to the last bits and goes to the other one. From such a step on the runs are
two runs, whose losses were seen to differ by up to 1.4e-2; the comparison says so, and then allows 5e-2.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import os
import statistics
import sys
import sysconfig
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _byte_lm import ByteLM, ModelConfig, global_batch, share
from _run_report import KINDS, compare, exchange_seconds, plot, progress
from moe_text import read_text
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, record_function

from deep_ep_py import ElasticBuffer
from deep_ep_py.nn import GroupedExperts, clip_grad_norm_, prepare_ddp

WARMUP_STEPS = 20


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a byte-level MoE language model.")
    add = parser.add_argument
    add("--ep", type=int, help="ranks that share one copy of the experts; divides their number (all)")
    add("--text", type=Path, nargs="+", help="files or folders (the Python standard library's sources)")
    add("--text-bytes", type=int, default=2**22, help="as much of the text is read (4 MiB)")
    for name, default, meaning in (
        ("steps", 300, "steps in all, those before a checkpoint included"),
        ("batch", 8, "sequences of a step, over all ranks"),
        ("context", 128, "bytes of a sequence"),
        ("hidden", 128, "width of the model"),
        ("layers", 4, "blocks; the first is dense"),
        ("heads", 4, "attention heads"),
        ("experts", 16, "experts of a layer, over all ranks"),
        ("topk", 2, "experts per token"),
        ("width", 128, "inner width of an expert"),
        ("seed", 0, "of weights and batches"),
        ("checkpoint-every", 0, "steps between checkpoints; one more at the end"),
        ("profile-steps", 5, "last steps, in which time is divided"),
    ):
        add(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    add("--lr", type=float, default=2e-3, help="learning rate, after a warm-up (0.002)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (1)")
    add("--bias-rate", type=float, default=5e-3, help="step of the routers' expert bias (0.005)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of computation and rows; weights: float32")
    add("--device", choices=["cpu", "cuda"], help="where to train (cuda where there is a GPU, else cpu)")
    add("--compile", action="store_true", help="compile the blocks (a minute or more)")
    add("--checkpoint-activations", action="store_true", help="recompute the blocks in the backward pass")
    add("--checkpoints", type=Path, help="folder for checkpoints")
    add("--resume", action="store_true", help="go on from the last checkpoint, on any number of ranks")
    add("--record", type=Path, help="write losses, loads and times as JSON")
    add("--plot", type=Path, help="write loss and load curves as PNG")
    add("--compare-with", type=Path, help="another run's --record: fail unless the losses agree")
    add("--tolerance", type=float, default=1e-5, help="largest difference of a step's losses (1e-5)")
    add("--perturb", action="store_true", help="initial weights one unit in the last place higher")
    args = parser.parse_args(argv)
    if args.layers < 2 or args.hidden % args.heads or not 1 <= args.topk <= args.experts:
        parser.error("needs --layers of at least 2, --hidden divisible by --heads, --topk from 1 to --experts")
    if (args.resume or args.checkpoint_every) and args.checkpoints is None:
        parser.error("--resume and --checkpoint-every need --checkpoints")
    return args


def join_world(device: str | None) -> torch.device:
    """Become a rank of torchrun's world, or the only one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    backend, found = "gloo", torch.device("cpu")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch finds no GPU here")
        backend = "cpu:gloo,cuda:nccl"
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(found)  # before the group: NCCL takes the current device
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return found


def checkpointed(model: ByteLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer state: what several ranks hold is written once, and experts can be read on any ranks."""
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def save_checkpoint(
    folder: Path, step: int, model: ByteLM, optimizer: torch.optim.Optimizer, record: dict[str, Any]
) -> None:
    dcp.save(
        {**checkpointed(model, optimizer), "record": json.dumps(record)}, checkpoint_id=folder / f"step-{step:06d}"
    )


def load_checkpoint(
    folder: Path, model: ByteLM, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> dict[str, Any]:
    """Fill model and optimizer from the last whole checkpoint, and return the record of its run."""
    whole = sorted(found.parent for found in folder.glob("step-*/.metadata"))  # it is written last
    if not whole:
        raise SystemExit(f"no checkpoint in {folder}")
    written = {"record": ""}
    dcp.load(written, checkpoint_id=whole[-1])
    record: dict[str, Any] = json.loads(written["record"])
    differing = {k: (v, settings[k]) for k, v in record["settings"].items() if settings[k] != v}
    if differing:
        raise SystemExit(f"{whole[-1]} is of a run with other settings (there, here): {differing}")
    state = checkpointed(model, optimizer)
    entries = dcp.FileSystemReader(whole[-1]).read_metadata().state_dict_metadata
    by_expert = any(name.startswith("weight.") for name in entries)
    dcp.load(entries_by_expert(state, model) if by_expert else state, checkpoint_id=whole[-1])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return record


def entries_by_expert(state: dict[str, Any], model: ByteLM) -> dict[str, torch.Tensor]:
    """The tensors of a state by the names that earlier versions of this example gave them: each expert had its own."""
    experts = {
        f"{name}.{p}": module.owned
        for name, module in model.named_modules()
        if isinstance(module, GroupedExperts)
        for p, _ in module.named_parameters()
    }
    found = {}
    for name, weight in state["model"].items():
        for kind, tensor in {"weight": weight, **state["optimizer"]["state"].get(name, {})}.items():
            if name in experts and tensor.dim():  # not the number of steps, which is one for all
                part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                found.update({f"{kind}.{name}.{e}": part[i] for i, e in enumerate(experts[name])})
            else:
                found[f"{kind}.{name}"] = tensor
    return found


def train(args: argparse.Namespace, device: torch.device) -> bool:
    """Train on all ranks of the world, and report. False: the curve is not that of the run to compare with."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    ep = num_ranks if args.ep is None else args.ep
    if ep < 1 or num_ranks % ep:
        raise SystemExit(f"--ep {ep} does not divide the number of ranks ({num_ranks})")
    mesh = init_device_mesh(device.type, (num_ranks // ep, ep), mesh_dim_names=("dp", "ep"))

    sources = args.text or sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = read_text(sources, args.text_bytes)
    if len(text) <= args.context:
        raise SystemExit(f"{len(text)} bytes of text are too few for sequences of {args.context}")
    config = ModelConfig(*(getattr(args, name) for name in ModelConfig.__dataclass_fields__))
    # What decides about a run's numbers. Batches and weights follow from these and the step: nothing else is random.
    settings = {name: getattr(args, name) for name in ("batch", "seed", "lr", "clip", "bias_rate", "dtype")}
    settings |= asdict(config) | {"text": hashlib.sha256(text).hexdigest()}

    mine = share(args.batch, rank, num_ranks)
    most = -(-args.batch // num_ranks) * args.context
    buffer = ElasticBuffer(mesh["ep"], num_max_tokens_per_rank=most, hidden=args.hidden, num_topk=args.topk)
    torch.manual_seed(args.seed)  # on a CPU, so that weights are the same on all ranks and all devices
    model = ByteLM(config, buffer, recompute=args.checkpoint_activations).to(device)
    if args.perturb:
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
    parallel = DistributedDataParallel(prepare_ddp(model, mesh["dp"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    record: dict[str, Any] = {"settings": settings, "loss": [], "load": []}
    if args.resume:
        record = load_checkpoint(args.checkpoints, model, optimizer, settings)
    if args.compile:
        for block in model.blocks:
            block.compile(fullgraph=True)

    start, seconds = len(record["loss"]), []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    profile = torch.profiler.profile(activities=activities)
    profile_from = max(start, args.steps - args.profile_steps)
    steps = range(start, args.steps)
    for step in progress(steps, lambda: f"loss {record['loss'][-1]:.4f}") if rank == 0 else steps:
        if step == profile_from:
            profile.start()
            atexit.register(profile.stop)  # with a profiler that still runs, torch crashes at exit
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / WARMUP_STEPS)
        sequences = global_batch(text, args.seed, step, args.batch, args.context + 1)[mine].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss, aux_loss, load = parallel(sequences)
        # This rank's part of the mean over the global batch, however uneven the parts are: the sum over ranks is meant,
        # and gradients become means over ranks.
        loss = loss / (args.batch * args.context)
        with record_function("train: backward"):
            ((loss + aux_loss * (len(sequences) / args.batch)) * num_ranks).backward()
        clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()

        totals = torch.cat([loss.detach().double().view(1), load.double().flatten()])
        dist.all_reduce(totals)
        load = totals[1:].view_as(load).long()
        for layer, layer_load in zip(model.moe_layers(), load, strict=True):
            layer.router.update_expert_bias(layer_load, args.bias_rate)
        record["loss"].append(totals[0].item())
        record["load"].append(load.tolist())
        seconds.append(time.perf_counter() - began)
        due = step + 1 == args.steps or (args.checkpoint_every and (step + 1) % args.checkpoint_every == 0)
        if args.checkpoints and due:
            save_checkpoint(args.checkpoints, step + 1, model, optimizer, record)

    profiled = seconds[profile_from - start :]
    if profiled:
        profile.stop()
        atexit.unregister(profile.stop)
        parts = [*exchange_seconds(profile, device.type == "cuda"), sum(profiled)]
        sums = torch.tensor(parts, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        record["shares"] = dict(zip(KINDS, (sums[:-1] / sums[-1]).tolist(), strict=True))
    ok = report(args, record, start, seconds[: profile_from - start], profiled, buffer) if rank == 0 else True
    buffer.destroy()
    return ok


def report(
    args: argparse.Namespace,
    record: dict[str, Any],
    start: int,
    plain: list[float],
    profiled: list[float],
    buffer: ElasticBuffer,
) -> bool:
    """Print, write and draw what was asked for. Whether the curve is that of the other run."""
    if plain:
        record["steps_per_second"] = 1 / statistics.median(plain)
        print(
            f"{dist.get_world_size()} ranks, ep {buffer.num_ranks} ({buffer.backend_info().name}): steps {start} to "
            f"{args.steps - 1}, loss {record['loss'][start]:.4f} to {record['loss'][-1]:.4f}, "
            f"{record['steps_per_second']:.2f} steps/s"
        )
    if profiled:
        print("share of the step time in " + ", ".join(f"{k} {v:.1%}" for k, v in record["shares"].items() if v))
        if plain:
            slower = statistics.median(profiled) / statistics.median(plain)
            print(f"  (of the last {len(profiled)} steps, which took {slower:.2f} × the others while profiled)")
    if args.record:
        args.record.write_text(json.dumps(record))
    if args.plot:
        plot(args.plot, record)
    if not args.compare_with:
        return True
    other = json.loads(args.compare_with.read_text())
    same, line = compare(record, other, start, args.tolerance)
    print(line)
    return same


def main() -> int:
    args = arguments()
    same = train(args, join_world(args.device))
    dist.barrier()
    dist.destroy_process_group()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
