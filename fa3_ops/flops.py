"""Formulas for torch.utils.flop_counter.FlopCounterMode, which counts, as for PyTorch's own
attention, every product of the rectangle seqlen_q x seqlen_k whatever the mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

ops = torch.ops.fa3npu


def _lengths(
    cu_seqlens: Tensor | None, seqused: Tensor | None, longest: int, batch: int
) -> list[int]:
    """Rows of each sequence; where lengths cannot be read, the longest for all."""
    if seqused is not None and _has_values(seqused):
        return seqused.tolist()
    if cu_seqlens is not None and _has_values(cu_seqlens):
        return cu_seqlens.diff().tolist()
    return [longest] * batch


def _has_values(t: Tensor) -> bool:
    return not (isinstance(t, FakeTensor) or t.is_meta)


def _pairs(q_lengths: list[int], k_lengths: list[int]) -> int:
    return sum(a * b for a, b in zip(q_lengths, k_lengths, strict=True))


def _forward(pairs: int, q: Tensor, v: Tensor, qv: Tensor | None) -> int:
    widths = q.shape[-1] + v.shape[-1] + (0 if qv is None else qv.shape[-1])
    return 2 * pairs * q.shape[-2] * widths


def _backward(pairs: int, q: Tensor, v: Tensor) -> int:
    # scores, dq and dk over headdim; dprobabilities and dv over headdim_v
    return 2 * pairs * q.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])


@register_flop_formula(ops.flash_attn_func, get_raw=True)
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    qv = kwargs.get("qv", args[2] if len(args) > 2 else None)
    return _forward(q.shape[0] * q.shape[1] * k.shape[1], q, v, qv)


@register_flop_formula(ops.flash_attn_func_backward, get_raw=True)
def flash_attn_func_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return _backward(q.shape[0] * q.shape[1] * k.shape[1], q, v)


def _varlen_pairs(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    longest_q = q.shape[1] if cu_seqlens_q is None else max_seqlen_q or q.shape[0]
    longest_k = k.shape[1] if cu_seqlens_k is None else max_seqlen_k or k.shape[0]
    return _pairs(
        _lengths(cu_seqlens_q, seqused_q, longest_q, batch),
        _lengths(cu_seqlens_k, seqused_k, longest_k, batch),
    )


@register_flop_formula(ops.flash_attn_varlen_func, get_raw=True)
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    qv = kwargs.get("qv", args[8] if len(args) > 8 else None)
    return _forward(_varlen_pairs(q, k, *args, **kwargs), q, v, qv)


@register_flop_formula(ops.flash_attn_varlen_func_backward, get_raw=True)
def flash_attn_varlen_func_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    return _backward(_varlen_pairs(q, k, *args, **kwargs), q, v)


@register_flop_formula(ops.flash_attn_kvcache, get_raw=True)
def flash_attn_kvcache(
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
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    longest_q = q.shape[1] if cu_seqlens_q is None else max_seqlen_q or q.shape[0]
    capacity = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    pairs = _pairs(
        _lengths(cu_seqlens_q, seqused_q, longest_q, batch),
        _lengths(None, cache_seqlens, capacity, batch),
    )
    return _forward(pairs, q, v_cache, qv)
