"""Triton: kernels written once, for every device that has a Triton.

Importing this imports no Triton; the kernels are imported when the first call wants them.
"""

from fa3_ops.backends.triton.apply_rotary import TritonRotation
from fa3_ops.backends.triton.attention import TritonAttention
from fa3_ops.backends.triton.cache_writes import TritonWrites
from fa3_ops.backends.triton.flash_attn_combine import TritonCombination
from fa3_ops.backends.triton.get_scheduler_metadata import TritonPlan
from fa3_ops.backends.triton.gradient import TritonGradient
from fa3_ops.backends.triton.linear import TritonLinear

__all__ = [
    "TritonAttention",
    "TritonCombination",
    "TritonGradient",
    "TritonLinear",
    "TritonPlan",
    "TritonRotation",
    "TritonWrites",
]
