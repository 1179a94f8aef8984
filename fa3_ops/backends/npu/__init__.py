"""Ascend NPU: kernels of the operators in Python, on the dispatch key of torch_npu.

Importing this module touches no device and needs no torch_npu; docs/npu.md says which kernel serves
which call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fa3_ops.backends.attention import Attention
from fa3_ops.backends.npu import backward
from fa3_ops.backends.npu.apply_rotary import apply_rotary
from fa3_ops.backends.npu.attention import forward
from fa3_ops.backends.npu.flash_attn_combine import flash_attn_combine
from fa3_ops.backends.npu.kvcache_append import kvcache_append_
from fa3_ops.backends.npu.scheduler_metadata import get_scheduler_metadata
from fa3_ops.backends.npu.torchair import attach_when_loaded


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Attention:
    return Attention(
        q,
        k,
        v,
        qv=qv,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        num_splits=num_splits,
    )


def kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qv: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    seqused_q: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Attention:
    return Attention(
        q,
        k_cache,
        v_cache,
        qv=qv,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        seqused_q=seqused_q,
        seqused_k=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        page_table=page_table,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scheduler_metadata=scheduler_metadata,
        num_splits=num_splits,
        is_cache=True,
    )


def dense(q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **keywords: Any) -> Attention:
    return varlen(q, k, v, None, None, None, None, None, None, *arguments, **keywords)


def flash_attn_func(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    return forward(dense(*arguments, **keywords))


def flash_attn_varlen_func(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    return forward(varlen(*arguments, **keywords))


def flash_attn_varlen_func_out(*arguments: Any, out: Tensor, **keywords: Any) -> Tensor:
    return forward(varlen(*arguments, **keywords), out)[1]


def flash_attn_kvcache(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    return forward(kvcache(*arguments, **keywords))


def flash_attn_kvcache_out(*arguments: Any, out: Tensor, **keywords: Any) -> Tensor:
    return forward(kvcache(*arguments, **keywords), out)[1]


_library = torch.library.Library("fa3npu", "IMPL")
for _name, _kernel in (
    ("flash_attn_func", flash_attn_func),
    ("flash_attn_func_backward", backward.flash_attn_func_backward),
    ("flash_attn_varlen_func", flash_attn_varlen_func),
    ("flash_attn_varlen_func.out", flash_attn_varlen_func_out),
    ("flash_attn_varlen_func_backward", backward.flash_attn_varlen_func_backward),
    ("flash_attn_kvcache", flash_attn_kvcache),
    ("flash_attn_kvcache.out", flash_attn_kvcache_out),
    ("kvcache_append_", kvcache_append_),
    ("apply_rotary", apply_rotary),
    ("flash_attn_combine", flash_attn_combine),
    ("get_scheduler_metadata", get_scheduler_metadata),
):
    _library.impl(_name, _kernel, "PrivateUse1")
# A schema in C++ has no place for tags; partitioners of graphs read this list.
torch.ops.fa3npu.get_scheduler_metadata.default._tags.append(torch.Tag.cudagraph_unsafe)
attach_when_loaded()
