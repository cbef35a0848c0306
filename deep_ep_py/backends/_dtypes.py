"""torch's dtypes as the core numbers them."""

from __future__ import annotations

import torch

from .. import _C

#: Rows that combine can sum; RowType of csrc/cpu/kernels.hpp, Dtype of csrc/cuda/kernels.hpp.
ROW_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
#: What rows can be (``DispatchSpec.carries``), by the number that stands in a record.
CARRIED = {words: number for number, words in enumerate(_C.carried)}


def _code(dtype: torch.dtype) -> int:
    """The name in base 38, "float" as "f", so that the core's errors can spell it (csrc/protocol/agreement.cpp)."""
    letters = "?abcdefghijklmnopqrstuvwxyz0123456789_"
    code = 0
    for letter in str(dtype).removeprefix("torch.").replace("float", "f"):
        code = code * 38 + letters.index(letter)
    return code


#: Each dtype as a number below 2**63.
DTYPE_CODES = {dtype: _code(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
