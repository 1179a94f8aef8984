"""kvcache_append_ and kvcache_scatter_ by Triton: one kernel. Nothing waits for the device to look
at lengths, page ids or slots: what the caches have no place for is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Append, Scatter
from fa3_ops.backends.triton.device import missing, programs
from fa3_ops.backends.triton.launch import Launch, unit_last_stride
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
from fa3_ops.backends.written import apart, mark_written, storages
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

    def settle(self, request: Append | Scatter) -> Callable[[Append | Scatter], None]:
        return Write(request)


class Write:
    """Writes of calls that differ from one in nothing but where their tensors lie."""

    def __init__(self, a: Append | Scatter) -> None:
        if isinstance(a, Scatter):
            tokens, batch_size = a.slot_mapping.shape[0], 1
        else:
            tokens, batch_size = a.k.shape[:-2].numel(), a.batch_size
        something = tokens > 0 and batch_size > 0 and a.k_cache.numel() > 0
        tensors = _for_the_kernel(a)
        self.kernel = _kernel(a, tensors, tokens, batch_size) if something else None
        self.as_given = all(x is y for x, y in zip(tensors, _given(a), strict=True))

    def __call__(self, a: Append | Scatter) -> None:
        copied = _apart(a)
        if copied is not a:  # it may have other strides
            return Write(copied)(copied)
        mark_written(a.k_cache, a.v_cache)
        if self.kernel is not None:
            self.kernel(*(_given(a) if self.as_given else _for_the_kernel(a)))


def _kernel(a: Append | Scatter, tensors: tuple[Any, ...], tokens: int, batch_size: int) -> Launch:
    from fa3_ops.backends.triton.kernels.cache_writes import cache_writes

    k, v, k_cache, v_cache, *_, page_table, cos, sin, _, k_descale, v_descale = tensors
    pages, page_size, nheads_k, width = k_cache.shape
    width_v = v_cache.shape[-1]
    heads = heads_at_once(nheads_k, max(width, width_v))
    head_blocks = -(-nheads_k // heads)
    items = tokens * head_blocks
    return Launch(
        cache_writes,
        programs(items, k.device),
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
        K_FORMAT=_format(a.k, a.k_cache),
        V_FORMAT=_format(a.v, a.v_cache),
        **rotation(
            a.k.dtype,
            0 if cos is None else cos.shape[1],
            isinstance(a, Append) and a.rotary_interleaved,
        ),
    )


def _given(a: Append | Scatter) -> tuple[Tensor | None, ...]:
    """The kernel's tensors, as the call has them."""
    rows = a.k, a.v, a.k_cache, a.v_cache
    if isinstance(a, Scatter):
        return (*rows, a.slot_mapping, *[None] * 7, a.k_descale, a.v_descale)
    first = a.cache_seqlens if a.rotary_seqlens is None else a.rotary_seqlens
    return (
        *(*rows, None, a.cache_seqlens, a.cu_seqlens_k_new, a.cache_batch_idx, a.page_table),
        *(a.rotary_cos, a.rotary_sin, None if a.rotary_cos is None else first),
        *(a.k_descale, a.v_descale),
    )


def _for_the_kernel(a: Append | Scatter) -> tuple[Tensor | None, ...]:
    """The same as it takes them."""
    *places, page_table, cos, sin, first, k_descale, v_descale = _given(a)[4:]
    by_head = 1 if isinstance(a, Scatter) else a.batch_size, a.k_cache.shape[2]
    if page_table is not None:
        page_table = unit_last_stride(page_table)
    return (
        *(unit_last_stride(elements(x)) for x in (a.k, a.v)),
        *(elements(x) for x in (a.k_cache, a.v_cache)),
        *(*(ints(x) for x in places), page_table),
        *(*(None if x is None else table(x) for x in (cos, sin)), ints(first)),
        None if _format(a.k, a.k_cache) == PLAIN else _expanded(k_descale, by_head),
        None if _format(a.v, a.v_cache) == PLAIN else _expanded(v_descale, by_head),
    )


def _apart(a: Append | Scatter) -> Append | Scatter:
    """a, or with copies of what may share memory with the caches."""
    names = ("k", "v") if isinstance(a, Scatter) else ("k", "v", "rotary_cos", "rotary_sin")
    caches, read = (a.k_cache, a.v_cache), [getattr(a, name) for name in names]
    if storages(*read).isdisjoint(storages(*caches)):
        return a
    given = {name: x for name, x in zip(names, read, strict=True) if x is not None}
    copies: dict[str, Any] = {name: apart(x, *caches) for name, x in given.items()}
    return replace(a, **copies)


def _format(x: Tensor, cache: Tensor) -> int:
    """How a cache narrows x; PLAIN where it has x's own dtype."""
    return PLAIN if x.dtype == cache.dtype else FORMATS[cache.dtype]


def _expanded(descale: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    return None if descale is None else descale.expand(shape)


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
