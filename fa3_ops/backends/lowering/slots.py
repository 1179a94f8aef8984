"""Writes to a cache as writes to slots: which of its rows each new key and value goes to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Append, Scatter
from fa3_ops.backends.lowering.lengths import read, require, row_counts
from fa3_ops.backends.lowering.quantise import quantised
from fa3_ops.backends.lowering.rotary import check_positions, rotate
from fa3_ops.backends.lowering.rows import sequence_of_row
from fa3_ops.backends.written import apart
from fa3_ops.ops.checks import DTYPES, narrows, writable


@dataclass(frozen=True)
class SlotWrites:
    """Row i of k and v, (tokens, nheads_k, ...) of the caches' dtype, goes to slot[i] of the
    caches, taken as (entries * rows, nheads_k, ...); to none where slot[i] is negative."""

    k: Tensor
    v: Tensor
    slot: Tensor  # int32 or int64
    every_row: bool  # known to be written: no slot is negative


class WritesSlots(Backend[Append | Scatter]):
    """A backend of appends and scatters that takes them so."""

    def is_bitwise(self, request: Append | Scatter, run: Run) -> bool:
        return isinstance(request, Scatter) or request.rotary_cos is None  # it copies and divides

    def lower(self, request: Append | Scatter, run: Run) -> SlotWrites:
        writable(request.k_cache, "k_cache")
        writable(request.v_cache, "v_cache")
        k, v = (apart(x, request.k_cache, request.v_cache) for x in (request.k, request.v))
        request = replace(request, k=k, v=v)
        _check_shapes(request)
        return _scatter(request) if isinstance(request, Scatter) else _append(request, run)


def _scatter(a: Scatter) -> SlotWrites:
    """Nothing waits for a device to look at slots: there, one behind the end is skipped too."""
    slot = a.slot_mapping
    capacity = a.k_cache.shape[:2].numel()
    if slot.device.type == "cpu":
        for i in (slot >= capacity).nonzero().flatten()[:1].tolist():
            require(
                False,
                f"slot_mapping[{i}] must be less than the {capacity} slots of the cache, "
                f"got {slot[i]}",
            )
    return SlotWrites(
        quantised(a.k[: len(slot)], a.k_cache.dtype, a.k_descale, None),
        quantised(a.v[: len(slot)], a.v_cache.dtype, a.v_descale, None),
        torch.where(slot < capacity, slot, -1),
        every_row=False,
    )


def _append(a: Append, run: Run) -> SlotWrites:
    """Where the host may wait, all values are checked on it before anything is written; elsewhere,
    rows that do not fit are left out."""
    if a.k.numel() == 0:
        slot, every_row = a.cache_seqlens.new_empty((0,)), True
    else:
        slot, written = _slots(a)
        every_row = run.host_may_wait and sum(_check_values(a, slot, written)) == slot.shape[0]
        slot = slot if every_row else torch.where(written, slot, -1)
        if a.rotary_cos is not None and a.rotary_sin is not None:
            tables = (a.rotary_cos, a.rotary_sin, _first_positions(a))
            a = replace(a, k=rotate(a.k, *tables, a.cu_seqlens_k_new, a.rotary_interleaved))
    cu = a.cu_seqlens_k_new
    k = quantised(a.k, a.k_cache.dtype, a.k_descale, cu)
    v = quantised(a.v, a.v_cache.dtype, a.v_descale, cu)
    return SlotWrites(k.flatten(0, -3), v.flatten(0, -3), slot, every_row)


def _first_positions(a: Append) -> Tensor:
    """Where the rotation of each sequence begins."""
    return a.cache_seqlens if a.rotary_seqlens is None else a.rotary_seqlens


def _check_shapes(a: Append | Scatter) -> None:
    if isinstance(a, Append) and a.rotary_cos is not None:
        require(a.k.dtype in DTYPES, f"k must have a dtype with arithmetic, got {a.k.dtype}")
    for name, x, cache in (("k", a.k, a.k_cache), ("v", a.v, a.v_cache)):
        require(
            x.shape[-2:] == cache.shape[2:] and (x.dtype == cache.dtype or narrows(x, cache)),
            f"{name} must have the heads, headdim and dtype of its cache, got {tuple(x.shape)} "
            f"{x.dtype} for {tuple(cache.shape)} {cache.dtype}",
        )
    require(
        a.k.shape[:-1] == a.v.shape[:-1] and a.k_cache.shape[:-1] == a.v_cache.shape[:-1],
        "v and v_cache must have the shapes of k and k_cache up to headdim",
    )


def _slots(a: Append) -> tuple[Tensor, Tensor]:
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


def _check_values(a: Append, slot: Tensor, written: Tensor) -> list[int]:
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
        _check_pages(a, a.page_table.tolist(), entries, list(zip(seqlens, counts, strict=True)))
    if a.rotary_cos is not None:
        (positions,) = read(_first_positions(a))
        check_positions(positions or [], counts, a.rotary_cos)
    return counts


def _check_pages(
    a: Append, table: list[list[int]], entries: list[int] | None, lengths: list[tuple[int, int]]
) -> None:
    """The page ids that are written; lengths before the append and how many rows are new."""
    num_pages, rows = a.k_cache.shape[:2]
    for b, (seqlen, count) in enumerate(lengths):
        entry = b if entries is None else entries[b]
        for i in range(seqlen // rows, -(-(seqlen + count) // rows)):
            page = table[entry][i]
            require(
                0 <= page < num_pages,
                f"page_table[{entry}, {i}] must be in [0, {num_pages}), got {page}",
            )
