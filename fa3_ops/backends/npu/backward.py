"""The gradients of dense and packed attention on NPU: flash_attn_npu's backward, or plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from fa3_ops.backends.npu.lengths import Lengths, covers

WIDTH = 64  # the kernel's head dimensions are multiples of it


@dataclass
class Gradients:
    """A call whose gradients are wanted."""

    call: Attention
    dout: Tensor
    out: Tensor
    softmax_lse: Tensor
    dlse: Tensor | None
    deterministic: bool


def not_supported_reasons(wanted: Gradients) -> list[str]:
    """Why flash_attn_npu has no backward of the call. Reads the lengths, so it waits for the device
    outside a capture."""
    call = wanted.call
    call.capturing = device.capturing(call.q.device)
    lengths = None if call.capturing else Lengths.of(call)
    found = device.kernel()
    if isinstance(found, str):
        return [found]
    can = capabilities(found)
    reasons = not_supported(call, can)
    if not can.backward:
        reasons.append(f"no backward {can.name}")
    repeats = call.cu_seqlens_q is None or can.backward_deterministic_packed
    for name, given in (
        ("window_size", call.is_local and not can.backward_window),
        (
            "deterministic",
            wanted.deterministic and not repeats,
        ),
        ("seqused_q", call.seqused_q is not None),
        ("seqused_k", call.seqused_k is not None),
        ("cu_seqlens of one side", (call.cu_seqlens_q is None) != (call.cu_seqlens_k is None)),
        ("a gradient of softmax_lse", wanted.dlse is not None),
        ("rows that see no key or belong to no sequence", lengths and not covers(call, lengths)),
    ):
        if given:
            reasons.append(name)
    return reasons


def backward(wanted: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    call = wanted.call
    if call.is_empty:
        return torch.zeros_like(call.q), torch.zeros_like(call.k), torch.zeros_like(call.v)
    reasons = not_supported_reasons(wanted)
    asked = asked_for()
    if asked == "flash_attn_npu" and reasons:
        raise NotImplementedError(
            f"fa3_ops: backend flash_attn_npu has no backward here: {', '.join(reasons)}"
        )
    if reasons and asked is None:
        fallback(f"backward served by torch, because flash_attn_npu: {', '.join(reasons)}")
    if reasons or asked == "torch":
        return torch_ops.backward(call, wanted.dout, wanted.out, wanted.softmax_lse, wanted.dlse)
    return launch(wanted)


def from_start(t: Tensor) -> Tensor:
    """Contiguous and at the start of its memory, where the kernel looks for it."""
    t = t.contiguous()
    return t.clone() if t.storage_offset() != 0 else t


def launch(wanted: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    call = wanted.call
    found = device.kernel()
    assert isinstance(found, Kernel)
    width = -(-max(call.headdim, call.headdim_v) // WIDTH) * WIDTH
    dout, q, k, v, out = (
        from_start(F.pad(t, (0, width - t.shape[-1]))) if t.shape[-1] < width else from_start(t)
        for t in (wanted.dout, call.q, call.k, call.v, wanted.out)
    )
    softmax_lse = from_start(wanted.softmax_lse)  # no row here is without keys: +inf to the kernel
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
        *(None if t is None else from_start(t) for t in (call.cu_seqlens_q, call.cu_seqlens_k)),
        None,  # seqused_q
        None,  # seqused_k
        call.max_seqlen_q,
        call.max_seqlen_k,
        call.softmax_scale,
        call.causal,
        left,
        right,
        call.softcap,
        wanted.deterministic,
        0,  # sm_margin
    )
    return (
        dq[..., : call.headdim].contiguous(),
        dk[..., : call.headdim].contiguous(),
        dv[..., : call.headdim_v].contiguous(),
    )


def gradients(
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
) -> Gradients:
    """The arguments of flash_attn_varlen_func_backward as one."""
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
    return Gradients(call, dout, out, softmax_lse, dsoftmax_lse, deterministic)


def dense_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    *arguments: Any,
    **keywords: Any,
) -> Gradients:
    """Those of flash_attn_func_backward: the same without lengths."""
    return gradients(
        dout, q, k, v, out, softmax_lse, None, None, None, None, None, None, *arguments, **keywords
    )


def flash_attn_varlen_func_backward(
    *arguments: Any, **keywords: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(gradients(*arguments, **keywords))


def flash_attn_func_backward(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dense_gradients(*arguments, **keywords))
