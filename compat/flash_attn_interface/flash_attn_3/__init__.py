"""FlashAttention-3's package. Importing it defines torch.ops.flash_attn_3, too."""

from flash_attn_interface import *  # noqa: F403

__version__ = "3.0.0"
