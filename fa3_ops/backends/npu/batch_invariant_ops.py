"""linear by Ascend's package batch_invariant_ops, which vLLM-Ascend builds with
VLLM_BATCH_INVARIANT=1: operators torch.ops.batch_invariant_ops.*, there once it is imported."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Linear
from fa3_ops.ops.checks import WIDE


@functools.cache
def is_installed() -> bool:
    return importlib.util.find_spec("batch_invariant_ops") is not None


class BatchInvariantOps(Backend[Linear]):
    """The bias is added to the rounded product."""

    name = "batch_invariant_ops"

    def not_supported_reasons(self, request: Linear, run: Run) -> list[str]:
        reasons = [] if request.x.dtype in WIDE else [f"dtype {request.x.dtype}"]
        if request.x.shape[-1] == 0:
            reasons.append("there is nothing to sum")
        if not is_installed():
            reasons.append("batch_invariant_ops is not installed")
        return reasons

    def is_bitwise(self, request: Linear, run: Run) -> bool:
        return True

    def launch(self, request: Linear, lowered: Linear, run: Run) -> Tensor:
        import batch_invariant_ops  # noqa: F401

        x, weight = request.x, request.weight
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor = torch.ops.batch_invariant_ops.npu_mm_batch_invariant(rows, weight.t())
        out = out if request.bias is None else out + request.bias
        return out.reshape(*x.shape[:-1], weight.shape[0]).contiguous()
