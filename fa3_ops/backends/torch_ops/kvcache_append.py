"""kvcache_append_ by index_put_, to caches of any dtype and strides."""

from __future__ import annotations

import torch

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Append
from fa3_ops.backends.lowering.slots import SlotWrites, slot_writes
from fa3_ops.backends.written import mark_written


class TorchAppend(Backend[Append]):
    name = "torch"

    def is_bitwise(self, request: Append, run: Run) -> bool:
        return request.rotary_cos is None  # then it copies

    def lower(self, request: Append, run: Run) -> SlotWrites:
        return slot_writes(request, run)

    def launch(self, request: Append, lowered: SlotWrites, run: Run) -> None:
        mark_written(request.k_cache, request.v_cache)
        rows = request.k_cache.shape[1]
        at = ((lowered.slot // rows).long(), (lowered.slot % rows).long())
        for cache, x in ((request.k_cache, lowered.k), (request.v_cache, lowered.v)):
            if x.dtype == torch.float8_e4m3fn:  # bytes are bytes
                cache, x = cache.view(torch.uint8), x.view(torch.uint8)
            cache.index_put_(at, x)
