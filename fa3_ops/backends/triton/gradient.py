"""The gradient of attention by Triton: everything that the training operators have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Attention, Gradient
from fa3_ops.backends.lowering.alignment import is_aligned
from fa3_ops.backends.triton.attention import capacity_of, described
from fa3_ops.backends.triton.device import has_descriptors, missing, programs, reasons_against
from fa3_ops.backends.triton.launch import launch, unit_last_stride
from fa3_ops.backends.triton.rows import strides
from fa3_ops.backends.triton.schedule import parts_of, power_of_two

NEIGHBOURS = 8  # pairs of sequence and KV head that are at work together
FARTHEST = 2**30  # of what a window or chunk reaches: positions beside it still fit into 32 bits
ROWS_OF_TERMS = 32  # that one program of `row_terms` takes


@dataclass(frozen=True)
class Blocks:
    """How a kernel cuts rows and keys, which decides the bits of a gradient, and its schedule."""

    block_m: int  # rows
    block_n: int  # keys
    num_warps: int
    num_stages: int


def width_of(call: Attention) -> int:
    """Columns of the widest tile."""
    return max(sum(parts_of(call.headdim)), power_of_two(call.headdim_v))


def blocks_of(call: Attention) -> tuple[Blocks, Blocks]:
    """Of the kernels of keys and of rows: the same for all calls of a dtype and head dimensions."""
    width = width_of(call)
    if call.q.dtype == torch.float32:
        blocks = Blocks(32, 32, 4, 1) if width <= 128 else Blocks(16, 16, 8, 1)
        return blocks, blocks
    if width <= 128:
        return Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)
    if width <= 192:
        return Blocks(64, 128, 8, 2), Blocks(128, 64, 8, 2)
    if width <= 256:
        return Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 2)
    return Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1)


class TritonGradient(Backend[Gradient]):
    name = "triton"

    def __init__(self, blocks_of: Callable[[Attention], tuple[Blocks, Blocks]] = blocks_of) -> None:
        self.blocks_of = blocks_of  # as the device has room

    def not_supported_reasons(self, request: Gradient, run: Run) -> list[str]:
        dtype = request.call.k.dtype
        return reasons_against(dtype) if dtype.itemsize > 1 else [*missing(), f"dtype {dtype}"]

    def is_bitwise(self, request: Gradient, run: Run) -> bool:
        return True

    def lower(self, request: Gradient, run: Run) -> Gradient:
        """The kernels read q, k, v, out and dout with any strides but the last dimension's."""
        call = request.call
        lengths = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "alibi_slopes")
        names = ("q", "k", "v", *lengths)
        call = replace(call, **{name: _unit(getattr(call, name)) for name in names})
        return replace(
            request,
            call=call,
            dout=_unit(request.dout),
            out=_unit(request.out),
            softmax_lse=request.softmax_lse.contiguous(),
            dsoftmax_lse=None
            if request.dsoftmax_lse is None
            else request.dsoftmax_lse.contiguous(),
        )

    def launch(
        self, request: Gradient, lowered: Gradient, run: Run
    ) -> tuple[Tensor, Tensor, Tensor]:
        return differentiate(lowered, *self.blocks_of(lowered.call))


def _unit(x: Tensor | None) -> Any:
    return None if x is None else unit_last_stride(x)


