"""FlashAttention-3's extension, which defines torch.ops.flash_attn_3 when it is imported."""

import flash_attn_interface  # noqa: F401
