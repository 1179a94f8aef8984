"""FP8 inputs for kernels that have no FP8."""

from __future__ import annotations

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
    code = torch.arange(256, dtype=torch.int32, device=at)
    exponent, mantissa = code % 128 // 8, code % 8
    power = ((exponent.clamp(min=1) + 120) * 2**23).view(torch.float32)  # 2 ** (exponent - 7)
    value = power * torch.where(exponent > 0, mantissa + 8, mantissa) / 8
    value = value.masked_fill(code % 128 == 127, float("nan"))
    return torch.where(code < 128, value, -value)


def dequantise_fp8(call: Attention, run: Run) -> Attention:
    """FP8 q, k, v times their descales in float16, which rounds them less than bfloat16 would. Of a
    cache, what is read is gathered first, because a page may belong to sequences of different
    descales."""
    if not call.is_fp8:
        return call
    qv = None if call.qv is None else call.qv.view(torch.uint8)
    call = replace(
        call, q=call.q.view(torch.uint8), k=call.k.view(torch.uint8), v=call.v.view(torch.uint8)
    )
    if call.is_cache:
        call = gather_keys(call, run, "FP8 is dequantised")
    return replace(
        call,
        q=_decode(run, call.q, call.q_descale, call.cu_seqlens_q),
        k=_decode(run, call.k, call.k_descale, call.cu_seqlens_k),
        v=_decode(run, call.v, call.v_descale, call.cu_seqlens_k),
        qv=None if qv is None else _decode(run, qv, call.q_descale, call.cu_seqlens_q),
        is_cache=False,
    )


def _decode(run: Run, codes: Tensor, descale: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Bytes of FP8 values times descale (batch_size, nheads_k), in float16. A table stands for the
    conversion, which the 910 lacks."""
    x = run.constant(e4m3_values, codes.device)[codes.int()]
    if descale is not None:
        factor = descale.repeat_interleave(x.shape[-2] // descale.shape[1], dim=1)
        factor = factor[:, None] if cu_seqlens is None else factor[sequence_of_row(cu_seqlens, x)]
        x = x * factor[..., None]
    return x.half()
