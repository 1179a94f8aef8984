"""The module of that name, as FlashAttention-3's package has it."""

from flash_attn_interface import *  # noqa: F403
