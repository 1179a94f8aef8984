import torch
from torch import Tensor


@torch.library.register_fake("fa3npu::get_scheduler_metadata")
def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    *args: object,
    **kwargs: object,
) -> Tensor:
    return cache_seqlens.new_empty((batch_size,), dtype=torch.int32)
