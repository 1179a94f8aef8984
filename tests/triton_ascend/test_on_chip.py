"""The estimate of on-chip memory, on kernels small enough to count by hand, and against tiles that
Triton-Ascend's tutorial of attention runs on a 910B."""

from __future__ import annotations

import pytest
import triton
import triton.language as tl
from lowering import lower
from on_chip import L0C, L1, UB, Demand, demand

KIB = 1024


@triton.jit
def adds(x, y, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) + tl.load(y + at))


@triton.jit
def adds_blocks(x, y, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for block in range(0, n, N):
        total += tl.load(x + block + at)
    tl.store(out + at, total)


@triton.jit
def attends(
    q, k, v, out, n, scale, HEADDIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    row, key, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, HEADDIM)
    queries = tl.load(q + row[:, None] * HEADDIM + column[None, :])
    m = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEADDIM], tl.float32)
    for block in range(0, n, BLOCK_N):
        at = (block + key)[:, None] * HEADDIM + column[None, :]
        scores = tl.dot(queries, tl.trans(tl.load(k + at))) * scale
        greatest = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp(scores - greatest[:, None])
        alpha = tl.exp(m - greatest)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype.element_ty), tl.load(v + at), acc * alpha[:, None])
        m = greatest
    tl.store(out + row[:, None] * HEADDIM + column[None, :], acc / total[:, None])


VECTORS = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"}
TENSORS = {"q": "*fp16", "k": "*fp16", "v": "*fp16", "out": "*fp32", "n": "i32", "scale": "fp32"}


def attention(headdim: int, block_m: int, block_n: int) -> Demand:
    sizes = {"HEADDIM": headdim, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return demand(lower(attends, TENSORS, sizes))


def test_a_sum_takes_the_place_of_what_is_added() -> None:
    assert demand(lower(adds, VECTORS, {"N": 1024})) == Demand(ub=8 * KIB, l1=0, l0c=0)


def test_what_is_loaded_in_a_loop_has_two_buffers() -> None:
    assert demand(lower(adds_blocks, VECTORS, {"N": 1024})) == Demand(ub=12 * KIB, l1=0, l0c=0)


def test_what_a_product_is_made_of_is_in_l1() -> None:
    found = attention(64, 32, 128)
    q, k, p = 32 * 64 * 2, 128 * 64 * 2, 32 * 128 * 2
    assert found.l1 == q + 2 * k + 2 * p
    assert found.l0c == 32 * 128 * 4


@pytest.mark.parametrize(
    ("headdim", "block_m", "block_n"),
    [(128, 32, 128), (128, 64, 128), (64, 32, 64), (64, 64, 128), (64, 128, 128)],
)
def test_the_tutorials_tiles_fit(headdim: int, block_m: int, block_n: int) -> None:
    assert attention(headdim, block_m, block_n).fits


def test_larger_tiles_do_not() -> None:
    """For a head dimension of 256 the tutorial keeps the sums in global memory and works on a
    quarter of the rows at a time, "to avoid ub overflow"."""
    assert attention(256, 64, 128).ub > UB
    assert attention(512, 128, 256).l1 > L1
    assert attention(512, 128, 256).l0c > L0C
    assert not attention(256, 64, 128).fits
