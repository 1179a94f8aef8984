"""The same rows in several steps: appended to a cache and attended with, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fa3_ops
from fa3_ops.tools.consistency.case import Case, Paged, Pair


def advance(
    case: Case, cache: Paged, begins: Sequence[int], ends: Sequence[int], **keywords: Any
) -> Iterator[Pair]:
    """Appends rows [begins[b], ends[b]) of every sequence and attends with them."""
    steps = [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]
    q, k, v = (
        torch.cat([x[step] for x, step in zip(xs, steps, strict=True)])
        for xs in (case.q, case.k, case.v)
    )
    lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
    cu_seqlens = case.cumulative(lengths)
    out, softmax_lse = case.call(
        fa3_ops.flash_attn_with_kvcache,
        *(q, cache.k_cache, cache.v_cache, k, v),
        cache_seqlens=case.ints(begins),
        page_table=cache.page_table,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k_new=cu_seqlens,
        max_seqlen_q=max(lengths),
        **case.options,
        **keywords,
        return_softmax_lse=True,
    )
    yield from case.same_packed(out, softmax_lse, range(case.batch_size), begins, ends)


def whole_prefill(case: Case) -> Iterator[Pair]:
    yield from advance(case, case.paged(128), [0] * case.batch_size, case.seqlens)


def chunked_prefill(case: Case) -> Iterator[Pair]:
    cache = case.paged(16)
    begins = [0] * case.batch_size
    for cut in (7, 505, 519, 1023, 1031, max(case.seqlens)):
        ends = [min(max(cut, begin), n) for begin, n in zip(begins, case.seqlens, strict=True)]
        yield from advance(case, cache, begins, ends)
        begins = ends


def cached_prefix(case: Case) -> Iterator[Pair]:
    """A second request for the longest sequence shares the pages of its first tokens with the first
    request, and appends and attends with the rest alone."""
    longest = max(range(case.batch_size), key=lambda b: case.seqlens[b])
    page_size = 128
    cache = case.paged(page_size).filled(case)
    extra = case.paged(page_size)
    pool = [torch.cat((a, b)) for a, b in zip(cache.caches, extra.caches, strict=True)]
    for shared in (512, 1024, 1152):
        shared = min(shared, case.seqlens[longest] // page_size * page_size)
        first = shared // page_size
        table = cache.page_table[longest].clone()
        table[first:] = extra.page_table[longest, first:] + cache.k_cache.shape[0]
        q, k, v = (x[longest][None, shared:] for x in (case.q, case.k, case.v))
        if q.shape[1] == 0:
            continue
        out, softmax_lse = case.call(
            fa3_ops.flash_attn_with_kvcache,
            *(q, *pool, k, v),
            cache_seqlens=case.ints([shared]),
            page_table=table[None],
            **case.options,
            return_softmax_lse=True,
        )
        yield from case.same(longest, out[0], softmax_lse[0], shared)


def decode_starts(case: Case, steps: int) -> dict[int, int]:
    """Where to decode each sequence that is long enough: across 512 or 1024, or at its end."""
    starts = {}
    for b, n in enumerate(case.seqlens):
        if n >= steps:
            crossed = max((edge for edge in (512, 1024) if edge < n), default=n)
            starts[b] = max(min(crossed - 2, n - steps), 0)
    return starts


def decode(case: Case) -> Iterator[Pair]:
    """One token at a time, appended: in a paged cache, in a dense one, and alone."""
    steps = 4
    starts = decode_starts(case, steps)
    sequences = list(starts)
    paged = case.paged(16).filled(case)
    dense = [case.padded(x) for x in (case.k, case.v)]
    table = paged.page_table[sequences]
    for step in range(steps):
        at = [starts[b] + step for b in sequences]
        q, k, v = (
            torch.stack([x[b][i : i + 1] for b, i in zip(sequences, at, strict=True)])
            for x in (case.q, case.k, case.v)
        )
        ways: list[tuple[Sequence[Tensor], dict[str, Any], slice]] = [
            (paged.caches, {"page_table": table}, slice(None)),
            (dense, {"cache_batch_idx": case.ints(sequences)}, slice(None)),
            (paged.caches, {"page_table": table[:1]}, slice(0, 1)),
        ]
        for (k_cache, v_cache), where, some in ways:
            out, softmax_lse = case.call(
                fa3_ops.flash_attn_with_kvcache,
                *(q[some], k_cache, v_cache, k[some], v[some]),
                cache_seqlens=case.ints(at[some]),
                **where,
                **case.options,
                return_softmax_lse=True,
            )
            for row, b in enumerate(sequences[some]):
                yield from case.same(b, out[row], softmax_lse[row], at[row])
