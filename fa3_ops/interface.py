"""FlashAttention-3's Python interface over torch.ops.fa3npu.

Names, order, defaults and return values are those of `flash_attn_interface.py` in the `hopper`
folder of the flash-attention repository, but for the two internal buffers that its
flash_attn_with_kvcache returns after softmax_lse. Behind FlashAttention-3's arguments stand the
ones that serving code passes besides: `block_table` for `page_table`, `s_aux` (or
`learnable_sink`) for `sinks`, `out`.

Dtypes: float32, float16, bfloat16, float64, and float8_e4m3fn (result in bfloat16). Beside a q of
16 or 32 bits, k and v (and caches) may be narrow: both float8_e4m3fn, float8_e5m2 or int8, times
their descales; that has no backward. Lengths and offsets are int32 tensors on the device of q.
`pack_gqa`, `sm_margin`, `num_splits`, `scheduler_metadata` and `deterministic` are schedules: they
never change a number.

Shapes: nheads must be a multiple of nheads_k; query head h reads head h * nheads_k // nheads.
Every function raises ValueError for shapes and values and TypeError for dtypes, naming the
argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fa3_ops.ops import checks, composite, direct
from fa3_ops.ops.autocast import cast_training
from fa3_ops.ops.errors import check_kind, names_arguments, renamed

ops = torch.ops.fa3npu

Window: TypeAlias = Sequence[int | None] | Tensor | None
_INTS = (int, torch.SymInt)


def _settings(
    window_size: Window,
    attention_chunk: int | None,
    softcap: float | None,
    num_splits: int | None,
    splits: int,
) -> tuple[tuple[int, ...], int, float, int]:
    """The window as a tuple, whose None or -1 means no limit; None in the others is the default,
    `splits` that of num_splits, of which -1 means no split."""
    if window_size is None or (type(window_size) is tuple and window_size == (-1, -1)):
        window: tuple[int, ...] = (-1, -1)
    else:
        window = tuple([-1 if side is None else index(side) for side in window_size])
    if num_splits is None:
        num_splits = splits
    elif num_splits == -1:
        num_splits = 1
    return (
        window,
        0 if attention_chunk is None else attention_chunk,
        0.0 if softcap is None else softcap,
        num_splits,
    )


def _returned(return_attn_probs: bool, return_softmax_lse: bool, dropout_p: float) -> bool:
    """Whether softmax_lse is returned. No operator gets these arguments, to check them."""
    if type(return_attn_probs) is not bool:
        check_kind(return_attn_probs, bool, "return_attn_probs")
    if type(return_softmax_lse) is not bool:
        check_kind(return_softmax_lse, bool, "return_softmax_lse")
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0 (fa3_ops has no dropout), got {dropout_p}")
    return return_attn_probs or return_softmax_lse


def _packed_offsets(seqused_k: Tensor, q: Tensor, cu_seqlens_q: Tensor | None, k: Tensor) -> Tensor:
    """cu_seqlens_k of sequences that lie back to back in k, from how long each is."""
    checks.packed_lengths(seqused_k, q, cu_seqlens_q, k)
    return F.pad(seqused_k.cumsum(0, dtype=torch.int32), (1, 0))


def _one_of(**names: Tensor | None) -> Tensor:
    """The value of an argument that was given by another of its names."""
    given = {name: value for name, value in names.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are the same argument: give one of them, got both")
    return next(iter(given.values()))


@names_arguments
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float | None = 0.0,
    num_splits: int | None = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    return_softmax_lse: bool = False,
    dropout_p: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of dense batches, differentiable in q, k, v and sinks.

    Arguments:
        q: (batch_size, seqlen_q, nheads, headdim), headdim from 1 to 512.
        k: (batch_size, seqlen_k, nheads_k, headdim).
        v: (batch_size, seqlen_k, nheads_k, headdim_v).
        softmax_scale: factor of q k^T; by default 1 / sqrt(headdim), with qv
            1 / sqrt(headdim + headdim_v).
        causal: query i sees key j if j <= i + seqlen_k - seqlen_q (aligned bottom right).
        qv: (batch_size, seqlen_q, nheads, headdim_v); adds qv v^T to the scores (MLA). No backward.
        q_descale, k_descale, v_descale: (batch_size, nheads_k), (nheads_k,), (1,) or 0-dimensional
            float32, factors of FP8 and int8 inputs; ignored for other dtypes.
        window_size: (left, right); query i sees keys from i + seqlen_k - seqlen_q - left to
            i + seqlen_k - seqlen_q + right, both inclusive; -1 or None means no limit.
        attention_chunk: if positive, a query sees only keys of its own chunk of so many positions.
        softcap: if positive, scores become softcap * tanh(scores / softcap).
        num_splits: a schedule; -1 is 1, no split. None is the default, here and for the two above.
        return_attn_probs, return_softmax_lse: also return softmax_lse.
        alibi_slopes: (nheads,) or (batch_size, nheads) float32; adds
            -slope * |i + seqlen_k - seqlen_q - j| to the scores.
        sinks (aliases s_aux, learnable_sink): (nheads,); a score that each row's softmax counts,
            without a value.
        dropout_p: must be 0.

    Returns:
        out: (batch_size, seqlen_q, nheads, headdim_v) in q's dtype (bfloat16 for FP8); 0 where a
            row sees no key.
        softmax_lse: (batch_size, nheads, seqlen_q) float32, natural log, the sink included; -inf
            where a row sees no key.
    """
    if s_aux is not None or learnable_sink is not None:
        sinks = _one_of(sinks=sinks, s_aux=s_aux, learnable_sink=learnable_sink)
    window, attention_chunk, softcap, num_splits = _settings(
        window_size, attention_chunk, softcap, num_splits, splits=1
    )
    returns_lse = _returned(return_attn_probs, return_softmax_lse, dropout_p)
    if torch.compiler.is_compiling():
        softmax_scale, softcap = checks.constants(softmax_scale, softcap)
    q, k, v, qv = cast_training(q, k, v, qv)
    arguments = (
        q, k, v, softmax_scale, causal, qv, q_descale, k_descale, v_descale, window,
        attention_chunk, softcap, num_splits, pack_gqa, deterministic, sm_margin,
        alibi_slopes, sinks,
    )  # fmt: skip
    out, softmax_lse = direct.call(
        ops.flash_attn_func,
        lambda: checks.attention(
            q, k, v, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
            softmax_scale=softmax_scale, window_size=window, attention_chunk=attention_chunk,
            softcap=softcap, num_splits=num_splits, alibi_slopes=alibi_slopes, sinks=sinks,
        ),
        arguments,
    )  # fmt: skip
    return (out, softmax_lse) if returns_lse else out


