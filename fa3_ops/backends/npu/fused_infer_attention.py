"""CANN's npu_fused_infer_attention_score (FIA), through torch_npu. Its limits are those of CANN's
documentation for Atlas A2 and A3; it takes lengths as lists on the host, so it cannot be captured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Attention
from fa3_ops.backends.choice import asked_for, reasons_against
from fa3_ops.backends.lowering import keys, rows
from fa3_ops.backends.lowering.completion import as_asked, blind_rows, clear
from fa3_ops.backends.lowering.lengths import read
from fa3_ops.backends.npu import device
from fa3_ops.backends.npu.capabilities import FusedLimits, fused_limits

CAUSAL, BAND = 3, 4  # sparse_mode
PER_TOKEN_AND_HEAD = 3  # key_antiquant_mode, the one whose float32 scales are those of a sequence
FAR = 2**30  # its kernel adds lengths to the ends of a band in 32 bits


def is_packed(call: Attention) -> bool:
    """Whether it goes as TND: packed q, or q of which not all rows count."""
    return call.cu_seqlens_q is not None or call.seqused_q is not None


def page_sizes(call: Attention) -> range:
    can = fused_limits()
    if call.is_narrow:
        return can.narrow_pages
    if is_packed(call):
        return can.page_sizes
    return can.decode_pages if call.seqlen_q == 1 else can.prefill_pages


def packed_reasons(call: Attention, seqlens: list[tuple[int, int]], can: FusedLimits) -> list[str]:
    """Why a release does not take the call in layout TND."""
    width = f"headdim {call.headdim} and headdim_v {call.headdim_v}"
    in_full = (
        call.cu_seqlens_k is not None
        and not keys.needs_pages(call, counts_keys=False)
        and (sum(q for q, _ in seqlens), sum(k for _, k in seqlens))
        == (call.q.shape[0], call.k.shape[0])
        and all(k > 0 for _, k in seqlens)
    )
    sequences = call.batch_size * (1 if call.seqused_q is None else 2) + 2  # see lowering/rows.py
    reasons = {
        f"dtype {call.q.dtype} of packed q": call.q.dtype not in can.dtypes,
        f"{width} of packed q": (call.headdim, call.headdim_v) not in can.headdims,
        f"nheads {call.nheads} of nheads_k {call.nheads_k} of packed q": can.equal_heads
        and (call.nheads != call.nheads_k or call.nheads not in can.equal_heads),
        "packed q over keys that need a page table": not can.page_sizes and not in_full,
        "causal packed q with more rows than keys": call.causal
        and not can.causal_of_few_keys
        and any(q > k for q, k in seqlens),
        "packed q without a causal mask": not call.causal and not can.band,
        f"{width} of packed q without a causal mask": not call.causal
        and call.headdim_v != can.band_headdim_v,
        f"{call.batch_size} packed sequences": sequences > can.max_packed_sequences,
    }
    return [f"{reason} ({can.name})" for reason, given in reasons.items() if given]


def narrow_reasons(call: Attention, seqlens: list[tuple[int, int]], can: FusedLimits) -> list[str]:
    """Why it does not take k and v of 8 bits beside a wider q."""
    reasons = {
        f"k of {call.k.dtype}": call.is_fp8 or call.k.dtype not in can.narrow_dtypes,
        "k of 8 bits on a 950": device.is_950(),
        f"k of 8 bits and headdim {call.headdim}": call.headdim not in can.narrow_headdims,
        "k of 8 bits where not every sequence has one row of q": not rows.has_one_row_each(
            call, [q for q, _ in seqlens]
        ),
    }
    return [reason for reason, given in reasons.items() if given]


def reasons_to_dequantise(call: Attention, run: Run) -> list[str]:
    """Why it cannot serve k and v of 8 bits as they are; empty if it can."""
    asked = asked_for()
    if asked not in (None, FusedInferAttention.name):
        return [f"{asked} is asked for"]
    return reasons_against(FusedInferAttention(), call, run)


class FusedInferAttention(Backend[Attention]):
    name = "fused_infer_attention"
    reads_lengths = True
    capturable = False

    def not_supported_reasons(self, request: Attention, run: Run) -> list[str]:
        seqlens = run.lengths.pairs if run.lengths else []
        if request.is_narrow:
            reasons = narrow_reasons(request, seqlens, fused_limits())
            if reasons:
                return reasons
            request = rows.as_dense_rows(request)
        reasons = size_reasons(request, seqlens)
        for name, given in (
            # Documented as needing softmax_lse off, which every call here has on.
            ("qv", request.qv is not None),
            ("alibi_slopes", request.alibi_slopes is not None),
            ("attention_chunk", request.attention_chunk > 0),
            ("softcap", request.softcap > 0),
            (
                "window_size where a sequence may have one row of q",
                request.is_local and (is_packed(request) or request.seqlen_q == 1),
            ),
        ):
            if given:
                reasons.append(name)
        return reasons

    def lower(self, request: Attention, run: Run) -> Attention:
        assert run.lengths is not None
        if request.is_narrow:
            request = rows.as_dense_rows(request)
            run.note("k and v of 8 bits are read as they are")
        sizes, dense = page_sizes(request), request.cu_seqlens_q is None
        force = not run.lengths.covers(request)
        call = keys.as_pages(request, run, sizes, force=force, counts_keys=dense)
        call = rows.split_unused_rows(call, run)
        if call.cu_seqlens_q is not None and not run.lengths.plain:
            call = rows.cover_all_rows(call, run)
        if call.is_narrow:  # every key that the page table addresses gets a scale
            call = keys.without_far_pages(call, max(run.lengths.seqlens_k))
        return replace(keys.bound(call), q=call.q.contiguous())

    def launch(self, request: Attention, lowered: Attention, run: Run) -> tuple[Tensor, Tensor]:
        assert run.lengths is not None
        if not any(run.lengths.seqlens_q):
            return request.empty_results()
        out, softmax_lse = as_asked(request, *launch(lowered, run))
        if not run.lengths.plain:
            clear(out, softmax_lse, blind_rows(request))
        return out, softmax_lse


def size_reasons(call: Attention, seqlens: list[tuple[int, int]]) -> list[str]:
    """Why the operator does not take tensors of these dtypes and sizes."""
    reasons, can = [], fused_limits()
    d, d_v = call.headdim, call.headdim_v
    packed = is_packed(call)
    if call.q.dtype not in can.dense_dtypes:
        reasons.append(f"dtype {call.q.dtype}")
    elif packed:
        reasons += packed_reasons(call, seqlens, can)
    elif d != d_v or d not in can.dense_headdims:
        reasons.append(f"headdim {d} and headdim_v {d_v}")
    if call.nheads > can.max_heads or call.nheads > can.max_group * call.nheads_k:
        reasons.append(f"nheads {call.nheads} of nheads_k {call.nheads_k}")
    if call.nheads_k * max(d, d_v) > can.max_token:
        reasons.append(f"nheads_k {call.nheads_k} of {max(d, d_v)}")
    if max(call.k.numel(), call.v.numel()) > can.max_elements:
        reasons.append(f"{call.k.numel()} elements of k")
    decodes = not packed and call.seqlen_q == 1
    if decodes and any(k > can.max_decode_keys for _, k in seqlens):
        reasons.append(f"more than {can.max_decode_keys} keys of one row of q")
    return reasons


def upper_triangle(at: torch.device) -> Tensor:
    """(2048, 2048) bool, true where a key is masked: the mask of sparse_mode 3 and 4."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=at).triu_(1)


