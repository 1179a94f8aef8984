"""How the rows of a tile lie in q and out: TOKENS neighbouring tokens of HEADS neighbouring heads.

Both are axes of their own of every access, which is so a rectangle of strides: what Triton-Ascend
does not see to be one, it moves element by element.
"""
# fmt: off

import triton
import triton.language as tl


@triton.jit
def of_tokens(x, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """A number of every token as one of every row."""
    return tl.reshape(tl.broadcast_to(x[:, None], [TOKENS, HEADS]), [TOKENS * HEADS])


@triton.jit
def load_of_heads(x, heads, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """A number of every head, of which there are `heads`, as one of every row."""
    head = tl.arange(0, HEADS)
    x = tl.load(x + head, mask=head < heads, other=0.0).to(tl.float32)
    return tl.reshape(tl.broadcast_to(x[None, :], [TOKENS, HEADS]), [TOKENS * HEADS])


@triton.jit
def rectangle(
    tokens, heads, width, row_stride, head_stride,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):
    """(offsets, which of them there are) of (TOKENS, HEADS, DIM) numbers."""
    token = tl.arange(0, TOKENS)[:, None, None]
    head = tl.arange(0, HEADS)[None, :, None]
    column = tl.arange(0, DIM)[None, None, :]
    offset = token.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride + column
    return offset, (token < tokens) & (head < heads) & (column < width)


@triton.jit
def load_rows(
    x, tokens, heads, width, row_stride, head_stride,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):
    """(rows, DIM), zeros where there are none."""
    offset, there = rectangle(tokens, heads, width, row_stride, head_stride, TOKENS, HEADS, DIM)
    return tl.reshape(tl.load(x + offset, mask=there, other=0.0), [TOKENS * HEADS, DIM])


@triton.jit
def store_rows(
    x, rows, tokens, heads, width, row_stride, head_stride,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):
    offset, there = rectangle(tokens, heads, width, row_stride, head_stride, TOKENS, HEADS, DIM)
    rows = tl.reshape(rows.to(x.dtype.element_ty), [TOKENS, HEADS, DIM])
    tl.store(x + offset, rows, mask=there)


@triton.jit
def store_numbers(
    x, numbers, tokens, heads, row_stride, TOKENS: tl.constexpr, HEADS: tl.constexpr
):
    """One of every row to (tokens, heads)."""
    token, head = tl.arange(0, TOKENS)[:, None], tl.arange(0, HEADS)[None, :]
    there = (token < tokens) & (head < heads)
    numbers = tl.reshape(numbers, [TOKENS, HEADS])
    tl.store(x + token.to(tl.int64) * row_stride + head, numbers, mask=there)


@triton.jit
def load_by_heads(
    x, tokens, heads, head_stride, other, TOKENS: tl.constexpr, HEADS: tl.constexpr
):
    """One of every row from (heads, tokens)."""
    token, head = tl.arange(0, TOKENS)[None, :], tl.arange(0, HEADS)[:, None]
    there = (token < tokens) & (head < heads)
    x = tl.load(x + head.to(tl.int64) * head_stride + token, mask=there, other=other)
    return tl.reshape(tl.trans(x), [TOKENS * HEADS])


@triton.jit
def store_by_heads(
    x, numbers, tokens, heads, head_stride, TOKENS: tl.constexpr, HEADS: tl.constexpr
):
    """One of every row to (heads, tokens)."""
    token, head = tl.arange(0, TOKENS)[None, :], tl.arange(0, HEADS)[:, None]
    there = (token < tokens) & (head < heads)
    numbers = tl.trans(tl.reshape(numbers, [TOKENS, HEADS]))
    tl.store(x + head.to(tl.int64) * head_stride + token, numbers, mask=there)
