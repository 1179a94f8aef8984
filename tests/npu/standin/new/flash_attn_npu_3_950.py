"""The raw extension of flash_attn_npu 0.4.2.post1 for Ascend 950: positional arguments."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # npu_kernel_model

from npu_kernel_model.host950 import backward as bwd
from npu_kernel_model.host950 import forward as fwd
from npu_kernel_model.host950 import get_scheduler_metadata

__all__ = ["bwd", "fwd", "get_scheduler_metadata"]
