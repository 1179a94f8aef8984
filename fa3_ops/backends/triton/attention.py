"""Attention by Triton: every feature of the CPU kernel, from lengths that stay on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Attention
from fa3_ops.backends.lowering.alignment import is_aligned
from fa3_ops.backends.triton.device import has_descriptors, processors, programs, reasons_against
from fa3_ops.backends.triton.launch import launch
from fa3_ops.backends.triton.narrow import format_of_pairs, in_pairs, is_bitwise, widths
from fa3_ops.backends.triton.rows import strides
from fa3_ops.backends.triton.schedule import (
    CHUNK,
    Schedule,
    block_n,
    schedule,
)

TENSORS = (
    *("q", "k", "v", "qv"),
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "cache_batch_idx"),
    *("cache_leftpad", "cache_start", "page_table", "alibi_slopes", "sinks"),
)
ROWS, BLOCKS, PAGES, PARTS = range(4)  # how k and v lie, as kernels/keys.py has it
NEIGHBOURS = 8  # pairs of sequence and KV head that are at work together
MOST_ROWS = 64  # of a tile
MERGED_HEADS = 1  # heads of a group that one program of `combine` merges
UNROLL = 16  # chunks that `combine` loads at once
REGISTERS = 128  # of a thread of `combine`: enough for so many chunks


class TritonAttention(Backend[Attention]):
    name = "triton"

    def __init__(self, most_rows: Callable[[int], int] = lambda headdim_v: MOST_ROWS) -> None:
        self.most_rows = most_rows  # of a tile, as the device has room for headdim_v

    def not_supported_reasons(self, request: Attention, run: Run) -> list[str]:
        return reasons_against(request.q.dtype)

    def is_bitwise(self, request: Attention, run: Run) -> bool:
        return is_bitwise(request)

    def lower(self, request: Attention, run: Run) -> Attention:
        """The kernel reads any strides but the last dimension's."""
        given = ((name, getattr(request, name)) for name in TENSORS)
        strided = {name: t.contiguous() for name, t in given if t is not None and t.stride(-1) != 1}
        return replace(request, **strided) if strided else request

    def launch(self, request: Attention, lowered: Attention, run: Run) -> tuple[Tensor, Tensor]:
        return attend(lowered, self.most_rows(lowered.headdim_v))


@dataclass(frozen=True)
class Work:
    """What the shapes of a call decide."""

    block_n: int
    schedule: Schedule
    capacity: int
    num_chunks: int  # that a tile of rows touches at most, where they are work items

    @staticmethod
    def of(call: Attention, most_rows: int) -> Work:
        dtype, dims = call.q.dtype, (call.headdim, call.headdim_v)
        capacity = longest = capacity_of(call)
        if call.cu_seqlens_k is not None:
            longest = min(call.max_seqlen_k or 0, capacity)
        num_chunks = chunks_of_a_tile(call, longest, most_rows)
        plan = schedule(
            dtype,
            dims,
            call.seqlen_q,
            call.nheads // call.nheads_k,
            call.batch_size * call.nheads_k,
            num_chunks,
            call.q.shape[:-1].numel() * call.headdim_v,
            processors(call.q.device),
            most_rows,
        )
        return Work(block_n(dtype, *dims), plan, capacity, num_chunks if plan.split else 1)


def capacity_of(call: Attention) -> int:
    """Keys that a sequence has room for, or rows of packed k."""
    if call.cu_seqlens_k is not None:
        return call.k.shape[0]
    return call.k.shape[1] * (1 if call.page_table is None else call.page_table.shape[1])


