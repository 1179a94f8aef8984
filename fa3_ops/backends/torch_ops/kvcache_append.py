"""kvcache_append_ by index_put_, to caches of any dtype and strides."""

from __future__ import annotations

import torch

from fa3_ops.backends.backend import Run
from fa3_ops.backends.call import Append
from fa3_ops.backends.lowering.slots import SlotWrites, WritesSlots
from fa3_ops.backends.written import mark_written


class TorchAppend(WritesSlots):
    name = "torch"

    def launch(self, request: Append, lowered: SlotWrites, run: Run) -> None:
        mark_written(request.k_cache, request.v_cache)
        rows = request.k_cache.shape[1]
        at = ((lowered.slot // rows).long(), (lowered.slot % rows).long())
        for cache, x in ((request.k_cache, lowered.k), (request.v_cache, lowered.v)):
            if x.dtype == torch.float8_e4m3fn:  # bytes are bytes
                cache, x = cache.view(torch.uint8), x.view(torch.uint8)
            cache.index_put_(at, x)
