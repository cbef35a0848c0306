"""Grouped matrix products and the experts made of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deep_ep_py.nn import GroupedExperts, SharedExpert
from deep_ep_py.nn.grouped import grouped_mm

#: Inclusive end rows; the last holds rows that belong to no group.
OFFSETS = {"even": [2, 4, 6], "empty groups": [0, 5, 5, 6, 6], "no rows": [0, 0], "no groups": []}
#: (dtype, sizes that torch's kernel takes): both ways through grouped_mm.
WAYS = [(torch.float64, False), (torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
WAYS += [(torch.bfloat16, True)]


def operands(offsets, dtype, aligned):
    torch.manual_seed(0)
    inner, outer = (16, 24) if aligned else (5, 3)
    x = torch.randn(offsets[-1] if offsets else 0, inner, dtype=dtype, requires_grad=True)
    w = torch.randn(len(offsets), inner, outer, dtype=dtype, requires_grad=True)
    return x, w, torch.tensor(offsets, dtype=torch.int32)


def row_by_row(x, w, offs):
    group = torch.searchsorted(offs.long(), torch.arange(len(x)), right=True)
    return torch.einsum("nm,nmp->np", x, w[group])


@pytest.mark.parametrize("case", OFFSETS)
@pytest.mark.parametrize(("dtype", "aligned"), WAYS)
def test_grouped_mm_and_its_gradients(case, dtype, aligned):
    x, w, offs = operands(OFFSETS[case], dtype, aligned)
    y, expected = grouped_mm(x, w, offs), row_by_row(x, w, offs)
    cotangent = torch.randn(expected.shape, dtype=dtype)
    got = (y, *torch.autograd.grad(y, [x, w], cotangent))
    wanted = (expected, *torch.autograd.grad(expected, [x, w], cotangent))
    tolerance = {"rtol": 0.04, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got, wanted, **tolerance)


def test_the_loop_where_torch_has_no_kernel(monkeypatch):
    x, w, offs = operands(OFFSETS["empty groups"], torch.bfloat16, aligned=True)
    native = grouped_mm(x, w, offs)
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    assert torch.equal(grouped_mm(x, w, offs), native)


def test_the_loop_is_a_sound_operator():
    x, w, offs = operands(OFFSETS["empty groups"], torch.float64, aligned=False)
    assert torch.autograd.gradcheck(grouped_mm, (x, w, offs))
    assert torch.autograd.gradgradcheck(grouped_mm, (x, w, offs))
    torch.library.opcheck(torch.ops.deep_ep_py.grouped_mm.default, (x, w, offs))
    y = torch.randn(len(x), 3, dtype=x.dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.deep_ep_py.grouped_outer.default, (x, y, offs))


def by_hand(experts: GroupedExperts, x, offs, row_weights):
    width = experts.down.shape[2]
    outputs = []
    for row in range(len(x)):
        e = int((offs <= row).sum())
        gate, up = experts.gate_up[e][:width] @ x[row], experts.gate_up[e][width:] @ x[row]
        outputs.append(row_weights[row] * (experts.down[e] @ (gate * torch.sigmoid(gate) * up)))
    return torch.stack(outputs)


@pytest.mark.parametrize("case", ["even", "empty groups"])
def test_experts_by_hand(case):
    offs = torch.tensor(OFFSETS[case], dtype=torch.int32)
    experts = GroupedExperts(6, 4, len(offs), dtype=torch.float64)
    x = torch.randn(int(offs[-1]), 6, dtype=torch.float64, requires_grad=True)
    row_weights = torch.rand(len(x), dtype=torch.float64, requires_grad=True)
    inputs = [x, row_weights, *experts.parameters()]
    outputs = experts(x, offs, row_weights), by_hand(experts, x, offs, row_weights)
    got, expected = ((y, *torch.autograd.grad(y.square().sum(), inputs)) for y in outputs)
    torch.testing.assert_close(got, expected)


def test_without_rows_gradients_are_zeros():
    experts = GroupedExperts(16, 8, 4)
    y = experts(torch.zeros(0, 16, requires_grad=True), torch.zeros(4, dtype=torch.int32), torch.zeros(0))
    y.square().sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() == 0, name


def test_bf16_rows_with_float32_weights():
    torch.manual_seed(0)
    experts = GroupedExperts(16, 8, 2)
    offs, x = torch.tensor([3, 5], dtype=torch.int32), torch.randn(5, 16)
    y = experts(x.bfloat16(), offs, torch.rand(5))
    assert y.dtype == torch.bfloat16
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in experts.parameters())


@pytest.mark.parametrize("num_ranks", [2, 3, 9])
def test_experts_start_alike_on_any_number_of_ranks(num_ranks):
    parts = []
    for rank in range(num_ranks):
        torch.manual_seed(7)
        parts.append(GroupedExperts(4, 3, 7, rank, num_ranks))
    torch.manual_seed(7)
    whole = GroupedExperts(4, 3, 7)
    assert [e for part in parts for e in part.owned] == list(whole.owned) == list(range(7))
    assert torch.equal(torch.cat([part.gate_up for part in parts]), whole.gate_up)
    assert torch.equal(torch.cat([part.down for part in parts]), whole.down)
    assert not torch.equal(whole.down[0], whole.down[1])


def test_compiles_whole():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        experts = GroupedExperts(16, 8, 3, dtype=dtype)
        x, weights = torch.randn(6, 16, dtype=dtype, requires_grad=True), torch.rand(6)
        offs, results = torch.tensor([0, 4, 6], dtype=torch.int32), []
        for run in (experts, torch.compile(experts, fullgraph=True, backend="aot_eager")):
            y = run(x, offs, weights)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *experts.parameters()])))
        torch.testing.assert_close(results[0], results[1])


def test_shared_expert_is_one_expert():
    shared = SharedExpert(6, 4, dtype=torch.float64)
    experts = GroupedExperts(6, 4, 1, dtype=torch.float64)
    with torch.no_grad():
        experts.gate_up[0], experts.down[0] = shared.gate_up, shared.down
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(shared(x), experts(x, torch.tensor([3], dtype=torch.int32), torch.ones(3)))
