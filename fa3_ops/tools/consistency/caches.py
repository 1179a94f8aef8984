"""The same keys in another cache, and the same work in other splits and threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import fa3_ops
from fa3_ops.tools.consistency.case import NHEADS, NHEADS_K, Case, Paged, Pair


def attend(case: Case, cache: Paged, rows: int | None = None, **keywords: Any) -> Iterator[Pair]:
    """The last `rows` rows of every sequence (all, if None) over a cache that holds all keys."""
    begins = [0 if rows is None else max(n - rows, 0) for n in case.seqlens]
    lengths = [n - begin for n, begin in zip(case.seqlens, begins, strict=True)]
    out, softmax_lse = case.call(
        fa3_ops.flash_attn_with_kvcache,
        torch.cat([q[begin:] for q, begin in zip(case.q, begins, strict=True)]),
        *cache.caches,
        cache_seqlens=case.ints(case.seqlens),
        page_table=cache.page_table,
        cu_seqlens_q=case.cumulative(lengths),
        max_seqlen_q=max(lengths),
        **case.options,
        **keywords,
        return_softmax_lse=True,
    )
    yield from case.same_packed(out, softmax_lse, range(case.batch_size), begins, case.seqlens)


def page_sizes(case: Case) -> Iterator[Pair]:
    for page_size, order in ((1, "shuffled"), (16, "reversed"), (128, "shuffled"), (200, "rising")):
        yield from attend(case, case.paged(page_size, order).filled(case), rows=100)


def strided_caches(case: Case) -> Iterator[Pair]:
    """K and V as views of one tensor, (…, 2, nheads_k, headdim) and (num_pages, 2, …), dense and
    paged, as serving systems keep them."""
    dense = torch.stack([case.padded(x) for x in (case.k, case.v)], dim=2)
    q = torch.stack([q[-1:] for q in case.q])
    out, softmax_lse = case.call(
        fa3_ops.flash_attn_with_kvcache,
        *(q, dense[:, :, 0], dense[:, :, 1]),
        cache_seqlens=case.ints(case.seqlens),
        **case.options,
        return_softmax_lse=True,
    )
    for b, n in enumerate(case.seqlens):
        yield from case.same(b, out[b], softmax_lse[b], n - 1)
    cache = case.paged(128).filled(case)
    for dim in (1, 2):
        k_cache, v_cache = torch.stack(cache.caches, dim=dim).unbind(dim)
        yield from attend(case, Paged(k_cache, v_cache, cache.page_table), rows=20)


def few_splits(case: Case) -> Iterator[Pair]:
    """num_splits 1, 0 (chosen by the kernel), and 1 with scheduler_metadata."""
    cache = case.paged(128).filled(case)
    for rows in (1, 20):
        for num_splits in (1, 0):
            yield from attend(case, cache, rows, num_splits=num_splits)
        metadata = fa3_ops.get_scheduler_metadata(
            case.batch_size,
            min(rows, max(case.seqlens)),
            cache.page_table.shape[1] * 128,
            NHEADS,
            NHEADS_K,
            case.setting.headdim,
            case.ints(case.seqlens),
            case.setting.dtype,
            cu_seqlens_q=case.cumulative([min(rows, n) for n in case.seqlens]),
            page_size=128,
            causal=True,
            window_size=case.setting.window_size,
            has_softcap=case.setting.softcap > 0,
            num_splits=1,
            softcap=case.setting.softcap,
        )
        yield from attend(case, cache, rows, num_splits=1, scheduler_metadata=metadata)


def many_splits(case: Case) -> Iterator[Pair]:
    cache = case.paged(128).filled(case)
    for rows in (1, 4):
        for num_splits in (2, 3, 8):
            yield from attend(case, cache, rows, num_splits=num_splits)


def threads(case: Case) -> Iterator[Pair]:
    before = torch.get_num_threads()
    cache = case.paged(128).filled(case)
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            yield from case.varlen(range(case.batch_size))
            yield from attend(case, cache, rows=1)
    finally:
        torch.set_num_threads(before)
