"""The examples run, and fail where their result is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "moe_text.py"
SMALL = ("--tokens", "96", "--hidden", "32", "--experts", "7", "--topk", "3", "--repeats", "1")

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def run_example(num_ranks, *arguments, script=EXAMPLE):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)) if num_ranks else ()
    command = [sys.executable, *launcher, str(script), *SMALL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def loads(output):
    """Rows that each expert computed, over all ranks."""
    listed = re.findall(r"load of experts \d+\.\.\d+: \[([\d, ]*)\]", output)
    return [int(number) for numbers in listed for number in numbers.split(",")]


@pytest.mark.parametrize("num_ranks", [0, 3], ids=["plain", "3"])
def test_moe_text_equals_the_dense_layer(num_ranks):
    done = run_example(num_ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = max(num_ranks, 1)
    assert done.stdout.count(": 96 tokens, ") == done.stdout.count("  equal: ") == ranks, done.stdout
    assert len(loads(done.stdout)) == 7 and sum(loads(done.stdout)) == ranks * 96 * 3
    assert done.stdout.count("  slot 2 ") == ranks


def test_moe_text_reads_the_text_it_is_given(tmp_path):
    text = "Whoever reads this line sees it again.\n" * 3 + "end"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.bin").write_bytes(b"\0" * 500)  # not text, so a folder's reader leaves it out
    done = run_example(2, "--path", str(tmp_path))
    assert done.returncode == 0 and done.stdout.count("  equal: ") == 2, done.stdout + done.stderr
    assert "96 tokens" in done.stdout and f": {len(text) - 96} tokens" in done.stdout  # the second rank has fewer
    assert "W h o e v e r" in done.stdout


# What a wrong weight on one rank does; written into a program of its own, so that the example has no switch for it.
PLANT = """
import os, runpy, sys
from deep_ep_py import ElasticBuffer

dispatch, combine = ElasticBuffer.dispatch, ElasticBuffer.combine
def wrong_weight(self, *args, **kwargs):
    recv_x, recv_topk_idx, recv_weights, handle, event = dispatch(self, *args, **kwargs)
    if os.environ["RANK"] == "1":
        recv_weights[recv_weights.shape[0] // 2 // 8 * 8] *= 1.01
    return recv_x, recv_topk_idx, recv_weights, handle, event
def not_a_number(self, x, handle):
    y, weights, event = combine(self, x, handle)
    if os.environ["RANK"] == "1":
        y[5, 5] = float("nan")
    return y, weights, event
if "PLANT" == "wrong_weight":
    ElasticBuffer.dispatch = wrong_weight
else:
    ElasticBuffer.combine = not_a_number
runpy.run_path("EXAMPLE", run_name="__main__")
"""


@pytest.mark.parametrize("plant", ["wrong_weight", "not_a_number"])
def test_moe_text_fails_where_a_value_is_wrong(plant, tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(PLANT.replace("EXAMPLE", str(EXAMPLE)).replace("PLANT", plant))
    done = run_example(2, script=script)
    assert done.returncode != 0
    assert "DIFFERENT: largest error" in done.stdout, done.stdout + done.stderr


def test_moe_text_refuses_more_slots_than_experts():
    done = run_example(0, "--topk", "8")
    assert done.returncode == 2 and "--topk is at most --experts" in done.stderr
