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
    *args: object,
    **kwargs: object,
) -> Tensor:
    return devices.of(cache_seqlens.device).plan(cache_seqlens)
