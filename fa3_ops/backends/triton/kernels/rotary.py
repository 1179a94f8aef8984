"""Rotary position embedding: pairs of columns turned by the angles of a row's position."""
# fmt: off

import triton
import triton.language as tl

from fa3_ops.backends.triton.kernels.numbers import narrowed, widened
from fa3_ops.backends.triton.kernels.sequences import LENGTHS, bounded, row_of


@triton.jit
def rotated(
    x, at, exists, cos, sin, PAIRS: tl.constexpr, PAIRS_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, FORMAT: tl.constexpr, WIDE: tl.constexpr,
):
    """Of the rows at `at`: (first columns of pairs, second ones, which exist, what the first are to
    hold, and the second). Arithmetic is WIDE, its result rounded once."""
    i = tl.arange(0, PAIRS_DIM)[None, :]
    first = i * 2 if INTERLEAVED else i
    second = i * 2 + 1 if INTERLEAVED else i + PAIRS
    mask = exists[:, None] & (i < PAIRS)
    a = widened(tl.load(x + at[:, None] + first, mask=mask, other=0), FORMAT, WIDE)
    b = widened(tl.load(x + at[:, None] + second, mask=mask, other=0), FORMAT, WIDE)
    c = tl.load(cos + i, mask=i < PAIRS, other=0.0).to(WIDE)
    s = tl.load(sin + i, mask=i < PAIRS, other=0.0).to(WIDE)
    a, b = a * c - b * s, a * s + b * c
    dtype: tl.constexpr = x.dtype.element_ty
    return first, second, mask, narrowed(a, dtype, FORMAT), narrowed(b, dtype, FORMAT)


@triton.jit
def copy(x, out, at, out_at, exists, begin, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """The columns from `begin` on."""
    columns = tl.arange(0, DIM)[None, :]
    mask = exists[:, None] & (columns >= begin) & (columns < WIDTH)
    row = tl.load(x + at[:, None] + columns, mask=mask)
    tl.store(out + out_at[:, None] + columns, row, mask=mask)


@triton.jit(do_not_specialize_on_alignment=LENGTHS, do_not_specialize=[
    "batch_size", "rows", "positions", "nheads", "head_blocks", "work_items",
])
def apply_rotary(
    x, out, cos, sin, rotary_seqlens, cu_seqlens,
    batch_size, rows, positions, nheads, head_blocks, work_items,
    x_batch, x_row, x_head, cos_row, sin_row,
    WIDTH: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, PAIRS_DIM: tl.constexpr,
    HEADS: tl.constexpr, INTERLEAVED: tl.constexpr, ADVANCE: tl.constexpr,
    FORMAT: tl.constexpr, WIDE: tl.constexpr,
):
    """Writes out (rows, nheads, WIDTH). Rows of no sequence are copied."""
    for work in range(tl.program_id(0), work_items, tl.num_programs(0)):
        index = work // head_blocks
        b, row, exists = row_of(index, rows, batch_size, cu_seqlens)
        head = (work % head_blocks * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        at = head * x_head
        if cu_seqlens is None:
            at += b.to(tl.int64) * x_batch + row.to(tl.int64) * x_row
        else:
            at += index.to(tl.int64) * x_row
        out_at = (index.to(tl.int64) * nheads + head) * WIDTH
        heads = head < nheads
        if exists:
            position = tl.load(rotary_seqlens + b)
            if ADVANCE:
                position += row
            position = bounded(position, 0, positions - 1).to(tl.int64)
            first, second, mask, y, z = rotated(
                x, at, heads, cos + position * cos_row, sin + position * sin_row,
                PAIRS, PAIRS_DIM, INTERLEAVED, FORMAT, WIDE,
            )
            tl.store(out + out_at[:, None] + first, y, mask=mask)
            tl.store(out + out_at[:, None] + second, z, mask=mask)
            if 2 * PAIRS < WIDTH:
                copy(x, out, at, out_at, heads, 2 * PAIRS, WIDTH, DIM)
        else:
            copy(x, out, at, out_at, heads, 0, WIDTH, DIM)
