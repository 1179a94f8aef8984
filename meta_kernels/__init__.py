"""Fake kernels: the shape, dtype, stride and device of every operator's results, from those of its
arguments alone. One file per operator, as in csrc/."""

from . import (
    apply_rotary,
    flash_attn_combine,
    flash_attn_func,
    flash_attn_kvcache,
    flash_attn_varlen_func,
    get_scheduler_metadata,
    kvcache_append,
    no_gradient,
)

__all__ = [
    "apply_rotary",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvcache",
    "flash_attn_varlen_func",
    "get_scheduler_metadata",
    "kvcache_append",
    "no_gradient",
]
