"""The module of flash_attn_npu before 0.3, under which vLLM-Ascend looks for it, served by fa3_ops.

flash_attn_with_kvcache and get_scheduler_metadata keep the conventions of those releases: rows of q
are counted from cu_seqlens_q[0], so that a slice of query_start_loc goes with the same slice of the
tokens, and softmax_lse is token-major. The other functions are those of fa3_ops.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import fa3_ops
from fa3_ops import flash_attn_func, flash_attn_varlen_func
from fa3_ops.backends.npu.device import capturing

__version__ = fa3_ops.__version__
__all__ = [
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def _from_zero(cu_seqlens_q: Tensor) -> Tensor:
    """Offsets counted from the first one, on the device."""
    return cu_seqlens_q - cu_seqlens_q[:1]


def _host(cu_seqlens_q: Tensor) -> list[int] | None:
    """The values, or None where the host must not wait for them."""
    if torch.compiler.is_compiling():
        return None
    if cu_seqlens_q.device.type == "npu" and capturing(cu_seqlens_q.device):
        return None
    return cu_seqlens_q.tolist()


def _check_rows(q: Tensor, offsets: list[int]) -> None:
    """q must be the slice of the tokens that belongs to the slice of the offsets."""
    first, last = offsets[0], offsets[-1]
    if first > 0 and q.shape[0] >= last:
        raise ValueError(
            f"q must be the rows that cu_seqlens_q bounds, q[{first}:{last}], got {q.shape[0]} "
            "rows: it cannot be told whether they are counted from cu_seqlens_q[0], as here, or "
            "from 0, as in flash_attn_npu 0.3 and in fa3_ops.flash_attn_with_kvcache"
        )


def _longest(offsets: list[int]) -> int:
    """The longest sequence of q. Callers pass the longest of k, which costs a kernel time, or a
    bound that leaves out the rows of a dummy request."""
    return max((end - begin for begin, end in pairwise(offsets)), default=0)


def _check_page_table(page_table: Tensor, batch_size: int) -> None:
    if page_table.shape[0] != batch_size:
        raise ValueError(
            f"page_table must have one row for each of the {batch_size} sequences, got "
            f"{page_table.shape[0]} rows, and which are theirs cannot be told: slice it by "
            "requests, like cache_seqlens, and not by tokens"
        )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """fa3_ops.flash_attn_with_kvcache, which says what the arguments mean, but for these.

    Arguments:
        q: packed, (total_q, nheads, headdim): the rows from cu_seqlens_q[0] to cu_seqlens_q[-1] of
            a batch.
        cu_seqlens_q: (batch_size + 1,) int32, any slice of query_start_loc.
        max_seqlen_q: int, or a tensor with one element; made what the offsets need.
        page_table: exactly one row for each sequence.

    Returns:
        out, or with return_softmax_lse (out, softmax_lse, out_accum, softmax_lse_accum), the last
        two empty. softmax_lse is (total_q, nheads) or (batch_size, seqlen_q, nheads) float32; -inf
        where a row sees no key.

    Raises ValueError for a page_table with another number of rows and a q that is not cut like
    cu_seqlens_q. The offsets are not looked at while a graph is captured, nor where
    scheduler_metadata promises that nothing waits: max_seqlen_q is an upper bound there.
    """
    if page_table is not None and cache_batch_idx is None:
        _check_page_table(
            page_table, q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        )
    if max_seqlen_q is not None:
        max_seqlen_q = int(max_seqlen_q)
    if cu_seqlens_q is not None:
        offsets = None if scheduler_metadata is not None else _host(cu_seqlens_q)
        if offsets and max_seqlen_q is not None:
            _check_rows(q, offsets)
            max_seqlen_q = _longest(offsets)
            if max_seqlen_q > 1 and page_table is not None and not causal:
                warnings.warn(
                    f"causal=False with up to {max_seqlen_q} rows of q a sequence: each sees all "
                    "keys, a speculative token also those after it; decoding wants causal=True",
                    stacklevel=2,
                )
        cu_seqlens_q = _from_zero(cu_seqlens_q)
    result = fa3_ops.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        qv,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        page_table,
        cu_seqlens_q,
        cu_seqlens_k_new,
        max_seqlen_q,
        rotary_seqlens,
        q_descale,
        k_descale,
        v_descale,
        softmax_scale,
        causal,
        window_size,
        attention_chunk,
        softcap,
        rotary_interleaved,
        scheduler_metadata,
        num_splits,
        pack_gqa,
        sm_margin,
        return_softmax_lse=True,
    )
    out, softmax_lse = result
    if not return_softmax_lse:
        return out
    token_major = softmax_lse.transpose(-1, -2).contiguous()
    return out, token_major, softmax_lse.new_empty(0), softmax_lse.new_empty(0)


_METADATA = inspect.signature(fa3_ops.get_scheduler_metadata)


def get_scheduler_metadata(*args: Any, **kwargs: Any) -> Tensor:
    """fa3_ops.get_scheduler_metadata for the cu_seqlens_q that flash_attn_with_kvcache gets."""
    arguments = _METADATA.bind(*args, **kwargs).arguments
    if arguments.get("cu_seqlens_q") is not None:
        arguments["cu_seqlens_q"] = _from_zero(arguments["cu_seqlens_q"])
    return fa3_ops.get_scheduler_metadata(**arguments)