@names_arguments
def flash_attn_varlen_func(
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
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float | None = 0.0,
    num_splits: int | None = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    page_table: Tensor | None = None,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    out: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    return_softmax_lse: bool = False,
    dropout_p: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed sequences, differentiable in q, k, v and sinks.

    Arguments (the others as in flash_attn_func):
        q: (total_q, nheads, headdim), sequence b in rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        k, v: (total_k, nheads_k, headdim), (total_k, nheads_k, headdim_v).
        cu_seqlens_q, cu_seqlens_k: (batch_size + 1,) int32, not falling. Without one of them that
            side is dense, as in flash_attn_func.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths; needed with cu_seqlens.
        seqused_q, seqused_k: (batch_size,) int32; how many rows of each sequence count, from its
            start. Rows of q that do not count give 0 and -inf. With k and v packed and without
            cu_seqlens_k, seqused_k says how long each sequence is, one behind the other.
        page_table (alias block_table): (batch_size, max_num_pages_per_seq) int32; k and v are then
            a paged cache, (num_pages, page_size, nheads_k, ...), cu_seqlens_k must be None and
            lengths come as seqused_k. No backward.
        out: the result is written there.

    Returns:
        out: (total_q, nheads, headdim_v).
        softmax_lse: (nheads, total_q) float32; with return_attn_probs.
    """
    if s_aux is not None or learnable_sink is not None:
        sinks = _one_of(sinks=sinks, s_aux=s_aux, learnable_sink=learnable_sink)
    if block_table is not None:
        page_table = _one_of(page_table=page_table, block_table=block_table)
    window, attention_chunk, softcap, num_splits = _settings(
        window_size, attention_chunk, softcap, num_splits, splits=1
    )
    returns_lse = _returned(return_attn_probs, return_softmax_lse, dropout_p)
    if torch.compiler.is_compiling():
        softmax_scale, softcap = checks.constants(softmax_scale, softcap)
    if page_table is None:
        q, k, v, qv = cast_training(q, k, v, qv)
        if cu_seqlens_k is None and seqused_k is not None and k.dim() == 3:
            cu_seqlens_k, seqused_k = _packed_offsets(seqused_k, q, cu_seqlens_q, k), None
            max_seqlen_k = k.shape[0] if max_seqlen_k is None else max_seqlen_k

    def check() -> None:
        checks.attention(
            q, k, v, qv=qv, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, seqused_q=seqused_q,
            seqused_k=seqused_k, page_table=page_table, q_descale=q_descale, k_descale=k_descale,
            v_descale=v_descale, softmax_scale=softmax_scale, window_size=window,
            attention_chunk=attention_chunk, softcap=softcap, num_splits=num_splits,
            alibi_slopes=alibi_slopes, sinks=sinks, out=out, scheduler_metadata=scheduler_metadata,
        )  # fmt: skip

    if page_table is not None:
        as_usual = max_seqlen_k is None or (type(max_seqlen_k) is int and 0 <= max_seqlen_k < 2**63)
        if not as_usual or deterministic is not False:
            check_kind(max_seqlen_k, int | None, "max_seqlen_k")
            check_kind(deterministic, bool, "deterministic")
        arguments: tuple[object, ...] = (
            q, k, v, qv, seqused_k, None, None, page_table, cu_seqlens_q, max_seqlen_q,
            seqused_q, q_descale, k_descale, v_descale, softmax_scale, causal, window,
            attention_chunk, softcap, scheduler_metadata, num_splits, pack_gqa, sm_margin,
            alibi_slopes, sinks, None,
        )  # fmt: skip
    else:
        arguments = (
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q,
            seqused_k, softmax_scale, causal, qv, q_descale, k_descale, v_descale, window,
            attention_chunk, softcap, num_splits, pack_gqa, deterministic, sm_margin,
            alibi_slopes, sinks,
        )  # fmt: skip
    op = ops.flash_attn_varlen_func if page_table is None else ops.flash_attn_kvcache
    if (scheduler_metadata if page_table is None else cu_seqlens_k) is not None:
        check()  # of what these operators do not get
    if out is None:
        out, softmax_lse = direct.call(op, check, arguments)
    else:
        softmax_lse = direct.call(op.out, check, arguments, out)
    return (out, softmax_lse) if returns_lse else out


@names_arguments
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float | None = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    return_softmax_lse: bool = False,
    dropout_p: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attn_func of one tensor: qkv is (batch_size, seqlen, 3, nheads, headdim), or
    (batch_size, seqlen, num_heads_q + 2 * nheads_k, headdim) with num_heads_q given."""
    if num_heads_q is not None:
        check_kind(num_heads_q, int, "num_heads_q")
    if qkv.dim() == 5:
        checks.shape(qkv, ("batch_size", "seqlen", 3, "nheads", "headdim"), "qkv")
        q, k, v = qkv.unbind(dim=-3)
    else:
        checks.shape(qkv, ("batch_size", "seqlen", "num_heads_q + 2 * nheads_k", "headdim"), "qkv")
        if num_heads_q is None:
            raise ValueError("num_heads_q must be given for a 4-dimensional qkv, got None")
        nheads_k = (qkv.shape[2] - num_heads_q) // 2
        if nheads_k <= 0 or num_heads_q + 2 * nheads_k != qkv.shape[2]:
            raise ValueError(
                f"num_heads_q must leave an even number of heads for k and v, got {num_heads_q} "
                f"of {qkv.shape[2]}"
            )
        q, k, v = qkv.split([num_heads_q, nheads_k, nheads_k], dim=-2)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        None,
        q_descale,
        k_descale,
        v_descale,
        window_size,
        attention_chunk,
        softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
        return_softmax_lse=return_softmax_lse,
        dropout_p=dropout_p,
    )


