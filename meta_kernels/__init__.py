"""Fake kernels: the shape, dtype, stride and device of every operator's results, from those of its
arguments alone. One file per operator, as in csrc/."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import (
    apply_rotary,
    flash_attn_combine,
    flash_attn_func,
    flash_attn_kvcache,
    flash_attn_varlen_func,
    get_scheduler_metadata,
    kvcache_append,
    kvcache_scatter,
    linear,
    no_gradient,
)

FAKES: Mapping[str, Callable[..., Any]] = {
    "flash_attn_func": flash_attn_func.flash_attn_func,
    "flash_attn_func_backward": flash_attn_func.flash_attn_func_backward,
    "flash_attn_varlen_func": flash_attn_varlen_func.flash_attn_varlen_func,
    "flash_attn_varlen_func.out": flash_attn_varlen_func.flash_attn_varlen_func_out,
    "flash_attn_varlen_func_backward": flash_attn_varlen_func.flash_attn_varlen_func_backward,
    "flash_attn_kvcache": flash_attn_kvcache.flash_attn_kvcache,
    "flash_attn_kvcache.out": flash_attn_kvcache.flash_attn_kvcache_out,
    "kvcache_append_": kvcache_append.kvcache_append_,
    "kvcache_scatter_": kvcache_scatter.kvcache_scatter_,
    "linear": linear.linear,
    "apply_rotary": apply_rotary.apply_rotary,
    "flash_attn_combine": flash_attn_combine.flash_attn_combine,
    "get_scheduler_metadata": get_scheduler_metadata.get_scheduler_metadata,
    "no_gradient": no_gradient.no_gradient,
}


def register() -> None:
    for name, fake in FAKES.items():
        torch.library.register_fake(f"fa3npu::{name}", fake)
