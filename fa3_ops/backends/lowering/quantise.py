"""New keys and values as a narrow cache holds them; by arithmetic, since the 910 lacks FP8."""

from __future__ import annotations

import torch
from torch import Tensor

from fa3_ops.backends.lowering.rows import sequence_of_row

# Bits of the mantissa, lowest exponent, largest number
_FP8 = {torch.float8_e4m3fn: (3, -6, 448.0), torch.float8_e5m2: (2, -14, 57344.0)}


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
    return _codes(x, *_FP8[dtype]).view(dtype)


def _beside(x: Tensor, descale: Tensor, cu: Tensor | None) -> Tensor:
    """The descales of x's elements, to be broadcast."""
    if descale.dim() < 2:
        return descale[..., None]
    by_row = descale[:, None] if cu is None else descale[sequence_of_row(cu, x)]
    return by_row[..., None]


def _codes(x: Tensor, bits: int, lowest: int, largest: float) -> Tensor:
    """Bytes: sign, exponent and mantissa, of which the lowest exponent also has numbers without a
    leading one. Rounding carries into the exponent, as it should."""
    size = x.abs().clamp(max=largest)
    exponent = (size.view(torch.int32) // 2**23 - 127).clamp(min=lowest)
    quantum = ((exponent - bits + 127) * 2**23).view(torch.float32)
    code = (exponent - lowest) * 2**bits + (size / quantum).round().int()
    code = torch.where(x.isnan(), 127, code)
    return torch.where(x.signbit(), code + 128, code).to(torch.uint8)
