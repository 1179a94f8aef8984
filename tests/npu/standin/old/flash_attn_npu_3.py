"""The raw extension of flash_attn_npu 0.2.0b1: a top-level module with fwd alone."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # npu_kernel_model

from npu_kernel_model.host02 import forward as fwd

__all__ = ["fwd"]
