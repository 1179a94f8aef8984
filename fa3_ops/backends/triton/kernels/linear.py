"""x times the transpose of weight. An element is one sum in float32, over its products in their
order, whatever else a tile has: rows and columns are independent of each other.

Where the result is float32, parts of the sum are summed apart, so that its error does not grow with
its length as one sum's does.
"""
# fmt: off

import triton
import triton.language as tl


@triton.jit
def tile_of(work, row_tiles, column_tiles, NEIGHBOURS: tl.constexpr):
    """(tile of rows, tile of columns). NEIGHBOURS tiles of rows are at work together on one tile of
    columns, so that what they load of weight stays in cache."""
    first = work // (NEIGHBOURS * column_tiles) * NEIGHBOURS
    work = work % (NEIGHBOURS * column_tiles)
    size = tl.minimum(NEIGHBOURS, row_tiles - first)
    return first + work % size, work // size


@triton.jit(do_not_specialize=["rows", "row_tiles", "column_tiles"])
def linear(
    x, weight, bias, out, rows, columns, depth, row_tiles, column_tiles, x_row, weight_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr,
    EVEN: tl.constexpr, NEIGHBOURS: tl.constexpr,
):
    """Writes out (rows, columns). PART: products of a part, 0 for one. EVEN: depth is a multiple of
    BLOCK_K."""
    k = tl.arange(0, BLOCK_K)
    for work in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = tile_of(work, row_tiles, column_tiles, NEIGHBOURS)
        row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        x_at = x + row.to(tl.int64)[:, None] * x_row + k[None, :]
        weight_at = weight + column.to(tl.int64)[:, None] * weight_row + k[None, :]
        x_mask, weight_mask = row[:, None] < rows, column[:, None] < columns
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        parts = acc
        for begin in range(0, depth, BLOCK_K):
            if PART > 0:
                if begin % PART == 0:
                    parts += acc
                    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if EVEN:
                a = tl.load(x_at + begin, mask=x_mask, other=0.0)
                b = tl.load(weight_at + begin, mask=weight_mask, other=0.0)
            else:
                inside = k[None, :] < depth - begin
                a = tl.load(x_at + begin, mask=x_mask & inside, other=0.0)
                b = tl.load(weight_at + begin, mask=weight_mask & inside, other=0.0)
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
        if PART > 0:
            acc += parts
        if bias is not None:
            acc += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        out_at = out + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=x_mask & (column[None, :] < columns))
