"""FlashAttention-3's KV-cache attention as PyTorch operators, torch.ops.fa3npu.*.

Importing this package registers the operators; the functions below are FlashAttention-3's Python
interface over them, fa3_ops.v2 and fa3_ops.v4 those of FlashAttention-2 and -4.
"""

from fa3_ops import backends, meta_kernels, ops
from fa3_ops.backends import FallbackWarning, explain, use_backend
from fa3_ops.interface import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    kvcache_scatter_,
    linear,
)
from fa3_ops.ops import library

__version__ = "0.1.0"
__all__ = [
    "FallbackWarning",
    "explain",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "kvcache_scatter_",
    "linear",
    "use_backend",
]

library.load()  # schemas and CPU kernels, which the rest extends
meta_kernels.register()
ops.register()
backends.register()
