import torch
from torch import Tensor

from fa3_ops.backends import devices


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    *args: object,
    **kwargs: object,
) -> Tensor:
    plan = devices.of(cache_seqlens.device).plan
    return plan(cache_seqlens, batch_size, cu_seqlens_q is not None)
