"""Partial results merged by their LSE, in the order of the splits."""
# fmt: off

import triton
import triton.language as tl

from fa3_ops.backends.triton.kernels.rows import (
    load_by_heads,
    load_rows,
    store_by_heads,
    store_rows,
)


@triton.jit
def lse_of(lse_partial, tokens, heads, seqlen, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Where no key is seen, some say +inf."""
    lse = load_by_heads(lse_partial, tokens, heads, seqlen, float("-inf"), TOKENS, HEADS)
    return tl.where(lse == float("inf"), float("-inf"), lse)


@triton.jit(do_not_specialize=[
    "num_splits", "seqlen", "nheads", "token_blocks", "head_blocks", "work_items", "out_split",
    "lse_split",
])
def flash_attn_combine(
    out_partial, lse_partial, out, softmax_lse,
    num_splits, seqlen, nheads, token_blocks, head_blocks, work_items,
    out_split, out_batch, out_row, out_head, lse_split,
    WIDTH: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):
    """Writes out (batch, seqlen, nheads, WIDTH) and softmax_lse (batch, nheads, seqlen), of which
    lse_partial has one behind the other. A part of weight 0 may hold anything."""
    for work in range(tl.program_id(0), work_items, tl.num_programs(0)):
        head = work % head_blocks * HEADS
        token = work // head_blocks % token_blocks * TOKENS
        b = (work // head_blocks // token_blocks).to(tl.int64)
        tokens = seqlen - token
        heads = nheads - head
        lse_at = (b * nheads + head) * seqlen + token
        lses = lse_partial + lse_at
        parts = out_partial + b * out_batch + token.to(tl.int64) * out_row + head * out_head
        greatest = tl.full([TOKENS * HEADS], float("-inf"), tl.float32)
        for split in range(0, num_splits):
            at = lses + split * lse_split.to(tl.int64)
            greatest = tl.maximum(greatest, lse_of(at, tokens, heads, seqlen, TOKENS, HEADS))
        base = tl.where(greatest == float("-inf"), 0.0, greatest)
        total = tl.zeros([TOKENS * HEADS], tl.float32)
        for split in range(0, num_splits):
            at = lses + split * lse_split.to(tl.int64)
            total += tl.exp(lse_of(at, tokens, heads, seqlen, TOKENS, HEADS) - base)
        blind = total == 0
        acc = tl.zeros([TOKENS * HEADS, DIM], tl.float32)
        for split in range(0, num_splits):
            at = lses + split * lse_split.to(tl.int64)
            lse = lse_of(at, tokens, heads, seqlen, TOKENS, HEADS)
            weight = tl.exp(lse - base) / tl.where(blind, 1.0, total)
            part = load_rows(
                parts + split * out_split.to(tl.int64), tokens, heads, WIDTH, out_row, out_head,
                TOKENS, HEADS, DIM,
            )
            weight = tl.broadcast_to(weight[:, None], acc.shape)
            acc = tl.where(weight == 0, acc, tl.fma(weight, part, acc))
        out_at = (b * seqlen + token) * nheads + head
        store_rows(
            out + out_at * WIDTH, acc, tokens, heads, WIDTH, nheads * WIDTH, WIDTH,
            TOKENS, HEADS, DIM,
        )
        lse = tl.where(blind, float("-inf"), base + tl.log(total))
        store_by_heads(softmax_lse + lse_at, lse, tokens, heads, seqlen, TOKENS, HEADS)