def chunks_of_a_tile(call: Attention, capacity: int, tokens: int) -> int:
    """How many chunks the keys can touch that `tokens` neighbouring rows see."""
    left, right = call.window_size
    chunks = -(-capacity // CHUNK) + (call.cache_start is not None)
    for span in (
        left + right + 1 if min(left, right) >= 0 else None,
        call.attention_chunk or None,
    ):
        if span is not None:
            chunks = min(chunks, -(-(span + tokens) // CHUNK) + 1)
    return max(chunks, 1)


def layout_of(call: Attention, keys: int) -> int:
    if call.page_table is None:
        return ROWS
    moved = call.cache_leftpad is not None or call.cache_start is not None
    if moved:
        return PAGES
    if call.k.shape[1] % keys == 0:
        return BLOCKS
    return PARTS if keys % call.k.shape[1] == 0 else PAGES


def results(call: Attention) -> tuple[Tensor, Tensor]:
    """out and softmax_lse. Packed rows that belong to no sequence are in no tile."""
    *batch, rows, nheads, _ = call.q.shape
    out_shape, lse_shape = (*batch, rows, nheads, call.headdim_v), (*batch, nheads, rows)
    if call.cu_seqlens_q is None:
        out = call.q.new_empty(out_shape, dtype=call.out_dtype)
        return out, call.q.new_empty(lse_shape, dtype=torch.float32)
    out = call.q.new_zeros(out_shape, dtype=call.out_dtype)
    return out, call.q.new_full(lse_shape, float("-inf"), dtype=torch.float32)


@dataclass(frozen=True)
class Shared:
    """Arguments of both kernels."""

    lengths: tuple[Tensor | None, ...]
    descales: tuple[Tensor | None, ...]
    limits: tuple[int | None, ...]  # of what a row sees: left, right, attention_chunk
    format: int | None  # of pairs that k and v are loaded in
    dim: int
    dim_rest: int
    overlapped: bool  # what waits for memory, with other work: on Hopper
    constexprs: dict[str, Any]

    @staticmethod
    def of(call: Attention) -> Shared:
        left, right = (None if n < 0 else n for n in call.window_size)
        q_descale = call.q_descale if call.is_fp8 else None
        descales = tuple(_by_head(call, x) for x in (q_descale, call.k_descale, call.v_descale))
        assert call.softmax_scale is not None
        of_scores = descales[: 2 if call.qv is None else 3]
        transformed = (
            call.softcap > 0
            or call.alibi_slopes is not None
            or any(x is not None for x in of_scores)
            or call.softmax_scale <= 0
        )
        format = format_of_pairs(call)
        dim, dim_rest, dim_v = widths(call, format is not None)
        overlapped = has_descriptors(call.q.device)
        return Shared(
            (call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q, call.seqused_k),
            descales,
            (left, right, call.attention_chunk or None),
            format,
            dim,
            dim_rest,
            overlapped,
            {
                "GROUP": call.nheads // call.nheads_k,
                "HEADDIM_V": call.headdim_v,
                "DIM_V": dim_v,
                "CHUNK": CHUNK,
                "TRANSFORMED": transformed,
                "OVERLAPPED": overlapped,
            },
        )

    @property
    def descale_strides(self) -> tuple[int, ...]:
        return tuple(n for x in self.descales for n in ((0, 0) if x is None else x.stride()))


def attend(call: Attention, most_rows: int) -> tuple[Tensor, Tensor]:
    from fa3_ops.backends.triton.kernels.attention import attention

    work, shared = Work.of(call, most_rows), Shared.of(call)
    plan, slopes = work.schedule, call.alibi_slopes
    out, lse = results(call)
    rows = call.q.shape[:-1].numel()
    parts: tuple[Tensor, ...] | tuple[None, None] = (None, None)
    if plan.split:
        shapes = (work.num_chunks, rows, call.headdim_v), (2, work.num_chunks, rows)
        parts = tuple(call.q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    items = plan.tiles * call.batch_size * call.nheads_k * work.num_chunks
    k, v = (x if shared.format is None else in_pairs(x) for x in (call.k, call.v))
    launch(
        attention,
        programs(items, call.q.device),
        *(call.q, k, v, call.qv, *described_keys(call, work, shared, k, v), out, lse, *parts),
        *(*shared.lengths, call.cache_batch_idx, call.cache_leftpad, call.cache_start),
        *(call.page_table, *shared.descales, slopes, call.sinks),
        *(call.batch_size, call.seqlen_q, call.q.shape[0], work.capacity),
        *(_entries(call), call.k.shape[0], plan.tiles, work.num_chunks, items),
        *(call.softmax_scale, call.softcap or None, *shared.limits),
        *(*strides(call.q), *strides(call.qv), *strides(k), *strides(v)),
        *(0 if call.page_table is None else call.page_table.stride(0), *shared.descale_strides),
        *(0 if slopes is None or slopes.dim() == 1 else slopes.stride(0), rows, call.nheads_k),
        HEADDIM=call.headdim,
        DIM=shared.dim,
        DIM_REST=shared.dim_rest,
        TOKENS=plan.block_m // plan.heads,
        HEADS=plan.heads,
        BLOCK_N=work.block_n,
        COMPUTE=_compute_type(call),
        FORMAT=shared.format,
        AHEAD=shared.overlapped,
        LAYOUT=layout_of(call, work.block_n),
        PAGE_SIZE=1 if call.page_table is None else call.k.shape[1],
        SPLIT=plan.split,
        FOLD=not plan.split and work.capacity > CHUNK,
        NEIGHBOURS=NEIGHBOURS,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        **shared.constexprs,
    )
    if plan.split:
        merge_chunks(call, work, shared, *parts, out, lse)
    return out, lse


def merge_chunks(call: Attention, work: Work, shared: Shared, *tensors: Tensor | None) -> None:
    """Of partial results into out and lse: tensors are all four."""
    from fa3_ops.backends.triton.kernels.attention import combine

    rows = call.q.shape[:-1].numel()
    group = call.nheads // call.nheads_k
    items = call.batch_size * call.seqlen_q * call.nheads_k * -(-group // MERGED_HEADS)
    launch(
        combine,
        programs(items, call.q.device),
        *(*tensors, *shared.lengths, call.cache_leftpad, call.cache_start),
        *(*shared.descales, call.sinks),
        *(call.seqlen_q, call.q.shape[0], work.capacity, work.num_chunks, items),
        *(call.softmax_scale, *shared.limits, *shared.descale_strides, rows, call.nheads_k),
        HEADS=MERGED_HEADS,
        UNROLL=UNROLL,
        num_warps=1,
        **({"launch_pdl": True, "maxnreg": REGISTERS} if shared.overlapped else {}),
        **shared.constexprs,
    )


def described_keys(
    call: Attention, work: Work, shared: Shared, k: Tensor, v: Tensor
) -> tuple[Any, Any, Any]:
    """Tensor descriptors of k, of the rest of its columns and of v, which may be in pairs: by them
    a device copies whole blocks. None where it has no such thing or they do not fit."""
    if not describes(call, work, shared):
        return None, None, None
    k, v = (x[None] if call.cu_seqlens_k is not None else x for x in (k, v))
    per = call.headdim // k.shape[-1]
    rest = described(k, work.block_n, shared.dim_rest // per) if shared.dim_rest else None
    return (
        described(k, work.block_n, shared.dim // per),
        rest,
        described(v, work.block_n, v.shape[-1]),
    )


def describes(call: Attention, work: Work, shared: Shared) -> bool:
    return (
        work.schedule.block_m == MOST_ROWS
        and has_descriptors(call.q.device)
        and call.k.dtype == call.q.dtype != torch.float32
        and shared.dim + shared.dim_rest == call.headdim
        and shared.constexprs["DIM_V"] == call.headdim_v
        and layout_of(call, work.block_n) in (ROWS, BLOCKS)
        and is_aligned(call.k)
        and is_aligned(call.v)
    )


def described(x: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, columns])


def _entries(call: Attention) -> int:
    return (call.k if call.page_table is None else call.page_table).shape[0]


def _by_head(call: Attention, descale: Tensor | None) -> Tensor | None:
    """A descale as (batch_size, nheads_k); only what has 8 bits has one."""
    if descale is None or not call.is_narrow:
        return None
    return descale.expand(call.batch_size, call.nheads_k)


def _compute_type(call: Attention) -> Any:
    """What products are made of. float16 holds every number of 8 bits, and weights more exactly."""
    import triton.language as tl

    if call.q.dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if call.q.dtype == torch.bfloat16 and not call.is_narrow else tl.float16
