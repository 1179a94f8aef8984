"""Partial results merged by their LSE, in the order of the splits."""
# fmt: off

import triton
import triton.language as tl


@triton.jit
def lse_of(lse_partial, at, exists):
    """Where no key is seen, some say +inf."""
    lse = tl.load(lse_partial + at, mask=exists, other=float("-inf"))
    return tl.where(lse == float("inf"), float("-inf"), lse)


@triton.jit(do_not_specialize=[
    "num_splits", "rows", "seqlen", "nheads", "work_items", "lse_split", "lse_batch", "lse_row",
    "lse_head",
])
def flash_attn_combine(
    out_partial, lse_partial, out, softmax_lse, num_splits, rows, seqlen, nheads, work_items,
    out_split, out_batch, out_row, out_head, lse_split, lse_batch, lse_row, lse_head,
    WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):
    """Writes out (batch, seqlen, nheads, WIDTH), rows in all, and softmax_lse (batch, nheads,
    seqlen). A part of weight 0 may hold anything."""
    columns = tl.arange(0, DIM)[None, :]
    for work in range(tl.program_id(0), work_items, tl.num_programs(0)):
        r = (work * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        exists = r < rows
        mask = exists[:, None] & (columns < WIDTH)
        b, token, head = r // nheads // seqlen, r // nheads % seqlen, r % nheads
        lse_at = b * lse_batch + token * lse_row + head * lse_head
        parts = out_partial + (b * out_batch + token * out_row + head * out_head)[:, None] + columns
        greatest = tl.full([ROWS], float("-inf"), tl.float32)
        for split in range(0, num_splits):
            lse = lse_of(lse_partial, lse_at + split * lse_split, exists)
            greatest = tl.maximum(greatest, lse)
        base = tl.where(greatest == float("-inf"), 0.0, greatest)
        total = tl.zeros([ROWS], tl.float32)
        for split in range(0, num_splits):
            total += tl.exp(lse_of(lse_partial, lse_at + split * lse_split, exists) - base)
        blind = total == 0
        acc = tl.zeros([ROWS, DIM], tl.float32)
        for split in range(0, num_splits):
            lse = lse_of(lse_partial, lse_at + split * lse_split, exists)
            weight = tl.exp(lse - base) / tl.where(blind, 1.0, total)
            part = tl.load(parts + split * out_split, mask=mask, other=0.0)
            weight = tl.broadcast_to(weight[:, None], acc.shape)
            acc = tl.where(weight == 0, acc, tl.fma(weight, part, acc))
        tl.store(out + r[:, None] * WIDTH + columns, acc.to(out.dtype.element_ty), mask=mask)
        lse = tl.where(blind, float("-inf"), base + tl.log(total))
        tl.store(softmax_lse + (b * nheads + head) * seqlen + token, lse, mask=exists)
