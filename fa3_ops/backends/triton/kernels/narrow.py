"""Products of rows and keys of 8 bits, in float16, which holds every number that they have.

A compiler lays out what it multiplies by the width that it was loaded with, and a product's sums
have another order then. So keys are loaded two numbers at a time, as int16: all tiles have them as
they have 16 bits, which a matrix is turned by in shared memory besides. The first of all pairs make
one product, the others a second.
"""
# fmt: off

import triton
import triton.language as tl

from fa3_ops.backends.triton.kernels.numbers import FLOAT8_E4M3FN, FLOAT8_E5M2


@triton.jit
def unpacked(pairs, FORMAT: tl.constexpr):
    """The first and the second of every pair, as float16."""
    if FORMAT == FLOAT8_E4M3FN:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 all; .reg .b16 first, second;
            prmt.b32 all, $2, 0, 0x3120; mov.b32 {first, second}, all;
            cvt.rn.f16x2.e4m3x2 $0, first; cvt.rn.f16x2.e4m3x2 $1, second; }""",
            "=r,=r,r", [pairs], (tl.float16, tl.float16), is_pure=True, pack=2,
        )
    elif FORMAT == FLOAT8_E5M2:  # the upper byte of a float16
        first = (pairs << 8).to(tl.float16, bitcast=True)
        return first, (pairs & -256).to(tl.float16, bitcast=True)
    else:
        return ((pairs << 8) >> 8).to(tl.float16), (pairs >> 8).to(tl.float16)


@triton.jit
def halves(x):
    """The left and the right half of (rows, DIM)."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def in_order(x):
    """(rows, DIM), whose left half has the first of every pair of columns, with all in order."""
    first, second = halves(x)
    return tl.reshape(tl.join(first, second), x.shape)


@triton.jit
def product(rows, keys, scores, FORMAT: tl.constexpr):
    """scores (M, BLOCK_N) and the products of rows (M, DIM) and keys (BLOCK_N, DIM), or of pairs of
    numbers of that format."""
    if FORMAT is None:
        keys = tl.trans(keys.to(rows.dtype))
        scores = tl.dot(rows, keys, scores, input_precision="ieee")
    else:
        first, second = tl.split(tl.reshape(rows, [rows.shape[0], rows.shape[1] // 2, 2]))
        k_first, k_second = unpacked(keys, FORMAT)
        scores = tl.dot(first, tl.trans(k_first), scores, input_precision="ieee")
        scores = tl.dot(second, tl.trans(k_second), scores, input_precision="ieee")
    return scores


@triton.jit
def weighted(p, values, acc, FORMAT: tl.constexpr):
    """acc (M, DIM_V) and the products of p (M, BLOCK_N) and values (BLOCK_N, DIM_V), or of pairs,
    of which the left half of acc has the first."""
    if FORMAT is None:
        acc = tl.dot(p, values.to(p.dtype), acc, input_precision="ieee")
    else:
        first, second = halves(acc)
        v_first, v_second = unpacked(values, FORMAT)
        first = tl.dot(p, v_first, first, input_precision="ieee")
        second = tl.dot(p, v_second, second, input_precision="ieee")
        acc = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), acc.shape)
    return acc


@triton.jit
def largest_bits(rows):
    """Those of the largest absolute value of every row, as of float32."""
    return tl.max(tl.abs(rows.to(tl.float32)).to(tl.int32, bitcast=True), 1)


@triton.jit
def exponent_for_float16(largest):
    """Of a power of 2 that brings a row to between 2**14 and 2**15, where its largest number has
    those bits: float16 has then all bits of bfloat16 down to 2**-31 of that number."""
    return tl.maximum(tl.minimum(268 - (largest >> 23), 240), 14)


@triton.jit
def scaled_to_float16(rows, largest):
    factor = (exponent_for_float16(largest) << 23).to(tl.float32, bitcast=True)
    return (rows.to(tl.float32) * factor[:, None]).to(tl.float16)


@triton.jit
def unit_of_scaled(largest):
    """What a product of such rows is to be multiplied by."""
    return ((254 - exponent_for_float16(largest)) << 23).to(tl.float32, bitcast=True)
