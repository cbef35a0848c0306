"""torch's dtypes as the core numbers them."""

from __future__ import annotations

import torch

#: Rows that combine can sum; RowType of csrc/cpu/kernels.hpp, Dtype of csrc/cuda/kernels.hpp.
ROW_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
#: Each dtype as a number that errors can spell out: up to eight letters of its short name.
DTYPE_CODES = {
    dtype: int.from_bytes(str(dtype).removeprefix("torch.").replace("float", "f").encode()[-8:], "little")
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
