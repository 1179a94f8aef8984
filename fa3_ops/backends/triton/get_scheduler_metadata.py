"""get_scheduler_metadata: how many partial results TritonAttention cuts the keys of each sequence
into. A description: the schedule is made of shapes, and never changes a number."""

from __future__ import annotations

from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Plan
from fa3_ops.backends.triton.schedule import CHUNK
from fa3_ops.ops import checks


class TritonPlan(Backend[Plan]):
    """In plain torch operators, from lengths that stay on the device."""

    name = "triton"

    def is_bitwise(self, request: Plan, run: Run) -> bool:
        return True

    def lower(self, request: Plan, run: Run) -> Plan:
        batch_size = request.batch_size
        checks.lengths_at_least(request.cache_seqlens, batch_size, "cache_seqlens")
        checks.lengths_at_least(request.cu_seqlens_k_new, batch_size + 1, "cu_seqlens_k_new")
        checks.lengths_at_least(request.cache_leftpad, batch_size, "cache_leftpad")
        return request

    def launch(self, request: Plan, lowered: Plan, run: Run) -> Tensor:
        batch_size, cu_seqlens = request.batch_size, request.cu_seqlens_k_new
        keys = request.cache_seqlens[:batch_size] + request.max_seqlen_k_new
        if cu_seqlens is not None:
            keys = request.cache_seqlens[:batch_size] + cu_seqlens[: batch_size + 1].diff()
        if request.cache_leftpad is not None:
            keys = keys - request.cache_leftpad[:batch_size]
        metadata = request.cache_seqlens.new_zeros(request.cache_seqlens.shape)
        metadata[:batch_size] = (keys.clamp(min=0) + (CHUNK - 1)) // CHUNK
        return metadata
