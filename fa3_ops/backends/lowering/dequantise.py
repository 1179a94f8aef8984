"""Inputs of 8 bits for kernels that have none: FP8 q, k and v, and narrow k and v beside a wider
q."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fa3_ops.backends.backend import Run
from fa3_ops.backends.call import Attention
from fa3_ops.backends.lowering.keys import gather_keys
from fa3_ops.backends.lowering.rows import sequence_of_row


def e4m3_values(at: torch.device) -> Tensor:
    """The 256 values of float8_e4m3fn, (256,) float32: from bits, since the 910 has no such dtype,
    and on the device, since a capture takes nothing from the host."""
    magnitude = torch.arange(256, dtype=torch.int32, device=at) % 128
    return _signed(_finite(magnitude, 3, 7).masked_fill(magnitude == 127, float("nan")))


def e5m2_values(at: torch.device) -> Tensor:
    """Those of float8_e5m2."""
    magnitude = torch.arange(256, dtype=torch.int32, device=at) % 128
    values = _finite(magnitude, 2, 15).masked_fill(magnitude == 124, float("inf"))
    return _signed(values.masked_fill(magnitude > 124, float("nan")))


VALUES: dict[torch.dtype, Callable[[torch.device], Tensor]] = {
    torch.float8_e4m3fn: e4m3_values,
    torch.float8_e5m2: e5m2_values,
}


def _finite(magnitude: Tensor, mantissa_bits: int, bias: int) -> Tensor:
    """Numbers by their bits without the sign; an exponent of 0 has no leading 1."""
    ones = 1 << mantissa_bits
    exponent, mantissa = magnitude // ones, magnitude % ones
    power = ((exponent.clamp(min=1) + 127 - bias) * 2**23).view(torch.float32)
    return power * torch.where(exponent > 0, mantissa + ones, mantissa) / ones


def _signed(magnitudes: Tensor) -> Tensor:
    """The upper half of the codes has the sign."""
    negative = torch.arange(256, device=magnitudes.device) >= 128
    return torch.where(negative, -magnitudes, magnitudes)


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
