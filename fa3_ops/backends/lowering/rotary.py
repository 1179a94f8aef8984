"""Rotary position embedding in plain torch operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fa3_ops.backends.lowering.lengths import require
from fa3_ops.backends.lowering.rows import sequence_of_row


def rotate(
    x: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    rotary_seqlens: Tensor,
    cu_seqlens: Tensor | None = None,
    rotary_interleaved: bool = True,
    advance: bool = True,
) -> Tensor:
    """x (batch_size, seqlen, nheads, headdim) or packed, row i of sequence b rotated at
    rotary_seqlens[b] + i, or at rotary_seqlens[b] without advance; in float32, rounded once.
    Positions are bounded by rotary_cos; rows of no sequence stay."""
    if cu_seqlens is None:
        first = rotary_seqlens[:, None]
        row = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        at = first + row if advance else first.expand(-1, x.shape[1])
        rotated = None
    else:
        sequence = sequence_of_row(cu_seqlens, x)
        row = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
        row_in_sequence = row - cu_seqlens[sequence]
        at = rotary_seqlens[sequence] + (row_in_sequence if advance else 0)
        rotated = (row >= cu_seqlens[0]) & (row < cu_seqlens[-1])
    at = at.clamp(0, rotary_cos.shape[0] - 1)
    cos, sin = (table[at].float().unsqueeze(-2) for table in (rotary_cos, rotary_sin))
    half = rotary_cos.shape[1]
    head, tail = x[..., : 2 * half].float(), x[..., 2 * half :]
    if rotary_interleaved:
        a, b = head.unflatten(-1, (half, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = head.split(half, dim=-1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    y = torch.cat((turned.to(x.dtype), tail), dim=-1)
    return y if rotated is None else torch.where(rotated[:, None, None], y, x)


def check_positions(
    first: list[int], counts: list[int], rotary_cos: Tensor, advance: bool = True
) -> None:
    """No position may be outside rotary_cos."""
    positions = rotary_cos.shape[0]
    for b, (position, rows) in enumerate(zip(first, counts, strict=True)):
        count = rows if advance else min(rows, 1)
        require(
            count == 0 or (position >= 0 and position + count <= positions),
            f"rotary_cos must reach position {position + count - 1} of sequence {b}, "
            f"got {positions} positions",
        )
