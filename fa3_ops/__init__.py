"""FlashAttention-3's KV-cache attention as PyTorch operators, torch.ops.fa3npu.*.

Importing this package registers the operators; the functions below are FlashAttention-3's Python
interface over them, fa3_ops.v2 and fa3_ops.v4 those of FlashAttention-2 and -4.
"""

from fa3_ops import _library  # noqa: F401  first: the operators that the others extend

import fa3_ops.meta_kernels  # noqa: F401  # isort: skip
from fa3_ops import autocast, autograd, backends, composite, flops, vmap, writes  # noqa: F401  # isort: skip
from fa3_ops.backends import FallbackWarning, explain, npu, use_backend  # noqa: F401
from fa3_ops.interface import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)

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
    "use_backend",
]
