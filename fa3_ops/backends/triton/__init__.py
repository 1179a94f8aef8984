"""Triton: kernels written once, for every device that has a Triton.

Importing this imports no Triton; the kernels are imported when the first call wants them.
"""

from fa3_ops.backends.triton.attention import TritonAttention
from fa3_ops.backends.triton.gradient import TritonGradient

__all__ = ["TritonAttention", "TritonGradient"]
