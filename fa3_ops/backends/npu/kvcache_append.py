"""kvcache_append_ by CANN's scatter operator, which writes rows to slots of a paged cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fa3_ops.backends.choice import fallback
from fa3_ops.backends.npu.apply_rotary import check, rotate
from fa3_ops.backends.npu.device import capturing
from fa3_ops.backends.npu.lengths import read, require, row_counts
from fa3_ops.backends.npu.lowering import sequence_of_row
from fa3_ops.backends.written import apart, mark_written
from fa3_ops.checks import writable

SCATTER_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class Append:
    """k, v (batch_size, seqlen_new, nheads_k, ...), or packed by cu_seqlens_k_new."""

    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    cache_batch_idx: Tensor | None
    page_table: Tensor | None
    cu_seqlens_k_new: Tensor | None

    @property
    def batch_size(self) -> int:
        return self.cache_seqlens.shape[0]

    @property
    def capacity(self) -> int:
        pages = 1 if self.page_table is None else self.page_table.shape[1]
        return self.k_cache.shape[1] * pages


def check_shapes(a: Append) -> None:
    for name, x, cache in (("k", a.k, a.k_cache), ("v", a.v, a.v_cache)):
        require(
            x.shape[-2:] == cache.shape[2:] and x.dtype == cache.dtype,
            f"{name} must have the heads, headdim and dtype of its cache, got {tuple(x.shape)} "
            f"{x.dtype} for {tuple(cache.shape)} {cache.dtype}",
        )
    require(
        a.k.shape[:-1] == a.v.shape[:-1] and a.k_cache.shape[:-1] == a.v_cache.shape[:-1],
        "v and v_cache must have the shapes of k and k_cache up to headdim",
    )


def slots(a: Append) -> tuple[Tensor, Tensor]:
    """For each new row its slot, entry * rows + row of the cache taken as (entries, rows, ...), and
    whether it is to be written: (tokens,) int32 and bool, from lengths on the device. Slots are
    bounded by the cache."""
    device, rows = a.k.device, a.k_cache.shape[1]
    count = a.k.shape[:-2].numel()
    token = torch.arange(count, dtype=torch.int32, device=device)
    if a.cu_seqlens_k_new is None:
        sequence = (token // max(a.k.shape[1], 1)).long()
        position = a.cache_seqlens[sequence] + token % max(a.k.shape[1], 1)
        counts = torch.ones_like(token, dtype=torch.bool)
    else:
        cu_seqlens = a.cu_seqlens_k_new
        sequence = sequence_of_row(cu_seqlens, a.k)
        position = a.cache_seqlens[sequence] + token - cu_seqlens[sequence]
        counts = (token >= cu_seqlens[0]) & (token < cu_seqlens[-1])
    fits = (position >= 0) & (position < a.capacity)
    position = position.clamp(0, a.capacity - 1)
    entry = sequence if a.cache_batch_idx is None else a.cache_batch_idx[sequence].long()
    if a.page_table is None:
        page, row = entry.clamp(0, a.k_cache.shape[0] - 1), position
    else:
        entry = entry.clamp(0, a.page_table.shape[0] - 1)
        page, row = a.page_table[entry, (position // rows).long()], position % rows
        fits = fits & (page >= 0) & (page < a.k_cache.shape[0])
        page = page.clamp(0, a.k_cache.shape[0] - 1)
    return (page * rows + row).int(), counts & fits


def check_values(a: Append, slot: Tensor, written: Tensor) -> list[int]:
    """Checks lengths and page ids on the host; returns how many rows each sequence gets."""
    seqlens, cu, entries = read(a.cache_seqlens, a.cu_seqlens_k_new, a.cache_batch_idx)
    assert seqlens is not None
    counts = row_counts(a.k, cu, a.batch_size, "cu_seqlens_k_new")
    n = (a.k_cache if a.page_table is None else a.page_table).shape[0]
    for b, entry in enumerate(entries or range(a.batch_size)):
        require(0 <= entry < n, f"cache_batch_idx[{b}] must be in [0, {n}), got {entry}")
    for b, (seqlen, count) in enumerate(zip(seqlens, counts, strict=True)):
        require(seqlen >= 0, f"cache_seqlens[{b}] must not be negative, got {seqlen}")
        require(
            seqlen + count <= a.capacity,
            f"cache_seqlens[{b}] must leave room for {count} new keys in a cache of {a.capacity}, "
            f"got {seqlen}",
        )
    if a.page_table is not None and not bool(written.sum() == sum(counts)):
        pages = a.page_table.tolist()
        for b, (seqlen, count) in enumerate(zip(seqlens, counts, strict=True)):
            entry = b if entries is None else entries[b]
            for i in range(
                seqlen // a.k_cache.shape[1], -(-(seqlen + count) // a.k_cache.shape[1])
            ):
                require(
                    0 <= pages[entry][i] < a.k_cache.shape[0],
                    f"page_table[{entry}, {i}] must be in [0, {a.k_cache.shape[0]}), "
                    f"got {pages[entry][i]}",
                )
    return counts


def scatter_reasons(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> list[str]:
    """Why the scatter operator cannot write these rows."""
    reasons = [] if k.dtype in SCATTER_DTYPES else [f"dtype {k.dtype}"]
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        reasons.append("the cache is strided")
    return reasons


def scatter(a: Append, slot: Tensor, k: Tensor, v: Tensor) -> None:
    """Row i of k and v (tokens, nheads_k, ...) to slot[i]."""
    if reasons := scatter_reasons(k, v, a.k_cache, a.v_cache):
        fallback(f"appends by index_put_, because npu_scatter_pa_kv_cache: {', '.join(reasons)}")
        rows = a.k_cache.shape[1]
        at = ((slot // rows).long(), (slot % rows).long())
        for cache, x in ((a.k_cache, k), (a.v_cache, v)):
            if x.dtype == torch.float8_e4m3fn:  # bytes are bytes
                cache, x = cache.view(torch.uint8), x.view(torch.uint8)
            cache.index_put_(at, x)
        return
    import torch_npu

    torch_npu.npu_scatter_pa_kv_cache(
        k.contiguous(), v.contiguous(), a.k_cache, a.v_cache, slot, cache_mode="Norm"
    )


def only_written(a: Append, slot: Tensor, written: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, k and v in which the rows that must not be written repeat one that is, or, if there is
    none, what the cache holds: no shape depends on a value."""
    k, v = a.k.flatten(0, -3), a.v.flatten(0, -3)
    donor = written.int().argmax()
    token = torch.arange(slot.shape[0], device=slot.device)
    source = torch.where(written, token, donor)
    slot = slot[source]
    page, row = (slot // a.k_cache.shape[1]).long(), (slot % a.k_cache.shape[1]).long()
    some = written.any()
    k = torch.where(some, k[source], a.k_cache[page, row])
    return slot, k, torch.where(some, v[source], a.v_cache[page, row])


def kvcache_append_(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    rotary_interleaved: bool = True,
) -> None:
    """Outside a capture the values are checked on the host before anything is written; in one, rows
    that do not fit are left out."""
    writable(k_cache, "k_cache")
    writable(v_cache, "v_cache")
    k, v = apart(k, k_cache, v_cache), apart(v, k_cache, v_cache)
    a = Append(k, v, k_cache, v_cache, cache_seqlens, cache_batch_idx, page_table, cu_seqlens_k_new)
    check_shapes(a)
    if k.numel() == 0:
        return
    slot, written = slots(a)
    first = cache_seqlens if rotary_seqlens is None else rotary_seqlens
    captured = capturing(k_cache.device)
    if not captured:
        counts = check_values(a, slot, written)
        if rotary_cos is not None:
            (positions,) = read(first)
            check(positions or [], counts, rotary_cos)
    if rotary_cos is not None and rotary_sin is not None:
        a.k = rotate(k, rotary_cos, rotary_sin, first, cu_seqlens_k_new, rotary_interleaved)
    tokens = k.shape[:-2].numel()
    if captured or sum(counts) < tokens:
        slot, k, v = only_written(a, slot, written)
    else:
        k, v = a.k.flatten(0, -3), a.v.flatten(0, -3)
    mark_written(k_cache, v_cache)
    scatter(a, slot, k, v)
