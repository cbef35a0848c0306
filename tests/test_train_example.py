"""The training example: one curve on any number of ranks, and across checkpoints."""

import importlib.util
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from deep_ep_py.testing.worlds import run_processes

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "train_moe.py"
BATCH, CONTEXT, EXPERTS, TOPK, STEPS, HALF = 7, 16, 7, 2, 100, 50
# Experts and sequences are no multiple of the ranks; one MoE layer and few tokens, so that hardly any choice is a tie.
TINY = f"""--hidden 16 --layers 2 --heads 2 --width 8 --experts {EXPERTS} --topk {TOPK} --context {CONTEXT}
    --batch {BATCH} --text-bytes 100000 --steps {STEPS} --checkpoint-every {HALF} --profile-steps 0""".split()

PLOT = "--plot two.png" if importlib.util.find_spec("matplotlib") else ""

#: Name: (ranks, arguments, whose checkpoint of half the way is the beginning). In this order, in the same processes.
RUNS = {
    "one": (1, "--checkpoints one --record one.json", None),
    "two": (2, f"--checkpoints two --record two.json {PLOT} --profile-steps 3 --compare-with one.json", None),
    "two, on one": (1, "--resume --checkpoints a --compare-with one.json", "two"),
    "two, on three": (3, "--resume --checkpoints b --compare-with one.json", "two"),
    "one, on two by two": (4, "--resume --checkpoints c --ep 2 --compare-with one.json", "one"),
    "by expert, on three": (3, "--resume --checkpoints d --compare-with one.json", "by expert"),
    "other settings": (1, "--resume --checkpoints two --lr 0.5", None),
}

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def write_by_expert(source, target):
    """A checkpoint as the example wrote it before it had DTensors: flat names, an entry for each expert."""
    entries = dcp.FileSystemReader(source).read_metadata().state_dict_metadata
    shapes = {name: entry.size for name, entry in entries.items() if hasattr(entry, "size")}
    whole = {name: torch.zeros(size, dtype=entries[name].properties.dtype) for name, size in shapes.items()}
    whole["record"] = ""
    dcp.load(whole, checkpoint_id=source, no_dist=True)
    found = {"record": whole.pop("record")}
    for name, tensor in whole.items():
        if name.startswith("model."):
            kind, name = "weight", name.removeprefix("model.")
        else:
            name, _, kind = name.removeprefix("optimizer.state.").rpartition(".")
        if ".experts." in name and tensor.dim():
            found.update({f"{kind}.{name}.{e}": tensor[e].clone() for e in range(EXPERTS)})
        else:
            found[f"{kind}.{name}"] = tensor
    dcp.save(found, checkpoint_id=target, no_dist=True)


def run_all(group, folder):
    """One rank of the largest world: what its runs returned or raised. Smaller worlds are its first ranks."""
    sys.path.insert(0, str(EXAMPLE.parent))
    import train_moe

    os.chdir(folder)
    rank, found = group.rank(), {}
    for name, (num_ranks, arguments, start) in {**RUNS, "": (group.size(), "", None)}.items():
        if dist.is_initialized():
            dist.destroy_process_group()
        if rank < num_ranks:
            store = (folder / f"rendezvous {name}").as_uri()
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=90)
            )
        if rank < num_ranks and name:
            args = train_moe.arguments([*TINY, *arguments.split()])
            if start is not None and rank == 0:
                args.checkpoints.mkdir()
                (args.checkpoints / f"step-{HALF:06d}").symlink_to(folder / start / f"step-{HALF:06d}")
                if start == "by expert":
                    write_by_expert(folder / "two" / f"step-{HALF:06d}", folder / start / f"step-{HALF:06d}")
            dist.barrier()
            try:
                found[name] = train_moe.train(args, torch.device("cpu"))
            except (Exception, SystemExit) as e:
                found[name] = f"{type(e).__name__}: {e}"
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What rank 0's runs returned, and the folder of their files."""
    folder = tmp_path_factory.mktemp("runs")
    largest = max(num_ranks for num_ranks, *_ in RUNS.values())
    return run_processes(largest, run_all, folder, timeout_seconds=110)[0], folder


def test_one_process_learns(runs):
    found, folder = runs
    assert found["one"] is True
    losses = json.loads((folder / "one.json").read_text())["loss"]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 1.5, "it does not learn, so that its curve proves nothing"


@pytest.mark.parametrize("name", ["two", "two, on one", "two, on three", "one, on two by two", "by expert, on three"])
def test_curve_is_that_of_one_process(runs, name):
    assert runs[0][name] is True


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_expert_bias_follows_the_loads_of_all_ranks(runs):
    folder = runs[1]
    load = torch.tensor(json.loads((folder / "two.json").read_text())["load"])[:, 0]
    assert (load.sum(1) == BATCH * CONTEXT * TOPK).all()
    name = "blocks.1.feed_forward.router.expert_bias"
    found = {name: torch.zeros(EXPERTS)}
    dcp.load({"model": found}, checkpoint_id=folder / "two" / f"step-{STEPS:06d}", no_dist=True)
    expected = 5e-3 * torch.sign(load.sum(1, keepdim=True) - EXPERTS * load).sum(0)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(found[name], expected.float())


def test_report(runs):
    folder = runs[1]
    shares = json.loads((folder / "two.json").read_text())["shares"]
    assert all(shares[f"{phase} {kind}"] > 0 for phase in ("forward", "backward") for kind in ("dispatch", "combine"))
    assert sum(shares.values()) < 1
    assert not PLOT or (folder / "two.png").read_bytes()[1:4] == b"PNG"


def test_refuses_the_checkpoint_of_other_settings(runs):
    assert runs[0]["other settings"].endswith("other settings (there, here): {'lr': (0.002, 0.5)}")


def test_launched_by_torchrun_fails_where_curves_differ(runs):
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    short = "--steps", "8", "--checkpoint-every", "0", "--compare-with", "one.json", "--tolerance", "-1"
    command = [sys.executable, *launcher, str(EXAMPLE), *TINY, *short]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, cwd=runs[1])
    assert "2 ranks, ep 2 (shm): steps 0 to 7" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1 and "DIFFERENT: losses of steps 0 to 7 differ by at most" in done.stdout
