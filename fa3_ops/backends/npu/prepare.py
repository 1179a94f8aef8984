"""What an attention on NPU goes through before one of its kernels is chosen."""

from __future__ import annotations

from dataclasses import replace

import torch

from fa3_ops.backends.backend import Run
from fa3_ops.backends.call import Attention
from fa3_ops.backends.lowering.dequantise import dequantise
from fa3_ops.backends.lowering.keys import select_table_rows, without_hidden_pages
from fa3_ops.backends.npu.flash_attn_npu import follows_metadata
from fa3_ops.backends.npu.fused_infer_attention import reasons_to_dequantise
from fa3_ops.backends.npu.scheduler_metadata import without_padding

LENGTHS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "cache_batch_idx",
    "cache_leftpad",
    "page_table",
    "scheduler_metadata",
)


def prepare(call: Attention, run: Run) -> Attention:
    """The call without what no kernel of the NPU has. A schedule that is followed takes the place
    of lengths on the host."""
    call = with_contiguous_lengths(call)
    if call.scheduler_metadata is not None and call.page_table is not None:
        call = without_padding(call)
    if call.scheduler_metadata is not None and not run.capturing:
        if follows_metadata(call):
            run.host_may_wait = False
        else:  # outside a capture, nobody reads it
            run.request = call = replace(call, scheduler_metadata=None)
    call = without_hidden_pages(select_table_rows(call, run))
    if call.is_narrow:
        call = without_narrow_keys(call, run)
    return call if call.sinks is None else replace(call, sinks=None)


def without_narrow_keys(call: Attention, run: Run) -> Attention:
    """What has 8 bits dequantised, unless a kernel reads it as it is."""
    reasons = reasons_to_dequantise(call, run)
    if not reasons:
        return call
    run.note(f"fused_infer_attention does not read 8 bits: {', '.join(reasons)}")
    dtype = torch.float16 if call.is_fp8 else call.q.dtype  # of FP8, bfloat16 would round more
    return dequantise(call, run, dtype)


def with_contiguous_lengths(call: Attention) -> Attention:
    """The kernels read these by address alone. (The rows of a page table may lie apart: bound.)"""
    given = ((name, getattr(call, name)) for name in LENGTHS)
    strided = {name: t.contiguous() for name, t in given if t is not None and t.stride(-1) != 1}
    return replace(call, **strided) if strided else call
