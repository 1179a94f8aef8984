"""Calls for FlashAttention-3 and FlashAttention-4, on CPU; what they give, by the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fa3_ops
from fa3_ops import reference

NAMES = ("flash_attn_3", "flash_attn_4")
F16, F8 = torch.float16, torch.float8_e4m3fn


def rand(*shape: int, dtype: torch.dtype = F16) -> Tensor:
    return torch.randn(shape).to(dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(d: int = 32, d_v: int = 32, dtype: torch.dtype = F16, **more: Any) -> dict[str, Any]:
    call = {"q": rand(2, 5, 4, d), "k": rand(2, 9, 2, d), "v": rand(2, 9, 2, d_v)}
    return {name: x.to(dtype) for name, x in call.items()} | more


def packed(**more: Any) -> dict[str, Any]:
    """With rows of no sequence, a sequence without rows, and one without keys."""
    return {
        "q": rand(14, 4, 32),
        "k": rand(22, 2, 32),
        "v": rand(22, 2, 32),
        "cu_seqlens_q": ints(1, 4, 4, 9, 12),
        "cu_seqlens_k": ints(2, 9, 15, 15, 20),
        "max_seqlen_q": 6,
        "max_seqlen_k": 8,
    } | more


def cached(**more: Any) -> dict[str, Any]:
    return {
        "q": rand(2, 3, 4, 32),
        "k_cache": rand(2, 24, 2, 32),
        "v_cache": rand(2, 24, 2, 32),
        "cache_seqlens": ints(20, 0),
    } | more


def paged(**more: Any) -> dict[str, Any]:
    pages = {"k_cache": rand(9, 8, 2, 32), "v_cache": rand(9, 8, 2, 32)}
    return cached(**pages, page_table=ints(3, 7, 1, 0, 4, 2).view(2, 3)) | more


def hidden_pages() -> dict[str, Any]:
    """Pages before a window with ids that are none; what they may be taken for is NaN."""
    call = paged(window_size=(3, 0), cache_seqlens=ints(22, 19))
    call["page_table"] = ints(-1, 7, 1, 2**31 - 1, 4, 2).view(2, 3)
    for cache in (call["k_cache"], call["v_cache"]):
        cache[[0, -1]] = float("nan")
    return call


MADE: dict[str, Callable[..., dict[str, Any]]] = {"dense": dense, "packed": packed, "cache": cached}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dense": fa3_ops.flash_attn_func,
    "packed": fa3_ops.flash_attn_varlen_func,
    "cache": fa3_ops.flash_attn_with_kvcache,
}


def expected(kind: str, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    sizes = ("max_seqlen_q", "max_seqlen_k", "num_splits", "scheduler_metadata")
    call = {name: x for name, x in call.items() if name not in sizes}
    return (reference.flash_attn_with_kvcache if kind == "cache" else reference.batched)(**call)


CAUSAL = {"causal": True}
# What both serve: the kind of a call, and what is not as in `dense`, `packed` or `cached`.
BY_BOTH: dict[str, tuple[str, dict[str, Any]]] = {
    "no mask": ("dense", {}),
    "causal": ("dense", CAUSAL),
    "fewer keys than rows": ("dense", {"q": rand(2, 12, 4, 32), **CAUSAL}),
    "window": ("dense", {"window_size": (3, 1)}),
    "left side": ("dense", {"window_size": (3, -1)}),
    "right side": ("dense", {"window_size": (-1, 2)}),
    "sides past all keys": ("dense", {"window_size": (2**40, 2**31 - 1)}),
    "one side past all keys": ("dense", {"window_size": (2**40, 0)}),
    "softcap, scale": ("dense", {"softcap": 3.0, "softmax_scale": 0.3}),
    "sinks": ("dense", {"sinks": torch.tensor([0.3, -1.0, 2.0, float("inf")]), **CAUSAL}),
    "sinks, blind rows": ("dense", {"q": rand(2, 12, 4, 32), "sinks": rand(4), **CAUSAL}),
    "128 beside 192": ("dense", dense(192, 128)),
    "packed": ("packed", CAUSAL),
    "packed, used in part": (
        "packed",
        {"seqused_q": ints(2, 0, 5, 1), "seqused_k": ints(7, 0, 0, 3), "sinks": rand(4)},
    ),
    "cache": ("cache", CAUSAL),
    "pages": ("cache", paged(**CAUSAL)),
    "pages, batch index": ("cache", paged(cache_batch_idx=ints(1, 0), cache_seqlens=ints(9, 24))),
    "pages, packed q": (
        "cache",
        paged(q=rand(7, 4, 32), cu_seqlens_q=ints(0, 2, 6), max_seqlen_q=4),
    ),
    "pages before a window": ("cache", hidden_pages()),
    "pages that nobody needs": (
        "cache",
        paged(page_table=ints(3, -1, -1, 0, 4, 2**31 - 1).view(2, 3), cache_seqlens=ints(8, 9)),
    ),
    "strided lengths": (
        "packed",
        {
            "cu_seqlens_q": ints(1, 9, 4, 9, 4, 9, 9, 9, 12)[::2],
            "seqused_k": ints(7, 9, 0, 9, 0, 9, 3)[::2],
        },
    ),
    "splits": ("cache", {"num_splits": 7}),
}
BY_3: dict[str, tuple[str, dict[str, Any]]] = {
    "chunk": ("dense", {"attention_chunk": 4, **CAUSAL}),
    "left padding": ("cache", {"cache_leftpad": ints(4, 0), **CAUSAL}),
    "left padding, pages": ("cache", paged(cache_leftpad=ints(11, 0))),
    "batch index": ("cache", {"cache_batch_idx": ints(1, 0), "cache_seqlens": ints(9, 24)}),
    "qv": ("dense", dense(64, 256, qv=rand(2, 5, 4, 256))),
    "latent": ("dense", dense(24, 512)),
    "FP8": (
        "dense",
        dense(dtype=F8, q_descale=torch.rand(2, 2), k_descale=torch.rand(2), **CAUSAL),
    ),
    "FP8, one number": ("dense", dense(dtype=F8, v_descale=torch.rand(()))),
    "ignored descales": ("dense", {"q_descale": torch.rand(2, 2)}),
}
