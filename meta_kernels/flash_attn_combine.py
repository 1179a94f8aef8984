import torch
from torch import Tensor


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    *batch, seqlen, nheads, _ = out_partial.shape[1:]
    out = out_partial.new_empty(out_partial.shape[1:], dtype=out_dtype or torch.float32)
    lse = lse_partial.new_empty((*batch, nheads, seqlen)).transpose(-2, -1)
    return out, lse
