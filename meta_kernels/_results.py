"""What attention returns, shared by the fakes of its operators."""

import torch
from torch import Tensor


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """q's shape with headdim_v; FP8 inputs give bfloat16."""
    dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype)


def empty_lse(q: Tensor) -> Tensor:
    """(batch_size, nheads, seqlen_q), or (nheads, total_q) for packed q; float32."""
    *batch, rows, nheads, _ = q.shape
    return q.new_empty((*batch, nheads, rows), dtype=torch.float32)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
