"""The raw extension of flash_attn_npu 0.4.2.post1 for Ascend 910: positional arguments."""

from cann_emulator.standin.kernel_model.backward import backward as bwd
from cann_emulator.standin.kernel_model.host import forward as fwd
from cann_emulator.standin.kernel_model.host import get_scheduler_metadata

__all__ = ["bwd", "fwd", "get_scheduler_metadata"]
