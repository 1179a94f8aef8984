"""Every finding of the lint, on a kernel that is bad in just that way beside one that is not."""

from __future__ import annotations

from typing import Any

import pytest
import triton
import triton.language as tl
from lint import lint
from lowering import lower

X_TO_OUT = {"x": "*fp32", "out": "*fp32", "n": "i32"}


@triton.jit
def doubles(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at, mask=at < n, other=0.0) * 2, mask=at < n)


@triton.jit
def assembles(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    y = tl.inline_asm_elementwise("mov $0, $1;", "=r,r", [tl.load(x + at)], tl.float32, True, 1)
    tl.store(out + at, y)


@triton.jit
def adds_atomically(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.atomic_add(out + at, tl.load(x + at))


@triton.jit
def widens(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, (tl.load(x + at).to(tl.float64) * 2).to(tl.float32))


@triton.jit
def chooses_wide_integers(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    chosen = tl.where(tl.load(x + at) > 0, at.to(tl.int64), n.to(tl.int64))
    tl.store(out + at, chosen.to(tl.float32))


@triton.jit
def divides_unsigned(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, (tl.load(x + at).to(tl.int32).to(tl.uint32) // 3).to(tl.float32))


@triton.jit
def loads_columns(x, out, n, N: tl.constexpr):
    at, column = tl.arange(0, N), tl.arange(0, N)
    y = tl.load(x + at[:, None] + column[None, :] * n)
    tl.store(out + at[:, None] * N + column[None, :], y)


@triton.jit
def stores_by_quotients(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at // 3 * n + at % 3, tl.load(x + at), mask=at // 3 < n)


@triton.jit
def loads_rows_by_quotients(x, out, n, N: tl.constexpr):
    at, column = tl.arange(0, N), tl.arange(0, N)
    y = tl.load(x + (at // 3 * n + at % 3)[:, None] + column[None, :])
    tl.store(out + at[:, None] * N + column[None, :], y)


@triton.jit
def masks_by_quotients(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at), mask=at // 3 < n)


@triton.jit
def attends_scattered_keys(x, out, n, N: tl.constexpr):
    at, column = tl.arange(0, N), tl.arange(0, N)
    total = tl.zeros([N, N], tl.float32)
    for block in range(0, n, N):
        row = block + at
        keys = tl.load(x + (row // 3 * n + row % 3)[:, None] + column[None, :])
        total = tl.dot(keys, keys, total)
    tl.store(out + at[:, None] * N + column[None, :], total)


@pytest.mark.parametrize(
    ("kernel", "findings"),
    [
        (doubles, []),
        (assembles, ["assembly: llvm.inline_asm"]),
        (adds_atomically, ["atomic: linalg.generic"]),
        (widens, ["type: f64"]),
        (chooses_wide_integers, ["type: arith.select of i64"]),
        (
            divides_unsigned,
            [
                "operation: arith.divui of unsigned numbers",
                "operation: arith.uitofp of unsigned numbers",
            ],
        ),
        (loads_columns, ["strided: an access of [64, 64] elements"]),
        (stores_by_quotients, ["scattered elements: stored element by element"]),
        (loads_rows_by_quotients, ["scattered rows: loaded by rows of 64"]),
        (
            attends_scattered_keys,
            ["scattered rows: loaded by rows of 64, in a loop of products"],
        ),
        (masks_by_quotients, ["read-modify-write: of a tile (64,)"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_kernel_that_is_bad_in_one_way(kernel: Any, findings: list[str]) -> None:
    assert [str(finding) for finding in lint(lower(kernel, X_TO_OUT, {"N": 64}))] == findings


@pytest.mark.parametrize(
    ("before", "after", "finding"),
    [
        ("arith.mulf", "tt.mulf", "residual: tt.mulf is left"),
        ("arith.mulf", "math.ctpop", "operation: math.ctpop"),
        ("f32", "f8E5M2", "type: f8E5M2"),
    ],
)
def test_what_no_kernel_here_comes_to(before: str, after: str, finding: str) -> None:
    text = lower(doubles, X_TO_OUT, {"N": 64})
    assert before in text
    assert finding in [str(found) for found in lint(text.replace(before, after))]
