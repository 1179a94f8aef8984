"""kvcache_append_ and kvcache_scatter_ by index_put_, to caches of any dtype and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from fa3_ops.backends.backend import Run
from fa3_ops.backends.call import Append, Scatter
from fa3_ops.backends.lowering.slots import SlotWrites, WritesSlots
from fa3_ops.backends.written import mark_written


class TorchWrites(WritesSlots):
    name = "torch"

    def launch(self, request: Append | Scatter, lowered: SlotWrites, run: Run) -> None:
        mark_written(request.k_cache, request.v_cache)
        if lowered.slot.numel() == 0 or request.k_cache.numel() == 0:
            return
        caches = (request.k_cache, request.v_cache)
        k_cache, v_cache = (_as_bytes(x) for x in caches)
        k, v, slot = _as_bytes(lowered.k), _as_bytes(lowered.v), lowered.slot
        rows = k_cache.shape[1]
        if not lowered.every_row:
            k, v, slot = _repeated(k, v, slot, k_cache, v_cache)
        at = ((slot // rows).long(), (slot % rows).long())
        k_cache.index_put_(at, k)
        v_cache.index_put_(at, v)


def _as_bytes(x: Tensor) -> Tensor:
    """FP8 as bytes, which every device copies."""
    return x.view(torch.uint8) if x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else x


def _repeated(
    k: Tensor, v: Tensor, slot: Tensor, k_cache: Tensor, v_cache: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and slots in which the rows that must not be written repeat one that is, or, if there is
    none, what the cache holds: no shape depends on a value."""
    written = slot >= 0
    donor = written.int().argmax()
    source = torch.where(written, torch.arange(len(slot), device=slot.device), donor)
    slot = slot[source].clamp(min=0)
    at = ((slot // k_cache.shape[1]).long(), (slot % k_cache.shape[1]).long())
    some = written.any()
    k = torch.where(some, k[source], k_cache[at])
    return k, torch.where(some, v[source], v_cache[at]), slot
