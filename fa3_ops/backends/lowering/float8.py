"""The two FP8 formats by arithmetic on float32, since the 910 has neither dtype.

A code is a sign, an exponent and a mantissa without its leading 1; the lowest exponent also has
numbers without that 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Float8:
    bits: int  # of the mantissa
    lowest: int  # exponent
    largest: float
    first_nan: int  # its code; with infinity, that is the code before it
    has_infinity: bool


FORMATS = {
    torch.float8_e4m3fn: Float8(3, -6, 448.0, 127, has_infinity=False),
    torch.float8_e5m2: Float8(2, -14, 57344.0, 125, has_infinity=True),
}


def codes(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, float32, as uint8: rounded to even, what lies beyond the largest number becomes that.
    Rounding carries into the exponent, as it should."""
    format = FORMATS[dtype]
    size = x.abs().clamp(max=format.largest)
    exponent = (size.view(torch.int32) // 2**23 - 127).clamp(min=format.lowest)
    quantum = _power_of_two(exponent - format.bits)
    code = (exponent - format.lowest) * 2**format.bits + (size / quantum).round().int()
    code = torch.where(x.isnan(), 127, code)
    # Not x.signbit(): a device may lack it for strides that PyTorch takes for channels_last.
    return torch.where(x.view(torch.int32) < 0, code + 128, code).to(torch.uint8)


def values(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the 256 codes stand for, (256,) float32; made on the device, since a capture takes
    nothing from the host."""
    format = FORMATS[dtype]
    code = torch.arange(256, dtype=torch.int32, device=device)
    size = code % 128
    ones = 2**format.bits
    exponent, mantissa = size // ones, size % ones
    mantissa = torch.where(exponent > 0, mantissa + ones, mantissa)
    value = mantissa * _power_of_two(exponent.clamp(min=1) + format.lowest - 1 - format.bits)
    value = value.masked_fill(size >= format.first_nan, float("nan"))
    if format.has_infinity:
        value = value.masked_fill(size == format.first_nan - 1, float("inf"))
    return torch.where(code >= 128, -value, value)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) * 2**23).view(torch.float32)
