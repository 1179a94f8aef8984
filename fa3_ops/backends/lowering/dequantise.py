"""Inputs of 8 bits for kernels that have none: FP8 q, k and v, and narrow k and v beside a wider
q."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fa3_ops.backends.backend import Run
from fa3_ops.backends.call import Attention
from fa3_ops.backends.lowering import float8
from fa3_ops.backends.lowering.keys import gather_keys
from fa3_ops.backends.lowering.rows import sequence_of_row

# One for each table, since a device keeps what a function made under its name.
VALUES: dict[torch.dtype, Callable[[torch.device], Tensor]] = {
    dtype: functools.partial(float8.values, dtype) for dtype in float8.FORMATS
}


def dequantise(call: Attention, run: Run, dtype: torch.dtype) -> Attention:
    """What has 8 bits times its descales, rounded to dtype: k and v, and an FP8 q. Of a cache, what
    is read is gathered first, because a page may belong to sequences of different descales."""
    if not call.is_narrow:
        return call
    format, nheads_k, qv = call.k.dtype, call.nheads_k, call.qv
    call = replace(call, k=_codes(call.k), v=_codes(call.v))
    if call.is_cache:
        name = "int8" if format == torch.int8 else "FP8"
        call = gather_keys(call, run, f"{name} is dequantised")

    def decoded(x: Tensor, descale: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        if descale is not None:
            descale = descale.expand(call.batch_size, nheads_k)
        return _scaled(_numbers(run, x, format), descale, cu_seqlens).to(dtype)

    if call.is_fp8:
        call = replace(
            call,
            q=decoded(_codes(call.q), call.q_descale, call.cu_seqlens_q),
            qv=None if qv is None else decoded(_codes(qv), call.q_descale, call.cu_seqlens_q),
        )
    return replace(
        call,
        k=decoded(call.k, call.k_descale, call.cu_seqlens_k),
        v=decoded(call.v, call.v_descale, call.cu_seqlens_k),
        is_cache=False,
    )


def _codes(x: Tensor) -> Tensor:
    """Bytes in the place of FP8, with which the 910 can do nothing."""
    return x if x.dtype == torch.int8 else x.view(torch.uint8)


def _numbers(run: Run, codes: Tensor, format: torch.dtype) -> Tensor:
    """In float32. A table stands for the conversion from FP8, which the 910 lacks."""
    if format == torch.int8:
        return codes.float()
    return run.constant(VALUES[format], codes.device)[codes.int()]


def _scaled(x: Tensor, descale: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Rows of heads times descale (batch_size, nheads_k)."""
    if descale is None:
        return x
    factor = descale.repeat_interleave(x.shape[-2] // descale.shape[1], dim=1)
    factor = factor[:, None] if cu_seqlens is None else factor[sequence_of_row(cu_seqlens, x)]
    return x * factor[..., None]
