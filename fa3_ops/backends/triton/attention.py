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
from fa3_ops.backends.triton.launch import Launch, empty
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

    def settle(self, request: Attention) -> Callable[[Attention], tuple[Tensor, Tensor]]:
        return Attend(request, self.most_rows(request.headdim_v))


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


class Results:
    """out and softmax_lse of calls like one. Packed rows that belong to no sequence are in no
    tile."""

    def __init__(self, call: Attention) -> None:
        *batch, rows, nheads, _ = call.q.shape
        out, lse = (*batch, rows, nheads, call.headdim_v), (*batch, nheads, rows)
        self.out = empty(out, call.out_dtype, call.device)
        self.lse = empty(lse, torch.float32, call.device)
        self.packed = call.cu_seqlens_q is not None

    def __call__(self) -> tuple[Tensor, Tensor]:
        out, lse = self.out(), self.lse()
        if self.packed:
            out.zero_()
            lse.fill_(float("-inf"))
        return out, lse


@dataclass(frozen=True)
class Shared:
    """Arguments of both kernels that are no tensors."""

    limits: tuple[int | None, ...]  # of what a row sees: left, right, attention_chunk
    descale_strides: tuple[int, ...]
    format: int | None  # of pairs that k and v are loaded in
    dim: int
    dim_rest: int
    overlapped: bool  # what waits for memory, with other work: on Hopper
    constexprs: dict[str, Any]

    @staticmethod
    def of(call: Attention) -> Shared:
        left, right = (None if n < 0 else n for n in call.window_size)
        descales = descales_of(call)
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
            (left, right, call.attention_chunk or None),
            tuple(n for x in descales for n in ((0, 0) if x is None else x.stride())),
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


def lengths_of(call: Attention) -> tuple[Tensor | None, ...]:
    return call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q, call.seqused_k


class Attend:
    """Attention of calls that differ from one in nothing but where their tensors lie. Of that call
    everything is decided here but its tensors; none is kept."""

    def __init__(self, call: Attention, most_rows: int) -> None:
        self.work, self.shared = Work.of(call, most_rows), Shared.of(call)
        self.attention = attention_of(call, self.work, self.shared)
        self.results = Results(call)
        rows = call.q.shape[:-1].numel()
        shapes = (self.work.num_chunks, rows, call.headdim_v), (2, self.work.num_chunks, rows)
        self.parts = [empty(shape, torch.float32, call.device) for shape in shapes]
        split = self.work.schedule.split
        self.combine = combine_of(call, self.work, self.shared) if split else None
        self.described = describes(call, self.work, self.shared)

    def __call__(self, call: Attention) -> tuple[Tensor, Tensor]:
        out, lse = self.results()
        parts: tuple[Tensor | None, ...] = (None, None)
        described = (None, None, None)
        k, v = keys_of(call, self.shared)
        if self.combine is not None:
            parts = tuple(make() for make in self.parts)
        if self.described:
            described = described_keys(call, self.work, self.shared, k, v)
        lengths, descales = lengths_of(call), descales_of(call)
        self.attention(
            *(call.q, k, v, call.qv, *described, out, lse, *parts),
            *(*lengths, call.cache_batch_idx, call.cache_leftpad, call.cache_start),
            *(call.page_table, *descales, call.alibi_slopes, call.sinks),
        )
        if self.combine is not None:
            moved = call.cache_leftpad, call.cache_start
            self.combine(*parts, out, lse, *lengths, *moved, *descales, call.sinks)
        return out, lse


def attention_of(call: Attention, work: Work, shared: Shared) -> Launch:
    from fa3_ops.backends.triton.kernels.attention import attention

    plan, slopes = work.schedule, call.alibi_slopes
    rows = call.q.shape[:-1].numel()
    items = plan.tiles * call.batch_size * call.nheads_k * work.num_chunks
    k, v = keys_of(call, shared)
    return Launch(
        attention,
        programs(items, call.q.device),
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


def combine_of(call: Attention, work: Work, shared: Shared) -> Launch:
    """Of partial results into out and lse."""
    from fa3_ops.backends.triton.kernels.attention import combine

    rows = call.q.shape[:-1].numel()
    items = call.batch_size * call.seqlen_q * call.nheads
    return Launch(
        combine,
        programs(items, call.q.device),
        *(call.seqlen_q, call.q.shape[0], work.capacity, work.num_chunks, items),
        *(call.softmax_scale, *shared.limits, *shared.descale_strides, rows, call.nheads_k),
        UNROLL=UNROLL,
        num_warps=1,
        **({"launch_pdl": True, "maxnreg": REGISTERS} if shared.overlapped else {}),
        **shared.constexprs,
    )


def keys_of(call: Attention, shared: Shared) -> tuple[Tensor, Tensor]:
    """k and v as the kernel loads them."""
    if shared.format is None:
        return call.k, call.v
    return in_pairs(call.k), in_pairs(call.v)


def described_keys(
    call: Attention, work: Work, shared: Shared, k: Tensor, v: Tensor
) -> tuple[Any, Any, Any]:
    """Tensor descriptors of k, of the rest of its columns and of v, which may be in pairs: by them
    a device copies whole blocks."""
    k, v = (x[None] if call.cu_seqlens_k is not None else x for x in (k, v))
    per = call.headdim // k.shape[-1]
    rest = described(k, work.block_n, shared.dim_rest // per) if shared.dim_rest else None
    return (
        described(k, work.block_n, shared.dim // per),
        rest,
        described(v, work.block_n, v.shape[-1]),
    )


def describes(call: Attention, work: Work, shared: Shared) -> bool:
    """Not where the device has no such thing or k and v do not fit."""
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


def descales_of(call: Attention) -> tuple[Tensor | None, ...]:
    """Of q, k and v, as (batch_size, nheads_k); only what has 8 bits has one."""
    if not call.is_narrow:
        return None, None, None
    q_descale = call.q_descale if call.is_fp8 else None
    shape = call.batch_size, call.nheads_k
    given = (q_descale, call.k_descale, call.v_descale)
    return tuple(None if x is None else x.expand(shape) for x in given)


def _compute_type(call: Attention) -> Any:
    """What products are made of. float16 holds every number of 8 bits, and weights more exactly."""
    import triton.language as tl

    if call.q.dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if call.q.dtype == torch.bfloat16 and not call.is_narrow else tl.float16
