"""CANN's scatter operator, which writes rows to slots of a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fa3_ops.backends.backend import Run
from fa3_ops.backends.call import Append, Scatter
from fa3_ops.backends.lowering.slots import SlotWrites, WritesSlots
from fa3_ops.backends.written import mark_written
from fa3_ops.ops.checks import NARROW

DTYPES = (torch.float16, torch.bfloat16, torch.float32, *NARROW)


class ScatterPaKvCache(WritesSlots):
    """Skips negative slots, as CANN's kernel does."""

    name = "npu_scatter_pa_kv_cache"

    def not_supported_reasons(self, request: Append | Scatter, run: Run) -> list[str]:
        dtype = request.k_cache.dtype
        reasons = [] if dtype in DTYPES else [f"dtype {dtype}"]
        if not (request.k_cache.is_contiguous() and request.v_cache.is_contiguous()):
            reasons.append("the cache is strided")
        return reasons

    def launch(self, request: Append | Scatter, lowered: SlotWrites, run: Run) -> None:
        import torch_npu

        mark_written(request.k_cache, request.v_cache)
        if lowered.slot.numel() == 0:
            return
        torch_npu.npu_scatter_pa_kv_cache(
            _as_int8(lowered.k).contiguous(),
            _as_int8(lowered.v).contiguous(),
            _as_int8(request.k_cache),
            _as_int8(request.v_cache),
            lowered.slot,
            cache_mode="Norm",
        )


def _as_int8(x: Tensor) -> Tensor:
    """Bytes, which the kernel copies, as the dtype of a byte that it takes."""
    return x.view(torch.int8) if x.dtype in NARROW else x
