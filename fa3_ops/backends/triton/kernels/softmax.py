"""The online softmax, and the partial results it sums.

The state of a row is its greatest score m, the total of its weights and its unscaled output acc.
Weights are powers of 2: c is what a score is multiplied by for it, softmax_scale * log2(e) or
log2(e). All rounding is written out, so that equal rows have equal bits wherever a tile has them.
"""

import triton
import triton.language as tl

NONE = tl.constexpr(-1.0e30)  # m of a row that has seen no key: finite, so that m - m is 0
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BITS_OF_2 = tl.constexpr(0x40000000)
UNIT = tl.constexpr(2.0**-22)


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, DIM_V: tl.constexpr):
    m = tl.full([BLOCK_M], NONE, tl.float32)
    return m, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, DIM_V], tl.float32)


@triton.jit
def sum_of_weights(p, EXACT: tl.constexpr):
    """Of each row. A sum of floats would depend on how a tile lies in registers; these are counted
    in units of 2**-22, which the bits of p + 2 are, and integers have one sum in any order. With
    EXACT as floats, where one tile serves all calls."""
    if EXACT:
        return tl.sum(p, 1)
    else:
        units = (p + 2.0).to(tl.int32, bitcast=True) - BITS_OF_2
        return tl.sum(units, 1).to(tl.float32) * UNIT


@triton.jit
def weights(scores, m, total, c, EXACT: tl.constexpr):
    """Of a block of scores, -inf where a key is not seen. A block without any changes nothing."""
    greatest = tl.maximum(m, tl.max(scores, 1))
    shift = tl.broadcast_to((-greatest * c)[:, None], scores.shape)
    p = tl.exp2(tl.fma(scores, tl.full(scores.shape, c, tl.float32), shift))
    alpha = tl.exp2((m - greatest) * c)
    return p, greatest, tl.fma(total, alpha, sum_of_weights(p, EXACT)), alpha


@triton.jit
def merge(m, total, acc, m_next, total_next, acc_next, c):
    """The state of two runs of keys, of which the second follows the first."""
    greatest = tl.maximum(m, m_next)
    a = tl.exp2((m - greatest) * c)
    b = tl.exp2((m_next - greatest) * c)
    acc = tl.fma(acc, tl.broadcast_to(a[:, None], acc.shape), acc_next * b[:, None])
    return greatest, tl.fma(total, a, total_next * b), acc


@triton.jit
def finish(m, total, acc, c, sink, v_scale):
    """out and softmax_lse of a state. A row's sink is one more key, without a value."""
    blind = total == 0
    m = m * c
    scale = v_scale + tl.zeros_like(total)
    if sink is not None:
        sink = sink * LOG2E
        greatest = tl.maximum(m, sink)
        alpha = tl.exp2(m - greatest)
        total = tl.fma(total, alpha, tl.where(sink == greatest, 1.0, tl.exp2(sink - greatest)))
        scale = scale * alpha
        m = greatest
    total = tl.where(blind, 1.0, total)
    scale = tl.where(blind, 0.0, scale / total)
    lse = tl.fma(m, LN2 + tl.zeros_like(m), tl.log(total))
    lse = tl.where(blind, float("-inf"), lse)
    nan = tl.min((acc != acc).to(tl.int32), 1) == 1  # of scores, which integers do not keep
    lse = tl.where(nan, float("nan"), lse)
    return acc * scale[:, None], lse


@triton.jit
def tanh(x):
    """By a power of 2, which every device has; near 0 by its series, which does not cancel."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    y = x * x
    near = x * (1.0 + y * (-0.33333333 + y * (0.13333333 - 0.05396825 * y)))
    return tl.where(tl.abs(x) < 0.1, near, far)
