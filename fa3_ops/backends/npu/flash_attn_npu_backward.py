"""flash_attn_npu's gradients of dense and packed attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Gradient
from fa3_ops.backends.npu import device
from fa3_ops.backends.npu.capabilities import capabilities
from fa3_ops.backends.npu.flash_attn_npu import capture_reasons, not_supported

WIDTH = 64  # the kernel's head dimensions are multiples of it


class FlashAttnNpuGradient(Backend[Gradient]):
    name = "flash_attn_npu"
    reads_lengths = True

    def not_supported_reasons(self, request: Gradient, run: Run) -> list[str]:
        found = device.kernel()
        if isinstance(found, str):
            return [found]
        call, lengths, can = request.call, run.lengths, capabilities(found)
        reasons = not_supported(call, lengths.pairs if lengths else [], can)
        if run.capturing:
            reasons += capture_reasons(call, can)
        repeats = call.cu_seqlens_q is None or can.backward_deterministic_packed
        one_sided = (call.cu_seqlens_q is None) != (call.cu_seqlens_k is None)
        unseen = lengths is not None and not lengths.covers(call)
        for name, given in (
            (f"no backward {can.name}", not can.backward),
            ("window_size", call.is_local and not can.backward_window),
            ("deterministic", request.deterministic and not repeats),
            ("seqused_q", call.seqused_q is not None),
            ("seqused_k", call.seqused_k is not None),
            ("cu_seqlens of one side", one_sided),
            ("a gradient of softmax_lse", request.dsoftmax_lse is not None),
            ("rows that see no key or belong to no sequence", unseen),
        ):
            if given:
                reasons.append(name)
        return reasons

    def launch(
        self, request: Gradient, lowered: Gradient, run: Run
    ) -> tuple[Tensor, Tensor, Tensor]:
        return launch(request)


def from_start(t: Tensor) -> Tensor:
    """Contiguous and at the start of its memory, where the kernel looks for it."""
    t = t.contiguous()
    return t.clone() if t.storage_offset() != 0 else t


def launch(request: Gradient) -> tuple[Tensor, Tensor, Tensor]:
    call = request.call
    width = -(-max(call.headdim, call.headdim_v) // WIDTH) * WIDTH
    dout, q, k, v, out = (
        from_start(F.pad(t, (0, width - t.shape[-1]))) if t.shape[-1] < width else from_start(t)
        for t in (request.dout, call.q, call.k, call.v, request.out)
    )
    softmax_lse = from_start(request.softmax_lse)  # no row here is without keys: +inf to the kernel
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    left, right = (-1, -1) if call.causal else call.window_size
    device.found_kernel().module.bwd(
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
        request.deterministic,
        0,  # sm_margin
    )
    return (
        dq[..., : call.headdim].contiguous(),
        dk[..., : call.headdim].contiguous(),
        dv[..., : call.headdim_v].contiguous(),
    )
