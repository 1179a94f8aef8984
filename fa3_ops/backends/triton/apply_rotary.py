"""apply_rotary by Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Rotation
from fa3_ops.backends.triton.device import missing, programs
from fa3_ops.backends.triton.launch import launch, unit_last_stride
from fa3_ops.backends.triton.rows import (
    check_tables,
    elements,
    heads_at_once,
    ints,
    rotation,
    strides,
    table,
)
from fa3_ops.backends.triton.schedule import power_of_two
from fa3_ops.ops import checks


class TritonRotation(Backend[Rotation]):
    name = "triton"

    def not_supported_reasons(self, request: Rotation, run: Run) -> list[str]:
        return missing()

    def is_bitwise(self, request: Rotation, run: Run) -> bool:
        return True

    def lower(self, request: Rotation, run: Run) -> Rotation:
        _check(request)
        return request

    def launch(self, request: Rotation, lowered: Rotation, run: Run) -> Tensor:
        from fa3_ops.backends.triton.kernels.rotary import apply_rotary

        batch_size = request.rotary_seqlens.shape[0]
        if batch_size == 0 or request.x.numel() == 0:
            return request.x.clone(memory_format=torch.contiguous_format)
        out = request.x.new_empty(request.x.shape)
        x = unit_last_stride(elements(request.x))
        cos, sin = table(request.rotary_cos), table(request.rotary_sin)
        *_, rows, nheads, width = x.shape  # of a sequence, or of all
        heads = heads_at_once(nheads, width)
        head_blocks = -(-nheads // heads)
        items = x.shape[:-2].numel() * head_blocks
        launch(
            apply_rotary,
            programs(items, x.device),
            *(x, elements(out), cos, sin, ints(request.rotary_seqlens), ints(request.cu_seqlens)),
            *(batch_size, rows, cos.shape[0], nheads, head_blocks, items),
            *(*strides(x), cos.stride(0), sin.stride(0)),
            WIDTH=width,
            DIM=power_of_two(width),
            HEADS=heads,
            ADVANCE=request.advance,
            **rotation(request.x.dtype, cos.shape[1], request.rotary_interleaved),
        )
        return out


def _check(a: Rotation) -> None:
    if a.cu_seqlens is None:
        batch_size: object = a.x.shape[0]
        checks.shape(a.x, ("batch_size", "seqlen", "nheads", "headdim"), "x")
    else:
        batch_size = a.cu_seqlens.shape[0] - 1
        checks.shape(a.x, ("total", "nheads", "headdim"), "x", " with cu_seqlens")
        checks.lengths(a.cu_seqlens, "batch_size + 1", "cu_seqlens")
    checks.lengths(a.rotary_seqlens, batch_size, "rotary_seqlens")
    check_tables(a.x, "x", a.rotary_cos, a.rotary_sin)
