"""FlashAttention-3's module and operators under their own names, served by fa3_ops.

The functions are those of fa3_ops.interface, which says what the arguments mean. The operators
torch.ops.flash_attn_3.{fwd,bwd,fwd_combine,get_scheduler_metadata} have the schemas that
FlashAttention-3 promises to stay compatible with, mistakes included: fwd does not say that it
writes k and v when k_new is given. Compiled code should call the functions, whose schemas are true.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

import fa3_ops
from fa3_ops import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    get_scheduler_metadata,
)

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def _no_parts(softmax_lse: Tensor) -> tuple[Tensor, Tensor]:
    """out_accum and softmax_lse_accum: no kernel of fa3_ops hands out its partial results."""
    return softmax_lse.new_empty(0), softmax_lse.new_empty(0)


@functools.wraps(fa3_ops.flash_attn_with_kvcache)
def flash_attn_with_kvcache(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
    result = fa3_ops.flash_attn_with_kvcache(*args, **kwargs)
    return result if isinstance(result, Tensor) else (*result, *_no_parts(result[1]))


_library = torch.library.Library("flash_attn_3", "DEF")
_library.define(
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, "
    "Tensor? q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, "
    "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, "
    "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
_library.define(
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, float softcap=0.0, bool deterministic=False, int sm_margin=0) "
    "-> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "fwd_combine(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, "
    "ScalarType? out_dtype=None) -> (Tensor(out!), Tensor)"
)
_library.define(
    "get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, "
    "int num_heads_k, int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? leftpad_k=None, int? page_size=None, "
    "int max_seqlen_k_new=0, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, bool has_softcap=False, "
    "int num_splits=0, bool? pack_gqa=None, int sm_margin=0) -> Tensor"
)


def _fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    q_v: Tensor | None = None,
    out: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    is_rotary_interleaved: bool = False,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, ...]:
    window_size = (window_size_left, window_size_right)
    cached = (k_new, v_new, cu_seqlens_k_new, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin)
    if any(argument is not None for argument in cached):
        if cu_seqlens_k is not None:
            raise ValueError(
                "cu_seqlens_k must be None with k_new, rotary_cos, kv_batch_idx or leftpad_k, "
                f"got shape {tuple(cu_seqlens_k.shape)}"
            )
        result = fa3_ops.flash_attn_with_kvcache(
            q,
            k,
            v,
            k_new,
            v_new,
            q_v,
            rotary_cos,
            rotary_sin,
            seqused_k,
            kv_batch_idx,
            leftpad_k,
            page_table,
            cu_seqlens_q,
            cu_seqlens_k_new,
            max_seqlen_q,
            seqlens_rotary,
            q_descale,
            k_descale,
            v_descale,
            softmax_scale,
            is_causal,
            window_size,
            attention_chunk,
            softcap,
            is_rotary_interleaved,
            scheduler_metadata,
            num_splits,
            pack_gqa,
            sm_margin,
            return_softmax_lse=True,
            out=out,
            seqused_q=seqused_q,
        )
    else:
        result = fa3_ops.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            seqused_q,
            seqused_k,
            softmax_scale,
            is_causal,
            q_v,
            q_descale,
            k_descale,
            v_descale,
            window_size,
            attention_chunk,
            softcap,
            num_splits,
            pack_gqa,
            sm_margin=sm_margin,
            return_attn_probs=True,
            page_table=page_table,
            out=out,
            scheduler_metadata=scheduler_metadata,
        )
    result, softmax_lse = result
    return result, softmax_lse, *_no_parts(softmax_lse)


def _bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, ...]:
    """Returns dq, dk, dv, softmax_d = rowsum(dout * out), softmax_lse in base 2, and three empty
    accumulators."""
    gradients = torch.ops.fa3npu.flash_attn_varlen_func_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q,
        seqused_k,
        softmax_scale,
        is_causal,
        (window_size_left, window_size_right),
        0,
        softcap,
        deterministic,
        sm_margin,
    )
    written = [
        new if old is None else old.copy_(new)
        for old, new in zip((dq, dk, dv), gradients, strict=True)
    ]
    softmax_d = (dout.float() * out.float()).sum(-1).transpose(-1, -2)
    accumulators = (softmax_lse.new_empty(0) for _ in range(3))
    return *written, softmax_d, softmax_lse * math.log2(math.e), *accumulators


def _get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    num_heads_k: int,
    headdim: int,
    headdim_v: int,
    qkv_dtype: torch.dtype,
    seqused_k: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    *schedule: Any,
) -> Tensor:
    """cu_seqlens_k and seqused_q are not looked at: a schedule never changes a number."""
    return fa3_ops.get_scheduler_metadata(
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        num_heads,
        num_heads_k,
        headdim,
        seqused_k,
        qkv_dtype,
        headdim_v,
        cu_seqlens_q,
        cu_seqlens_k_new,
        leftpad_k,
        page_size,
        max_seqlen_k_new,
        is_causal,
        (window_size_left, window_size_right),
        *schedule,
    )


for _name, _body in (
    ("fwd", _fwd),
    ("bwd", _bwd),
    ("fwd_combine", flash_attn_combine),
    ("get_scheduler_metadata", _get_scheduler_metadata),
):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
