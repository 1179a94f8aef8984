"""apply_rotary by Triton."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Rotation
from fa3_ops.backends.triton.device import missing, programs
from fa3_ops.backends.triton.launch import Launch, empty, unit_last_stride
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

    def settle(self, request: Rotation) -> Callable[[Rotation], Tensor]:
        return Rotate(request)


class Rotate:
    """Rotations of calls that differ from one in nothing but where their tensors lie."""

    def __init__(self, a: Rotation) -> None:
        something = a.rotary_seqlens.shape[0] > 0 and a.x.numel() > 0
        self.kernel = _kernel(a) if something else None
        self.out = empty(tuple(a.x.shape), a.x.dtype, a.device)

    def __call__(self, a: Rotation) -> Tensor:
        if self.kernel is None:
            return a.x.clone(memory_format=torch.contiguous_format)
        out = self.out()
        x, cos, sin = _for_the_kernel(a)
        self.kernel(x, elements(out), cos, sin, ints(a.rotary_seqlens), ints(a.cu_seqlens))
        return out


def _kernel(a: Rotation) -> Launch:
    from fa3_ops.backends.triton.kernels.rotary import apply_rotary

    x, cos, sin = _for_the_kernel(a)
    *_, rows, nheads, width = x.shape  # of a sequence, or of all
    heads = heads_at_once(nheads, width)
    head_blocks = -(-nheads // heads)
    items = x.shape[:-2].numel() * head_blocks
    return Launch(
        apply_rotary,
        programs(items, x.device),
        *(a.rotary_seqlens.shape[0], rows, cos.shape[0], nheads, head_blocks, items),
        *(*strides(x), cos.stride(0), sin.stride(0)),
        WIDTH=width,
        DIM=power_of_two(width),
        HEADS=heads,
        ADVANCE=a.advance,
        **rotation(a.x.dtype, cos.shape[1], a.rotary_interleaved),
    )


def _for_the_kernel(a: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """x and the tables."""
    return unit_last_stride(elements(a.x)), table(a.rotary_cos), table(a.rotary_sin)


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
