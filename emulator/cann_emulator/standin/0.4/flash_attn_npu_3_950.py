"""The raw extension of flash_attn_npu 0.4.2.post1 for Ascend 950: positional arguments."""

from cann_emulator.standin.kernel_model.host950 import backward as bwd
from cann_emulator.standin.kernel_model.host950 import forward as fwd
from cann_emulator.standin.kernel_model.host950 import get_scheduler_metadata

__all__ = ["bwd", "fwd", "get_scheduler_metadata"]
