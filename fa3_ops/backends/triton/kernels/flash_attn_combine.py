"""Partial results merged by their LSE, in the order of the splits."""
# fmt: off

import triton
import triton.language as tl


@triton.jit
def load_lse(lses, exists):
    """Where no key is seen, some say +inf."""
    lse = tl.load(lses, mask=exists, other=float("-inf"))
    return tl.where(lse == float("inf"), float("-inf"), lse)


@triton.jit(do_not_specialize=[
    "num_splits", "seqlen", "nheads", "head_blocks", "work_items", "lse_split", "lse_batch",
    "lse_row", "lse_head",
])
def flash_attn_combine(
    out_partial, lse_partial, out, softmax_lse, num_splits, seqlen, nheads, head_blocks, work_items,
    out_split, out_batch, out_row, out_head, lse_split, lse_batch, lse_row, lse_head,
    WIDTH: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr,
):
    """Writes out (batch, seqlen, nheads, WIDTH) and softmax_lse (batch, nheads, seqlen). A part of
    weight 0 may hold anything."""
    columns = tl.arange(0, DIM)[None, :]
    for work in range(tl.program_id(0), work_items, tl.num_programs(0)):
        row = (work // head_blocks).to(tl.int64)
        b, token = row // seqlen, row % seqlen
        head = (work % head_blocks * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        exists = head < nheads
        mask = exists[:, None] & (columns < WIDTH)
        lses = lse_partial + b * lse_batch + token * lse_row
        lse_at = head * lse_head
        greatest = tl.full([HEADS], float("-inf"), tl.float32)
        split = lses
        for _ in range(0, num_splits):
            greatest = tl.maximum(greatest, load_lse(split + lse_at, exists))
            split += lse_split
        base = tl.where(greatest == float("-inf"), 0.0, greatest)
        total = tl.zeros([HEADS], tl.float32)
        split = lses
        for _ in range(0, num_splits):
            total += tl.exp(load_lse(split + lse_at, exists) - base)
            split += lse_split
        blind = total == 0
        acc = tl.zeros([HEADS, DIM], tl.float32)
        split = lses
        part = out_partial + b * out_batch + token * out_row
        part_at = (head * out_head)[:, None] + columns
        for _ in range(0, num_splits):
            weight = tl.exp(load_lse(split + lse_at, exists) - base) / tl.where(blind, 1.0, total)
            weight = tl.broadcast_to(weight[:, None], acc.shape)
            rows = tl.load(part + part_at, mask=mask, other=0.0)
            acc = tl.where(weight == 0, acc, tl.fma(weight, rows, acc))
            split += lse_split
            part += out_split
        out_at = (row * nheads + head)[:, None] * WIDTH + columns
        tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=mask)
        lse = tl.where(blind, float("-inf"), base + tl.log(total))
        tl.store(softmax_lse + (b * nheads + head) * seqlen + token, lse, mask=exists)
