"""Every kind of request in plain torch operators, the last resort on any device."""

from fa3_ops.backends.torch_ops.apply_rotary import TorchRotation
from fa3_ops.backends.torch_ops.attention import TorchAttention, TorchGradient
from fa3_ops.backends.torch_ops.cache_writes import TorchWrites
from fa3_ops.backends.torch_ops.flash_attn_combine import TorchCombination
from fa3_ops.backends.torch_ops.linear import TorchLinear
from fa3_ops.backends.torch_ops.scheduler_metadata import TorchPlan

__all__ = [
    "TorchAttention",
    "TorchCombination",
    "TorchGradient",
    "TorchLinear",
    "TorchPlan",
    "TorchRotation",
    "TorchWrites",
]
