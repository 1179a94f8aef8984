"""CANN's scatter operator, which writes rows to slots of a paged cache."""

from __future__ import annotations

import torch

from fa3_ops.backends.backend import Run
from fa3_ops.backends.call import Append
from fa3_ops.backends.lowering.slots import SlotWrites, WritesSlots
from fa3_ops.backends.written import mark_written

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class ScatterPaKvCache(WritesSlots):
    name = "npu_scatter_pa_kv_cache"

    def not_supported_reasons(self, request: Append, run: Run) -> list[str]:
        reasons = [] if request.k.dtype in DTYPES else [f"dtype {request.k.dtype}"]
        if not (request.k_cache.is_contiguous() and request.v_cache.is_contiguous()):
            reasons.append("the cache is strided")
        return reasons

    def launch(self, request: Append, lowered: SlotWrites, run: Run) -> None:
        import torch_npu

        mark_written(request.k_cache, request.v_cache)
        if lowered.slot.numel() == 0:
            return
        torch_npu.npu_scatter_pa_kv_cache(
            lowered.k.contiguous(),
            lowered.v.contiguous(),
            request.k_cache,
            request.v_cache,
            lowered.slot,
            cache_mode="Norm",
        )
