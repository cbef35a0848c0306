"""Rows to fp8: scales, rounding, saturation, what is refused. The GPU kernel is held to this code on the emulation."""

import pytest
import torch

import deep_ep_py
from deep_ep_py import EPArgumentError, cast_rows


def rows(num_rows=7, hidden=300, dtype=torch.bfloat16):
    seeded = torch.Generator().manual_seed(5)
    return (torch.randn(num_rows, hidden, generator=seeded) * 30).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("channels", "groups"), [(128, 3), (None, 1), (300, 1), (7, 43)])
def test_scales_and_rows(dtype, channels, groups):
    x = rows(dtype=dtype)
    x[3] = 0
    quantised, scales = cast_rows(x, channels=channels)
    assert quantised.dtype == torch.float8_e4m3fn and quantised.shape == x.shape
    assert scales.dtype == torch.float32 and scales.shape == (7, groups)
    width = channels or 300
    for t in range(7):
        for g in range(groups):
            part = slice(g * width, (g + 1) * width)
            largest = x[t, part].float().abs().max().clamp(min=1e-4)
            assert scales[t, g] == largest / 448
            back = quantised[t, part].float() * scales[t, g]
            # e4m3 has three bits behind the leading one, and nothing below 2**-9.
            assert ((back - x[t, part].float()).abs() <= x[t, part].float().abs() / 16 + scales[t, g] * 2**-10).all()


def test_rounded_scales_are_the_powers_of_two_above():
    x = rows(dtype=torch.float32)
    x[0, :128] = 448.0  # a scale that is a power of two stays
    _, exact = cast_rows(x)
    _, rounded = cast_rows(x, round_scale=True)
    mantissa, _ = torch.frexp(rounded)
    assert (mantissa == 0.5).all()
    assert ((rounded >= exact) & (rounded < 2 * exact)).all()
    assert rounded[0, 0] == exact[0, 0] == 1


def test_strided_and_empty():
    x = rows()
    for view in (x[:, ::2], x[::2], x.t()):
        for got, want in zip(cast_rows(view), cast_rows(view.contiguous()), strict=True):
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    quantised, scales = cast_rows(rows(num_rows=0))
    assert quantised.shape == (0, 300) and scales.shape == (0, 3)


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (rows(dtype=torch.float64), {}, "x: expected bfloat16"),
        (rows()[0], {}, "two dimensions"),
        ("rows", {}, "x: expected"),
        (rows(), {"channels": 0}, "channels: expected a positive number"),
    ],
)
def test_refused(x, options, words):
    with pytest.raises(EPArgumentError, match=words):
        cast_rows(x, **options)


def test_dispatch_takes_them():
    def on_one_rank(communicator):
        buffer = deep_ep_py.ElasticBuffer(communicator, backend="collective")
        pair = cast_rows(rows())
        (recv_x, recv_sf), *_ = buffer.dispatch(pair, torch.zeros((7, 1), dtype=torch.int64), num_experts=1)
        assert torch.equal(recv_x.view(torch.uint8), pair[0].view(torch.uint8))
        assert torch.equal(recv_sf, pair[1])
        buffer.destroy()

    from deep_ep_py.testing import run_threads

    run_threads(1, on_one_rank)
