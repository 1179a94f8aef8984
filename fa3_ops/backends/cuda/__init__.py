"""CUDA. Importing this touches no device and needs no Triton.

docs/cuda.md says which kernel serves which call.
"""

from __future__ import annotations

import torch

from fa3_ops.backends import torch_ops, triton
from fa3_ops.backends.call import (
    Append,
    Attention,
    Combination,
    Gradient,
    Linear,
    Plan,
    Rotation,
    Scatter,
)
from fa3_ops.backends.cuda.flash_attn_3 import FlashAttn3, FlashAttn3Gradient
from fa3_ops.backends.cuda.flash_attn_4 import FlashAttn4, FlashAttn4Gradient
from fa3_ops.backends.cuda.prefill import CudaAttention
from fa3_ops.backends.devices import Device


def capturing(at: torch.device) -> bool:
    """Whether the current stream of a device records a graph."""
    with torch.cuda.device(at):
        return torch.cuda.is_current_stream_capturing()


CUDA = Device(
    "cuda",
    key="CUDA",
    steady_sums=False,
    repeats=True,
    capturing=capturing,
    backends={
        # FlashAttention's own kernels keep no bitwise contract: they serve who asks for them.
        Attention: [CudaAttention(), torch_ops.TorchAttention(), FlashAttn3(), FlashAttn4()],
        Gradient: [
            triton.TritonGradient(),
            torch_ops.TorchGradient(),
            FlashAttn3Gradient(),
            FlashAttn4Gradient(),
        ],
        Append: [triton.TritonWrites(), torch_ops.TorchWrites()],
        Scatter: [triton.TritonWrites(), torch_ops.TorchWrites()],
        Linear: [triton.TritonLinear(), torch_ops.TorchLinear()],
        Rotation: [triton.TritonRotation(), torch_ops.TorchRotation()],
        Combination: [triton.TritonCombination(), torch_ops.TorchCombination()],
        Plan: [triton.TritonPlan()],
    },
)
