"""flash_attn_combine by Triton."""

from __future__ import annotations

import math

from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Combination
from fa3_ops.backends.triton.device import missing, programs
from fa3_ops.backends.triton.launch import launch, unit_last_stride
from fa3_ops.backends.triton.rows import MOST_ELEMENTS
from fa3_ops.backends.triton.schedule import power_of_two
from fa3_ops.ops import checks


class TritonCombination(Backend[Combination]):
    name = "triton"

    def not_supported_reasons(self, request: Combination, run: Run) -> list[str]:
        return missing()

    def is_bitwise(self, request: Combination, run: Run) -> bool:
        return True

    def lower(self, request: Combination, run: Run) -> Combination:
        checks.parts(request.out_partial, request.lse_partial, request.out_dtype, "out_dtype")
        return request

    def launch(self, request: Combination, lowered: Combination, run: Run) -> tuple[Tensor, Tensor]:
        from fa3_ops.backends.triton.kernels.flash_attn_combine import flash_attn_combine

        parts = unit_last_stride(request.out_partial)
        lses = request.lse_partial.transpose(-2, -1).contiguous()  # as softmax_lse lies
        num_splits, *batch, seqlen, nheads, width = parts.shape
        out = parts.new_empty(parts.shape[1:], dtype=request.out_dtype)
        lse = lses.new_empty(lses.shape[1:])
        if lse.numel() == 0:
            return out, lse.transpose(-2, -1)
        dim = power_of_two(width)
        tokens, heads = rows_at_once(nheads, dim)
        blocks = -(-seqlen // tokens), -(-nheads // heads)
        items = math.prod((*batch, *blocks))
        launch(
            flash_attn_combine,
            programs(items, parts.device),
            *(parts, lses, out, lse, num_splits, seqlen, nheads, *blocks, items),
            *_strides(*parts.stride()[:-1]),
            lses.stride(0),
            WIDTH=width,
            DIM=dim,
            TOKENS=tokens,
            HEADS=heads,
        )
        return out, lse.transpose(-2, -1)


def rows_at_once(nheads: int, dim: int) -> tuple[int, int]:
    """(tokens, heads) that a program merges, for all lengths: each would be a kernel of its own."""
    rows = max(MOST_ELEMENTS // dim, 1)
    heads = min(1 << (nheads - 1).bit_length(), rows)
    return rows // heads, heads


def _strides(split: int, *others: int) -> tuple[int, int, int, int]:
    """Of (split, batch entry, row, head)."""
    *batch, row, head = others
    return split, batch[0] if batch else 0, row, head
