"""The training example: one curve on any number of ranks, and across checkpoints."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from deep_ep_py.testing.worlds import run_processes

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Experts and sequences are no multiple of the ranks; one MoE layer and few tokens, so that hardly any choice is a tie.
TINY = (
    *("--hidden", "16", "--layers", "2", "--heads", "2", "--experts", "7", "--topk", "2", "--width", "8"),
    *("--context", "16", "--batch", "7", "--text-bytes", "100000", "--steps", "100", "--profile-steps", "0"),
)
HALF = 50

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def train(group, argv):
    """One rank's run; whether its curve is that of the run to compare with."""
    sys.path.insert(0, str(EXAMPLES))
    import train_moe

    return train_moe.train(train_moe.arguments([*TINY, *argv]), torch.device("cpu"))


def run(num_ranks, *argv):
    return run_processes(num_ranks, train, [str(argument) for argument in argv])[0]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The record of one process, and its folder, in which its checkpoints lie too."""
    folder = tmp_path_factory.mktemp("one")
    assert run(1, "--record", folder / "one.json", "--checkpoints", folder, "--checkpoint-every", HALF)
    return folder / "one.json"


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    again = "--compare-with", one, "--record", folder / "two.json", "--plot", folder / "two.png"
    same = run(2, *again, "--checkpoints", folder, "--checkpoint-every", HALF, "--profile-steps", 3)
    return same, folder


def test_two_ranks_have_the_curve_of_one_process(one, two):
    same, folder = two
    losses = json.loads(one.read_text())["loss"]
    assert len(losses) == 100 and losses[-1] < losses[0] - 1.5, "it does not learn, so its curve proves nothing"
    assert same
    found = json.loads((folder / "two.json").read_text())
    assert found["shares"]["forward dispatch"] > 0 and found["shares"]["backward combine"] > 0
    assert 0 < sum(found["shares"].values()) < 1
    assert (folder / "two.png").read_bytes()[1:4] == b"PNG"


def test_expert_bias_follows_the_loads_of_all_ranks(two):
    _, folder = two
    load = torch.tensor(json.loads((folder / "two.json").read_text())["load"])[:, 0]
    assert (load.sum(1) == 7 * 16 * 2).all()
    name = "weight.blocks.1.feed_forward.router.expert_bias"
    found = {name: torch.zeros(7)}
    dcp.load(found, checkpoint_id=folder / "step-000100")
    expected = 5e-3 * torch.sign(load.sum(1, keepdim=True) - 7 * load).sum(0)
    torch.testing.assert_close(found[name], expected.float())
    assert expected.abs().max() > 0.05


@pytest.mark.parametrize(("num_ranks", "ep"), [(1, 1), (3, 3), (4, 2)], ids=["one", "three", "two-by-two"])
def test_resumes_on_another_number_of_ranks(one, two, num_ranks, ep, tmp_path):
    (tmp_path / "step-000050").symlink_to(two[1] / "step-000050")
    assert run(num_ranks, "--ep", ep, "--checkpoints", tmp_path, "--resume", "--compare-with", one)


def test_refuses_the_checkpoint_of_other_settings(two):
    with pytest.raises(Exception, match=r"settings.*'lr': \(0.002, 0.5\)"):
        run(1, "--checkpoints", two[1], "--resume", "--lr", "0.5")
