"""kvcache_append_ and kvcache_scatter_ by Triton: one kernel. Nothing waits for the device to look
at lengths, page ids or slots: what the caches have no place for is left out."""

from __future__ import annotations

import torch
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Append, Scatter
from fa3_ops.backends.triton.device import missing, programs
from fa3_ops.backends.triton.launch import launch, unit_last_stride
from fa3_ops.backends.triton.rows import (
    FORMATS,
    PLAIN,
    check_tables,
    elements,
    heads_at_once,
    ints,
    rotation,
    strides,
    table,
)
from fa3_ops.backends.triton.schedule import power_of_two
from fa3_ops.backends.written import apart, mark_written
from fa3_ops.ops import checks


class TritonWrites(Backend[Append | Scatter]):
    name = "triton"

    def not_supported_reasons(self, request: Append | Scatter, run: Run) -> list[str]:
        return missing()

    def is_bitwise(self, request: Append | Scatter, run: Run) -> bool:
        return True

    def lower(self, request: Append | Scatter, run: Run) -> Append | Scatter:
        if isinstance(request, Scatter):
            caches = (request.k_cache, request.v_cache)
            descales = (request.k_descale, request.v_descale)
            checks.scatter(request.k, request.v, *caches, request.slot_mapping, *descales)
        else:
            _check(request)
        return request

    def launch(self, request: Append | Scatter, lowered: Append | Scatter, run: Run) -> None:
        mark_written(request.k_cache, request.v_cache)
        if isinstance(request, Scatter):
            tokens, batch_size = request.slot_mapping.shape[0], 1
        else:
            tokens, batch_size = request.k.shape[:-2].numel(), request.batch_size
        if tokens > 0 and batch_size > 0 and request.k_cache.numel() > 0:
            _write(request, tokens, batch_size)


def _write(a: Append | Scatter, tokens: int, batch_size: int) -> None:
    from fa3_ops.backends.triton.kernels.cache_writes import cache_writes

    caches = (a.k_cache, a.v_cache)
    k, v = (unit_last_stride(elements(apart(x, *caches))) for x in (a.k, a.v))
    k_cache, v_cache = map(elements, caches)
    pages, page_size, nheads_k, width = k_cache.shape
    width_v = v_cache.shape[-1]
    places, (cos, sin, first) = _places(a), _rotary(a)
    page_table = places[-1]
    k_format, v_format = _format(a.k, a.k_cache), _format(a.v, a.v_cache)
    k_descale = None if k_format == PLAIN else _by_head(a.k_descale, batch_size, nheads_k)
    v_descale = None if v_format == PLAIN else _by_head(a.v_descale, batch_size, nheads_k)
    heads = heads_at_once(nheads_k, max(width, width_v))
    head_blocks = -(-nheads_k // heads)
    items = tokens * head_blocks
    launch(
        cache_writes,
        programs(items, k.device),
        *(k, v, k_cache, v_cache, *places, cos, sin, first, k_descale, v_descale),
        *(batch_size, k.shape[-3], pages, page_size),
        *((0, 0) if page_table is None else page_table.shape),
        *(0 if cos is None else cos.shape[0], nheads_k, head_blocks, items),
        *(*strides(k), *strides(v), *strides(k_cache), *strides(v_cache)),
        *(t.stride(0) if t is not None else 0 for t in (page_table, cos, sin)),
        *(n for t in (k_descale, v_descale) for n in ((0, 0) if t is None else t.stride())),
        WIDTH=width,
        WIDTH_V=width_v,
        DIM=power_of_two(width),
        DIM_V=power_of_two(width_v),
        HEADS=heads,
        K_FORMAT=k_format,
        V_FORMAT=v_format,
        **rotation(
            a.k.dtype,
            0 if cos is None else cos.shape[1],
            isinstance(a, Append) and a.rotary_interleaved,
        ),
    )


def _places(a: Append | Scatter) -> tuple[Tensor | None, ...]:
    """What says where rows go: slot_mapping, cache_seqlens, cu_seqlens_k_new, cache_batch_idx and
    page_table."""
    if isinstance(a, Scatter):
        return ints(a.slot_mapping), None, None, None, None
    table = a.page_table
    return (
        *(None, ints(a.cache_seqlens), ints(a.cu_seqlens_k_new), ints(a.cache_batch_idx)),
        None if table is None else unit_last_stride(table),
    )


def _rotary(a: Append | Scatter) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The tables, and the first position of every sequence."""
    if isinstance(a, Scatter) or a.rotary_cos is None or a.rotary_sin is None:
        return None, None, None
    first = a.cache_seqlens if a.rotary_seqlens is None else a.rotary_seqlens
    cos, sin = (table(apart(t, a.k_cache, a.v_cache)) for t in (a.rotary_cos, a.rotary_sin))
    return cos, sin, ints(first)


def _format(x: Tensor, cache: Tensor) -> int:
    """How a cache narrows x; PLAIN where it has x's own dtype."""
    return PLAIN if x.dtype == cache.dtype else FORMATS[cache.dtype]


def _by_head(descale: Tensor | None, batch_size: int, nheads_k: int) -> Tensor | None:
    return None if descale is None else descale.expand(batch_size, nheads_k)


def _check(a: Append) -> None:
    keys = checks.shape(a.k_cache, ("num_pages", "page_size", "nheads_k", "headdim"), "k_cache")
    checks.shape(a.v_cache, (*keys[:-1], "headdim_v"), "v_cache")
    checks.dtype(a.v_cache, a.k_cache.dtype, "v_cache", " like k_cache")
    checks.writable(a.k_cache, "k_cache")
    checks.writable(a.v_cache, "v_cache")
    checks.lengths(a.cache_seqlens, "batch_size", "cache_seqlens")
    batch_size = a.batch_size
    checks.append(
        *(a.k, a.k_cache, a.v_cache, a.k, a.v, batch_size, a.rotary_cos, a.rotary_sin),
        *(a.cache_seqlens, a.cu_seqlens_k_new, a.rotary_seqlens),
    )
    if a.rotary_cos is not None and a.rotary_sin is not None:
        check_tables(a.k, "k", a.rotary_cos, a.rotary_sin)
    checks.lengths(a.cache_batch_idx, batch_size, "cache_batch_idx")
    if a.page_table is not None:
        checks.dtype(a.page_table, torch.int32, "page_table")
        checks.shape(a.page_table, ("batch_size", "max_num_pages_per_seq"), "page_table")
    for x, cache, descale, name in (
        (a.k, a.k_cache, a.k_descale, "k_descale"),
        (a.v, a.v_cache, a.v_descale, "v_descale"),
    ):
        if checks.narrows(x, cache):
            checks.descale(descale, batch_size, keys[2], name)
