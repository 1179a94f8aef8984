"""How a block of keys or values is loaded from where it lies."""

import triton
import triton.language as tl

from fa3_ops.backends.triton.kernels.sequences import bounded

# How k and v lie: rows one behind the other; pages, each of which holds whole blocks; other pages;
# of these, pages of which a block holds whole ones.
ROWS = tl.constexpr(0)
BLOCKS = tl.constexpr(1)
PAGES = tl.constexpr(2)
PARTS = tl.constexpr(3)


@triton.jit
def pages_of(
    pages, block, shift, capacity,
    LAYOUT: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The page of a block of keys, or those of its rows, as the table has them; behind the last row
    that of the last."""
    page = block * 0
    if LAYOUT != ROWS:
        row = tl.minimum(block, capacity - 1)
        if LAYOUT == PARTS:
            row = tl.minimum(block + tl.arange(0, BLOCK_N), capacity - 1)
        elif LAYOUT == PAGES:
            row = bounded(block + shift + tl.arange(0, BLOCK_N), 0, capacity - 1)
        page = tl.load(pages + row // PAGE_SIZE)
    return page


@triton.jit
def load_block(
    base, page, block, shift, low, high, stride, page_stride, capacity, column, width,
    LAYOUT: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr,
    EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, DIM) of the rows of positions block, block + 1, ... in pages as pages_of has them,
    zeros (if MASKED) outside of low..high, and behind `width` columns (unless EVEN). Row =
    position + shift."""
    at = tl.arange(0, BLOCK_N)
    position = block + at
    if LAYOUT == ROWS:
        offset = (position + shift).to(tl.int64) * stride
    elif LAYOUT == BLOCKS:
        offset = page.to(tl.int64) * page_stride + (block % PAGE_SIZE + at) * stride
    elif LAYOUT == PARTS:
        offset = page.to(tl.int64) * page_stride + (at % PAGE_SIZE) * stride
    else:
        row = bounded(position + shift, 0, capacity - 1)
        offset = page.to(tl.int64) * page_stride + (row % PAGE_SIZE) * stride
    pointer = base + offset[:, None] + (column + tl.arange(0, DIM))[None, :]
    seen = ((position >= low) & (position < high))[:, None]
    inside = (column + tl.arange(0, DIM) < width)[None, :]
    if MASKED and EVEN:
        return tl.load(pointer, mask=seen, other=0.0)
    elif MASKED:
        return tl.load(pointer, mask=seen & inside, other=0.0)
    elif EVEN:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=inside, other=0.0)


@triton.jit
def load_described(
    described, page, block, shift, entry, head_k, column,
    LAYOUT: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, DIM) of the same rows by a tensor descriptor of (entry or page, row, head, column),
    where nothing is masked."""
    row = block + shift
    if LAYOUT == BLOCKS:
        entry = page
        row = block % PAGE_SIZE
    return described.load([entry.to(tl.int32), row, head_k, column]).reshape(BLOCK_N, DIM)