@names_arguments
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
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int | None = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    out: Tensor | None = None,
    seqused_q: Tensor | None = None,
    cache_start: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to a KV cache in place, then attends to the cache. Has no backward.

    Arguments (the masks and factors as in flash_attn_func):
        q: (batch_size, seqlen_q, nheads, headdim), or packed (total_q, nheads, headdim) with
            cu_seqlens_q and max_seqlen_q.
        k_cache: (batch_size_cache, seqlen_cache, nheads_k, headdim), or paged
            (num_pages, page_size, nheads_k, headdim) with page_table; any page_size from 1, any
            strides but of the last dimension, which is contiguous.
        v_cache: likewise with headdim_v. Without k, both may also be packed, (total_k, nheads_k,
            ...): sequence b has cache_seqlens[b] keys, behind those of sequence b - 1.
        k, v: (batch_size, seqlen_new, nheads_k, ...), or packed with cu_seqlens_k_new; written at
            positions cache_seqlens[b] and on. Masks then count the lengths after the append.
        qv: like q with headdim_v.
        rotary_cos, rotary_sin: (seqlen_ro, rotary_dim / 2), q's dtype or float32; only with k. New
            keys are rotated at cache_seqlens[b], cache_seqlens[b] + 1, ... (left padding counted,
            and cache_start[b] added), and so is q if causal, windowed or chunked; else every row
            of q at the first of these.
        rotary_interleaved: pairs are dimensions (0, 1), (2, 3), ..., else (0, rotary_dim / 2), ...
        rotary_seqlens: (batch_size,) int32, the first position instead of cache_seqlens.
        cache_seqlens: int, or (batch_size,) int32: valid keys in the cache before the append,
            counted from the cache's start; by default all.
        cache_batch_idx: (batch_size,) int32, row of the cache (or of page_table) of each sequence.
        cache_leftpad: (batch_size,) int32, keys at the start of the cache that do not count.
        cache_start: (batch_size,) int32, the position in its sequence of the first key that counts:
            0, or what a cache with a sliding window has dropped. attention_chunk and the blocks of
            the bitwise contract count from the start of the sequence, so that a row whose window
            hides what was dropped has the bits of the whole cache.
        page_table (alias block_table): (batch_size, max_num_pages_per_seq) int32; entries of pages
            that no row of q sees are not read.
        seqused_q: (batch_size,) int32; how many rows of q of each sequence count, from its start.
        out: the result is written there.

    Returns:
        out: like q with headdim_v.
        softmax_lse: (batch_size, nheads, seqlen_q), or (nheads, total_q) for packed q; with
            return_softmax_lse.
    """
    if block_table is not None:
        page_table = _one_of(page_table=page_table, block_table=block_table)
    if s_aux is not None or learnable_sink is not None:
        sinks = _one_of(sinks=sinks, s_aux=s_aux, learnable_sink=learnable_sink)
    if type(return_softmax_lse) is not bool:
        check_kind(return_softmax_lse, bool, "return_softmax_lse")
    window, attention_chunk, softcap, num_splits = _settings(
        window_size, attention_chunk, softcap, num_splits, splits=0
    )
    if isinstance(cache_seqlens, _INTS):
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        cache_seqlens = torch.full(
            (batch,), cache_seqlens, dtype=torch.int32, device=k_cache.device
        )
    if torch.compiler.is_compiling():
        softmax_scale, softcap = checks.constants(softmax_scale, softcap)
    if k_cache.dim() == 3 and page_table is None:
        check_kind(rotary_interleaved, bool, "rotary_interleaved")
        checks.packed_cache(
            k_cache,
            cache_seqlens,
            rotary_seqlens,
            k=k,
            v=v,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            cache_batch_idx=cache_batch_idx,
            cache_leftpad=cache_leftpad,
            cache_start=cache_start,
            cu_seqlens_k_new=cu_seqlens_k_new,
        )
        try:
            return flash_attn_varlen_func(
                *(q, k_cache, v_cache, cu_seqlens_q, None, max_seqlen_q, None, seqused_q),
                *(cache_seqlens, softmax_scale, causal, qv, q_descale, k_descale, v_descale),
                *(window, attention_chunk, softcap, num_splits, pack_gqa),
                sm_margin=sm_margin,
                alibi_slopes=alibi_slopes,
                sinks=sinks,
                out=out,
                scheduler_metadata=scheduler_metadata,
                return_softmax_lse=return_softmax_lse,
            )
        except (ValueError, TypeError) as error:
            raise renamed(error, k="k_cache", v="v_cache", seqused_k="cache_seqlens") from None
    arguments = (
        q, k_cache, v_cache, k, v, qv, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
        cache_leftpad, page_table, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q, rotary_seqlens,
        q_descale, k_descale, v_descale, softmax_scale, causal, window,
        attention_chunk, softcap, rotary_interleaved, scheduler_metadata, num_splits, pack_gqa,
        sm_margin, alibi_slopes, sinks, seqused_q, cache_start,
    )  # fmt: skip
    op = ops.flash_attn_with_kvcache
    results = composite.directly(arguments, out)
    if out is None:
        out, softmax_lse = op(*arguments) if results is None else results
    else:
        softmax_lse = op.out(*arguments, out=out) if results is None else results
    return (out, softmax_lse) if return_softmax_lse else out


@names_arguments
def kvcache_scatter_(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """Writes new keys and values to slots of a cache, in place, as vLLM asks for it.

    Arguments:
        k: (num_tokens, nheads_k, headdim), in the cache's dtype, or in float16, bfloat16 or
            float32 for a narrow cache.
        v: (num_tokens, nheads_k, headdim_v), likewise.
        k_cache: (num_pages, page_size, nheads_k, headdim), or (batch_size, seqlen, ...); of any
            strides whose last is 1. Narrow are float8_e4m3fn, float8_e5m2 and int8.
        v_cache: (num_pages, page_size, nheads_k, headdim_v) of k_cache's dtype.
        slot_mapping: (num_slots,) int32 or int64, num_slots <= num_tokens: row i of k and v goes to
            page slot_mapping[i] // page_size, row slot_mapping[i] % page_size of it, nowhere if it
            is negative. Rows of k and v behind num_slots are padding. Of rows with the same slot
            any one is written.
        k_descale, v_descale: (nheads_k,), (1,) or () float32: what goes into a narrow cache is
            divided by them, rounded to nearest, ties to even, and bounded by the largest number of
            the dtype; NaN stays NaN, and is 0 in int8. Ignored where nothing is narrowed.

    Raises ValueError before anything is written where a slot is behind the end of the cache; on a
    device whose tensors the host would have to wait for, such a slot is skipped.
    """
    arguments = (k, v, k_cache, v_cache, slot_mapping, k_descale, v_descale)
    direct.call(ops.kvcache_scatter_, lambda: checks.scatter(*arguments), arguments)


@names_arguments
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear whose rows do not depend on each other: x weight^T + bias.

    A row of the result is a function of its row of x, of weight and of bias. On CPU its bits are
    the same whatever number of rows it is computed with, wherever it lies among them, and whatever
    the threads, the strides and the alignment; so are those of the gradient of x. Products are
    summed in float32 (float64 of float64), the bias is added to the sum, and that is rounded once.

    Arguments:
        x: (..., in_features) float32, float16, bfloat16 or float64.
        weight: (out_features, in_features) of x's dtype, of any strides.
        bias: (out_features,) of x's dtype.

    Returns:
        (..., out_features), contiguous, of x's dtype.

    On NPU the package batch_invariant_ops computes it where it is installed, else PyTorch's linear,
    which does not promise this (a FallbackWarning).
    """
    x, weight, bias = cast_training(x, weight, bias)
    arguments = (x, weight, bias)
    out: Tensor = direct.call(ops.linear, lambda: checks.linear(*arguments), arguments)
    return out


