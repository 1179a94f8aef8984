"""Stands for flash_attn.layers.rotary, which needs Triton: plain PyTorch, none of fa3_ops' code."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    *,
    seqlen_offsets: Tensor,
) -> Tensor:
    """x (batch, seqlen, nheads, headdim); row i of sequence b turns by the angles of position
    seqlen_offsets[b] + i, pair by pair, and what lies past rotary_dim stays."""
    half = cos.shape[1]
    positions = seqlen_offsets[:, None].long() + torch.arange(x.shape[1])
    c, s = (table[positions].float().unsqueeze(2) for table in (cos, sin))
    rotated, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    pairs = rotated.unflatten(-1, (half, 2) if interleaved else (2, half))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = torch.stack((a * c - b * s, a * s + b * c), -1 if interleaved else -2)
    return torch.cat((turned.flatten(-2).to(x.dtype), rest), -1)
