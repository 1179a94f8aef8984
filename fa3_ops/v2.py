"""FlashAttention-2's Python interface over fa3_ops.interface, which says what the arguments mean.

Names, order, defaults and return tuples are those of `flash_attn/flash_attn_interface.py` in the
flash-attention repository. What differs:

- dropout_p must be 0: there is no dropout.
- With return_attn_probs=True the result is (out, softmax_lse, S_dmask) with S_dmask=None: the
  probabilities are never formed.
- softmax_lse is -inf (there: +inf) where a row sees no key, and is the true one under causal ALiBi
  (there: another constant per row).
- softcap of 0 or less means none, as there. deterministic never changes a number.
- get_scheduler_metadata, which FlashAttention-2 lacks, is that of fa3_ops.interface.
"""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from fa3_ops import interface
from fa3_ops.interface import Window, get_scheduler_metadata
from fa3_ops.ops import checks
from fa3_ops.ops.errors import names_arguments

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

Result: TypeAlias = Tensor | tuple[Tensor, Tensor, None]


def _softcap(softcap: float | None) -> float | None:
    return softcap if softcap is None else max(softcap, 0.0)


def _with_probs(result: Tensor | tuple[Tensor, Tensor]) -> Result:
    return result if isinstance(result, Tensor) else (*result, None)


@names_arguments
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """interface.flash_attn_func, with alibi_slopes in FlashAttention-2's place."""
    return _with_probs(
        interface.flash_attn_func(
            q,
            k,
            v,
            softmax_scale,
            causal,
            window_size=window_size,
            softcap=_softcap(softcap),
            deterministic=deterministic,
            return_attn_probs=return_attn_probs,
            alibi_slopes=alibi_slopes,
            dropout_p=dropout_p,
        )
    )


@names_arguments
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_func of qkv (batch_size, seqlen, 3, nheads, headdim)."""
    checks.shape(qkv, ("batch_size", "seqlen", 3, "nheads", "headdim"), "qkv")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


@names_arguments
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_func of kv (batch_size, seqlen_k, 2, nheads_k, headdim)."""
    checks.shape(kv, ("batch_size", "seqlen_k", 2, "nheads_k", "headdim"), "kv")
    k, v = kv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


@names_arguments
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """interface.flash_attn_varlen_func; with block_table k and v are a paged cache and cu_seqlens_k
    still gives the lengths. No backward then."""
    paged = block_table is not None
    if block_table is not None:
        checks.lengths(cu_seqlens_k, block_table.shape[0] + 1, "cu_seqlens_k")
    return _with_probs(
        interface.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            None if paged else cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            None,
            cu_seqlens_k.diff() if paged else None,
            softmax_scale,
            causal,
            window_size=window_size,
            softcap=_softcap(softcap),
            deterministic=deterministic,
            return_attn_probs=return_attn_probs,
            page_table=block_table,
            alibi_slopes=alibi_slopes,
            dropout_p=dropout_p,
        )
    )


@names_arguments
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_varlen_func of qkv (total, 3, nheads, headdim)."""
    checks.shape(qkv, ("total", 3, "nheads", "headdim"), "qkv")
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


@names_arguments
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_varlen_func of kv (total_k, 2, nheads_k, headdim)."""
    checks.shape(kv, ("total_k", 2, "nheads_k", "headdim"), "kv")
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


@names_arguments
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int | None = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """interface.flash_attn_with_kvcache for dense q. Pages may have any size, and cache_batch_idx
    and cache_leftpad also go with block_table; rotary_cos and rotary_sin only with k, as there."""
    return interface.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        None,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=_softcap(softcap),
        rotary_interleaved=rotary_interleaved,
        num_splits=num_splits,
        return_softmax_lse=return_softmax_lse,
        alibi_slopes=alibi_slopes,
    )