@names_arguments
def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merges partial results over disjoint keys.

    Arguments:
        out_partial: (num_splits, batch_size, seqlen, nheads, headdim) float32, or
            (num_splits, total_q, nheads, headdim).
        lse_partial: (num_splits, batch_size, seqlen, nheads) float32, or
            (num_splits, total_q, nheads); -inf (or +inf) where a part saw no key.
        out: the result is written there.
        out_dtype: float32 (default), float16 or bfloat16.

    Returns:
        out: out_partial's shape without num_splits; softmax_lse: lse_partial's, likewise.
    """
    checks.same_device(out_partial, {"lse_partial": lse_partial, "out": out}, "out_partial")
    name = "out_dtype"
    if out_dtype is None and out is not None:
        name, out_dtype = "dtype of out", out.dtype
    checks.parts(out_partial, lse_partial, out_dtype, name)
    merged, softmax_lse = ops.flash_attn_combine(out_partial, lse_partial, out_dtype)
    if out is None:
        return merged, softmax_lse
    checks.shape(out, tuple(merged.shape), "out")
    checks.dtype(out, merged.dtype, "out")
    return out.copy_(merged), softmax_lse


@names_arguments
def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    has_softcap: bool = False,
    num_splits: int | None = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    *,
    softcap: float | None = 0.0,
    softmax_scale: float | None = None,
) -> Tensor:
    """The schedule of a later call of flash_attn_with_kvcache, as a tensor whose size depends on
    the length of cache_seqlens alone. It never changes a number.

    cache_seqlens and cache_leftpad have at least batch_size elements, cu_seqlens_q and
    cu_seqlens_k_new one more. What lies behind is padding, in the call too, whose numbers for these
    sequences mean nothing: so a server may pass the tensors of its largest batch every time.

    On CPU: int32 like cache_seqlens, which nothing reads. On NPU: uint8, for a call that a graph
    capture records. Every argument must be that of the call: softcap and softmax_scale (by default
    1 / sqrt(headdim)) too, page_size * max_num_pages_per_seq as max_seqlen_k. A call that gets the
    metadata of another one, or of other lengths, returns NaN. It cannot be captured itself
    (ValueError): make it before each replay and copy it into the tensor that the captured call got.
    """
    check_kind(qkv_dtype, torch.dtype, "qkv_dtype")
    window, attention_chunk, softcap, num_splits = _settings(
        window_size, attention_chunk, softcap, num_splits, splits=0
    )
    if torch.compiler.is_compiling():
        softmax_scale, softcap = checks.constants(softmax_scale, softcap)
    checks.lengths_at_least(cache_seqlens, batch_size, "cache_seqlens")
    checks.lengths_at_least(cu_seqlens_q, batch_size + 1, "cu_seqlens_q")
    checks.lengths_at_least(cu_seqlens_k_new, batch_size + 1, "cu_seqlens_k_new")
    checks.lengths_at_least(cache_leftpad, batch_size, "cache_leftpad")
    others = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k_new": cu_seqlens_k_new}
    others["cache_leftpad"] = cache_leftpad
    checks.same_device(cache_seqlens, others, "cache_seqlens")
    metadata: Tensor = ops.get_scheduler_metadata(
        *(batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim),
        *(cache_seqlens, qkv_dtype, headdim_v, cu_seqlens_q, cu_seqlens_k_new, cache_leftpad),
        *(page_size, max_seqlen_k_new, causal, window, attention_chunk, has_softcap),
        *(num_splits, pack_gqa, sm_margin, softcap, softmax_scale),
    )
    return metadata