def differentiate(request: Gradient, keys: Blocks, rows: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    from fa3_ops.backends.triton.kernels.backward import gradients_of_keys, gradients_of_rows

    call, dout = request.call, request.dout
    dq, dk, dv = results(call)
    shift, delta = terms_of_rows(request)
    tiles = -(-longest_keys(call) // keys.block_n)
    described = descriptors(call, call.q, dout, keys.block_m)
    sum_over(gradients_of_keys, keys, tiles, request, *described, shift, delta, dk, dv)
    tiles = -(-call.seqlen_q // rows.block_m) * (call.nheads // call.nheads_k)
    described = descriptors(call, call.k, call.v, rows.block_n)
    sum_over(gradients_of_rows, rows, tiles, request, *described, shift, delta, dq)
    return dq, dk, dv


def descriptors(call: Attention, x: Tensor, x_v: Tensor, rows: int) -> tuple[Any, Any, Any]:
    """Of x with headdim columns, of the rest of its columns, of x_v with headdim_v; or none."""
    if not (sees_everything(call) and all(is_describable(t) for t in (x, x_v))):
        return None, None, None
    dim, dim_rest = parts_of(call.headdim)
    rest = described(x, rows, dim_rest) if dim_rest else None
    return described(x, rows, dim), rest, described(x_v, rows, power_of_two(call.headdim_v))


def sees_everything(call: Attention) -> bool:
    """Whether every row sees a key, and every key is seen: a descriptor copies all of them."""
    some = (call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q, call.seqused_k)
    if any(lengths is not None for lengths in some):
        return False
    seqlen_q, seqlen_k = call.q.shape[1], call.k.shape[1]
    left, right = call.window_size
    limited = left >= 0 or call.attention_chunk > 0
    return seqlen_q == seqlen_k or not (limited or (right >= 0 and seqlen_q > seqlen_k))


def is_describable(x: Tensor) -> bool:
    return has_descriptors(x.device) and x.element_size() == 2 and is_aligned(x)


def results(call: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten dq, dk and dv, but for the rows that no sequence has."""
    some_rows = call.cu_seqlens_q is not None or call.seqused_q is not None
    some_keys = call.cu_seqlens_k is not None or call.seqused_k is not None
    pairs = ((call.q, some_rows), (call.k, some_keys), (call.v, some_keys))
    dq, dk, dv = (x.new_zeros(x.shape) if some else x.new_empty(x.shape) for x, some in pairs)
    return dq, dk, dv


def longest_keys(call: Attention) -> int:
    """The most keys that a sequence has."""
    if call.cu_seqlens_k is None:
        return call.k.shape[1]
    return min(call.max_seqlen_k or 0, call.k.shape[0])


def terms_of_rows(request: Gradient) -> tuple[Tensor, Tensor]:
    """What row_terms says of every row, both like softmax_lse."""
    from fa3_ops.backends.triton.kernels.backward import row_terms

    call, dout, out, lse = request.call, request.dout, request.out, request.softmax_lse
    shift, delta = torch.empty_like(lse), torch.empty_like(lse)
    tiles = -(-call.seqlen_q // ROWS_OF_TERMS)
    items = tiles * call.nheads * call.batch_size
    launch(
        row_terms,
        programs(items, call.device),
        *(dout, out, lse, request.dsoftmax_lse, shift, delta, call.cu_seqlens_q, call.seqused_q),
        *(call.batch_size, call.seqlen_q, call.q.shape[0], tiles, items),
        *(*strides(dout), *strides(out), call.nheads),
        HEADDIM_V=call.headdim_v,
        DIM_V=power_of_two(call.headdim_v),
        BLOCK_M=ROWS_OF_TERMS,
    )
    return shift, delta


def sum_over(
    kernel: Any,
    blocks: Blocks,
    tiles: int,
    request: Gradient,
    *own: Any,
) -> None:
    """Starts a kernel with so many tiles for each sequence and KV head, and its own arguments."""
    call, dout, slopes = request.call, request.dout, request.call.alibi_slopes
    items = tiles * call.batch_size * call.nheads_k
    left, right = (None if n < 0 else min(n, FARTHEST) for n in call.window_size)
    dim, dim_rest = parts_of(call.headdim)
    launch(
        kernel,
        programs(items, call.device),
        *(call.q, call.k, call.v, dout, *own),
        *(call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q, call.seqused_k, slopes),
        *(call.batch_size, call.seqlen_q, call.q.shape[0]),
        *(capacity_of(call), tiles, items),
        *(call.softmax_scale, call.softcap or None, left, right),
        min(call.attention_chunk, FARTHEST) or None,
        *(*strides(call.q), *strides(call.k), *strides(call.v), *strides(dout)),
        slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        call.nheads_k,
        GROUP=call.nheads // call.nheads_k,
        HEADDIM=call.headdim,
        HEADDIM_V=call.headdim_v,
        DIM=dim,
        DIM_REST=dim_rest,
        DIM_V=power_of_two(call.headdim_v),
        BLOCK_M=blocks.block_m,
        BLOCK_N=blocks.block_n,
        TRANSFORMED=call.softcap > 0 or slopes is not None,
        NEIGHBOURS=NEIGHBOURS,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
