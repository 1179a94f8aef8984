"""apply_rotary in plain torch operators."""

from __future__ import annotations

from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Rotation
from fa3_ops.backends.lowering.lengths import read, row_counts
from fa3_ops.backends.lowering.rotary import check_positions, rotate


class TorchRotation(Backend[Rotation]):
    name = "torch"

    def launch(self, request: Rotation, lowered: Rotation, run: Run) -> Tensor:
        if run.host_may_wait:
            first, cu = read(request.rotary_seqlens, request.cu_seqlens)
            assert first is not None
            counts = row_counts(request.x, cu, len(first), "cu_seqlens_q")
            check_positions(first, counts, request.rotary_cos, request.advance)
        return rotate(
            request.x,
            request.rotary_cos,
            request.rotary_sin,
            request.rotary_seqlens,
            request.cu_seqlens,
            request.rotary_interleaved,
            request.advance,
        )
