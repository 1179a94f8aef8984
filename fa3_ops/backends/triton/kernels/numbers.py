"""Numbers of 8 bits by arithmetic on float32, the same on every device: not all have the types.
Their tensors come as bytes.

A code of FP8 is a sign, an exponent and a mantissa without its leading 1; the lowest exponent also
has numbers without that 1.
"""

import triton
import triton.language as tl

PLAIN = tl.constexpr(0)  # as the device has it
FLOAT8_E4M3FN = tl.constexpr(1)
FLOAT8_E5M2 = tl.constexpr(2)
INT8 = tl.constexpr(3)
INTEGER = tl.constexpr(8388608.0)  # 2^23, from which on float32 has integers alone
UNIT = tl.constexpr(2.0**120)  # between the exponents of float32 and of float8_e4m3fn


@triton.jit
def power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def float8(x, size, BITS: tl.constexpr, LOWEST: tl.constexpr):
    """The code of x, whose absolute value is `size` but for what lies beyond the largest number:
    rounded to even. Rounding carries into the exponent, as it should."""
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, LOWEST)
    integer = size * power_of_two(BITS - exponent) + INTEGER
    code = ((exponent - LOWEST) << BITS) + (integer.to(tl.int32, bitcast=True) & 0x7FFFFF)
    code = tl.where(x == x, tl.minimum(code, 127), 127)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 128)).to(tl.uint8)


@triton.jit
def quantised(x, FORMAT: tl.constexpr):
    """x, float32, as codes. What lies beyond the largest number becomes that."""
    if FORMAT == FLOAT8_E4M3FN:
        return float8(x, tl.minimum(tl.abs(x), 448.0), 3, -6)
    elif FORMAT == FLOAT8_E5M2:
        return float8(x, tl.minimum(tl.abs(x), 57344.0), 2, -14)
    else:
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -128.0), 127.0), 0.0)
        integer = x + 1.5 * INTEGER  # whose last bits count from 2^22 on
        return ((integer.to(tl.int32, bitcast=True) & 0x7FFFFF) - 0x400000).to(tl.int8)


@triton.jit
def widened(x, FORMAT: tl.constexpr, WIDE: tl.constexpr):
    """x for arithmetic: of PLAIN numbers, or of float8_e4m3fn's codes."""
    if FORMAT == FLOAT8_E4M3FN:
        code = x.to(tl.int32)
        size = ((code & 127) << 20).to(tl.float32, bitcast=True) * UNIT
        size = tl.where((code & 127) == 127, float("nan"), size)
        return tl.where(code < 128, size, -size)
    else:
        return x.to(WIDE)


@triton.jit
def narrowed(x, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """The inverse of `widened`: NaN is what lies beyond the largest number of float8_e4m3fn."""
    if FORMAT == FLOAT8_E4M3FN:
        return float8(x, tl.minimum(tl.abs(x), 512.0), 3, -6)
    else:
        return x.to(dtype)
