"""CANN's npu_fused_infer_attention_score (FIA), through torch_npu. Its limits are those of CANN's
documentation for Atlas A2 and A3; it takes lengths as lists on the host, so it cannot be captured.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from fa3_ops.backends.attention import Attention
from fa3_ops.backends.npu import lowering
from fa3_ops.backends.npu.lengths import Lengths, blind_rows, bound, clear, covers, read

DTYPES = (torch.float16, torch.bfloat16)
PACKED_HEADDIMS = {(128, 128), (192, 128), (192, 192)}  # (headdim, headdim_v) in layout TND
MAX_HEADDIM, MAX_HEADS, MAX_GROUP = 512, 256, 64
PACKED_PAGES = range(16, 1025, 16)
DECODE_PAGES = range(16, 513, 16)
PREFILL_PAGES = range(128, 513, 128)
CAUSAL, BAND = 3, 4  # sparse_mode
FAR = 2147483647


def is_packed(call: Attention) -> bool:
    """Whether it goes as TND: packed q, or q of which not all rows count."""
    return call.cu_seqlens_q is not None or call.seqused_q is not None


def page_sizes(call: Attention) -> range:
    if is_packed(call):
        return PACKED_PAGES
    return DECODE_PAGES if call.seqlen_q == 1 else PREFILL_PAGES


class FusedInferAttention:
    name = "fused_infer_attention"

    def not_supported_reasons(self, call: Attention) -> list[str]:
        reasons = []
        d, d_v = call.headdim, call.headdim_v
        if call.q.dtype not in DTYPES:
            reasons.append(f"dtype {call.q.dtype}")
        if is_packed(call):
            if (d, d_v) not in PACKED_HEADDIMS:
                reasons.append(f"headdim {d} and headdim_v {d_v} of packed q")
        elif d != d_v or d % 16 or d > MAX_HEADDIM:
            reasons.append(f"headdim {d} and headdim_v {d_v}")
        if call.nheads > MAX_HEADS or call.nheads > MAX_GROUP * call.nheads_k:
            reasons.append(f"nheads {call.nheads} of nheads_k {call.nheads_k}")
        for name, given in (
            # Documented as needing softmax_lse off, which every call here has on.
            ("qv", call.qv is not None),
            ("alibi_slopes", call.alibi_slopes is not None),
            ("attention_chunk", call.attention_chunk > 0),
            ("softcap", call.softcap > 0),
            ("graph capture", call.capturing),
        ):
            if given:
                reasons.append(name)
        if call.is_local and (is_packed(call) or call.seqlen_q == 1):
            reasons.append("window_size where a sequence may have one row of q")
        return reasons

    def lower(self, call: Attention, lengths: Lengths | None) -> Attention:
        return lower(call, lengths or Lengths.of(call))

    def forward(self, call: Attention, lengths: Lengths | None) -> tuple[Tensor, Tensor]:
        lengths = lengths or Lengths.of(call)
        lowered = self.lower(call, lengths)
        out, softmax_lse = launch(lowered)
        if call.cu_seqlens_q is None and softmax_lse.dim() == 2:
            batch_size, seqlen_q = call.q.shape[:2]
            out = out.view(batch_size, seqlen_q, *out.shape[1:])
            softmax_lse = softmax_lse.view(-1, batch_size, seqlen_q).transpose(0, 1)
        out, softmax_lse = out.contiguous(), softmax_lse.contiguous()
        if not lengths.plain:
            clear(out, softmax_lse, blind_rows(call))
        return out, softmax_lse


def lower(call: Attention, lengths: Lengths) -> Attention:
    sizes = page_sizes(call)
    call = lowering.as_pages(
        call, sizes, force=not covers(call, lengths), counts_keys=call.cu_seqlens_q is None
    )
    call = lowering.split_unused_rows(call)
    if call.cu_seqlens_q is not None and not lengths.plain:
        call = lowering.cover_all_rows(call)
    return replace(bound(call), q=call.q.contiguous())


@functools.cache
def upper_triangle(device: torch.device) -> Tensor:
    """(2048, 2048) bool, true where a key is masked: the mask of sparse_mode 3 and 4."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu_(1)


def launch(call: Attention) -> tuple[Tensor, Tensor]:
    """softmax_lse as (nheads, total_q) or (batch_size, nheads, seqlen_q)."""
    import torch_npu

    packed = call.cu_seqlens_q is not None
    paged = call.page_table is not None
    cu_seqlens_q, seqused_k, cu_seqlens_k = read(
        call.cu_seqlens_q, call.seqused_k, call.cu_seqlens_k
    )
    masked = (call.causal or call.is_local) and (packed or call.seqlen_q > 1)
    left, right = call.window_size
    out, softmax_lse = torch_npu.npu_fused_infer_attention_score(
        call.q,
        call.k.flatten(-2) if paged else call.k,
        call.v.flatten(-2) if paged else call.v,
        atten_mask=upper_triangle(call.q.device) if masked else None,
        actual_seq_lengths=cu_seqlens_q[1:] if cu_seqlens_q else None,
        actual_seq_lengths_kv=cu_seqlens_k[1:] if cu_seqlens_k else seqused_k,
        block_table=call.page_table,
        block_size=call.k.shape[1] if paged else 0,
        num_heads=call.nheads,
        num_key_value_heads=call.nheads_k,
        scale=call.softmax_scale,
        input_layout="TND" if packed else "BSND",
        sparse_mode=(CAUSAL if call.causal else BAND) if masked else 0,
        pre_tokens=left if masked and left >= 0 else FAR,
        next_tokens=right if masked and right >= 0 else FAR,
        softmax_lse_flag=True,
    )
    return out, softmax_lse.squeeze(-1).T if packed else softmax_lse.squeeze(-1)