def launch(call: Attention, run: Run) -> tuple[Tensor, Tensor]:
    """softmax_lse as (nheads, total_q) or (batch_size, nheads, seqlen_q)."""
    import torch_npu

    packed = call.cu_seqlens_q is not None
    paged = call.page_table is not None
    cu_seqlens_q, seqused_k, cu_seqlens_k = read(
        call.cu_seqlens_q, call.seqused_k, call.cu_seqlens_k
    )
    masked = packed or (call.seqlen_q > 1 and (call.causal or call.is_local))
    left, right = call.window_size
    out, softmax_lse = torch_npu.npu_fused_infer_attention_score(
        call.q,
        call.k.flatten(-2) if paged else call.k,
        call.v.flatten(-2) if paged else call.v,
        atten_mask=run.constant(upper_triangle, call.q.device) if masked else None,
        actual_seq_lengths=cu_seqlens_q[1:] if cu_seqlens_q else None,
        actual_seq_lengths_kv=cu_seqlens_k[1:] if cu_seqlens_k else seqused_k,
        block_table=call.page_table,
        block_size=call.k.shape[1] if paged else 0,
        num_heads=call.nheads,
        num_key_value_heads=call.nheads_k,
        scale=call.softmax_scale,
        input_layout="TND" if packed else "BSND",
        sparse_mode=(CAUSAL if call.causal else BAND) if masked else 0,
        pre_tokens=left if masked and left >= 0 else FAR,  # CAUSAL takes no notice of them
        next_tokens=right if masked and right >= 0 else FAR,
        softmax_lse_flag=True,
        **(antiquant(call) if call.is_narrow else {}),
    )
    return out, softmax_lse.squeeze(-1).T if packed else softmax_lse.squeeze(-1)


def antiquant(call: Attention) -> dict[str, Any]:
    """The descales as scales of every key, (batch_size, nheads_k, keys) float32. Those of a head or
    of the tensor have the dtype of q, which would round them."""
    keys_each = call.k.shape[1] * (1 if call.page_table is None else call.page_table.shape[1])

    def scales(descale: Tensor | None) -> Tensor:
        if descale is None:
            descale = torch.ones(1, device=call.q.device)
        each = descale.expand(call.batch_size, call.nheads_k)[..., None]
        return each.expand(-1, -1, keys_each).contiguous()

    return {
        "key_antiquant_scale": scales(call.k_descale),
        "value_antiquant_scale": scales(call.v_descale),
        "key_antiquant_mode": PER_TOKEN_AND_HEAD,
        "value_antiquant_mode": PER_TOKEN_AND_HEAD,
    }
