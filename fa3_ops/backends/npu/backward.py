"""The gradients of dense and packed attention on NPU: flash_attn_npu's backward, or plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fa3_ops.backends.attention import Attention
from fa3_ops.backends.choice import asked_for, fallback
from fa3_ops.backends.npu import device, torch_ops
from fa3_ops.backends.npu.capabilities import capabilities
from fa3_ops.backends.npu.device import Kernel
from fa3_ops.backends.npu.flash_attn_npu import not_supported
from fa3_ops.backends.npu.lengths import Lengths

WIDTH = 64  # the kernel's head dimensions are multiples of it
NO_KEY = float("inf")  # softmax_lse of a row without keys, to the kernel


def not_supported_reasons(
    call: Attention, lengths: Lengths | None, dlse: Tensor | None, deterministic: bool
) -> list[str]:
    """Why flash_attn_npu has no backward of the call."""
    found = device.kernel()
    if isinstance(found, str):
        return [found]
    can = capabilities(found)
    reasons = not_supported(call, can)
    if not can.backward:
        reasons.append(f"no backward {can.name}")
    packed = call.cu_seqlens_q is not None
    for name, given in (
        ("window_size", call.is_local and not can.backward_window),
        ("deterministic", deterministic and packed and not can.backward_deterministic_packed),
        ("seqused_q", call.seqused_q is not None),
        ("seqused_k", call.seqused_k is not None),
        ("cu_seqlens of one side", (call.cu_seqlens_q is None) != (call.cu_seqlens_k is None)),
        ("a gradient of softmax_lse", dlse is not None),
        ("rows that see no key or belong to no sequence", lengths and not covers(call, lengths)),
    ):
        if given:
            reasons.append(name)
    return reasons


def covers(call: Attention, lengths: Lengths) -> bool:
    """Whether every row of q, k and v belongs to a sequence, and every row of q sees a key."""
    cu = lengths.cu_seqlens_k
    return lengths.plain and (cu is None or (cu[0] == 0 and cu[-1] == call.k.shape[0]))


def backward(
    call: Attention,
    dout: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dlse: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call.capturing = device.capturing()
    if call.is_empty:
        return torch.zeros_like(call.q), torch.zeros_like(call.k), torch.zeros_like(call.v)
    lengths = None if call.capturing else Lengths.of(call)
    reasons = not_supported_reasons(call, lengths, dlse, deterministic)
    asked = asked_for()
    if reasons or asked == "torch":
        if asked == "flash_attn_npu":
            raise NotImplementedError(
                f"fa3_ops: backend flash_attn_npu has no backward here: {', '.join(reasons)}"
            )
        if reasons:
            fallback(f"backward served by torch, because flash_attn_npu: {', '.join(reasons)}")
        return torch_ops.backward(call, dout, out, softmax_lse, dlse)
    return launch(call, dout, out, softmax_lse, deterministic)


def from_start(t: Tensor) -> Tensor:
    """Contiguous and at the start of its memory, where the kernel looks for it."""
    t = t.contiguous()
    return t.clone() if t.storage_offset() != 0 else t


def launch(
    call: Attention, dout: Tensor, out: Tensor, softmax_lse: Tensor, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    found = device.kernel()
    assert isinstance(found, Kernel)
    width = -(-max(call.headdim, call.headdim_v) // WIDTH) * WIDTH
    dout, q, k, v, out = (
        from_start(F.pad(t, (0, width - t.shape[-1]))) if t.shape[-1] < width else from_start(t)
        for t in (dout, call.q, call.k, call.v, out)
    )
    softmax_lse = from_start(softmax_lse.masked_fill(softmax_lse == -NO_KEY, NO_KEY))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    left, right = (-1, -1) if call.causal else call.window_size
    found.module.bwd(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        None,  # seqused_q
        None,  # seqused_k
        call.max_seqlen_q,
        call.max_seqlen_k,
        call.softmax_scale,
        call.causal,
        left,
        right,
        call.softcap,
        deterministic,
        0,  # sm_margin
    )
    return (
        dq[..., : call.headdim].contiguous(),
        dk[..., : call.headdim].contiguous(),
        dv[..., : call.headdim_v].contiguous(),
    )


def flash_attn_varlen_func_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    dsoftmax_lse: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    call = Attention(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    return backward(call, dout, out, softmax_lse, dsoftmax_lse, deterministic)


def flash_attn_func_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    *arguments: Any,
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """flash_attn_varlen_func_backward without its lengths."""
    return flash_attn_varlen_func_backward(
        dout, q, k, v, out, softmax_lse, None, None, None, None, None, None, *arguments, **keywords
    )
