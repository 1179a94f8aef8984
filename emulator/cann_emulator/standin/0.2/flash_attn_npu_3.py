"""The raw extension of flash_attn_npu 0.2.0b1: a top-level module with fwd alone."""

from cann_emulator.standin.kernel_model.host02 import forward as fwd

__all__ = ["fwd"]
