"""New keys and values as a narrow cache holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from fa3_ops.backends.lowering.float8 import codes
from fa3_ops.backends.lowering.rows import sequence_of_row


def quantised(x: Tensor, dtype: torch.dtype, descale: Tensor | None, cu: Tensor | None) -> Tensor:
    """x (..., nheads_k, d) divided by descale, (batch_size, nheads_k), (nheads_k,) or one number,
    and rounded to the dtype of the cache, ties to even; what lies beyond becomes the largest number
    of it. The sequences of packed rows are those of cu. What has the dtype stays as it is."""
    if x.dtype == dtype:
        return x
    x = x.float()
    if descale is not None:
        x = x / _beside(x, descale, cu)
    if dtype == torch.int8:
        return x.nan_to_num(0.0).round().clamp(-128, 127).to(torch.int8)
    return codes(x, dtype).view(dtype)


def _beside(x: Tensor, descale: Tensor, cu: Tensor | None) -> Tensor:
    """The descales of x's elements, to be broadcast."""
    if descale.dim() < 2:
        return descale[..., None]
    by_row = descale[:, None] if cu is None else descale[sequence_of_row(cu, x)]
    return by_row[..., None]
