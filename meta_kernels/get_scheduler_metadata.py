import torch
from torch import Tensor

NPU_KERNEL_BYTES = 2384  # of flash_attn_npu 0.4.2; fa3_ops/backends/npu/scheduler_metadata.py


@torch.library.register_fake("fa3npu::get_scheduler_metadata")
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
    if cache_seqlens.device.type == "npu":
        lengths = 1 + batch_size + (0 if cu_seqlens_q is None else batch_size + 1)
        return cache_seqlens.new_empty((NPU_KERNEL_BYTES + 4 * lengths,), dtype=torch.uint8)
    return cache_seqlens.new_empty((batch_size,), dtype=torch.int32)
